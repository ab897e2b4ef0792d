//! Stories of jobs that are forgotten, and of those for which there is no room.

use incipit_proto::{
    names::PromptName,
    v1::{EventKind, JobReason, JobState},
};
use tonic::Code;

use super::world::{World, job_name, left, new_job, saved, spec, target};
use crate::core::{
    Change, Input, Request, Resource, Stamp,
    backbone::Collective,
    input::{CheckpointRef, StepRef},
};

const DAY: u64 = 24 * 3600 * 1000;

/// A world whose jobs `ids` have ended one after the other, each with a checkpoint.
fn ended(ids: &[&str]) -> World {
    let mut world = World::new();
    world.config.job_ttl_ms = Some(7 * DAY);
    world.restart();
    world.connect("w", 4, true);
    world.create_backbone("b", spec(Collective::Local, 1, 1, 2));
    world.load("w");
    for id in ids {
        world.create_job(id, "b");
        world.job_event("w", id, saved(1));
        world.job_event("w", id, left(JobState::Succeeded, JobReason::StepsDone));
        world.now = world.now.after(1);
    }
    world
}

/// Lets so much time go by at once, and says which jobs were removed at its end, with the last words about them.
fn after(world: &mut World, milliseconds: u64) -> Vec<(Stamp, String, String)> {
    world.now = world.now.after(milliseconds);
    let effects = world.handle(Input::Tick);
    let removed = effects.changes.into_iter().filter_map(|change| match change {
        Change::Remove(stamp, Resource::Job(job)) => Some((stamp, job.name.id().to_owned(), job.message)),
        _ => None,
    });
    removed.collect()
}

fn of(job: &str) -> CheckpointRef {
    CheckpointRef { job: job_name(job), step: StepRef::Last, task: None }
}

#[test]
fn a_job_that_ended_long_ago_is_forgotten_with_what_it_has_and_the_event_says_why() {
    let mut world = ended(&["j"]);
    assert_eq!(after(&mut world, 7 * DAY - 60_000), []);
    let removed = after(&mut world, 60_000);
    let [(stamp, name, message)] = &removed[..] else { panic!("{removed:?}") };
    assert_eq!((stamp.kind, &*stamp.actor, &**name), (EventKind::Deleted, "", "j"));
    assert_eq!(message, "forgotten 7 days after its end, as limits.job_days says");
    assert!(world.core.rows().jobs.is_empty() && world.core.rows().checkpoints.is_empty());
    // Another one of its name counts its attempts on.
    assert_eq!(world.core.rows().counters["jobs/j"].value, 1);
}

#[test]
fn the_oldest_are_forgotten_first_and_a_few_at_a_time() {
    let mut world = ended(&["f", "e", "d", "c", "b", "a"]);
    let names = |removed: Vec<(Stamp, String, String)>| {
        removed.into_iter().map(|(_, name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(names(after(&mut world, 8 * DAY)), ["f", "e", "d", "c"]);
    assert_eq!(names(after(&mut world, 999)), [""; 0]);
    assert_eq!(names(after(&mut world, 1)), ["b", "a"]);
}

#[test]
fn a_job_with_a_pinned_checkpoint_or_a_promoted_one_or_without_an_end_is_kept() {
    let mut world = ended(&["pinned", "promoted", "plain"]);
    world.create_job("open", "b");
    let pin = |pinned| Request::PinCheckpoint { checkpoint: of("pinned"), etag: None, pinned };
    world.ask(pin(true)).unwrap();
    let prompt = PromptName::of_id("id", "p").unwrap();
    let (checkpoint, description) = (of("promoted"), String::new());
    world
        .ask(Request::PromotePrompt { prompt: prompt.clone(), checkpoint, etag: None, description })
        .unwrap();
    assert_eq!(after(&mut world, 8 * DAY).len(), 1);
    let kept: Vec<&str> = world.core.rows().jobs.keys().map(|name| name.id()).collect();
    assert_eq!(kept, ["open", "pinned", "promoted"]);
    // Until nobody wants them any more.
    world.ask(pin(false)).unwrap();
    world.ask(Request::DeletePromptVersion { prompt, version: 1, etag: None }).unwrap();
    assert_eq!(after(&mut world, 60_000).len(), 2);
}

#[test]
fn nothing_is_forgotten_unasked() {
    let mut world = ended(&["j"]);
    world.config.job_ttl_ms = None;
    world.restart();
    assert_eq!(after(&mut world, 10_000 * DAY), []);
    assert_eq!(world.core.rows().jobs.len(), 1);
}

#[test]
fn a_job_for_which_there_is_no_room_is_refused_until_another_has_ended() {
    let mut world = World::new();
    world.config.max_jobs = 2;
    world.restart();
    world.create_backbone("b", spec(Collective::Local, 1, 1, 2));
    let create = |id: &str| Request::CreateJob { job: Box::new(new_job(id, "b")), validate_only: false };
    world.ask(create("j")).unwrap();
    world.ask(create("k")).unwrap();
    let problem = world.ask(create("l")).unwrap_err();
    assert_eq!((problem.code, &*problem.reason), (Code::ResourceExhausted, "TOO_MANY_JOBS"));
    assert!(problem.message.contains("limits.jobs") && problem.message.contains("is 2"), "{problem}");
    world.ask(Request::CancelJob(target("k"))).unwrap();
    world.ask(create("l")).unwrap();
}
