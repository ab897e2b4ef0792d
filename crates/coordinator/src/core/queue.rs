//! The queue of a backbone.

use incipit_proto::{
    names::{BackboneName, JobName},
    v1::{BackboneState, JobReason, JobState},
};

use super::{Core, job::Job, transitions::JobCause};

impl Core {
    /// Jobs that wait for a backbone, the next first.
    pub(super) fn queue(&self, backbone: &BackboneName) -> Vec<&Job> {
        let jobs = self.rows.jobs.values();
        let mut queue: Vec<&Job> =
            jobs.filter(|job| job.state == JobState::Queued && job.backbone == *backbone).collect();
        queue.sort_by_key(|job| job.queue_key());
        queue
    }

    /// Gives jobs to a backbone as long as it has places, and says of the others why they wait.
    pub(super) fn admit(&mut self, name: &BackboneName) {
        let Some(backbone) = self.rows.backbones.get(name) else { return };
        let (state, epoch, places) =
            (backbone.state, backbone.epoch, backbone.spec.max_running_jobs as usize);
        let queue: Vec<(JobName, JobReason)> =
            self.queue(name).iter().map(|job| (job.name.clone(), job.reason)).collect();
        if queue.is_empty() {
            return;
        }
        let free = match state {
            BackboneState::Ready if !self.is_to_move(name) => {
                places.saturating_sub(self.names_of(name, JobState::Running).len())
            }
            _ => 0,
        };
        for (place, (job, reason)) in queue.into_iter().enumerate() {
            if place < free {
                self.start_attempt(&job, epoch);
            } else if let Some(cause) = waiting_for(state, reason) {
                let Some(mut job) = self.rows.jobs.get(&job).cloned() else { continue };
                self.step(&mut job, cause, "");
                self.put_job(job);
            }
        }
    }
}

/// What changes for a job that waits for this reason, now that its backbone stands there.
fn waiting_for(state: BackboneState, reason: JobReason) -> Option<JobCause> {
    use JobReason::{BackboneNotReady, BackboneRecovering, Retrying, WaitingForPlace};
    match (state, reason) {
        (BackboneState::Ready, BackboneNotReady | BackboneRecovering) => Some(JobCause::BackboneReady),
        (BackboneState::Ready, _) => None,
        (BackboneState::Failed, BackboneRecovering | Retrying) => Some(JobCause::BackboneNotReady),
        (_, WaitingForPlace) => Some(JobCause::BackboneNotReady),
        _ => None,
    }
}
