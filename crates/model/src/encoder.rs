//! The encoder: self-attention and feed-forward layers, and a norm at the end.

use candle_core::{DType, Tensor};
use incipit_kernels::{Attention, Dropout, Frozen, PositionBias, Segments};

use crate::Result;
use crate::axis::TensorAxis;
use crate::config::Config;
use crate::feed_forward::{FeedForward, FeedForwardState};
use crate::gradients::WeightGradients;
use crate::layers::{AttentionLayer, AttentionState, Norm, Sites, position_table};
use crate::prompt::LayerPrompts;
use crate::sharding::Slices;

/// The frozen encoder.
pub(crate) struct Encoder {
    layers: Vec<(AttentionLayer, FeedForward)>,
    bias: Frozen,
    norm: Norm,
}

/// What a pass is about: the examples' rows, and how to compute.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) rows: &'a Segments,
    pub(crate) dropout: Option<&'a Dropout>,
    pub(crate) dtype: DType,
    /// Whether only the layers' inputs are kept, and their insides computed again in backward.
    pub(crate) recompute: bool,
    /// The prompts that have rows for every layer of the encoder.
    pub(crate) prompts: Option<&'a LayerPrompts<'a>>,
    /// Of the decoder: whether the gradient to its embedded rows is wanted.
    pub(crate) to_the_end: bool,
}

impl<'a> Pass<'a> {
    pub(crate) fn sites(&self, layer: usize) -> Sites<'a> {
        Sites { dropout: self.dropout, layer: layer as u64 }
    }
}

/// What is kept of a layer for backward.
pub(crate) enum Kept<S> {
    /// Its input alone.
    Input(Tensor),
    /// Everything that backward needs.
    State(S),
}

type LayerState = (AttentionState, FeedForwardState);

/// What the encoder's backward pass needs.
pub(crate) struct EncoderState {
    layers: Vec<Kept<LayerState>>,
    last: Tensor,
    bias: PositionBias,
}

/// Sub-layers that a layer counts for its places of dropout; the decoder's begin after `DECODER_SITES`.
pub(crate) const SITES_PER_LAYER: usize = 3;
/// See [`SITES_PER_LAYER`].
pub(crate) const DECODER_SITES: usize = 1 << 20;
/// Place of the dropout of the embedded input, and of the result, in the last sub-layer's numbering.
pub(crate) const ENDS: usize = SITES_PER_LAYER * (1 << 16);

impl Encoder {
    pub(crate) fn load(config: &Config, source: Slices<'_>, axis: &TensorAxis) -> Result<Self> {
        let layers = (0..config.num_layers).map(|i| {
            let name = |part: usize| format!("encoder.block.{i}.layer.{part}");
            let attention = AttentionLayer::load(config, source, axis, &name(0), "SelfAttention")?;
            Ok((attention, FeedForward::load(config, source, axis, &name(1))?))
        });
        let shape = [config.relative_attention_num_buckets, config.num_heads];
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            bias: source.on_host(&position_table("encoder"), &shape)?,
            norm: Norm::load(config, source, "encoder.final_layer_norm", 1.0)?,
        })
    }

    /// Exchanges over `axis` from now on.
    pub(crate) fn regroup(&mut self, axis: &TensorAxis) {
        for (attention, feed_forward) in &mut self.layers {
            attention.regroup(axis);
            feed_forward.regroup(axis);
        }
    }

    /// `x` `[T, D]` f32 are the embedded rows; the result `[T, D]` is of the pass's type.
    pub(crate) fn forward(
        &self,
        config: &Config,
        x: Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, EncoderState)> {
        let bias = PositionBias::new(&self.bias, config.buckets(true), pass.rows.longest())?;
        let mut x = pass.sites(ENDS).drop(0, x, pass.rows)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for i in 0..self.layers.len() {
            x = with_prompts(i, x, pass)?;
            let input = x.clone();
            let (out, state) = self.layer_forward(i, x, &bias, pass)?;
            layers.push(if pass.recompute { Kept::Input(input) } else { Kept::State(state) });
            x = out;
        }
        let out = self.norm.forward(&x, pass.dtype)?;
        let out = pass.sites(ENDS).drop(1, out, pass.rows)?;
        Ok((out, EncoderState { layers, last: x, bias }))
    }

    /// The keys and values of every layer in a pass that kept everything, each by the name of a prefix that would have these rows.
    pub(crate) fn as_prefixes(&self, state: &EncoderState) -> Vec<(String, Tensor)> {
        let of = |((attention, _), kept): (&(AttentionLayer, FeedForward), &Kept<LayerState>)| match kept {
            Kept::State((state, _)) => attention.as_prefix(state).to_vec(),
            Kept::Input(_) => Vec::new(),
        };
        self.layers.iter().zip(&state.layers).flat_map(of).collect()
    }

    /// As [`Encoder::forward`], keeping nothing.
    pub(crate) fn infer(&self, config: &Config, mut x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let bias = PositionBias::new(&self.bias, config.buckets(true), pass.rows.longest())?;
        for i in 0..self.layers.len() {
            x = self.layer_forward(i, with_prompts(i, x, pass)?, &bias, pass)?.0;
        }
        self.norm.forward(&x, pass.dtype)
    }

    fn layer_forward(
        &self,
        i: usize,
        x: Tensor,
        bias: &PositionBias,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, LayerState)> {
        let state = self.layer_inside(i, x, bias, pass)?;
        let sites = pass.sites(i * SITES_PER_LAYER + 1);
        Ok((self.layers[i].1.output(&state.1, pass.rows, sites)?, state))
    }

    /// All of a layer but its last product: what backward needs.
    fn layer_inside(&self, i: usize, x: Tensor, bias: &PositionBias, pass: &Pass<'_>) -> Result<LayerState> {
        let (attention, feed_forward) = &self.layers[i];
        let sites = pass.sites(i * SITES_PER_LAYER);
        let (x, first) = attention.forward(x, None, &spec(bias, pass), sites, pass.dtype)?;
        Ok((first, feed_forward.inside(x, pass.dtype)?))
    }

    /// The gradient `[T, D]` f32 to the embedded rows, and those to the prompts of the other layers, by layer and example; `dy` `[T, D]`
    /// f32 is the one to the result.
    pub(crate) fn backward(
        &self,
        dy: Tensor,
        state: EncoderState,
        pass: &Pass<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<(Tensor, Vec<Vec<Option<Tensor>>>)> {
        let EncoderState { mut layers, last, bias } = state;
        let dy = pass.sites(ENDS).drop(1, dy, pass.rows)?;
        let out = pass.sites(ENDS).rounding(pass.dtype);
        let mut dx = self.norm.backward(&dy, &last, None, out, gradients)?;
        drop(last);
        let mut of_layers = Vec::new();
        for (i, (attention, feed_forward)) in self.layers.iter().enumerate().rev() {
            let (first, second) = match layers.pop() {
                Some(Kept::State(state)) => state,
                Some(Kept::Input(x)) => self.layer_inside(i, x, &bias, pass)?,
                None => unreachable!("forward kept one state a layer"),
            };
            let site = i * SITES_PER_LAYER;
            dx = feed_forward.backward(&dx, &second, (pass.rows, pass.sites(site + 1)), gradients)?;
            dx = attention.backward(&dx, &first, &spec(&bias, pass), pass.sites(site), gradients)?;
            if let Some(prompts) = pass.prompts.filter(|_| i > 0) {
                let (own, rest) = prompts.take(&dx.exact)?;
                of_layers.push(own);
                dx = rest.into();
            }
        }
        of_layers.reverse();
        Ok((pass.sites(ENDS).drop(0, dx.exact, pass.rows)?, of_layers))
    }
}

/// What goes into layer `i`: what the one before it gave, but for the rows of prompts that have some of their own there.
fn with_prompts(i: usize, x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
    match pass.prompts {
        Some(prompts) if i > 0 => prompts.put(i, &x),
        _ => Ok(x),
    }
}

fn spec<'a>(bias: &'a PositionBias, pass: &Pass<'a>) -> Attention<'a> {
    Attention {
        queries: pass.rows,
        keys: pass.rows,
        heads: bias.heads(),
        bias: Some(bias),
        causal: false,
        prefix: 0,
        dropout: None,
    }
}
