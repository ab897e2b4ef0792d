//! Jobs that may bring their engines down. An engine that dies does not say of which of its jobs, so that one job could keep all others of a
//! backbone from getting on. A job that took part at two losses, with no new step of its own between, is a suspect: suspects go back to
//! their backbone one at a time. If an engine is lost again and again, although jobs without suspicion got on, it is the suspect's doing.
//!
//! Where no other job gets on there is no proof, and the losses go on to be the backbone's: it fails as a crash loop.

use std::fmt;

use incipit_proto::{
    names::{BackboneName, JobName},
    v1::{JobReason, JobState},
};
use serde::{Deserialize, Serialize};

use super::{Core, job::Job, transitions::JobCause};

/// Losses after which a job is a suspect. Not one: an engine may be lost for many reasons, and suspects wait.
const SUSPECT: u32 = 2;
/// Losses that speak against a suspect alone, after which it is judged. Not one: engines are also killed by chance, and that is not to be
/// charged to a job.
const PROOFS: u32 = 2;

/// What speaks against a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicion {
    /// Engines lost in a row with the job taking part, and no new step of its own between.
    pub num_losses: u32,
    /// Of these, the losses with no other suspect there, while other jobs got on.
    pub num_proofs: u32,
}

impl Suspicion {
    /// Whether the job is to end. Jobs are judged when their backbone is ready again: until then it may turn out that a worker was lost.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        self.num_proofs >= PROOFS
    }
}

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.num_losses;
        write!(
            f,
            "engines were lost {count} times in a row while it was there, with no new step of its own between: it goes back once the others \
             have got on, and no other such job with it"
        )
    }
}

impl Job {
    /// Whether it goes to its backbone only where no other suspect is.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.suspicion.num_losses >= SUSPECT
    }
}

impl Core {
    /// An engine was lost by its own doing, with the job taking part.
    pub(super) fn suspect(&self, job: &mut Job) {
        // As it was before the loss: nothing was lost since somebody's last new step, which was not this job's.
        let others_get_on =
            self.rows.backbones.get(&job.backbone).is_some_and(|backbone| backbone.num_losses == 0);
        job.suspicion.num_proofs += u32::from(job.is_suspect() && others_get_on);
        job.suspicion.num_losses += 1;
    }

    /// It was no engine's doing after all: takes the last loss from the jobs that it threw off.
    pub(super) fn excuse(&mut self, backbone: &BackboneName) {
        for name in self.names_of(backbone, JobState::Queued) {
            let Some(mut job) = self.rows.jobs.get(&name).cloned() else { continue };
            if job.reason == JobReason::BackboneRecovering && job.suspicion.num_losses > 0 {
                job.suspicion = Suspicion { num_losses: job.suspicion.num_losses - 1, num_proofs: 0 };
                self.put_job(job);
            }
        }
    }

    /// Takes from a backbone's jobs what speaks against them: the losses of before a retry were maybe none of their doing, and are counted no
    /// more.
    pub(super) fn trust(&mut self, backbone: &BackboneName) {
        for state in [JobState::Queued, JobState::Paused] {
            for name in self.names_of(backbone, state) {
                let Some(mut job) = self.rows.jobs.get(&name).cloned() else { continue };
                if job.suspicion != Suspicion::default() {
                    job.suspicion = Suspicion::default();
                    self.put_job(job);
                }
            }
        }
    }

    /// The suspect that may go to a backbone that is ready, if one may: the one with the fewest losses, once another job got on since the
    /// last loss, or if there is no other to do so.
    pub(super) fn next_suspect(&self, backbone: &BackboneName) -> Option<JobName> {
        let here = self.rows.jobs.values().filter(|job| job.backbone == *backbone);
        let (mut queued, mut others) = (Vec::new(), false);
        for job in here {
            match (job.state, job.is_suspect()) {
                (JobState::Running, true) => return None,
                (JobState::Queued, true) => queued.push(job),
                (JobState::Running | JobState::Queued, false) => others = true,
                _ => {}
            }
        }
        let lost = self.rows.backbones.get(backbone).is_some_and(|backbone| backbone.num_losses > 0);
        if lost && others {
            return None;
        }
        let next = queued.into_iter().min_by_key(|job| (job.suspicion.num_losses, job.queue_key()));
        next.map(|job| job.name.clone())
    }

    /// Ends the queued jobs that bring their engines down, but for those whose retry policy allows another attempt.
    pub(super) fn judge(&mut self, backbone: &BackboneName) {
        for name in self.names_of(backbone, JobState::Queued) {
            let Some(mut job) = self.rows.jobs.get(&name).cloned() else { continue };
            if !job.suspicion.is_proven() {
                continue;
            }
            let last = job.attempts.last().and_then(|attempt| attempt.end.as_ref());
            let message = format!(
                "engines were lost {} times in a row while it was there, with no new step of its own between, and other jobs got on without \
                 it; last: {}",
                job.suspicion.num_losses,
                last.map_or("", |end| &end.message)
            );
            if job.may_retry(JobReason::EngineCrashed) {
                job.suspicion.num_proofs = 0;
                self.step(&mut job, JobCause::Retried, &message);
            } else {
                self.step(&mut job, JobCause::Failed(JobReason::EngineCrashed), &message);
            }
            job.num_failures += 1;
            self.put_job(job);
        }
    }
}
