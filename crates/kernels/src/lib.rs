//! Fused operations of a frozen T5, each with its gradient to the input, on the CPU.
#![allow(unsafe_code)]

mod activation;
mod attention;
mod cast;
mod dropout;
mod element;
mod embed;
mod error;
mod frozen;
mod gemm;
mod isa;
mod linear;
mod loss;
mod math;
mod norm;
pub mod rng;
mod segments;
mod tensor;
#[cfg(test)]
mod tests;

pub use activation::{Activation, activate, activate_gradient, gated, gated_gradient};
pub use attention::{Attended, Attention, Buckets, PositionBias, attention, attention_gradient};
pub use cast::{add, rounded};
pub use dropout::{Dropout, dropout};
pub use embed::{Rows, Vocabulary, embed};
pub use error::{Error, Result};
pub use frozen::{ByteOwner, Frozen, FrozenSlice};
pub use isa::{Isa, isa};
pub use linear::{linear, linear_add, linear_gradient};
pub use loss::{LossSlope, Softmax, Targets, cross_entropy_gradient};
pub use norm::{rms_norm, rms_norm_gradient};
pub use segments::Segments;
