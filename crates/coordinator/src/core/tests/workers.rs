//! Stories of workers.

use incipit_proto::v1::{BackboneReason, BackboneState, JobReason, JobState, JobWish, WorkerState};

use super::world::{World, backbone_name, target, worker_name};
use crate::core::{
    AgentMessage, Input, Request, ToAgent,
    input::{JobEvent, RendezvousKey, Saved},
};

fn state(world: &World, id: &str) -> WorkerState {
    world.core.rows().workers[&worker_name(id)].state
}

#[test]
fn a_broken_connection_is_no_loss_and_an_expired_lease_is() {
    let mut world = World::running();
    world.disconnect("w");
    world.wait(3500);
    assert_eq!((state(&world, "w"), world.state("j").0), (WorkerState::Online, JobState::Running));
    world.connect("w", 4, false);
    world.wait(3500);
    assert_eq!(world.state("j").0, JobState::Running);
    assert_eq!(world.job("j").last_attempt(), 1);
    world.wait(500);
    assert_eq!(state(&world, "w"), WorkerState::Lost);
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
    let closed = world.agents[&worker_name("w")].closed.clone().unwrap();
    assert_eq!(closed.reason, "LEASE_LOST");
}

#[test]
fn a_coordinator_that_stood_still_does_not_take_its_workers_for_lost() {
    let mut world = World::running();
    world.now = world.now.after(60_000);
    world.handle(Input::Tick);
    assert_eq!(world.state("j").0, JobState::Running);
    world.beat("w");
    world.wait_with(5000, &["w"]);
    assert_eq!(world.state("j").0, JobState::Running);
}

#[test]
fn a_new_process_of_the_same_name_has_lost_what_the_old_one_had() {
    let mut world = World::running();
    let effects = world.connect("w", 4, true);
    assert!(effects.sends.iter().any(|send| matches!(send.message, ToAgent::Close(_))));
    assert_eq!(state(&world, "w"), WorkerState::Online);
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!((world.backbone("b").epoch, world.backbone("b").reason), (2, BackboneReason::WorkerLost));
    world.load("w");
    assert_eq!(world.state("j").0, JobState::Running);
}

#[test]
fn of_two_workers_of_one_name_the_older_one_is_not_let_in_again() {
    let mut world = World::running();
    world.connect("w", 4, true);
    let epoch = world.backbone("b").epoch;
    world.agents.get_mut(&worker_name("w")).unwrap().incarnation = 1;
    let effects = world.connect("w", 4, false);
    let [send] = &*effects.sends else { panic!("{effects:?}") };
    let ToAgent::Close(problem) = &send.message else { panic!("{send:?}") };
    assert_eq!(problem.reason, "WORKER_REPLACED");
    assert!(effects.changes.is_empty());
    assert_eq!(world.backbone("b").epoch, epoch);
}

#[test]
fn an_engine_that_a_worker_comes_back_without_is_lost() {
    let mut world = World::running();
    world.disconnect("w");
    world.agents.get_mut(&worker_name("w")).unwrap().ready.clear();
    world.connect("w", 4, false);
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!(world.backbone("b").epoch, 2);
}

#[test]
fn jobs_run_on_while_the_coordinator_is_away() {
    let mut world = World::running();
    world.restart();
    world.wait(9000);
    assert_eq!(world.state("j").0, JobState::Running);
    let effects = world.connect("w", 4, false);
    assert_eq!((world.state("j").0, world.job("j").last_attempt()), (JobState::Running, 1));
    // All is told again, as what was sent last may never have arrived.
    assert!(
        effects
            .sends
            .iter()
            .any(|send| matches!(&send.message, ToAgent::Engines(engines) if engines.len() == 1))
    );
    assert!(
        effects.sends.iter().any(|send| matches!(&send.message, ToAgent::Jobs(jobs) if jobs.jobs.len() == 1))
    );
    let mut world = World::running();
    world.restart();
    world.wait(10_000);
    assert_eq!((state(&world, "w"), world.state("j").0), (WorkerState::Lost, JobState::Queued));
}

#[test]
fn draining_the_only_worker_leaves_the_backbone_without_a_place() {
    let mut world = World::running();
    world.ask(Request::DrainWorker { name: worker_name("w"), etag: None }).unwrap();
    assert_eq!(state(&world, "w"), WorkerState::Draining);
    leave_saved(&mut world, "w", 7);
    let backbone = world.backbone("b");
    assert_eq!((backbone.state, backbone.reason), (BackboneState::Degraded, BackboneReason::WorkerDrained));
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
    assert!(world.agents[&worker_name("w")].engines.is_empty());
    // Draining lasts over a break, and ends with the process.
    world.disconnect("w");
    world.connect("w", 4, false);
    assert_eq!(state(&world, "w"), WorkerState::Draining);
    world.connect("w", 4, true);
    assert_eq!(world.backbone("b").epoch, 2);
}

#[test]
fn draining_one_of_two_workers_moves_its_ranks() {
    let mut world = World::running();
    world.connect("v", 1, true);
    world.say("w", AgentMessage::Heartbeat { draining: true, loading: Vec::new() });
    world.create_job("k", "b");
    assert_eq!(world.state("k"), (JobState::Queued, JobReason::WaitingForPlace), "nothing new comes");
    leave_saved(&mut world, "w", 7);
    assert_eq!(world.backbone("b").ranks[0].worker, worker_name("v"));
    world.load("v");
    assert_eq!((world.state("j").0, world.state("k").0), (JobState::Running, JobState::Running));
    assert_eq!(world.job("j").attempts.last().unwrap().start_step, 7);
}

#[test]
fn a_worker_that_does_not_lead_is_left_only_when_its_leader_has_saved_the_jobs() {
    let mut world = World::of_two();
    world.load("w1");
    world.load("w2");
    world.create_job("j", "b");
    let leader = if world.backbone("b").ranks[0].worker == worker_name("w1") { "w1" } else { "w2" };
    let other = if leader == "w1" { "w2" } else { "w1" };
    world.say(other, AgentMessage::Heartbeat { draining: true, loading: Vec::new() });
    world.say(leader, AgentMessage::Heartbeat { draining: true, loading: Vec::new() });
    assert!(!world.agents[&worker_name(other)].engines.is_empty());
    leave_saved(&mut world, leader, 9);
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneRecovering));
    assert_eq!(world.job("j").committed_step, 9);
    assert!(["w1", "w2"].iter().all(|id| world.agents[&worker_name(id)].engines.is_empty()));
}

#[test]
fn a_backbone_that_moves_names_the_worker_that_it_leaves_and_no_other() {
    let mut world = World::running();
    world.connect("v", 1, true);
    world.ask(Request::DrainWorker { name: worker_name("v"), etag: None }).unwrap();
    world.ask(Request::DrainWorker { name: worker_name("w"), etag: None }).unwrap();
    leave_saved(&mut world, "w", 7);
    let message = &world.backbone("b").last_loss;
    assert_eq!(message, "workers/w is being drained");
}

#[test]
fn a_pause_that_is_asked_for_while_a_backbone_moves_is_a_pause() {
    let mut world = World::running();
    world.ask(Request::DrainWorker { name: worker_name("w"), etag: None }).unwrap();
    world.ask(Request::PauseJob(target("j"))).unwrap();
    let left =
        |state| JobEvent::Left { state, reason: JobReason::Requested, message: String::new(), step: 0 };
    world.job_event("w", "j", left(JobState::Queued));
    assert_eq!(world.state("j"), (JobState::Paused, JobReason::Requested));
    assert_eq!(world.backbone("b").state, BackboneState::Degraded);
}

#[test]
fn a_lost_worker_cannot_be_drained() {
    let mut world = World::running();
    world.disconnect("w");
    world.wait(5000);
    let problem = world.ask(Request::DrainWorker { name: worker_name("w"), etag: None }).unwrap_err();
    assert_eq!(problem.reason, "WORKER_LOST");
}

/// The leader has heard that its backbone is to move: it saves the job at this step, and lets it go.
fn leave_saved(world: &mut World, leader: &str, step: u64) {
    let told = &world.agents[&worker_name(leader)].jobs;
    let jobs = told.values().flat_map(|jobs| &jobs.jobs);
    assert!(jobs.clone().count() == 1 && jobs.clone().all(|job| job.wish == JobWish::Yield));
    let saved = JobEvent::Saved(Saved { step, ..Saved::default() });
    world.job_event(leader, "j", saved);
    let (state, reason) = (JobState::Queued, JobReason::Requested);
    world.job_event(leader, "j", JobEvent::Left { state, reason, message: String::new(), step });
}

#[test]
fn what_comes_over_an_old_connection_has_no_effect() {
    let mut world = World::running();
    let old = world.agents[&worker_name("w")].connection.unwrap();
    world.connect("w", 4, false);
    world.handle(Input::Disconnected { worker: worker_name("w"), connection: old });
    assert!(world.core.presences[&worker_name("w")].connection.is_some());
    let effects = world.handle(Input::Agent {
        worker: worker_name("w"),
        connection: old,
        message: AgentMessage::Heartbeat { draining: true, loading: Vec::new() },
    });
    assert_eq!(effects, Default::default());
}

#[test]
fn a_worker_that_is_lost_for_a_day_is_forgotten() {
    let mut world = World::new();
    world.connect("w", 4, true);
    world.disconnect("w");
    world.wait(5000);
    world.now = world.now.after(world.config.worker_ttl_ms);
    world.handle(Input::Tick);
    assert!(world.core.rows().workers.is_empty() && world.core.rows().reports.is_empty());
}

#[test]
fn ranks_find_each_other_whoever_comes_first_and_an_old_epoch_is_forgotten() {
    let mut world = World::of_two();
    let key = |epoch, key: &str| RendezvousKey { backbone: backbone_name("b"), epoch, key: key.to_owned() };
    let put = |epoch, name: &str| AgentMessage::RendezvousPut { key: key(epoch, name), value: "v".into() };
    let get = |epoch, name: &str| AgentMessage::RendezvousGet { key: key(epoch, name), follows: false };
    let answers = |effects: &crate::core::Effects| {
        effects.sends.iter().filter(|send| matches!(send.message, ToAgent::Rendezvous { .. })).count()
    };
    assert_eq!(answers(&world.say("w2", get(1, "a"))), 0);
    assert_eq!(answers(&world.say("w1", put(1, "a"))), 1);
    assert_eq!(answers(&world.say("w2", get(1, "a"))), 1);
    world.load("w1");
    world.engine_lost("w1", "b", 0, incipit_proto::v1::EngineLossCause::Exited);
    assert_eq!(world.backbone("b").epoch, 2);
    assert_eq!(answers(&world.say("w2", get(1, "a"))), 0);
    assert_eq!(answers(&world.say("w2", get(2, "a"))), 0);
    assert_eq!(answers(&world.say("w1", put(2, "a"))), 1);
}

#[test]
fn who_follows_a_value_is_sent_each_new_one_over_the_connection_that_it_has() {
    let mut world = World::of_two();
    ["w1", "w2"].into_iter().for_each(|worker| world.load(worker));
    let key = || RendezvousKey { backbone: backbone_name("b"), epoch: 1, key: "note".to_owned() };
    let put = |value: &'static str| AgentMessage::RendezvousPut { key: key(), value: value.into() };
    let get = |follows| AgentMessage::RendezvousGet { key: key(), follows };
    let answers = |effects: &crate::core::Effects| -> Vec<(String, String)> {
        let answer = |send: &crate::core::Send| match &send.message {
            ToAgent::Rendezvous { value, .. } => {
                Some((send.worker.to_string(), String::from_utf8_lossy(value).into_owned()))
            }
            _ => None,
        };
        effects.sends.iter().filter_map(answer).collect()
    };
    let told = |worker: &str, value: &str| (format!("workers/{worker}"), value.to_owned());
    assert_eq!(answers(&world.say("w2", get(true))), []);
    // A question for the first value alone does not end the one for all of them.
    assert_eq!(answers(&world.say("w2", get(false))), []);
    assert_eq!(answers(&world.say("w1", get(false))), []);
    assert_eq!(answers(&world.say("w1", put("1"))), [told("w1", "1"), told("w2", "1")]);
    assert_eq!(answers(&world.say("w1", put("2"))), [told("w2", "2")]);
    world.disconnect("w2");
    world.connect("w2", 1, false);
    assert_eq!(answers(&world.say("w1", put("3"))), []);
    assert_eq!(answers(&world.say("w2", get(true))), [told("w2", "3")]);
    assert_eq!(answers(&world.say("w1", put("4"))), [told("w2", "4")]);
}
