//! Where a model's weights come from.

use std::ops::Range;

use candle_core::DType;
use half::bf16;
use incipit_kernels::Frozen;

use crate::{Error, Result};

/// What is known of a tensor before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, as Hugging Face's T5 has it (`encoder.block.0.layer.0.SelfAttention.q.weight`).
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The type in which it is stored.
    pub dtype: DType,
}

/// Where a model's weights come from: a directory, or a random number generator.
pub trait Source: Send + Sync {
    /// All tensors, by name.
    fn tensors(&self) -> Vec<TensorInfo>;

    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The tensor `name`, which must have the shape `shape`, as a matrix of `shape[0]` rows; a vector has one row.
    ///
    /// # Errors
    /// If there is no such tensor, it has another shape, or its type is neither bf16 nor f32.
    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Frozen>;

    /// The rows `rows` and columns `cols` of what [`Source::frozen`] gives. A [`Checkpoint`](crate::Checkpoint) reads, and
    /// [`Random`](crate::Random) makes, no other numbers; a source that does not say how makes the whole tensor first.
    ///
    /// # Errors
    /// As [`Source::frozen`]; `shape` is that of the whole tensor.
    ///
    /// # Panics
    /// If a tensor of this shape does not have these rows and columns.
    fn part(&self, name: &str, shape: &[usize], rows: Range<usize>, cols: Range<usize>) -> Result<Frozen> {
        Ok(self.frozen(name, shape)?.part((rows.start, rows.len()), (cols.start, cols.len())))
    }

    /// Like [`Source::frozen`], for writing the numbers down in another type rather than computing with them: f16 is taken.
    ///
    /// # Errors
    /// If there is no such tensor, it has another shape, or its type is not a floating-point one that is known.
    fn convertible(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        self.frozen(name, shape)
    }

    /// The small files that belong to the weights (`config.json`, the tokenizer's), as (name, content).
    ///
    /// # Errors
    /// If one cannot be read.
    fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(Vec::new())
    }
}

/// The matrix `[rows, cols]` as which a tensor of this shape is kept: a vector has one row, and of a tensor with more dims
/// all but the first are taken together.
pub(crate) fn matrix(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [n] => (1, *n),
        [rows, rest @ ..] => (*rows, rest.iter().product()),
    }
}

/// The bf16 number nearest to `x`, ties to even: what `bf16::from_f32` gives, without its branch, so that loops vectorise.
#[inline(always)]
pub(crate) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let quiet_nan = (bits >> 16 | 0x40) as u16;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { rounded })
}

/// The error for a name that is not among `names`, with those that resemble it.
pub(crate) fn missing<'a>(name: &str, place: String, names: impl Iterator<Item = &'a str>) -> Error {
    let mut near: Vec<(f64, &str)> = names.map(|n| (strsim::normalized_levenshtein(name, n), n)).collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    let near: Vec<&str> =
        near.into_iter().take_while(|(likeness, _)| *likeness >= 0.5).take(3).map(|(_, n)| n).collect();
    let near = if near.is_empty() {
        "none there has a similar name: take config.json and the weights from the same T5 model".to_owned()
    } else {
        format!(
            "similar names there: {}; take config.json and the weights from the same T5 model",
            near.join(", ")
        )
    };
    Error::MissingTensor { name: name.to_owned(), place, near }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let awkward = [
            0.0,
            -0.0,
            1.0,
            f32::MAX,
            f32::MIN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MIN_POSITIVE,
        ];
        let ties = (0..1 << 18).map(|n: u32| f32::from_bits(n << 14 | (n & 1)));
        for x in awkward.into_iter().chain(ties) {
            assert_eq!(round(x).to_bits(), bf16::from_f32(x).to_bits(), "{x} ({:#x})", x.to_bits());
        }
    }
}
