//! Which checkpoints of a job stay, and which jobs.

use std::collections::BTreeSet;

use incipit_proto::names::JobName;

use super::{
    Core,
    effects::Resource,
    job::{DEFAULT_KEEP, Job},
};

/// Jobs that are forgotten in one go, at most: each may have tens of thousands of points, and nothing else is written meanwhile.
const FORGOTTEN_AT_ONCE: usize = 4;

impl Core {
    /// Forgets some of the jobs that ended longer ago than jobs are kept, the oldest first. Says whether there are more.
    pub(super) fn forget_jobs(&mut self) -> bool {
        let Some(ttl) = self.config.job_ttl_ms else { return false };
        let promoted: BTreeSet<&JobName> = self.rows.prompts.values().map(|version| &version.job).collect();
        let is_old = |job: &&Job| job.end_time.is_some_and(|end| self.now.since(end) >= ttl);
        let is_kept = |job: &Job| {
            promoted.contains(&job.name) || self.checkpoints_of(&job.name).any(|checkpoint| checkpoint.pinned)
        };
        let mut old: Vec<Job> =
            self.rows.jobs.values().filter(is_old).filter(|job| !is_kept(job)).cloned().collect();
        // Those of one time by their names, as they come.
        old.sort_by_key(|job| job.end_time);
        let more = old.len() > FORGOTTEN_AT_ONCE;
        for job in old.into_iter().take(FORGOTTEN_AT_ONCE) {
            let before = if job.message.is_empty() { String::new() } else { format!("{}; ", job.message) };
            let days = ttl / (24 * 3600 * 1000);
            let message = format!("{before}forgotten {days} days after its end, as limits.job_days says");
            self.forget_job(Job { message, ..job });
        }
        more
    }

    /// Removes the checkpoints that nothing keeps. Their blobs are left to the collection of garbage.
    pub(super) fn retain(&mut self, name: &JobName) {
        let Some(job) = self.rows.jobs.get(name) else { return };
        // The newest is kept whatever is asked for: without it the job could not go on.
        let keep = job.spec.keep.unwrap_or(DEFAULT_KEEP).max(1) as usize;
        let (kept_by_job, last) = (self.kept_steps(name), job.committed_step);
        let all = || self.checkpoints_of(name);
        let whole = all().filter(|checkpoint| !checkpoint.damaged).skip(keep);
        // Its job may come to a damaged one's step again, and then it is whole.
        let passed = all().filter(|checkpoint| checkpoint.damaged && checkpoint.step < last);
        let steps: Vec<u64> = whole.chain(passed).map(|checkpoint| checkpoint.step).collect();
        for step in steps {
            let kept_for_itself = self
                .checkpoint(name, step)
                .is_ok_and(|checkpoint| checkpoint.pinned || checkpoint.tasks.iter().any(|task| task.best));
            if !kept_for_itself && !kept_by_job.contains(&step) && !self.is_promoted(name, step) {
                self.remove_checkpoint(name, step);
            }
        }
    }

    /// Steps that a job holds on to: its best, its newest, and the one that its attempt went on from, which an agent
    /// that comes back may be told again.
    pub(super) fn kept_steps(&self, name: &JobName) -> BTreeSet<u64> {
        let Some(job) = self.rows.jobs.get(name) else { return BTreeSet::new() };
        let best = job.best.map(|best| best.step);
        let start = job.open_attempt().map(|attempt| attempt.start_step);
        [Some(job.committed_step), best, start].into_iter().flatten().collect()
    }

    pub(super) fn is_promoted(&self, job: &JobName, step: u64) -> bool {
        self.rows.prompts.values().any(|version| version.job == *job && version.step == step)
    }

    pub(super) fn remove_checkpoint(&mut self, job: &JobName, step: u64) {
        if let Some(checkpoint) = self.rows.checkpoints.get(&(job.clone(), step)) {
            let checkpoint = Box::new(checkpoint.clone());
            self.remove(Resource::Checkpoint(checkpoint));
        }
    }
}
