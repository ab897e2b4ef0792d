//! Random stories, and what must hold after every word of them.

mod invariants;

use std::collections::BTreeMap;

use incipit_proto::{
    names::{JobName, PromptName, WorkerName},
    v1::{
        BackboneState, EngineLossCause, EvalMetrics, EventKind, JobReason, JobState, MetricPoint,
        WorkerState, metric_point::Point,
    },
};
use proptest::{
    collection::vec,
    prelude::any,
    test_runner::{Config as TestConfig, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};

use super::world::{
    World, backbone_name, files, job_name, makes_something, new_job, spec, target, training, worker_name,
};
use crate::core::{
    AgentMessage, Change, Effects, Input, Request, RequestKey, Resource, Rows, Time,
    backbone::{BackboneSpec, Collective},
    checkpoint::{CheckpointFile, TaskScore},
    input::{
        BackbonePatch, CheckpointRef, EngineEvent, JobEvent, JobPatch, NewBackbone, Relabel, Report, Saved,
        StepRef,
    },
    job::KEPT_ATTEMPTS,
    transitions::{BACKBONE_TRANSITIONS, JOB_TRANSITIONS},
};

const WORKERS: [(&str, u32); 3] = [("w0", 2), ("w1", 1), ("w2", 3)];
const JOBS: [&str; 6] = ["j0", "j1", "j2", "j3", "j4", "j5"];
const BACKBONES: [&str; 3] = ["b0", "b1", "b2"];
const REQUEST_TTL: u64 = 20_000;

/// A word of a story: what happens, and to whom.
type Word = (u8, u8, u8, u8);

struct Machine {
    world: World,
    before: Rows,
    /// Reports that were sent once, to be sent again when they are stale.
    sent: Vec<(String, u64, Report)>,
    /// When an attempt of a name was last seen, and its number and epoch.
    attempts: BTreeMap<JobName, (Time, u32)>,
    epochs: BTreeMap<String, (Time, u64)>,
    marks: BTreeMap<JobName, (u64, [Option<u64>; 2])>,
    /// Whether engines are lost time and again, and come back.
    rough: bool,
}

impl Machine {
    fn new(rough: bool) -> Self {
        let mut world = World::new();
        world.config.request_ttl_ms = REQUEST_TTL;
        world.config.worker_ttl_ms = REQUEST_TTL;
        if !rough {
            (world.config.job_ttl_ms, world.config.max_jobs) = (Some(REQUEST_TTL), JOBS.len() - 1);
        }
        (world.config.shrink_after_ms, world.config.grow_after_ms) = (3_000, 5_000);
        world.restart();
        let before = world.rows.clone();
        let (attempts, epochs, marks) = Default::default();
        Self { world, before, sent: Vec::new(), attempts, epochs, marks, rough }
    }

    fn tell(&mut self, word: Word) {
        let (what, a, b, c) = word;
        let worker = WORKERS[a as usize % WORKERS.len()];
        let job = JOBS[a as usize % JOBS.len()];
        let backbone = BACKBONES[b as usize % BACKBONES.len()];
        match what % 64 {
            0..2 => self.create_backbone(backbone, a, c),
            2 => {
                let name = backbone_name(backbone);
                self.ask(Request::DeleteBackbone { name, etag: None, force: a % 4 == 0 }, c);
            }
            3..9 => {
                let mut new = new_job(job, backbone);
                new.priority = 1 + u32::from(c % 20);
                new.spec.keep = Some(1 + u32::from(c % 3));
                if c % 8 == 5 {
                    let (job, step) = (job_name(JOBS[c as usize % JOBS.len()]), StepRef::Last);
                    new.start = Some(CheckpointRef { job, step, task: None });
                }
                self.ask(Request::CreateJob { job: Box::new(new), validate_only: c == 9 }, c);
            }
            9 => self.ask(Request::PauseJob(target(job)), c),
            10..12 => self.ask(Request::ResumeJob(target(job)), c),
            12 => self.ask(Request::CancelJob(target(job)), c),
            13 => self.ask(Request::DeleteJob(target(job)), c),
            14..16 => self.of_checkpoint(job, b, c),
            16 => self.drop_version(c),
            17..20 => self.connect(worker, b % 8 == 0),
            20 => {
                let effects = self.world.disconnect(worker.0);
                self.hold_changes(&effects);
            }
            21..24 => self.beat(worker.0, b % 32 == 31),
            60 => self.update(job, backbone, (b, c)),
            61 => {
                self.ask(Request::RetryBackbone { name: backbone_name(backbone), etag: None }, c);
            }
            24 if b % 4 == 0 => self.ask(Request::DrainWorker { name: worker_name(worker.0), etag: None }, c),
            25..33 => self.load(worker.0, b, c),
            33 => self.lose(worker.0, b, c),
            34..46 => self.job_event(worker.0, (b, c)),
            46..49 => self.stale(c),
            49 => self.again(worker.0, c),
            50 => self.gap(worker.0),
            51 => self.world.restart(),
            52..54 => self.tick(1 + u64::from(c) * 7),
            54..60 if self.rough => self.crash(worker.0, b),
            _ => self.everybody_beats(c),
        }
        self.hold_other();
    }

    fn handle(&mut self, input: Input) -> Effects {
        let effects = self.world.handle(input);
        self.hold_changes(&effects);
        effects
    }

    fn ask(&mut self, request: Request, c: u8) {
        // Few ids, so that some come again, with the same request or another.
        let id = format!("r{}", c % 48);
        let key = (!c.is_multiple_of(3)).then(|| RequestKey { id: id.clone(), hash: format!("{request:?}") });
        let known = key.is_some() && self.world.rows.requests.contains_key(&id);
        let effects = self.handle(Input::Request { actor: String::new(), key, request });
        assert!(!(known && makes_something(&effects)), "I4: a request took effect twice");
        assert!(effects.reply.is_some());
    }

    fn create_backbone(&mut self, id: &str, a: u8, c: u8) {
        let (collective, tp, dp) = match a % 4 {
            0 => (Collective::Local, 2, 1),
            1 => (Collective::Gloo, 2, 1),
            2 => (Collective::Gloo, 1, 2),
            _ => (Collective::Gloo, 1, 1),
        };
        let min_dp = if collective == Collective::Gloo { u32::from(a / 4 % 2) } else { 0 };
        let spec = BackboneSpec { min_dp, ..spec(collective, tp, dp, 1 + u32::from(c % 3)) };
        let backbone = NewBackbone { name: backbone_name(id), spec, labels: BTreeMap::new() };
        self.ask(Request::CreateBackbone { backbone: Box::new(backbone), validate_only: c == 1 }, c);
    }

    fn update(&mut self, job: &str, backbone: &str, (b, c): (u8, u8)) {
        let label = BTreeMap::from([("k".to_owned(), b.is_multiple_of(2).then(|| format!("v{}", c % 2)))]);
        let labels = Relabel { whole: None, changed: label };
        let request = if b % 4 < 2 {
            let patch = JobPatch { priority: Some(1 + u32::from(c % 20)), retry_policy: None, labels };
            Request::UpdateJob { target: target(job), patch: Box::new(patch), validate_only: c == 11 }
        } else {
            let min_dp = (c % 5 == 0).then_some(u32::from(c % 2));
            let patch = BackbonePatch { max_running_jobs: Some(1 + u32::from(c % 3)), min_dp, labels };
            let name = backbone_name(backbone);
            Request::UpdateBackbone { name, etag: None, patch: Box::new(patch), validate_only: c == 11 }
        };
        self.ask(request, c);
    }

    fn of_checkpoint(&mut self, job: &str, b: u8, c: u8) {
        let step = match c % 3 {
            0 => StepRef::Best,
            1 => StepRef::Last,
            _ => StepRef::At(u64::from(c) / 8),
        };
        let checkpoint = CheckpointRef { job: job_name(job), step, task: None };
        let prompt = PromptName::of_id("id", "p").unwrap();
        self.ask(
            match b % 4 {
                0 => Request::DeleteCheckpoint { checkpoint, etag: None },
                1 => Request::PinCheckpoint { checkpoint, etag: None, pinned: true },
                2 => Request::PinCheckpoint { checkpoint, etag: None, pinned: false },
                _ => Request::PromotePrompt { prompt, checkpoint, etag: None, description: String::new() },
            },
            c,
        );
    }

    fn drop_version(&mut self, c: u8) {
        let prompt = PromptName::of_id("id", "p").unwrap();
        self.ask(Request::DeletePromptVersion { prompt, version: u64::from(c % 8), etag: None }, c);
    }

    fn connect(&mut self, (id, slots): (&str, u32), anew: bool) {
        let effects = self.world.connect(id, slots, anew);
        self.hold_changes(&effects);
        // What the welcome does not acknowledge is sent again.
        let agent = &self.world.agents[&worker_name(id)];
        let from = agent.acknowledged;
        if anew || agent.sequence < from {
            self.world.agents.get_mut(&worker_name(id)).unwrap().sequence = from;
        }
    }

    fn connected(&self, id: &str) -> bool {
        self.world.agents.get(&worker_name(id)).is_some_and(|agent| agent.connection.is_some())
    }

    fn beat(&mut self, id: &str, draining: bool) {
        if self.connected(id) {
            let effects = self.world.say(id, AgentMessage::Heartbeat { draining, loading: Vec::new() });
            self.hold_changes(&effects);
        }
    }

    fn report(&mut self, id: &str, report: Report) {
        if !self.connected(id) {
            return;
        }
        let agent = self.world.agents.get_mut(&worker_name(id)).unwrap();
        // One that was lost with its connection counts as sent anew.
        agent.sequence = agent.acknowledged + 1;
        let sequence = agent.sequence;
        self.sent.push((id.to_owned(), sequence, report.clone()));
        let stale = self.is_stale(&report);
        let effects = self.world.say(id, AgentMessage::Report { sequence, report });
        let touches_jobs = effects.changes.iter().any(|change| {
            matches!(
                change,
                Change::Put(_, Resource::Job(_) | Resource::Checkpoint(_)) | Change::AppendMetrics(..)
            )
        });
        assert!(!(stale && touches_jobs), "I6: a stale report took effect");
        self.hold_changes(&effects);
    }

    /// Whether a report is of a job that does not run, or runs in another attempt or epoch.
    fn is_stale(&self, report: &Report) -> bool {
        let Report::Job { epoch, job, attempt, .. } = report else { return false };
        let open = self.before.jobs.get(job).and_then(|job| job.open_attempt());
        open.is_none_or(|open| (open.number, open.epoch) != (*attempt, *epoch))
    }

    fn load(&mut self, id: &str, b: u8, c: u8) {
        let engines = match self.world.agents.get(&worker_name(id)) {
            Some(agent) if !agent.engines.is_empty() => agent.engines.clone(),
            _ => return,
        };
        let engine = &engines[b as usize % engines.len()];
        for rank in &engine.ranks {
            let fingerprint = if c == 200 { "other" } else { "f" }.to_owned();
            let event =
                EngineEvent::Ready { pid: 1, fingerprint, num_parameters: 1, d_model: 1, num_layers: 1 };
            let agent = self.world.agents.get_mut(&worker_name(id)).unwrap();
            agent.ready.retain(|(backbone, _, old)| (backbone, old) != (&engine.backbone, rank));
            agent.ready.insert((engine.backbone.clone(), engine.epoch, *rank));
            let (backbone, epoch) = (engine.backbone.clone(), engine.epoch);
            self.report(id, Report::Engine { backbone, epoch, rank: *rank, event });
        }
    }

    fn lose(&mut self, id: &str, b: u8, c: u8) {
        let Some(agent) = self.world.agents.get(&worker_name(id)) else { return };
        if agent.engines.is_empty() {
            return;
        }
        let engine = agent.engines[b as usize % agent.engines.len()].clone();
        let rank = engine.ranks[c as usize % engine.ranks.len()];
        let cause = match c % 16 {
            0 => EngineLossCause::BadModel,
            1..6 => EngineLossCause::GroupFailed,
            6..10 => EngineLossCause::Hung,
            _ => EngineLossCause::Exited,
        };
        let alive = c.is_multiple_of(2);
        if !alive {
            let agent = self.world.agents.get_mut(&worker_name(id)).unwrap();
            agent.ready.retain(|(backbone, _, old)| (backbone, *old) != (&engine.backbone, rank));
        }
        let event = EngineEvent::Lost { cause, message: "gone".to_owned(), alive };
        let (backbone, epoch) = (engine.backbone, engine.epoch);
        self.report(id, Report::Engine { backbone, epoch, rank, event });
    }

    /// All jobs of a leader take part, all but one get on, one of its engines dies, and all that are to be there are loaded again.
    fn crash(&mut self, id: &str, b: u8) {
        let groups = self.world.agents.get(&worker_name(id)).map(|agent| agent.jobs.clone());
        for group in groups.into_iter().flat_map(BTreeMap::into_values) {
            for (place, job) in group.jobs.into_iter().enumerate() {
                let started = JobEvent::Started { step: job.attempt.start_step, warnings: Vec::new() };
                let last = self.marks.get(&job.job).and_then(|(_, last)| last[0]).unwrap_or(0);
                let got_on = JobEvent::Measured(vec![training(last + 1)]);
                for event in [started].into_iter().chain((place > 0).then_some(got_on)) {
                    let (backbone, epoch) = (group.backbone.clone(), group.epoch);
                    let (job, attempt) = (job.job.clone(), job.attempt.number);
                    self.report(id, Report::Job { backbone, epoch, job, attempt, event });
                }
            }
        }
        self.lose(id, b, 15);
        for _ in 0..9 {
            self.everybody_beats(255);
        }
        for (id, _) in WORKERS {
            let engines = self.world.agents.get(&worker_name(id)).map_or(0, |agent| agent.engines.len());
            for engine in 0..engines {
                self.load(id, engine as u8, 0);
            }
        }
    }

    fn job_event(&mut self, id: &str, (b, c): (u8, u8)) {
        let Some(agent) = self.world.agents.get(&worker_name(id)) else { return };
        let jobs: Vec<_> =
            agent.jobs.values().flat_map(|jobs| jobs.jobs.iter().map(move |job| (jobs, job))).collect();
        if jobs.is_empty() {
            return;
        }
        let (group, assignment) = jobs[b as usize % jobs.len()];
        let step = assignment.attempt.start_step + 1 + u64::from(c % 16);
        let evaluation = EvalMetrics { best: c % 2 == 0, score: 0.5, ..EvalMetrics::default() };
        let evaluation =
            MetricPoint { step, point: Some(Point::Evaluation(evaluation)), ..MetricPoint::default() };
        let event = match c % 8 {
            0 => JobEvent::Started { step, warnings: vec![format!("w{c}")] },
            1..4 => JobEvent::Measured(vec![training(step), training(step + 1), evaluation]),
            4..7 => JobEvent::Saved(saved(step, c)),
            _ => {
                let (state, reason) = match c / 8 % 10 {
                    0 => (JobState::Paused, JobReason::Requested),
                    1 => (JobState::Succeeded, JobReason::StepsDone),
                    2 => (JobState::Succeeded, JobReason::PatienceExhausted),
                    3 => (JobState::Failed, JobReason::NonFinite),
                    4 => (JobState::Failed, JobReason::OutOfMemory),
                    5 => (JobState::Cancelled, JobReason::Requested),
                    6 => (JobState::Failed, JobReason::RankLost),
                    7 => (JobState::Queued, JobReason::Requested),
                    8 => (JobState::Failed, JobReason::CheckpointDamaged),
                    _ => (JobState::Unspecified, JobReason::Unspecified),
                };
                JobEvent::Left { state, reason, message: String::new(), step }
            }
        };
        let report = Report::Job {
            backbone: group.backbone.clone(),
            epoch: group.epoch,
            job: assignment.job.clone(),
            attempt: assignment.attempt.number,
            event,
        };
        self.report(id, report);
    }

    /// Something that was true once is reported as if it were new.
    fn stale(&mut self, c: u8) {
        let of_jobs = self.sent.iter().rev().filter(|(_, _, report)| matches!(report, Report::Job { .. }));
        let old = of_jobs.skip(c as usize % 16).find(|(_, _, report)| c >= 128 || self.is_stale(report));
        if let Some((id, _, report)) = old.cloned() {
            self.report(&id, report);
        }
    }

    /// A report is sent again that was acknowledged: it must have no effect, and be acknowledged again.
    fn again(&mut self, id: &str, c: u8) {
        if !self.connected(id) {
            return;
        }
        let acknowledged = self.world.agents[&worker_name(id)].acknowledged;
        let mut old =
            self.sent.iter().rev().filter(|(worker, sequence, _)| worker == id && *sequence <= acknowledged);
        if let Some((_, sequence, report)) = old.nth(c as usize % 4).cloned() {
            let effects = self.world.say(id, AgentMessage::Report { sequence, report });
            let reports = |change: &&Change| !matches!(change, Change::Put(_, Resource::Backbone(_)));
            assert_eq!(effects.changes.iter().find(reports), None, "a report took effect twice");
            self.hold_changes(&effects);
        }
    }

    fn gap(&mut self, id: &str) {
        if !self.connected(id) {
            return;
        }
        let agent = &self.world.agents[&worker_name(id)];
        let (sequence, backbone) = (agent.acknowledged + 2, backbone_name("b0"));
        let report = Report::Logs { backbone, job: None, lines: Vec::new() };
        let effects = self.world.say(id, AgentMessage::Report { sequence, report });
        self.hold_changes(&effects);
        assert!(!self.connected(id), "a gap ends the connection");
    }

    fn tick(&mut self, milliseconds: u64) {
        self.world.now = self.world.now.after(milliseconds);
        self.handle(Input::Tick);
    }

    fn everybody_beats(&mut self, c: u8) {
        for (id, _) in WORKERS {
            self.beat(id, false);
        }
        self.tick(u64::from(c) * 4);
    }
}

/// States, with reasons or without, that some of the stories must end in: else they prove nothing.
const ENDS: [&str; 8] = [
    "Running",
    "Paused",
    "Succeeded",
    "Failed",
    "Failed CheckpointDamaged",
    "Cancelled",
    "backbone Ready",
    "backbone Degraded",
];
const ROUGH_ENDS: [&str; 2] = ["Failed EngineCrashed", "backbone Failed CrashLoop"];

fn tell_stories(cases: u32, seed: u8, rough: bool) {
    println!("{cases} stories from seed {seed}");
    let config =
        TestConfig { cases, failure_persistence: None, max_shrink_iters: 20_000, ..TestConfig::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    let word = (any::<u8>(), any::<u8>(), any::<u8>(), any::<u8>());
    let mut counts = BTreeMap::new();
    let counts_cell = std::cell::RefCell::new(&mut counts);
    let result = TestRunner::new_with_rng(config, rng).run(&vec(word, 300), |story| {
        let mut machine = Machine::new(rough);
        for word in story {
            machine.tell(word);
        }
        let mut counts = counts_cell.borrow_mut();
        for job in machine.world.core.rows().jobs.values() {
            *counts.entry(format!("{:?} {:?}", job.state, job.reason)).or_insert(0_u32) += 1;
        }
        for backbone in machine.world.core.rows().backbones.values() {
            *counts.entry(format!("backbone {:?} {:?}", backbone.state, backbone.reason)).or_insert(0) += 1;
        }
        Ok::<(), TestCaseError>(())
    });
    println!("where they ended: {counts:#?}");
    if let Err(error) = result {
        panic!("{error}");
    }
    for state in if rough { &ROUGH_ENDS[..] } else { &ENDS } {
        assert!(counts.keys().any(|key| key.starts_with(state)), "no story ended in {state}");
    }
}

#[test]
fn whatever_happens_in_whatever_order_the_invariants_hold() {
    tell_stories(256, 7, false);
}

#[test]
fn the_invariants_hold_where_engines_are_lost_time_and_again() {
    tell_stories(256, 7, true);
}

#[test]
#[ignore = "long: 20,000 stories"]
fn the_invariants_hold_in_very_many_stories() {
    tell_stories(10_000, 11, false);
    tell_stories(10_000, 13, true);
}

/// A checkpoint, for better or worse, of one task or of two.
fn saved(step: u64, c: u8) -> Saved {
    let task = |name: &str, best| TaskScore { name: name.to_owned(), score: Some(0.5), best };
    let mut tasks = Vec::new();
    if c.is_multiple_of(2) {
        tasks = vec![task("a", c.is_multiple_of(3)), task("b", c % 7 < 3)];
    }
    let best = tasks.is_empty() && c.is_multiple_of(5);
    // Of a step there may be one more, with what an evaluation came to.
    let digest = blake3::hash(&[c % 3]).to_hex().to_string();
    let state = CheckpointFile { name: "state.json".to_owned(), digest, size: 1 };
    let files = [files(step), vec![state]].concat();
    Saved { step, files, score: Some(0.5), best, tasks }
}
