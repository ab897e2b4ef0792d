//! Soft prompts as the model takes them: rows, and where they stand.

use std::ops::Range;

use candle_core::{DType, Tensor};
use incipit_kernels::Segments;

use crate::Result;
use crate::batch::{Microbatch, Span};

/// Where a prompt's rows stand. They take places of their own: relative positions count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Before the embedded input of the encoder.
    #[default]
    Before,
    /// Behind the embedded input of the encoder, and before its last token, which is `</s>`: where the released code of Lester et
    /// al. (2021) puts a prompt that is a suffix, so that the input still ends as the model has always seen inputs end.
    After,
    /// Before the start token of the decoder. Every row of the decoder sees them, and they have no loss.
    Decoder,
}

/// A prompt, as examples name it.
#[derive(Clone, Debug)]
pub struct SoftPrompt {
    /// `[P, D]` f32; with rows for each of the encoder's `L` layers `[L P, D]`, those of the first layer first.
    pub rows: Tensor,
    /// 1, or `L`: then the rows of every layer but the first replace what the layer before it gave at the prompt's places.
    pub num_layers: usize,
    /// Where they stand.
    pub placement: Placement,
}

impl From<Tensor> for SoftPrompt {
    /// Rows `[P, D]` before the input.
    fn from(rows: Tensor) -> Self {
        Self { rows, num_layers: 1, placement: Placement::Before }
    }
}

impl SoftPrompt {
    /// `P`: the places that it takes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.rows.dims().first().map_or(0, |rows| rows / self.num_layers.max(1))
    }

    /// The rows `[P, D]` of one layer.
    pub(crate) fn of_layer(&self, layer: usize) -> Result<Tensor> {
        if self.num_layers == 1 {
            return Ok(self.rows.clone());
        }
        Ok(self.rows.narrow(0, layer * self.length(), self.length())?)
    }
}

/// The prompts of a pass that have rows for every layer, and their places among the encoder's rows.
pub(crate) struct LayerPrompts<'a> {
    prompts: &'a [SoftPrompt],
    /// By example.
    spans: Vec<Option<Span>>,
}

impl<'a> LayerPrompts<'a> {
    /// None if no example's prompt is such a one.
    pub(crate) fn of(batch: &Microbatch<'a>, spans: &[Option<Span>]) -> Option<Self> {
        let deep = |span: &Span| batch.prompts[span.prompt].num_layers > 1;
        let spans: Vec<_> = spans.iter().map(|span| span.filter(deep)).collect();
        spans.iter().any(Option::is_some).then_some(Self { prompts: batch.prompts, spans })
    }

    /// What goes into a layer behind the first, from what the one before it gave.
    pub(crate) fn put(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let rows = |span: &Span| Ok((span.first, self.prompts[span.prompt].of_layer(layer)?));
        replaced(x, &self.spans.iter().flatten().map(rows).collect::<Result<Vec<_>>>()?)
    }

    /// From the gradient to what went into such a layer: each example's gradient to the layer's prompt, and the gradient to what the
    /// layer before it gave, of which nothing was read at the prompts' places.
    pub(crate) fn take(&self, dx: &Tensor) -> Result<(Vec<Option<Tensor>>, Tensor)> {
        let own = |span: Span| copied(dx, span);
        let own = self.spans.iter().map(|span| span.map(own).transpose()).collect::<Result<Vec<_>>>()?;
        let nothing = |span: &Span| Ok((span.first, dx.narrow(0, span.first, span.count)?.zeros_like()?));
        let rest = replaced(dx, &self.spans.iter().flatten().map(nothing).collect::<Result<Vec<_>>>()?)?;
        Ok((own, rest))
    }
}

/// Gradients to all rows, of which prompts have some.
pub(crate) struct RowGradients<'a> {
    /// To the embedded rows of the encoder.
    pub(crate) input: &'a Tensor,
    /// To prompts' rows of each layer behind the first, by layer and example.
    pub(crate) layers: &'a [Vec<Option<Tensor>>],
    /// To the embedded rows of the decoder.
    pub(crate) targets: Option<&'a Tensor>,
}

impl RowGradients<'_> {
    /// Copies of the rows of the prompt of example `e`, so that the rest need not live on. It has one in the encoder, in the decoder, or
    /// none.
    pub(crate) fn of_prompt(&self, e: usize, spans: (Option<Span>, Option<Span>)) -> Result<Tensor> {
        match (spans, self.targets) {
            ((Some(span), _), _) if span.count > 0 => {
                let behind = self.layers.iter().filter_map(|layer| layer[e].clone());
                let all: Vec<Tensor> = std::iter::once(copied(self.input, span)?).chain(behind).collect();
                if all.len() == 1 { Ok(all[0].clone()) } else { Ok(Tensor::cat(&all, 0)?) }
            }
            ((_, Some(span)), Some(targets)) if span.count > 0 => copied(targets, span),
            // One row, of which none is shown: CUDA need not give out no memory.
            _ => {
                Ok(Tensor::zeros((1, self.input.dims()[1]), DType::F32, self.input.device())?
                    .narrow(0, 0, 0)?)
            }
        }
    }
}

/// A copy of some rows. (`Tensor::copy` would copy all that `x` lies in.)
fn copied(x: &Tensor, span: Span) -> Result<Tensor> {
    Ok(x.narrow(0, span.first, span.count)?.force_contiguous()?)
}

/// `x` with other rows in the place of its own: each part from its row on, in ascending order.
pub(crate) fn replaced(x: &Tensor, parts: &[(usize, Tensor)]) -> Result<Tensor> {
    let mut all = Vec::with_capacity(2 * parts.len() + 1);
    let mut next = 0;
    for (first, rows) in parts {
        if *first > next {
            all.push(x.narrow(0, next, first - next)?);
        }
        all.push(rows.to_device(x.device())?);
        next = first + rows.dims()[0];
    }
    if next < x.dims()[0] {
        all.push(x.narrow(0, next, x.dims()[0] - next)?);
    }
    Ok(Tensor::cat(&all, 0)?)
}

/// These of the rows of `x`, end to end.
pub(crate) fn taken(x: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor> {
    if ranges.iter().map(ExactSizeIterator::len).sum::<usize>() == x.dims()[0] {
        return Ok(x.clone());
    }
    let parts: candle_core::Result<Vec<_>> =
        ranges.iter().map(|range| x.narrow(0, range.start, range.len())).collect();
    Ok(Tensor::cat(&parts?, 0)?)
}

/// The gradient `[Td, D]` to all of the decoder's rows, from the one to those in `targets`: prompts have no loss.
pub(crate) fn behind_prompts(dy: Tensor, targets: &[Range<usize>], rows: &Segments) -> Result<Tensor> {
    if dy.dims()[0] == rows.total() {
        return Ok(dy);
    }
    let all = Tensor::zeros((rows.total(), dy.dims()[1]), dy.dtype(), dy.device())?;
    let mut parts = Vec::with_capacity(targets.len());
    let mut next = 0;
    for range in targets {
        parts.push((range.start, dy.narrow(0, next, range.len())?));
        next += range.len();
    }
    replaced(&all, &parts)
}
