//! What the core wants done.

use bytes::Bytes;
use incipit_proto::{
    Problem,
    names::{BackboneName, JobName, WorkerName},
    v1::{EventKind, JobWish, LogLine, MetricPoint, TrainingSpec},
};
use serde::{Deserialize, Serialize};

use super::{
    backbone::{Backbone, BackboneSpec},
    checkpoint::{Checkpoint, PromptVersion},
    input::RendezvousKey,
    job::{Attempt, Job},
    read::{BackboneView, JobView, WorkerView},
    rows::{Counter, RequestRecord},
    time::Time,
    worker::{Worker, WorkerReports},
};

/// What one input leads to. The sends and the reply go out once the changes are on the disk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effects {
    /// Rows to write, in order, all or none.
    pub changes: Vec<Change>,
    /// What to tell agents. One for a connection that is gone by then is dropped: the agent is told everything when it is back.
    pub sends: Vec<Send>,
    /// To whoever asked.
    pub reply: Option<Result<Reply, Problem>>,
}

/// Something to tell an agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Send {
    /// The worker.
    pub worker: WorkerName,
    /// The connection that it is for; it must not go over another one.
    pub connection: u64,
    /// What.
    pub message: ToAgent,
}

/// What agents are told.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent {
    /// The answer to its hello.
    Welcome {
        /// The protocol that both speak.
        protocol: u32,
        /// Milliseconds from one heartbeat to the next.
        heartbeat_interval_ms: u32,
        /// Milliseconds without a message after which the worker is taken for lost.
        lease_ms: u32,
        /// Reports up to this sequence are stored.
        acknowledged: u64,
    },
    /// Reports up to this sequence are stored.
    Acknowledged(u64),
    /// The engines that it is to have: all of them.
    Engines(Vec<EngineAssignment>),
    /// The jobs of a backbone that it leads: all of them.
    Jobs(JobAssignments),
    /// The answer to a rank's question.
    Rendezvous {
        /// What was asked for.
        key: RendezvousKey,
        /// The thing.
        value: Bytes,
    },
    /// Nothing more: end the stream with this problem. The last message of a connection.
    Close(Problem),
}

/// The ranks of a backbone that a worker is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineAssignment {
    /// The backbone.
    pub backbone: BackboneName,
    /// Epoch of the group.
    pub epoch: u64,
    /// The ranks.
    pub ranks: Vec<u32>,
    /// What is loaded, and how.
    pub spec: BackboneSpec,
}

/// The jobs of a backbone.
#[derive(Clone, Debug, PartialEq)]
pub struct JobAssignments {
    /// The backbone.
    pub backbone: BackboneName,
    /// Epoch of the group.
    pub epoch: u64,
    /// All of them, by name.
    pub jobs: Vec<JobAssignment>,
}

/// A job that a backbone is to have.
#[derive(Clone, Debug, PartialEq)]
pub struct JobAssignment {
    /// The job.
    pub job: JobName,
    /// Its open attempt.
    pub attempt: Attempt,
    /// What is trained, and how.
    pub spec: TrainingSpec,
    /// Share of the backbone's time.
    pub priority: u32,
    /// The checkpoint to go on from: that of the attempt's first step. None before the first.
    pub checkpoint: Option<Box<Checkpoint>>,
    /// What was asked for since.
    pub wish: JobWish,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The job.
    Job(Box<JobView>),
    /// The backbone.
    Backbone(Box<BackboneView>),
    /// The worker.
    Worker(Box<WorkerView>),
    /// The checkpoint.
    Checkpoint(Box<Checkpoint>),
    /// The prompt's version.
    Prompt(Box<PromptVersion>),
    /// It is done, and there is nothing to show.
    Done,
}

/// A row to write. [`super::Rows::apply`] says what each does to what is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Write the row of a resource, under (kind, name), and its event.
    Put(Stamp, Resource),
    /// Remove the row of a resource, and write its event. With a job also its metrics and logs go, with a backbone its logs.
    Remove(Stamp, Resource),
    /// Write the row of a request, by its id.
    PutRequest(RequestRecord),
    /// Remove the row of a request, by its id.
    RemoveRequest(String),
    /// Write how far a worker's reports are stored, by the worker.
    PutReports(WorkerReports),
    /// Remove how far a worker's reports are stored.
    RemoveReports(WorkerName),
    /// Write a counter, by its name.
    PutCounter(Counter),
    /// Remove a counter, by its name.
    RemoveCounter(String),
    /// Add points to the end of a job's metrics; their offsets are set.
    AppendMetrics(JobName, Vec<MetricPoint>),
    /// Add lines to the end of the logs of a job or backbone, by its name; their offsets are set. Of old lines the store keeps as many as it likes.
    AppendLogs(String, Vec<LogLine>),
}

/// What an event says besides the resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Place in the order of all changes, from 1, without gaps.
    pub revision: u64,
    /// When.
    pub time: Time,
    /// What happened.
    pub kind: EventKind,
    /// Who asked for it; empty if nobody did.
    pub actor: String,
}

/// A public resource. Its JSON is the body of its row and of its event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A job.
    Job(Box<Job>),
    /// A backbone.
    Backbone(Box<Backbone>),
    /// A worker.
    Worker(Box<Worker>),
    /// A checkpoint.
    Checkpoint(Box<Checkpoint>),
    /// A prompt's version.
    Prompt(Box<PromptVersion>),
}

impl Resource {
    /// The kind of its row: `job`, `backbone`, `worker`, `checkpoint` or `prompt`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Job(_) => "job",
            Self::Backbone(_) => "backbone",
            Self::Worker(_) => "worker",
            Self::Checkpoint(_) => "checkpoint",
            Self::Prompt(_) => "prompt",
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Job(job) => job.name.to_string(),
            Self::Backbone(backbone) => backbone.name.to_string(),
            Self::Worker(worker) => worker.name.to_string(),
            Self::Checkpoint(checkpoint) => checkpoint.name(),
            Self::Prompt(prompt) => prompt.name(),
        }
    }

    /// Writes down the revision that changes it; one that makes it is kept besides.
    pub(super) fn set_revision(&mut self, new: u64) -> EventKind {
        let (created, changed) = match self {
            Self::Job(job) => (&mut job.created_revision, &mut job.revision),
            Self::Backbone(backbone) => (&mut backbone.created_revision, &mut backbone.revision),
            Self::Worker(worker) => (&mut worker.created_revision, &mut worker.revision),
            Self::Checkpoint(checkpoint) => (&mut checkpoint.created_revision, &mut checkpoint.revision),
            Self::Prompt(version) => (&mut version.created_revision, &mut version.revision),
        };
        *changed = new;
        if *created == 0 {
            *created = new;
            return EventKind::Created;
        }
        EventKind::Changed
    }
}
