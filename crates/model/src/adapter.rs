//! Bottleneck adapters (Houlsby et al. 2019): small trained layers behind the sub-layers of a frozen model.

use candle_core::{DType, Tensor};
use incipit_kernels::{Activation, activate, activate_gradient, add, linear, linear_gradient, rounded};

use crate::Result;
use crate::gradients::{Gradient, WeightGradients};
use crate::sharding::{Slices, Weight};

/// `h + up(relu(down(h)))` on a sub-layer's result, before it is added to what went into the sub-layer. It has `B` inner columns. Every
/// rank has all of it.
pub(crate) struct Adapter {
    /// `[B, D]`.
    down: Weight,
    /// `[D, B]`.
    up: Weight,
    down_bias: Bias,
    up_bias: Bias,
}

/// Added to each row.
struct Bias {
    name: String,
    /// `[n]` f32.
    values: Tensor,
}

impl Adapter {
    /// The adapter of the sub-layer `name` ("encoder.block.0.layer.0"), if the source has one.
    pub(crate) fn load(source: Slices<'_>, name: &str, d_model: usize) -> Result<Option<Self>> {
        let part = |part: &str| format!("{name}.adapter.{part}");
        let Some(width) = source.rows_of(&part("down.weight")) else { return Ok(None) };
        let bias = |name: String, len: usize| -> Result<Bias> {
            let values = source.on_host(&name, &[len])?.to_f32();
            Ok(Bias { name, values: Tensor::from_vec(values, len, source.device)? })
        };
        Ok(Some(Self {
            down: source.weight(&part("down.weight"), &[width, d_model])?,
            up: source.weight(&part("up.weight"), &[d_model, width])?,
            down_bias: bias(part("down.bias"), width)?,
            up_bias: bias(part("up.bias"), d_model)?,
        }))
    }

    /// `h` and the result are `[T, D]` f32; products read operands of type `dtype`.
    pub(crate) fn forward(&self, h: &Tensor, dtype: DType) -> Result<Tensor> {
        let inner = activate(Activation::Relu, &self.inner(&rounded(h, dtype)?)?)?;
        let out = linear(&inner, &self.up.matrix, DType::F32)?;
        Ok(add(h, &out.broadcast_add(&self.up_bias.values)?)?)
    }

    /// What goes into the activation, `[T, B]`; `h` is of the type of products.
    fn inner(&self, h: &Tensor) -> Result<Tensor> {
        let inner = linear(h, &self.down.matrix, DType::F32)?.broadcast_add(&self.down_bias.values)?;
        Ok(rounded(&inner, h.dtype())?)
    }

    /// The gradient to `h`, from `dy` `[T, D]`.
    pub(crate) fn backward(
        &self,
        dy: &Gradient,
        h: &Tensor,
        dtype: DType,
        gradients: &mut WeightGradients,
    ) -> Result<Tensor> {
        let h = rounded(h, dtype)?;
        let inner = self.inner(&h)?;
        let d_out = dy.rounded(dtype)?;
        gradients.add_products(&[(&d_out, &self.up)], || Ok(activate(Activation::Relu, &inner)?))?;
        gradients.add(&self.up_bias.name, || Ok(dy.exact.sum(0)?))?;
        let d_hidden = linear_gradient(&[(&d_out, &self.up.matrix)], dtype)?;
        let d_inner = activate_gradient(Activation::Relu, &d_hidden, &inner)?;
        gradients.add_products(&[(&d_inner, &self.down)], || Ok(h.clone()))?;
        gradients.add(&self.down_bias.name, || Ok(d_inner.to_dtype(DType::F32)?.sum(0)?))?;
        Ok(add(&dy.exact, &linear_gradient(&[(&d_inner, &self.down.matrix)], DType::F32)?)?)
    }
}
