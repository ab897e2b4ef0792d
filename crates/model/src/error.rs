//! What can go wrong with a model.

/// Why a model could not be built or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration that is none of a T5.
    #[error("config.json: {what}")]
    Config {
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A weight that could not be read.
    #[error(transparent)]
    Weights(#[from] incipit_weights::Error),
    /// A model that cannot be cut as asked.
    #[error(transparent)]
    Mesh(#[from] incipit_mesh::Error),
    /// An exchange between ranks that failed.
    #[error(transparent)]
    Collective(#[from] incipit_collective::Error),
    /// An operation that refused its operands, or failed.
    #[error(transparent)]
    Kernel(#[from] incipit_kernels::Error),
    /// A batch that the model cannot take.
    #[error("example {example}: {what}")]
    Example {
        /// Its place in the batch, from 0.
        example: usize,
        /// What is wrong with it.
        what: String,
    },
    /// Options that contradict each other.
    #[error("{what}")]
    Options {
        /// Which, and how to mend it.
        what: String,
    },
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Kernel(error.into())
    }
}

/// `Result` with this crate's [`Error`](enum@Error).
pub type Result<T> = std::result::Result<T, Error>;
