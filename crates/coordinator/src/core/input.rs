//! What the core is told.

use std::collections::BTreeMap;

use bytes::Bytes;
use incipit_proto::{
    names::{BackboneName, JobName, PromptName, WorkerName},
    v1::{EngineLossCause, JobReason, JobState, LogLine, Machine, MetricPoint, TrainingSpec},
};

use super::{
    backbone::BackboneSpec,
    checkpoint::{CheckpointFile, TaskScore},
    job::RetryPolicy,
};

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Someone asks for a change.
    Request {
        /// Who: goes to the events.
        actor: String,
        /// Tells a request from the same sent again.
        key: Option<RequestKey>,
        /// What for.
        request: Request,
    },
    /// An agent has connected, and said who it is. The shell counts connections up, and never uses a number twice in its life.
    Connected {
        /// The connection.
        connection: u64,
        /// Who it is.
        hello: Hello,
    },
    /// An agent said something.
    Agent {
        /// The worker, by its hello.
        worker: WorkerName,
        /// The connection; what comes over one that is not the worker's newest has no effect.
        connection: u64,
        /// What it said.
        message: AgentMessage,
    },
    /// A connection broke. That alone is no loss.
    Disconnected {
        /// The worker, by its hello.
        worker: WorkerName,
        /// The connection.
        connection: u64,
    },
    /// The files of a checkpoint were read, and are whole.
    Verified {
        /// Its job.
        job: JobName,
        /// Its step.
        step: u64,
    },
    /// Time went on: ten times a second.
    Tick,
}

/// Tells a request from the same sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestKey {
    /// The caller's UUID.
    pub id: String,
    /// BLAKE3 of the method and the request as it was sent, without what the service made up.
    pub hash: String,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Accept a job.
    CreateJob {
        /// The job.
        job: Box<NewJob>,
        /// Answer with what the job would be, and do nothing.
        validate_only: bool,
    },
    /// Change what can be changed of a job.
    UpdateJob {
        /// The job.
        target: JobTarget,
        /// What becomes of it.
        patch: Box<JobPatch>,
        /// Answer with what the job would be, and do nothing.
        validate_only: bool,
    },
    /// Forget a job that has ended.
    DeleteJob(JobTarget),
    /// Pause a job.
    PauseJob(JobTarget),
    /// Resume a job.
    ResumeJob(JobTarget),
    /// Cancel a job.
    CancelJob(JobTarget),
    /// Have a model loaded.
    CreateBackbone {
        /// The backbone.
        backbone: Box<NewBackbone>,
        /// Answer with what the backbone would be, and do nothing.
        validate_only: bool,
    },
    /// Change what can be changed of a backbone.
    UpdateBackbone {
        /// The backbone.
        name: BackboneName,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
        /// What becomes of it.
        patch: Box<BackbonePatch>,
        /// Answer with what the backbone would be, and do nothing.
        validate_only: bool,
    },
    /// Have the model of a backbone that has failed loaded again.
    RetryBackbone {
        /// The backbone.
        name: BackboneName,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
    },
    /// Let a model go.
    DeleteBackbone {
        /// The backbone.
        name: BackboneName,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
        /// Cancel its jobs.
        force: bool,
    },
    /// Give a worker nothing more, and move what it has.
    DrainWorker {
        /// The worker.
        name: WorkerName,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
    },
    /// Delete a checkpoint.
    DeleteCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointRef,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
    },
    /// Keep a checkpoint, or no longer.
    PinCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointRef,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
        /// Whether to keep it.
        pinned: bool,
    },
    /// Make a checkpoint the next version of a prompt.
    PromotePrompt {
        /// The prompt.
        prompt: PromptName,
        /// The checkpoint.
        checkpoint: CheckpointRef,
        /// The checkpoint's revision, if the caller knows it.
        etag: Option<u64>,
        /// What there is to say.
        description: String,
    },
    /// Delete a version of a prompt.
    DeletePromptVersion {
        /// The prompt.
        prompt: PromptName,
        /// The version.
        version: u64,
        /// Its revision, if the caller knows it.
        etag: Option<u64>,
    },
}

/// A job, and the revision that the caller thinks it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobTarget {
    /// The job.
    pub name: JobName,
    /// Its revision, if the caller knows it.
    pub etag: Option<u64>,
}

/// A job to accept; checked.
#[derive(Clone, Debug, PartialEq)]
pub struct NewJob {
    /// Its name, made up by the service where the caller gave none.
    pub name: JobName,
    /// The backbone.
    pub backbone: BackboneName,
    /// What is trained, and how.
    pub spec: TrainingSpec,
    /// 1 to 100.
    pub priority: u32,
    /// What happens when it fails.
    pub retry_policy: RetryPolicy,
    /// Whatever helps to find it again.
    pub labels: BTreeMap<String, String>,
    /// A checkpoint of another job to go on from.
    pub start: Option<CheckpointRef>,
}

/// What is to change of a job; checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobPatch {
    /// 1 to 100.
    pub priority: Option<u32>,
    /// What happens when it fails.
    pub retry_policy: Option<RetryPolicy>,
    /// Whatever helps to find it again.
    pub labels: Relabel,
}

/// What is to change of a backbone; checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackbonePatch {
    /// Jobs that are on it at once, at most.
    pub max_running_jobs: Option<u32>,
    /// Replicas that are enough; 0 for all of them.
    pub min_dp: Option<u32>,
    /// Whatever helps to find it again.
    pub labels: Relabel,
}

/// What is to change of labels: first all of them, then some.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relabel {
    /// All labels, if all are to change.
    pub whole: Option<BTreeMap<String, String>>,
    /// The value of each that is to change, or nothing for one that is to go.
    pub changed: BTreeMap<String, Option<String>>,
}

/// A backbone to load; checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBackbone {
    /// Its name.
    pub name: BackboneName,
    /// What is asked for.
    pub spec: BackboneSpec,
    /// Whatever helps to find it again.
    pub labels: BTreeMap<String, String>,
}

/// Names a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRef {
    /// Its job.
    pub job: JobName,
    /// Which of the job's.
    pub step: StepRef,
    /// The task that is meant, of a job of several.
    pub task: Option<String>,
}

/// A checkpoint that a job saved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saved {
    /// Steps made.
    pub step: u64,
    /// Its files.
    pub files: Vec<CheckpointFile>,
    /// Score of the evaluation at this step, if there was one.
    pub score: Option<f64>,
    /// Whether it is the best so far.
    pub best: bool,
    /// The tasks of a job of several.
    pub tasks: Vec<TaskScore>,
}

/// Which checkpoint of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepRef {
    /// That of this step.
    At(u64),
    /// The best.
    Best,
    /// The newest.
    Last,
}

/// Who an agent is.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// The worker.
    pub worker: WorkerName,
    /// Its process.
    pub incarnation: String,
    /// Its version of the program.
    pub version: String,
    /// The protocol that both speak.
    pub protocol: u32,
    /// The machine.
    pub machine: Machine,
    /// Ranks that it can hold.
    pub slots: u32,
    /// Engines that run there.
    pub engines: Vec<EngineStatus>,
}

/// An engine that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineStatus {
    /// Its backbone.
    pub backbone: BackboneName,
    /// Epoch of its group.
    pub epoch: u64,
    /// Its rank; of ranks that are threads of one process, the first.
    pub rank: u32,
}

/// How far an engine has loaded its part of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadStatus {
    /// The engine.
    pub engine: EngineStatus,
    /// Bytes that are loaded.
    pub loaded: u64,
    /// Bytes of all of it.
    pub total: u64,
}

/// What an agent says after its hello.
#[derive(Clone, Debug, PartialEq)]
pub enum AgentMessage {
    /// A sign of life.
    Heartbeat {
        /// Whether it wants to be drained.
        draining: bool,
        /// How far its engines have loaded; of those that are not among them, what was said before.
        loading: Vec<LoadStatus>,
    },
    /// A report, which takes effect once.
    Report {
        /// From 1, without gaps.
        sequence: u64,
        /// What happened.
        report: Report,
    },
    /// A rank leaves something for the others of its group.
    RendezvousPut {
        /// What and for whom.
        key: RendezvousKey,
        /// The thing.
        value: Bytes,
    },
    /// A rank asks for what another has left.
    RendezvousGet {
        /// What and of whom.
        key: RendezvousKey,
        /// Whether for all that comes after it, too.
        follows: bool,
    },
}

/// Names what a rank leaves for others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RendezvousKey {
    /// The backbone.
    pub backbone: BackboneName,
    /// Epoch of the group.
    pub epoch: u64,
    /// Its name.
    pub key: String,
}

/// Something that happened on a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// To an engine.
    Engine {
        /// The backbone.
        backbone: BackboneName,
        /// Epoch of its group.
        epoch: u64,
        /// Its rank; of ranks that are threads of one process, the first.
        rank: u32,
        /// What.
        event: EngineEvent,
    },
    /// To a job.
    Job {
        /// The backbone.
        backbone: BackboneName,
        /// Epoch of the group.
        epoch: u64,
        /// The job.
        job: JobName,
        /// The attempt.
        attempt: u32,
        /// What.
        event: JobEvent,
    },
    /// Lines were written.
    Logs {
        /// Of which backbone.
        backbone: BackboneName,
        /// Of which job, if of one.
        job: Option<JobName>,
        /// The lines.
        lines: Vec<LogLine>,
    },
}

/// What happened to an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEvent {
    /// It has loaded, and met the others.
    Ready {
        /// Its process.
        pid: u32,
        /// Names the model's numbers.
        fingerprint: String,
        /// How many numbers the model has.
        num_parameters: u64,
        /// Columns of a prompt.
        d_model: u32,
        /// Layers of its encoder.
        num_layers: u32,
    },
    /// It is gone, or of no use.
    Lost {
        /// How.
        cause: EngineLossCause,
        /// One readable line.
        message: String,
        /// Whether its process can meet the others again under a new epoch.
        alive: bool,
    },
}

/// What happened to a job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobEvent {
    /// It takes part.
    Started {
        /// The step it goes on from.
        step: u64,
        /// What the data's loader wants known.
        warnings: Vec<String>,
    },
    /// It measured something.
    Measured(Vec<MetricPoint>),
    /// It saved a checkpoint, whose files are stored.
    Saved(Saved),
    /// It left the backbone.
    Left {
        /// What becomes of it.
        state: JobState,
        /// Why.
        reason: JobReason,
        /// One readable line about that.
        message: String,
        /// Steps made.
        step: u64,
    },
}
