//! The feed-forward sub-layer, with its backward written out.

use candle_core::{DType, Tensor};
use incipit_kernels::{
    Activation, Segments, activate, activate_gradient, dropout, gated, gated_gradient, linear, linear_each,
    linear_gradient,
};

use crate::Result;
use crate::axis::TensorAxis;
use crate::config::Config;
use crate::gradients::{Gradient, WeightGradients};
use crate::layers::{End, INNER, Norm, Rows, Sites, matrices};
use crate::sharding::{Slices, Weight};

/// The weights of a feed-forward sub-layer: into it `[F, D]`, out of it `[D, F]`, with the columns that are here.
pub(crate) struct FeedForward {
    axis: TensorAxis,
    /// The first column that is here, and how many there are in all.
    columns: (usize, usize),
    norm: Norm,
    activation: Activation,
    /// The gate's weight first, if there is one.
    into: Vec<Weight>,
    end: End,
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
        let part = |part: &str| format!("{name}.DenseReluDense.{part}.weight");
        let into = if config.gated {
            source.weights(["wi_0", "wi_1"].map(part), &[f, d])?.to_vec()
        } else {
            vec![source.weight(&part("wi"), &[f, d])?]
        };
        Ok(Self {
            norm: Norm::load(config, source, &format!("{name}.layer_norm"), 1.0)?,
            activation: config.activation,
            into,
            axis: axis.clone(),
            columns: (axis.first(f), f),
            end: End::load(source, axis, name, source.weight(&part("wo"), &[d, f])?)?,
        })
    }

    /// Exchanges over `axis` from now on.
    pub(crate) fn regroup(&mut self, axis: &TensorAxis) {
        self.axis = axis.clone();
        self.end.axis = axis.clone();
    }

    /// The inside for `x` `[T, D]` f32: all that backward needs, and what [`FeedForward::output`] goes on from.
    pub(crate) fn inside(&self, x: Tensor, dtype: DType) -> Result<FeedForwardState> {
        let y = self.norm.forward(&x, dtype)?;
        let inner = match &self.into[..] {
            [gate, up] => linear_each(&y, [&gate.matrix, &up.matrix], dtype)?.to_vec(),
            plain => vec![linear(&y, &plain[0].matrix, dtype)?],
        };
        Ok(FeedForwardState { x, inner })
    }

    /// `x + feed_forward(norm(x))`, from the inside.
    pub(crate) fn output(
        &self,
        state: &FeedForwardState,
        rows: &Segments,
        sites: Sites<'_>,
    ) -> Result<Tensor> {
        self.end.forward(&state.x, &self.hidden(state, rows, sites)?, (rows, sites))
    }

    /// What goes into the last product, as dropped.
    fn hidden(&self, state: &FeedForwardState, rows: &Segments, sites: Sites<'_>) -> Result<Tensor> {
        let hidden = match &state.inner[..] {
            [gate, up] => gated(self.activation, gate, up)?,
            plain => activate(self.activation, &plain[0])?,
        };
        self.drop_inner(sites, hidden, rows)
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
        dy: &Gradient,
        state: &FeedForwardState,
        (rows, sites): Rows<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Gradient> {
        let dtype = state.inner[0].dtype();
        let hidden = || self.hidden(state, rows, sites);
        let d_hidden = self.end.backward(dy, hidden, dtype, (rows, sites), gradients)?;
        let d_hidden = self.drop_inner(sites, d_hidden, rows)?;
        let d_inner = match &state.inner[..] {
            [gate, up] => <[Tensor; 2]>::from(gated_gradient(self.activation, &d_hidden, gate, up)?).to_vec(),
            plain => vec![activate_gradient(self.activation, &d_hidden, &plain[0])?],
        };
        let terms: Vec<(&Tensor, &Weight)> = d_inner.iter().zip(&self.into).collect();
        gradients.add_products(&terms, || self.norm.forward(&state.x, dtype))?;
        let d_normed = self.axis.reduce_gradient(&linear_gradient(&matrices(&terms), DType::F32)?)?;
        self.norm.backward(&d_normed, &state.x, Some(dy), sites.rounding(dtype), gradients)
    }
}
