//! Cross-entropy over the vocabulary, whole or in parts: whoever holds some columns of the logits gives a [`Softmax`] of
//! them, and several of these together are one of all columns.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::element::Element;
use crate::embed::Vocabulary;
use crate::gpu::{self, Gpu};
use crate::isa::{Isa, isa};
use crate::math::{exp, max, sum};
use crate::tensor::{SharedMut, View, dims2, expect_activation, expect_dims, tensor};
use crate::{Error, Result};

/// The tokens that logits should have chosen, one a row, and which columns of the vocabulary the logits are.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Of the logits' columns.
    pub vocabulary: Vocabulary,
}

/// What a softmax over the vocabulary needs of each row of logits: `[T]` f32 each, where the logits lie.
#[derive(Clone, Debug)]
pub struct Softmax {
    /// The largest logit.
    pub top: Tensor,
    /// Sum of `exp(logit - top)`.
    pub total: Tensor,
    /// The target's logit; 0 where it is not among the columns.
    pub target: Tensor,
}

impl Softmax {
    /// Of the columns that `logits` holds.
    ///
    /// # Shapes
    /// `logits` `[T, n]` f32, `n` columns of the vocabulary from the first of `targets.vocabulary` on; `T` targets.
    ///
    /// # Errors
    /// If the shapes or types do not fit, or a target is outside of the vocabulary.
    pub fn new(logits: &Tensor, targets: Targets<'_>) -> Result<Self> {
        if let Some(gpu) = Gpu::of(logits)? {
            check("softmax", logits, targets)?;
            return gpu::loss::softmax(&gpu, logits, targets);
        }
        Self::new_on(isa(), logits, targets)
    }

    pub(crate) fn new_on(isa: Isa, logits: &Tensor, targets: Targets<'_>) -> Result<Self> {
        let op = "softmax";
        let n = check(op, logits, targets)?;
        let view = View::new(op, logits)?;
        let x = view.slice::<f32>()?;
        let rows = targets.ids.par_iter().enumerate().map(|(row, id)| {
            let x = &x[row * n..(row + 1) * n];
            let target = targets.vocabulary.place(*id, n).map_or(0.0, |place| x[place]);
            let (top, total) = top_and_total(isa, x);
            (top, (total, target))
        });
        let (top, (total, target)): (Vec<f32>, (Vec<f32>, Vec<f32>)) = rows.unzip();
        let dims = [targets.ids.len()];
        Ok(Self { top: tensor(top, &dims)?, total: tensor(total, &dims)?, target: tensor(target, &dims)? })
    }

    /// The same with totals in relation to `top`, which is nowhere below the own one: as others have them.
    ///
    /// # Errors
    /// If there is not one `top` a row.
    pub fn relative_to(self, top: Tensor) -> Result<Self> {
        let total = (self.total * (self.top - &top)?.exp()?)?;
        Ok(Self { top, total, target: self.target })
    }

    /// The logarithms of the normalisers.
    ///
    /// # Errors
    /// If the device fails.
    pub fn normalisers(&self) -> Result<Tensor> {
        Ok((&self.top + self.total.log()?)?)
    }

    /// The token losses `logsumexp(logits) - logits[target] + z_loss logsumexp(logits)^2`, once all columns are in it.
    ///
    /// The second part pulls the logarithm of the normaliser to 0 (Shazeer et al. 2018; T5X calls it z-loss).
    ///
    /// # Errors
    /// If the device fails.
    pub fn losses(&self, z_loss: f32) -> Result<Tensor> {
        let normalisers = self.normalisers()?;
        let losses = (&normalisers - &self.target)?;
        if z_loss == 0.0 {
            return Ok(losses);
        }
        let scaled = normalisers.affine(f64::from(z_loss), 0.0)?;
        Ok((losses + (scaled * normalisers)?)?)
    }
}

/// The largest of a row's logits, and the sum of `exp(logit - top)`.
fn top_and_total(isa: Isa, x: &[f32]) -> (f32, f32) {
    isa.vectorize(
        #[inline(always)]
        || {
            let top = max(x);
            let total = sum(
                [x],
                #[inline(always)]
                |[x]| exp(x - top),
            );
            (top, total)
        },
    )
}

/// The most probable token of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// Its column: the first, if several have the largest logit.
    pub token: u32,
    /// In nats, 0 or less.
    pub log_probability: f32,
}

/// Vocabularies are smaller, and f32 counts so far.
const MOST_COLUMNS: usize = 1 << 24;

/// The most probable token of each row of `logits`, `[T, V]` f32. Waits for the device.
///
/// # Errors
/// If there are no columns, or more than 2^24, or the device fails.
pub fn best(logits: &Tensor) -> Result<Vec<Best>> {
    let op = "best";
    let (_, n) = dims2(op, logits)?;
    if n == 0 || n > MOST_COLUMNS {
        return Err(Error::Shape { op, what: format!("rows of {n} logits") });
    }
    if let Some(gpu) = Gpu::of(logits)? {
        let rows: Vec<f32> = gpu::loss::best(&gpu, logits)?.flatten_all()?.to_vec1()?;
        let (pairs, _) = rows.as_chunks();
        return Ok(pairs
            .iter()
            .map(|&[token, log_probability]| Best { token: token as u32, log_probability })
            .collect());
    }
    let (isa, view) = (isa(), View::new(op, logits)?);
    let rows = view.slice::<f32>()?.par_chunks_exact(n).map(|x| {
        let (top, total) = top_and_total(isa, x);
        let token = x.iter().position(|logit| *logit == top).unwrap_or_default() as u32;
        Best { token, log_probability: -total.ln() }
    });
    Ok(rows.collect())
}

/// What of a loss its gradient depends on, row by row.
#[derive(Clone, Copy, Debug)]
pub struct LossSlope<'a> {
    /// Logarithms of the normalisers over all columns, `[T]` f32.
    pub normalisers: &'a Tensor,
    /// Factors of the losses, `T`.
    pub scale: &'a [f32],
    /// See [`Softmax::losses`].
    pub z_loss: f32,
}

/// The gradient to the logits of `sum(scale * loss)`, for the columns that `logits` holds.
///
/// # Shapes
/// `logits` `[T, n]` f32, as for [`Softmax::new`]; the gradient is `[T, n]` of type `out` (bf16 or f32).
///
/// # Errors
/// If the shapes or types do not fit, or a target is outside of the vocabulary.
pub fn cross_entropy_gradient(
    logits: &Tensor,
    targets: Targets<'_>,
    slope: LossSlope<'_>,
    out: DType,
) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(logits)? {
        expect_activation("cross_entropy_gradient", out)?;
        check_slope(logits, targets, slope)?;
        return gpu::loss::cross_entropy_gradient(&gpu, logits, targets, slope, out);
    }
    cross_entropy_gradient_on(isa(), logits, targets, slope, out)
}

pub(crate) fn cross_entropy_gradient_on(
    isa: Isa,
    logits: &Tensor,
    targets: Targets<'_>,
    slope: LossSlope<'_>,
    out: DType,
) -> Result<Tensor> {
    expect_activation("cross_entropy_gradient", out)?;
    match out {
        DType::BF16 => gradient::<bf16>(isa, logits, targets, slope),
        _ => gradient::<f32>(isa, logits, targets, slope),
    }
}

fn gradient<O: Element>(
    isa: Isa,
    logits: &Tensor,
    targets: Targets<'_>,
    slope: LossSlope<'_>,
) -> Result<Tensor> {
    let op = "cross_entropy_gradient";
    let n = check_slope(logits, targets, slope)?;
    let LossSlope { normalisers, scale, z_loss } = slope;
    let normalisers = View::new(op, normalisers)?;
    let normalisers = normalisers.slice::<f32>()?;
    let logits = View::new(op, logits)?;
    let x = logits.slice::<f32>()?;
    let mut values: Vec<O> = Vec::with_capacity(x.len());
    let out = SharedMut::uninit(&mut values);
    targets.ids.par_iter().enumerate().for_each(|(row, id)| {
        let (x, lse, scale) = (&x[row * n..(row + 1) * n], normalisers[row], scale[row]);
        // SAFETY: each row of the result is written by one thread.
        let out = unsafe { out.range(row * n, n) };
        isa.vectorize(
            #[inline(always)]
            || {
                // d lse / dx = p = exp(x - lse);  d(lse - x_target + z lse^2) / dx = (1 + 2 z lse) p - [target].
                let weight = scale * (1.0 + 2.0 * z_loss * lse);
                for (o, x) in out.iter_mut().zip(x) {
                    o.write(O::narrow(weight * exp(x - lse)));
                }
                if let Some(place) = targets.vocabulary.place(*id, n) {
                    out[place].write(O::narrow(weight * exp(x[place] - lse) - scale));
                }
            },
        );
    });
    // SAFETY: the rows cover the result.
    unsafe { values.set_len(x.len()) };
    tensor(values, &[targets.ids.len(), n])
}

/// The number of columns.
fn check_slope(logits: &Tensor, targets: Targets<'_>, slope: LossSlope<'_>) -> Result<usize> {
    let op = "cross_entropy_gradient";
    let n = check(op, logits, targets)?;
    expect_dims(op, "the normalisers", slope.normalisers, &[targets.ids.len()])?;
    if slope.scale.len() == targets.ids.len() {
        return Ok(n);
    }
    let what = format!("{} scales for {} tokens", slope.scale.len(), targets.ids.len());
    Err(Error::Shape { op, what })
}

/// The number of columns.
fn check(op: &'static str, logits: &Tensor, targets: Targets<'_>) -> Result<usize> {
    let (rows, n) = dims2(op, logits)?;
    let Targets { ids, vocabulary } = targets;
    let refuse = |what: String| Err(Error::Shape { op, what });
    if rows != ids.len() {
        return refuse(format!("{rows} rows of logits for {} targets", ids.len()));
    }
    if vocabulary.first + n > vocabulary.size {
        return refuse(format!(
            "{n} columns from {} on of a vocabulary of {}",
            vocabulary.first, vocabulary.size
        ));
    }
    match ids.iter().find(|t| **t as usize >= vocabulary.size) {
        Some(t) => refuse(format!("target {t} is outside of a vocabulary of {}", vocabulary.size)),
        None => Ok(n),
    }
}
