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
        if state == BackboneState::Ready {
            self.judge(name);
        }
        let queue: Vec<(JobName, JobReason, bool)> =
            self.queue(name).iter().map(|job| (job.name.clone(), job.reason, job.is_suspect())).collect();
        if queue.is_empty() {
            return;
        }
        let mut free = match state {
            BackboneState::Ready if !self.is_to_move(name) => {
                places.saturating_sub(self.names_of(name, JobState::Running).len())
            }
            _ => 0,
        };
        let suspect = self.next_suspect(name);
        for (job, reason, is_suspect) in queue {
            if free > 0 && (!is_suspect || suspect.as_ref() == Some(&job)) {
                self.start_attempt(&job, epoch);
                free -= 1;
            } else if let Some(cause) = waiting_for(state, reason) {
                let Some(mut job) = self.rows.jobs.get(&job).cloned() else { continue };
                let message = if is_suspect { job.suspicion.to_string() } else { String::new() };
                self.step(&mut job, cause, &message);
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
