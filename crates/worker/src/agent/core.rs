//! What an agent does about what it hears: no clock, no process, no connection. The shell brings inputs and carries out actions.

use std::collections::{BTreeMap, VecDeque};

use incipit_proto::v1::{
    self, AttachRequest, AttachResponse, EngineLossCause, attach_request, attach_response, engine_report,
};

use crate::agent::engines::{Engine, Engines, Key};
use crate::agent::jobs::Jobs;
use crate::agent::outbox::Outbox;
use crate::agent::rendezvous::Rendezvous;
use crate::frames::{LocalJob, Notice, Order};

/// Milliseconds on a clock that only goes forward.
pub type Time = u64;

/// An engine that has not said for so long that it is alive is killed. It says so twice a second.
pub const HUNG_AFTER: Time = 3_000;
/// An engine that has not begun to join its new group for so long is killed: it waits for ranks that are gone, or carries out a step that
/// takes longer than its loading would.
pub const STUCK_AFTER: Time = 10_000;
/// The agent itself was asleep if its clock ticked so late: then nobody else is to blame.
const ASLEEP: Time = 1_500;
/// How long engines have to save their jobs when the agent is to end.
const DRAIN: Time = 25_000;

/// What an agent is.
#[derive(Clone, Debug)]
pub struct Config {
    /// `workers/{worker}`.
    pub worker: String,
    /// Made up for this process.
    pub incarnation: String,
    /// Version of the program.
    pub version: String,
    /// The machine.
    pub machine: v1::Machine,
    /// Ranks that it can hold.
    pub slots: u32,
    /// Directory for checkpoints on their way to the coordinator.
    pub outbox: String,
    /// An address of this machine that other ranks can reach; empty if it is not known.
    pub address: String,
}

/// What the agent hears.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Input {
    /// There is a connection to the coordinator.
    Connected,
    /// It is gone.
    Disconnected,
    /// The coordinator said something.
    Received(AttachResponse),
    /// An engine said something.
    Notice(Key, Notice),
    /// An engine wrote a line to its standard error.
    Line(Key, v1::LogLine),
    /// An engine's process has ended: how.
    Ended(Key, String),
    /// A job's files are here, or why they cannot be.
    Fetched(FileKey, Result<LocalJob, Refused>),
    /// A checkpoint's files are at the coordinator, or why they cannot be.
    Stored(u64, Result<(), String>),
    /// Time has passed.
    Tick,
    /// The agent is to end.
    Terminate,
}

/// A job and an attempt of it.
pub type FileKey = (String, u32);

/// Why a job cannot be trained here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The kind of it.
    pub reason: v1::JobReason,
    /// One readable line.
    pub message: String,
}

/// What the agent wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Say something to the coordinator.
    Send(AttachRequest),
    /// Break the connection: what it says makes no sense.
    Disconnect(String),
    /// Start an engine's process.
    Start(Key),
    /// Say something to an engine.
    Tell(Key, Box<Order>),
    /// Kill an engine's process, and whatever it has started.
    Kill(Key),
    /// Have a job's files here.
    Fetch(Box<v1::JobAssignment>),
    /// Have a checkpoint's files stored at the coordinator: those of the report with this sequence, in this directory.
    Store {
        /// The report's sequence.
        sequence: u64,
        /// The files.
        files: Vec<v1::CheckpointFile>,
        /// Where they are.
        dir: String,
        /// Whose they are: the report, without what it reports.
        of: Box<v1::JobReport>,
    },
    /// A directory is not needed any more.
    Remove(String),
    /// The agent is done.
    Exit,
}

/// An agent.
#[derive(Debug)]
pub struct Core {
    config: Config,
    connected: bool,
    welcomed: bool,
    cluster_id: String,
    /// Milliseconds from one heartbeat to the next, as the coordinator wants them.
    heartbeat: Time,
    last_heartbeat: Time,
    last_tick: Time,
    engines: Engines,
    jobs: Jobs,
    outbox: Outbox,
    rendezvous: Rendezvous,
    /// Since when it is to end.
    ending: Option<Time>,
    actions: Vec<Action>,
}

impl Core {
    /// An agent that has heard nothing yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            connected: false,
            welcomed: false,
            cluster_id: String::new(),
            heartbeat: 1_000,
            last_heartbeat: 0,
            last_tick: 0,
            engines: Engines::new(&config),
            jobs: Jobs::default(),
            outbox: Outbox::default(),
            rendezvous: Rendezvous::default(),
            ending: None,
            actions: Vec::new(),
            config,
        }
    }

    /// Whether so much waits to be told to the coordinator that engines are not to be listened to for now.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.outbox.is_full()
    }

    /// The engines, for whoever looks.
    #[must_use]
    pub fn engines(&self) -> &BTreeMap<Key, Engine> {
        self.engines.all()
    }

    /// What to do about an input.
    pub fn handle(&mut self, input: Input, now: Time) -> Vec<Action> {
        match input {
            Input::Connected => self.connected(),
            Input::Disconnected => {
                self.connected = false;
                self.welcomed = false;
            }
            Input::Received(response) => self.received(response, now),
            Input::Notice(key, notice) => self.noticed(&key, notice, now),
            Input::Line(key, line) => self.line(&key, line),
            Input::Ended(key, how) => self.ended(&key, &how, now),
            Input::Fetched(job, fetched) => self.fetched(&job, fetched),
            Input::Stored(sequence, stored) => self.stored(sequence, stored),
            Input::Tick => self.tick(now),
            Input::Terminate => self.terminate(now),
        }
        self.flush();
        std::mem::take(&mut self.actions)
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn send(&mut self, message: attach_request::Message) {
        if self.connected {
            self.act(Action::Send(AttachRequest { sequence: 0, message: Some(message) }));
        }
    }

    fn connected(&mut self) {
        self.connected = true;
        self.welcomed = false;
        let config = &self.config;
        let hello = v1::Hello {
            protocol_min: incipit_proto::client::PROTOCOL,
            protocol_max: incipit_proto::client::PROTOCOL,
            cluster_id: self.cluster_id.clone(),
            worker: config.worker.clone(),
            incarnation: config.incarnation.clone(),
            version: config.version.clone(),
            machine: Some(config.machine.clone()),
            slots: config.slots,
            engines: self.engines.status(),
        };
        self.send(attach_request::Message::Hello(hello));
    }

    fn received(&mut self, response: AttachResponse, now: Time) {
        use attach_response::Message;
        match response.message {
            Some(Message::Welcome(welcome)) => self.welcome(welcome, now),
            Some(Message::Acknowledged(sequence)) => self.acknowledged(sequence),
            Some(Message::Engines(assignments)) => {
                self.rendezvous.forget_old(&assignments);
                self.engines.assign(assignments, now, &mut self.actions);
            }
            Some(Message::Jobs(assignments)) => {
                self.jobs.assign(assignments, &mut self.actions);
                self.hand_on();
            }
            Some(Message::Rendezvous(value)) => {
                self.rendezvous.gets.retain(|get| {
                    (&get.backbone, get.epoch, &get.key) != (&value.backbone, value.epoch, &value.key)
                });
                let keys: Vec<Key> = self.engines.of_group(&value.backbone, value.epoch);
                for key in keys {
                    self.act(Action::Tell(key, Box::new(Order::Rendezvous(value.clone()))));
                }
            }
            None => {}
        }
    }

    fn welcome(&mut self, welcome: v1::Welcome, now: Time) {
        if !self.cluster_id.is_empty() && self.cluster_id != welcome.cluster_id {
            let other = format!(
                "the coordinator is of the cluster {}, and this worker of {}",
                welcome.cluster_id, self.cluster_id
            );
            return self.act(Action::Disconnect(other));
        }
        self.cluster_id = welcome.cluster_id;
        self.heartbeat = Time::from(welcome.heartbeat_interval_ms.max(50));
        self.welcomed = true;
        self.acknowledged(welcome.acknowledged);
        self.outbox.say_again();
        for put in self.rendezvous.puts.clone() {
            self.send(attach_request::Message::RendezvousPut(put));
        }
        for get in self.rendezvous.gets.clone() {
            self.send(attach_request::Message::RendezvousGet(get));
        }
        self.beat(now);
    }

    fn acknowledged(&mut self, sequence: u64) {
        for dir in self.outbox.acknowledge(sequence) {
            self.act(Action::Remove(dir));
        }
    }

    fn noticed(&mut self, key: &Key, notice: Notice, now: Time) {
        let Some(engine) = self.engines.get_mut(key) else { return };
        engine.alive_at = now;
        match notice {
            Notice::Alive(progress) => engine.progress = progress,
            Notice::Joining(epoch) => {
                engine.begun = true;
                if epoch == engine.epoch() {
                    engine.told_at = None;
                }
            }
            Notice::Ready(ready) if ready.epoch == engine.epoch() => {
                engine.ready = true;
                let report = engine_report::Report::Ready(ready.engine.unwrap_or_default());
                self.report_engine(key, report);
                self.hand_on();
            }
            Notice::Failed(failed) if failed.epoch == engine.epoch() => {
                let cause = failed.cause();
                engine.ready = false;
                // Most go on in another group. One that ends says why, and is to be told of no group any more.
                let ends = cause == EngineLossCause::Exited;
                self.lost(key, cause, failed.message, !ends);
                if ends {
                    self.engines.kill(key, &mut self.actions);
                }
            }
            Notice::Ready(_) | Notice::Failed(_) => {}
            Notice::Job(report) => {
                self.jobs.heard(&report);
                self.outbox.report(attach_request::Message::Job(report));
            }
            Notice::Saved(saved) => self.saved(saved),
            Notice::Log(log) => self.log(key, log.job, log.line.unwrap_or_default()),
            Notice::Put(put) => {
                self.rendezvous.puts.push(put.clone());
                self.send(attach_request::Message::RendezvousPut(put));
            }
            Notice::Get(get) => {
                if !self.rendezvous.gets.contains(&get) {
                    self.rendezvous.gets.push(get.clone());
                }
                self.send(attach_request::Message::RendezvousGet(get));
            }
        }
    }

    fn saved(&mut self, saved: crate::frames::Saved) {
        let Some(report) = saved.report else { return };
        let files = match &report.report {
            Some(v1::job_report::Report::Saved(saved)) => saved.files.clone(),
            _ => return,
        };
        let (backbone, job) = (report.backbone.clone(), report.job.clone());
        let (epoch, attempt) = (report.epoch, report.attempt);
        let of = Box::new(v1::JobReport { backbone, epoch, job, attempt, report: None });
        let sequence = self.outbox.hold(attach_request::Message::Job(report), saved.dir.clone());
        self.act(Action::Store { sequence, files, dir: saved.dir, of });
    }

    fn stored(&mut self, sequence: u64, stored: Result<(), String>) {
        match stored {
            Ok(()) => self.outbox.release(sequence),
            Err(why) => self.outbox.replace(sequence, &why),
        }
    }

    fn line(&mut self, key: &Key, line: v1::LogLine) {
        if let Some(engine) = self.engines.get_mut(key) {
            engine.last_words.clone_from(&line.text);
        }
        self.log(key, String::new(), line);
    }

    fn log(&mut self, key: &Key, job: String, mut line: v1::LogLine) {
        line.rank = key.rank;
        self.outbox.log(&key.backbone, job, line);
    }

    fn ended(&mut self, key: &Key, how: &str, now: Time) {
        let Some(engine) = self.engines.ended(key) else { return };
        if !engine.lost {
            let last = if engine.last_words.is_empty() {
                String::new()
            } else {
                format!("; it said last: {}", engine.last_words)
            };
            let message = format!("the engine of rank {} ended: {how}{last}", key.rank);
            let lost = v1::EngineLost { cause: EngineLossCause::Exited.into(), message, alive: false };
            self.report_of(key, engine.epoch(), engine_report::Report::Lost(lost));
        }
        self.engines.reconcile(now, &mut self.actions);
    }

    fn lost(&mut self, key: &Key, cause: EngineLossCause, message: String, alive: bool) {
        if let Some(engine) = self.engines.get_mut(key) {
            engine.lost = true;
        }
        self.report_engine(
            key,
            engine_report::Report::Lost(v1::EngineLost { cause: cause.into(), message, alive }),
        );
    }

    fn report_engine(&mut self, key: &Key, report: engine_report::Report) {
        let Some(engine) = self.engines.all().get(key) else { return };
        self.report_of(key, engine.epoch(), report);
    }

    fn report_of(&mut self, key: &Key, epoch: u64, report: engine_report::Report) {
        let (backbone, rank) = (key.backbone.clone(), key.rank);
        let report = v1::EngineReport { backbone, epoch, rank, report: Some(report) };
        self.outbox.report(attach_request::Message::Engine(report));
    }

    fn fetched(&mut self, job: &FileKey, fetched: Result<LocalJob, Refused>) {
        match fetched {
            Ok(local) => {
                self.jobs.fetched(job, local);
                self.hand_on();
            }
            Err(refused) => {
                if let Some(report) = self.jobs.refused(job, refused) {
                    self.outbox.report(attach_request::Message::Job(report));
                }
            }
        }
    }

    /// Tells the leaders of their jobs, as far as the files are here.
    fn hand_on(&mut self) {
        for (key, jobs) in self.jobs.untold(&self.engines) {
            self.act(Action::Tell(key, Box::new(Order::Jobs(jobs))));
        }
    }

    fn tick(&mut self, now: Time) {
        let asleep = now.saturating_sub(self.last_tick) > ASLEEP;
        self.last_tick = now;
        if asleep || self.is_full() {
            self.engines.forgive(now);
        }
        for key in self.engines.hung(now) {
            let silent = HUNG_AFTER as f64 / 1e3;
            let message =
                format!("the engine of rank {} gave no sign of life for {silent} s and was killed", key.rank);
            self.lost(&key, EngineLossCause::Hung, message, false);
            self.engines.kill(&key, &mut self.actions);
        }
        for (key, begun) in self.engines.stuck(now) {
            let silent = STUCK_AFTER as f64 / 1e3;
            if !begun {
                let message =
                    format!("the engine of rank {} did not begin for {silent} s and was killed", key.rank);
                self.lost(&key, EngineLossCause::Hung, message, false);
                self.engines.kill(&key, &mut self.actions);
                continue;
            }
            let text = format!(
                "the engine did not leave its old group for {silent} s and is started again: it waits for ranks that are gone"
            );
            self.log(
                &key,
                String::new(),
                v1::LogLine { level: "WARN".to_owned(), text, ..v1::LogLine::default() },
            );
            self.engines.restart(&key, &mut self.actions);
        }
        if self.welcomed && now >= self.last_heartbeat + self.heartbeat {
            self.beat(now);
        }
        self.end_if_done(now);
    }

    fn beat(&mut self, now: Time) {
        self.last_heartbeat = now;
        let heartbeat = v1::Heartbeat { engines: self.engines.status(), draining: self.ending.is_some() };
        self.send(attach_request::Message::Heartbeat(heartbeat));
    }

    fn terminate(&mut self, now: Time) {
        if self.ending.is_some() {
            return self.exit();
        }
        self.ending = Some(now);
        if self.welcomed {
            self.beat(now);
        }
    }

    /// The coordinator has the jobs of this machine's engines saved, wherever they are led from, and then takes the engines away. If it
    /// cannot be reached, there is no need to wait for it but to tell of jobs.
    fn end_if_done(&mut self, now: Time) {
        let Some(since) = self.ending else { return };
        let idle = self.engines.all().is_empty() || (!self.welcomed && self.jobs.are_none());
        let done = idle && self.outbox.is_empty();
        if done || now >= since + DRAIN {
            self.exit();
        }
    }

    fn exit(&mut self) {
        let keys: Vec<Key> = self.engines.all().keys().cloned().collect();
        for key in keys {
            self.act(Action::Kill(key));
        }
        self.act(Action::Exit);
    }

    /// Sends what can be sent.
    fn flush(&mut self) {
        if self.welcomed {
            let ready: VecDeque<AttachRequest> = self.outbox.take_unsent();
            self.actions.extend(ready.into_iter().map(Action::Send));
        }
    }
}
