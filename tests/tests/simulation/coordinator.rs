//! The coordinator's process: a core and a disk. It takes what waits, writes it in one go, and only then lets anybody know. It can end
//! before it has written, or before it has said so.

use std::collections::{BTreeMap, VecDeque};

use incipit_coordinator::core::{Change, Config, Core, Effects, Input, Reply, Rows, Send, Time as CoreTime};
use incipit_proto::Problem;

use crate::simulation::client::Answer;
use crate::simulation::link::LinkId;
use crate::simulation::oracle::Stale;
use crate::simulation::world::{Event, Time, World};

/// The cluster's id.
pub(crate) const CLUSTER: &str = "simulated";
/// The system's clock when the story begins.
const BEGAN: u64 = 1_700_000_000_000;
/// Inputs of one transaction, at most.
const BATCH: usize = 256;
/// How often the core is told that time goes on.
const TICK: Time = 100;

/// An input that waits, and who waits for the answer.
pub(crate) struct Waiting {
    pub(crate) input: Input,
    pub(crate) caller: Option<(usize, u64)>,
}

/// When the process is to end by itself, in the middle of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doom {
    BeforeCommit,
    AfterCommit,
}

#[derive(Default)]
struct Batch {
    changes: Vec<Change>,
    sends: Vec<Send>,
    replies: Vec<((usize, u64), Answer)>,
    gone: Vec<u64>,
}

/// The process, and its disk.
#[derive(Default)]
pub(crate) struct Coordinator {
    pub(crate) config: Config,
    pub(crate) life: u64,
    pub(crate) core: Option<Core>,
    /// What is on the disk.
    pub(crate) rows: Rows,
    pub(crate) connections: BTreeMap<u64, LinkId>,
    pub(crate) next_connection: u64,
    /// When it last was not able to notice anything.
    pub(crate) trouble: Time,
    pub(crate) doom: Option<Doom>,
    /// How long the next commit takes besides.
    pub(crate) stall: Time,
    inbox: VecDeque<Waiting>,
    batch: Option<Batch>,
    /// How wrong the clock was when it started.
    skew: u64,
}

impl World {
    pub(crate) fn core_time(&self) -> CoreTime {
        CoreTime(BEGAN + self.now + self.coordinator.skew)
    }

    pub(crate) fn coordinator_starts(&mut self) {
        if self.coordinator.core.is_some() {
            return;
        }
        // The clock of a machine is set now and then.
        self.coordinator.skew = if self.faulty { self.chance.below(2000) } else { 0 };
        let now = self.core_time();
        let coordinator = &mut self.coordinator;
        coordinator.life += 1;
        coordinator.next_connection = 1;
        coordinator.trouble = self.now;
        coordinator.core = Some(Core::restore(coordinator.config.clone(), coordinator.rows.clone(), now));
        let life = coordinator.life;
        self.later(0, Event::CoordinatorTicks(life));
    }

    pub(crate) fn coordinator_ends(&mut self) {
        let coordinator = &mut self.coordinator;
        if coordinator.core.take().is_none() {
            return;
        }
        coordinator.inbox.clear();
        coordinator.connections.clear();
        (coordinator.batch, coordinator.doom, coordinator.stall) = (None, None, 0);
        coordinator.trouble = self.now;
        let life = coordinator.life;
        let links: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| link.life == life).map(|(id, _)| *id).collect();
        for id in links {
            self.cut_link(id);
        }
        self.soon(0, 8_000, Event::CoordinatorStarts);
    }

    pub(crate) fn coordinator_ticks(&mut self, life: u64) {
        if self.coordinator.life != life || self.coordinator.core.is_none() {
            return;
        }
        self.offer(Waiting { input: Input::Tick, caller: None });
        self.later(TICK, Event::CoordinatorTicks(life));
    }

    /// Something waits to be handled.
    pub(crate) fn offer(&mut self, waiting: Waiting) {
        if self.coordinator.core.is_none() {
            return;
        }
        self.coordinator.inbox.push_back(waiting);
        if self.coordinator.inbox.len() == 1 && self.coordinator.batch.is_none() {
            let life = self.coordinator.life;
            self.soon(0, 3, Event::Takes(life));
        }
    }

    pub(crate) fn takes(&mut self, life: u64) {
        if self.coordinator.life != life || self.coordinator.batch.is_some() {
            return;
        }
        let Some(mut core) = self.coordinator.core.take() else { return };
        let waiting = self.coordinator.inbox.len().min(BATCH);
        let count =
            if self.chance.one_in(4) { self.chance.between(1, waiting as u64 + 1) as usize } else { waiting };
        let inputs: Vec<Waiting> = self.coordinator.inbox.drain(..count).collect();
        let mut batch = Batch::default();
        for Waiting { input, caller } in inputs {
            if let Input::Disconnected { connection, .. } = &input {
                batch.gone.push(*connection);
            }
            let before = Stale::of(&core, &input);
            let Effects { changes, sends, reply } = core.handle(input, self.core_time());
            if let Some(what) = before.and_then(|stale| stale.broken_by(&changes)) {
                self.broken("S4 (what is stale has no effect)", || what);
            }
            batch.changes.extend(changes);
            batch.sends.extend(sends);
            if let (Some(caller), Some(reply)) = (caller, reply) {
                batch.replies.push((caller, answer_of(reply)));
            }
        }
        self.coordinator.core = Some(core);
        let took = if batch.changes.is_empty() { 0 } else { self.chance.between(1, 10) };
        let stall = std::mem::take(&mut self.coordinator.stall);
        self.coordinator.trouble = if stall > 0 { self.now + stall } else { self.coordinator.trouble };
        self.coordinator.batch = Some(batch);
        self.later(took + stall, Event::Commits(life));
    }

    pub(crate) fn commits(&mut self, life: u64) {
        if self.coordinator.life != life || self.coordinator.core.is_none() {
            return;
        }
        let Some(mut batch) = self.coordinator.batch.take() else { return };
        let writes = !batch.changes.is_empty();
        if writes && self.coordinator.doom == Some(Doom::BeforeCommit) {
            return self.coordinator_ends();
        }
        let changes = std::mem::take(&mut batch.changes);
        self.told.commits += u64::from(writes);
        for change in &changes {
            self.check_change(change);
            self.coordinator.rows.apply(change);
        }
        if writes {
            self.check_commit();
        }
        if writes && self.coordinator.doom == Some(Doom::AfterCommit) {
            return self.coordinator_ends();
        }
        self.coordinator.batch = Some(batch);
        self.soon(0, 2, Event::Publishes(life));
    }

    pub(crate) fn publishes(&mut self, life: u64) {
        if self.coordinator.life != life || self.coordinator.core.is_none() {
            return;
        }
        let Some(batch) = self.coordinator.batch.take() else { return };
        for send in batch.sends {
            if let Some(link) = self.coordinator.connections.get(&send.connection).copied() {
                self.push_down(link, send.message);
            }
        }
        for connection in batch.gone {
            self.coordinator.connections.remove(&connection);
        }
        for ((client, call), answer) in batch.replies {
            self.answers.insert((client, call), answer);
            self.soon(0, 100, Event::ClientIsAnswered(client, call));
        }
        if !self.coordinator.inbox.is_empty() {
            self.soon(0, 3, Event::Takes(life));
        }
    }
}

fn answer_of(reply: Result<Reply, Problem>) -> Answer {
    match reply {
        Ok(Reply::Job(view)) => Answer::Job(view.job.name, view.job.state),
        Ok(_) => Answer::Done,
        Err(problem) => Answer::Refused(problem.reason, problem.message),
    }
}
