//! Why a group ended, left in the store for those who only see that it did.

use std::fmt;
use std::sync::Arc;

use crate::store::Store;
use crate::transport::Broken;

/// The reason of one epoch's end, as a member of one of its groups writes and reads it.
pub(crate) struct Reason {
    store: Arc<dyn Store>,
    /// One of all groups: whoever is told to end by one group tells the others why.
    key: String,
    /// The members' ranks in the world.
    members: Vec<usize>,
    /// This rank's number among them.
    rank: usize,
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reason({} of {}, {})", self.rank, self.members.len(), self.key)
    }
}

impl Reason {
    /// That of the epoch whose keys begin with `prefix`.
    pub(crate) fn new(store: Arc<dyn Store>, prefix: &str, members: Vec<usize>, rank: usize) -> Self {
        Self { store, key: format!("{prefix}/abort"), members, rank }
    }

    /// Leaves a reason, unless there is one: the first is the cause. Without a store there is none.
    pub(crate) fn leave(&self, reason: &str) {
        if !matches!(self.store.try_get(&self.key), Ok(Some(_))) {
            let _ = self.store.set(&self.key, format!("{} {reason}", self.members[self.rank]).as_bytes());
        }
    }

    /// The reason, if one is left within `wait`.
    #[cfg(feature = "gloo")]
    pub(crate) fn find(&self, wait: std::time::Duration) -> Option<Broken> {
        self.read(self.store.get(&self.key, wait).ok()?)
    }

    /// The reason, if one is known to be left.
    #[cfg(any(test, feature = "nccl"))]
    pub(crate) fn last_known(&self) -> Option<Broken> {
        self.read(self.store.last_known(&self.key).ok()??)
    }

    fn read(&self, text: Vec<u8>) -> Option<Broken> {
        let text = String::from_utf8(text).ok()?;
        let (rank, reason) = text.split_once(' ')?;
        let rank: usize = rank.parse().ok()?;
        // A rank of another group is not among the members.
        let member = self.members.iter().position(|member| *member == rank);
        let reason = if member.is_some() { reason.to_owned() } else { format!("rank {rank}: {reason}") };
        Some(Broken::Aborted { rank: member, reason })
    }
}
