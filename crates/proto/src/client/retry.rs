//! Which requests may be sent twice, and how long to wait between.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use crate::v1;

/// A request of which one knows whether it may be sent twice.
pub trait Repeatable {
    /// Whether it may: it changes nothing, or carries the id by which the coordinator knows it again.
    fn is_repeatable(&self) -> bool;
}

macro_rules! reads {
    ($($request:ident)+) => {
        $(impl Repeatable for v1::$request {
            fn is_repeatable(&self) -> bool {
                true
            }
        })+
    };
}

macro_rules! writes {
    ($($request:ident)+) => {
        $(impl Repeatable for v1::$request {
            fn is_repeatable(&self) -> bool {
                !self.request_id.is_empty()
            }
        })+
    };
}

reads! {
    GetJobRequest ListJobsRequest StreamMetricsRequest StreamLogsRequest
    GetBackboneRequest ListBackbonesRequest
    GetCheckpointRequest ListCheckpointsRequest VerifyCheckpointRequest CollectGarbageRequest
    GetPromptVersionRequest ListPromptVersionsRequest
    GetWorkerRequest ListWorkersRequest
    FindBlobsRequest ReadBlobRequest
    WatchEventsRequest GetServerInfoRequest
}

writes! {
    CreateJobRequest UpdateJobRequest DeleteJobRequest PauseJobRequest ResumeJobRequest CancelJobRequest
    CreateBackboneRequest UpdateBackboneRequest RetryBackboneRequest DeleteBackboneRequest
    DeleteCheckpointRequest PinCheckpointRequest
    PromotePromptRequest DeletePromptVersionRequest
    DrainWorkerRequest
}

/// How long to wait after the `attempt`-th attempt, from 1: 0.2 s, 0.4 s, ... 5 s, less a random part of at most half, so that
/// clients that were cut off together do not come back together, and a number of attempts lasts for a time that one can count on. And
/// never less than the other side wants.
pub(super) fn pause(attempt: u32, wanted: Duration) -> Duration {
    let most = 200u64.saturating_mul(1 << attempt.saturating_sub(1).min(10)).min(5000);
    let random = RandomState::new().hash_one(attempt); // Seeded by the system: no dependency for a jitter.
    let own = Duration::from_millis(most - random % (most / 2 + 1));
    own.max(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problem;

    #[test]
    fn a_write_without_an_id_is_not_repeated() {
        let mut request = v1::CreateJobRequest::default();
        assert!(!request.is_repeatable());
        request.request_id = "c2bd2a4c-6ed8-4c0b-a51d-a35e1ba3ab1e".to_owned();
        assert!(request.is_repeatable());
        assert!(v1::GetJobRequest::default().is_repeatable());
    }

    #[test]
    fn pauses_grow_to_five_seconds_and_are_never_less_than_half() {
        for attempt in 1..64 {
            let most = Duration::from_millis((100u64 << attempt.min(20)).min(5000));
            assert!((most / 2..=most).contains(&pause(attempt, Duration::ZERO)), "{attempt}");
        }
    }

    #[test]
    fn a_pause_is_as_long_as_the_other_side_wants_within_reason() {
        let wanted =
            |seconds| Problem::later("RATE_LIMIT", "no", Duration::from_secs(seconds)).pause_wanted();
        assert_eq!(pause(1, wanted(3)), Duration::from_secs(3));
        assert_eq!(pause(1, wanted(3600)), Duration::from_secs(30));
        assert!(pause(1, Duration::from_millis(1)) >= Duration::from_millis(100));
    }
}
