//! What the coordinator decides: a state machine without clock, disk, network or chance. The shell hands it one input after the
//! other, writes the changes it answers with, and only then sends what it wants sent.

pub mod backbone;
pub mod checkpoint;
pub mod effects;
pub mod input;
pub mod job;
pub mod page;
pub mod placement;
pub mod read;
pub mod rows;
pub mod suspects;
pub mod time;
pub mod transitions;
pub mod worker;

mod backbones;
mod checkpoints;
mod jobs;
mod presence;
mod queue;
mod rendezvous;
mod replicas;
mod reports;
mod requests;
mod retention;
mod sends;
mod updates;
mod workers;

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use incipit_proto::{
    names::{BackboneName, JobName, WorkerName},
    v1::{BackboneState, EventKind},
};

pub use self::{
    backbone::{Backbone, BackboneSpec},
    checkpoint::{Checkpoint, PromptVersion},
    effects::{Change, Effects, Reply, Resource, Send, Stamp, ToAgent},
    input::{AgentMessage, Hello, Input, Request, RequestKey},
    job::Job,
    page::{Page, paginate},
    read::{BackboneView, JobView, WorkerView},
    rows::Rows,
    time::Time,
    worker::{Worker, WorkerReports},
};
use self::{
    presence::{Presence, Progress, Rate},
    rendezvous::Rendezvous,
};

/// What the coordinator is told about its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Milliseconds from one heartbeat of a worker to the next.
    pub heartbeat_interval_ms: u32,
    /// Milliseconds without a message after which a worker is taken for lost.
    pub lease_ms: u32,
    /// Milliseconds that workers have besides, to come back after a restart of the coordinator.
    pub restart_grace_ms: u64,
    /// Milliseconds for which a request that is sent again has no further effect.
    pub request_ttl_ms: u64,
    /// Milliseconds after which a lost worker is forgotten.
    pub worker_ttl_ms: u64,
    /// Milliseconds after its end for which a job is kept that nobody wants kept; if nothing is said, until it is deleted.
    pub job_ttl_ms: Option<u64>,
    /// Jobs that have not ended, at most.
    pub max_jobs: usize,
    /// Engines lost in a row, with no step between, after which a backbone has failed.
    pub max_losses: u32,
    /// Milliseconds that a backbone was ready after which a loss is the first of a row.
    pub settled_ms: u64,
    /// Milliseconds that a backbone waits for room for all of its replicas before it makes do with fewer.
    pub shrink_after_ms: u64,
    /// Milliseconds that it then works with these, before it looks for room for more.
    pub grow_after_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        let day = 24 * 3600 * 1000;
        Self {
            heartbeat_interval_ms: 1000,
            lease_ms: 4000,
            restart_grace_ms: 6000,
            request_ttl_ms: day,
            worker_ttl_ms: day,
            job_ttl_ms: None,
            max_jobs: 10_000,
            max_losses: 5,
            settled_ms: 600_000,
            // As long as a worker takes that is started again.
            shrink_after_ms: 15_000,
            // New replicas load the model while the others wait.
            grow_after_ms: 60_000,
        }
    }
}

/// Everything that the coordinator knows.
pub struct Core {
    config: Config,
    /// What is stored. Changes by [`Core::change`] alone.
    rows: Rows,
    now: Time,
    last_tick: Time,
    /// When this process began.
    restored: Time,
    next_prune: Time,
    /// Workers that hold a lease.
    presences: BTreeMap<WorkerName, Presence>,
    progress: BTreeMap<JobName, Progress>,
    token_rates: BTreeMap<BackboneName, Rate>,
    rendezvous: Rendezvous,
    /// Of the input in hand: who asked, what comes of it, and which backbones have to be looked at again.
    actor: String,
    effects: Effects,
    dirty: BTreeSet<BackboneName>,
    engines_dirty: bool,
}

impl Core {
    /// A core that goes on from what is stored. Workers that were there have a lease, and some grace, to come back; until then their jobs run.
    #[must_use]
    pub fn restore(config: Config, rows: Rows, now: Time) -> Self {
        let mut core = Self {
            config,
            rows,
            now,
            last_tick: now,
            restored: now,
            next_prune: now,
            presences: BTreeMap::new(),
            progress: BTreeMap::new(),
            token_rates: BTreeMap::new(),
            rendezvous: Rendezvous::default(),
            actor: String::new(),
            effects: Effects::default(),
            dirty: BTreeSet::new(),
            engines_dirty: false,
        };
        core.expect_workers();
        core.dirty.extend(core.rows.backbones.keys().cloned());
        core
    }

    /// What is to be done about something that happened at `now`. That clock must not jump: the shell takes the time of its start and
    /// adds what a monotonic clock says. A time before the last one counts as that one.
    pub fn handle(&mut self, input: Input, now: Time) -> Effects {
        self.now = self.now.max(now);
        self.actor.clear();
        let tick = matches!(input, Input::Tick);
        let outcome = match input {
            Input::Request { actor, key, request } => {
                self.actor = actor;
                Some(self.request(key, request))
            }
            Input::Connected { connection, hello } => {
                self.connected(connection, hello);
                None
            }
            Input::Agent { worker, connection, message } => {
                self.agent(&worker, connection, message);
                None
            }
            Input::Disconnected { worker, connection } => {
                self.disconnected(&worker, connection);
                None
            }
            Input::Verified { job, step } => {
                self.verified(&job, step);
                None
            }
            Input::Tick => {
                self.tick();
                None
            }
        };
        self.settle(tick);
        self.effects.reply = outcome.map(|outcome| outcome.and_then(|outcome| self.reply(outcome)));
        mem::take(&mut self.effects)
    }

    /// Places what waits for a place, gives jobs to backbones that have one, and says so to the agents.
    fn settle(&mut self, tick: bool) {
        if tick {
            self.begin_growing();
        }
        for name in self.dirty.clone() {
            self.vacate(&name);
        }
        // Room comes and goes with workers and backbones, and what waits for its time waits for a tick.
        if tick || self.engines_dirty {
            self.place_waiting();
        }
        let mut touched = BTreeSet::new();
        while let Some(name) = self.dirty.pop_first() {
            self.admit(&name);
            touched.insert(name);
        }
        self.send_assignments(&touched);
    }

    /// The one way in which what is stored changes.
    fn change(&mut self, change: Change) {
        self.rows.apply(&change);
        self.effects.changes.push(change);
    }

    fn stamp(&self, kind: EventKind) -> Stamp {
        Stamp { revision: self.rows.revision + 1, time: self.now, kind, actor: self.actor.clone() }
    }

    fn put(&mut self, mut resource: Resource) {
        let revision = self.rows.revision + 1;
        let kind = resource.set_revision(revision);
        self.mark(&resource);
        let stamp = self.stamp(kind);
        self.change(Change::Put(stamp, resource));
    }

    fn remove(&mut self, resource: Resource) {
        self.mark(&resource);
        let stamp = self.stamp(EventKind::Deleted);
        self.change(Change::Remove(stamp, resource));
    }

    fn put_job(&mut self, job: Job) {
        self.put(Resource::Job(Box::new(job)));
    }

    fn put_backbone(&mut self, backbone: Backbone) {
        self.put(Resource::Backbone(Box::new(backbone)));
    }

    /// Notes what has to be looked at again, since this changes.
    fn mark(&mut self, resource: &Resource) {
        match resource {
            Resource::Job(job) => drop(self.dirty.insert(job.backbone.clone())),
            Resource::Backbone(backbone) => {
                self.engines_dirty = true;
                self.dirty.insert(backbone.name.clone());
            }
            Resource::Worker(_) => self.engines_dirty = true,
            Resource::Checkpoint(_) | Resource::Prompt(_) => {}
        }
    }

    fn is_ready(&self, backbone: &BackboneName) -> bool {
        self.rows.backbones.get(backbone).is_some_and(|backbone| backbone.state == BackboneState::Ready)
    }
}

#[cfg(test)]
mod tests;
