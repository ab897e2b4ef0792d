//! What must hold in the end, and whether it is the end.

use incipit_coordinator::core::Job;
use incipit_coordinator::core::backbone::Collective;
use incipit_proto::v1::{BackboneState, JobState, JobWish, WorkerState};

use crate::simulation::client::{Ask, Client, LABEL};
use crate::simulation::engine::Engine;
use crate::simulation::link::Link;
use crate::simulation::oracle::Watch;
use crate::simulation::world::{Machine, Time, World};

/// After trouble, the coordinator gives workers so much more time.
const GRACE: Time = 5_000;

impl World {
    /// Whether a loss was noticed in time.
    pub(crate) fn deadline(&mut self, id: u64) {
        let Some(watch) = self.watches.remove(&id) else { return };
        let mut backbones = self.coordinator.rows.backbones.values();
        let backbone = backbones.find(|backbone| backbone.name.as_str() == watch.backbone);
        let unnoticed = backbone.is_some_and(|backbone| {
            backbone.epoch == watch.epoch
                && backbone.place_at.is_none()
                && backbone.state != BackboneState::Failed
        });
        // One that was waiting for ranks that are gone is replaced under the same epoch, without a word.
        let replaced = watch.machine.zip(watch.pid).is_some_and(|(machine, pid)| {
            let mut others = self.agents[machine].processes.iter().filter(|(_, other)| **other > pid);
            others.any(|(key, _)| key.backbone == watch.backbone)
        });
        if !unnoticed || replaced {
            self.told.losses_noticed += 1;
        } else if !self.is_excused(&watch) {
            let backbone = format!("{backbone:?}");
            self.broken("S10 (a loss is noticed within 5 s)", || format!("{watch:?}, {backbone}"));
        }
    }

    fn is_excused(&self, watch: &Watch) -> bool {
        let away = |machine: Machine| {
            let agent = &self.agents[machine];
            !self.is_there(machine) || agent.trouble.max(agent.cut_until) >= watch.since
        };
        self.coordinator.core.is_none()
            || self.coordinator.trouble + GRACE > watch.since
            || watch.machine.is_some_and(away)
    }

    /// Whether an agent runs, and is connected.
    fn is_there(&self, machine: Machine) -> bool {
        let agent = &self.agents[machine];
        let connected = agent.link.and_then(|link| self.links.get(&link)).is_some_and(Link::is_open);
        agent.core.is_some() && connected && agent.cut_until.max(agent.frozen_until) <= self.now
    }

    /// What has not come to rest, if anything.
    pub(crate) fn unrest(&self) -> Option<String> {
        let agents = 0..self.agents.len();
        if self.coordinator.core.is_none() || !agents.into_iter().all(|machine| self.is_there(machine)) {
            return Some("a process is not there".to_owned());
        }
        if !self.carries.is_empty() {
            return Some("files are on their way".to_owned());
        }
        let online =
            self.coordinator.rows.workers.values().filter(|worker| worker.state == WorkerState::Online);
        if online.count() < self.agents.len() {
            return Some(format!("{:?}", self.coordinator.rows.workers));
        }
        let waiting = self.clients.iter().position(|client| !client.is_done());
        if let Some(client) = waiting {
            return Some(format!("client {client} waits for an answer"));
        }
        let unready =
            self.coordinator.rows.backbones.values().find(|backbone| backbone.state != BackboneState::Ready);
        if let Some(backbone) = unready {
            return Some(format!("{backbone:?}; {:?}", self.coordinator.rows.workers));
        }
        let jobs = self.clients.iter().filter_map(|client| Some((client, self.job_of(client)?)));
        let odd = jobs
            .filter(|(client, job)| !self.is_as_asked(client, job))
            .map(|(client, job)| format!("{:?} was promised for {job:?}", client.promised));
        odd.into_iter().next()
    }

    fn job_of(&self, client: &Client) -> Option<&Job> {
        self.coordinator.rows.jobs.get(client.job.as_ref()?)
    }

    fn is_as_asked(&self, client: &Client, job: &Job) -> bool {
        let fails = client.spec.warmup_steps.is_some() || self.oracle.refused.contains(&client.spec.seed());
        let ended = job.state == JobState::Succeeded || (job.state == JobState::Failed && fails);
        let by_wish = match client.promised {
            // What was so when it was asked for stays so.
            Some((Ask::Pause, JobState::Paused)) => return job.state == JobState::Paused,
            Some((Ask::Cancel, JobState::Cancelled)) => return job.state == JobState::Cancelled,
            Some((Ask::Pause, _)) => job.state == JobState::Paused,
            Some((Ask::Cancel, _)) => job.state == JobState::Cancelled,
            _ => false,
        };
        (ended || by_wish) && job.wish == JobWish::Unspecified
    }

    /// Everything is at rest, and was for a while.
    pub(crate) fn check_end(&mut self) {
        for client in 0..self.clients.len() {
            self.check_client(client);
        }
        let astray = self.engines.values().find(|engine| !self.is_assigned(engine));
        let astray =
            astray.map(|engine| format!("{:?} of epoch {} on w{}", engine.key, engine.epoch, engine.machine));
        if let Some(astray) = astray {
            self.broken("S11 (no engine is left over)", || astray);
        }
        let full = self.agents.iter().position(|agent| agent.reported > agent.acknowledged);
        if let Some(machine) = full {
            let agent = &self.agents[machine];
            let what =
                format!("w{machine} has said {}, and {} is acknowledged", agent.reported, agent.acknowledged);
            self.broken("S12 (all reports have arrived)", || what);
        }
    }

    fn check_client(&mut self, client: usize) {
        let asker = &self.clients[client];
        let Some(name) = asker.job.clone() else { return };
        let label = client.to_string();
        let jobs = self.coordinator.rows.jobs.values();
        let mine: Vec<String> = jobs
            .filter(|job| job.labels.get(LABEL) == Some(&label))
            .map(|job| job.name.to_string())
            .collect();
        if mine != [name.to_string()] {
            self.broken("S1 (an accepted job is there, once)", || {
                format!("client {client} has {mine:?}, not {name}")
            });
        }
        let job = self.coordinator.rows.jobs.get(&name);
        if job.is_some_and(|job| job.state == JobState::Succeeded) {
            let steps = self.clients[client].spec.steps();
            let points = self.oracle.points.remove(&name).unwrap_or_default();
            if !points.iter().copied().eq(1..=steps) {
                self.broken("S7 (metrics are complete)", || {
                    format!("{name} has the steps {points:?} of {steps}")
                });
            }
        }
    }

    fn is_assigned(&self, engine: &Engine) -> bool {
        self.coordinator.rows.backbones.values().any(|backbone| {
            let together = backbone.spec.collective == Collective::Local;
            backbone.name.as_str() == engine.key.backbone
                && backbone.epoch == engine.epoch
                && backbone.ranks.iter().any(|rank| {
                    (together || rank.rank == engine.key.rank)
                        && rank.worker.as_str() == format!("workers/w{}", engine.machine)
                })
        })
    }
}
