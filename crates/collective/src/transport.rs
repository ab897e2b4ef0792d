//! What a backend has to provide: moving bytes between the ranks of a group.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Mismatch;

/// A moment by which something must have happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Until {
    at: Instant,
    /// How long that was when it was set.
    pub(crate) after: Duration,
}

impl Until {
    /// That long from now; a year at most, which an [`Instant`] can always hold.
    pub(crate) fn after(after: Duration) -> Self {
        let after = after.min(Duration::from_secs(365 * 86_400));
        Self { at: Instant::now() + after, after }
    }

    /// What is left of it.
    pub(crate) fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub(crate) fn is_over(self) -> bool {
        self.left().is_zero()
    }
}

/// Why bytes did not come. Ranks are those of the group.
#[derive(Clone, Debug)]
pub(crate) enum Broken {
    /// A rank is gone.
    Lost { rank: Option<usize>, what: String },
    /// Ranks did not come in time.
    Deadline { ranks: Vec<usize> },
    /// A rank stopped the group.
    Aborted { rank: Option<usize>, reason: String },
    /// The ranks turn out not to have agreed on an earlier operation.
    #[cfg(any(feature = "nccl", test))]
    Mismatch { kind: Mismatch, sequence: u64, what: String },
    /// This rank's device failed.
    #[cfg(any(feature = "nccl", test))]
    Device { what: String },
}

/// One piece of bytes from every rank, all of one length.
#[derive(Debug)]
pub(crate) struct Parts(Vec<(Arc<Vec<u8>>, Range<usize>)>);

impl Parts {
    /// Each rank's piece within the bytes that it gave.
    pub(crate) fn new(pieces: impl Iterator<Item = (Arc<Vec<u8>>, Range<usize>)>) -> Self {
        Self(pieces.collect())
    }

    /// `size` pieces, one after the other.
    #[cfg(any(feature = "gloo", feature = "nccl", test))]
    pub(crate) fn of_one(bytes: Vec<u8>, size: usize) -> Self {
        let len = bytes.len() / size;
        let bytes = Arc::new(bytes);
        Self::new((0..size).map(|i| (bytes.clone(), i * len..(i + 1) * len)))
    }

    /// By rank.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(bytes, range)| &bytes[range.clone()])
    }
}

/// Moves bytes. Every rank of the group makes the same calls in the same order with the same lengths: the protocol
/// above it makes sure of that, so that a transport need not.
pub(crate) trait Transport: Send + Sync + Debug {
    /// This rank's operation of that number begins. Nothing to do for most.
    fn begins(&self, _sequence: u64) {}

    /// Everybody's `mine`.
    fn all_gather(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken>;

    /// `mine` is cut into as many equal pieces as there are ranks, one for each; this rank's pieces come back.
    fn all_to_all(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken>;

    /// The root's `mine`; that of the others is of the same length, and not looked at.
    fn broadcast(&self, mine: Vec<u8>, root: usize, until: Until) -> Result<Arc<Vec<u8>>, Broken>;

    /// Makes all ranks' present and later calls fail. Does not wait; may be called while another thread is in a call.
    fn abort(&self, reason: &str);

    /// This rank has seen that the ranks do not agree on the operation of that number, and will make no more calls. The
    /// others see the same, so that most have nothing to do.
    fn disagreed(&self, _kind: Mismatch, _sequence: u64, _what: &str) {}

    /// This rank will make no more calls.
    fn leave(&self);
}
