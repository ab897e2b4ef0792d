//! What the tests of these commands begin with.

use incipit_proto::v1::*;

use super::common::{Ran, command};
use super::fake::{Fake, State};

/// The program, with a coordinator.
pub(crate) fn ask(fake: &Fake, args: &[&str]) -> Ran {
    command(args).env("INCIPIT_COORDINATOR", &fake.url).output().expect("the program starts").into()
}

pub(crate) fn backbone(id: &str, model: &str) -> Backbone {
    let mut backbone =
        Backbone { name: format!("backbones/{id}"), model: model.into(), d_model: 64, ..Backbone::default() };
    backbone.set_state(BackboneState::Ready);
    backbone.tokens_per_second = 1000.0;
    backbone.max_running_jobs = 32;
    backbone
}

pub(crate) fn job(id: &str, state: JobState, reason: JobReason) -> Job {
    let mut job = Job { name: format!("jobs/{id}"), backbone: "backbones/base".into(), ..Job::default() };
    job.set_state(state);
    job.set_reason(reason);
    job.progress = Some(JobProgress { step: 5, num_steps: 30, loss: Some(0.25), ..JobProgress::default() });
    job
}

pub(crate) fn with_job(job: Job) -> State {
    State { jobs: [(job.name.clone(), job)].into(), ..State::default() }
}
