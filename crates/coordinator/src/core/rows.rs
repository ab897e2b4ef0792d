//! Everything that is stored, as the core holds it; and what each change does to it.

use std::collections::BTreeMap;

use incipit_proto::{
    names::{BackboneName, JobName, PromptName, WorkerName},
    v1::{MetricPoint, metric_point::Point},
};
use serde::{Deserialize, Serialize};

use super::{
    backbone::Backbone,
    checkpoint::{Checkpoint, PromptVersion},
    effects::{Change, Resource},
    job::Job,
    time::Time,
    worker::{Worker, WorkerReports},
};

/// A request that took effect, so that the same one sent again does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// The caller's UUID.
    pub id: String,
    /// BLAKE3 of the request.
    pub hash: String,
    /// What it was about, or made.
    pub target: Target,
    /// When.
    pub time: Time,
}

/// What the answer to a request shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// A job.
    Job(JobName),
    /// A backbone.
    Backbone(BackboneName),
    /// A worker.
    Worker(WorkerName),
    /// A checkpoint, by its job and step.
    Checkpoint(JobName, u64),
    /// A version of a prompt.
    Prompt(PromptName, u64),
    /// Nothing: what it was about is gone.
    Nothing,
}

/// A number that outlives what it counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Its name: that of a prompt, for its last version; that of a job or backbone that was deleted, for its last attempt or epoch.
    pub name: String,
    /// The number.
    pub value: u64,
    /// When it may be forgotten, if ever.
    pub expire_time: Option<Time>,
}

/// How far a job's metrics are stored. The store need not write this down: it is the count of a job's points, and the
/// greatest step of either kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MetricMarks {
    /// Offset of the next point.
    pub next_offset: u64,
    /// Last step that has a point of training.
    pub training_step: Option<u64>,
    /// Last step that has a point of evaluation.
    pub evaluation_step: Option<u64>,
}

impl MetricMarks {
    /// Takes a point, if its step is beyond what is stored of its kind, and sets its offset.
    pub fn take(&mut self, point: &mut MetricPoint) -> bool {
        point.offset = self.next_offset;
        self.note(point)
    }

    /// The same of a point that has its offset.
    fn note(&mut self, point: &MetricPoint) -> bool {
        let last = match &point.point {
            Some(Point::Training(_)) => &mut self.training_step,
            Some(Point::Evaluation(_)) => &mut self.evaluation_step,
            None => return false,
        };
        if last.is_some_and(|last| point.step <= last) {
            return false;
        }
        *last = Some(point.step);
        self.next_offset += 1;
        true
    }
}

/// Everything that is stored, except the texts of metrics, logs and events: what the store reads back at the start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// The newest revision; 0 before the first.
    pub revision: u64,
    /// Jobs.
    pub jobs: BTreeMap<JobName, Job>,
    /// Backbones.
    pub backbones: BTreeMap<BackboneName, Backbone>,
    /// Workers.
    pub workers: BTreeMap<WorkerName, Worker>,
    /// Checkpoints, by job and step.
    pub checkpoints: BTreeMap<(JobName, u64), Checkpoint>,
    /// Versions of prompts.
    pub prompts: BTreeMap<(PromptName, u64), PromptVersion>,
    /// Requests, by id.
    pub requests: BTreeMap<String, RequestRecord>,
    /// How far workers' reports are stored.
    pub reports: BTreeMap<WorkerName, WorkerReports>,
    /// Counters, by name.
    pub counters: BTreeMap<String, Counter>,
    /// How far metrics are stored; no entry where there are none.
    pub metrics: BTreeMap<JobName, MetricMarks>,
    /// Offset of the next line of a job's or backbone's log; no entry where there is none.
    pub logs: BTreeMap<String, u64>,
}

impl Rows {
    /// Adds the row of a resource: for the store, at the start.
    pub fn insert(&mut self, resource: Resource) {
        match resource {
            Resource::Job(job) => drop(self.jobs.insert(job.name.clone(), *job)),
            Resource::Backbone(backbone) => drop(self.backbones.insert(backbone.name.clone(), *backbone)),
            Resource::Worker(worker) => drop(self.workers.insert(worker.name.clone(), *worker)),
            Resource::Checkpoint(checkpoint) => {
                self.checkpoints.insert((checkpoint.job.clone(), checkpoint.step), *checkpoint);
            }
            Resource::Prompt(version) => {
                self.prompts.insert((version.prompt.clone(), version.version), *version);
            }
        }
    }

    /// What a change does. The core itself changes its state in no other way.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Put(stamp, resource) => {
                self.revision = stamp.revision;
                self.insert(resource.clone());
            }
            Change::Remove(stamp, resource) => {
                self.revision = stamp.revision;
                self.remove(resource);
            }
            Change::PutRequest(record) => drop(self.requests.insert(record.id.clone(), record.clone())),
            Change::RemoveRequest(id) => drop(self.requests.remove(id)),
            Change::PutReports(reports) => {
                self.reports.insert(reports.worker.clone(), reports.clone());
            }
            Change::RemoveReports(worker) => drop(self.reports.remove(worker)),
            Change::PutCounter(counter) => {
                self.counters.insert(counter.name.clone(), counter.clone());
            }
            Change::RemoveCounter(name) => drop(self.counters.remove(name)),
            Change::AppendMetrics(job, points) => {
                let marks = self.metrics.entry(job.clone()).or_default();
                for point in points {
                    marks.note(point);
                }
            }
            Change::AppendLogs(name, lines) => {
                *self.logs.entry(name.clone()).or_default() += lines.len() as u64;
            }
        }
    }

    fn remove(&mut self, resource: &Resource) {
        match resource {
            Resource::Job(job) => {
                self.jobs.remove(&job.name);
                self.metrics.remove(&job.name);
                self.logs.remove(job.name.as_str());
            }
            Resource::Backbone(backbone) => {
                self.backbones.remove(&backbone.name);
                self.logs.remove(backbone.name.as_str());
            }
            Resource::Worker(worker) => drop(self.workers.remove(&worker.name)),
            Resource::Checkpoint(checkpoint) => {
                self.checkpoints.remove(&(checkpoint.job.clone(), checkpoint.step));
            }
            Resource::Prompt(version) => {
                self.prompts.remove(&(version.prompt.clone(), version.version));
            }
        }
    }
}
