//! Stories of requests that are sent again, and of those that only ask.

use incipit_proto::v1::{JobReason, JobState};
use tonic::Code;

use super::world::{World, job_name, new_job, target};
use crate::core::{Input, Reply, Request};

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
