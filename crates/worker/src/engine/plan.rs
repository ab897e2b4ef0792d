//! What all ranks do together in one turn: the leader decides it and tells the others.

use incipit_collective::{Ranks, broadcast_bytes};
use incipit_proto::v1;
use prost::Message;

use crate::engine::share::Key;

/// A turn.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Plan {
    /// Jobs that leave.
    #[prost(uint64, repeated, tag = "1")]
    pub(crate) dismissals: Vec<Key>,
    /// Jobs that come.
    #[prost(message, repeated, tag = "2")]
    pub(crate) admissions: Vec<Admission>,
    /// Jobs that make a step together.
    #[prost(uint64, repeated, tag = "3")]
    pub(crate) steps: Vec<Key>,
    /// A job that goes through a round of its evaluation.
    #[prost(uint64, optional, tag = "4")]
    pub(crate) evaluation: Option<Key>,
    /// A job that makes a step by itself: its model is not quite the others'.
    #[prost(uint64, optional, tag = "5")]
    pub(crate) alone: Option<Key>,
}

/// A job that comes.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Admission {
    /// Its name among the ranks.
    #[prost(uint64, tag = "1")]
    pub(crate) key: Key,
    /// What is trained, and how.
    #[prost(message, optional, tag = "2")]
    pub(crate) spec: Option<v1::TrainingSpec>,
    /// Its tasks, in the order of [`crate::spec::tasks`].
    #[prost(message, repeated, tag = "3")]
    pub(crate) tasks: Vec<SentTask>,
}

/// A task of a job that comes.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SentTask {
    /// Its examples, as `tune::task::Task::to_bytes` has them; none where the leader is alone.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) task: Vec<u8>,
    /// The checkpoint that it goes on from, as `tune::checkpoint::Checkpoint::to_bytes` has it; empty where there is none, or the
    /// leader is alone.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) checkpoint: Vec<u8>,
    /// File of training examples, for messages.
    #[prost(string, tag = "3")]
    pub(crate) train: String,
    /// File of evaluation examples, for messages; empty where there is none.
    #[prost(string, tag = "4")]
    pub(crate) eval: String,
}

impl Plan {
    /// Tells the plan to the other ranks.
    ///
    /// # Errors
    /// If one of them is lost.
    pub(crate) fn tell(&self, ranks: &Ranks) -> incipit_collective::Result<()> {
        if ranks.mesh().world() > 1 {
            broadcast_bytes(&**ranks.world(), &self.encode_to_vec(), 0)?;
        }
        Ok(())
    }

    /// Awaits the leader's plan.
    ///
    /// # Errors
    /// If the leader is lost, or what it sent is no plan.
    pub(crate) fn hear(ranks: &Ranks) -> Result<Self, incipit_tune::Error> {
        let bytes = broadcast_bytes(&**ranks.world(), &[], 0)?;
        Self::decode(&*bytes)
            .map_err(|error| incipit_tune::Error::Received { thing: "plan", what: error.to_string() })
    }
}
