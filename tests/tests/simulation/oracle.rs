//! What must hold whenever something is written down. S1 to S12 are the promises; the rest of them is in `verdict`.

use std::collections::{BTreeMap, BTreeSet};

use incipit_coordinator::core::backbone::Collective;
use incipit_coordinator::core::input::{AgentMessage, Report};
use incipit_coordinator::core::{Backbone, Change, Checkpoint, Core, Input, Job, Resource};
use incipit_proto::names::{JobName, WorkerName};
use incipit_proto::v1::{BackboneState, JobState, JobWish, MetricPoint, WorkerState, metric_point::Point};

use crate::simulation::chance::{digest, first_prompt, loss, next_prompt};
use crate::simulation::engine::Pid;
use crate::simulation::world::{Machine, Time, World};

/// What is known besides what is stored.
#[derive(Default)]
pub(crate) struct Oracle {
    /// Prompts after 0, 1, 2, ... steps, by the job's seed: as they are where nothing goes wrong.
    chains: BTreeMap<u64, Vec<u64>>,
    /// Steps of all points of a job.
    pub(crate) points: BTreeMap<JobName, Vec<u64>>,
    /// Engines that were ready in an epoch, and groups that failed.
    pub(crate) ready: BTreeSet<(String, u64, u32)>,
    pub(crate) failed: BTreeSet<(String, u64)>,
    /// Seeds of jobs of which a checkpoint could not be stored.
    pub(crate) refused: BTreeSet<u64>,
}

/// A loss that is to be noticed.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Who has to notice it, besides the coordinator.
    pub(crate) machine: Option<Machine>,
    /// The process that it is about, if it is one.
    pub(crate) pid: Option<Pid>,
    pub(crate) backbone: String,
    pub(crate) epoch: u64,
    pub(crate) since: Time,
}

/// A report of a job that must have no effect.
pub(crate) struct Stale {
    job: JobName,
    was_running: bool,
    what: String,
}

impl Oracle {
    /// The prompt of a job after so many steps, if nothing goes wrong.
    pub(crate) fn prompt(&mut self, seed: u64, step: u64) -> u64 {
        let chain = self.chains.entry(seed).or_insert_with(|| vec![first_prompt(seed)]);
        while chain.len() as u64 <= step {
            let last = chain.len() - 1;
            chain.push(next_prompt(chain[last], seed, last as u64));
        }
        chain[step as usize]
    }
}

impl Stale {
    /// Whether an input is a report that is stale, or comes again.
    pub(crate) fn of(core: &Core, input: &Input) -> Option<Self> {
        let Input::Agent { worker, message: AgentMessage::Report { sequence, report }, .. } = input else {
            return None;
        };
        let Report::Job { backbone, epoch, job, attempt, .. } = report else { return None };
        let rows = core.rows();
        let again = rows.reports.get(worker).is_some_and(|stored| *sequence <= stored.sequence);
        let known = rows.jobs.get(job);
        let open = known.filter(|job| job.state == JobState::Running).and_then(|job| job.open_attempt());
        let leads = rows.backbones.get(backbone).is_some_and(|backbone| {
            (backbone.state, backbone.epoch) == (BackboneState::Ready, *epoch)
                && backbone.ranks.first().is_some_and(|rank| rank.worker == *worker)
        });
        let current = leads && open.is_some_and(|open| (open.number, open.epoch) == (*attempt, *epoch));
        let was_running = known.is_some_and(|job| job.state == JobState::Running);
        (again || !current).then(|| Self { job: job.clone(), was_running, what: format!("{input:?}") })
    }

    /// What it says if it took effect.
    pub(crate) fn broken_by(self, changes: &[Change]) -> Option<String> {
        let took_effect = changes.iter().any(|change| match change {
            Change::AppendMetrics(job, _) => *job == self.job,
            Change::Put(_, Resource::Checkpoint(checkpoint)) => checkpoint.job == self.job,
            Change::Put(_, Resource::Job(job)) => {
                job.name == self.job && self.was_running && job.state != JobState::Running
            }
            _ => false,
        });
        took_effect.then_some(self.what)
    }
}

impl World {
    /// A change is about to be on the disk.
    pub(crate) fn check_change(&mut self, change: &Change) {
        if let Change::Put(stamp, _) | Change::Remove(stamp, _) = change {
            let last = self.coordinator.rows.revision;
            if stamp.revision != last + 1 {
                self.broken("S9 (revisions have no gaps)", || {
                    format!("{} comes after {last}", stamp.revision)
                });
            }
        }
        match change {
            Change::Put(_, Resource::Job(job)) => self.check_job(job),
            Change::Put(_, Resource::Backbone(backbone)) => self.check_backbone(backbone),
            Change::Put(_, Resource::Checkpoint(checkpoint)) => self.check_checkpoint(checkpoint),
            Change::Remove(_, Resource::Job(job)) => {
                self.broken("S1 (an accepted job is there for ever)", || format!("{} is removed", job.name));
            }
            Change::AppendMetrics(job, points) => self.check_metrics(job, points),
            _ => {}
        }
    }

    fn check_job(&mut self, job: &Job) {
        let old = self.coordinator.rows.jobs.get(&job.name).cloned();
        if let Some(old) = old {
            if old.is_final() && old.state != job.state {
                self.broken("S5 (final states stay)", || {
                    format!("{} was {:?} and is {:?}", job.name, old.state, job.state)
                });
            }
            let wished = old.state == JobState::Running && old.wish != JobWish::Unspecified;
            if wished && job.state == JobState::Queued {
                self.broken("S2 (what was asked for is done)", || format!("{old:?} becomes {job:?}"));
            }
            if job.committed_step < old.committed_step || job.last_attempt() < old.last_attempt() {
                self.broken("S4 (nothing goes back)", || format!("{old:?} becomes {job:?}"));
            }
        }
        self.told.attempts = self.told.attempts.max(u64::from(job.last_attempt()));
        if job.state == JobState::Succeeded {
            let checkpoint = self.coordinator.rows.checkpoints.get(&(job.name.clone(), job.spec.steps()));
            let file =
                checkpoint.and_then(|checkpoint| checkpoint.files.first()).map(|file| file.digest.clone());
            let right = digest(self.oracle.prompt(job.spec.seed(), job.spec.steps()));
            if file.as_ref() != Some(&right) || job.committed_step != job.spec.steps() {
                self.broken("S3 (a job that succeeded has the right prompt)", || {
                    format!("{file:?}, {job:?}")
                });
            }
        }
    }

    fn check_backbone(&mut self, backbone: &Backbone) {
        let old = self.coordinator.rows.backbones.get(&backbone.name);
        if old.is_some_and(|old| old.epoch > backbone.epoch) {
            self.broken("S4 (epochs grow)", || format!("{backbone:?}"));
        }
        self.told.epochs = self.told.epochs.max(backbone.epoch);
        let together = backbone.spec.collective == Collective::Local;
        let said = |rank: u32| {
            let key = (backbone.name.to_string(), backbone.epoch, if together { 0 } else { rank });
            self.oracle.ready.contains(&key)
        };
        if backbone.ranks.iter().any(|rank| rank.ready && !said(rank.rank)) {
            self.broken("S6 (a rank is ready that has said so)", || format!("{backbone:?}"));
        }
    }

    fn check_checkpoint(&mut self, checkpoint: &Checkpoint) {
        let rows = &self.coordinator.rows;
        let is_new = !rows.checkpoints.contains_key(&(checkpoint.job.clone(), checkpoint.step));
        let Some(job) = rows.jobs.get(&checkpoint.job).cloned() else {
            return self.broken("S4 (a checkpoint has a job)", || format!("{checkpoint:?}"));
        };
        if !is_new {
            return;
        }
        self.told.checkpoints += 1;
        let epoch = rows.backbones.get(&job.backbone).map(|backbone| backbone.epoch);
        let open = job.open_attempt().map(|open| (open.number, Some(open.epoch)));
        if open != Some((checkpoint.attempt, Some(checkpoint.epoch))) || epoch != Some(checkpoint.epoch) {
            self.broken("S4 (a checkpoint is of the current attempt)", || {
                format!("{checkpoint:?} of {job:?}")
            });
        }
        if checkpoint.step <= job.committed_step {
            self.broken("S4 (committed steps grow)", || {
                format!("{checkpoint:?} after {}", job.committed_step)
            });
        }
        let right = digest(self.oracle.prompt(job.spec.seed(), checkpoint.step));
        if checkpoint.files.iter().any(|file| file.digest != right || !self.blobs.contains(&file.digest)) {
            self.broken("S3 (a checkpoint is what its step makes, and stored)", || format!("{checkpoint:?}"));
        }
    }

    fn check_metrics(&mut self, job: &JobName, points: &[MetricPoint]) {
        let seed = self.coordinator.rows.jobs.get(job).map_or(0, |job| job.spec.seed());
        for point in points {
            let steps = self.oracle.points.entry(job.clone()).or_default();
            let (offset, last) = (steps.len() as u64, steps.last().copied().unwrap_or(0));
            steps.push(point.step);
            let right = loss(self.oracle.prompt(seed, point.step));
            let Some(Point::Training(training)) = &point.point else { continue };
            if point.offset != offset || point.step <= last || training.loss.to_bits() != right.to_bits() {
                self.broken("S7 (metrics are told once, in order)", || {
                    format!("{job}: {point:?} after step {last}")
                });
            }
        }
    }

    /// What was written in one go is on the disk, and the core is as it is.
    pub(crate) fn check_commit(&mut self) {
        let (rows, Some(core)) = (&self.coordinator.rows, &self.coordinator.core) else { return };
        let holds_lease = |worker: &WorkerName| {
            let view = core.worker_view(worker).ok();
            view.is_some_and(|view| view.heartbeat_time.is_some() && view.worker.state != WorkerState::Lost)
        };
        let is_ready = |backbone: &Backbone| {
            backbone.state == BackboneState::Ready
                && backbone.ranks.iter().all(|rank| rank.ready && !rank.lost && holds_lease(&rank.worker))
        };
        let running = rows.jobs.values().filter(|job| job.state == JobState::Running);
        let homeless = running
            .map(|job| (job, &rows.backbones[&job.backbone]))
            .find(|(_, backbone)| !is_ready(backbone));
        let homeless = homeless.map(|(job, backbone)| format!("{job:?} on {backbone:?}"));
        let mut used: BTreeMap<&WorkerName, BTreeSet<(&str, u32)>> = BTreeMap::new();
        for backbone in rows.backbones.values() {
            for rank in backbone.ranks.iter().filter(|rank| !rank.lost) {
                let process = if backbone.spec.collective == Collective::Local { 0 } else { rank.rank };
                used.entry(&rank.worker).or_default().insert((backbone.name.as_str(), process));
            }
        }
        let over = used.iter().find(|(worker, used)| {
            rows.workers.get(*worker).is_none_or(|worker| used.len() > worker.slots as usize)
        });
        let over = over.map(|(worker, used)| format!("{worker} has {used:?}"));
        if let Some(homeless) = homeless {
            self.broken("S6 (what runs has a place to run)", || homeless);
        }
        if let Some(over) = over {
            self.broken("S8 (a slot is used once)", || over);
        }
    }
}
