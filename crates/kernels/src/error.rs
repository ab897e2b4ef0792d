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
    /// A device for which the operation was not built.
    #[error("{op} is built for the CPU alone, and its operand lies on {device}")]
    Device {
        /// The operation.
        op: &'static str,
        /// Where the operand is.
        device: String,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// `Result` with this crate's [`Error`](enum@Error).
pub type Result<T> = std::result::Result<T, Error>;
