//! Prefixes (Li and Liang 2021): trained keys and values before those of a sequence.

use candle_core::{DType, Tensor};
use incipit_kernels::Segments;

use crate::Result;
use crate::gradients::WeightGradients;
use crate::sharding::{Slices, Weight};

/// `P` keys and values, which every query of an attention sees before the others, whatever its place. They have no position (`prefix_k`),
/// or those before the first of the sequence, as Hugging Face's caches have (`past_k`).
pub(crate) struct Prefix {
    placed: bool,
    keys: Weight,
    values: Weight,
    /// Both `[P, H K]`, with the heads that are here, of the type of products.
    rows: [Tensor; 2],
}

impl Prefix {
    /// That of the attention `name` ("encoder.block.0.layer.0.SelfAttention"), if the source has one.
    pub(crate) fn load(source: Slices<'_>, name: &str, inner: usize) -> Result<Option<Self>> {
        let named = |kind: &str| ["k", "v"].map(|part| format!("{name}.{kind}_{part}.weight"));
        let found = |kind: &str| source.rows_of(&named(kind)[0]).map(|length| (named(kind), length));
        let (free, past) = (found("prefix"), found("past"));
        let placed = free.is_none();
        let Some((names, length)) = free.or(past) else { return Ok(None) };
        let [keys, values] = names.each_ref().map(|name| source.weight_on_host(name, &[length, inner]));
        let (keys, values) = (keys?, values?);
        let rows = |weight: &Weight| -> Result<Tensor> {
            let shape = (weight.matrix.rows(), weight.matrix.cols());
            Ok(Tensor::from_vec(weight.matrix.to_f32(), shape, source.device)?.to_dtype(source.dtype)?)
        };
        Ok(Some(Self { placed, rows: [rows(&keys)?, rows(&values)?], keys, values }))
    }

    /// Whether its rows have the positions before the first of the sequence.
    pub(crate) fn is_placed(&self) -> bool {
        self.placed
    }

    /// `P`.
    pub(crate) fn length(&self) -> usize {
        self.keys.matrix.rows()
    }

    /// The rows of keys of each example, with those of the prefix.
    pub(crate) fn segments(&self, keys: &Segments) -> Segments {
        Segments::new((0..keys.len()).map(|e| self.length() + keys.range(e).len()))
    }

    /// Keys and values with those of the prefix before each example's.
    pub(crate) fn before(&self, segments: &Segments, (k, v): (Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        let [keys, values] = &self.rows;
        Ok((interleaved(keys, &k, segments)?, interleaved(values, &v, segments)?))
    }

    /// Queries with rows of zeros before each example's, so that queries and keys count their places from one row.
    pub(crate) fn before_queries(&self, q: &Tensor, queries: &Segments) -> Result<Tensor> {
        let zeros = Tensor::zeros((self.length(), q.dims()[1]), q.dtype(), q.device())?;
        interleaved(&zeros, q, queries)
    }

    /// Of rows such as [`Self::before_queries`] makes, those of the sequence.
    pub(crate) fn behind(&self, rows: &Tensor, queries: &Segments) -> Result<Tensor> {
        self.rest(rows, &self.segments(queries))
    }

    /// Takes the prefix's part of the gradients to keys and values, which has the rows of [`Self::segments`], and gives what is of the
    /// sequence.
    pub(crate) fn backward(
        &self,
        segments: &Segments,
        [dk, dv]: [Tensor; 2],
        gradients: &mut WeightGradients,
    ) -> Result<[Tensor; 2]> {
        let all = self.segments(segments);
        gradients.add(&self.keys.name, || self.own(&dk, &all))?;
        gradients.add(&self.values.name, || self.own(&dv, &all))?;
        Ok([self.rest(&dk, &all)?, self.rest(&dv, &all)?])
    }

    /// The sum over the examples of the prefix's rows, `[P, H K]` f32.
    fn own(&self, gradient: &Tensor, all: &Segments) -> Result<Tensor> {
        let parts: candle_core::Result<Vec<_>> =
            (0..all.len()).map(|e| gradient.narrow(0, all.range(e).start, self.length())).collect();
        Ok(Tensor::stack(&parts?, 0)?.to_dtype(DType::F32)?.sum(0)?)
    }

    /// The rows behind the prefix's.
    fn rest(&self, gradient: &Tensor, all: &Segments) -> Result<Tensor> {
        let rest = |e: usize| {
            let range = all.range(e);
            gradient.narrow(0, range.start + self.length(), range.len() - self.length())
        };
        let parts: candle_core::Result<Vec<_>> = (0..all.len()).map(rest).collect();
        Ok(Tensor::cat(&parts?, 0)?.contiguous()?)
    }
}

/// The rows of `sequence`, with `prefix` before each example's.
fn interleaved(prefix: &Tensor, sequence: &Tensor, segments: &Segments) -> Result<Tensor> {
    let mut parts = Vec::with_capacity(2 * segments.len());
    for e in 0..segments.len() {
        let range = segments.range(e);
        parts.push(prefix.clone());
        parts.push(sequence.narrow(0, range.start, range.len())?);
    }
    Ok(Tensor::cat(&parts, 0)?.contiguous()?)
}
