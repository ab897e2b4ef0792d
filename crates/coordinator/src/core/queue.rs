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
        let queue: Vec<JobName> = self.queue(name).iter().map(|job| job.name.clone()).collect();
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
        for name in queue {
            let Some(job) = self.rows.jobs.get(&name) else { continue };
            if free > 0 && (!job.is_suspect() || suspect.as_ref() == Some(&name)) {
                self.start_attempt(&name, epoch);
                free -= 1;
                continue;
            }
            let (message, cause) = (why_it_waits(job, state), waiting_for(state, job.reason));
            if cause.is_none() && (job.reason != JobReason::BackboneNotReady || job.message == message) {
                continue;
            }
            let mut job = job.clone();
            match cause {
                Some(cause) => self.step(&mut job, cause, &message),
                None => job.message = message,
            }
            self.put_job(job);
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
    use JobReason::{BackboneNotReady, BackboneRecovering, CheckpointDamaged, Retrying, WaitingForPlace};
    match (state, reason) {
        (BackboneState::Ready, BackboneNotReady | BackboneRecovering) => Some(JobCause::BackboneReady),
        (BackboneState::Ready, _) => None,
        (BackboneState::Failed, BackboneRecovering | Retrying | CheckpointDamaged) => {
            Some(JobCause::BackboneNotReady)
        }
        (_, WaitingForPlace) => Some(JobCause::BackboneNotReady),
        _ => None,
    }
}
