//! People who ask for things, again and again until they have an answer, and how a story is set up.

use std::collections::BTreeMap;

use incipit_coordinator::core::backbone::{BackboneSpec, Collective, Device, Dtype};
use incipit_coordinator::core::input::{JobTarget, NewBackbone, NewJob};
use incipit_coordinator::core::job::RetryPolicy;
use incipit_coordinator::core::{Input, Request, RequestKey};
use incipit_proto::names::{BackboneName, JobName};
use incipit_proto::v1::{JobReason, JobState, TrainingSpec};

use crate::simulation::agent::Agent;
use crate::simulation::coordinator::Waiting;
use crate::simulation::world::{Event, Time, World};

/// The step behind which a job fails whose warm-up is so long.
pub(crate) const FAILS_AT: u64 = 7;
/// How long an answer is waited for.
const ANSWER: Time = 3_000;
/// The label that says whose a job is.
pub(crate) const LABEL: &str = "client";

/// Something to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Backbone(&'static str, Collective, u32),
    Create,
    Pause,
    Resume,
    Cancel,
}

/// What came back.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Job(JobName, JobState),
    Done,
    /// A reason and a message.
    Refused(String, String),
}

/// Somebody with a job, or with backbones.
pub(crate) struct Client {
    /// Each after a pause.
    script: Vec<(Time, Ask)>,
    at: usize,
    call: u64,
    /// Whether the coordinator is to find a name.
    named: bool,
    backbone: &'static str,
    pub(crate) spec: TrainingSpec,
    /// Its job, once it was accepted.
    pub(crate) job: Option<JobName>,
    /// What it wanted last and was promised, and the state that the job had then.
    pub(crate) promised: Option<(Ask, JobState)>,
}

impl Client {
    /// Whether it has all that it wants to ask for behind it.
    pub(crate) fn is_done(&self) -> bool {
        self.at >= self.script.len()
    }
}

fn backbone_name(id: &str) -> BackboneName {
    BackboneName::of_id("id", id).expect("an id")
}

impl World {
    pub(crate) fn set_up(&mut self) {
        let (local, gloo) =
            (Ask::Backbone("one", Collective::Local, 1), Ask::Backbone("two", Collective::Gloo, 2));
        let shapes = [(1, 2, vec![local]), (3, 1, vec![gloo]), (3, 2, vec![local, gloo])];
        let (machines, slots, backbones) = shapes[self.chance.below(3) as usize].clone();
        self.coordinator.config.max_losses = 1_000_000;
        self.later(0, Event::CoordinatorStarts);
        for machine in 0..machines {
            self.agents.push(Agent { slots, ..Agent::default() });
            self.soon(1, 3_000, Event::AgentStarts(machine));
        }
        self.longest_load = if self.chance.one_in(6) { 30_000 } else { 2_000 };
        self.faults_end = if self.faulty { self.chance.between(8_000, 45_000) } else { 20_000 };
        let names: Vec<&'static str> = backbones
            .iter()
            .filter_map(|ask| if let Ask::Backbone(name, ..) = ask { Some(*name) } else { None })
            .collect();
        let script = backbones.into_iter().map(|ask| (self.chance.below(2_000), ask)).collect();
        self.clients.push(self.client(script, "one", TrainingSpec::default()));
        for _ in 0..self.chance.between(2, 7) {
            let backbone = self.chance.pick(&names).unwrap_or("one");
            let (script, spec) = (self.script(), self.spec());
            let client = self.client(script, backbone, spec);
            self.clients.push(client);
        }
        for client in 0..self.clients.len() {
            self.ask_later(client);
        }
        if self.faulty {
            self.soon(500, 5_000, Event::Fault);
        }
        self.later(self.faults_end, Event::FaultsEnd);
        self.later(self.faults_end, Event::Look);
    }

    fn client(&self, script: Vec<(Time, Ask)>, backbone: &'static str, spec: TrainingSpec) -> Client {
        let named = spec.seed().is_multiple_of(2);
        Client { script, at: 0, call: 0, named, backbone, spec, job: None, promised: None }
    }

    /// What becomes of a job, as far as its owner has a say.
    fn script(&mut self) -> Vec<(Time, Ask)> {
        let mut script = vec![(self.chance.below(self.faults_end / 2), Ask::Create)];
        for _ in 0..self.chance.below(3) {
            script.push((self.chance.below(6_000), Ask::Pause));
            script.push((self.chance.below(4_000), Ask::Resume));
        }
        match self.chance.below(6) {
            0 => script.push((self.chance.below(6_000), Ask::Cancel)),
            1 => script.push((self.chance.below(6_000), Ask::Pause)),
            _ => {}
        }
        script
    }

    fn spec(&mut self) -> TrainingSpec {
        let steps = self.chance.between(20, 400);
        TrainingSpec {
            seed: Some(self.id() * 1000 + self.chance.below(1000)),
            steps: Some(steps),
            checkpoint_every: Some(self.chance.between(3, 60)),
            keep: Some(self.chance.between(1, 4) as u32),
            warmup_steps: self.chance.one_in(12).then_some(FAILS_AT),
            ..TrainingSpec::default()
        }
    }

    fn ask_later(&mut self, client: usize) {
        if let Some((pause, _)) = self.clients[client].script.get(self.clients[client].at) {
            self.later(*pause, Event::ClientAsks(client));
        }
    }

    /// A client asks for what is next, perhaps not for the first time.
    pub(crate) fn client_asks(&mut self, client: usize) {
        if self.clients[client].is_done() {
            return;
        }
        self.clients[client].call += 1;
        let (at, call) = (self.clients[client].at, self.clients[client].call);
        self.soon(0, 100, Event::CoordinatorIsAsked(client, at, call));
        if self.faulty && self.chance.one_in(8) {
            // A request that a proxy sends twice, or that was stuck somewhere.
            self.soon(0, 5_000, Event::CoordinatorIsAsked(client, at, call));
        }
        self.later(ANSWER, Event::ClientGivesUp(client, call));
    }

    pub(crate) fn client_gives_up(&mut self, client: usize, call: u64) {
        if self.clients[client].call == call {
            self.clients[client].call += 1;
            self.soon(10, 1_000, Event::ClientAsks(client));
        }
    }

    pub(crate) fn coordinator_is_asked(&mut self, client: usize, at: usize, call: u64) {
        let id = self.id();
        let asker = &self.clients[client];
        let Some((_, ask)) = asker.script.get(at).copied() else { return };
        let request = match (ask, &asker.job) {
            (Ask::Backbone(name, collective, dp), _) => create_backbone(name, collective, dp),
            (Ask::Create, _) => {
                let name = if asker.named { format!("mine-{client}") } else { format!("made-up-{id}") };
                create_job(client, &name, asker)
            }
            (Ask::Pause, Some(job)) => Request::PauseJob(JobTarget { name: job.clone(), etag: None }),
            (Ask::Resume, Some(job)) => Request::ResumeJob(JobTarget { name: job.clone(), etag: None }),
            (Ask::Cancel, Some(job)) => Request::CancelJob(JobTarget { name: job.clone(), etag: None }),
            (_, None) => return,
        };
        let key = RequestKey { id: format!("{client}-{at}"), hash: format!("{client}-{ask:?}") };
        let input = Input::Request { actor: format!("client {client}"), key: Some(key), request };
        self.offer(Waiting { input, caller: Some((client, call)) });
    }

    pub(crate) fn client_is_answered(&mut self, client: usize, call: u64) {
        let Some(answer) = self.answers.remove(&(client, call)) else { return };
        if self.clients[client].call != call || (self.faulty && self.chance.one_in(8)) {
            return;
        }
        let asker = &mut self.clients[client];
        let Some((_, ask)) = asker.script.get(asker.at).copied() else { return };
        match answer {
            Answer::Job(name, state) => {
                if asker.job.as_ref().is_some_and(|job| *job != name) {
                    return self
                        .broken("S1 (a request makes one job)", || format!("client {client} got {name}"));
                }
                (asker.job, asker.promised) = (Some(name), Some((ask, state)));
            }
            Answer::Done => {}
            Answer::Refused(reason, _) if reason == "JOB_STATE" && ask != Ask::Create => {}
            Answer::Refused(reason, _) if reason == "NOT_FOUND" && ask == Ask::Create => {
                asker.call += 1;
                return self.soon(100, 1_000, Event::ClientAsks(client));
            }
            Answer::Refused(_, message) => {
                return self.broken("S1 (what can be done is done)", || {
                    format!("client {client}, {ask:?}: {message}")
                });
            }
        }
        let asker = &mut self.clients[client];
        (asker.at, asker.call) = (asker.at + 1, asker.call + 1);
        self.ask_later(client);
    }
}

fn create_backbone(name: &str, collective: Collective, dp: u32) -> Request {
    let spec = BackboneSpec {
        model: "/models/t5".to_owned(),
        dtype: Dtype::F32,
        device: Device::Cpu,
        tp: 1,
        dp,
        // The first of several may be lost for good.
        min_dp: u32::from(dp > 1),
        collective,
        microbatch_tokens: 0,
        max_running_jobs: 2,
    };
    let backbone = NewBackbone { name: backbone_name(name), spec, labels: BTreeMap::new() };
    Request::CreateBackbone { backbone: Box::new(backbone), validate_only: false }
}

fn create_job(client: usize, name: &str, asker: &Client) -> Request {
    let job = NewJob {
        name: JobName::of_id("id", name).expect("an id"),
        backbone: backbone_name(asker.backbone),
        spec: asker.spec.clone(),
        priority: 10,
        retry_policy: RetryPolicy { max_retries: 1, reasons: vec![JobReason::NonFinite] },
        labels: BTreeMap::from([(LABEL.to_owned(), client.to_string())]),
        start: None,
    };
    Request::CreateJob { job: Box::new(job), validate_only: false }
}
