//! What an agent's core hears, and what it wants done.

use incipit_proto::v1::{self, AttachRequest, AttachResponse};

use crate::agent::core::Time;
use crate::agent::engines::Key;
use crate::frames::{LocalJob, Notice, Order};

/// What an agent is.
#[derive(Clone, Debug)]
pub struct Config {
    /// `workers/{worker}`.
    pub worker: String,
    /// Made up for this process.
    pub incarnation: String,
    /// Version of the program.
    pub version: String,
    /// The machine.
    pub machine: v1::Machine,
    /// Ranks that it can hold.
    pub slots: u32,
    /// Directory for checkpoints on their way to the coordinator.
    pub outbox: String,
    /// An address of this machine that other ranks can reach; empty if it is not known.
    pub address: String,
    /// How long engines have to save their jobs when the agent is to end.
    pub drain: Time,
}

/// What the agent hears.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Input {
    /// There is a connection to the coordinator.
    Connected,
    /// It is gone.
    Disconnected,
    /// The coordinator said something.
    Received(AttachResponse),
    /// An engine said something.
    Notice(Key, Notice),
    /// An engine wrote a line to its standard error.
    Line(Key, v1::LogLine),
    /// An engine's process was started: its number.
    Started(Key, u32),
    /// An engine's process has ended: how.
    Ended(Key, String),
    /// The coordinator will never take this agent: why, and what to do.
    TurnedAway(String),
    /// The coordinator does not find a file of a checkpoint that was reported to it.
    Missing,
    /// A job's files are here, or why they cannot be.
    Fetched(FileKey, Result<LocalJob, Refused>),
    /// A checkpoint's files are at the coordinator, or why they cannot be.
    Stored(u64, Result<(), String>),
    /// A job's files do not travel for now.
    Delayed(FileKey, Delay),
    /// Time has passed.
    Tick,
    /// The agent is to end.
    Terminate,
}

/// A job and an attempt of it.
pub type FileKey = (String, u32);

/// Files that do not travel, and are tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delay {
    /// Whether it is a checkpoint that cannot be stored.
    pub unsaved: bool,
    /// One readable line: what does not travel, since when, and why; or that it does again.
    pub text: String,
}

/// Why a job cannot be trained here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The kind of it.
    pub reason: v1::JobReason,
    /// One readable line.
    pub message: String,
}

/// What the agent wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Say something to the coordinator.
    Send(AttachRequest),
    /// Start an engine's process.
    Start(Key),
    /// Say something to an engine.
    Tell(Key, Box<Order>),
    /// Kill an engine's process, and whatever it has started.
    Kill(Key),
    /// Have a job's files here.
    Fetch(Box<v1::JobAssignment>),
    /// A job's files are not needed any more, if they are on their way still.
    Forget(FileKey),
    /// Have a checkpoint's files stored at the coordinator: those of the report with this ticket, in this directory.
    Store {
        /// The report's ticket.
        ticket: u64,
        /// The files.
        files: Vec<v1::CheckpointFile>,
        /// Where they are.
        dir: String,
        /// Whose they are: the report, without what it reports.
        of: Box<v1::JobReport>,
    },
    /// A directory is not needed any more.
    Remove(String),
    /// The agent is done, once its engines have ended.
    Exit,
    /// The same, and it ends for this reason.
    GiveUp(String),
}
