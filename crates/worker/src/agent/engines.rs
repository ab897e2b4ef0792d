//! The engines of a machine: those that it is to have, and those that it has.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use incipit_proto::v1::{EngineAssignment, EngineAssignments, EngineStatus};

use crate::agent::core::{Action, Config, HUNG_AFTER, STUCK_AFTER, Time};
use crate::frames::{Join, Loading, Order};

/// From the kill of an engine that does not end to the first word about it, in milliseconds; later ones come at growing intervals.
const OVERDUE: Time = 5_000;
/// The longest such interval.
const LONGEST: Time = 600_000;

/// Names an engine's process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// `backbones/{backbone}`.
    pub backbone: String,
    /// Its rank; of ranks that are threads of one process, the first.
    pub rank: u32,
}

/// An engine's process.
#[derive(Clone, Debug)]
pub struct Engine {
    /// What it was told last.
    pub assignment: EngineAssignment,
    /// The number of its GPU, or of the first of several; of no meaning on CPUs.
    pub local_rank: u32,
    /// Whether it has loaded and met the others of its group.
    pub ready: bool,
    /// Whether the coordinator was told that it is of no use in its epoch.
    pub lost: bool,
    /// Whether it was killed, and will end.
    pub dying: bool,
    /// The number of its process, once it is known; 0 until then.
    pub pid: u32,
    /// Of one that is dying: since when, and when that is to be told.
    overdue: Option<(Time, Time)>,
    /// Plans carried out.
    pub progress: u64,
    /// How far it has loaded.
    pub loading: Loading,
    /// When it last said that it is alive.
    pub alive_at: Time,
    /// Since when it is to join a group that it has not begun to join.
    pub told_at: Option<Time>,
    /// Whether it has begun to join any group.
    pub begun: bool,
    /// Whether it was killed to be started again in the epoch that it has not begun to join.
    pub again: bool,
    /// The last line that it wrote to standard error.
    pub last_words: String,
}

impl Engine {
    /// Epoch of its group.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.assignment.epoch
    }

    /// What is to be said where it has not ended so many seconds after it was killed.
    fn outlasts(&self, rank: u32, seconds: u64) -> String {
        let gpus: Vec<String> = gpus(&self.assignment, self.local_rank).map(|gpu| gpu.to_string()).collect();
        let held = if gpus.is_empty() { String::new() } else { format!(" (of GPU {})", gpus.join(", ")) };
        format!(
            "kill -9 was sent to the engine of rank {rank} {seconds} s ago, and process {} has not ended: its place{held} is held back; \
             see what the process waits for (`cat /proc/{0}/stack`, `nvidia-smi`), or restart the machine",
            self.pid
        )
    }
}

/// The engines.
#[derive(Debug)]
pub(crate) struct Engines {
    outbox: String,
    address: String,
    wanted: BTreeMap<Key, EngineAssignment>,
    running: BTreeMap<Key, Engine>,
    /// Engines that have ended in this epoch: started again under a new one only.
    ended: BTreeSet<(Key, u64)>,
    /// GPUs of the machine.
    gpus: u32,
}

impl Engines {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            outbox: config.outbox.clone(),
            address: config.address.clone(),
            wanted: BTreeMap::new(),
            running: BTreeMap::new(),
            ended: BTreeSet::new(),
            gpus: config.machine.gpus.len() as u32,
        }
    }

    pub(crate) fn all(&self) -> &BTreeMap<Key, Engine> {
        &self.running
    }

    pub(crate) fn get_mut(&mut self, key: &Key) -> Option<&mut Engine> {
        self.running.get_mut(key)
    }

    /// Engines of a group on this machine.
    pub(crate) fn of_group(&self, backbone: &str, epoch: u64) -> Vec<Key> {
        let of_group = |(key, engine): &(&Key, &Engine)| key.backbone == backbone && engine.epoch() == epoch;
        self.running.iter().filter(of_group).map(|(key, _)| key.clone()).collect()
    }

    /// Takes the list of engines that this machine is to have.
    pub(crate) fn assign(&mut self, assignments: EngineAssignments, now: Time, actions: &mut Vec<Action>) {
        self.wanted.clear();
        for assignment in assignments.engines {
            let processes = if assignment.collective == "local" { 1 } else { assignment.ranks.len() };
            for rank in assignment.ranks.iter().take(processes) {
                let key = Key { backbone: assignment.backbone.clone(), rank: *rank };
                self.wanted.insert(key, assignment.clone());
            }
        }
        let wanted = &self.wanted;
        self.ended.retain(|(key, epoch)| wanted.get(key).is_some_and(|wanted| wanted.epoch == *epoch));
        self.reconcile(now, actions);
    }

    /// Starts what is to run and does not, ends what is not to run, and has engines join their new groups.
    pub(crate) fn reconcile(&mut self, now: Time, actions: &mut Vec<Action>) {
        let unwanted: Vec<Key> =
            self.running.keys().filter(|key| !self.wanted.contains_key(*key)).cloned().collect();
        for key in unwanted {
            self.kill(&key, actions);
        }
        let wanted: Vec<(Key, EngineAssignment)> =
            self.wanted.iter().map(|(key, assignment)| (key.clone(), assignment.clone())).collect();
        for (key, assignment) in wanted {
            match self.running.get(&key) {
                None if self.ended.contains(&(key.clone(), assignment.epoch)) => {}
                None => self.start(&key, &assignment, now, actions),
                Some(engine) if engine.dying || engine.assignment == assignment => {}
                Some(engine) if can_join(&engine.assignment, &assignment) => {
                    self.join(&key, assignment, now, actions);
                }
                Some(_) => self.kill(&key, actions),
            }
        }
    }

    fn start(&mut self, key: &Key, assignment: &EngineAssignment, now: Time, actions: &mut Vec<Action>) {
        let Some(local_rank) = self.free_gpus(assignment) else { return };
        let engine = Engine {
            assignment: assignment.clone(),
            local_rank,
            ready: false,
            lost: false,
            dying: false,
            pid: 0,
            overdue: None,
            progress: 0,
            loading: Loading::default(),
            alive_at: now,
            told_at: None,
            begun: false,
            again: false,
            last_words: String::new(),
        };
        self.running.insert(key.clone(), engine);
        actions.push(Action::Start(key.clone()));
        self.join(key, assignment.clone(), now, actions);
    }

    /// The first of as many GPUs in a row as the assignment needs and no engine has. One that is dying has its own, and their memory, until it
    /// has ended: where the machine has no others, nothing.
    fn free_gpus(&self, assignment: &EngineAssignment) -> Option<u32> {
        if gpus(assignment, 0).is_empty() {
            return Some(0);
        }
        let of = |engine: &Engine| gpus(&engine.assignment, engine.local_rank);
        let used: BTreeSet<u32> = self.running.values().flat_map(of).collect();
        let first = (0..).find(|first| gpus(assignment, *first).all(|gpu| !used.contains(&gpu)))?;
        let some_come_free = self.running.values().any(|engine| engine.dying && !of(engine).is_empty());
        let is_beyond = gpus(assignment, first).end > self.gpus;
        (!(is_beyond && some_come_free)).then_some(first)
    }

    /// An engine's process was started.
    pub(crate) fn started(&mut self, key: &Key, pid: u32) {
        if let Some(engine) = self.running.get_mut(key) {
            engine.pid = pid;
        }
    }

    fn join(&mut self, key: &Key, assignment: EngineAssignment, now: Time, actions: &mut Vec<Action>) {
        let neighbours = self.wanted.len() as u32;
        let (address, outbox) = (self.address.clone(), self.outbox.clone());
        let Some(engine) = self.running.get_mut(key) else { return };
        engine.assignment = assignment.clone();
        (engine.ready, engine.lost, engine.alive_at) = (false, false, now);
        engine.told_at = Some(now);
        let join = Join {
            assignment: Some(assignment),
            rank: key.rank,
            address,
            outbox,
            neighbours,
            local_rank: engine.local_rank,
        };
        actions.push(Action::Tell(key.clone(), Box::new(Order::Join(join))));
    }

    /// Kills all engines, and starts none any more.
    pub(crate) fn end(&mut self, actions: &mut Vec<Action>) {
        self.wanted.clear();
        for key in self.running.keys().cloned().collect::<Vec<_>>() {
            self.kill(&key, actions);
        }
    }

    /// Kills an engine. It is there until its process has ended.
    pub(crate) fn kill(&mut self, key: &Key, actions: &mut Vec<Action>) {
        if let Some(engine) = self.running.get_mut(key)
            && !engine.dying
        {
            (engine.dying, engine.ready, engine.lost) = (true, false, true);
            actions.push(Action::Kill(key.clone()));
        }
    }

    /// Kills an engine that does not come to its new group, and has it started again. No rank of that group is lost by this, so that the
    /// others go on waiting for it: a new epoch would leave them as stuck as it was, and so on for ever.
    pub(crate) fn restart(&mut self, key: &Key, actions: &mut Vec<Action>) {
        self.kill(key, actions);
        if let Some(engine) = self.running.get_mut(key) {
            engine.again = true;
        }
    }

    /// An engine's process has ended.
    pub(crate) fn ended(&mut self, key: &Key) -> Option<Engine> {
        let engine = self.running.remove(key)?;
        if !engine.again {
            self.ended.insert((key.clone(), engine.epoch()));
        }
        Some(engine)
    }

    /// What is to be said of engines that were killed long ago and have not ended, each time that their wait has doubled.
    pub(crate) fn overdue(&mut self, now: Time) -> Vec<(Key, String)> {
        let mut told = Vec::new();
        for (key, engine) in self.running.iter_mut().filter(|(_, engine)| engine.dying) {
            let (since, due) = *engine.overdue.get_or_insert((now, now + OVERDUE));
            if now >= due {
                let lasts = now - since;
                engine.overdue = Some((since, now + lasts.min(LONGEST)));
                told.push((key.clone(), engine.outlasts(key.rank, lasts / 1000)));
            }
        }
        told
    }

    /// Engines that gave no sign of life for too long.
    pub(crate) fn hung(&self, now: Time) -> Vec<Key> {
        let hung = |(_, engine): &(&Key, &Engine)| !engine.dying && now > engine.alive_at + HUNG_AFTER;
        self.running.iter().filter(hung).map(|(key, _)| key.clone()).collect()
    }

    /// Engines that wait for ranks of a group that is no more, and do not come to the new one; and whether they have begun at all.
    pub(crate) fn stuck(&self, now: Time) -> Vec<(Key, bool)> {
        let stuck = |(_, engine): &(&Key, &Engine)| {
            !engine.dying && engine.told_at.is_some_and(|told| now > told + STUCK_AFTER)
        };
        self.running.iter().filter(stuck).map(|(key, engine)| (key.clone(), engine.begun)).collect()
    }

    /// Nobody could have been heard until now.
    pub(crate) fn forgive(&mut self, now: Time) {
        for engine in self.running.values_mut() {
            engine.alive_at = now;
            engine.told_at = engine.told_at.map(|_| now);
        }
    }

    pub(crate) fn status(&self) -> Vec<EngineStatus> {
        let status = |(key, engine): (&Key, &Engine)| EngineStatus {
            backbone: key.backbone.clone(),
            epoch: engine.epoch(),
            rank: key.rank,
            ready: engine.ready,
            progress: engine.progress,
            loaded_bytes: engine.loading.loaded,
            total_bytes: engine.loading.total,
        };
        self.running.iter().filter(|(_, engine)| !engine.dying).map(status).collect()
    }
}

/// The numbers of the GPUs of an engine that has them from `first` on.
fn gpus(assignment: &EngineAssignment, first: u32) -> Range<u32> {
    match &*assignment.device {
        "cuda" if assignment.collective == "local" => first..first + assignment.ranks.len() as u32,
        "cuda" => first..first + 1,
        _ => 0..0,
    }
}

/// Whether an engine can go on under another assignment with the weights that it has.
fn can_join(was: &EngineAssignment, now: &EngineAssignment) -> bool {
    let (epoch, ranks, dp) = (was.epoch, was.ranks.clone(), was.dp);
    let same = EngineAssignment { epoch, ranks, dp, ..now.clone() };
    // With ranks as threads, the process has all of them.
    same == *was && now.epoch > was.epoch && (now.collective != "local" || now.ranks == was.ranks)
}
