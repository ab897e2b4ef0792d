//! A job's state, reason and end, in words.

use incipit_proto::v1::{Job, JobReason, JobState, JobWish};

use crate::cluster::show::{NONE, word};
use crate::exit::Exit;
use crate::units;

/// `queued`, `running`; with what was asked for: `running (pausing)`.
pub(super) fn state(job: &Job) -> String {
    let state = state_name(job.state());
    match job.wish() {
        JobWish::Pause => format!("{state} (pausing)"),
        JobWish::Cancel => format!("{state} (cancelling)"),
        JobWish::Unspecified | JobWish::Yield => state,
    }
}

/// A state in small letters.
pub(super) fn state_name(state: JobState) -> String {
    word(state.as_str_name(), "JOB_STATE_")
}

/// A reason in words.
pub(super) fn reason(reason: JobReason) -> String {
    word(reason.as_str_name(), "JOB_REASON_")
}

/// The reason, and what there is to say about it.
pub(super) fn why(job: &Job) -> String {
    match (job.reason(), &*job.message) {
        (JobReason::Unspecified, "") => NONE.to_owned(),
        (JobReason::Unspecified, message) => message.to_owned(),
        (known, "") => reason(known),
        (known, message) => format!("{}: {message}", reason(known)),
    }
}

/// `1200/30000`.
pub(super) fn steps(job: &Job) -> String {
    let progress = job.progress.clone().unwrap_or_default();
    if progress.num_steps == 0 {
        NONE.to_owned()
    } else {
        format!("{}/{}", progress.step, progress.num_steps)
    }
}

/// Whether nothing more happens to the job.
pub(super) fn has_ended(job: &Job) -> bool {
    matches!(job.state(), JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

/// The exit code that the job's end deserves.
pub(super) fn exit(job: &Job) -> Exit {
    match (job.state(), job.reason()) {
        (JobState::Cancelled, _) => Exit::Cancelled,
        (JobState::Failed, JobReason::NonFinite) => Exit::NonFinite,
        (JobState::Failed, JobReason::BadData | JobReason::BadSpec) => Exit::Usage,
        (JobState::Failed, _) => Exit::Failure,
        _ => Exit::Ok,
    }
}

/// How long the steps that are left take, if that can be told: `3 min 05 s left`.
pub(super) fn left(job: &Job) -> Option<String> {
    let progress = job.progress.as_ref().filter(|progress| progress.steps_per_second > 0.0)?;
    let seconds = progress.num_steps.saturating_sub(progress.step) as f64 / progress.steps_per_second;
    let time = std::time::Duration::from_secs_f64(seconds.min(1e9));
    Some(format!("{} left", units::duration(time)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A job in a state.
    pub(in super::super) fn job(state: JobState, reason: JobReason) -> Job {
        Job { name: "jobs/j-1".into(), state: state.into(), reason: reason.into(), ..Job::default() }
    }

    #[test]
    fn a_wish_is_told_with_the_state() {
        let mut job = job(JobState::Running, JobReason::Started);
        assert_eq!(state(&job), "running");
        job.set_wish(JobWish::Pause);
        assert_eq!(state(&job), "running (pausing)");
    }

    #[test]
    fn the_exit_code_tells_how_the_job_ended() {
        for (state, reason, code) in [
            (JobState::Succeeded, JobReason::StepsDone, Exit::Ok),
            (JobState::Succeeded, JobReason::PatienceExhausted, Exit::Ok),
            (JobState::Failed, JobReason::Internal, Exit::Failure),
            (JobState::Failed, JobReason::OutOfMemory, Exit::Failure),
            (JobState::Failed, JobReason::BadData, Exit::Usage),
            (JobState::Failed, JobReason::NonFinite, Exit::NonFinite),
            (JobState::Cancelled, JobReason::Requested, Exit::Cancelled),
        ] {
            let job = job(state, reason);
            assert!(has_ended(&job));
            assert_eq!(exit(&job), code, "{state:?} {reason:?}");
        }
    }

    #[test]
    fn the_reason_comes_with_its_message() {
        let mut job = job(JobState::Queued, JobReason::WaitingForPlace);
        assert_eq!(why(&job), "waiting for place");
        job.message = "2 jobs are before it".into();
        assert_eq!(why(&job), "waiting for place: 2 jobs are before it");
    }
}
