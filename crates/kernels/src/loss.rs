//! Cross-entropy over the vocabulary.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::element::Element;
use crate::isa::{Isa, isa};
use crate::math::{exp, max, sum};
use crate::tensor::{SharedMut, View, dims2, expect_activation, tensor};
use crate::{Error, Result};

/// The token losses `logsumexp(logits) - logits[target] + z_loss logsumexp(logits)^2`, row by row.
///
/// The second part pulls the logarithm of the normaliser to 0 (Shazeer et al. 2018; T5X calls it z-loss).
///
/// # Shapes
/// `logits` `[T, V]` f32; `targets` and the result `T`.
///
/// # Errors
/// If the shapes or types do not fit, or a target is not below `V`.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], z_loss: f32) -> Result<Vec<f32>> {
    cross_entropy_on(isa(), logits, targets, z_loss)
}

pub(crate) fn cross_entropy_on(isa: Isa, logits: &Tensor, targets: &[u32], z_loss: f32) -> Result<Vec<f32>> {
    let op = "cross_entropy";
    let v = check(op, logits, targets)?;
    let logits = View::new(op, logits)?;
    let x = logits.slice::<f32>()?;
    let losses = targets.par_iter().enumerate().map(|(row, target)| {
        isa.vectorize(
            #[inline(always)]
            || token_loss(&x[row * v..(row + 1) * v], *target as usize, z_loss).0,
        )
    });
    Ok(losses.collect())
}

/// The losses of [`cross_entropy`] and the gradient to the logits of `sum(scale * loss)`.
///
/// # Shapes
/// `logits` `[T, V]` f32; `targets`, `scale` and the losses `T`; the gradient is `[T, V]` of type `out` (bf16 or f32).
///
/// # Errors
/// If the shapes or types do not fit, or a target is not below `V`.
pub fn cross_entropy_gradient(
    logits: &Tensor,
    targets: &[u32],
    scale: &[f32],
    z_loss: f32,
    out: DType,
) -> Result<(Vec<f32>, Tensor)> {
    cross_entropy_gradient_on(isa(), logits, (targets, scale), z_loss, out)
}

pub(crate) fn cross_entropy_gradient_on(
    isa: Isa,
    logits: &Tensor,
    (targets, scale): (&[u32], &[f32]),
    z_loss: f32,
    out: DType,
) -> Result<(Vec<f32>, Tensor)> {
    expect_activation("cross_entropy_gradient", out)?;
    match out {
        DType::BF16 => gradient::<bf16>(isa, logits, targets, scale, z_loss),
        _ => gradient::<f32>(isa, logits, targets, scale, z_loss),
    }
}

fn gradient<O: Element>(
    isa: Isa,
    logits: &Tensor,
    targets: &[u32],
    scale: &[f32],
    z_loss: f32,
) -> Result<(Vec<f32>, Tensor)> {
    let op = "cross_entropy_gradient";
    let v = check(op, logits, targets)?;
    if scale.len() != targets.len() {
        let what = format!("{} scales for {} tokens", scale.len(), targets.len());
        return Err(Error::Shape { op, what });
    }
    let logits = View::new(op, logits)?;
    let x = logits.slice::<f32>()?;
    let mut values: Vec<O> = Vec::with_capacity(x.len());
    let out = SharedMut::uninit(&mut values);
    let losses = targets.par_iter().zip(scale).enumerate().map(|(row, (target, scale))| {
        let x = &x[row * v..(row + 1) * v];
        // SAFETY: each row of the result is written by one thread.
        let out = unsafe { out.range(row * v, v) };
        isa.vectorize(
            #[inline(always)]
            || {
                let target = *target as usize;
                let (loss, lse) = token_loss(x, target, z_loss);
                // d lse / dx = p = exp(x - lse);  d(lse - x_target + z lse^2) / dx = (1 + 2 z lse) p - [target].
                let weight = scale * (1.0 + 2.0 * z_loss * lse);
                for (o, x) in out.iter_mut().zip(x) {
                    o.write(O::narrow(weight * exp(x - lse)));
                }
                out[target].write(O::narrow(weight * exp(x[target] - lse) - scale));
                loss
            },
        )
    });
    let losses = losses.collect();
    // SAFETY: the rows cover the result.
    unsafe { values.set_len(x.len()) };
    Ok((losses, tensor(values, &[targets.len(), v])?))
}

/// The loss of one token, and the logarithm of the normaliser.
#[inline(always)]
fn token_loss(x: &[f32], target: usize, z_loss: f32) -> (f32, f32) {
    let top = max(x);
    let total = sum(
        [x],
        #[inline(always)]
        |[x]| exp(x - top),
    );
    let lse = top + total.ln();
    (lse - x[target] + z_loss * lse * lse, lse)
}

/// The size of the vocabulary.
fn check(op: &'static str, logits: &Tensor, targets: &[u32]) -> Result<usize> {
    let (rows, v) = dims2(op, logits)?;
    if rows != targets.len() {
        return Err(Error::Shape {
            op,
            what: format!("{rows} rows of logits for {} targets", targets.len()),
        });
    }
    match targets.iter().find(|t| **t as usize >= v) {
        Some(t) => Err(Error::Shape { op, what: format!("target {t} is outside of a vocabulary of {v}") }),
        None => Ok(v),
    }
}
