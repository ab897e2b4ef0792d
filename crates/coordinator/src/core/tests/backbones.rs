//! Stories of backbones.

use std::collections::BTreeMap;

use incipit_proto::v1::{BackboneReason, BackboneState, EngineLossCause, JobReason, JobState};

use super::world::{World, backbone_name, saved, spec, target, training, worker_name};
use crate::core::{
    AgentMessage, Request,
    backbone::Collective,
    input::{EngineEvent, EngineStatus, JobEvent, LoadStatus, Report},
};

fn stands(world: &World) -> (BackboneState, BackboneReason) {
    (world.backbone("b").state, world.backbone("b").reason)
}

fn two_ranks_on_two_workers() -> World {
    let mut world = World::of_two();
    world.load("w1");
    world.load("w2");
    world.create_job("j", "b");
    assert_eq!(world.state("j").0, JobState::Running);
    world
}

#[test]
fn a_backbone_waits_for_a_worker_and_says_what_is_missing() {
    let mut world = World::new();
    world.create_backbone("b", spec(Collective::Gloo, 2, 1, 2));
    assert_eq!(stands(&world), (BackboneState::Pending, BackboneReason::NoWorker));
    assert!(world.backbone("b").message.contains("needs 2 slots"), "{}", world.backbone("b").message);
    world.connect("w", 2, true);
    assert_eq!(stands(&world), (BackboneState::Loading, BackboneReason::Placed));
    assert_eq!(world.backbone("b").epoch, 1);
    world.load("w");
    assert_eq!(stands(&world), (BackboneState::Ready, BackboneReason::Loaded));
}

#[test]
fn a_lost_rank_sends_the_jobs_back_and_the_survivors_stay() {
    let mut world = two_ranks_on_two_workers();
    world.job_event("w1", "j", saved(5));
    let enqueued = world.job("j").enqueue_time;
    world.engine_lost("w2", "b", 1, EngineLossCause::Exited);
    assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::EngineExited));
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!(world.job("j").enqueue_time, enqueued);
    let backbone = world.backbone("b");
    let workers: Vec<_> = backbone.ranks.iter().map(|rank| rank.worker.id()).collect();
    assert_eq!((backbone.epoch, workers), (2, vec!["w1", "w2"]));
    world.load("w1");
    assert_eq!(world.state("j").0, JobState::Queued);
    world.load("w2");
    assert_eq!(stands(&world), (BackboneState::Ready, BackboneReason::Loaded));
    let attempt = world.job("j").open_attempt().unwrap();
    assert_eq!((attempt.number, attempt.epoch, attempt.start_step), (2, 2, 5));
}

#[test]
fn what_the_other_ranks_say_of_the_same_loss_counts_once() {
    let mut world = two_ranks_on_two_workers();
    let report = |rank| Report::Engine {
        backbone: backbone_name("b"),
        epoch: 1,
        rank,
        event: EngineEvent::Lost {
            cause: EngineLossCause::GroupFailed,
            message: "peer gone".to_owned(),
            alive: true,
        },
    };
    world.report("w1", report(0));
    world.report("w2", report(1));
    assert_eq!((world.backbone("b").num_losses, world.backbone("b").epoch), (1, 2));
}

#[test]
fn a_rank_whose_worker_is_gone_moves_to_another_one_and_waits_if_there_is_none() {
    let mut world = two_ranks_on_two_workers();
    world.wait_with(5000, &["w1"]);
    assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::WorkerLost));
    let backbone = world.backbone("b");
    assert!(
        backbone.place_at.is_some() && backbone.message.contains("room for 1 of the ranks"),
        "{backbone:?}"
    );
    world.connect("w3", 1, true);
    let workers: Vec<_> = world.backbone("b").ranks.iter().map(|rank| rank.worker.id()).collect();
    assert_eq!((workers, world.backbone("b").epoch), (vec!["w1", "w3"], 2));
}

#[test]
fn five_losses_in_a_row_are_a_crash_loop_and_the_pauses_between_grow() {
    let mut world = World::running();
    for pause in [0, 1000, 2000, 4000] {
        world.engine_lost("w", "b", 0, EngineLossCause::Exited);
        assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
        assert_eq!(world.backbone("b").place_at.map_or(0, |time| time.since(world.now)), pause);
        if pause > 0 {
            world.wait_with(pause - 500, &["w"]);
            assert!(world.backbone("b").place_at.is_some());
            world.wait_with(500, &["w"]);
        }
        world.load("w");
        assert_eq!(world.state("j").0, JobState::Running);
    }
    world.engine_lost("w", "b", 0, EngineLossCause::Exited);
    assert_eq!(stands(&world), (BackboneState::Failed, BackboneReason::CrashLoop));
    assert!(world.backbone("b").message.contains("exit code 1"));
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneNotReady));
    assert!(world.agents[&worker_name("w")].engines.is_empty());
    let job = Box::new(super::world::new_job("k", "b"));
    let problem = world.ask(Request::CreateJob { job, validate_only: false }).unwrap_err();
    assert_eq!(problem.reason, "BACKBONE_FAILED");
    world.ask(Request::CancelJob(target("j"))).unwrap();
}

#[test]
fn a_backbone_that_failed_is_loaded_again_when_asked_and_its_jobs_go_on() {
    let mut world = World::running();
    let retry = |etag| Request::RetryBackbone { name: backbone_name("b"), etag };
    assert_eq!(world.ask(retry(None)).unwrap_err().reason, "BACKBONE_STATE");
    for _ in 0..5 {
        world.engine_lost("w", "b", 0, EngineLossCause::Exited);
        world.wait_with(4000, &["w"]);
        world.load("w");
    }
    assert_eq!(stands(&world), (BackboneState::Failed, BackboneReason::CrashLoop));
    assert!(world.job("j").message.contains("incipit backbone retry b"), "{:?}", world.job("j"));
    let (epoch, etag) = (world.backbone("b").epoch, world.backbone("b").revision);
    assert_eq!(world.ask(retry(Some(etag - 1))).unwrap_err().reason, "ETAG_MISMATCH");
    world.ask(retry(Some(etag))).unwrap();
    assert_eq!(stands(&world), (BackboneState::Loading, BackboneReason::Placed));
    assert_eq!((world.backbone("b").epoch, world.backbone("b").num_losses), (epoch + 1, 0));
    assert_eq!((world.job("j").reason, &*world.job("j").message), (JobReason::BackboneNotReady, ""));
    world.load("w");
    assert_eq!(stands(&world).0, BackboneState::Ready);
    assert_eq!(world.state("j").0, JobState::Running);
}

#[test]
fn a_new_step_ends_a_row_of_losses_and_a_step_made_again_does_not() {
    let mut world = World::running();
    world.job_event("w", "j", JobEvent::Measured(vec![training(1)]));
    world.engine_lost("w", "b", 0, EngineLossCause::Exited);
    world.load("w");
    world.job_event("w", "j", JobEvent::Measured(vec![training(1)]));
    assert_eq!(world.backbone("b").num_losses, 1);
    world.job_event("w", "j", JobEvent::Measured(vec![training(2)]));
    assert_eq!(world.backbone("b").num_losses, 0);
}

#[test]
fn a_group_that_failed_because_a_worker_was_lost_is_not_charged_with_it_and_the_worker_is_named() {
    let mut world = World::of_two();
    for round in 0..7 {
        world.load("w1");
        world.load("w2");
        assert_eq!(stands(&world).0, BackboneState::Ready, "round {round}");
        let rank = world.backbone("b").ranks.iter().position(|rank| rank.worker == worker_name("w1"));
        world.engine_lost("w1", "b", rank.unwrap() as u32, EngineLossCause::GroupFailed);
        assert_eq!((world.backbone("b").num_losses, stands(&world).1), (1, BackboneReason::GroupFailed));
        world.connect("w2", 1, true);
        assert_eq!((world.backbone("b").num_losses, stands(&world).1), (0, BackboneReason::WorkerLost));
        assert!(world.backbone("b").message.contains("workers/w2"));
    }
}

#[test]
fn a_loss_after_long_peace_is_the_first_of_a_row() {
    let mut world = World::ready();
    for _ in 0..7 {
        world.engine_lost("w", "b", 0, EngineLossCause::Hung);
        world.load("w");
        assert_eq!(stands(&world).0, BackboneState::Ready);
        world.wait_with(600_000, &["w"]);
    }
    assert_eq!(world.backbone("b").num_losses, 1);
}

#[test]
fn a_model_that_was_loaded_before_is_loaded_again_as_often_as_it_takes() {
    let mut world = World::running();
    world.engine_lost("w", "b", 0, EngineLossCause::Exited);
    for _ in 0..12 {
        world.engine_lost("w", "b", 0, EngineLossCause::BadModel);
        assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::BadModel));
        assert!(world.backbone("b").message.contains("tried every 10 s"), "{:?}", world.backbone("b"));
        assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
        world.wait_with(9_500, &["w"]);
        assert!(world.backbone("b").place_at.is_some());
        world.wait_with(500, &["w"]);
        assert!(world.backbone("b").place_at.is_none());
    }
    assert_eq!(world.backbone("b").num_losses, 1);
    world.load("w");
    assert_eq!(stands(&world).0, BackboneState::Ready);
    assert_eq!(world.state("j").0, JobState::Running);
}

#[test]
fn ranks_that_lost_the_one_that_cannot_load_do_not_make_it_a_crash_loop() {
    let mut world = two_ranks_on_two_workers();
    world.engine_lost("w1", "b", 0, EngineLossCause::Exited);
    for _ in 0..7 {
        world.load("w2");
        world.engine_lost("w2", "b", 1, EngineLossCause::GroupFailed);
        assert!(world.backbone("b").place_at.is_some(), "it waits, for it was lost before");
        world.engine_lost("w1", "b", 0, EngineLossCause::BadModel);
        assert_eq!(stands(&world), (BackboneState::Degraded, BackboneReason::BadModel));
        assert_eq!(world.backbone("b").num_losses, 1);
        world.wait_with(10_000, &["w1", "w2"]);
        assert!(world.backbone("b").place_at.is_none());
    }
}

#[test]
fn a_model_that_cannot_be_loaded_the_first_time_or_is_another_one_fails_for_good() {
    let mut world = World::new();
    world.connect("w", 1, true);
    world.create_backbone("b", spec(Collective::Local, 1, 1, 2));
    world.create_job("j", "b");
    world.engine_lost("w", "b", 0, EngineLossCause::BadModel);
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneNotReady));
    assert_eq!(stands(&world), (BackboneState::Failed, BackboneReason::BadModel));
    let mut world = World::ready();
    world.engine_lost("w", "b", 0, EngineLossCause::Exited);
    let event = EngineEvent::Ready {
        pid: 1,
        fingerprint: "other".to_owned(),
        num_parameters: 1,
        d_model: 1,
        num_layers: 1,
    };
    world.report("w", Report::Engine { backbone: backbone_name("b"), epoch: 2, rank: 0, event });
    assert_eq!(stands(&world), (BackboneState::Failed, BackboneReason::BadModel));
}

#[test]
fn files_that_differed_at_the_first_load_can_be_mended_either_way() {
    let mut world = World::of_two();
    let rank = world.backbone("b").ranks.iter().find(|rank| rank.worker == worker_name("w1")).unwrap().rank;
    let event = EngineEvent::Ready {
        pid: 1,
        fingerprint: "old".to_owned(),
        num_parameters: 1,
        d_model: 1,
        num_layers: 1,
    };
    let epoch = world.backbone("b").epoch;
    world.report("w1", Report::Engine { backbone: backbone_name("b"), epoch, rank, event });
    world.load("w2");
    assert_eq!(stands(&world), (BackboneState::Failed, BackboneReason::BadModel));
    world.ask(Request::RetryBackbone { name: backbone_name("b"), etag: None }).unwrap();
    world.load("w1");
    world.load("w2");
    assert_eq!(stands(&world).0, BackboneState::Ready);
}

#[test]
fn a_backbone_that_is_deleted_while_it_loads_is_gone_and_one_of_its_name_has_other_epochs() {
    let mut world = World::new();
    world.connect("w", 1, true);
    world.create_backbone("b", spec(Collective::Local, 2, 1, 2));
    let engine = world.agents[&worker_name("w")].engines[0].clone();
    let delete = Request::DeleteBackbone { name: backbone_name("b"), etag: None, force: false };
    world.ask(delete).unwrap();
    assert!(world.agents[&worker_name("w")].engines.is_empty());
    world.engine_ready("w", &engine, 0);
    world.create_backbone("b", spec(Collective::Local, 2, 1, 2));
    world.engine_ready("w", &engine, 0);
    assert_eq!(stands(&world).0, BackboneState::Loading);
    assert_eq!(world.backbone("b").epoch, 2);
}

#[test]
fn a_backbone_in_use_is_deleted_by_force_alone_which_cancels_its_jobs() {
    let mut world = World::running();
    world.create_job("p", "b");
    world.create_job("q", "b");
    world.ask(Request::PauseJob(target("q"))).unwrap();
    let delete = |force| Request::DeleteBackbone { name: backbone_name("b"), etag: None, force };
    assert_eq!(world.ask(delete(false)).unwrap_err().reason, "BACKBONE_IN_USE");
    world.ask(delete(true)).unwrap();
    for job in ["j", "p", "q"] {
        assert_eq!(world.state(job), (JobState::Cancelled, JobReason::BackboneGone));
    }
    assert!(world.job("j").open_attempt().is_none());
}

#[test]
fn jobs_go_to_the_leader_alone_and_only_once_the_backbone_is_ready() {
    let mut world = World::of_two();
    world.create_job("j", "b");
    world.load("w1");
    assert!(world.agents[&worker_name("w1")].jobs.is_empty());
    world.load("w2");
    assert_eq!(world.agents[&worker_name("w1")].jobs[&backbone_name("b")].jobs.len(), 1);
    assert!(world.agents[&worker_name("w2")].jobs.is_empty());
}

#[test]
fn how_far_ranks_have_loaded_is_shown_and_not_stored() {
    let mut world = World::of_two();
    let rows = world.core.rows().clone();
    let say = |world: &mut World, worker: &str, rank, epoch, loaded| {
        let engine = EngineStatus { backbone: backbone_name("b"), epoch, rank };
        let loading = vec![LoadStatus { engine, loaded, total: 100 }];
        world.say(worker, AgentMessage::Heartbeat { draining: false, loading });
    };
    let shown = |world: &World| world.core.backbone_view(&backbone_name("b")).unwrap().loading;
    let workers: Vec<String> =
        world.backbone("b").ranks.iter().map(|rank| rank.worker.id().to_owned()).collect();
    let epoch = world.backbone("b").epoch;
    say(&mut world, &workers[0], 0, epoch, 30);
    say(&mut world, &workers[1], 1, epoch, 40);
    assert_eq!(shown(&world), BTreeMap::from([(0, (30, 100)), (1, (40, 100))]));
    // A sign of life that tells of no engine takes nothing back; one of an older group tells nothing of this one.
    world.beat(&workers[0]);
    say(&mut world, &workers[1], 1, epoch - 1, 90);
    assert_eq!(shown(&world), BTreeMap::from([(0, (30, 100))]));
    assert_eq!(world.core.rows(), &rows);
}
