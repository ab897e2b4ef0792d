//! What is known of the moment, and forgotten with the process.

use std::collections::BTreeMap;

use incipit_proto::{
    names::{BackboneName, JobName},
    v1::JobWish,
};

use super::{effects::EngineAssignment, input::LoadStatus, time::Time};

/// A worker that holds a lease.
#[derive(Clone, Debug)]
pub(super) struct Presence {
    /// Its connection, if it has one.
    pub(super) connection: Option<u64>,
    /// When its lease runs out.
    pub(super) lease: Time,
    /// When it last gave a sign of life.
    pub(super) heartbeat: Time,
    /// How far its engines have loaded, as it said last.
    pub(super) loading: Vec<LoadStatus>,
    /// What it was told over this connection.
    pub(super) told_engines: Option<Vec<EngineAssignment>>,
    /// The same of each backbone that it leads.
    pub(super) told_jobs: BTreeMap<BackboneName, ToldJobs>,
}

/// What a leader was told of a backbone's jobs. All else of an assignment follows from these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ToldJobs {
    pub(super) epoch: u64,
    /// Name, attempt, wish and priority.
    pub(super) jobs: Vec<(JobName, u32, JobWish, u32)>,
}

/// How far a job has come since its last checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Steps made.
    pub step: u64,
    /// The last step's loss.
    pub loss: Option<f64>,
    /// Step and score of the best evaluation that this process of the coordinator has heard of.
    pub best: Option<(u64, f64)>,
    /// Steps a second.
    pub(super) rate: Rate,
}

/// How much of something comes in a second, smoothed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rate {
    since: Option<Time>,
    amount: f64,
    per_second: f64,
}

impl Rate {
    /// Counts what has come. A new value is taken once a second has passed, since reports come in batches.
    pub(super) fn add(&mut self, amount: f64, now: Time) {
        let since = *self.since.get_or_insert(now);
        self.amount += amount;
        let milliseconds = now.since(since);
        if milliseconds < 1000 {
            return;
        }
        let new = self.amount * 1000.0 / milliseconds as f64;
        self.per_second = if self.per_second == 0.0 { new } else { 0.7 * self.per_second + 0.3 * new };
        (self.since, self.amount) = (Some(now), 0.0);
    }

    /// The value; 0 if nothing has come for a minute.
    pub(super) fn per_second(&self, now: Time) -> f64 {
        match self.since {
            Some(since) if now.since(since) < 60_000 => self.per_second,
            _ => 0.0,
        }
    }
}
