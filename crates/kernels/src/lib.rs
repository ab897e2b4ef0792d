//! Fused operations of a T5, each with its gradients to the input and to what can be trained, on the CPU and on CUDA devices.
//!
//! An operation runs where its operands lie: `gpu` has the CUDA side, every other module the CPU's.
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
mod gpu;
mod isa;
mod linear;
mod loss;
mod math;
mod norm;
pub mod rng;
mod segments;
pub mod sums;
mod tensor;
#[cfg(test)]
mod tests;

pub use activation::{Activation, activate, activate_gradient, gated, gated_gradient};
pub use attention::absorbed::{Absorbed, AbsorbedAttended, Readers, RowGradients, absorbed_attention};
pub use attention::{
    Attended, Attention, Buckets, PositionBias, attention, attention_gradient, attention_gradient_with_bias,
};
pub use cast::{add, rounded};
pub use dropout::{Dropout, dropout};
pub use embed::{Rows, Vocabulary, embed, embed_gradient};
pub use error::{Error, Result};
pub use frozen::{ByteOwner, Frozen, FrozenSlice};
pub use gpu::device::{
    CUDA_IS_BUILT, DeviceMemory, GpuInfo, KernelTime, check_device, device_memory, gpu_names, gpus, launches,
    open_gpu, profile, profiled,
};
#[cfg(feature = "emulator")]
pub use gpu::emulated::{fail as fail_emulated_gpu, limit as limit_emulated_gpu, on as on_emulated_gpu};
pub use isa::{Isa, isa};
pub use linear::{
    linear, linear_add, linear_each, linear_gradient, linear_gradient_add, linear_weight_gradient,
};
pub use loss::{Best, LossSlope, Softmax, Targets, best, cross_entropy_gradient};
pub use math::tanh;
pub use norm::{rms_norm, rms_norm_gradient, rms_norm_weight_gradient};
pub use segments::Segments;
