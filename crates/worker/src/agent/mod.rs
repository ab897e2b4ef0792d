//! The agent of a machine: keeps a connection to the coordinator, runs the engines that it is told to run, and carries files to and fro.

pub mod core;
mod engines;
mod files;
mod gpus;
mod jobs;
mod line;
mod outbox;
mod persist;
mod process;
mod rendezvous;
mod shell;
#[cfg(test)]
mod tests;
mod words;

use std::path::PathBuf;
use std::time::Duration;

use incipit_proto::client::ClientConfig;

pub use engines::{Engine, Key};
pub use gpus::gpus;
pub use shell::run;

/// What an agent is told.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Where the coordinator is.
    pub coordinator: ClientConfig,
    /// Last part of the worker's name.
    pub worker_id: String,
    /// Ranks that it can hold: one for each GPU, or on a machine without any as many as are wanted.
    pub slots: u32,
    /// Names of the machine's GPUs, as [`gpus()`] has them.
    pub gpus: Vec<String>,
    /// Directory for data, checkpoints on their way, and what is left to do after a restart. One agent has it.
    pub state_dir: PathBuf,
    /// An address of this machine that other ranks can reach; found out where none is given.
    pub address: Option<String>,
    /// How long engines have to save their jobs when the agent is to end.
    pub drain: Duration,
    /// The program that is an engine, and the arguments that make it one. It is given `--parent PID` besides.
    pub engine: (PathBuf, Vec<String>),
}

/// Why an agent ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be used.
    #[error("cannot {action} {}: {source}; pass another --state-dir", path.display())]
    StateDir {
        /// What could not be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another agent has the directory.
    #[error("another agent works in {}; end it, or pass another --state-dir", .0.display())]
    InUse(PathBuf),
    /// A GPU of the machine cannot be looked at.
    #[error(
        "this machine has GPUs of which one cannot be used: {0}; see what `nvidia-smi` says of it, \
         or name the others in CUDA_VISIBLE_DEVICES (none of them, to work on CPUs)"
    )]
    Gpus(incipit_kernels::Error),
    /// The coordinator will never take this agent.
    #[error("the coordinator turns it away for good, and its engines were ended: {0}")]
    TurnedAway(String),
    /// The worker's name cannot be one.
    #[error(transparent)]
    Name(#[from] incipit_proto::Problem),
}
