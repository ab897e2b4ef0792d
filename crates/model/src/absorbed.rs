//! Cross-attention of so few rows that no keys and values are made of the encoder's result: see [`absorbed_attention`].

use candle_core::{DType, Tensor};
use incipit_kernels::{Absorbed, AbsorbedAttended, Readers, RowGradients, absorbed_attention, linear};

use crate::Result;
use crate::gradients::{Gradient, WeightGradients};
use crate::layers::{AttentionLayer, Rows};

/// What the backward pass of such a sub-layer needs.
pub(crate) struct AbsorbedState {
    pub(crate) x: Tensor,
    attended: AbsorbedAttended,
}

impl AttentionLayer {
    /// Whether all keys and values are made of the encoder's result.
    pub(crate) fn can_absorb(&self) -> bool {
        self.prefix.is_none()
    }

    fn absorbed<'a>(&'a self, readers: &'a Readers) -> Absorbed<'a> {
        Absorbed { readers, k: &self.k.matrix, v: &self.v.matrix }
    }

    /// `x + attention(norm(x))` over the encoder's result `memory` `[T, D]`; `x` `[Td, D]` f32.
    pub(crate) fn forward_absorbed(
        &self,
        x: Tensor,
        (memory, readers): (&Tensor, &Readers),
        rows: Rows<'_>,
        dtype: DType,
    ) -> Result<(Tensor, AbsorbedState)> {
        let q = linear(&self.norm.forward(&x, dtype)?, &self.q.matrix, dtype)?;
        let attended = absorbed_attention(&self.absorbed(readers), &q, memory)?;
        let out = self.end.forward(&x, &attended.output, rows)?;
        Ok((out, AbsorbedState { x, attended }))
    }

    /// The gradient to the queries; that to the encoder's result, this rank's part, is added to `sum`.
    pub(crate) fn absorbed_backward(
        &self,
        dy: &Gradient,
        sum: &mut RowGradients<'_>,
        state: &AbsorbedState,
        rows: Rows<'_>,
        gradients: &mut WeightGradients,
    ) -> Result<Tensor> {
        let y = || Ok(state.attended.output.clone());
        let d_attended = self.end.backward(dy, y, state.attended.output.dtype(), rows, gradients)?;
        Ok(sum.add([&self.k.matrix, &self.v.matrix], &state.attended, &d_attended)?)
    }
}
