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
}

/// What a job's own failure is no other's business for.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { reason: reason(&error), of_group: error.is_of_group(), message: error.to_string() }
    }
}

impl From<incipit_collective::Error> for Failure {
    fn from(error: incipit_collective::Error) -> Self {
        Error::from(error).into()
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self { reason: JobReason::BadSpec, message: problem.message, of_group: false }
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
    match result {
        Err(failure) if failure.of_group || !backbone.engine.device_works() => Err(failure),
        result => Ok(result),
    }
}
