//! Which states follow which, and for what reason. Nothing else changes a state.

use incipit_proto::v1::{BackboneReason as Br, BackboneState as Bs, JobReason as Jr, JobState as Js};

/// What moves a job from state to state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobCause {
    /// It was accepted, and its backbone is ready.
    Created,
    /// It was accepted before its backbone is ready.
    CreatedEarly,
    /// Its backbone became ready, and has no place yet.
    BackboneReady,
    /// Its backbone is not ready any more, or has failed.
    BackboneNotReady,
    /// There is a place on its backbone.
    Admitted,
    /// Someone asked for a pause.
    PauseRequested,
    /// Someone asked to go on.
    ResumeRequested,
    /// Someone asked to go on, and its backbone is not ready.
    ResumedEarly,
    /// Someone asked to end it.
    CancelRequested,
    /// Its backbone lost a rank, and no job's doing.
    RankLost,
    /// An engine of its backbone ended or hung, maybe by its doing.
    EngineLost,
    /// It left its backbone, or was thrown off, while a pause was wished.
    PauseDone,
    /// It left its backbone, or was thrown off, while a cancellation was wished.
    CancelDone,
    /// It left for a pause that nobody wishes any more.
    PauseTakenBack,
    /// It left, saved, since its backbone is to move.
    Yielded,
    /// It left with all its steps.
    StepsDone,
    /// It left because nothing got better.
    PatienceExhausted,
    /// It failed in this way, for good.
    Failed(Jr),
    /// It failed in a way that its retry policy covers.
    Retried,
    /// The checkpoint that it was to go on from cannot be read, and there is one before that.
    WentBack,
    /// Its backbone was deleted.
    BackboneDeleted,
}

/// From where (nothing: a new job), by what cause, to where, with what reason.
pub const JOB_TRANSITIONS: &[(Option<Js>, JobCause, Js, Jr)] = &[
    (None, JobCause::Created, Js::Queued, Jr::WaitingForPlace),
    (None, JobCause::CreatedEarly, Js::Queued, Jr::BackboneNotReady),
    (Some(Js::Queued), JobCause::BackboneReady, Js::Queued, Jr::WaitingForPlace),
    (Some(Js::Queued), JobCause::BackboneNotReady, Js::Queued, Jr::BackboneNotReady),
    (Some(Js::Queued), JobCause::Admitted, Js::Running, Jr::Started),
    (Some(Js::Queued), JobCause::PauseRequested, Js::Paused, Jr::Requested),
    (Some(Js::Queued), JobCause::CancelRequested, Js::Cancelled, Jr::Requested),
    (Some(Js::Queued), JobCause::Retried, Js::Queued, Jr::Retrying),
    (Some(Js::Queued), JobCause::Failed(Jr::EngineCrashed), Js::Failed, Jr::EngineCrashed),
    (Some(Js::Queued), JobCause::BackboneDeleted, Js::Cancelled, Jr::BackboneGone),
    (Some(Js::Running), JobCause::RankLost, Js::Queued, Jr::BackboneRecovering),
    (Some(Js::Running), JobCause::EngineLost, Js::Queued, Jr::BackboneRecovering),
    (Some(Js::Running), JobCause::Retried, Js::Queued, Jr::Retrying),
    (Some(Js::Running), JobCause::WentBack, Js::Queued, Jr::CheckpointDamaged),
    (Some(Js::Running), JobCause::PauseTakenBack, Js::Queued, Jr::WaitingForPlace),
    (Some(Js::Running), JobCause::Yielded, Js::Queued, Jr::BackboneRecovering),
    (Some(Js::Running), JobCause::PauseDone, Js::Paused, Jr::Requested),
    (Some(Js::Running), JobCause::CancelDone, Js::Cancelled, Jr::Requested),
    (Some(Js::Running), JobCause::StepsDone, Js::Succeeded, Jr::StepsDone),
    (Some(Js::Running), JobCause::PatienceExhausted, Js::Succeeded, Jr::PatienceExhausted),
    (Some(Js::Running), JobCause::Failed(Jr::NonFinite), Js::Failed, Jr::NonFinite),
    (Some(Js::Running), JobCause::Failed(Jr::BadData), Js::Failed, Jr::BadData),
    (Some(Js::Running), JobCause::Failed(Jr::BadSpec), Js::Failed, Jr::BadSpec),
    (Some(Js::Running), JobCause::Failed(Jr::OutOfMemory), Js::Failed, Jr::OutOfMemory),
    (Some(Js::Running), JobCause::Failed(Jr::Internal), Js::Failed, Jr::Internal),
    (Some(Js::Running), JobCause::Failed(Jr::CheckpointDamaged), Js::Failed, Jr::CheckpointDamaged),
    (Some(Js::Running), JobCause::BackboneDeleted, Js::Cancelled, Jr::BackboneGone),
    (Some(Js::Paused), JobCause::ResumeRequested, Js::Queued, Jr::WaitingForPlace),
    (Some(Js::Paused), JobCause::ResumedEarly, Js::Queued, Jr::BackboneNotReady),
    (Some(Js::Paused), JobCause::CancelRequested, Js::Cancelled, Jr::Requested),
    (Some(Js::Paused), JobCause::BackboneDeleted, Js::Cancelled, Jr::BackboneGone),
];

/// What moves a backbone from state to state. Being placed again is no such thing: a backbone that was lost stays degraded
/// until all its ranks have loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackboneCause {
    /// It was asked for.
    Created,
    /// There are workers for all its ranks.
    Placed,
    /// All its ranks have loaded.
    Loaded,
    /// A rank is lost, in this way.
    Lost(Br),
    /// Its model cannot be loaded.
    BadModel,
    /// It was lost too often.
    CrashLoop,
    /// Someone asked for another try.
    RetryRequested,
}

/// From where (nothing: a new backbone), by what cause, to where, with what reason.
pub const BACKBONE_TRANSITIONS: &[(Option<Bs>, BackboneCause, Bs, Br)] = &[
    (None, BackboneCause::Created, Bs::Pending, Br::NoWorker),
    (Some(Bs::Pending), BackboneCause::Placed, Bs::Loading, Br::Placed),
    (Some(Bs::Loading), BackboneCause::Loaded, Bs::Ready, Br::Loaded),
    (Some(Bs::Loading), BackboneCause::Lost(Br::EngineExited), Bs::Degraded, Br::EngineExited),
    (Some(Bs::Loading), BackboneCause::Lost(Br::EngineHung), Bs::Degraded, Br::EngineHung),
    (Some(Bs::Loading), BackboneCause::Lost(Br::WorkerLost), Bs::Degraded, Br::WorkerLost),
    (Some(Bs::Loading), BackboneCause::Lost(Br::GroupFailed), Bs::Degraded, Br::GroupFailed),
    (Some(Bs::Loading), BackboneCause::Lost(Br::WorkerDrained), Bs::Degraded, Br::WorkerDrained),
    (Some(Bs::Loading), BackboneCause::Lost(Br::BadModel), Bs::Degraded, Br::BadModel),
    (Some(Bs::Loading), BackboneCause::BadModel, Bs::Failed, Br::BadModel),
    (Some(Bs::Loading), BackboneCause::CrashLoop, Bs::Failed, Br::CrashLoop),
    (Some(Bs::Ready), BackboneCause::Lost(Br::EngineExited), Bs::Degraded, Br::EngineExited),
    (Some(Bs::Ready), BackboneCause::Lost(Br::EngineHung), Bs::Degraded, Br::EngineHung),
    (Some(Bs::Ready), BackboneCause::Lost(Br::WorkerLost), Bs::Degraded, Br::WorkerLost),
    (Some(Bs::Ready), BackboneCause::Lost(Br::GroupFailed), Bs::Degraded, Br::GroupFailed),
    (Some(Bs::Ready), BackboneCause::Lost(Br::WorkerDrained), Bs::Degraded, Br::WorkerDrained),
    (Some(Bs::Ready), BackboneCause::Lost(Br::BadModel), Bs::Degraded, Br::BadModel),
    (Some(Bs::Ready), BackboneCause::Lost(Br::MoreRoom), Bs::Degraded, Br::MoreRoom),
    (Some(Bs::Ready), BackboneCause::BadModel, Bs::Failed, Br::BadModel),
    (Some(Bs::Ready), BackboneCause::CrashLoop, Bs::Failed, Br::CrashLoop),
    (Some(Bs::Degraded), BackboneCause::Loaded, Bs::Ready, Br::Loaded),
    (Some(Bs::Degraded), BackboneCause::Lost(Br::EngineExited), Bs::Degraded, Br::EngineExited),
    (Some(Bs::Degraded), BackboneCause::Lost(Br::EngineHung), Bs::Degraded, Br::EngineHung),
    (Some(Bs::Degraded), BackboneCause::Lost(Br::WorkerLost), Bs::Degraded, Br::WorkerLost),
    (Some(Bs::Degraded), BackboneCause::Lost(Br::GroupFailed), Bs::Degraded, Br::GroupFailed),
    (Some(Bs::Degraded), BackboneCause::Lost(Br::WorkerDrained), Bs::Degraded, Br::WorkerDrained),
    (Some(Bs::Degraded), BackboneCause::Lost(Br::BadModel), Bs::Degraded, Br::BadModel),
    (Some(Bs::Degraded), BackboneCause::BadModel, Bs::Failed, Br::BadModel),
    (Some(Bs::Degraded), BackboneCause::CrashLoop, Bs::Failed, Br::CrashLoop),
    (Some(Bs::Failed), BackboneCause::RetryRequested, Bs::Pending, Br::NoWorker),
];

/// Where a job goes from a state by a cause, if the cause fits the state.
#[must_use]
pub fn job_transition(from: Option<Js>, cause: JobCause) -> Option<(Js, Jr)> {
    let row = JOB_TRANSITIONS.iter().find(|row| (row.0, row.1) == (from, cause));
    row.map(|row| (row.2, row.3))
}

/// Where a backbone goes from a state by a cause, if the cause fits the state.
#[must_use]
pub fn backbone_transition(from: Option<Bs>, cause: BackboneCause) -> Option<(Bs, Br)> {
    let row = BACKBONE_TRANSITIONS.iter().find(|row| (row.0, row.1) == (from, cause));
    row.map(|row| (row.2, row.3))
}
