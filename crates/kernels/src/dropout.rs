//! Dropout whose masks are a function of (seed, step, example, site, place), so that they do not depend on what is computed
//! beside them or in which order.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::element::Element;
use crate::gpu::{self, Gpu};
use crate::isa::{Isa, isa};
use crate::rng::Philox;
use crate::segments::Segments;
use crate::tensor::{SharedMut, View, dims2, expect_activation, tensor};
use crate::{Error, Result};

/// Where numbers of a microbatch are dropped: one generator an example.
#[derive(Clone, Debug)]
pub struct Dropout {
    rate: f32,
    keys: Vec<u64>,
    site: u64,
    part: Part,
}

/// What of a layer is here, when several ranks share it: each drops what all of it would have dropped there.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    /// First head.
    head: usize,
    /// First column, and columns in all; none: the operand has all of them.
    columns: Option<(usize, usize)>,
}

impl Dropout {
    /// Drops with probability `rate`; `keys` holds one number an example, from which its masks follow.
    ///
    /// # Errors
    /// If `rate` is not in `[0, 1)`.
    pub fn new(rate: f32, keys: Vec<u64>) -> Result<Self> {
        if (0.0..1.0).contains(&rate) {
            return Ok(Self { rate, keys, site: 0, part: Part::default() });
        }
        Err(Error::Shape { op: "dropout", what: format!("the rate {rate} is not in [0, 1)") })
    }

    /// The same examples at another place in the model.
    #[must_use]
    pub fn at(&self, site: u64) -> Self {
        Self { site, ..self.clone() }
    }

    /// The same for an operand that begins with column `first` of `total`.
    #[must_use]
    pub fn of_columns(mut self, first: usize, total: usize) -> Self {
        self.part.columns = Some((first, total));
        self
    }

    /// The same for an attention that begins with head `first`.
    #[must_use]
    pub fn of_heads(mut self, first: usize) -> Self {
        self.part.head = first;
        self
    }

    /// Number of examples that there are masks for.
    pub(crate) fn examples(&self) -> usize {
        self.keys.len()
    }

    /// The masks of the probabilities of head `head` of those that are here.
    pub(crate) fn head_masks(&self, example: usize, head: usize) -> Masks {
        self.masks(example, 1 + (self.part.head + head) as u64)
    }

    /// The masks of whole rows of an example.
    pub(crate) fn row_masks(&self, example: usize) -> Masks {
        self.masks(example, 0)
    }

    /// The first column that is here, and columns in all, where that is not all of them.
    pub(crate) fn columns(&self) -> Option<(usize, usize)> {
        self.part.columns
    }

    /// What is dropped of 65,536 numbers, and what the others are multiplied with. Not all are dropped, so that what is kept can be
    /// scaled up.
    pub(crate) fn threshold(&self) -> (u32, f32) {
        let threshold = ((f64::from(self.rate) * 65536.0).round() as u32).min(65535);
        (threshold, (65536.0 / f64::from(65536 - threshold)) as f32)
    }

    fn masks(&self, example: usize, part: u64) -> Masks {
        let (threshold, kept) = self.threshold();
        Masks { generator: Philox::new(self.keys[example], &[self.site, part]), threshold, kept }
    }
}

/// The masks of one example at one site.
pub(crate) struct Masks {
    generator: Philox,
    threshold: u32,
    kept: f32,
}

impl Masks {
    /// Decisions in a block of random numbers, 16 bits each.
    const BLOCK: usize = 8;
    /// Blocks that are made in one go: lanes of a vector.
    const LANES: usize = 16;

    /// The generator as kernels get it.
    pub(crate) fn words(&self) -> [u32; 4] {
        self.generator.words()
    }

    /// The factors of row `row`, each 0 or `1 / (1 - rate)`; all rows must have the width of `out`.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        self.blocks(row * out.len().div_ceil(Self::BLOCK), out);
    }

    /// The factors of the columns from `first` on of row `row`, whose rows have `total` of them.
    #[inline(always)]
    fn part_of_row(&self, row: usize, (first, total): (usize, usize), out: &mut [f32]) {
        let block = row * total.div_ceil(Self::BLOCK) + first / Self::BLOCK;
        match first % Self::BLOCK {
            0 => self.blocks(block, out),
            skipped => {
                let mut longer = vec![0.0; skipped + out.len()];
                self.blocks(block, &mut longer);
                out.copy_from_slice(&longer[skipped..]);
            }
        }
    }

    /// The factors from block `first` of the random numbers on.
    #[inline(always)]
    fn blocks(&self, first: usize, out: &mut [f32]) {
        let first = first as u64;
        for (i, out) in out.chunks_mut(Self::BLOCK * Self::LANES).enumerate() {
            let words = self.generator.blocks_at::<{ Self::LANES }>(first + (i * Self::LANES) as u64);
            let mut factors = [[0.0; Self::BLOCK]; Self::LANES];
            for (lane, factors) in factors.iter_mut().enumerate() {
                for (i, factor) in factors.iter_mut().enumerate() {
                    let bits = (words[i / 2][lane] >> (16 * (i % 2))) & 0xffff;
                    *factor = if bits < self.threshold { 0.0 } else { self.kept };
                }
            }
            out.copy_from_slice(&factors.as_flattened()[..out.len()]);
        }
    }
}

/// `x` with numbers dropped and the others scaled up; the gradient is the same function of the gradient.
///
/// # Shapes
/// `x` and the result `[T, D]` (bf16 or f32), rows as `segments` has them.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn dropout(x: &Tensor, segments: &Segments, dropout: &Dropout) -> Result<Tensor> {
    check(x, segments, dropout)?;
    if let Some(gpu) = Gpu::of(x)? {
        return gpu::rows::dropout(&gpu, x, segments, dropout);
    }
    dropout_on(isa(), x, segments, dropout)
}

fn check(x: &Tensor, segments: &Segments, dropout: &Dropout) -> Result<()> {
    let op = "dropout";
    expect_activation(op, x.dtype())?;
    let (rows, _) = dims2(op, x)?;
    if rows == segments.total() && dropout.examples() == segments.len() {
        return Ok(());
    }
    let what = format!(
        "{rows} rows, {} rows in {} examples, and masks for {} examples",
        segments.total(),
        segments.len(),
        dropout.examples()
    );
    Err(Error::Shape { op, what })
}

pub(crate) fn dropout_on(isa: Isa, x: &Tensor, segments: &Segments, dropout: &Dropout) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 => apply::<bf16>(isa, x, segments, dropout),
        _ => apply::<f32>(isa, x, segments, dropout),
    }
}

fn apply<T: Element>(isa: Isa, x: &Tensor, segments: &Segments, dropout: &Dropout) -> Result<Tensor> {
    let op = "dropout";
    let (rows, d) = dims2(op, x)?;
    let view = View::new(op, x)?;
    let x = view.slice::<T>()?;
    let mut values: Vec<T> = Vec::with_capacity(rows * d);
    let out = SharedMut::uninit(&mut values);
    (0..segments.len()).into_par_iter().for_each(|example| {
        let masks = dropout.row_masks(example);
        let first = segments.range(example).start;
        segments.range(example).into_par_iter().for_each_init(
            || vec![0.0; d],
            |factors, row| {
                // SAFETY: each row of the result is written by one thread.
                let out = unsafe { out.range(row * d, d) };
                isa.vectorize(
                    #[inline(always)]
                    || {
                        match dropout.part.columns {
                            None => masks.row(row - first, factors),
                            Some(columns) => masks.part_of_row(row - first, columns, factors),
                        }
                        for (o, (x, factor)) in out.iter_mut().zip(x[row * d..].iter().zip(&*factors)) {
                            o.write(T::narrow(x.widen() * factor));
                        }
                    },
                );
            },
        );
    });
    // SAFETY: the examples cover all rows, as was checked above.
    unsafe { values.set_len(rows * d) };
    tensor(values, &[rows, d])
}
