//! What the core shows.

use std::collections::BTreeMap;

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName, PromptName, WorkerName},
    v1::JobState,
};

pub use super::presence::Progress;
use super::{
    Core,
    backbone::{Backbone, Collective, Device, RankPlacement},
    checkpoint::{Checkpoint, PromptVersion, checkpoint_name, version_name},
    input::EngineStatus,
    job::Job,
    page::{Page, newest_first, paginate},
    rows::Rows,
    time::Time,
    worker::Worker,
};

/// A job, and what is known of the moment.
#[derive(Clone, Debug, PartialEq)]
pub struct JobView {
    /// The job.
    pub job: Job,
    /// How far it has come since its last checkpoint, if something was heard of it.
    pub progress: Option<Progress>,
    /// Steps a second, of late.
    pub steps_per_second: f64,
    /// How many jobs are before it on its backbone, if it is queued.
    pub queue_position: u32,
}

/// A backbone, and what is known of the moment.
#[derive(Clone, Debug, PartialEq)]
pub struct BackboneView {
    /// The backbone.
    pub backbone: Backbone,
    /// Jobs on it.
    pub running_jobs: u32,
    /// Jobs that wait for it.
    pub queued_jobs: u32,
    /// Tokens a second, of late.
    pub tokens_per_second: f64,
    /// Bytes of the part of each rank that are loaded, and of all of it, where that is known.
    pub loading: BTreeMap<u32, (u64, u64)>,
}

/// A worker, and what is known of the moment.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// The worker.
    pub worker: Worker,
    /// Slots that are taken.
    pub used_slots: u32,
    /// When it last gave a sign of life, if it did since the coordinator began.
    pub heartbeat_time: Option<Time>,
}

/// Which jobs are wanted; those that fit everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobFilter {
    /// Those of this backbone, if one is given.
    pub backbone: Option<BackboneName>,
    /// Those in one of these states, if some are given.
    pub states: Vec<JobState>,
    /// Those with all these labels.
    pub labels: BTreeMap<String, String>,
}

impl JobFilter {
    fn fits(&self, job: &Job) -> bool {
        self.backbone.as_ref().is_none_or(|backbone| job.backbone == *backbone)
            && (self.states.is_empty() || self.states.contains(&job.state))
            && self.labels.iter().all(|(key, value)| job.labels.get(key) == Some(value))
    }
}

impl Core {
    /// Everything that is stored.
    #[must_use]
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The newest revision.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.rows.revision
    }

    /// A job.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn job(&self, name: &JobName) -> Result<&Job, Problem> {
        self.rows.jobs.get(name).ok_or_else(|| Problem::not_found(name.as_str()))
    }

    /// A job, as it is shown.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn job_view(&self, name: &JobName) -> Result<JobView, Problem> {
        let job = self.job(name)?;
        Ok(self.view_of(job, self.queue_position(job)))
    }

    pub(super) fn view_of(&self, job: &Job, queue_position: u32) -> JobView {
        let progress = self.progress.get(&job.name).cloned();
        let steps_per_second = progress.as_ref().map_or(0.0, |progress| progress.rate.per_second(self.now));
        JobView { job: job.clone(), progress, steps_per_second, queue_position }
    }

    /// How many jobs are before a queued one.
    #[must_use]
    pub fn queue_position(&self, job: &Job) -> u32 {
        if job.state != JobState::Queued {
            return 0;
        }
        let jobs = self.rows.jobs.values();
        let before = jobs.filter(|other| {
            other.state == JobState::Queued
                && other.backbone == job.backbone
                // Of a job as it would be, what is stored may stand before it.
                && other.name != job.name
                && other.queue_key() < job.queue_key()
        });
        u32::try_from(before.count()).unwrap_or(u32::MAX)
    }

    /// Jobs, the newest first.
    ///
    /// # Errors
    /// See [`paginate`].
    pub fn list_jobs(&self, filter: &JobFilter, size: i32, token: &str) -> Result<Page<JobView>, Problem> {
        let jobs = self.rows.jobs.values().filter(|job| filter.fits(job));
        let jobs = jobs.map(|job| (newest_first(job.created_revision), job));
        let page = paginate(&format!("jobs {filter:?}"), size, token, jobs)?;
        // One queue a backbone, rather than one count a job.
        let mut positions: BTreeMap<&JobName, usize> = BTreeMap::new();
        for backbone in self.rows.backbones.keys() {
            if page.items.iter().any(|job| job.state == JobState::Queued && job.backbone == *backbone) {
                positions
                    .extend(self.queue(backbone).into_iter().enumerate().map(|(at, job)| (&job.name, at)));
            }
        }
        let view = |job: &Job| {
            let position = positions.get(&job.name).copied().unwrap_or(0);
            self.view_of(job, u32::try_from(position).unwrap_or(u32::MAX))
        };
        let items = page.items.into_iter().map(view).collect();
        Ok(Page { items, next_page_token: page.next_page_token })
    }

    /// A backbone, as it is shown.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn backbone_view(&self, name: &BackboneName) -> Result<BackboneView, Problem> {
        let backbone = self.rows.backbones.get(name).ok_or_else(|| Problem::not_found(name.as_str()))?;
        Ok(self.view_of_backbone(backbone))
    }

    pub(super) fn view_of_backbone(&self, backbone: &Backbone) -> BackboneView {
        let (mut running_jobs, mut queued_jobs) = (0, 0);
        for job in self.rows.jobs.values().filter(|job| job.backbone == backbone.name) {
            running_jobs += u32::from(job.state == JobState::Running);
            queued_jobs += u32::from(job.state == JobState::Queued);
        }
        let rate = self.token_rates.get(&backbone.name);
        let tokens_per_second = rate.map_or(0.0, |rate| rate.per_second(self.now));
        let loading = self.loading_of(backbone);
        BackboneView { backbone: backbone.clone(), running_jobs, queued_jobs, tokens_per_second, loading }
    }

    fn loading_of(&self, backbone: &Backbone) -> BTreeMap<u32, (u64, u64)> {
        let there = backbone.ranks.iter().filter(|rank| !rank.lost);
        let of_rank = |rank: &RankPlacement| {
            let mut said = self.presences.get(&rank.worker)?.loading.iter();
            let is_its = |engine: &EngineStatus| {
                (&engine.backbone, engine.epoch, engine.rank) == (&backbone.name, backbone.epoch, rank.rank)
            };
            let said = said.find(|said| is_its(&said.engine))?;
            Some((rank.rank, (said.loaded, said.total)))
        };
        there.filter_map(of_rank).collect()
    }

    /// Backbones, by name.
    ///
    /// # Errors
    /// See [`paginate`].
    pub fn list_backbones(&self, size: i32, token: &str) -> Result<Page<BackboneView>, Problem> {
        let backbones = self.rows.backbones.values().map(|backbone| (backbone.name.to_string(), backbone));
        let page = paginate("backbones", size, token, backbones)?;
        let items = page.items.into_iter().map(|backbone| self.view_of_backbone(backbone)).collect();
        Ok(Page { items, next_page_token: page.next_page_token })
    }

    /// A worker, as it is shown.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn worker_view(&self, name: &WorkerName) -> Result<WorkerView, Problem> {
        let worker = self.rows.workers.get(name).ok_or_else(|| Problem::not_found(name.as_str()))?;
        Ok(self.view_of_worker(worker))
    }

    fn view_of_worker(&self, worker: &Worker) -> WorkerView {
        let heartbeat_time = self.presences.get(&worker.name).map(|presence| presence.heartbeat);
        let (used_slots, _) = self.used(&worker.name, None);
        WorkerView { worker: worker.clone(), used_slots, heartbeat_time }
    }

    /// Workers, by name.
    ///
    /// # Errors
    /// See [`paginate`].
    pub fn list_workers(&self, size: i32, token: &str) -> Result<Page<WorkerView>, Problem> {
        let workers = self.rows.workers.values().map(|worker| (worker.name.to_string(), worker));
        let page = paginate("workers", size, token, workers)?;
        let items = page.items.into_iter().map(|worker| self.view_of_worker(worker)).collect();
        Ok(Page { items, next_page_token: page.next_page_token })
    }

    /// Slots and GPUs of a worker that backbones hold, without `except`.
    pub(super) fn used(&self, worker: &WorkerName, except: Option<&BackboneName>) -> (u32, u32) {
        let (mut slots, mut gpus) = (0, 0);
        for backbone in self.rows.backbones.values().filter(|backbone| Some(&backbone.name) != except) {
            let ranks = backbone.ranks.iter().filter(|rank| rank.worker == *worker && !rank.lost).count();
            let ranks = u32::try_from(ranks).unwrap_or(u32::MAX);
            slots += if backbone.spec.collective == Collective::Local { ranks.min(1) } else { ranks };
            gpus += if backbone.spec.device == Device::Cuda { ranks } else { 0 };
        }
        (slots, gpus)
    }

    /// A checkpoint.
    ///
    /// # Errors
    /// If there is none of that step.
    pub fn checkpoint(&self, job: &JobName, step: u64) -> Result<&Checkpoint, Problem> {
        let checkpoint = self.rows.checkpoints.get(&(job.clone(), step));
        checkpoint.ok_or_else(|| Problem::not_found(&checkpoint_name(job, step)))
    }

    /// Checkpoints of a job, the newest first.
    pub fn checkpoints_of(&self, job: &JobName) -> impl Iterator<Item = &Checkpoint> {
        let range = self.rows.checkpoints.range((job.clone(), 0)..=(job.clone(), u64::MAX));
        range.rev().map(|(_, checkpoint)| checkpoint)
    }

    /// Checkpoints of a job, the newest first, a page of them.
    ///
    /// # Errors
    /// If there is no such job; see also [`paginate`].
    pub fn list_checkpoints(
        &self,
        job: &JobName,
        size: i32,
        token: &str,
    ) -> Result<Page<Checkpoint>, Problem> {
        self.job(job)?;
        let checkpoints = self.checkpoints_of(job);
        let items = checkpoints.map(|checkpoint| (newest_first(checkpoint.step), checkpoint.clone()));
        paginate(&format!("{job}/checkpoints"), size, token, items)
    }

    /// A version of a prompt; the newest where none is given.
    ///
    /// # Errors
    /// If there is none.
    pub fn prompt_version(
        &self,
        prompt: &PromptName,
        version: Option<u64>,
    ) -> Result<&PromptVersion, Problem> {
        let found = match version {
            Some(version) => self.rows.prompts.get(&(prompt.clone(), version)),
            None => {
                let range = self.rows.prompts.range((prompt.clone(), 0)..=(prompt.clone(), u64::MAX));
                range.last().map(|(_, version)| version)
            }
        };
        found.ok_or_else(|| match version {
            Some(version) => Problem::not_found(&version_name(prompt, version)),
            None => Problem::not_found(&format!("{prompt}/versions/latest")),
        })
    }

    /// Versions of a prompt, or of all, the newest first.
    ///
    /// # Errors
    /// See [`paginate`].
    pub fn list_versions(
        &self,
        prompt: Option<&PromptName>,
        size: i32,
        token: &str,
    ) -> Result<Page<PromptVersion>, Problem> {
        let versions = self.rows.prompts.values();
        let versions = versions.filter(|version| prompt.is_none_or(|prompt| version.prompt == *prompt));
        let items = versions.map(|version| (newest_first(version.created_revision), version.clone()));
        let scope = prompt.map_or("-", PromptName::as_str);
        paginate(&format!("versions {scope}"), size, token, items)
    }

    /// Digests of the blobs of damaged checkpoints.
    pub fn damaged(&self) -> impl Iterator<Item = &str> {
        let damaged = self.rows.checkpoints.values().filter(|checkpoint| checkpoint.damaged);
        damaged.flat_map(|checkpoint| &checkpoint.files).map(|file| file.digest.as_str())
    }

    /// Digests of all blobs that must stay: those of checkpoints, of prompts, and of the data of jobs that are there.
    pub fn digests(&self) -> impl Iterator<Item = &str> {
        let checkpoints = self.rows.checkpoints.values().flat_map(|checkpoint| &checkpoint.files);
        let prompts = self.rows.prompts.values().map(|version| version.digest.as_str());
        let jobs = self.rows.jobs.values().flat_map(|job| crate::wire::digests_of(&job.spec));
        checkpoints.map(|file| file.digest.as_str()).chain(prompts).chain(jobs)
    }
}
