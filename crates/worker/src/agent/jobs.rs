//! The jobs of the backbones that this machine leads, and whether their files are here.

use std::collections::BTreeMap;

use incipit_proto::v1::{self, JobAssignment, JobAssignments, job_report::Report};

use crate::agent::core::{Action, FileKey, Refused};
use crate::agent::engines::{Engines, Key};
use crate::frames::{self, LocalJob};

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
    /// Takes the list of jobs that a backbone is to have.
    pub(crate) fn assign(&mut self, assignments: JobAssignments, actions: &mut Vec<Action>) {
        let JobAssignments { backbone, epoch, jobs } = assignments;
        let known = self.backbones.remove(&backbone);
        let mut before =
            known.filter(|known| known.epoch == epoch).map(|known| known.jobs).unwrap_or_default();
        let mut after = BTreeMap::new();
        for assignment in jobs {
            let key = (assignment.job.clone(), assignment.attempt);
            let files = match before.remove(&key) {
                Some(job) => job.files,
                None => {
                    actions.push(Action::Fetch(Box::new(assignment.clone())));
                    Files::Coming
                }
            };
            after.insert(key, Job { assignment, files });
        }
        self.backbones.insert(backbone, Backbone { epoch, jobs: after, told: false });
    }

    fn find(&mut self, job: &FileKey) -> Option<(&String, &mut Backbone)> {
        self.backbones.iter_mut().find(|(_, backbone)| backbone.jobs.contains_key(job))
    }

    /// The files of a job are here.
    pub(crate) fn fetched(&mut self, key: &FileKey, local: LocalJob) {
        let Some((_, backbone)) = self.find(key) else { return };
        backbone.told = false;
        if let Some(job) = backbone.jobs.get_mut(key) {
            job.files = Files::Here(local);
        }
    }

    /// The files of a job cannot be had: what to report.
    pub(crate) fn refused(&mut self, key: &FileKey, refused: Refused) -> Option<v1::JobReport> {
        let (name, backbone) = self.find(key)?;
        let (name, epoch) = (name.clone(), backbone.epoch);
        let job = backbone.jobs.get_mut(key)?;
        job.files = Files::Left;
        let step = job.assignment.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
        let state = v1::JobState::Failed.into();
        let left = v1::JobLeft { state, reason: refused.reason.into(), message: refused.message, step };
        let report = Some(Report::Left(left));
        Some(v1::JobReport { backbone: name, epoch, job: key.0.clone(), attempt: key.1, report })
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

impl Job {
    fn local(&self) -> Option<LocalJob> {
        match &self.files {
            Files::Here(local) => {
                Some(LocalJob { assignment: Some(self.assignment.clone()), ..local.clone() })
            }
            Files::Coming | Files::Left => None,
        }
    }
}
