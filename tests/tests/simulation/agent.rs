//! An agent's process: the core, what its shell does for it, and what can happen to a machine.

use std::collections::{BTreeMap, VecDeque};

use incipit_proto::v1;
use incipit_worker::agent::Key;
use incipit_worker::agent::core::{Action, Config, Core, Delay, Input};
use incipit_worker::frames::LocalJob;

use crate::simulation::engine::Pid;
use crate::simulation::link::LinkId;
use crate::simulation::world::{Event, Machine, Time, World};

/// How often the core is told that time has passed.
const TICK: Time = 100;

/// A machine, and the agent's process on it, if there is one.
#[derive(Default)]
pub(crate) struct Agent {
    pub(crate) slots: u32,
    pub(crate) incarnation: u64,
    pub(crate) core: Option<Core>,
    pub(crate) began: Time,
    pub(crate) frozen_until: Time,
    /// What happened while it was frozen.
    pub(crate) held: VecDeque<Input>,
    pub(crate) link: Option<LinkId>,
    pub(crate) pause: Time,
    pub(crate) cut_until: Time,
    /// When it last could not notice or say anything.
    pub(crate) trouble: Time,
    pub(crate) processes: BTreeMap<Key, Pid>,
    pub(crate) exiting: bool,
    /// Sequence of its last report, and of the last that was acknowledged.
    pub(crate) reported: u64,
    pub(crate) acknowledged: u64,
}

/// Files on their way.
#[derive(Clone)]
pub(crate) struct Carry {
    what: Carried,
    /// The coordinator's disk may be away for longer than a lease.
    stuck_until: Time,
}

/// What files they are.
#[derive(Clone)]
enum Carried {
    Fetch(Box<v1::JobAssignment>),
    Store { ticket: u64, files: Vec<v1::CheckpointFile>, of: Box<v1::JobReport> },
}

impl World {
    pub(crate) fn agent_starts(&mut self, machine: Machine) {
        let incarnation = self.agents[machine].incarnation + 1;
        let config = Config {
            worker: format!("workers/w{machine}"),
            incarnation: format!("w{machine}-{incarnation}"),
            version: "1".to_owned(),
            machine: v1::Machine {
                collectives: vec!["local".to_owned(), "gloo".to_owned()],
                ..v1::Machine::default()
            },
            slots: self.agents[machine].slots,
            outbox: "outbox".to_owned(),
            address: String::new(),
            drain: 25_000,
        };
        let agent = &mut self.agents[machine];
        if agent.core.is_some() {
            return;
        }
        *agent = Agent {
            slots: agent.slots,
            incarnation,
            core: Some(Core::new(config)),
            began: self.now,
            cut_until: agent.cut_until,
            trouble: self.now,
            ..Agent::default()
        };
        self.later(0, Event::AgentTicks(machine, incarnation));
        self.soon(0, 50, Event::AgentDials(machine, incarnation));
    }

    /// The process ends, and with it its engines. Another one is started.
    pub(crate) fn agent_ends(&mut self, machine: Machine) {
        let agent = &mut self.agents[machine];
        if agent.core.take().is_none() {
            return;
        }
        agent.trouble = self.now;
        agent.held.clear();
        let (link, processes) = (agent.link.take(), std::mem::take(&mut agent.processes));
        for pid in processes.into_values() {
            self.soon(0, 10, Event::EngineDies(pid));
        }
        if let Some(link) = link {
            self.cut_link(link);
        }
        // Longer than a lease, sometimes.
        let longest = if self.faulty && self.chance.one_in(3) { 15_000 } else { 5_000 };
        self.soon(0, longest, Event::AgentStarts(machine));
    }

    pub(crate) fn agent_ticks(&mut self, machine: Machine, incarnation: u64) {
        let agent = &self.agents[machine];
        if agent.incarnation != incarnation || agent.core.is_none() {
            return;
        }
        if agent.frozen_until <= self.now {
            self.tell_agent(machine, Input::Tick);
        }
        self.later(TICK, Event::AgentTicks(machine, incarnation));
    }

    /// The process does not get on for a while (SIGSTOP). Its engines do.
    pub(crate) fn freeze(&mut self, machine: Machine, length: Time) {
        let agent = &mut self.agents[machine];
        if agent.core.is_some() && agent.frozen_until <= self.now {
            agent.frozen_until = self.now + length;
            agent.trouble = agent.frozen_until;
            let incarnation = agent.incarnation;
            self.later(length, Event::AgentThaws(machine, incarnation));
        }
    }

    pub(crate) fn agent_thaws(&mut self, machine: Machine, incarnation: u64) {
        if self.agents[machine].incarnation != incarnation || self.agents[machine].core.is_none() {
            return;
        }
        self.agents[machine].frozen_until = self.now;
        let mut held = std::mem::take(&mut self.agents[machine].held);
        // Which of the things that wait is taken first, nobody knows.
        held.insert(self.chance.below(held.len() as u64 + 1) as usize, Input::Tick);
        for input in held {
            self.tell_agent(machine, input);
        }
    }

    /// Something happens to an agent.
    pub(crate) fn tell_agent(&mut self, machine: Machine, input: Input) {
        let agent = &mut self.agents[machine];
        if agent.frozen_until > self.now {
            agent.held.push_back(input);
            return;
        }
        let Some(core) = &mut agent.core else { return };
        if let Input::Received(v1::AttachResponse { message: Some(message) }) = &input {
            use v1::attach_response::Message::{Acknowledged, Welcome};
            match message {
                Acknowledged(sequence) => agent.acknowledged = agent.acknowledged.max(*sequence),
                Welcome(welcome) => agent.acknowledged = agent.acknowledged.max(welcome.acknowledged),
                _ => {}
            }
        }
        for action in core.handle(input, self.now - agent.began) {
            self.act(machine, action);
        }
        let agent = &self.agents[machine];
        if agent.exiting && agent.processes.is_empty() {
            self.agent_ends(machine);
        }
    }

    fn act(&mut self, machine: Machine, action: Action) {
        match action {
            Action::Send(request) => {
                let agent = &mut self.agents[machine];
                agent.reported = agent.reported.max(request.sequence);
                self.check_report(&request);
                self.send_up(machine, request);
            }
            Action::GiveUp(why) => self.broken("a sound protocol", || why),
            Action::Start(key) => self.start_engine(machine, key),
            Action::Tell(key, order) => self.order(machine, &key, *order),
            Action::Kill(key) => {
                if let Some(pid) = self.agents[machine].processes.get(&key).copied() {
                    self.soon(0, 20, Event::EngineDies(pid));
                }
            }
            Action::Fetch(job) => self.carry(machine, Carried::Fetch(job)),
            Action::Store { ticket, files, of, .. } => {
                self.carry(machine, Carried::Store { ticket, files, of });
            }
            // Files that come all the same do no harm.
            Action::Remove(_) | Action::Forget(_) => {}
            Action::Exit => self.agents[machine].exiting = true,
        }
    }

    /// Nobody says of a group that it has failed if it has not.
    fn check_report(&mut self, request: &v1::AttachRequest) {
        let Some(v1::attach_request::Message::Engine(report)) = &request.message else { return };
        let Some(v1::engine_report::Report::Lost(lost)) = &report.report else { return };
        let failed = self.oracle.failed.contains(&(report.backbone.clone(), report.epoch));
        if lost.cause() == v1::EngineLossCause::GroupFailed && !failed {
            self.broken("S10 (what is lost is lost)", || format!("{report:?}"));
        }
    }

    fn carry(&mut self, machine: Machine, what: Carried) {
        let id = self.id();
        let stuck = self.faulty && self.chance.one_in(20);
        let stuck_until = if stuck { self.now + self.chance.below(40_000) } else { 0 };
        self.carries.insert(id, Carry { what, stuck_until });
        let incarnation = self.agents[machine].incarnation;
        self.soon(5, 300, Event::Carries(machine, incarnation, id));
    }

    /// Files arrive, or are tried again.
    pub(crate) fn carries(&mut self, machine: Machine, incarnation: u64, id: u64) {
        let agent = &self.agents[machine];
        if agent.incarnation != incarnation || agent.core.is_none() {
            self.carries.remove(&id);
            return;
        }
        let away =
            self.coordinator.core.is_none() || agent.cut_until > self.now || agent.frozen_until > self.now;
        if away || (self.faulty && self.chance.one_in(10)) {
            return self.soon(100, 2_000, Event::Carries(machine, incarnation, id));
        }
        let Some(carry) = self.carries.remove(&id) else { return };
        if carry.stuck_until > self.now {
            let (job, unsaved) = match &carry.what {
                Carried::Fetch(job) => ((job.job.clone(), job.attempt), false),
                Carried::Store { of, .. } => ((of.job.clone(), of.attempt), true),
            };
            self.carries.insert(id, carry);
            self.soon(100, 2_000, Event::Carries(machine, incarnation, id));
            let text = "the disk is away".to_owned();
            return self.tell_agent(machine, Input::Delayed(job, Delay { unsaved, text }));
        }
        match carry.what {
            Carried::Fetch(job) => self.fetched(machine, *job),
            Carried::Store { ticket, files, .. } => self.stored(machine, ticket, files),
        }
    }

    fn fetched(&mut self, machine: Machine, job: v1::JobAssignment) {
        let key = (job.job.clone(), job.attempt);
        let digest = job.checkpoint.as_ref().and_then(|checkpoint| checkpoint.files.first());
        let digest = digest.map(|file| file.digest.clone()).unwrap_or_default();
        if !digest.is_empty() && !self.blobs.contains(&digest) {
            self.broken("S3 (a checkpoint is stored before it is committed)", || format!("{job:?}"));
        }
        let local = LocalJob { assignment: Some(job), checkpoint: digest, ..LocalJob::default() };
        self.tell_agent(machine, Input::Fetched(key, Ok(local)));
    }

    fn stored(&mut self, machine: Machine, ticket: u64, files: Vec<v1::CheckpointFile>) {
        // The coordinator's disk is full, or this machine's is damaged.
        let refused = self.faulty && self.chance.one_in(100);
        if refused {
            for file in &files {
                self.oracle.refused.extend(self.made.get(&file.digest).map(|(seed, ..)| *seed));
            }
            let why = Err("no space left on the device".to_owned());
            return self.tell_agent(machine, Input::Stored(ticket, why));
        }
        self.blobs.extend(files.into_iter().map(|file| file.digest));
        self.tell_agent(machine, Input::Stored(ticket, Ok(())));
    }
}
