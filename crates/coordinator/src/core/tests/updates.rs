//! Stories of what changes of a job or backbone that is there.

use std::collections::BTreeMap;

use incipit_proto::v1::{JobReason, JobState};
use tonic::Code;

use super::world::{World, backbone_name, left, target, worker_name};
use crate::core::{
    Reply, Request,
    input::{BackbonePatch, JobPatch, Relabel},
    job::{MAX_LABELS, RetryPolicy},
};

fn update(world: &mut World, job: &str, patch: JobPatch) -> Result<Reply, incipit_proto::Problem> {
    world.ask(Request::UpdateJob { target: target(job), patch: Box::new(patch), validate_only: false })
}

fn priority(priority: u32) -> JobPatch {
    JobPatch { priority: Some(priority), ..JobPatch::default() }
}

fn places(world: &mut World, max_running_jobs: u32) {
    let (name, etag) = (backbone_name("b"), Some(world.backbone("b").revision));
    let patch =
        Box::new(BackbonePatch { max_running_jobs: Some(max_running_jobs), ..BackbonePatch::default() });
    world.ask(Request::UpdateBackbone { name, etag, patch, validate_only: false }).unwrap();
}

#[test]
fn a_new_priority_goes_to_the_engine_of_a_running_job_and_changes_the_queue() {
    let mut world = World::running();
    for id in ["k", "low", "high"] {
        world.create_job(id, "b");
    }
    update(&mut world, "j", priority(7)).unwrap();
    let told = &world.agents[&worker_name("w")].jobs[&backbone_name("b")];
    let told: Vec<_> = told.jobs.iter().map(|job| (job.job.id().to_owned(), job.priority)).collect();
    assert_eq!(told, [("j".to_owned(), 7), ("k".to_owned(), 10)]);
    assert_eq!(world.job("j").attempts.len(), 1, "it runs on");
    update(&mut world, "high", priority(11)).unwrap();
    world.job_event("w", "k", left(JobState::Succeeded, JobReason::StepsDone));
    assert_eq!((world.state("high").0, world.state("low").0), (JobState::Running, JobState::Queued));
}

#[test]
fn of_a_job_that_has_ended_only_labels_change() {
    let mut world = World::running();
    world.job_event("w", "j", left(JobState::Succeeded, JobReason::StepsDone));
    let policy = JobPatch { retry_policy: Some(RetryPolicy::default()), ..JobPatch::default() };
    for patch in [priority(7), policy] {
        let problem = update(&mut world, "j", patch).unwrap_err();
        assert_eq!((problem.code, &*problem.reason), (Code::FailedPrecondition, "JOB_STATE"));
    }
    let labels = |changed: &[(&str, Option<&str>)]| {
        let changed = changed.iter().map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned)));
        JobPatch { labels: Relabel { whole: None, changed: changed.collect() }, ..JobPatch::default() }
    };
    update(&mut world, "j", labels(&[("a.b", Some("1")), ("c", Some("2"))])).unwrap();
    update(&mut world, "j", labels(&[("a.b", None), ("gone", None)])).unwrap();
    assert_eq!(world.job("j").labels, BTreeMap::from([("c".to_owned(), "2".to_owned())]));
}

#[test]
fn an_update_that_changes_nothing_is_no_event_and_one_of_another_state_is_refused() {
    let mut world = World::running();
    let revision = world.job("j").revision;
    let same = priority(world.job("j").priority);
    update(&mut world, "j", same).unwrap();
    assert_eq!(world.job("j").revision, revision);
    let mut old = target("j");
    old.etag = Some(revision);
    update(&mut world, "j", priority(3)).unwrap();
    let request = Request::UpdateJob { target: old, patch: Box::new(priority(4)), validate_only: false };
    assert_eq!(world.ask(request).unwrap_err().reason, "ETAG_MISMATCH");
    assert_eq!(world.job("j").priority, 3);
}

#[test]
fn labels_stay_few() {
    let mut world = World::running();
    let whole = (0..MAX_LABELS).map(|i| (format!("k{i}"), String::new())).collect();
    let labels = Relabel { whole: Some(whole), changed: BTreeMap::new() };
    update(&mut world, "j", JobPatch { labels, ..JobPatch::default() }).unwrap();
    let changed = BTreeMap::from([("one more".to_owned(), Some(String::new()))]);
    let labels = Relabel { whole: None, changed };
    let problem = update(&mut world, "j", JobPatch { labels, ..JobPatch::default() }).unwrap_err();
    assert_eq!(problem.fields[0].0, "job.labels");
    assert_eq!(world.job("j").labels.len(), MAX_LABELS);
}

#[test]
fn more_places_are_taken_at_once_and_fewer_throw_nobody_off() {
    let mut world = World::running();
    for id in ["k", "l", "m"] {
        world.create_job(id, "b");
    }
    let engines = world.agents[&worker_name("w")].engines.clone();
    let states = |world: &World| ["j", "k", "l", "m"].map(|id| world.state(id).0);
    use JobState::{Queued, Running, Succeeded};
    places(&mut world, 3);
    assert_eq!(states(&world), [Running, Running, Running, Queued]);
    places(&mut world, 1);
    assert_eq!(states(&world), [Running, Running, Running, Queued]);
    world.job_event("w", "j", left(Succeeded, JobReason::StepsDone));
    world.job_event("w", "k", left(Succeeded, JobReason::StepsDone));
    assert_eq!(states(&world), [Succeeded, Succeeded, Running, Queued]);
    world.job_event("w", "l", left(Succeeded, JobReason::StepsDone));
    assert_eq!(states(&world), [Succeeded, Succeeded, Succeeded, Running]);
    let now = &world.agents[&worker_name("w")].engines;
    assert_eq!((now[0].epoch, &now[0].ranks), (engines[0].epoch, &engines[0].ranks), "the engines run on");
}

#[test]
fn what_an_update_would_do_is_shown_and_not_done() {
    let mut world = World::running();
    for id in ["k", "low", "high"] {
        world.create_job(id, "b");
    }
    let before = world.core.rows().clone();
    let job =
        |patch| Request::UpdateJob { target: target("low"), patch: Box::new(patch), validate_only: true };
    let Reply::Job(view) = world.ask(job(priority(9))).unwrap() else { panic!() };
    assert_eq!((view.job.priority, view.queue_position, view.job.state), (9, 1, JobState::Queued));
    let Reply::Job(view) = world.ask(job(priority(11))).unwrap() else { panic!() };
    assert_eq!((view.job.priority, view.queue_position), (11, 0));
    let backbone = |min_dp| {
        let patch = Box::new(BackbonePatch { max_running_jobs: Some(9), min_dp, ..BackbonePatch::default() });
        Request::UpdateBackbone { name: backbone_name("b"), etag: None, patch, validate_only: true }
    };
    let Reply::Backbone(view) = world.ask(backbone(None)).unwrap() else { panic!() };
    assert_eq!((view.backbone.spec.max_running_jobs, view.running_jobs, view.queued_jobs), (9, 2, 2));
    // It is refused where the change would be.
    assert_eq!(world.ask(backbone(Some(7))).unwrap_err().code, Code::InvalidArgument);
    assert_eq!(world.core.rows(), &before);
}
