//! A worker, as it is stored.

use incipit_proto::{
    names::WorkerName,
    v1::{Machine, WorkerState},
};
use serde::{Deserialize, Serialize};

use super::time::Time;

/// Incarnations that a worker's name remembers, so that a process that was taken over is not let in again.
pub const KEPT_INCARNATIONS: usize = 8;

/// A worker: an agent on a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Its name.
    pub name: WorkerName,
    /// Where it stands.
    pub state: WorkerState,
    /// Whether this incarnation was told to drain. A new one starts afresh.
    pub draining: bool,
    /// The agent's process.
    pub incarnation: String,
    /// Those that had the name before, the newest last.
    pub past: Vec<String>,
    /// What it is.
    pub machine: Machine,
    /// Ranks that it can hold.
    pub slots: u32,
    /// Its version of the program.
    pub version: String,
    /// When it last connected.
    pub connect_time: Time,
    /// When it was lost, if it is.
    pub lost_time: Option<Time>,
    /// The revision that made it.
    pub created_revision: u64,
    /// The revision that changed it last: its etag.
    pub revision: u64,
}

/// How far the reports of a worker are stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReports {
    /// The worker.
    pub worker: WorkerName,
    /// Its process.
    pub incarnation: String,
    /// The last report that was stored; 0 before the first.
    pub sequence: u64,
}
