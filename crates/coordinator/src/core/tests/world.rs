//! A core with agents around it, and a copy of what is stored.

use std::collections::{BTreeMap, BTreeSet};

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName, WorkerName},
    v1::{
        EngineLossCause, EventKind, JobReason, JobState, JobWish, Machine, MetricPoint, StepMetrics,
        metric_point::Point,
    },
};

use crate::core::{
    AgentMessage, Backbone, Change, Config, Core, Effects, Hello, Input, Job, Reply, Request, RequestKey,
    Resource, Rows, Time, ToAgent,
    backbone::{BackboneSpec, Collective, Device, Dtype},
    checkpoint::{CheckpointFile, PROMPT_FILE},
    effects::{EngineAssignment, JobAssignments},
    input::{EngineEvent, EngineStatus, JobEvent, JobTarget, NewBackbone, NewJob, Report, Saved},
    job::RetryPolicy,
};

/// An agent, as far as the core can tell.
#[derive(Clone, Debug, Default)]
pub(super) struct Agent {
    pub(super) incarnation: u32,
    pub(super) connection: Option<u64>,
    pub(super) sequence: u64,
    pub(super) slots: u32,
    pub(super) gpus: u32,
    pub(super) acknowledged: u64,
    pub(super) engines: Vec<EngineAssignment>,
    pub(super) jobs: BTreeMap<BackboneName, JobAssignments>,
    /// Engines that it said are ready, and has not lost.
    pub(super) ready: BTreeSet<(BackboneName, u64, u32)>,
    pub(super) closed: Option<Problem>,
}

pub(super) struct World {
    pub(super) core: Core,
    /// What a store would hold, by the changes alone.
    pub(super) rows: Rows,
    pub(super) now: Time,
    pub(super) agents: BTreeMap<WorkerName, Agent>,
    pub(super) next_connection: u64,
    pub(super) config: Config,
}

pub(super) fn job_name(id: &str) -> JobName {
    JobName::of_id("id", id).unwrap()
}

pub(super) fn backbone_name(id: &str) -> BackboneName {
    BackboneName::of_id("id", id).unwrap()
}

pub(super) fn worker_name(id: &str) -> WorkerName {
    WorkerName::of_id("id", id).unwrap()
}

pub(super) fn target(id: &str) -> JobTarget {
    JobTarget { name: job_name(id), etag: None }
}

pub(super) fn files(step: u64) -> Vec<CheckpointFile> {
    let digest = blake3::hash(&step.to_le_bytes()).to_hex().to_string();
    vec![CheckpointFile { name: PROMPT_FILE.to_owned(), digest, size: 8 }]
}

pub(super) fn training(step: u64) -> MetricPoint {
    let point = StepMetrics { loss: 1.0, num_tokens: 100, ..StepMetrics::default() };
    MetricPoint { step, point: Some(Point::Training(point)), ..MetricPoint::default() }
}

pub(super) fn saved(step: u64) -> JobEvent {
    JobEvent::Saved(Saved { step, files: files(step), ..Saved::default() })
}

pub(super) fn left(state: JobState, reason: JobReason) -> JobEvent {
    JobEvent::Left { state, reason, message: String::new(), step: 0 }
}

pub(super) fn spec(collective: Collective, tp: u32, dp: u32, max_running_jobs: u32) -> BackboneSpec {
    let (dtype, device) = (Dtype::F32, Device::Cpu);
    let model = "/models/t5".to_owned();
    let (min_dp, microbatch_tokens) = (0, 0);
    BackboneSpec { model, dtype, device, tp, dp, min_dp, collective, microbatch_tokens, max_running_jobs }
}

pub(super) fn new_job(id: &str, backbone: &str) -> NewJob {
    NewJob {
        name: job_name(id),
        backbone: backbone_name(backbone),
        spec: Default::default(),
        priority: 10,
        retry_policy: RetryPolicy { max_retries: 1, reasons: vec![JobReason::OutOfMemory] },
        labels: BTreeMap::new(),
        start: None,
    }
}

impl World {
    pub(super) fn new() -> Self {
        let config = Config::default();
        let (rows, now) = (Rows::default(), Time(1_000_000));
        let core = Core::restore(config.clone(), rows.clone(), now);
        Self { core, rows, now, agents: BTreeMap::new(), next_connection: 1, config }
    }

    /// Has something handled, writes the changes into the copy, and tells the agents what is sent.
    pub(super) fn handle(&mut self, input: Input) -> Effects {
        let effects = self.core.handle(input, self.now);
        for change in &effects.changes {
            self.rows.apply(change);
        }
        for send in &effects.sends {
            let Some(agent) = self.agents.get_mut(&send.worker) else { continue };
            if agent.connection != Some(send.connection) {
                continue;
            }
            match &send.message {
                ToAgent::Welcome { acknowledged, .. } | ToAgent::Acknowledged(acknowledged) => {
                    agent.acknowledged = *acknowledged;
                }
                ToAgent::Engines(engines) => agent.engines.clone_from(engines),
                ToAgent::Jobs(jobs) => drop(agent.jobs.insert(jobs.backbone.clone(), jobs.clone())),
                ToAgent::Rendezvous { .. } => {}
                ToAgent::Close(problem) => (agent.connection, agent.closed) = (None, Some(problem.clone())),
            }
        }
        effects
    }

    pub(super) fn ask(&mut self, request: Request) -> Result<Reply, Problem> {
        self.ask_as(None, request)
    }

    pub(super) fn ask_as(&mut self, id: Option<&str>, request: Request) -> Result<Reply, Problem> {
        let hash = format!("{request:?}");
        let key = id.map(|id| RequestKey { id: id.to_owned(), hash });
        self.handle(Input::Request { actor: "tester".to_owned(), key, request }).reply.unwrap()
    }

    pub(super) fn create_backbone(&mut self, id: &str, spec: BackboneSpec) {
        let backbone = NewBackbone { name: backbone_name(id), spec, labels: BTreeMap::new() };
        let request = Request::CreateBackbone { backbone: Box::new(backbone), validate_only: false };
        self.ask(request).unwrap();
    }

    pub(super) fn create_job(&mut self, id: &str, backbone: &str) {
        let job = Box::new(new_job(id, backbone));
        self.ask(Request::CreateJob { job, validate_only: false }).unwrap();
    }

    /// An agent connects: with a new incarnation, or again.
    pub(super) fn connect(&mut self, id: &str, slots: u32, anew: bool) -> Effects {
        let name = worker_name(id);
        let connection = self.next_connection;
        self.next_connection += 1;
        let agent = self.agents.entry(name.clone()).or_default();
        if anew || agent.incarnation == 0 {
            let incarnation = agent.incarnation + 1;
            let gpus = agent.gpus;
            *agent = Agent { incarnation, gpus, ..Agent::default() };
        }
        (agent.connection, agent.slots, agent.closed) = (Some(connection), slots, None);
        agent.jobs.clear();
        let engines = agent.ready.iter().map(|(backbone, epoch, rank)| EngineStatus {
            backbone: backbone.clone(),
            epoch: *epoch,
            rank: *rank,
        });
        let machine = Machine {
            collectives: vec!["local".to_owned(), "gloo".to_owned()],
            gpus: vec!["H100".to_owned(); agent.gpus as usize],
            ..Machine::default()
        };
        let hello = Hello {
            worker: name,
            incarnation: format!("i{}", agent.incarnation),
            version: "1".to_owned(),
            protocol: 1,
            machine,
            slots,
            engines: engines.collect(),
        };
        self.handle(Input::Connected { connection, hello })
    }

    pub(super) fn say(&mut self, id: &str, message: AgentMessage) -> Effects {
        let worker = worker_name(id);
        let connection = self.agents[&worker].connection.unwrap_or(0);
        self.handle(Input::Agent { worker, connection, message })
    }

    pub(super) fn beat(&mut self, id: &str) -> Effects {
        self.say(id, AgentMessage::Heartbeat { draining: false, loading: Vec::new() })
    }

    /// The agent's next report.
    pub(super) fn report(&mut self, id: &str, report: Report) -> Effects {
        let agent = self.agents.get_mut(&worker_name(id)).unwrap();
        agent.sequence += 1;
        let sequence = agent.sequence;
        self.say(id, AgentMessage::Report { sequence, report })
    }

    pub(super) fn disconnect(&mut self, id: &str) -> Effects {
        let worker = worker_name(id);
        let connection = self.agents.get_mut(&worker).and_then(|agent| agent.connection.take());
        self.handle(Input::Disconnected { worker, connection: connection.unwrap_or(0) })
    }

    /// All engines that the agent is to have are ready.
    pub(super) fn load(&mut self, id: &str) {
        for engine in self.agents[&worker_name(id)].engines.clone() {
            let ranks =
                if engine.spec.collective == Collective::Local { &engine.ranks[..1] } else { &engine.ranks };
            for rank in ranks {
                self.engine_ready(id, &engine, *rank);
            }
        }
    }

    pub(super) fn engine_ready(&mut self, id: &str, engine: &EngineAssignment, rank: u32) {
        let agent = self.agents.get_mut(&worker_name(id)).unwrap();
        agent.ready.retain(|(backbone, _, old)| (backbone, *old) != (&engine.backbone, rank));
        agent.ready.insert((engine.backbone.clone(), engine.epoch, rank));
        let event = EngineEvent::Ready {
            pid: 7,
            fingerprint: "f".to_owned(),
            num_parameters: 60,
            d_model: 4,
            num_layers: 2,
        };
        self.report(
            id,
            Report::Engine { backbone: engine.backbone.clone(), epoch: engine.epoch, rank, event },
        );
    }

    pub(super) fn engine_lost(
        &mut self,
        id: &str,
        backbone: &str,
        rank: u32,
        cause: EngineLossCause,
    ) -> Effects {
        let backbone = backbone_name(backbone);
        let epoch = self.core.rows().backbones[&backbone].epoch;
        let alive = cause == EngineLossCause::GroupFailed;
        let agent = self.agents.get_mut(&worker_name(id)).unwrap();
        if !alive {
            agent.ready.retain(|(name, _, old)| (name, *old) != (&backbone, rank));
        }
        let event = EngineEvent::Lost { cause, message: "exit code 1".to_owned(), alive };
        self.report(id, Report::Engine { backbone, epoch, rank, event })
    }

    /// A report of a job, as its leader would send it now.
    pub(super) fn job_event(&mut self, worker: &str, job: &str, event: JobEvent) -> Effects {
        let report = self.job_report(job, event);
        self.report(worker, report)
    }

    pub(super) fn job_report(&self, job: &str, event: JobEvent) -> Report {
        let job = self.job(job);
        let attempt = job.attempts.last().unwrap();
        let (backbone, epoch, attempt) = (job.backbone.clone(), attempt.epoch, attempt.number);
        Report::Job { backbone, epoch, job: job.name.clone(), attempt, event }
    }

    pub(super) fn job(&self, id: &str) -> &Job {
        &self.core.rows().jobs[&job_name(id)]
    }

    pub(super) fn state(&self, id: &str) -> (JobState, JobReason) {
        (self.job(id).state, self.job(id).reason)
    }

    pub(super) fn backbone(&self, id: &str) -> &Backbone {
        &self.core.rows().backbones[&backbone_name(id)]
    }

    /// Time goes on, in ticks of half a second.
    pub(super) fn wait(&mut self, milliseconds: u64) {
        for _ in 0..milliseconds / 500 {
            self.now = self.now.after(500);
            self.handle(Input::Tick);
        }
    }

    /// The same, while these agents send heartbeats.
    pub(super) fn wait_with(&mut self, milliseconds: u64, agents: &[&str]) {
        for _ in 0..milliseconds / 500 {
            self.now = self.now.after(500);
            for agent in agents {
                self.beat(agent);
            }
            self.handle(Input::Tick);
        }
    }

    /// The coordinator ends, and comes back with what was stored, through JSON.
    pub(super) fn restart(&mut self) {
        let mut rows = self.rows.clone();
        let resources = std::mem::take(&mut rows.jobs).into_values().map(|job| Resource::Job(Box::new(job)));
        let resources = resources
            .chain(
                std::mem::take(&mut rows.backbones)
                    .into_values()
                    .map(|row| Resource::Backbone(Box::new(row))),
            )
            .chain(std::mem::take(&mut rows.workers).into_values().map(|row| Resource::Worker(Box::new(row))))
            .chain(
                std::mem::take(&mut rows.checkpoints)
                    .into_values()
                    .map(|row| Resource::Checkpoint(Box::new(row))),
            )
            .chain(
                std::mem::take(&mut rows.prompts).into_values().map(|row| Resource::Prompt(Box::new(row))),
            );
        for resource in resources {
            let text = serde_json::to_string(&resource).unwrap();
            rows.insert(serde_json::from_str(&text).unwrap());
        }
        assert_eq!(rows, self.rows);
        self.core = Core::restore(self.config.clone(), rows, self.now);
        for agent in self.agents.values_mut() {
            agent.connection = None;
        }
    }

    /// Two workers with a rank each of a backbone that is not ready.
    pub(super) fn of_two() -> Self {
        let mut world = Self::new();
        world.connect("w1", 1, true);
        world.connect("w2", 1, true);
        world.create_backbone("b", spec(Collective::Gloo, 2, 1, 2));
        world
    }

    /// One worker with a backbone of one rank that is ready.
    pub(super) fn ready() -> Self {
        let mut world = Self::new();
        world.connect("w", 4, true);
        world.create_backbone("b", spec(Collective::Local, 1, 1, 2));
        world.load("w");
        world
    }

    /// The same, with a job that runs.
    pub(super) fn running() -> Self {
        let mut world = Self::ready();
        world.create_job("j", "b");
        assert_eq!(world.state("j"), (JobState::Running, JobReason::Started));
        world
    }

    pub(super) fn wish(&self, id: &str) -> JobWish {
        self.job(id).wish
    }
}

/// Whether something was made.
pub(super) fn makes_something(effects: &Effects) -> bool {
    let made = |change: &Change| matches!(change, Change::Put(stamp, _) if stamp.kind == EventKind::Created);
    effects.changes.iter().any(made)
}
