//! What an agent's core does about what it hears.

use incipit_proto::v1::{
    self, AttachRequest, AttachResponse, JobReason, JobState, JobWish, attach_request::Message,
    attach_response, engine_report, job_report,
};

use crate::agent::Key;
use crate::agent::core::{Action, Config, Core, Delay, Input, Refused};
use crate::frames::{Failed, Loading, LocalJob, Notice, Order, Ready, Saved};

const BACKBONE: &str = "backbones/b";

/// An agent with an engine that is ready, and a coordinator that acknowledges nothing.
struct World {
    core: Core,
    now: u64,
}

fn hears(message: attach_response::Message) -> Input {
    Input::Received(AttachResponse { message: Some(message) })
}

fn key() -> Key {
    Key { backbone: BACKBONE.to_owned(), rank: 0 }
}

fn engines(epoch: u64) -> Input {
    let engine = v1::EngineAssignment {
        backbone: BACKBONE.to_owned(),
        epoch,
        ranks: vec![0],
        collective: "local".to_owned(),
        ..v1::EngineAssignment::default()
    };
    hears(attach_response::Message::Engines(v1::EngineAssignments { engines: vec![engine] }))
}

fn assignment(job: &str, wish: JobWish) -> v1::JobAssignment {
    let checkpoint = Some(v1::Checkpoint { step: 20, ..v1::Checkpoint::default() });
    v1::JobAssignment {
        job: job.to_owned(),
        attempt: 1,
        wish: wish.into(),
        checkpoint,
        ..v1::JobAssignment::default()
    }
}

fn jobs(wishes: &[(&str, JobWish)]) -> Input {
    let jobs = wishes.iter().map(|(job, wish)| assignment(job, *wish)).collect();
    let assignments = v1::JobAssignments { backbone: BACKBONE.to_owned(), epoch: 1, jobs };
    hears(attach_response::Message::Jobs(assignments))
}

fn report(job: &str, report: job_report::Report) -> v1::JobReport {
    let (backbone, job) = (BACKBONE.to_owned(), job.to_owned());
    v1::JobReport { backbone, epoch: 1, job, attempt: 1, report: Some(report) }
}

fn saved(job: &str) -> Input {
    saved_at(job, 40, "dir")
}

fn saved_at(job: &str, step: u64, dir: &str) -> Input {
    let saved = v1::CheckpointSaved { step, ..v1::CheckpointSaved::default() };
    let report = Some(report(job, job_report::Report::Saved(saved)));
    Input::Notice(key(), Notice::Saved(Saved { report, dir: dir.to_owned() }))
}

impl World {
    fn new() -> Self {
        Self::with_gpus(0)
    }

    fn with_gpus(gpus: usize) -> Self {
        let core = Core::new(Config {
            worker: "workers/w".to_owned(),
            incarnation: "i".to_owned(),
            version: "1".to_owned(),
            machine: v1::Machine { gpus: vec!["GPU".to_owned(); gpus], ..v1::Machine::default() },
            slots: 1,
            outbox: "outbox".to_owned(),
            address: String::new(),
            drain: 25_000,
        });
        let mut world = Self { core, now: 0 };
        world.handle(Input::Connected);
        let cluster_id = "c".to_owned();
        world.handle(hears(attach_response::Message::Welcome(v1::Welcome {
            cluster_id,
            ..v1::Welcome::default()
        })));
        assert!(world.handle(engines(1)).contains(&Action::Start(key())));
        let ready = Ready { epoch: 1, engine: Some(v1::EngineReady::default()) };
        world.handle(Input::Notice(key(), Notice::Ready(ready)));
        world
    }

    fn handle(&mut self, input: Input) -> Vec<Action> {
        self.now += 10;
        self.core.handle(input, self.now)
    }
}

/// What is said to the coordinator, without signs of life.
fn said(actions: &[Action]) -> Vec<&Message> {
    let messages = actions.iter().filter_map(|action| match action {
        Action::Send(request) => request.message.as_ref(),
        _ => None,
    });
    messages.filter(|message| !matches!(message, Message::Heartbeat(_))).collect()
}

/// The leaves that are said: the job, its state and reason, and its steps.
fn leaves(actions: &[Action]) -> Vec<(String, JobState, JobReason, u64)> {
    let leave = |message: &Message| match message {
        Message::Job(v1::JobReport { job, report: Some(job_report::Report::Left(left)), .. }) => {
            Some((job.clone(), left.state(), left.reason(), left.step))
        }
        _ => None,
    };
    said(actions).into_iter().filter_map(leave).collect()
}

fn left(job: &str, state: JobState) -> (String, JobState, JobReason, u64) {
    (job.to_owned(), state, JobReason::Requested, 20)
}

#[test]
fn an_engine_that_is_dead_is_told_although_a_checkpoint_cannot_be_stored() {
    let mut world = World::new();
    world.handle(jobs(&[("jobs/j", JobWish::Unspecified)]));
    let actions = world.handle(saved("jobs/j"));
    assert!(matches!(actions[..], [Action::Store { ticket: 1, .. }]), "{actions:?}");
    let delay = Delay { unsaved: true, text: "its checkpoint cannot be stored".to_owned() };
    let actions = world.handle(Input::Delayed(("jobs/j".to_owned(), 1), delay));
    let told = |message: &&Message| matches!(message, Message::Logs(logs) if logs.job == "jobs/j" && logs.lines[0].text.contains("cannot be stored"));
    assert!(said(&actions).iter().any(told), "its log says nothing: {actions:?}");
    let actions = world.handle(Input::Ended(key(), "signal 9".to_owned()));
    let [Message::Engine(report)] = said(&actions)[..] else { panic!("{actions:?}") };
    assert!(matches!(report.report, Some(v1::engine_report::Report::Lost(_))), "{report:?}");
    let actions = world.handle(Input::Stored(1, Ok(())));
    assert!(matches!(said(&actions)[..], [Message::Job(_)]), "{actions:?}");
}

#[test]
fn a_checkpoint_that_is_just_being_stored_goes_before_the_loss_of_its_engine() {
    let is_loss = |message: &&Message| matches!(message, Message::Engine(_));
    for stored in [true, false] {
        let mut world = World::new();
        world.handle(jobs(&[("jobs/j", JobWish::Unspecified)]));
        world.handle(saved("jobs/j"));
        assert!(said(&world.handle(Input::Ended(key(), "signal 9".to_owned()))).is_empty());
        if stored {
            let actions = world.handle(Input::Stored(1, Ok(())));
            assert!(matches!(said(&actions)[..], [Message::Job(_), Message::Engine(_)]), "{actions:?}");
            continue;
        }
        // Not for ever.
        world.now += 980;
        assert!(!said(&world.handle(Input::Tick)).iter().any(is_loss));
        world.now += 10;
        assert!(said(&world.handle(Input::Tick)).iter().any(is_loss));
    }
}

#[test]
fn an_engine_that_says_that_it_hangs_is_killed_and_its_loss_told_once() {
    let mut world = World::new();
    let (cause, message) = (v1::EngineLossCause::Hung.into(), "rank 0 hangs".to_owned());
    let failed = Notice::Failed(Failed { epoch: 1, cause, message });
    let mut actions = world.handle(Input::Notice(key(), failed));
    assert!(actions.contains(&Action::Kill(key())));
    actions.extend(world.handle(Input::Ended(key(), "signal: 9".to_owned())));
    let losses: Vec<_> = said(&actions)
        .into_iter()
        .filter_map(|message| match message {
            Message::Engine(v1::EngineReport { report: Some(engine_report::Report::Lost(lost)), .. }) => {
                Some(lost)
            }
            _ => None,
        })
        .collect();
    let [lost] = losses[..] else { panic!("{losses:?}") };
    assert_eq!(
        (lost.cause(), &*lost.message, lost.alive),
        (v1::EngineLossCause::Hung, "rank 0 hangs", false)
    );
}

#[test]
fn files_that_the_coordinator_does_not_find_any_more_are_stored_again() {
    let mut world = World::new();
    world.handle(saved("jobs/j"));
    assert!(world.handle(Input::Missing).is_empty(), "nothing was reported");
    world.handle(Input::Stored(1, Ok(())));
    world.handle(Input::Disconnected);
    let actions = world.handle(Input::Missing);
    let [Action::Store { ticket, dir, .. }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((*ticket, &**dir), (0, "dir"));
    assert!(world.handle(Input::Missing).is_empty(), "they are on their way");
    world.handle(Input::Stored(0, Ok(())));
    assert!(matches!(world.handle(Input::Missing)[..], [Action::Store { ticket: 0, .. }]));
}

#[test]
fn a_job_whose_files_are_still_coming_gets_what_is_wished_at_once() {
    let answers = [
        (JobWish::Cancel, JobState::Cancelled),
        (JobWish::Pause, JobState::Paused),
        (JobWish::Yield, JobState::Queued),
    ];
    for (wish, state) in answers {
        let mut world = World::new();
        let actions = world.handle(jobs(&[("jobs/j", JobWish::Unspecified)]));
        assert!(actions.iter().any(|action| matches!(action, Action::Fetch(_))), "{actions:?}");
        let actions = world.handle(jobs(&[("jobs/j", wish), ("jobs/k", wish)]));
        assert_eq!(leaves(&actions), [left("jobs/j", state), left("jobs/k", state)]);
        let forgotten = Action::Forget(("jobs/j".to_owned(), 1));
        assert!(actions.contains(&forgotten), "its files are fetched still: {actions:?}");
        assert!(!actions.iter().any(|action| matches!(action, Action::Fetch(_))), "{actions:?}");
        // What comes late, or is told again, has no effect.
        let late = world.handle(Input::Fetched(("jobs/j".to_owned(), 1), Ok(LocalJob::default())));
        let refused = Refused { reason: JobReason::BadData, message: "late".to_owned() };
        let refused = world.handle(Input::Fetched(("jobs/k".to_owned(), 1), Err(refused)));
        let again = world.handle(jobs(&[("jobs/j", wish), ("jobs/k", wish)]));
        for actions in [late, refused, again] {
            assert_eq!(leaves(&actions), []);
            let named = actions.iter().any(|action| match action {
                Action::Tell(_, order) => matches!(&**order, Order::Jobs(jobs) if !jobs.jobs.is_empty()),
                _ => false,
            });
            assert!(!named, "the engine hears of a job that has left: {actions:?}");
        }
    }
}

#[test]
fn files_that_nobody_waits_for_are_fetched_no_longer() {
    let forgotten = Action::Forget(("jobs/j".to_owned(), 1));
    let mut world = World::new();
    world.handle(jobs(&[("jobs/j", JobWish::Unspecified)]));
    assert!(world.handle(jobs(&[])).contains(&forgotten), "it is not on its backbone any more");
    world.handle(jobs(&[("jobs/j", JobWish::Unspecified)]));
    assert!(!world.handle(engines(1)).contains(&forgotten));
    assert!(world.handle(engines(2)).contains(&forgotten), "its group is gone");
}

#[test]
fn a_cancelled_job_does_not_wait_for_a_checkpoint_that_cannot_be_stored() {
    let mut world = World::new();
    world.handle(jobs(&[("jobs/j", JobWish::Unspecified)]));
    world.handle(Input::Fetched(("jobs/j".to_owned(), 1), Ok(LocalJob::default())));
    world.handle(saved("jobs/j"));
    let delay = Delay { unsaved: true, text: "no".to_owned() };
    world.handle(Input::Delayed(("jobs/j".to_owned(), 1), delay));
    world.handle(jobs(&[("jobs/j", JobWish::Cancel)]));
    let (state, reason) = (JobState::Cancelled.into(), JobReason::Requested.into());
    let leave = job_report::Report::Left(v1::JobLeft { state, reason, step: 20, ..v1::JobLeft::default() });
    let actions = world.handle(Input::Notice(key(), Notice::Job(report("jobs/j", leave))));
    assert_eq!(leaves(&actions), [left("jobs/j", JobState::Cancelled)]);
}

#[test]
fn an_agent_that_is_turned_away_for_good_ends_its_engines_and_itself() {
    let mut world = World::new();
    let actions = world.handle(Input::TurnedAway("another process has its name".to_owned()));
    let given_up = Action::GiveUp("another process has its name".to_owned());
    assert_eq!(actions, [Action::Kill(key()), given_up]);
    let after = [engines(1), engines(2), Input::Ended(key(), "signal 9".to_owned()), Input::Tick];
    for input in after {
        let actions = world.handle(input);
        assert!(!actions.iter().any(|action| matches!(action, Action::Start(_))), "{actions:?}");
    }
    assert!(world.core.engines().is_empty());
}

#[test]
fn an_agent_ends_where_it_comes_to_another_cluster() {
    let mut world = World::new();
    world.handle(Input::Disconnected);
    world.handle(Input::Connected);
    let welcome = v1::Welcome { cluster_id: "other".to_owned(), ..v1::Welcome::default() };
    let actions = world.handle(hears(attach_response::Message::Welcome(welcome)));
    assert!(matches!(&actions[..], [Action::Kill(_), Action::GiveUp(why)] if why.contains("start it again")));
}

/// The engines that are told to join a group, with the numbers of their GPUs.
fn joins(actions: &[Action]) -> Vec<(String, u32)> {
    let join = |action: &Action| match action {
        Action::Tell(key, order) => match &**order {
            Order::Join(join) => Some((key.backbone.clone(), join.local_rank)),
            _ => None,
        },
        _ => None,
    };
    actions.iter().filter_map(join).collect()
}

fn engine(backbone: &str, device: &str, collective: &str, ranks: u32) -> v1::EngineAssignment {
    v1::EngineAssignment {
        backbone: backbone.to_owned(),
        epoch: 1,
        ranks: (0..ranks).collect(),
        device: device.to_owned(),
        collective: collective.to_owned(),
        ..v1::EngineAssignment::default()
    }
}

fn list(engines: &[v1::EngineAssignment]) -> Input {
    let engines = engines.to_vec();
    hears(attach_response::Message::Engines(v1::EngineAssignments { engines }))
}

fn named(pairs: &[(&str, u32)]) -> Vec<(String, u32)> {
    pairs.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect()
}

#[test]
fn engines_have_gpus_of_their_own_and_wait_for_those_that_are_dying() {
    let threads = engine("a", "cuda", "local", 2);
    let (on_cpu, processes) = (engine("b", "cpu", "local", 4), engine("c", "cuda", "nccl", 2));
    let mut world = World::new();
    let three = world.handle(list(&[threads, on_cpu.clone(), processes.clone()]));
    assert_eq!(joins(&three), named(&[("a", 0), ("b", 0), ("c", 2), ("c", 3)]));

    // Its GPUs are not free before its process has ended. What needs none does not wait.
    let next = [on_cpu, processes, engine("d", "cuda", "nccl", 1), engine("e", "cpu", "local", 1)];
    assert_eq!(joins(&world.handle(list(&next))), named(&[("e", 0)]));
    let ended = Key { backbone: "a".to_owned(), rank: 0 };
    assert_eq!(joins(&world.handle(Input::Ended(ended, "killed".to_owned()))), named(&[("d", 0)]));
}

#[test]
fn an_engine_that_does_not_end_holds_back_its_own_gpus_alone() {
    let (threads, processes) = (engine("a", "cuda", "local", 2), engine("c", "cuda", "nccl", 2));
    let mut world = World::with_gpus(5);
    let actions = world.handle(list(&[threads, processes.clone()]));
    assert_eq!(joins(&actions), named(&[("a", 0), ("c", 2), ("c", 3)]));
    let next = [processes, engine("d", "cuda", "nccl", 1), engine("e", "cuda", "nccl", 1)];
    assert_eq!(joins(&world.handle(list(&next))), named(&[("d", 4)]), "the fifth GPU is free");
    let ended = Key { backbone: "a".to_owned(), rank: 0 };
    assert_eq!(joins(&world.handle(Input::Ended(ended, "killed".to_owned()))), named(&[("e", 0)]));
    // With none dying, one that the machine has no GPU for is started, and says so itself.
    let mut world = World::with_gpus(1);
    assert_eq!(joins(&world.handle(list(&[engine("a", "cuda", "local", 2)]))), named(&[("a", 0)]));
}

#[test]
fn an_engine_that_does_not_end_is_told_with_its_process_at_growing_intervals() {
    let mut world = World::with_gpus(4);
    world.handle(list(&[engine("a", "cuda", "local", 2)]));
    world.handle(Input::Started(Key { backbone: "a".to_owned(), rank: 0 }, 4711));
    world.handle(list(&[]));
    let start = world.now;
    let mut told = Vec::new();
    for _ in 0..1000 {
        world.now += 90;
        for message in said(&world.handle(Input::Tick)) {
            if let Message::Logs(logs) = message
                && logs.backbone == "a"
            {
                told.push(((world.now - start) / 1000, logs.lines[0].text.clone()));
            }
        }
    }
    let times: Vec<u64> = told.iter().map(|(at, _)| *at).collect();
    assert_eq!(times, [5, 10, 20, 40, 80]);
    let text = &told[1].1;
    for part in ["kill -9", "rank 0", "10 s ago", "process 4711", "GPU 0, 1", "/proc/4711/stack"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn checkpoints_that_wait_for_a_store_that_is_away_are_few_and_those_that_go_are_told() {
    let mut world = World::new();
    let mut assignments =
        vec![assignment("jobs/j", JobWish::Unspecified), assignment("jobs/k", JobWish::Unspecified)];
    assignments[1].spec = Some(v1::TrainingSpec { keep: Some(1), ..v1::TrainingSpec::default() });
    let assignments = v1::JobAssignments { backbone: BACKBONE.to_owned(), epoch: 1, jobs: assignments };
    world.handle(hears(attach_response::Message::Jobs(assignments)));
    for (job, ticket) in [("jobs/j", 1), ("jobs/k", 2)] {
        let actions = world.handle(saved_at(job, 1, "first"));
        assert!(
            matches!(actions[..], [Action::Store { ticket: given, .. }] if given == ticket),
            "{actions:?}"
        );
    }
    let mut removed = Vec::new();
    for step in 2..=6 {
        for job in ["jobs/j", "jobs/k"] {
            let actions = world.handle(saved_at(job, step, &format!("{job} {step}")));
            let gone = actions.iter().filter_map(|action| match action {
                Action::Remove(dir) => Some(dir.clone()),
                _ => None,
            });
            let gone: Vec<String> = gone.collect();
            let is_told = said(&actions).iter().any(|message| {
                matches!(message, Message::Logs(logs) if logs.job == job && logs.lines[0].text.contains("was dropped"))
            });
            assert_eq!(is_told, !gone.is_empty(), "{actions:?}");
            assert!(!actions.iter().any(|action| matches!(action, Action::Store { .. })), "{actions:?}");
            removed.extend(gone);
        }
    }
    removed.sort();
    assert_eq!(removed, ["jobs/j 2", "jobs/j 3", "jobs/k 2", "jobs/k 3", "jobs/k 4", "jobs/k 5"]);
    let actions = world.handle(Input::Stored(2, Ok(())));
    assert!(matches!(said(&actions)[..], [Message::Job(_)]), "{actions:?}");
    let next = |action: &Action| matches!(action, Action::Store { dir, .. } if dir == "jobs/k 6");
    assert!(actions.iter().any(next), "{actions:?}");
}

#[test]
fn how_far_an_engine_has_loaded_is_told_with_the_next_sign_of_life() {
    let mut world = World::new();
    let loading = Loading { loaded: 30, total: 100 };
    world.handle(Input::Notice(key(), Notice::Loading(loading)));
    world.now += 2_000;
    let actions = world.handle(Input::Tick);
    let told = actions.iter().find_map(|action| match action {
        Action::Send(AttachRequest { message: Some(Message::Heartbeat(heartbeat)), .. }) => {
            heartbeat.engines.first()
        }
        _ => None,
    });
    let told = told.expect("a sign of life");
    assert_eq!((told.loaded_bytes, told.total_bytes), (30, 100));
}
