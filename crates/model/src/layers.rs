//! The two kinds of sub-layers of a T5, each with its backward written out.
//!
//! A forward pass gives its result and what backward needs; backward takes the gradient to the result and gives the one to
//! the input. Frozen weights have no gradient. Letters in shapes: `T` rows of a microbatch, `D` d_model, `H` heads, `K`
//! d_kv, `F` d_ff.

use candle_core::{DType, Tensor};
use incipit_kernels::{
    Activation, Attended, Attention, Dropout, Frozen, Segments, activate, activate_gradient, attention,
    attention_gradient, dropout, gated, gated_gradient, linear, linear_add, linear_gradient, rms_norm,
    rms_norm_gradient, rounded,
};

use crate::Result;
use crate::axis::TensorAxis;
use crate::config::Config;
use crate::sharding::Slices;

/// RMSNorm with its frozen weight.
pub(crate) struct Norm {
    /// `[D]` f32.
    weight: Tensor,
    epsilon: f32,
}

impl Norm {
    /// `scale` multiplies the weight.
    pub(crate) fn load(config: &Config, source: Slices<'_>, name: &str, scale: f32) -> Result<Self> {
        let frozen = source.on_host(&format!("{name}.weight"), &[config.d_model])?;
        let weight: Vec<f32> = frozen.to_f32().iter().map(|w| w * scale).collect();
        let weight = Tensor::from_vec(weight, config.d_model, source.device)?;
        Ok(Self { weight, epsilon: config.layer_norm_epsilon })
    }

    /// `x` `[T, D]` f32; the result has the type `out`.
    pub(crate) fn forward(&self, x: &Tensor, out: DType) -> Result<Tensor> {
        Ok(rms_norm(x, &self.weight, self.epsilon, out)?)
    }

    /// The gradient to `x`, added to `residual`.
    pub(crate) fn backward(&self, dy: &Tensor, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        Ok(rms_norm_gradient(dy, x, &self.weight, self.epsilon, residual)?)
    }
}

/// The dropout of one sub-layer: its masks differ from place to place.
#[derive(Clone, Copy)]
pub(crate) struct Sites<'a> {
    pub(crate) dropout: Option<&'a Dropout>,
    /// The sub-layer's number in the model.
    pub(crate) layer: u64,
}

impl Sites<'_> {
    /// No dropout.
    pub(crate) const NONE: Sites<'static> = Sites { dropout: None, layer: 0 };

    pub(crate) fn at(&self, place: u64) -> Option<Dropout> {
        self.dropout.map(|d| d.at(self.layer * 4 + place))
    }

    /// `x` as dropped at `place`; serves forward and backward alike.
    pub(crate) fn drop(&self, place: u64, x: Tensor, rows: &Segments) -> Result<Tensor> {
        match self.at(place) {
            Some(d) => Ok(dropout(&x, rows, &d)?),
            None => Ok(x),
        }
    }

    /// `x + w y`, with `w y`, to which every rank has a part, dropped at [`OUTPUT`] first.
    fn residual(
        &self,
        x: &Tensor,
        (y, w): (&Tensor, &Frozen),
        axis: &TensorAxis,
        rows: &Segments,
    ) -> Result<Tensor> {
        if self.dropout.is_none() && axis.is_whole() {
            return Ok(linear_add(x, y, w)?);
        }
        let y = self.drop(OUTPUT, axis.reduce(&linear(y, w, DType::F32)?)?, rows)?;
        Ok(incipit_kernels::add(x, &y)?)
    }
}

/// Places of dropout in a sub-layer.
const PROBABILITIES: u64 = 0;
const INNER: u64 = 1;
const OUTPUT: u64 = 2;

/// The frozen weights of an attention sub-layer: q, k, v `[H K, D]`, o `[D, H K]`, with the heads that are here.
pub(crate) struct AttentionLayer {
    pub(crate) axis: TensorAxis,
    first_head: usize,
    pub(crate) norm: Norm,
    pub(crate) q: Frozen,
    pub(crate) k: Frozen,
    pub(crate) v: Frozen,
    pub(crate) o: Frozen,
}

/// What the backward pass of an attention sub-layer needs.
pub(crate) struct AttentionState {
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Attended,
}

impl AttentionLayer {
    /// `name` is that of the sub-layer ("encoder.block.0.layer.0"), `kind` that of the attention in it.
    pub(crate) fn load(
        config: &Config,
        source: Slices<'_>,
        axis: &TensorAxis,
        name: &str,
        kind: &str,
    ) -> Result<Self> {
        let (d, inner) = (config.d_model, config.inner());
        let part =
            |part: &str, shape: [usize; 2]| source.frozen(&format!("{name}.{kind}.{part}.weight"), &shape);
        Ok(Self {
            axis: axis.clone(),
            first_head: axis.first(config.num_heads),
            norm: Norm::load(config, source, &format!("{name}.layer_norm"), 1.0)?,
            q: part("q", [inner, d])?,
            k: part("k", [inner, d])?,
            v: part("v", [inner, d])?,
            o: part("o", [d, inner])?,
        })
    }

    /// The keys and values of the normed rows `y` `[T, D]`.
    pub(crate) fn keys_and_values(&self, y: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((linear(y, &self.k, y.dtype())?, linear(y, &self.v, y.dtype())?))
    }

    /// `x + attention(norm(x))`: `x` `[T, D]` f32. Keys and values are made of `x` unless they are `given`.
    pub(crate) fn forward(
        &self,
        x: Tensor,
        given: Option<(Tensor, Tensor)>,
        spec: &Attention<'_>,
        sites: Sites<'_>,
        dtype: DType,
    ) -> Result<(Tensor, AttentionState)> {
        let y = self.norm.forward(&x, dtype)?;
        let q = linear(&y, &self.q, dtype)?;
        let (k, v) = given.map_or_else(|| self.keys_and_values(&y), Ok)?;
        let masks = self.masks(sites);
        let attended = attention(&Attention { dropout: masks.as_ref(), ..*spec }, &q, &k, &v)?;
        let out = sites.residual(&x, (&attended.output, &self.o), &self.axis, spec.queries)?;
        Ok((out, AttentionState { x, q, k, v, attended }))
    }

    /// Of the probabilities of the heads that are here.
    fn masks(&self, sites: Sites<'_>) -> Option<Dropout> {
        sites.at(PROBABILITIES).map(|masks| masks.of_heads(self.first_head))
    }

    /// The gradients to `q`, `k` and `v`.
    pub(crate) fn inner_backward(
        &self,
        dy: &Tensor,
        state: &AttentionState,
        spec: &Attention<'_>,
        sites: Sites<'_>,
    ) -> Result<[Tensor; 3]> {
        let dtype = state.q.dtype();
        let dy = rounded(&sites.drop(OUTPUT, dy.clone(), spec.queries)?, dtype)?;
        let d_attended = linear_gradient(&[(&dy, &self.o)], dtype)?;
        let masks = self.masks(sites);
        let spec = Attention { dropout: masks.as_ref(), ..*spec };
        Ok(attention_gradient(&spec, [&state.q, &state.k, &state.v], &state.attended, &d_attended)?)
    }

    /// The gradient to `x` of self-attention.
    pub(crate) fn backward(
        &self,
        dy: &Tensor,
        state: &AttentionState,
        spec: &Attention<'_>,
        sites: Sites<'_>,
    ) -> Result<Tensor> {
        let [dq, dk, dv] = self.inner_backward(dy, state, spec, sites)?;
        self.input_backward(&[(&dq, &self.q), (&dk, &self.k), (&dv, &self.v)], dy, state)
    }

    /// The gradient to `x` of cross-attention, whose keys and values were given, from the one to its queries.
    pub(crate) fn cross_backward(&self, dq: &Tensor, dy: &Tensor, state: &AttentionState) -> Result<Tensor> {
        self.input_backward(&[(dq, &self.q)], dy, state)
    }

    fn input_backward(
        &self,
        terms: &[(&Tensor, &Frozen)],
        dy: &Tensor,
        state: &AttentionState,
    ) -> Result<Tensor> {
        let d_normed = self.axis.reduce_gradient(&linear_gradient(terms, DType::F32)?)?;
        self.norm.backward(&d_normed, &state.x, Some(dy))
    }
}

/// The frozen weights of a feed-forward sub-layer: into it `[F, D]`, out of it `[D, F]`, with the columns that are here.
pub(crate) struct FeedForward {
    pub(crate) axis: TensorAxis,
    /// The first column that is here, and how many there are in all.
    columns: (usize, usize),
    norm: Norm,
    activation: Activation,
    /// The gate's weight first, if there is one.
    into: Vec<Frozen>,
    out: Frozen,
}

/// What the backward pass of a feed-forward sub-layer needs.
pub(crate) struct FeedForwardState {
    x: Tensor,
    /// `[T, F]`, one for each weight into the layer.
    inner: Vec<Tensor>,
}

impl FeedForward {
    pub(crate) fn load(config: &Config, source: Slices<'_>, axis: &TensorAxis, name: &str) -> Result<Self> {
        let (d, f) = (config.d_model, config.d_ff);
        let names: &[&str] = if config.gated { &["wi_0", "wi_1"] } else { &["wi"] };
        let part = |part: &str, shape: [usize; 2]| {
            source.frozen(&format!("{name}.DenseReluDense.{part}.weight"), &shape)
        };
        Ok(Self {
            norm: Norm::load(config, source, &format!("{name}.layer_norm"), 1.0)?,
            activation: config.activation,
            into: names.iter().map(|n| part(n, [f, d])).collect::<Result<_>>()?,
            axis: axis.clone(),
            columns: (axis.first(f), f),
            out: part("wo", [d, f])?,
        })
    }

    /// The inside for `x` `[T, D]` f32: all that backward needs, and what [`FeedForward::output`] goes on from.
    pub(crate) fn inside(&self, x: Tensor, dtype: DType) -> Result<FeedForwardState> {
        let y = self.norm.forward(&x, dtype)?;
        let inner =
            self.into.iter().map(|w| linear(&y, w, dtype)).collect::<incipit_kernels::Result<Vec<_>>>()?;
        Ok(FeedForwardState { x, inner })
    }

    /// `x + feed_forward(norm(x))`, from the inside.
    pub(crate) fn output(
        &self,
        state: &FeedForwardState,
        rows: &Segments,
        sites: Sites<'_>,
    ) -> Result<Tensor> {
        let hidden = match &state.inner[..] {
            [gate, up] => gated(self.activation, gate, up)?,
            plain => activate(self.activation, &plain[0])?,
        };
        let hidden = self.drop_inner(sites, hidden, rows)?;
        sites.residual(&state.x, (&hidden, &self.out), &self.axis, rows)
    }

    /// The columns that are here, as dropped; serves forward and backward alike.
    fn drop_inner(&self, sites: Sites<'_>, x: Tensor, rows: &Segments) -> Result<Tensor> {
        let (first, total) = self.columns;
        match sites.at(INNER) {
            Some(d) => Ok(dropout(&x, rows, &d.of_columns(first, total))?),
            None => Ok(x),
        }
    }

    /// The gradient to `x`.
    pub(crate) fn backward(
        &self,
        dy: &Tensor,
        state: &FeedForwardState,
        rows: &Segments,
        sites: Sites<'_>,
    ) -> Result<Tensor> {
        let dtype = state.inner[0].dtype();
        let d_out = rounded(&sites.drop(OUTPUT, dy.clone(), rows)?, dtype)?;
        let d_hidden = self.drop_inner(sites, linear_gradient(&[(&d_out, &self.out)], dtype)?, rows)?;
        let d_normed = match &state.inner[..] {
            [gate, up] => {
                let (dg, du) = gated_gradient(self.activation, &d_hidden, gate, up)?;
                linear_gradient(&[(&dg, &self.into[0]), (&du, &self.into[1])], DType::F32)?
            }
            plain => {
                let d_inner = activate_gradient(self.activation, &d_hidden, &plain[0])?;
                linear_gradient(&[(&d_inner, &self.into[0])], DType::F32)?
            }
        };
        self.norm.backward(&self.axis.reduce_gradient(&d_normed)?, &state.x, Some(dy))
    }
}
