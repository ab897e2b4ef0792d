//! What an operation refuses.

use candle_core::DType;

/// Why an operation or a frozen weight was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A weight of a type that a frozen T5 cannot have.
    #[error("a frozen weight is bf16 or f32, not {dtype:?}")]
    WeightDType {
        /// The type given.
        dtype: DType,
    },
    /// A weight that would lie outside the bytes it is a view of.
    #[error("a weight of {len} bytes at offset {from} does not lie within {owned} bytes")]
    WeightBounds {
        /// First byte.
        from: usize,
        /// Length in bytes.
        len: usize,
        /// Bytes there are.
        owned: usize,
    },
    /// Operands that do not fit together.
    #[error("{op}: {what}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which operand, with the shapes.
        what: String,
    },
    /// An operand that lies elsewhere than the others, or on a device for which nothing was built.
    #[error(
        "{op}: an operand lies on {device}; all must be on one device, a GPU needs a build with the feature `cuda`"
    )]
    Device {
        /// The operation.
        op: &'static str,
        /// Where the operand is.
        device: String,
    },
    /// There is no GPU to use.
    #[error("{what}")]
    NoGpu {
        /// Which one was asked for, why it cannot be used, and how to mend it.
        what: String,
    },
    /// The memory of a GPU does not suffice.
    #[error(
        "a GPU's memory does not suffice: {what}; pass a smaller --microbatch-tokens or --recompute on, or share the model between \
         GPUs with --tp"
    )]
    GpuMemory {
        /// How much was asked for, and how much was free.
        what: String,
    },
    /// The driver, a library or a kernel failed.
    #[error("{op}: {what}")]
    Gpu {
        /// What was being done.
        op: String,
        /// What the driver says.
        what: String,
    },
    /// Numbers that cannot be summed exactly.
    #[error("sum of gradients: {what}")]
    Sum {
        /// Which number, or how many terms.
        what: String,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(candle_core::Error),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match of_device(&error) {
            Some(device) => crate::gpu::device::told(device),
            None => Self::Tensor(error),
        }
    }
}

/// What a GPU's library told the tensor library, if that is what the error is about.
fn of_device(error: &candle_core::Error) -> Option<&(dyn std::error::Error + Send + Sync + 'static)> {
    use candle_core::Error as Tensor;
    match error {
        Tensor::Cuda(told) => Some(&**told),
        Tensor::Context { inner, .. }
        | Tensor::WithPath { inner, .. }
        | Tensor::WithBacktrace { inner, .. } => of_device(inner),
        _ => None,
    }
}

/// `Result` with this crate's [`Error`](enum@Error).
pub type Result<T, E = Error> = std::result::Result<T, E>;
