//! What sub-layers of a T5 are made of, and attention, with its backward written out; see `feed_forward` for the other kind.
//!
//! A forward pass gives its result and what backward needs; backward takes the gradient to the result and gives the one to
//! the input. Weights have a gradient where one is asked for. Letters in shapes: `T` rows of a microbatch, `D` d_model, `H`
//! heads, `K` d_kv, `F` d_ff.

use candle_core::{DType, Tensor};
use incipit_kernels::{
    Attended, Attention, Buckets, Dropout, Frozen, Segments, attention, attention_gradient,
    attention_gradient_with_bias, dropout, linear, linear_add, linear_each, linear_gradient,
    linear_gradient_add, rms_norm, rms_norm_gradient, rms_norm_weight_gradient, rounded,
};

use crate::Result;
use crate::adapter::Adapter;
use crate::axis::TensorAxis;
use crate::config::Config;
use crate::gradients::{Gradient, WeightGradients};
use crate::prefix::Prefix;
use crate::sharding::{Slices, Weight};

/// RMSNorm with its weight.
pub(crate) struct Norm {
    name: String,
    /// `[D]` f32, times `scale`.
    weight: Tensor,
    scale: f32,
    epsilon: f32,
}

impl Norm {
    /// `scale` multiplies the weight.
    pub(crate) fn load(config: &Config, source: Slices<'_>, name: &str, scale: f32) -> Result<Self> {
        let name = format!("{name}.weight");
        let frozen = source.on_host(&name, &[config.d_model])?;
        let weight: Vec<f32> = frozen.to_f32().iter().map(|w| w * scale).collect();
        let weight = Tensor::from_vec(weight, config.d_model, source.device)?;
        Ok(Self { name, weight, scale, epsilon: config.layer_norm_epsilon })
    }

    /// `x` `[T, D]` f32; the result has the type `out`.
    pub(crate) fn forward(&self, x: &Tensor, out: DType) -> Result<Tensor> {
        Ok(rms_norm(x, &self.weight, self.epsilon, out)?)
    }

    /// The gradient to `x`, added to `residual` and rounded to `out`.
    pub(crate) fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        residual: Option<&Gradient>,
        out: DType,
        gradients: &mut WeightGradients,
    ) -> Result<Gradient> {
        gradients.add(&self.name, || {
            Ok((rms_norm_weight_gradient(dy, x, self.epsilon)? * f64::from(self.scale))?)
        })?;
        let residual = residual.map(|gradient| &gradient.exact);
        let (exact, rounded) = rms_norm_gradient(dy, x, &self.weight, self.epsilon, residual, out)?;
        Ok(Gradient { exact, rounded })
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

    /// The type to which a gradient is rounded where it is made, for products of `dtype`: with dropout none, which comes before them.
    pub(crate) fn rounding(&self, dtype: DType) -> DType {
        if self.dropout.is_some() { DType::F32 } else { dtype }
    }

    /// `x` as dropped at `place`; serves forward and backward alike.
    pub(crate) fn drop(&self, place: u64, x: Tensor, rows: &Segments) -> Result<Tensor> {
        match self.at(place) {
            Some(d) => Ok(dropout(&x, rows, &d)?),
            None => Ok(x),
        }
    }
}

/// Places of dropout in a sub-layer.
const PROBABILITIES: u64 = 0;
pub(crate) const INNER: u64 = 1;
const OUTPUT: u64 = 2;

/// A pass's rows, by example, and its dropout in a sub-layer.
pub(crate) type Rows<'a> = (&'a Segments, Sites<'a>);

/// The end of a sub-layer: its last product, to which every rank has a part, dropout, an adapter if there is one, and the sum with
/// what went into the sub-layer.
pub(crate) struct End {
    pub(crate) axis: TensorAxis,
    /// `[D, inner]`, with the inner columns that are here.
    weight: Weight,
    adapter: Option<Adapter>,
}

impl End {
    /// The end of the sub-layer `name`.
    pub(crate) fn load(source: Slices<'_>, axis: &TensorAxis, name: &str, weight: Weight) -> Result<Self> {
        let adapter = Adapter::load(source, name, weight.matrix.rows())?;
        Ok(Self { axis: axis.clone(), weight, adapter })
    }

    /// `x` `[T, D]` f32 went into the sub-layer, and `y` `[T, inner]` goes into the last product.
    pub(crate) fn forward(&self, x: &Tensor, y: &Tensor, rows: Rows<'_>) -> Result<Tensor> {
        if rows.1.dropout.is_none() && self.axis.is_whole() && self.adapter.is_none() {
            return Ok(linear_add(x, y, &self.weight.matrix)?);
        }
        let h = self.product(y, rows)?;
        let h = match &self.adapter {
            Some(adapter) => adapter.forward(&h, y.dtype())?,
            None => h,
        };
        Ok(incipit_kernels::add(x, &h)?)
    }

    /// The last product `[T, D]` f32, as dropped.
    fn product(&self, y: &Tensor, (rows, sites): Rows<'_>) -> Result<Tensor> {
        sites.drop(OUTPUT, self.axis.reduce(&linear(y, &self.weight.matrix, DType::F32)?)?, rows)
    }

    /// The gradient to `y` of type `dtype`, from `dy` `[T, D]`, the one to the result. `y` is made if it is needed.
    pub(crate) fn backward(
        &self,
        dy: &Gradient,
        y: impl FnOnce() -> Result<Tensor>,
        dtype: DType,
        rows: Rows<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Tensor> {
        let needed = self.adapter.is_some() || gradients.wants(&self.weight.name);
        let y = needed.then(y).transpose()?;
        let dy = match (&self.adapter, &y) {
            (Some(adapter), Some(y)) => {
                adapter.backward(dy, &self.product(y, rows)?, dtype, gradients)?.into()
            }
            _ => dy.clone(),
        };
        let dy = match rows.1.at(OUTPUT) {
            Some(d) => rounded(&dropout(&dy.exact, rows.0, &d)?, dtype)?,
            None => dy.rounded(dtype)?,
        };
        if let Some(y) = y {
            gradients.add_products(&[(&dy, &self.weight)], || Ok(y))?;
        }
        Ok(linear_gradient(&[(&dy, &self.weight.matrix)], dtype)?)
    }
}

/// The weights of an attention sub-layer: q, k, v `[H K, D]`, o `[D, H K]`, with the heads that are here.
pub(crate) struct AttentionLayer {
    axis: TensorAxis,
    first_head: usize,
    pub(crate) norm: Norm,
    pub(crate) q: Weight,
    pub(crate) k: Weight,
    pub(crate) v: Weight,
    /// Name and buckets of the table of which the position bias is made, where there is one.
    positions: Option<(String, Buckets)>,
    pub(crate) prefix: Option<Prefix>,
    pub(crate) end: End,
}

/// What the backward pass of an attention sub-layer needs.
pub(crate) struct AttentionState {
    pub(crate) x: Tensor,
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
        let stack = name.split('.').next().unwrap_or_default();
        let positions = || (position_table(stack), config.buckets(stack == "encoder"));
        let part = |part: &str| format!("{name}.{kind}.{part}.weight");
        let from_rows = [inner, d];
        // Queries of cross-attention are made of other rows than its keys and values.
        let [q, k, v] = if kind == "SelfAttention" {
            source.weights(["q", "k", "v"].map(part), &from_rows)?
        } else {
            let [k, v] = source.weights(["k", "v"].map(part), &from_rows)?;
            [source.weight(&part("q"), &from_rows)?, k, v]
        };
        Ok(Self {
            axis: axis.clone(),
            first_head: axis.first(config.num_heads),
            norm: Norm::load(config, source, &format!("{name}.layer_norm"), 1.0)?,
            q,
            k,
            v,
            positions: (kind == "SelfAttention").then(positions),
            prefix: Prefix::load(source, &format!("{name}.{kind}"), inner)?,
            end: End::load(source, axis, name, source.weight(&part("o"), &[d, inner])?)?,
        })
    }

    /// Exchanges over `axis` from now on.
    pub(crate) fn regroup(&mut self, axis: &TensorAxis) {
        self.axis = axis.clone();
        self.end.axis = axis.clone();
    }

    /// The keys and values of the normed rows `y` `[T, D]`.
    pub(crate) fn keys_and_values(&self, y: &Tensor) -> Result<(Tensor, Tensor)> {
        let [k, v] = linear_each(y, [&self.k.matrix, &self.v.matrix], y.dtype())?;
        Ok((k, v))
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
        let (q, own) = match given {
            Some(given) => (linear(&y, &self.q.matrix, dtype)?, given),
            None => {
                let [q, k, v] = linear_each(&y, [&self.q, &self.k, &self.v].map(|w| &w.matrix), dtype)?;
                (q, (k, v))
            }
        };
        let (k, v) = match &self.prefix {
            Some(prefix) => prefix.before(spec.keys, own)?,
            None => own,
        };
        let q = match self.padding(spec) {
            Some(prefix) => prefix.before_queries(&q, spec.queries)?,
            None => q,
        };
        let (longer, masks) = (self.longer(spec), self.masks(sites));
        let attended = attention(&self.spec(spec, &longer, masks.as_ref()), &q, &k, &v)?;
        let out = self.end.forward(&x, &self.of_sequence(&attended.output, spec)?, (spec.queries, sites))?;
        Ok((out, AttentionState { x, q, k, v, attended }))
    }

    /// The keys and values of `state` `[T, H K]`, each by the name of a prefix that would have these rows.
    pub(crate) fn as_prefix(&self, state: &AttentionState) -> [(String, Tensor); 2] {
        let name = |part: &str| self.q.name.replace(".q.weight", &format!(".{part}.weight"));
        [(name("prefix_k"), state.k.clone()), (name("prefix_v"), state.v.clone())]
    }

    /// Of the probabilities of the heads that are here.
    fn masks(&self, sites: Sites<'_>) -> Option<Dropout> {
        sites.at(PROBABILITIES).map(|masks| masks.of_heads(self.first_head))
    }

    /// How many positions a prefix takes before the sequence's.
    pub(crate) fn places_before(&self) -> usize {
        self.prefix.as_ref().filter(|prefix| prefix.is_placed()).map_or(0, Prefix::length)
    }

    /// The prefix, if queries get rows before them too: what is causal counts both from the same place.
    fn padding(&self, spec: &Attention<'_>) -> Option<&Prefix> {
        self.prefix.as_ref().filter(|prefix| spec.causal && prefix.is_placed())
    }

    /// Of rows of queries, those that the sequence has.
    fn of_sequence(&self, rows: &Tensor, spec: &Attention<'_>) -> Result<Tensor> {
        self.padding(spec).map_or_else(|| Ok(rows.clone()), |prefix| prefix.behind(rows, spec.queries))
    }

    /// The rows of queries and keys by example, where a prefix makes them more.
    fn longer(&self, spec: &Attention<'_>) -> [Option<Segments>; 2] {
        let queries = self.padding(spec).map(|prefix| prefix.segments(spec.queries));
        [queries, self.prefix.as_ref().map(|prefix| prefix.segments(spec.keys))]
    }

    /// What attends to what, with the prefix and dropout.
    fn spec<'a>(
        &self,
        spec: &Attention<'a>,
        [queries, keys]: &'a [Option<Segments>; 2],
        dropout: Option<&'a Dropout>,
    ) -> Attention<'a> {
        let prefix = self.prefix.as_ref().filter(|prefix| !prefix.is_placed()).map_or(0, Prefix::length);
        let queries = queries.as_ref().unwrap_or(spec.queries);
        Attention { queries, keys: keys.as_ref().unwrap_or(spec.keys), prefix, dropout, ..*spec }
    }

    /// The gradients to `q`, and to the `k` and `v` of the sequence.
    pub(crate) fn inner_backward(
        &self,
        dy: &Gradient,
        state: &AttentionState,
        spec: &Attention<'_>,
        sites: Sites<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<[Tensor; 3]> {
        let dtype = state.q.dtype();
        let y = || self.of_sequence(&state.attended.output, spec);
        let mut d_attended = self.end.backward(dy, y, dtype, (spec.queries, sites), gradients)?;
        if let Some(prefix) = self.padding(spec) {
            d_attended = prefix.before_queries(&d_attended, spec.queries)?;
        }
        let (longer, masks) = (self.longer(spec), self.masks(sites));
        let whole = self.spec(spec, &longer, masks.as_ref());
        let operands = [&state.q, &state.k, &state.v];
        let [dq, dk, dv] = match self.positions.as_ref().filter(|(table, _)| gradients.wants(table)) {
            Some((name, buckets)) => {
                let (d, d_table) =
                    attention_gradient_with_bias(&whole, operands, &state.attended, &d_attended, *buckets)?;
                gradients.add(name, || Ok(d_table))?;
                d
            }
            None => attention_gradient(&whole, operands, &state.attended, &d_attended)?,
        };
        let Some(prefix) = &self.prefix else { return Ok([dq, dk, dv]) };
        let [dk, dv] = prefix.backward(spec.keys, [dk, dv], gradients)?;
        Ok([self.of_sequence(&dq, spec)?, dk, dv])
    }

    /// The gradient to `x` of self-attention.
    pub(crate) fn backward(
        &self,
        dy: &Gradient,
        state: &AttentionState,
        spec: &Attention<'_>,
        sites: Sites<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Gradient> {
        let [dq, dk, dv] = self.inner_backward(dy, state, spec, sites, gradients)?;
        let terms = [(&dq, &self.q), (&dk, &self.k), (&dv, &self.v)];
        self.input_backward(&terms, dy, &state.x, sites, gradients)
    }

    /// The gradient to `x` of cross-attention, whose keys and values were not made of it, from the one to its queries.
    pub(crate) fn cross_backward(
        &self,
        dq: &Tensor,
        dy: &Gradient,
        x: &Tensor,
        sites: Sites<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Gradient> {
        self.input_backward(&[(dq, &self.q)], dy, x, sites, gradients)
    }

    /// The gradient to the `memory` of which keys and values were made, from those to them, added to the `sum` of other layers':
    /// this rank's part.
    pub(crate) fn memory_backward(
        &self,
        sum: Option<&Tensor>,
        [dk, dv]: [&Tensor; 2],
        memory: &Tensor,
        gradients: &mut WeightGradients,
    ) -> Result<Tensor> {
        let terms = [(dk, &self.k), (dv, &self.v)];
        gradients.add_products(&terms, || Ok(memory.clone()))?;
        Ok(match sum {
            Some(sum) => linear_gradient_add(sum, &matrices(&terms))?,
            None => linear_gradient(&matrices(&terms), DType::F32)?,
        })
    }

    fn input_backward(
        &self,
        terms: &[(&Tensor, &Weight)],
        dy: &Gradient,
        x: &Tensor,
        sites: Sites<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Gradient> {
        let dtype = terms[0].0.dtype();
        gradients.add_products(terms, || self.norm.forward(x, dtype))?;
        let d_normed = self.axis.reduce_gradient(&linear_gradient(&matrices(terms), DType::F32)?)?;
        self.norm.backward(&d_normed, x, Some(dy), sites.rounding(dtype), gradients)
    }
}

/// Name of the table of which the position bias of all layers of a stack ("encoder") is made.
pub(crate) fn position_table(stack: &str) -> String {
    format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
}

/// Gradients to results, with the matrices of the weights that made them.
pub(crate) fn matrices<'a>(terms: &[(&'a Tensor, &'a Weight)]) -> Vec<(&'a Tensor, &'a Frozen)> {
    terms.iter().map(|(dy, weight)| (*dy, &weight.matrix)).collect()
}
