//! Stories of requests that are sent again, and of those that only ask.

use incipit_proto::{
    names::PromptName,
    v1::{JobReason, JobState},
};
use tonic::Code;

use super::world::{World, job_name, new_job, saved, target, worker_name};
use crate::core::{
    Input, Reply, Request,
    input::{CheckpointRef, StepRef},
};

fn create(id: &str) -> Request {
    Request::CreateJob { job: Box::new(new_job(id, "b")), validate_only: false }
}

#[test]
fn a_request_sent_again_makes_no_second_job_even_over_a_restart() {
    let mut world = World::ready();
    world.ask_as(Some("r1"), create("j")).unwrap();
    for _ in 0..2 {
        let Reply::Job(view) = world.ask_as(Some("r1"), create("j")).unwrap() else { panic!() };
        assert_eq!((view.job.name, view.job.state), (job_name("j"), JobState::Running));
        world.restart();
    }
    assert_eq!(world.core.rows().jobs.len(), 1);
}

#[test]
fn an_id_that_was_used_for_something_else_is_refused() {
    let mut world = World::ready();
    world.ask_as(Some("r1"), create("j")).unwrap();
    let problem = world.ask_as(Some("r1"), create("k")).unwrap_err();
    assert_eq!((problem.code, &*problem.reason), (Code::InvalidArgument, "REQUEST_ID_REUSED"));
}

#[test]
fn a_refused_request_may_be_sent_again_with_its_id() {
    let mut world = World::new();
    assert_eq!(world.ask_as(Some("r1"), create("j")).unwrap_err().code, Code::NotFound);
    world.connect("w", 1, true);
    world.create_backbone("b", super::world::spec(crate::core::backbone::Collective::Local, 1, 1, 1));
    world.ask_as(Some("r1"), create("j")).unwrap();
}

#[test]
fn a_deletion_sent_again_is_done_and_a_deleted_resource_is_not_found() {
    let mut world = World::ready();
    world.ask_as(Some("r1"), create("j")).unwrap();
    world.job_event("w", "j", super::world::left(JobState::Succeeded, JobReason::StepsDone));
    for _ in 0..2 {
        assert_eq!(world.ask_as(Some("r2"), Request::DeleteJob(target("j"))).unwrap(), Reply::Done);
    }
    assert_eq!(world.ask_as(Some("r1"), create("j")).unwrap_err().code, Code::NotFound);
}

#[test]
fn a_request_is_forgotten_after_a_day() {
    let mut world = World::ready();
    world.ask_as(Some("r1"), create("j")).unwrap();
    world.now = world.now.after(world.config.request_ttl_ms);
    world.handle(Input::Tick);
    assert!(world.core.rows().requests.is_empty());
}

#[test]
fn asking_what_would_be_changes_nothing() {
    let mut world = World::ready();
    let before = world.core.rows().clone();
    let request = Request::CreateJob { job: Box::new(new_job("j", "b")), validate_only: true };
    let Reply::Job(view) = world.ask_as(Some("r1"), request).unwrap() else { panic!() };
    assert_eq!((view.job.state, view.job.reason), (JobState::Queued, JobReason::WaitingForPlace));
    assert_eq!(world.core.rows(), &before);
    let request = Request::CreateJob { job: Box::new(new_job("j", "nobody")), validate_only: true };
    assert_eq!(world.ask(request).unwrap_err().code, Code::NotFound);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let mut world = World::running();
    assert_eq!(world.ask(create("j")).unwrap_err().code, Code::AlreadyExists);
}

#[test]
fn what_was_meant_for_another_state_of_a_checkpoint_a_version_or_a_worker_is_refused() {
    let mut world = World::running();
    world.job_event("w", "j", saved(1));
    world.job_event("w", "j", super::world::left(JobState::Succeeded, JobReason::StepsDone));
    let checkpoint = CheckpointRef { job: job_name("j"), step: StepRef::At(1), task: None };
    let (name, prompt) = (worker_name("w"), PromptName::of_id("id", "p").unwrap());
    let revision = world.core.checkpoint(&job_name("j"), 1).unwrap().revision;
    let pin = |etag| Request::PinCheckpoint { checkpoint: checkpoint.clone(), etag, pinned: true };
    world.ask(pin(Some(revision))).unwrap();
    let promote = |etag| {
        let (prompt, checkpoint, description) = (prompt.clone(), checkpoint.clone(), String::new());
        Request::PromotePrompt { prompt, checkpoint, etag, description }
    };
    let pinned = world.core.checkpoint(&job_name("j"), 1).unwrap().revision;
    world.ask(promote(Some(pinned))).unwrap();
    let version = world.core.prompt_version(&prompt, None).unwrap().revision;
    let of_worker = world.core.worker_view(&name).unwrap().worker.revision;
    let unpin = Request::PinCheckpoint { checkpoint: checkpoint.clone(), etag: None, pinned: false };
    world.ask(unpin).unwrap();
    let before = world.core.rows().clone();
    let changes = [
        pin(Some(revision)),
        promote(Some(revision)),
        Request::DeleteCheckpoint { checkpoint: checkpoint.clone(), etag: Some(revision) },
        Request::DeletePromptVersion { prompt: prompt.clone(), version: 1, etag: Some(version + 1) },
        Request::DrainWorker { name: name.clone(), etag: Some(of_worker + 1) },
    ];
    for change in changes {
        let problem = world.ask(change.clone()).unwrap_err();
        assert_eq!((problem.code, &*problem.reason), (Code::Aborted, "ETAG_MISMATCH"), "{change:?}");
    }
    assert_eq!(world.core.rows(), &before);
    world.ask(Request::DeletePromptVersion { prompt, version: 1, etag: Some(version) }).unwrap();
    let revision = world.core.checkpoint(&job_name("j"), 1).unwrap().revision;
    world.ask(Request::DeleteCheckpoint { checkpoint, etag: Some(revision) }).unwrap();
    world.ask(Request::DrainWorker { name, etag: Some(of_worker) }).unwrap();
}
