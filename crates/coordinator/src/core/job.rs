//! A job, as it is stored.

use std::collections::BTreeMap;

use incipit_proto::{
    names::{BackboneName, JobName},
    v1::{JobReason, JobState, JobWish, TrainingSpec},
};
use serde::{Deserialize, Serialize};

use super::{suspects::Suspicion, time::Time};

/// Attempts that a job remembers.
pub const KEPT_ATTEMPTS: usize = 20;
/// Checkpoints that a job keeps where its specification does not say.
pub const DEFAULT_KEEP: u32 = 3;

/// Labels of a job or backbone, at most.
pub const MAX_LABELS: usize = 64;

/// Steps that a job makes where its specification does not say: as `incipit train` does, whose crates are not the coordinator's.
pub const DEFAULT_STEPS: u64 = 30_000;

/// A job: one prompt being trained on a backbone, or several that share rows, or whatever else its method trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its name.
    pub name: JobName,
    /// What it is trained on.
    pub backbone: BackboneName,
    /// What is trained, and how.
    pub spec: TrainingSpec,
    /// Share of the backbone's time, 1 to 100.
    pub priority: u32,
    /// What happens when it fails.
    pub retry_policy: RetryPolicy,
    /// Whatever helps to find it again.
    pub labels: BTreeMap<String, String>,
    /// Where it stands.
    pub state: JobState,
    /// Why.
    pub reason: JobReason,
    /// One readable line about that.
    pub message: String,
    /// What was asked of it while it runs.
    pub wish: JobWish,
    /// Its last attempts, at most [`KEPT_ATTEMPTS`]; numbers and epochs grow, and only the last can be open.
    pub attempts: Vec<Attempt>,
    /// Attempts of an earlier job of the same name: numbers go on from there, so that what is late of that job is not taken for this one's.
    pub attempts_before: u32,
    /// Failures that were charged to the retry policy.
    pub num_failures: u32,
    /// What speaks against it, where engines were lost with it there.
    #[serde(default)]
    pub suspicion: Suspicion,
    /// The checkpoint of another job from which it went on, by its name; empty for one that began anew.
    #[serde(default)]
    pub continued_from: String,
    /// Steps of the newest checkpoint that was committed: the job goes on from there. Goes back only where that is found damaged.
    pub committed_step: u64,
    /// The best checkpoint.
    pub best: Option<Best>,
    /// What the data's loader wanted known.
    pub warnings: Vec<String>,
    /// When it was accepted.
    pub create_time: Time,
    /// When it made its first step.
    pub start_time: Option<Time>,
    /// When it reached a final state.
    pub end_time: Option<Time>,
    /// When it went to the queue; one that a lost rank threw off keeps its time, and so is in front.
    pub enqueue_time: Time,
    /// The revision that made it: decides between equals.
    pub created_revision: u64,
    /// The revision that changed it last: its etag.
    pub revision: u64,
}

/// What happens when a job itself fails.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// Attempts after the first that failed, 0 to 10.
    pub max_retries: u32,
    /// Failures that are tried again.
    pub reasons: Vec<JobReason>,
}

/// One stay on a backbone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    /// The backbone's epoch.
    pub epoch: u64,
    /// The step it went on from.
    pub start_step: u64,
    /// Its last step that is known, once it has ended.
    pub end_step: u64,
    /// When it began.
    pub start_time: Time,
    /// When and why it ended.
    pub end: Option<AttemptEnd>,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttemptEnd {
    /// When.
    pub time: Time,
    /// Why.
    pub reason: JobReason,
    /// One readable line about that.
    pub message: String,
}

/// The best checkpoint of a job.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its score.
    pub score: Option<f64>,
}

impl Job {
    /// Whether nothing becomes of it any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        is_final(self.state)
    }

    /// The attempt that runs.
    #[must_use]
    pub fn open_attempt(&self) -> Option<&Attempt> {
        self.attempts.last().filter(|attempt| attempt.end.is_none())
    }

    /// Whether its retry policy allows another attempt after a failure.
    #[must_use]
    pub fn may_retry(&self, reason: JobReason) -> bool {
        self.retry_policy.reasons.contains(&reason) && self.num_failures < self.retry_policy.max_retries
    }

    /// Number of the last attempt; 0 before the first.
    #[must_use]
    pub fn last_attempt(&self) -> u32 {
        self.attempts.last().map_or(self.attempts_before, |attempt| attempt.number)
    }

    /// Its place in the queue: the smaller, the sooner. A step of priority is worth a minute, so that nobody starves.
    #[must_use]
    pub fn queue_key(&self) -> (i128, u64) {
        (i128::from(self.enqueue_time.0) - i128::from(self.priority) * 60_000, self.created_revision)
    }
}

/// Whether a state is final.
#[must_use]
pub fn is_final(state: JobState) -> bool {
    matches!(state, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}
