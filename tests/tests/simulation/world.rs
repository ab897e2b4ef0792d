//! Everything there is, and what happens next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::simulation::agent::{Agent, Carry};
use crate::simulation::chance::Chance;
use crate::simulation::client::{Answer, Client};
use crate::simulation::coordinator::Coordinator;
use crate::simulation::engine::{Engine, Pid};
use crate::simulation::link::{Link, LinkId};
use crate::simulation::oracle::{Oracle, Watch};

/// Virtual milliseconds since the story began.
pub(crate) type Time = u64;
/// Which machine.
pub(crate) type Machine = usize;

/// How long a cluster has to come to rest once nothing goes wrong any more.
const PATIENCE: Time = 300_000;
/// How long it is looked at when it is at rest.
const REST: u32 = 6;

/// What happens. A number that counts up with its owner says for which life of it that is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    CoordinatorStarts,
    CoordinatorTicks(u64),
    /// It takes what waits, has written it, and lets it be known.
    Takes(u64),
    Commits(u64),
    Publishes(u64),
    /// What a connection has to carry goes out.
    Pumps(LinkId),
    ReachesCoordinator(LinkId),
    ReachesAgent(LinkId),
    CoordinatorLoses(LinkId),
    AgentLoses(LinkId),
    AgentStarts(Machine),
    AgentTicks(Machine, u64),
    AgentDials(Machine, u64),
    AgentThaws(Machine, u64),
    /// Files have arrived, or have not.
    Carries(Machine, u64, u64),
    EngineHears(Pid),
    EngineIsHeard(Pid),
    EngineLives(Pid),
    EngineLoads(Pid, u64),
    EngineMeets(Pid, u64),
    GroupFails(Pid, u64),
    EngineTurns(Pid, u64),
    EngineDies(Pid),
    ClientAsks(usize),
    /// By whom, for which of the things that it wants, in which call.
    CoordinatorIsAsked(usize, usize, u64),
    ClientIsAnswered(usize, u64),
    ClientGivesUp(usize, u64),
    Fault,
    FaultsEnd,
    Deadline(u64),
    Look,
}

/// A story's end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// Hash of all events and of what was stored in the end.
    pub(crate) trace: u64,
    pub(crate) events: u64,
    pub(crate) faults: u64,
    pub(crate) commits: u64,
    pub(crate) epochs: u64,
    pub(crate) attempts: u64,
    pub(crate) checkpoints: u64,
    pub(crate) steps: u64,
    pub(crate) losses_noticed: u64,
    pub(crate) virtual_ms: u64,
}

impl Told {
    pub(crate) fn add(&mut self, other: &Self) {
        self.trace ^= other.trace;
        self.events += other.events;
        self.faults += other.faults;
        self.commits += other.commits;
        self.epochs += other.epochs;
        self.attempts += other.attempts;
        self.checkpoints += other.checkpoints;
        self.steps += other.steps;
        self.losses_noticed += other.losses_noticed;
        self.virtual_ms += other.virtual_ms;
    }
}

/// Everything there is.
pub(crate) struct World {
    pub(crate) now: Time,
    pub(crate) chance: Chance,
    /// Whether things go wrong by chance.
    pub(crate) faulty: bool,
    pub(crate) coordinator: Coordinator,
    pub(crate) agents: Vec<Agent>,
    pub(crate) links: BTreeMap<LinkId, Link>,
    pub(crate) engines: BTreeMap<Pid, Engine>,
    pub(crate) clients: Vec<Client>,
    pub(crate) answers: BTreeMap<(usize, u64), Answer>,
    pub(crate) carries: BTreeMap<u64, Carry>,
    pub(crate) watches: BTreeMap<u64, Watch>,
    /// Prompts by the names of their blobs: of what job's seed, after how many steps, and what.
    pub(crate) made: BTreeMap<String, (u64, u64, u64)>,
    /// Blobs that the coordinator has.
    pub(crate) blobs: BTreeSet<String>,
    pub(crate) oracle: Oracle,
    pub(crate) told: Told,
    /// What did not hold, first.
    pub(crate) broken: Option<String>,
    pub(crate) faults_end: Time,
    /// How long a model takes to load, at most.
    pub(crate) longest_load: Time,
    next_id: u64,
    at_rest: u32,
    queue: BinaryHeap<Reverse<(Time, u64, Slot)>>,
    queued: u64,
    hasher: DefaultHasher,
    print: bool,
}

/// An event in the queue, whose order is not its own.
#[derive(Debug, PartialEq, Eq)]
struct Slot(Event);

impl PartialOrd for Slot {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Slot {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

impl World {
    pub(crate) fn new(seed: u64, print: bool) -> Self {
        let mut world = Self {
            now: 0,
            chance: Chance::new(seed),
            faulty: !seed.is_multiple_of(10),
            coordinator: Coordinator::default(),
            agents: Vec::new(),
            links: BTreeMap::new(),
            engines: BTreeMap::new(),
            clients: Vec::new(),
            answers: BTreeMap::new(),
            carries: BTreeMap::new(),
            watches: BTreeMap::new(),
            made: BTreeMap::new(),
            blobs: BTreeSet::new(),
            oracle: Oracle::default(),
            told: Told::default(),
            broken: None,
            faults_end: 0,
            longest_load: 2_000,
            next_id: 0,
            at_rest: 0,
            queue: BinaryHeap::new(),
            queued: 0,
            hasher: DefaultHasher::new(),
            print,
        };
        world.set_up();
        world
    }

    /// A number that nothing else has.
    pub(crate) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Something will happen in so many milliseconds.
    pub(crate) fn later(&mut self, delay: Time, event: Event) {
        self.queued += 1;
        self.queue.push(Reverse((self.now + delay, self.queued, Slot(event))));
    }

    /// A delay from `low` to `high` milliseconds, without that.
    pub(crate) fn soon(&mut self, low: Time, high: Time, event: Event) {
        let delay = self.chance.between(low, high);
        self.later(delay, event);
    }

    /// Says what happens, to whoever reads the story.
    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.print {
            println!("{:>8} {}", self.now, what());
        }
    }

    /// Something does not hold.
    pub(crate) fn broken(&mut self, invariant: &str, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(format!("at {} ms {invariant} is broken: {}", self.now, what()));
        }
    }

    /// Tells the story to its end.
    pub(crate) fn tell(mut self) -> Result<Told, String> {
        while let Some(Reverse((time, _, Slot(event)))) = self.queue.pop() {
            self.now = time;
            self.told.events += 1;
            (time, &event).hash(&mut self.hasher);
            if !matches!(event, Event::CoordinatorTicks(_) | Event::AgentTicks(..) | Event::EngineLives(_)) {
                self.say(|| format!("{event:?}"));
            }
            let end = event == Event::Look && self.look();
            if event != Event::Look {
                self.happens(event);
            }
            if let Some(broken) = self.broken {
                return Err(broken);
            }
            if end {
                format!("{:?}", self.coordinator.rows).hash(&mut self.hasher);
                self.told.trace = self.hasher.finish();
                self.told.virtual_ms = self.now;
                return Ok(self.told);
            }
        }
        Err("nothing happens any more".to_owned())
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::CoordinatorStarts => self.coordinator_starts(),
            Event::CoordinatorTicks(life) => self.coordinator_ticks(life),
            Event::Takes(life) => self.takes(life),
            Event::Commits(life) => self.commits(life),
            Event::Publishes(life) => self.publishes(life),
            Event::Pumps(link) => self.pumps(link),
            Event::ReachesCoordinator(link) => self.reaches_coordinator(link),
            Event::ReachesAgent(link) => self.reaches_agent(link),
            Event::CoordinatorLoses(link) => self.coordinator_loses(link),
            Event::AgentLoses(link) => self.agent_loses(link),
            Event::AgentStarts(machine) => self.agent_starts(machine),
            Event::AgentTicks(machine, incarnation) => self.agent_ticks(machine, incarnation),
            Event::AgentDials(machine, incarnation) => self.agent_dials(machine, incarnation),
            Event::AgentThaws(machine, incarnation) => self.agent_thaws(machine, incarnation),
            Event::Carries(machine, incarnation, carry) => self.carries(machine, incarnation, carry),
            Event::EngineHears(pid) => self.engine_hears(pid),
            Event::EngineIsHeard(pid) => self.engine_is_heard(pid),
            Event::EngineLives(pid) => self.engine_lives(pid),
            Event::EngineLoads(pid, group) => self.engine_loads(pid, group),
            Event::EngineMeets(pid, group) => self.engine_meets(pid, group),
            Event::GroupFails(pid, group) => self.group_fails(pid, group),
            Event::EngineTurns(pid, group) => self.engine_turns(pid, group),
            Event::EngineDies(pid) => self.engine_dies(pid),
            Event::ClientAsks(client) => self.client_asks(client),
            Event::CoordinatorIsAsked(client, at, call) => self.coordinator_is_asked(client, at, call),
            Event::ClientIsAnswered(client, call) => self.client_is_answered(client, call),
            Event::ClientGivesUp(client, call) => self.client_gives_up(client, call),
            Event::Fault => self.fault(),
            Event::FaultsEnd => self.faults_end(),
            Event::Deadline(watch) => self.deadline(watch),
            Event::Look => {}
        }
    }

    /// Looks whether all has come to rest. Whether the story is over.
    fn look(&mut self) -> bool {
        let unrest = self.unrest();
        self.at_rest = if unrest.is_none() { self.at_rest + 1 } else { 0 };
        if self.at_rest >= REST {
            self.check_end();
            return true;
        }
        if let Some(unrest) = unrest.filter(|_| self.now > self.faults_end + PATIENCE) {
            self.broken("S2 (all ends as asked)", || unrest);
        }
        self.later(1000, Event::Look);
        false
    }
}
