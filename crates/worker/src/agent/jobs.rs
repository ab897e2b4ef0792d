//! The jobs of the backbones that this machine leads, and whether their files are here.

use std::collections::{BTreeMap, BTreeSet};

use incipit_proto::v1::{
    self, EngineAssignments, JobAssignment, JobAssignments, JobReason, JobState, JobWish, job_report::Report,
};

use crate::agent::core::{Action, FileKey, Refused};
use crate::agent::engines::{Engines, Key};
use crate::frames::{self, LocalJob};

/// Newest checkpoints of a job that the coordinator keeps where the job does not say how many.
const KEEP: u32 = 3;

/// The jobs.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    backbones: BTreeMap<String, Backbone>,
}

#[derive(Debug)]
struct Backbone {
    epoch: u64,
    jobs: BTreeMap<FileKey, Job>,
    /// Whether the leader knows all this.
    told: bool,
}

#[derive(Debug)]
struct Job {
    assignment: JobAssignment,
    files: Files,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are here")]
enum Files {
    /// They were asked for.
    Coming,
    Here(LocalJob),
    /// It has left: the coordinator does not know yet.
    Left,
}

impl Jobs {
    /// Takes the list of jobs that a backbone is to have. Those that no engine has heard of leave at once where that is wished: the reports
    /// of that.
    pub(crate) fn assign(
        &mut self,
        assignments: JobAssignments,
        actions: &mut Vec<Action>,
    ) -> Vec<v1::JobReport> {
        let JobAssignments { backbone, epoch, jobs } = assignments;
        let mut known = self.backbones.remove(&backbone);
        let mut before = match &mut known {
            Some(known) if known.epoch == epoch => std::mem::take(&mut known.jobs),
            _ => BTreeMap::new(),
        };
        let (mut after, mut reports) = (BTreeMap::new(), Vec::new());
        for assignment in jobs {
            let key = (assignment.job.clone(), assignment.attempt);
            let known = before.remove(&key);
            let is_new = known.is_none();
            let mut job = Job { assignment, files: known.map_or(Files::Coming, |known| known.files) };
            if matches!(job.files, Files::Coming) {
                match job.answer() {
                    Some(left) => {
                        reports.push(job.leave(&backbone, epoch, left));
                        if !is_new {
                            actions.push(Action::Forget(key.clone()));
                        }
                    }
                    None if is_new => actions.push(Action::Fetch(Box::new(job.assignment.clone()))),
                    None => {}
                }
            }
            after.insert(key, job);
        }
        forget(before, actions);
        forget(known.map(|known| known.jobs).unwrap_or_default(), actions);
        self.backbones.insert(backbone, Backbone { epoch, jobs: after, told: false });
        reports
    }

    /// Forgets the jobs of groups that are no more.
    pub(crate) fn forget_old(&mut self, assignments: &EngineAssignments, actions: &mut Vec<Action>) {
        let known = |name: &str, epoch: u64| {
            assignments.engines.iter().any(|engine| engine.backbone == name && engine.epoch <= epoch)
        };
        self.backbones.retain(|name, backbone| {
            let keeps = known(name, backbone.epoch);
            if !keeps {
                forget(std::mem::take(&mut backbone.jobs), actions);
            }
            keeps
        });
    }

    /// The jobs that are to be cancelled.
    pub(crate) fn cancelled(&self) -> BTreeSet<FileKey> {
        let jobs = self.backbones.values().flat_map(|backbone| &backbone.jobs);
        let jobs = jobs.filter(|(_, job)| job.assignment.wish() == JobWish::Cancel);
        jobs.map(|(key, _)| key.clone()).collect()
    }

    /// The backbone that a job is assigned to.
    pub(crate) fn backbone_of(&self, job: &FileKey) -> Option<&str> {
        let mut backbones = self.backbones.iter();
        backbones.find(|(_, backbone)| backbone.jobs.contains_key(job)).map(|(name, _)| &**name)
    }

    /// How many of its newest checkpoints are kept of a job.
    pub(crate) fn keep(&self, job: &FileKey) -> usize {
        let job = self.backbones.values().find_map(|backbone| backbone.jobs.get(job));
        job.and_then(|job| job.assignment.spec.as_ref()?.keep).unwrap_or(KEEP) as usize
    }

    fn find(&mut self, job: &FileKey) -> Option<(&String, &mut Backbone)> {
        self.backbones.iter_mut().find(|(_, backbone)| backbone.jobs.contains_key(job))
    }

    /// The files of a job are here.
    pub(crate) fn fetched(&mut self, key: &FileKey, local: LocalJob) {
        let Some((_, backbone)) = self.find(key) else { return };
        // One that has left meanwhile does not come back.
        if let Some(job) = backbone.jobs.get_mut(key)
            && matches!(job.files, Files::Coming)
        {
            job.files = Files::Here(local);
            backbone.told = false;
        }
    }

    /// The files of a job cannot be had: what to report.
    pub(crate) fn refused(&mut self, key: &FileKey, refused: Refused) -> Option<v1::JobReport> {
        let (name, backbone) = self.find(key)?;
        let (name, epoch) = (name.clone(), backbone.epoch);
        let job = backbone.jobs.get_mut(key).filter(|job| matches!(job.files, Files::Coming))?;
        let (state, reason, message) = (JobState::Failed, refused.reason, refused.message);
        Some(job.leave(&name, epoch, (state, reason, message)))
    }

    /// An engine reports of a job: one that has left is not named to it again.
    pub(crate) fn heard(&mut self, report: &v1::JobReport) {
        let key = (report.job.clone(), report.attempt);
        if let Some(Report::Left(_)) = &report.report
            && let Some((_, backbone)) = self.find(&key)
            && let Some(job) = backbone.jobs.get_mut(&key)
        {
            job.files = Files::Left;
        }
    }

    /// Whether this machine leads no job.
    pub(crate) fn are_none(&self) -> bool {
        let left = |job: &Job| matches!(job.files, Files::Left);
        self.backbones.values().all(|backbone| backbone.jobs.values().all(left))
    }

    /// What leaders that are ready have to be told.
    pub(crate) fn untold(&mut self, engines: &Engines) -> Vec<(Key, frames::Jobs)> {
        let mut orders = Vec::new();
        for (name, backbone) in &mut self.backbones {
            let key = Key { backbone: name.clone(), rank: 0 };
            let leads = engines
                .all()
                .get(&key)
                .is_some_and(|engine| engine.ready && engine.epoch() == backbone.epoch);
            if leads && !backbone.told {
                backbone.told = true;
                let jobs = backbone.jobs.values().filter_map(Job::local).collect();
                orders.push((key, frames::Jobs { epoch: backbone.epoch, jobs }));
            }
        }
        orders
    }
}

/// Jobs that are of no concern any more: nobody waits for their files.
fn forget(jobs: BTreeMap<FileKey, Job>, actions: &mut Vec<Action>) {
    let coming = jobs.into_iter().filter(|(_, job)| matches!(job.files, Files::Coming));
    actions.extend(coming.map(|(key, _)| Action::Forget(key)));
}

impl Job {
    /// What an engine would answer to what is wished of it, before its first step.
    fn answer(&self) -> Option<(JobState, JobReason, String)> {
        let (state, message) = match self.assignment.wish() {
            JobWish::Unspecified => return None,
            JobWish::Pause => (JobState::Paused, "paused as asked"),
            JobWish::Cancel => (JobState::Cancelled, "cancelled as asked"),
            JobWish::Yield => (JobState::Queued, "put back, for its backbone is to move"),
        };
        Some((state, JobReason::Requested, message.to_owned()))
    }

    /// It leaves before an engine has heard of it, with the checkpoint that it came with.
    fn leave(
        &mut self,
        backbone: &str,
        epoch: u64,
        (state, reason, message): (JobState, JobReason, String),
    ) -> v1::JobReport {
        self.files = Files::Left;
        let step = self.assignment.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
        let left = v1::JobLeft { state: state.into(), reason: reason.into(), message, step };
        let (backbone, job) = (backbone.to_owned(), self.assignment.job.clone());
        let (attempt, report) = (self.assignment.attempt, Some(Report::Left(left)));
        v1::JobReport { backbone, epoch, job, attempt, report }
    }

    fn local(&self) -> Option<LocalJob> {
        match &self.files {
            Files::Here(local) => {
                Some(LocalJob { assignment: Some(self.assignment.clone()), ..local.clone() })
            }
            Files::Coming | Files::Left => None,
        }
    }
}
