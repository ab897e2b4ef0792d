//! Stories of backbones that make do with fewer replicas than they are to have.

use incipit_proto::v1::{BackboneReason, BackboneState, EngineLossCause, JobReason, JobState, JobWish};

use super::world::{World, backbone_name, left, saved, spec, worker_name};
use crate::core::{
    Request,
    backbone::{BackboneSpec, Collective},
    input::{BackbonePatch, EngineEvent, Report},
};

fn stands(world: &World) -> (BackboneState, BackboneReason) {
    (world.backbone("b").state, world.backbone("b").reason)
}

/// Two replicas, of which one is enough, on two workers.
fn two_replicas() -> World {
    let mut world = World::new();
    world.connect("w1", 1, true);
    world.connect("w2", 1, true);
    world.create_backbone("b", BackboneSpec { min_dp: 1, ..spec(Collective::Gloo, 1, 2, 2) });
    world.load("w1");
    world.load("w2");
    world.create_job("j", "b");
    world
}

/// What the leader is told of its job.
fn told(world: &World, leader: &str) -> JobWish {
    world.agents[&worker_name(leader)].jobs[&backbone_name("b")].jobs[0].wish
}

fn places(world: &World) -> Vec<&str> {
    world.backbone("b").ranks.iter().map(|rank| rank.worker.id()).collect()
}

#[test]
fn a_backbone_makes_do_with_the_replicas_that_have_room_and_takes_more_when_there_is_room_again() {
    let mut world = two_replicas();
    world.job_event("w1", "j", saved(5));
    // The first is lost, and for a while it may come back.
    world.wait_with(10_000, &["w2"]);
    assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::WorkerLost));
    world.wait_with(10_000, &["w2"]);
    assert_eq!((places(&world), world.agents[&worker_name("w2")].engines[0].spec.dp), (vec!["w2"], 1));
    world.load("w2");
    assert_eq!(stands(&world), (BackboneState::Ready, BackboneReason::Loaded));
    assert!(world.backbone("b").message.starts_with("1 of 2 replicas"), "{}", world.backbone("b").message);
    assert_eq!(world.job("j").open_attempt().unwrap().start_step, 5);
    // It takes a rest before it grows, and its jobs save first.
    world.connect("w1", 1, true);
    world.wait_with(50_000, &["w1", "w2"]);
    assert_eq!((told(&world, "w2"), places(&world)), (JobWish::Unspecified, vec!["w2"]));
    world.wait_with(20_000, &["w1", "w2"]);
    assert_eq!((told(&world, "w2"), places(&world)), (JobWish::Yield, vec!["w2"]));
    world.job_event("w2", "j", saved(9));
    world.job_event("w2", "j", left(JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::MoreRoom));
    assert_eq!((places(&world), world.backbone("b").num_losses), (vec!["w2", "w1"], 0));
    world.load("w1");
    world.load("w2");
    assert_eq!((stands(&world).0, world.backbone("b").message.as_str()), (BackboneState::Ready, ""));
    assert_eq!(world.job("j").open_attempt().unwrap().start_step, 9);
}

#[test]
fn jobs_come_back_where_the_room_for_more_replicas_is_gone_when_they_have_left() {
    let mut world = two_replicas();
    world.wait_with(20_000, &["w1"]);
    world.load("w1");
    world.connect("w2", 1, true);
    world.wait_with(61_000, &["w1", "w2"]);
    assert_eq!(told(&world, "w1"), JobWish::Yield);
    world.wait_with(5_000, &["w1"]);
    world.job_event("w1", "j", left(JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!((stands(&world).0, world.state("j").0), (BackboneState::Ready, JobState::Running));
    assert_eq!((told(&world, "w1"), world.backbone("b").epoch), (JobWish::Unspecified, 2));
}

#[test]
fn a_backbone_that_takes_all_replicas_waits_until_it_is_told_that_fewer_are_enough() {
    let mut world = two_replicas();
    let update = |min_dp| {
        let patch = BackbonePatch { min_dp: Some(min_dp), ..BackbonePatch::default() };
        Request::UpdateBackbone {
            name: backbone_name("b"),
            etag: None,
            patch: Box::new(patch),
            validate_only: false,
        }
    };
    world.ask(update(2)).unwrap();
    world.wait_with(60_000, &["w1"]);
    assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::WorkerLost));
    assert_eq!(world.ask(update(3)).unwrap_err().fields[0].0, "backbone.min_dp");
    world.ask(update(1)).unwrap();
    world.wait_with(1_000, &["w1"]);
    assert_eq!(places(&world), ["w1"]);
}

/// The second replica is lost for good, and its place is taken by a worker that was not there before.
fn growing() -> World {
    let mut world = two_replicas();
    world.wait_with(20_000, &["w1"]);
    world.load("w1");
    world.connect("w3", 1, true);
    world.wait_with(61_000, &["w1", "w3"]);
    world.job_event("w1", "j", saved(7));
    world.job_event("w1", "j", left(JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!((places(&world), stands(&world).1), (vec!["w1", "w3"], BackboneReason::MoreRoom));
    world
}

#[test]
fn replicas_that_do_not_come_to_work_cost_the_others_nothing_and_are_tried_again_ever_later() {
    let mut world = growing();
    for (failure, pause) in [120_000, 240_000].into_iter().enumerate() {
        match failure {
            0 => drop(world.engine_lost("w3", "b", 1, EngineLossCause::BadModel)),
            _ => {
                let (pid, num_parameters, d_model, num_layers) = (7, 60, 4, 2);
                let fingerprint = "of other files".to_owned();
                let event = EngineEvent::Ready { pid, fingerprint, num_parameters, d_model, num_layers };
                let epoch = world.backbone("b").epoch;
                world.report("w3", Report::Engine { backbone: backbone_name("b"), epoch, rank: 1, event });
            }
        }
        assert_eq!((places(&world), stands(&world).0), (vec!["w1"], BackboneState::Degraded));
        assert_eq!((world.backbone("b").num_losses, world.backbone("b").place_at), (0, None));
        world.load("w1");
        assert_eq!((stands(&world).0, world.state("j").0), (BackboneState::Ready, JobState::Running));
        assert!(world.backbone("b").message.contains("the last time: rank 1 on workers/w3"));
        world.wait_with(pause - 5_000, &["w1", "w3"]);
        assert_eq!(told(&world, "w1"), JobWish::Unspecified);
        world.wait_with(10_000, &["w1", "w3"]);
        assert_eq!(told(&world, "w1"), JobWish::Yield);
        world.job_event("w1", "j", left(JobState::Queued, JobReason::BackboneRecovering));
        assert_eq!(places(&world), ["w1", "w3"]);
    }
    world.load("w1");
    world.load("w3");
    assert_eq!((stands(&world).0, world.backbone("b").shortage.failures), (BackboneState::Ready, 0));
}

/// Three replicas, of which one is enough, on three workers; all are ready.
fn three_replicas() -> World {
    let mut world = World::new();
    let workers = ["w1", "w2", "w3"];
    workers.iter().for_each(|worker| drop(world.connect(worker, 1, true)));
    world.create_backbone("b", BackboneSpec { min_dp: 1, ..spec(Collective::Gloo, 1, 3, 2) });
    workers.iter().for_each(|worker| world.load(worker));
    assert_eq!((places(&world), stands(&world).0), (workers.to_vec(), BackboneState::Ready));
    world
}

#[test]
fn of_several_replicas_only_the_last_takes_the_number_of_one_that_is_lost() {
    let mut world = three_replicas();
    world.wait_with(20_000, &["w2", "w3"]);
    assert_eq!(places(&world), ["w3", "w2"]);
}

#[test]
fn some_more_replicas_are_taken_without_waiting_for_all_and_a_short_backbone_comes_back_at_once() {
    let mut world = three_replicas();
    world.wait_with(20_000, &["w1"]);
    world.load("w1");
    world.engine_lost("w1", "b", 0, EngineLossCause::Exited);
    assert_eq!((places(&world), world.backbone("b").place_at), (vec!["w1"], None));
    world.load("w1");
    world.connect("w2", 1, true);
    world.wait_with(61_000, &["w1", "w2"]);
    assert_eq!((places(&world), stands(&world).1), (vec!["w1", "w2"], BackboneReason::MoreRoom));
}

#[test]
fn a_short_backbone_that_is_lost_when_there_is_room_for_all_has_what_worked_to_go_back_to() {
    let mut world = two_replicas();
    world.wait_with(20_000, &["w1"]);
    world.load("w1");
    world.wait_with(70_000, &["w1"]);
    // Before the next look for room.
    world.connect("w3", 1, true);
    world.engine_lost("w1", "b", 0, EngineLossCause::Exited);
    assert_eq!(places(&world), ["w1", "w3"]);
    world.engine_lost("w3", "b", 1, EngineLossCause::BadModel);
    assert_eq!((places(&world), world.backbone("b").place_at), (vec!["w1"], None));
}

#[test]
fn a_backbone_whose_least_number_was_raised_does_not_stop_for_fewer_than_that() {
    let mut world = three_replicas();
    world.wait_with(20_000, &["w1"]);
    world.load("w1");
    let patch = BackbonePatch { min_dp: Some(3), ..BackbonePatch::default() };
    let name = backbone_name("b");
    world
        .ask(Request::UpdateBackbone { name, etag: None, patch: Box::new(patch), validate_only: false })
        .unwrap();
    world.connect("w2", 1, true);
    world.wait_with(120_000, &["w1", "w2"]);
    assert_eq!((places(&world), stands(&world).0), (vec!["w1"], BackboneState::Ready));
    world.connect("w3", 1, true);
    world.wait_with(1_000, &["w1", "w2", "w3"]);
    assert_eq!(places(&world), ["w1", "w2", "w3"]);
}

#[test]
fn a_coordinator_that_was_away_gives_workers_time_to_come_back_before_it_does_without_them() {
    let mut world = two_replicas();
    world.wait_with(6_000, &["w1"]);
    assert_eq!(stands(&world).0, BackboneState::Degraded);
    world.now = world.now.after(60_000);
    world.restart();
    world.connect("w1", 1, false);
    world.wait_with(10_000, &["w1"]);
    assert_eq!(stands(&world).0, BackboneState::Degraded);
    world.connect("w2", 1, true);
    world.wait_with(500, &["w1", "w2"]);
    assert_eq!(places(&world), ["w1", "w2"]);
}
