//! Engines: processes that load, meet the others of their group, and end, hang or lose the others.

use std::collections::{BTreeMap, VecDeque};

use incipit_proto::v1::{self, EngineLossCause};
use incipit_worker::agent::Key;
use incipit_worker::agent::core::Input;
use incipit_worker::frames::{Failed, Join, Notice, Order, Ready};

use crate::simulation::leader::Leader;
use crate::simulation::world::{Event, Machine, Time, World};

/// A process. None is used twice.
pub(crate) type Pid = u64;

/// How often an engine says that it lives.
const ALIVE: Time = 500;

/// How far an engine has come in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It waits for a group.
    Idle,
    Loading,
    Meeting,
    Ready,
}

/// An engine's process.
pub(crate) struct Engine {
    pub(crate) machine: Machine,
    pub(crate) incarnation: u64,
    pub(crate) key: Key,
    pub(crate) hung: bool,
    pub(crate) epoch: u64,
    /// Counts its groups, and their ends.
    pub(crate) group: u64,
    pub(crate) stage: Stage,
    pub(crate) leader: Leader,
    /// Ranks that are processes.
    world: u64,
    loaded: bool,
    progress: u64,
    peers: BTreeMap<u32, Pid>,
    orders: VecDeque<Order>,
    /// The group that is to come once it has loaded.
    next: Option<Join>,
    said: VecDeque<Said>,
}

/// What comes out of a process.
enum Said {
    Notice(Box<Notice>),
    Ended,
}

impl World {
    pub(crate) fn start_engine(&mut self, machine: Machine, key: Key) {
        let pid = self.id();
        let agent = &mut self.agents[machine];
        if let Some(old) = agent.processes.insert(key.clone(), pid) {
            self.broken("S8 (one process a rank)", || {
                format!("{key:?} is started on w{machine} beside {old}")
            });
        }
        let engine = Engine {
            machine,
            incarnation: self.agents[machine].incarnation,
            key,
            hung: false,
            epoch: 0,
            group: 0,
            stage: Stage::Idle,
            leader: Leader::default(),
            world: 1,
            loaded: false,
            progress: 0,
            peers: BTreeMap::new(),
            orders: VecDeque::new(),
            next: None,
            said: VecDeque::new(),
        };
        self.engines.insert(pid, engine);
        self.soon(5, 100, Event::EngineLives(pid));
    }

    /// Who reads a pipe has other things to do, too.
    fn pipe_delay(&mut self) -> Time {
        if self.faulty && self.chance.one_in(16) { self.chance.below(300) } else { self.chance.below(3) }
    }

    /// An agent orders an engine to do something.
    pub(crate) fn order(&mut self, machine: Machine, key: &Key, order: Order) {
        let Some(pid) = self.agents[machine].processes.get(key).copied() else { return };
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        engine.orders.push_back(order);
        let delay = self.pipe_delay();
        self.later(delay, Event::EngineHears(pid));
    }

    /// An engine says something to its agent.
    pub(crate) fn notice(&mut self, pid: Pid, notice: Notice) {
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        engine.said.push_back(Said::Notice(Box::new(notice)));
        let delay = self.pipe_delay();
        self.later(delay, Event::EngineIsHeard(pid));
    }

    pub(crate) fn engine_is_heard(&mut self, pid: Pid) {
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        let (machine, incarnation, key) = (engine.machine, engine.incarnation, engine.key.clone());
        let Some(said) = engine.said.pop_front() else { return };
        let ended = matches!(said, Said::Ended);
        if ended {
            self.engines.remove(&pid);
        }
        if self.agents[machine].incarnation != incarnation || self.agents[machine].core.is_none() {
            return;
        }
        if ended {
            self.agents[machine].processes.remove(&key);
        }
        let input = match said {
            Said::Notice(notice) => Input::Notice(key, *notice),
            Said::Ended => Input::Ended(key, format!("process {pid}: signal 9")),
        };
        self.tell_agent(machine, input);
    }

    pub(crate) fn engine_lives(&mut self, pid: Pid) {
        let Some(engine) = self.alive(pid).filter(|engine| !engine.hung) else { return };
        let progress = engine.progress;
        self.notice(pid, Notice::Alive(progress));
        self.later(ALIVE, Event::EngineLives(pid));
    }

    /// A process that has not ended.
    pub(crate) fn alive(&self, pid: Pid) -> Option<&Engine> {
        self.engines.get(&pid).filter(|engine| !engine.said.iter().any(|said| matches!(said, Said::Ended)))
    }

    pub(crate) fn engine_dies(&mut self, pid: Pid) {
        if self.alive(pid).is_none() {
            return;
        }
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        engine.orders.clear();
        engine.said.push_back(Said::Ended);
        engine.group += 1;
        self.leave_group(pid);
        self.soon(0, 20, Event::EngineIsHeard(pid));
    }

    pub(crate) fn engine_hears(&mut self, pid: Pid) {
        if self.alive(pid).is_none_or(|engine| engine.hung) {
            return;
        }
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        let Some(order) = engine.orders.pop_front() else { return };
        match order {
            // What it loads is for the next group as well.
            Order::Join(join) if engine.stage == Stage::Loading => {
                let epoch = join.assignment.as_ref().map_or(0, |assignment| assignment.epoch);
                engine.next = Some(join);
                self.notice(pid, Notice::Joining(epoch));
            }
            Order::Join(join) => self.join(pid, join),
            Order::Jobs(jobs) => self.take_jobs(pid, jobs),
            Order::Rendezvous(value) => self.meet(pid, &value),
        }
    }

    fn join(&mut self, pid: Pid, join: Join) {
        let Some(assignment) = join.assignment else { return };
        self.leave_group(pid);
        let others = self.engines.iter().filter(|(other, engine)| {
            **other != pid && engine.key == self.engines[&pid].key && engine.epoch == assignment.epoch
        });
        if let Some(other) = others.map(|(other, _)| *other).find(|other| self.alive(*other).is_some()) {
            self.broken("S8 (one process a rank and epoch)", || {
                format!("{pid} and {other} have {assignment:?}")
            });
        }
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        engine.world =
            if assignment.collective == "local" { 1 } else { u64::from(assignment.dp * assignment.tp) };
        (engine.epoch, engine.stage) = (assignment.epoch, Stage::Loading);
        engine.group += 1;
        engine.peers.clear();
        engine.leader = Leader::default();
        let (group, loaded) = (engine.group, engine.loaded);
        let took =
            if loaded { self.chance.between(5, 50) } else { self.chance.between(100, self.longest_load) };
        self.notice(pid, Notice::Joining(assignment.epoch));
        self.later(took, Event::EngineLoads(pid, group));
    }

    /// An engine that is in this group of its own still, and works.
    pub(crate) fn in_group(&self, pid: Pid, group: u64) -> Option<&Engine> {
        self.alive(pid).filter(|engine| engine.group == group && !engine.hung)
    }

    pub(crate) fn engine_loads(&mut self, pid: Pid, group: u64) {
        if self.in_group(pid, group).is_none() {
            return;
        }
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        (engine.loaded, engine.stage) = (true, Stage::Meeting);
        if let Some(next) = engine.next.take() {
            return self.join(pid, next);
        }
        let (world, epoch, rank) = (engine.world, engine.epoch, engine.key.rank);
        let backbone = engine.key.backbone.clone();
        if world == 1 {
            return self.later(1, Event::EngineMeets(pid, group));
        }
        let value = pid.to_string().into_bytes().into();
        let put = v1::RendezvousPut { backbone: backbone.clone(), epoch, key: format!("rank{rank}"), value };
        self.notice(pid, Notice::Put(put));
        for other in (0..world as u32).filter(|other| *other != rank) {
            let key = format!("rank{other}");
            let (backbone, follow) = (backbone.clone(), false);
            self.notice(pid, Notice::Get(v1::RendezvousGet { backbone, epoch, key, follow }));
        }
    }

    /// An engine learns where another one of its group is.
    fn meet(&mut self, pid: Pid, value: &v1::RendezvousValue) {
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        let rank = value.key.strip_prefix("rank").and_then(|rank| rank.parse().ok());
        let other = std::str::from_utf8(&value.value).ok().and_then(|pid| pid.parse().ok());
        let (Some(rank), Some(other)) = (rank, other) else { return };
        // Engines of one machine hear what any of them has asked for.
        if engine.epoch != value.epoch || engine.stage != Stage::Meeting || engine.key.rank == rank {
            return;
        }
        engine.peers.insert(rank, other);
        let (complete, group) = (engine.peers.len() as u64 + 1 == engine.world, engine.group);
        if !complete {
            return;
        }
        let members = self.members(pid);
        let met = |other: &Pid| self.alive(*other).is_some_and(|engine| engine.epoch == value.epoch);
        if !members.iter().all(met) {
            // Nobody answers there.
            return self.soon(50, 500, Event::GroupFails(pid, group));
        }
        let waits = |other: &Pid| {
            self.engines[other].stage == Stage::Meeting && self.members(*other).len() == members.len()
        };
        if members.iter().all(waits) {
            for member in members {
                let group = self.engines[&member].group;
                self.soon(1, 50, Event::EngineMeets(member, group));
            }
        }
    }

    /// An engine and the others that it has met.
    pub(crate) fn members(&self, pid: Pid) -> Vec<Pid> {
        let peers = self.engines.get(&pid).map(|engine| engine.peers.values().copied());
        peers.into_iter().flatten().chain([pid]).collect()
    }

    pub(crate) fn engine_meets(&mut self, pid: Pid, group: u64) {
        let Some(engine) = self.in_group(pid, group).filter(|engine| engine.stage == Stage::Meeting) else {
            return;
        };
        let (epoch, leads) = (engine.epoch, engine.key.rank == 0);
        if !self
            .members(pid)
            .iter()
            .all(|other| self.alive(*other).is_some_and(|engine| engine.epoch == epoch))
        {
            return self.soon(50, 500, Event::GroupFails(pid, group));
        }
        if let Some(engine) = self.engines.get_mut(&pid) {
            engine.stage = Stage::Ready;
            self.oracle.ready.insert((engine.key.backbone.clone(), epoch, engine.key.rank));
        }
        let engine =
            v1::EngineReady { pid: pid as u32, fingerprint: "t5".to_owned(), ..v1::EngineReady::default() };
        self.notice(pid, Notice::Ready(Ready { epoch, engine: Some(engine) }));
        if leads {
            self.later(1, Event::EngineTurns(pid, group));
        }
    }

    /// The others of a group notice, some time, that one of them is gone.
    fn leave_group(&mut self, pid: Pid) {
        let Some(engine) = self.engines.get(&pid) else { return };
        let (backbone, epoch) = (engine.key.backbone.clone(), engine.epoch);
        let others = self.engines.iter().filter(|(other, engine)| {
            **other != pid
                && (&engine.key.backbone, engine.epoch) == (&backbone, epoch)
                && engine.peers.values().any(|peer| *peer == pid)
        });
        let others: Vec<(Pid, u64)> = others.map(|(other, engine)| (*other, engine.group)).collect();
        for (other, group) in others {
            self.soon(20, 1_500, Event::GroupFails(other, group));
        }
    }

    pub(crate) fn group_fails(&mut self, pid: Pid, group: u64) {
        if self.in_group(pid, group).is_some_and(|engine| engine.stage != Stage::Idle) {
            self.engine_fails(pid, EngineLossCause::GroupFailed, "the group is gone");
        }
    }

    /// An engine says that it goes on in its group no more.
    pub(crate) fn engine_fails(&mut self, pid: Pid, cause: EngineLossCause, message: &str) {
        self.leave_group(pid);
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        if let Some(next) = engine.next.take() {
            // It tries again for that one, and says nothing of the one before.
            return self.join(pid, next);
        }
        engine.stage = Stage::Idle;
        engine.group += 1;
        engine.peers.clear();
        engine.leader = Leader::default();
        let (epoch, cause, message) = (engine.epoch, cause.into(), message.to_owned());
        self.oracle.failed.insert((engine.key.backbone.clone(), epoch));
        self.notice(pid, Notice::Failed(Failed { epoch, cause, message }));
    }

    /// A turn of the whole group was made.
    pub(crate) fn advance(&mut self, pid: Pid) {
        if let Some(engine) = self.engines.get_mut(&pid) {
            engine.progress += 1;
        }
    }
}
