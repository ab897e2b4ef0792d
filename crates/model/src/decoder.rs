//! The decoder: causal self-attention, attention to the encoder's result, feed-forward layers, and a norm at the end.

use candle_core::{DType, Tensor};
use incipit_kernels::{Attention, Frozen, PositionBias, Segments, linear_gradient};
use incipit_weights::Source;

use crate::Result;
use crate::config::Config;
use crate::encoder::{DECODER_SITES, ENDS, Kept, Pass, SITES_PER_LAYER};
use crate::layers::{AttentionLayer, AttentionState, FeedForward, FeedForwardState, Norm, Sites};

/// The frozen decoder.
pub(crate) struct Decoder {
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
}

struct LayerState {
    attention: AttentionState,
    cross: AttentionState,
    feed_forward: FeedForwardState,
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
    /// Of the encoder's result: `[T, H K]`.
    pub(crate) memory: (Tensor, Tensor),
}

/// One step of generation.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    /// How many consecutive hypotheses each example has.
    pub(crate) queries: &'a Segments,
    /// How many rows of the encoder's result each example has.
    pub(crate) keys: &'a Segments,
    /// The token's place in its sequence, from 0.
    pub(crate) place: usize,
    pub(crate) dtype: DType,
}

impl Decoder {
    /// `logit_scale` multiplies the result: it is what scales the logits.
    pub(crate) fn load(config: &Config, source: &dyn Source, logit_scale: f32) -> Result<Self> {
        let layers = (0..config.num_decoder_layers).map(|i| {
            let name = format!("decoder.block.{i}.layer");
            Ok(Layer {
                attention: AttentionLayer::load(config, source, &format!("{name}.0"), "SelfAttention")?,
                cross: AttentionLayer::load(config, source, &format!("{name}.1"), "EncDecAttention")?,
                feed_forward: FeedForward::load(config, source, &format!("{name}.2"))?,
            })
        });
        let bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        let shape = [config.relative_attention_num_buckets, config.num_heads];
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            bias: source.frozen(bias, &shape)?,
            norm: Norm::load(config, source, "decoder.final_layer_norm", logit_scale)?,
        })
    }

    /// `x` `[Td, D]` f32 are the embedded target rows; the result `[Td, D]` is of the pass's type.
    pub(crate) fn forward(
        &self,
        config: &Config,
        x: Tensor,
        memory: Memory<'_>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, DecoderState)> {
        let bias = PositionBias::new(&self.bias, config.buckets(false), pass.rows.longest())?;
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

    /// The gradient `[T, D]` f32 to the encoder's result; `dy` `[Td, D]` f32 is the one to the decoder's.
    ///
    /// The embedded target rows are frozen, so that the gradient to them is not finished.
    pub(crate) fn backward(
        &self,
        dy: Tensor,
        state: DecoderState,
        memory: Memory<'_>,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let DecoderState { mut layers, last, bias } = state;
        let dy = pass.sites(DECODER_SITES + ENDS).drop(1, dy, pass.rows)?;
        let mut dx = self.norm.backward(&dy, &last, None)?;
        drop(last);
        let mut d_memory: Option<Tensor> = None;
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let state = match layers.pop() {
                Some(Kept::State(state)) => state,
                Some(Kept::Input(x)) => layer.forward(i, x, memory, &bias, pass)?.1,
                None => unreachable!("forward kept one state a layer"),
            };
            let sites = |part| pass.sites(DECODER_SITES + i * SITES_PER_LAYER + part);
            dx = layer.feed_forward.backward(&dx, &state.feed_forward, pass.rows, sites(2))?;
            let spec = cross_spec(bias.heads(), memory, pass.rows);
            let cross = layer.cross.cross_backward(&dx, &state.cross, &spec, sites(1))?;
            let part =
                linear_gradient(&[(&cross.k, &layer.cross.k), (&cross.v, &layer.cross.v)], DType::F32)?;
            d_memory = Some(match d_memory {
                Some(sum) => incipit_kernels::add(&sum, &part)?,
                None => part,
            });
            if i > 0 {
                dx = layer.attention.backward(
                    &cross.x,
                    &state.attention,
                    &self_spec(&bias, pass),
                    sites(0),
                )?;
            }
        }
        Ok(d_memory.unwrap_or_else(|| unreachable!("a decoder has at least one layer")))
    }

    /// Empty caches over the encoder's result.
    pub(crate) fn caches(&self, memory: &Tensor) -> Result<Vec<LayerCache>> {
        let cache =
            |layer: &Layer| Ok(LayerCache { own: None, memory: layer.cross.keys_and_values(memory)? });
        self.layers.iter().map(cache).collect()
    }

    /// The result `[n, D]` for the next token of each of `n` hypotheses, whose embedded rows are `x` `[n, D]` f32.
    pub(crate) fn step(
        &self,
        config: &Config,
        mut x: Tensor,
        caches: &mut [LayerCache],
        step: &Step<'_>,
    ) -> Result<Tensor> {
        let Step { queries, keys, place, dtype } = *step;
        let bias = PositionBias::from_query(&self.bias, config.buckets(false), place + 1, place)?;
        let one_each = Segments::new(std::iter::repeat_n(1, x.dims()[0]));
        let so_far = Segments::new(std::iter::repeat_n(place + 1, x.dims()[0]));
        let own = Attention {
            queries: &one_each,
            keys: &so_far,
            heads: config.num_heads,
            bias: Some(&bias),
            causal: false,
            dropout: None,
        };
        let cross = Attention { queries, keys, bias: None, ..own };
        for (layer, cache) in self.layers.iter().zip(caches) {
            let y = layer.attention.norm.forward(&x, dtype)?;
            let (k, v) = layer.attention.keys_and_values(&y)?;
            let grown = match cache.own.take() {
                None => (k.unsqueeze(1)?, v.unsqueeze(1)?),
                Some((ks, vs)) => {
                    (Tensor::cat(&[&ks, &k.unsqueeze(1)?], 1)?, Tensor::cat(&[&vs, &v.unsqueeze(1)?], 1)?)
                }
            };
            let flat = (grown.0.flatten_to(1)?, grown.1.flatten_to(1)?);
            cache.own = Some(grown);
            x = layer.attention.forward(x, Some(flat), &own, Sites::NONE, dtype)?.0;
            x = layer.cross.forward(x, Some(cache.memory.clone()), &cross, Sites::NONE, dtype)?.0;
            x = layer.feed_forward.forward(x, &one_each, Sites::NONE, dtype)?.0;
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
        let sites = |part| pass.sites(DECODER_SITES + i * SITES_PER_LAYER + part);
        let (x, attention) = self.attention.forward(x, None, &self_spec(bias, pass), sites(0), pass.dtype)?;
        let given = self.cross.keys_and_values(memory.rows)?;
        let spec = cross_spec(bias.heads(), memory, pass.rows);
        let (x, cross) = self.cross.forward(x, Some(given), &spec, sites(1), pass.dtype)?;
        let (x, feed_forward) = self.feed_forward.forward(x, pass.rows, sites(2), pass.dtype)?;
        Ok((x, LayerState { attention, cross, feed_forward }))
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
        dropout: None,
    }
}

fn cross_spec<'a>(heads: usize, memory: Memory<'a>, rows: &'a Segments) -> Attention<'a> {
    Attention { queries: rows, keys: memory.segments, heads, bias: None, causal: false, dropout: None }
}
