//! The queue of a backbone.

use incipit_proto::{
    names::BackboneName,
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
        let queue: Vec<Job> = self.queue(name).into_iter().cloned().collect();
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
        for mut job in queue {
            if free > 0 && (!job.is_suspect() || suspect.as_ref() == Some(&job.name)) {
                self.start_attempt(&job.name, epoch);
                free -= 1;
                continue;
            }
            let message = why_it_waits(&job, state);
            if let Some(cause) = waiting_for(state, job.reason) {
                self.step(&mut job, cause, &message);
                self.put_job(job);
            } else if job.reason == JobReason::BackboneNotReady && job.message != message {
                job.message = message;
                self.put_job(job);
            }
        }
    }
}

/// What there is to say of a job that waits, besides its reason.
fn why_it_waits(job: &Job, state: BackboneState) -> String {
    let name = job.backbone.id();
    match state {
        BackboneState::Failed => {
            format!(
                "{name} has failed: see why (incipit backbone get {name}), mend that, and then: incipit backbone retry {name}"
            )
        }
        _ if job.is_suspect() => job.suspicion.to_string(),
        _ => String::new(),
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
