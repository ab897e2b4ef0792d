//! Errors as they cross the wire, in one place: a [`Problem`] becomes a [`Status`] with `google.rpc` details, and back.

use std::{collections::BTreeMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Who gives the reasons.
pub const DOMAIN: &str = "incipit";

/// Longest that another side's wish for a pause is followed.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Why a request was refused: a code for programs that know gRPC, a reason for those that know Incipit, and a sentence for people.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// The kind, as gRPC has it.
    pub code: Code,
    /// The kind, as Incipit has it: `JOB_STATE`, `REQUEST_ID_REUSED`, ...
    pub reason: String,
    /// What is wrong with what, and what to do.
    pub message: String,
    /// Whatever of the message is not the same each time.
    pub metadata: BTreeMap<String, String>,
    /// Fields of the request that are wrong, each with what is.
    pub fields: Vec<(String, String)>,
    /// When to come again, where the other side says so.
    pub retry_after: Option<Duration>,
}

impl Problem {
    /// A problem without metadata and fields.
    #[must_use]
    pub fn new(code: Code, reason: &str, message: impl Into<String>) -> Self {
        let (reason, message) = (reason.to_owned(), message.into());
        Self { code, reason, message, metadata: BTreeMap::new(), fields: Vec::new(), retry_after: None }
    }

    /// A field of the request that is wrong.
    #[must_use]
    pub fn field(field: &str, what: impl Into<String>) -> Self {
        let what = what.into();
        let mut problem = Self::new(Code::InvalidArgument, "BAD_FIELD", format!("{field}: {what}"));
        problem.fields.push((field.to_owned(), what));
        problem
    }

    /// A resource that is not there.
    #[must_use]
    pub fn not_found(name: &str) -> Self {
        Self::new(Code::NotFound, "NOT_FOUND", format!("there is no {name}")).with("name", name)
    }

    /// A resource whose state does not allow what was asked.
    #[must_use]
    pub fn state(reason: &str, message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, reason, message)
    }

    /// The same, with one more datum.
    #[must_use]
    #[allow(clippy::needless_pass_by_value, reason = "numbers are given as they are")]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// A call that is turned away for now, and may be made again after `wait`.
    #[must_use]
    pub fn later(reason: &str, message: impl Into<String>, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..Self::new(Code::ResourceExhausted, reason, message) }
    }

    /// How long the other side wants the pause to be before the call is made again, as long as one would wait.
    #[must_use]
    pub fn pause_wanted(&self) -> Duration {
        self.retry_after.unwrap_or_default().min(LONGEST_PAUSE)
    }

    /// Whether a call was turned away because there are too many just now: nothing was done, and later it is. A full disk and a message
    /// that is too large have the same code, and stay.
    #[must_use]
    pub fn is_for_now(&self) -> bool {
        self.code == Code::ResourceExhausted && matches!(&*self.reason, "RATE_LIMIT" | "OVERLOADED")
    }
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let mut details = ErrorDetails::with_error_info(
            problem.reason,
            DOMAIN,
            problem.metadata.into_iter().collect::<std::collections::HashMap<_, _>>(),
        );
        for (field, what) in problem.fields {
            details.add_bad_request_violation(field, what);
        }
        if problem.retry_after.is_some() {
            details.set_retry_info(problem.retry_after);
        }
        Status::with_error_details(problem.code, problem.message, details)
    }
}

impl From<&Status> for Problem {
    /// What a server said. A status without our details, from a proxy or from tonic itself, has the reason `UNKNOWN`.
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        let retry_after = details.retry_info().and_then(|info| info.retry_delay);
        let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
        Self {
            code: status.code(),
            reason: info.map_or_else(|| "UNKNOWN".to_owned(), |info| info.reason.clone()),
            message: status.message().to_owned(),
            metadata: info.map(|info| info.metadata.clone().into_iter().collect()).unwrap_or_default(),
            fields: violations
                .into_iter()
                .map(|violation| (violation.field, violation.description))
                .collect(),
            retry_after,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_crosses_the_wire_whole() {
        let problem = Problem::field("job.priority", "is 0; give 1 to 100").with("value", 0);
        let status = Status::from(problem.clone());
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(Problem::from(&status), problem);
        let problem = Problem::later("RATE_LIMIT", "too often", Duration::from_millis(70));
        assert_eq!(Problem::from(&Status::from(problem.clone())), problem);
    }

    #[test]
    fn too_many_calls_pass_and_a_full_disk_does_not() {
        let of = |reason| Problem::new(Code::ResourceExhausted, reason, "no").is_for_now();
        assert!(of("RATE_LIMIT") && of("OVERLOADED"));
        assert!(!of("NO_SPACE") && !of("WATCHER_TOO_SLOW") && !of("UNKNOWN"));
    }

    #[test]
    fn a_foreign_status_is_a_problem_too() {
        let problem = Problem::from(&Status::unavailable("connection refused"));
        assert_eq!((problem.code, &*problem.reason), (Code::Unavailable, "UNKNOWN"));
        assert_eq!(problem.to_string(), "connection refused");
    }
}
