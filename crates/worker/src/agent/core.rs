//! What an agent does about what it hears: no clock, no process, no connection. The shell brings inputs and carries out actions.

use std::collections::{BTreeMap, VecDeque};

use incipit_proto::v1::{
    self, AttachRequest, AttachResponse, EngineLossCause, attach_request, attach_response, engine_report,
};

use crate::agent::engines::{Engine, Engines, Key};
use crate::agent::jobs::Jobs;
use crate::agent::outbox::{Outbox, ToStore};
use crate::agent::rendezvous::Rendezvous;
pub use crate::agent::words::{Action, Config, Delay, FileKey, Input, Refused};
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
/// The ticket of files that are stored again; reports have others.
const AGAIN: u64 = 0;

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
    /// Whether files that were stored once are on their way again.
    storing_again: bool,
    /// Since when it is to end.
    ending: Option<Time>,
    /// Whether it ends now.
    over: bool,
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
            storing_again: false,
            ending: None,
            over: false,
            actions: Vec::new(),
            config,
        }
    }

    /// Whether so much waits to be told to the coordinator that engines are not to be listened to for now.
    #[must_use]
    pub fn is_full(&self) -> bool {
        // Once it ends, nothing is left but to hear that engines have.
        !self.over && self.outbox.is_full()
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
            // What came before that was known.
            Input::Received(_) if self.over => {}
            Input::Received(response) => self.received(response, now),
            Input::TurnedAway(why) => self.give_up(why),
            Input::Notice(key, notice) => self.noticed(&key, notice, now),
            Input::Line(key, line) => self.line(&key, line),
            Input::Started(key, pid) => self.engines.started(&key, pid),
            Input::Ended(key, how) => self.ended(&key, &how, now),
            Input::Missing => self.store_again(),
            Input::Fetched(job, fetched) => self.fetched(&job, fetched),
            Input::Stored(ticket, stored) => self.stored(ticket, stored),
            Input::Delayed(job, delay) => self.delayed(&job, delay),
            Input::Tick => self.tick(now),
            Input::Terminate => self.terminate(now),
        }
        self.outbox.settle(now);
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
            role: v1::WorkerRole::Worker.into(),
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
                self.jobs.forget_old(&assignments, &mut self.actions);
                self.engines.assign(assignments, now, &mut self.actions);
            }
            Some(Message::Jobs(assignments)) => {
                for left in self.jobs.assign(assignments, &mut self.actions) {
                    self.outbox.report(attach_request::Message::Job(left));
                }
                self.outbox.cancel(self.jobs.cancelled());
                self.hand_on();
            }
            Some(Message::Rendezvous(value)) => {
                self.rendezvous.answered(&value);
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
                "the coordinator is of the cluster {}, and this worker of {}; start it again, and it belongs to that one",
                welcome.cluster_id, self.cluster_id
            );
            return self.give_up(other);
        }
        self.cluster_id = welcome.cluster_id;
        self.heartbeat = Time::from(welcome.heartbeat_interval_ms.max(50));
        self.welcomed = true;
        self.acknowledged(welcome.acknowledged);
        self.outbox.say_again();
        for message in self.rendezvous.again() {
            self.send(message);
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
            Notice::Loading(loading) => engine.loading = loading,
            Notice::Joining(epoch) => {
                engine.begun = true;
                if epoch == engine.epoch() {
                    engine.told_at = None;
                }
            }
            Notice::Ready(ready) if ready.epoch == engine.epoch() => {
                engine.ready = true;
                let report = engine_report::Report::Ready(ready.engine.unwrap_or_default());
                self.outbox.report(attach_request::Message::Engine(of_engine(key, ready.epoch, report)));
                self.hand_on();
            }
            Notice::Failed(failed) if failed.epoch == engine.epoch() => {
                let cause = failed.cause();
                engine.ready = false;
                // Most go on in another group. One that ends says why, as does one that cannot, and is to be told of no group any more.
                let ends = matches!(cause, EngineLossCause::Exited | EngineLossCause::Hung);
                let (cause, message) = (cause.into(), failed.message);
                self.lost(key, v1::EngineLost { cause, message, alive: !ends }, now);
                if ends {
                    self.engines.kill(key, &mut self.actions);
                }
            }
            Notice::Ready(_) | Notice::Failed(_) => {}
            Notice::Job(report) => {
                self.jobs.heard(&report);
                self.outbox.report(attach_request::Message::Job(report));
            }
            Notice::Saved(saved) => self.saved(key, saved),
            Notice::Log(log) => self.log(key, log.job, log.line.unwrap_or_default()),
            Notice::Put(put) => {
                self.rendezvous.put(put.clone());
                self.send(attach_request::Message::RendezvousPut(put));
            }
            Notice::Get(get) => {
                self.rendezvous.get(get.clone());
                self.send(attach_request::Message::RendezvousGet(get));
            }
        }
    }

    fn saved(&mut self, key: &Key, saved: crate::frames::Saved) {
        let Some(report) = saved.report else { return };
        let job = (report.job.clone(), report.attempt);
        self.outbox.hold(job.clone(), attach_request::Message::Job(report), saved.dir);
        for (step, dir) in self.outbox.drop_old(&job, self.jobs.keep(&job)) {
            let text = format!(
                "the checkpoint of step {step} was dropped before it was stored, for newer ones wait as well: have the job save less often, or see why storing takes so long"
            );
            self.warn(key, job.0.clone(), text);
            self.act(Action::Remove(dir));
        }
        self.store_next();
    }

    /// Has the files of checkpoints stored whose turn it is.
    fn store_next(&mut self) {
        for ToStore { ticket, report, dir } in self.outbox.begin() {
            self.store(ticket, report, dir);
        }
    }

    /// Has the files of a checkpoint stored whose report this is.
    fn store(&mut self, ticket: u64, report: v1::JobReport, dir: String) {
        let files = match &report.report {
            Some(v1::job_report::Report::Saved(saved)) => saved.files.clone(),
            _ => Vec::new(),
        };
        let of = Box::new(v1::JobReport { report: None, ..report });
        self.act(Action::Store { ticket, files, dir, of });
    }

    /// Has the files of the first checkpoint that the coordinator has not acknowledged stored again: its store has lost one since.
    fn store_again(&mut self) {
        if let Some((report, dir)) = self.outbox.first_checkpoint().filter(|_| !self.storing_again) {
            self.storing_again = true;
            self.store(AGAIN, report, dir);
        }
    }

    fn stored(&mut self, ticket: u64, stored: Result<(), String>) {
        match stored {
            _ if ticket == AGAIN => self.storing_again = false,
            Ok(()) => self.outbox.release(ticket),
            Err(why) => self.outbox.replace(ticket, &why),
        }
        self.store_next();
    }

    /// Says in a job's log why it does not get on.
    fn delayed(&mut self, job: &FileKey, Delay { unsaved, text }: Delay) {
        if unsaved {
            self.outbox.fails(job);
        }
        let Some(backbone) = self.jobs.backbone_of(job) else { return };
        let key = Key { backbone: backbone.to_owned(), rank: 0 };
        self.warn(&key, job.0.clone(), text);
    }

    /// Says something in the log of a job, or of an engine's backbone.
    fn warn(&mut self, key: &Key, job: String, text: String) {
        self.log(key, job, v1::LogLine { level: "WARN".to_owned(), text, ..v1::LogLine::default() });
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
            self.report_lost(key, engine.epoch(), lost, now);
        }
        self.engines.reconcile(now, &mut self.actions);
    }

    fn lost(&mut self, key: &Key, lost: v1::EngineLost, now: Time) {
        let Some(engine) = self.engines.get_mut(key) else { return };
        engine.lost = true;
        let epoch = engine.epoch();
        self.report_lost(key, epoch, lost, now);
    }

    fn report_lost(&mut self, key: &Key, epoch: u64, lost: v1::EngineLost, now: Time) {
        self.outbox.lose(of_engine(key, epoch, engine_report::Report::Lost(lost)), now);
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
            self.lost(&key, hung(message), now);
            self.engines.kill(&key, &mut self.actions);
        }
        for (key, begun) in self.engines.stuck(now) {
            let silent = STUCK_AFTER as f64 / 1e3;
            if !begun {
                let message =
                    format!("the engine of rank {} did not begin for {silent} s and was killed", key.rank);
                self.lost(&key, hung(message), now);
                self.engines.kill(&key, &mut self.actions);
                continue;
            }
            let text = format!(
                "the engine did not leave its old group for {silent} s and is started again: it waits for ranks that are gone"
            );
            self.warn(&key, String::new(), text);
            self.engines.restart(&key, &mut self.actions);
        }
        for (key, text) in self.engines.overdue(now) {
            tracing::warn!("{}: {text}", key.backbone);
            self.warn(&key, String::new(), text);
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
        let Some(since) = self.ending.filter(|_| !self.over) else { return };
        let idle = self.engines.all().is_empty() || (!self.welcomed && self.jobs.are_none());
        let done = idle && self.outbox.is_empty();
        if done || now >= since + self.config.drain {
            self.exit();
        }
    }

    fn exit(&mut self) {
        self.end_engines();
        self.act(Action::Exit);
    }

    /// The coordinator takes nothing from this agent any more. What its engines do counts for nobody, and others may want their devices.
    fn give_up(&mut self, why: String) {
        if !self.over {
            self.end_engines();
            self.act(Action::GiveUp(why));
        }
    }

    fn end_engines(&mut self) {
        self.over = true;
        self.engines.end(&mut self.actions);
    }

    /// Sends what can be sent.
    fn flush(&mut self) {
        if self.welcomed {
            let ready: VecDeque<AttachRequest> = self.outbox.take_unsent();
            self.actions.extend(ready.into_iter().map(Action::Send));
        }
    }
}

fn hung(message: String) -> v1::EngineLost {
    v1::EngineLost { cause: EngineLossCause::Hung.into(), message, alive: false }
}

fn of_engine(key: &Key, epoch: u64, report: engine_report::Report) -> v1::EngineReport {
    v1::EngineReport { backbone: key.backbone.clone(), epoch, rank: key.rank, report: Some(report) }
}
