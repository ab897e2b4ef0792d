//! The decoder: causal self-attention, attention to the encoder's result, feed-forward layers, and a norm at the end.

use candle_core::{DType, Tensor};
use incipit_kernels::{Attention, Frozen, PositionBias, Readers, RowGradients, Segments};

use crate::absorbed::AbsorbedState;
use crate::axis::TensorAxis;
use crate::config::Config;
use crate::encoder::{DECODER_SITES, ENDS, Kept, Pass, SITES_PER_LAYER};
use crate::feed_forward::{FeedForward, FeedForwardState};
use crate::gradients::{Gradient, WeightGradients};
use crate::layers::{AttentionLayer, AttentionState, Norm, Rows, Sites, position_table};
use crate::sharding::Slices;
use crate::{Error, Result};

/// The frozen decoder.
pub(crate) struct Decoder {
    axis: TensorAxis,
    /// Places that prefixes take before a target's first token.
    past: usize,
    layers: Vec<Layer>,
    bias: Frozen,
    norm: Norm,
}

struct Layer {
    attention: AttentionLayer,
    cross: AttentionLayer,
    feed_forward: FeedForward,
}

/// The encoder's result and its examples' rows.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    /// `[T, D]`, of the pass's type.
    pub(crate) rows: &'a Tensor,
    pub(crate) segments: &'a Segments,
    /// How many consecutive decoder rows read each example's: those of one target, or of several one after the other.
    pub(crate) readers: &'a Segments,
    /// The same head by head, where no keys and values are made.
    pub(crate) absorbed: Option<&'a Readers>,
}

struct LayerState {
    attention: AttentionState,
    cross: CrossState,
    feed_forward: FeedForwardState,
}

/// Of attention to the encoder's result: with keys and values of it, or without.
enum CrossState {
    Keys(AttentionState),
    Absorbed(AbsorbedState),
}

impl CrossState {
    fn x(&self) -> &Tensor {
        match self {
            Self::Keys(state) => &state.x,
            Self::Absorbed(state) => &state.x,
        }
    }
}

/// The gradient to the encoder's result, this rank's part, while layers add to it.
enum MemoryGradient<'a> {
    Keys(Option<Tensor>),
    Absorbed(RowGradients<'a>),
}

impl<'a> MemoryGradient<'a> {
    fn new(memory: Memory<'a>) -> Self {
        match memory.absorbed {
            Some(readers) => Self::Absorbed(RowGradients::new(readers, memory.rows)),
            None => Self::Keys(None),
        }
    }

    fn finish(self) -> Result<Tensor> {
        let sum = match self {
            Self::Keys(sum) => sum,
            Self::Absorbed(sum) => sum.finish()?,
        };
        Ok(sum.unwrap_or_else(|| unreachable!("a decoder has at least one layer")))
    }
}

/// What the decoder's backward pass needs.
pub(crate) struct DecoderState {
    layers: Vec<Kept<LayerState>>,
    last: Tensor,
    bias: PositionBias,
}

/// Keys and values of a decoder layer's two attentions while tokens are generated.
pub(crate) struct LayerCache {
    /// Of the tokens so far: `[n, t, H K]` for `n` hypotheses.
    pub(crate) own: Option<(Tensor, Tensor)>,
    /// Of the encoder's result: `[T, H K]`; none where none are made.
    pub(crate) memory: Option<(Tensor, Tensor)>,
}

/// One step of generation.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    /// How many consecutive rows each example has, those of its hypotheses.
    pub(crate) queries: &'a Segments,
    /// The encoder's result, and how many rows of it each example has.
    pub(crate) memory: &'a Tensor,
    pub(crate) keys: &'a Segments,
    /// The place of the first in its sequence, from 0.
    pub(crate) place: usize,
    /// Rows of each hypothesis that are read at once: a token, or at place 0 a whole prompt.
    pub(crate) count: usize,
    pub(crate) dtype: DType,
}

impl Decoder {
    /// `logit_scale` multiplies the result: it is what scales the logits.
    pub(crate) fn load(
        config: &Config,
        source: Slices<'_>,
        axis: &TensorAxis,
        logit_scale: f32,
    ) -> Result<Self> {
        let layers = (0..config.num_decoder_layers).map(|i| {
            let name = |part: usize| format!("decoder.block.{i}.layer.{part}");
            Ok(Layer {
                attention: AttentionLayer::load(config, source, axis, &name(0), "SelfAttention")?,
                cross: AttentionLayer::load(config, source, axis, &name(1), "EncDecAttention")?,
                feed_forward: FeedForward::load(config, source, axis, &name(2))?,
            })
        });
        let layers: Vec<Layer> = layers.collect::<Result<_>>()?;
        let past = layers.iter().map(|layer| layer.attention.places_before());
        let past = past.reduce(|one, other| if one == other { one } else { usize::MAX }).unwrap_or_default();
        if past == usize::MAX {
            let what = "the decoder's layers have prefixes (past_k) of different lengths; give each the same";
            return Err(Error::Config { what: what.to_owned() });
        }
        let shape = [config.relative_attention_num_buckets, config.num_heads];
        Ok(Self {
            axis: axis.clone(),
            past,
            layers,
            bias: source.on_host(&position_table("decoder"), &shape)?,
            norm: Norm::load(config, source, "decoder.final_layer_norm", logit_scale)?,
        })
    }

    /// Exchanges over `axis` from now on.
    pub(crate) fn regroup(&mut self, axis: &TensorAxis) {
        self.axis = axis.clone();
        for layer in &mut self.layers {
            layer.attention.regroup(axis);
            layer.cross.regroup(axis);
            layer.feed_forward.regroup(axis);
        }
    }

    /// `x` `[Td, D]` f32 are the embedded rows; the result `[Td, D]` is of the pass's type.
    pub(crate) fn forward(
        &self,
        config: &Config,
        x: Tensor,
        memory: Memory<'_>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, DecoderState)> {
        let bias = PositionBias::new(&self.bias, config.buckets(false), self.past + pass.rows.longest())?;
        let mut x = pass.sites(DECODER_SITES + ENDS).drop(0, x, pass.rows)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let input = x.clone();
            let (out, state) = layer.forward(i, x, memory, &bias, pass)?;
            layers.push(if pass.recompute { Kept::Input(input) } else { Kept::State(state) });
            x = out;
        }
        let out = self.norm.forward(&x, pass.dtype)?;
        let out = pass.sites(DECODER_SITES + ENDS).drop(1, out, pass.rows)?;
        Ok((out, DecoderState { layers, last: x, bias }))
    }

    /// As [`Encoder::as_prefixes`](crate::encoder::Encoder::as_prefixes), of both attentions of every layer.
    pub(crate) fn as_prefixes(&self, state: &DecoderState) -> Vec<(String, Tensor)> {
        let of = |(layer, kept): (&Layer, &Kept<LayerState>)| match kept {
            Kept::State(state) => {
                let own = layer.attention.as_prefix(&state.attention).to_vec();
                match &state.cross {
                    CrossState::Keys(state) => [own, layer.cross.as_prefix(state).to_vec()].concat(),
                    CrossState::Absorbed(_) => unreachable!("no keys and values were made"),
                }
            }
            Kept::Input(_) => Vec::new(),
        };
        self.layers.iter().zip(&state.layers).flat_map(of).collect()
    }

    /// The gradients to the encoder's result `[T, D]` f32 and, if the pass wants it, to the embedded rows `[Td, D]` f32; `dy` `[Td, D]`
    /// f32 is the one to the decoder's result. Otherwise the way down to the embedded rows is not gone to its end.
    pub(crate) fn backward(
        &self,
        dy: Tensor,
        state: DecoderState,
        memory: Memory<'_>,
        pass: &Pass<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let DecoderState { mut layers, last, bias } = state;
        let ends = pass.sites(DECODER_SITES + ENDS);
        let dy = ends.drop(1, dy, pass.rows)?;
        let mut dx = self.norm.backward(&dy, &last, None, ends.rounding(pass.dtype), gradients)?;
        drop(last);
        let mut d_memory = MemoryGradient::new(memory);
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let state = match layers.pop() {
                Some(Kept::State(state)) => state,
                Some(Kept::Input(x)) => layer.inside(i, x, memory, &bias, pass)?,
                None => unreachable!("forward kept one state a layer"),
            };
            let sites = |part| pass.sites(DECODER_SITES + i * SITES_PER_LAYER + part);
            dx = layer.feed_forward.backward(&dx, &state.feed_forward, (pass.rows, sites(2)), gradients)?;
            let rows = (pass.rows, sites(1));
            let given = (&dx, &mut d_memory);
            let dq = layer.memory_backward(given, &state.cross, (memory, bias.heads()), rows, gradients)?;
            if i > 0 || pass.to_the_end {
                dx = layer.cross.cross_backward(&dq, &dx, state.cross.x(), sites(1), gradients)?;
                let spec = self_spec(&bias, pass);
                dx = layer.attention.backward(&dx, &state.attention, &spec, sites(0), gradients)?;
            }
        }
        // Every layer's part comes from the heads that are here: they are added up over the ranks once, for all layers.
        let d_input = pass.to_the_end.then(|| ends.drop(0, dx.exact, pass.rows)).transpose()?;
        Ok((self.axis.reduce_gradient(&d_memory.finish()?)?, d_input))
    }

    /// Whether the encoder's result can be attended to without keys and values.
    pub(crate) fn can_absorb(&self) -> bool {
        self.layers.iter().all(|layer| layer.cross.can_absorb())
    }

    /// Heads that are here.
    pub(crate) fn heads(&self) -> usize {
        self.bias.cols()
    }

    /// Empty caches over the encoder's result, with its keys and values unless they are absorbed.
    pub(crate) fn caches(&self, memory: &Tensor, absorbed: bool) -> Result<Vec<LayerCache>> {
        let cache = |layer: &Layer| {
            let memory = (!absorbed).then(|| layer.cross.keys_and_values(memory)).transpose()?;
            Ok(LayerCache { own: None, memory })
        };
        self.layers.iter().map(cache).collect()
    }

    /// The result `[n count, D]` for the next rows of each of `n` hypotheses, which are `x` `[n count, D]` f32, embedded.
    pub(crate) fn step(
        &self,
        config: &Config,
        mut x: Tensor,
        caches: &mut [LayerCache],
        step: &Step<'_>,
    ) -> Result<Tensor> {
        let Step { queries, memory, keys, place, count, dtype } = *step;
        let query = self.past + place;
        let bias = PositionBias::from_query(&self.bias, config.buckets(false), query + count, query)?;
        let hypotheses = x.dims()[0] / count;
        let own_rows = Segments::new(std::iter::repeat_n(count, hypotheses));
        let so_far = Segments::new(std::iter::repeat_n(place + count, hypotheses));
        let own = Attention {
            queries: &own_rows,
            keys: &so_far,
            heads: bias.heads(),
            bias: Some(&bias),
            causal: count > 1,
            prefix: 0,
            dropout: None,
        };
        let cross = Attention { queries, keys, bias: None, causal: false, ..own };
        let readers = Readers::new(queries, keys, bias.heads());
        for (layer, cache) in self.layers.iter().zip(caches) {
            let y = layer.attention.norm.forward(&x, dtype)?;
            let (k, v) = layer.attention.keys_and_values(&y)?;
            let by_hypothesis = |t: Tensor| t.reshape((hypotheses, count, t.dims()[1]));
            let (k, v) = (by_hypothesis(k)?, by_hypothesis(v)?);
            let grown = match cache.own.take() {
                None => (k, v),
                Some((ks, vs)) => (Tensor::cat(&[&ks, &k], 1)?, Tensor::cat(&[&vs, &v], 1)?),
            };
            let flat = (grown.0.flatten_to(1)?, grown.1.flatten_to(1)?);
            cache.own = Some(grown);
            x = layer.attention.forward(x, Some(flat), &own, Sites::NONE, dtype)?.0;
            x = match &cache.memory {
                Some(given) => layer.cross.forward(x, Some(given.clone()), &cross, Sites::NONE, dtype)?.0,
                None => {
                    let rows = (queries, Sites::NONE);
                    layer.cross.forward_absorbed(x, (memory, &readers), rows, dtype)?.0
                }
            };
            let inside = layer.feed_forward.inside(x, dtype)?;
            x = layer.feed_forward.output(&inside, &own_rows, Sites::NONE)?;
        }
        self.norm.forward(&x, dtype)
    }
}

impl Layer {
    fn forward(
        &self,
        i: usize,
        x: Tensor,
        memory: Memory<'_>,
        bias: &PositionBias,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, LayerState)> {
        let state = self.inside(i, x, memory, bias, pass)?;
        let sites = pass.sites(DECODER_SITES + i * SITES_PER_LAYER + 2);
        Ok((self.feed_forward.output(&state.feed_forward, pass.rows, sites)?, state))
    }

    /// All of the layer but its last product: what backward needs.
    fn inside(
        &self,
        i: usize,
        x: Tensor,
        memory: Memory<'_>,
        bias: &PositionBias,
        pass: &Pass<'_>,
    ) -> Result<LayerState> {
        let sites = |part| pass.sites(DECODER_SITES + i * SITES_PER_LAYER + part);
        let (x, attention) = self.attention.forward(x, None, &self_spec(bias, pass), sites(0), pass.dtype)?;
        let (x, cross) = match memory.absorbed {
            Some(readers) => {
                let rows = (pass.rows, sites(1));
                let (x, state) = self.cross.forward_absorbed(x, (memory.rows, readers), rows, pass.dtype)?;
                (x, CrossState::Absorbed(state))
            }
            None => {
                let given = self.cross.keys_and_values(memory.rows)?;
                let spec = cross_spec(bias.heads(), memory);
                let (x, state) = self.cross.forward(x, Some(given), &spec, sites(1), pass.dtype)?;
                (x, CrossState::Keys(state))
            }
        };
        let feed_forward = self.feed_forward.inside(x, pass.dtype)?;
        Ok(LayerState { attention, cross, feed_forward })
    }

    /// The gradient to the queries of cross-attention; that to the encoder's result is added to `sum`.
    fn memory_backward(
        &self,
        (dy, sum): (&Gradient, &mut MemoryGradient<'_>),
        state: &CrossState,
        (memory, heads): (Memory<'_>, usize),
        rows: Rows<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Tensor> {
        match (state, sum) {
            (CrossState::Absorbed(state), MemoryGradient::Absorbed(sum)) => {
                self.cross.absorbed_backward(dy, sum, state, rows, gradients)
            }
            (CrossState::Keys(state), MemoryGradient::Keys(sum)) => {
                let spec = cross_spec(heads, memory);
                let [dq, dk, dv] = self.cross.inner_backward(dy, state, &spec, rows.1, gradients)?;
                let more = self.cross.memory_backward(sum.as_ref(), [&dk, &dv], memory.rows, gradients)?;
                *sum = Some(more);
                Ok(dq)
            }
            _ => unreachable!("all layers attend in one way"),
        }
    }
}

fn self_spec<'a>(bias: &'a PositionBias, pass: &Pass<'a>) -> Attention<'a> {
    let rows = pass.rows;
    Attention {
        queries: rows,
        keys: rows,
        heads: bias.heads(),
        bias: Some(bias),
        causal: true,
        prefix: 0,
        dropout: None,
    }
}

fn cross_spec(heads: usize, memory: Memory<'_>) -> Attention<'_> {
    Attention {
        queries: memory.readers,
        keys: memory.segments,
        heads,
        bias: None,
        causal: false,
        prefix: 0,
        dropout: None,
    }
}
