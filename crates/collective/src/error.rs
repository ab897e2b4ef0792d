//! What goes wrong between ranks, and how to mend it.

use std::fmt;
use std::sync::Arc;

/// Where in a run something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the job.
    pub job: String,
    /// Epoch of its group of ranks.
    pub epoch: u64,
    /// Which of the groups: "tensor", "data" or "world".
    pub group: &'static str,
    /// Which operation of that group, from 1; 0 is before the first.
    pub sequence: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { job, epoch, group, sequence } = self;
        write!(f, "job {job:?}, epoch {epoch}, operation {sequence} of the {group} group")
    }
}

/// In what ranks do not agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mismatch {
    /// They run different versions of this program, or something else sends.
    Protocol,
    /// They belong to different jobs.
    Job,
    /// They belong to different epochs of a job: one of them was started for a group that is no more.
    Epoch,
    /// They were started with different degrees.
    Mesh,
    /// They call different operations, or are at different points of their sequence.
    Order,
    /// They name different roots.
    Root,
    /// The tensors of some are in main memory, and those of others on their GPUs.
    Device,
    /// Their numbers are of different types.
    DType,
    /// Their tensors have different shapes.
    Shape,
}

impl Mismatch {
    /// All of them, each at its number in what ranks write to each other.
    #[cfg(any(feature = "nccl", test))]
    pub(crate) const ALL: [Self; 9] = [
        Self::Protocol,
        Self::Job,
        Self::Epoch,
        Self::Mesh,
        Self::Order,
        Self::Root,
        Self::Device,
        Self::DType,
        Self::Shape,
    ];
}

/// Why an operation of several ranks failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The mesh, or a part of a tensor, cannot be.
    #[error(transparent)]
    Mesh(#[from] incipit_mesh::Error),
    /// The ranks do not agree; every rank gets this error.
    #[error("{place}: {what}")]
    Mismatch {
        /// Where.
        place: Place,
        /// In what.
        kind: Mismatch,
        /// Which rank says what, and how to mend it.
        what: String,
    },
    /// This rank gave something that no rank can take.
    #[error("{place}: {what}")]
    Refused {
        /// Where.
        place: Place,
        /// What, and what can be taken.
        what: String,
    },
    /// This rank's device, or the library that moves its numbers, failed.
    #[error("{place}: {what}")]
    Device {
        /// Where.
        place: Place,
        /// What failed, and how to mend it.
        what: String,
    },
    /// Another rank is gone.
    #[error("{place}: {}: {what}; look for the cause in the messages of that rank", lost(*rank))]
    Lost {
        /// Where.
        place: Place,
        /// The rank of the world, if it is known.
        rank: Option<usize>,
        /// How that was seen.
        what: String,
    },
    /// Other ranks did not come in time.
    #[error(
        "{place}: {} did not come within {seconds} s; look at what that rank does, or pass a longer --deadline",
        late(ranks)
    )]
    Deadline {
        /// Where.
        place: Place,
        /// The ranks of the world that were missed, if they are known.
        ranks: Vec<usize>,
        /// How long they were awaited.
        seconds: f64,
    },
    /// A rank stopped the group.
    #[error("{}: {reason}", stopped(*rank))]
    Aborted {
        /// Which rank of the world, if it is known.
        rank: Option<usize>,
        /// What it gave as its reason.
        reason: String,
    },
    /// The ranks could not find each other.
    #[error("rank {rank} cannot join the others of job {job:?}, epoch {epoch}: {what}")]
    Connect {
        /// The rank of the world that tried.
        rank: usize,
        /// Name of the job.
        job: String,
        /// Epoch of its group of ranks.
        epoch: u64,
        /// What failed, and how to mend it.
        what: String,
    },
    /// Ranks did not appear before the deadline for connecting.
    #[error(
        "rank {rank} waited {seconds} s for {} of job {job:?}, epoch {epoch}; is it started, and given the same store?",
        late(missing)
    )]
    Absent {
        /// The rank of the world that waited.
        rank: usize,
        /// The ranks of the world that did not appear, as far as they are known.
        missing: Vec<usize>,
        /// Name of the job.
        job: String,
        /// Epoch of its group of ranks.
        epoch: u64,
        /// How long they were awaited.
        seconds: f64,
    },
    /// The store through which ranks find each other failed.
    #[error("store {store}: {what}")]
    Store {
        /// Its address or directory.
        store: String,
        /// What failed, and how to mend it.
        what: String,
    },
    /// A key did not appear in the store before the deadline.
    #[error("store {store}: nobody wrote {key:?} within {seconds} s")]
    StoreDeadline {
        /// Its address or directory.
        store: String,
        /// The key.
        key: String,
        /// How long it was awaited.
        seconds: f64,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(Arc<candle_core::Error>),
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether another rank failed first, so that the cause is to be sought there.
    #[must_use]
    pub fn is_echo(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Deadline { .. } | Self::Aborted { .. } | Self::Absent { .. })
    }

    /// Whether the memory of this rank's GPU did not suffice, for what comes of an operation or for what it is made of. The tensor library
    /// wraps what the driver says in errors of several types, so that it is known by the driver's word.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let told = |what: &str| what.contains("CUDA_ERROR_OUT_OF_MEMORY");
        match self {
            Self::Device { what, .. } => told(what),
            Self::Tensor(error) => told(&error.to_string()),
            _ => false,
        }
    }

    /// Gives an error of a store its place.
    pub(crate) fn store(store: &(impl fmt::Display + ?Sized), what: impl fmt::Display) -> Self {
        Self::Store { store: store.to_string(), what: what.to_string() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(Arc::new(error))
    }
}

fn lost(rank: Option<usize>) -> String {
    rank.map_or_else(|| "another rank is lost".to_owned(), |rank| format!("rank {rank} is lost"))
}

fn stopped(rank: Option<usize>) -> String {
    let who = rank.map_or_else(|| "another rank".to_owned(), |rank| format!("rank {rank}"));
    format!("{who} stopped the others")
}

fn late(ranks: &[usize]) -> String {
    match ranks {
        [] => "another rank".to_owned(),
        [rank] => format!("rank {rank}"),
        ranks => {
            let ranks: Vec<_> = ranks.iter().map(ToString::to_string).collect();
            format!("ranks {}", ranks.join(", "))
        }
    }
}
