//! Why a job, or the group of ranks, cannot go on.

use incipit_proto::{Problem, v1::JobReason};
use incipit_tune::{Error, backbone::Backbone};

/// Why something did not work, as the coordinator will tell it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) reason: JobReason,
    /// One readable line.
    pub(crate) message: String,
    /// Whether the ranks cannot go on together: no job is to blame.
    pub(crate) of_group: bool,
    /// Whether the memory of this rank's GPU ran out, of which no other rank knows.
    pub(crate) of_gpu_memory: bool,
}

/// What a job's own failure is no other's business for.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// One for which a job alone is to blame.
    pub(crate) fn of_job(reason: JobReason, message: String) -> Self {
        Self { reason, message, of_group: false, of_gpu_memory: false }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (of_group, of_gpu_memory) = (error.is_of_group(), error.is_of_gpu_memory());
        Self { reason: reason(&error), of_group, of_gpu_memory, message: error.to_string() }
    }
}

impl From<incipit_collective::Error> for Failure {
    fn from(error: incipit_collective::Error) -> Self {
        Error::from(error).into()
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::of_job(JobReason::BadSpec, problem.message)
    }
}

fn reason(error: &Error) -> JobReason {
    match error {
        Error::NonFinite { .. } | Error::NonFiniteEvaluation { .. } => JobReason::NonFinite,
        Error::Data(_) | Error::OtherData { .. } => JobReason::BadData,
        Error::Spec { .. }
        | Error::Choice { .. }
        | Error::Init { .. }
        | Error::Prompt { .. }
        | Error::PromptFile { .. }
        | Error::PromptWidth { .. }
        | Error::OtherSpec { .. }
        | Error::OtherBackbone { .. }
        | Error::OtherOrigin { .. } => JobReason::BadSpec,
        error if error.is_out_of_memory() => JobReason::OutOfMemory,
        _ => JobReason::Internal,
    }
}

/// A failure of a job is an error of the result inside, one of the group of the result outside. No job is to blame for a device that failed.
pub(crate) fn unless_of_group<T>(backbone: &Backbone, result: Result<T>) -> Result<Result<T>> {
    match result.map_err(|failure| as_of_group(backbone, failure)) {
        Err(failure) if failure.of_group || !backbone.engine.device_works() => Err(failure),
        result => Ok(result),
    }
}

/// Memory that ran out on one of the ranks that share a model is the end of their group: the others stand in an exchange with it.
pub(crate) fn as_of_group(backbone: &Backbone, failure: Failure) -> Failure {
    if failure.of_gpu_memory && backbone.engine.shares_model() && backbone.engine.device_works() {
        return backbone.engine.ends_for_memory(failure.message).into();
    }
    failure
}
