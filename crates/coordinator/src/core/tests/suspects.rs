//! Stories of jobs that bring their engines down.

use incipit_proto::v1::{BackboneState, EngineLossCause, JobReason, JobState};

use super::world::{World, backbone_name, new_job, saved, spec, training};
use crate::core::{
    Request,
    backbone::Collective,
    input::{EngineEvent, JobEvent, Report},
    suspects::Suspicion,
};

/// A backbone with four places, and these jobs on it.
fn running(jobs: &[&str]) -> World {
    let mut world = World::new();
    world.connect("w", 4, true);
    world.create_backbone("b", spec(Collective::Local, 1, 1, 4));
    world.load("w");
    for job in jobs {
        world.create_job(job, "b");
        assert_eq!(world.state(job).0, JobState::Running);
    }
    take_part(&mut world);
    world
}

/// All jobs that run have their data.
fn take_part(world: &mut World) {
    let jobs = world.core.rows().jobs.values();
    let running = jobs.filter(|job| job.state == JobState::Running).map(|job| job.name.id().to_owned());
    for job in running.collect::<Vec<_>>() {
        let step = world.job(&job).committed_step;
        world.job_event("w", &job, JobEvent::Started { step, warnings: Vec::new() });
    }
}

/// The engine dies, with all jobs that run taking part, and is loaded again.
fn crash(world: &mut World) {
    take_part(world);
    world.engine_lost("w", "b", 0, EngineLossCause::Exited);
    if world.backbone("b").state == BackboneState::Failed {
        return;
    }
    world.wait_with(8000, &["w"]);
    world.load("w");
    assert_eq!(world.backbone("b").state, BackboneState::Ready);
}

fn step(world: &mut World, job: &str, step: u64) {
    world.job_event("w", job, JobEvent::Measured(vec![training(step)]));
}

fn states(world: &World, jobs: &[&str]) -> Vec<JobState> {
    jobs.iter().map(|job| world.state(job).0).collect()
}

#[test]
fn a_job_that_brings_its_engine_down_fails_and_its_neighbours_go_on() {
    use JobState::{Failed, Queued, Running};
    let jobs = ["a", "poison", "c"];
    let mut world = running(&jobs);
    crash(&mut world);
    assert_eq!(states(&world, &jobs), [Running, Running, Running]);
    crash(&mut world);
    // All three are suspects by now, and the first of them is tried.
    assert_eq!(states(&world, &jobs), [Running, Queued, Queued]);
    assert!(world.job("poison").message.contains("lost 2 times"), "{:?}", world.job("poison"));
    step(&mut world, "a", 1);
    assert_eq!(states(&world, &jobs), [Running, Running, Queued]);
    // Once may be chance: it is tried again.
    crash(&mut world);
    assert_eq!(states(&world, &jobs), [Running, Queued, Queued]);
    step(&mut world, "a", 2);
    step(&mut world, "c", 1);
    assert_eq!(states(&world, &jobs), [Running, Running, Running]);
    crash(&mut world);
    assert_eq!(world.state("poison"), (Failed, JobReason::EngineCrashed));
    let message = &world.job("poison").message;
    assert!(message.contains("4 times in a row") && message.contains("exit code 1"), "{message}");
    assert!(world.job("poison").end_time.is_some());
    assert_eq!(states(&world, &["a", "c"]), [Running, Running]);
    step(&mut world, "a", 3);
    step(&mut world, "c", 2);
    assert_eq!(world.backbone("b").num_losses, 0);
    assert_eq!(world.job("c").suspicion, Suspicion::default());
}

#[test]
fn the_one_that_is_tried_first_may_be_the_one() {
    use JobState::{Failed, Queued, Running};
    let jobs = ["poison", "b", "c"];
    let mut world = running(&jobs);
    crash(&mut world);
    crash(&mut world);
    assert_eq!(states(&world, &jobs), [Running, Queued, Queued]);
    // Nobody has got on since the last loss: that is no proof yet, and the next one is tried.
    crash(&mut world);
    assert_eq!(states(&world, &jobs), [Queued, Running, Queued]);
    step(&mut world, "b", 1);
    assert_eq!(states(&world, &jobs), [Queued, Running, Running]);
    step(&mut world, "c", 1);
    assert_eq!(states(&world, &jobs), [Running, Running, Running]);
    crash(&mut world);
    assert_eq!(states(&world, &jobs), [Queued, Running, Running]);
    step(&mut world, "b", 2);
    step(&mut world, "c", 2);
    assert_eq!(states(&world, &jobs), [Running, Running, Running]);
    crash(&mut world);
    assert_eq!(states(&world, &jobs), [Failed, Running, Running]);
}

#[test]
fn a_new_job_goes_before_suspects_and_gets_on_for_them() {
    use JobState::{Failed, Queued, Running};
    let mut world = running(&["poison"]);
    crash(&mut world);
    crash(&mut world);
    assert_eq!(world.state("poison").0, Running);
    world.create_job("new", "b");
    crash(&mut world);
    assert_eq!(states(&world, &["poison", "new"]), [Queued, Running]);
    step(&mut world, "new", 1);
    assert_eq!(states(&world, &["poison", "new"]), [Running, Running]);
    crash(&mut world);
    step(&mut world, "new", 2);
    crash(&mut world);
    assert_eq!(states(&world, &["poison", "new"]), [Failed, Running]);
}

#[test]
fn where_there_is_no_other_job_the_losses_are_the_backbones() {
    let mut world = running(&["poison"]);
    for _ in 0..5 {
        assert_eq!(world.state("poison").0, JobState::Running);
        crash(&mut world);
    }
    assert_eq!(world.backbone("b").state, BackboneState::Failed);
    assert_eq!(world.state("poison"), (JobState::Queued, JobReason::BackboneNotReady));
}

#[test]
fn a_new_step_or_checkpoint_clears_a_job_and_a_step_made_again_does_not() {
    let mut world = running(&["a", "b"]);
    step(&mut world, "a", 1);
    crash(&mut world);
    step(&mut world, "a", 1);
    assert_eq!(world.job("a").suspicion.num_losses, 1);
    step(&mut world, "a", 2);
    world.job_event("w", "b", saved(5));
    assert_eq!((world.job("a").suspicion, world.job("b").suspicion), Default::default());
}

#[test]
fn a_backbone_that_is_retried_proves_nothing_against_its_jobs() {
    let mut world = running(&["a"]);
    for _ in 0..3 {
        while world.backbone("b").state != BackboneState::Failed {
            crash(&mut world);
        }
        world.ask(Request::RetryBackbone { name: backbone_name("b"), etag: None }).unwrap();
        assert_eq!((world.job("a").suspicion, &*world.backbone("b").message), Default::default());
        world.load("w");
        assert_eq!(world.state("a").0, JobState::Running);
    }
}

#[test]
fn a_retry_policy_may_cover_it() {
    use JobState::{Failed, Queued, Running};
    let mut world = running(&["a"]);
    let mut poison = new_job("poison", "b");
    poison.retry_policy.reasons = vec![JobReason::EngineCrashed];
    world.ask(Request::CreateJob { job: Box::new(poison), validate_only: false }).unwrap();
    crash(&mut world);
    crash(&mut world);
    for round in 1..=2 {
        step(&mut world, "a", round);
        crash(&mut world);
    }
    assert_eq!(world.state("poison"), (Queued, JobReason::Retrying));
    for round in 3..=4 {
        step(&mut world, "a", round);
        assert_eq!((world.state("poison").0, world.job("poison").num_failures), (Running, 1));
        crash(&mut world);
    }
    assert_eq!(states(&world, &["a", "poison"]), [Running, Failed]);
}

#[test]
fn a_job_whose_data_are_on_their_way_has_no_part_in_a_loss() {
    let mut world = World::running();
    for _ in 0..3 {
        world.engine_lost("w", "b", 0, EngineLossCause::Exited);
        world.wait_with(8000, &["w"]);
        world.load("w");
    }
    assert_eq!(world.job("j").suspicion, Suspicion::default());
}

#[test]
fn a_loss_that_was_a_workers_speaks_against_nobody() {
    let mut world = World::of_two();
    world.create_job("j", "b");
    world.create_job("k", "b");
    let mut last = 0;
    for round in 0..6 {
        world.load("w1");
        world.load("w2");
        last += 1;
        world.job_event("w1", "k", JobEvent::Measured(vec![training(last)]));
        assert_eq!(states(&world, &["j", "k"]), [JobState::Running; 2], "round {round}");
        world.job_event("w1", "j", JobEvent::Started { step: 0, warnings: Vec::new() });
        let (backbone, epoch) = (backbone_name("b"), world.backbone("b").epoch);
        let (cause, message) = (EngineLossCause::GroupFailed, "peer gone".to_owned());
        let event = EngineEvent::Lost { cause, message, alive: true };
        world.report("w1", Report::Engine { backbone, epoch, rank: 0, event });
        assert_eq!(world.job("j").suspicion.num_losses, 1);
        world.connect("w2", 1, true);
        assert_eq!(world.job("j").suspicion, Suspicion::default());
    }
}
