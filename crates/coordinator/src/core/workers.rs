//! Workers: connections, leases, drains.

use std::collections::BTreeSet;

use incipit_proto::{
    Problem,
    names::{BackboneName, WorkerName},
    v1::{BackboneReason, BackboneState, JobState, WorkerState},
};
use tonic::Code;

use super::{
    Config, Core,
    backbone::{Collective, RankPlacement},
    backbones::{Charge, Loss},
    effects::{Change, Resource, Send, ToAgent},
    input::{AgentMessage, EngineStatus, Hello},
    presence::Presence,
    time::Time,
    worker::{KEPT_INCARNATIONS, Worker, WorkerReports},
};

/// Milliseconds from one look at what is too old to the next; and where something is left to do.
const PRUNE_INTERVAL_MS: (u64, u64) = (60_000, 1000);

impl Core {
    /// After a restart: workers that were there are given time to come back.
    pub(super) fn expect_workers(&mut self) {
        let lease = self.now.after(u64::from(self.config.lease_ms) + self.config.restart_grace_ms);
        for worker in self.rows.workers.values().filter(|worker| worker.state != WorkerState::Lost) {
            let presence = Presence {
                connection: None,
                lease,
                heartbeat: worker.connect_time,
                loading: Vec::new(),
                told_engines: None,
                told_jobs: Default::default(),
            };
            self.presences.insert(worker.name.clone(), presence);
        }
    }

    pub(super) fn connected(&mut self, connection: u64, hello: Hello) {
        let name = hello.worker.clone();
        let old = self.rows.workers.get(&name).cloned();
        if let Some(old) = &old
            && old.past.contains(&hello.incarnation)
        {
            let what = format!(
                "another process has taken the name {name}; give every worker a name of its own with --name"
            );
            let problem = Problem::state("WORKER_REPLACED", what).with("worker", &name);
            self.effects.sends.push(Send { worker: name, connection, message: ToAgent::Close(problem) });
            return;
        }
        let comes_back = old.as_ref().is_some_and(|old| old.incarnation == hello.incarnation);
        if comes_back {
            self.close(
                &name,
                Problem::new(Code::Aborted, "RECONNECTED", format!("{name} has connected again")),
            );
        } else {
            self.lose_worker(&name, &format!("{name} was started again"));
            let reports =
                WorkerReports { worker: name.clone(), incarnation: hello.incarnation.clone(), sequence: 0 };
            self.change(Change::PutReports(reports));
        }
        let (protocol, engines) = (hello.protocol, hello.engines.clone());
        let worker = self.introduced(hello, old, comes_back);
        self.put(Resource::Worker(Box::new(worker)));
        let presence = Presence {
            connection: Some(connection),
            lease: self.lease(),
            heartbeat: self.now,
            loading: Vec::new(),
            told_engines: None,
            told_jobs: Default::default(),
        };
        self.presences.insert(name.clone(), presence);
        let acknowledged = self.rows.reports.get(&name).map_or(0, |reports| reports.sequence);
        let Config { heartbeat_interval_ms, lease_ms, .. } = self.config;
        self.send(&name, ToAgent::Welcome { protocol, heartbeat_interval_ms, lease_ms, acknowledged });
        self.lose_missing(&name, &engines);
        let led: Vec<BackboneName> = self.led_by(&name).collect();
        self.dirty.extend(led);
    }

    fn introduced(&self, hello: Hello, old: Option<Worker>, comes_back: bool) -> Worker {
        let (mut past, mut draining, mut created_revision) = (Vec::new(), false, 0);
        if let Some(old) = old {
            (past, created_revision) = (old.past, old.created_revision);
            if comes_back {
                draining = old.draining;
            } else {
                past.push(old.incarnation);
                let excess = past.len().saturating_sub(KEPT_INCARNATIONS);
                past.drain(..excess);
            }
        }
        Worker {
            name: hello.worker,
            state: if draining { WorkerState::Draining } else { WorkerState::Online },
            draining,
            incarnation: hello.incarnation,
            past,
            machine: hello.machine,
            slots: hello.slots,
            version: hello.version,
            connect_time: self.now,
            lost_time: None,
            created_revision,
            revision: 0,
        }
    }

    /// Engines that were ready and that an agent, back again, does not have, are lost.
    fn lose_missing(&mut self, worker: &WorkerName, engines: &[EngineStatus]) {
        let there = |name: &BackboneName, epoch: u64, rank: u32, together: bool| {
            engines.iter().any(|engine| {
                engine.backbone == *name && engine.epoch == epoch && (engine.rank == rank || together)
            })
        };
        let mut missing: Vec<(BackboneName, Vec<u32>)> = Vec::new();
        for backbone in self.rows.backbones.values() {
            let together = backbone.spec.collective == Collective::Local;
            let ranks = backbone.ranks.iter().filter(|rank| {
                rank.worker == *worker
                    && rank.ready
                    && !there(&backbone.name, backbone.epoch, rank.rank, together)
            });
            let ranks: Vec<u32> = ranks.map(|rank| rank.rank).collect();
            if !ranks.is_empty() {
                missing.push((backbone.name.clone(), ranks));
            }
        }
        for (name, ranks) in missing {
            let message = format!("{worker} came back without rank {}", ranks[0]);
            let loss =
                Loss { reason: BackboneReason::EngineExited, message: &message, charge: Charge::CrashLoop };
            self.lose_ranks(&name, |placement| ranks.contains(&placement.rank), &loss);
        }
    }

    pub(super) fn agent(&mut self, worker: &WorkerName, connection: u64, message: AgentMessage) {
        let (now, lease) = (self.now, self.lease());
        let Some(presence) = self.presences.get_mut(worker).filter(|of| of.connection == Some(connection))
        else {
            return;
        };
        (presence.lease, presence.heartbeat) = (presence.lease.max(lease), now);
        match message {
            AgentMessage::Heartbeat { draining, loading } => {
                if !loading.is_empty() {
                    presence.loading = loading;
                }
                if draining {
                    self.drain(worker);
                }
            }
            AgentMessage::Report { sequence, report } => self.report(worker, sequence, report),
            AgentMessage::RendezvousPut { key, value } => self.rendezvous_put(worker, &key, &value),
            AgentMessage::RendezvousGet { key, follows } => {
                self.rendezvous_get(worker, connection, (key, follows));
            }
        }
    }

    pub(super) fn disconnected(&mut self, worker: &WorkerName, connection: u64) {
        if let Some(presence) = self.presences.get_mut(worker)
            && presence.connection == Some(connection)
        {
            presence.connection = None;
        }
    }

    pub(super) fn tick(&mut self) {
        self.forgive_stall();
        let expired = self.presences.iter().filter(|(_, presence)| presence.lease <= self.now);
        let expired: Vec<WorkerName> = expired.map(|(name, _)| name.clone()).collect();
        for name in expired {
            self.lose_worker(&name, &format!("{name} gave no sign of life for {} ms", self.config.lease_ms));
        }
        if self.now >= self.next_prune {
            self.prune_requests();
            self.forget_workers();
            let (idle, busy) = PRUNE_INTERVAL_MS;
            self.next_prune = self.now.after(if self.forget_jobs() { busy } else { idle });
        }
    }

    /// Where ticks themselves were late, this process stood still (a slow disk, a stopped machine), and what workers said meanwhile waits
    /// behind this tick. That is not theirs to pay for.
    fn forgive_stall(&mut self) {
        let gap = self.now.since(self.last_tick);
        self.last_tick = self.now;
        if gap > u64::from(self.config.lease_ms) / 2 {
            for presence in self.presences.values_mut() {
                presence.lease = presence.lease.after(gap);
            }
        }
    }

    fn forget_workers(&mut self) {
        let (now, ttl) = (self.now, self.config.worker_ttl_ms);
        let old = self.rows.workers.values();
        let old = old.filter(|worker| worker.lost_time.is_some_and(|time| now.since(time) >= ttl));
        let old: Vec<Worker> = old.cloned().collect();
        for worker in old {
            self.change(Change::RemoveReports(worker.name.clone()));
            self.remove(Resource::Worker(Box::new(worker)));
        }
    }

    /// A worker is gone, and its engines with it, as far as anybody knows.
    pub(super) fn lose_worker(&mut self, name: &WorkerName, message: &str) {
        self.close(name, Problem::new(Code::Unavailable, "LEASE_LOST", format!("{message}; connect again")));
        self.presences.remove(name);
        let Some(worker) = self.rows.workers.get(name) else { return };
        if worker.state == WorkerState::Lost {
            return;
        }
        let mut worker = worker.clone();
        (worker.state, worker.lost_time) = (WorkerState::Lost, Some(self.now));
        self.put(Resource::Worker(Box::new(worker)));
        self.clear_worker(
            name,
            &Loss { reason: BackboneReason::WorkerLost, message, charge: Charge::Nothing },
        );
    }

    /// Gives a worker nothing more. What it has moves as soon as the jobs on it are saved.
    pub(super) fn drain(&mut self, name: &WorkerName) {
        let Some(worker) = self.rows.workers.get(name) else { return };
        if worker.state != WorkerState::Online {
            return;
        }
        let mut worker = worker.clone();
        (worker.state, worker.draining) = (WorkerState::Draining, true);
        self.put(Resource::Worker(Box::new(worker)));
        let backbones = self.backbones_on(name);
        self.dirty.extend(backbones);
    }

    /// Has a backbone placed anew whose ranks are to move, once its jobs have left.
    pub(super) fn vacate(&mut self, backbone: &BackboneName) {
        if !self.is_to_move(backbone) || !self.names_of(backbone, JobState::Running).is_empty() {
            return;
        }
        let draining = self.to_leave(backbone);
        if draining.is_empty() {
            if let Some(backbone) = self.rows.backbones.get(backbone).cloned() {
                self.grow(backbone);
            }
            return;
        }
        let there = |rank: &RankPlacement| draining.contains(&rank.worker) && !rank.lost;
        let names: Vec<&str> = draining.iter().map(WorkerName::as_str).collect();
        let message = format!("{} is being drained", names.join(", "));
        let loss = Loss { reason: BackboneReason::WorkerDrained, message: &message, charge: Charge::Nothing };
        self.lose_ranks(backbone, there, &loss);
    }

    /// Whether a rank of a backbone is on a worker that is being drained, or there is room for more ranks.
    pub(super) fn is_to_move(&self, backbone: &BackboneName) -> bool {
        let growing = self.rows.backbones.get(backbone).is_some_and(|backbone| backbone.shortage.growing);
        growing || !self.to_leave(backbone).is_empty()
    }

    /// The workers that are being drained and have ranks of a backbone.
    fn to_leave(&self, backbone: &BackboneName) -> BTreeSet<WorkerName> {
        let drained = |worker: &WorkerName| self.rows.workers.get(worker).is_some_and(|row| row.draining);
        let ranks = self.rows.backbones.get(backbone).into_iter().flat_map(|backbone| &backbone.ranks);
        let there = ranks.filter(|rank| !rank.lost && drained(&rank.worker));
        there.map(|rank| rank.worker.clone()).collect()
    }

    fn clear_worker(&mut self, name: &WorkerName, loss: &Loss<'_>) {
        for backbone in self.backbones_on(name) {
            self.lose_ranks(&backbone, |rank| rank.worker == *name && !rank.lost, loss);
        }
    }

    fn backbones_on(&self, worker: &WorkerName) -> Vec<BackboneName> {
        let there = |rank: &RankPlacement| rank.worker == *worker && !rank.lost;
        let backbones = self.rows.backbones.values().filter(|backbone| backbone.ranks.iter().any(there));
        backbones.map(|backbone| backbone.name.clone()).collect()
    }

    fn lease(&self) -> Time {
        self.now.after(u64::from(self.config.lease_ms))
    }

    /// Backbones whose jobs a worker is told: those that are ready, and whose rank 0 it has.
    pub(super) fn led_by(&self, worker: &WorkerName) -> impl Iterator<Item = BackboneName> {
        let leads = |backbone: &&super::Backbone| {
            backbone.state == BackboneState::Ready
                && backbone.ranks.first().is_some_and(|rank| rank.worker == *worker)
        };
        self.rows.backbones.values().filter(leads).map(|backbone| backbone.name.clone())
    }
}
