//! Jobs: what is asked of them, and every change of their state.

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName},
    v1::{BackboneState, JobReason, JobState, JobWish, Schedule},
};
use tonic::Code;

use super::{
    Core,
    checkpoint::Checkpoint,
    effects::{Change, Reply, Resource},
    input::{CheckpointRef, JobTarget, NewJob, StepRef},
    job::{Attempt, AttemptEnd, Best, Job, KEPT_ATTEMPTS, is_final},
    read::JobView,
    requests::{Outcome, check_etag},
    rows::{Counter, Target},
    suspects::Suspicion,
    transitions::{JobCause, job_transition},
};

/// Characters of a message that is kept, at most.
pub(super) const MAX_MESSAGE: usize = 2000;

/// What a job begins with that goes on from another's checkpoint.
struct Start {
    /// The name of that checkpoint.
    from: String,
    best: Option<Best>,
    /// By step; the last is the one from which it goes on.
    checkpoints: Vec<Checkpoint>,
}

impl Core {
    pub(super) fn create_job(&mut self, new: NewJob, validate_only: bool) -> Result<Outcome, Problem> {
        let Some(backbone) = self.rows.backbones.get(&new.backbone) else {
            return Err(Problem::not_found(new.backbone.as_str()));
        };
        if backbone.state == BackboneState::Failed {
            let what = format!(
                "{} has failed, and trains nothing: {}; mend that, and then: incipit backbone retry {}",
                backbone.name,
                backbone.message,
                backbone.name.id()
            );
            return Err(Problem::state("BACKBONE_FAILED", what).with("backbone", &backbone.name));
        }
        if self.rows.jobs.contains_key(&new.name) {
            let what = format!("there is a {} already; choose another name, or leave it out", new.name);
            return Err(Problem::new(Code::AlreadyExists, "JOB_EXISTS", what).with("name", &new.name));
        }
        self.check_room()?;
        let start = new.start.as_ref().map(|start| self.start_of(&new, start)).transpose()?;
        let mut job = self.new_job(new);
        if let Some(Start { from, best, checkpoints }) = &start {
            job.continued_from.clone_from(from);
            job.committed_step = checkpoints.last().map_or(0, |checkpoint| checkpoint.step);
            job.best = *best;
        }
        let cause = if self.is_ready(&job.backbone) { JobCause::Created } else { JobCause::CreatedEarly };
        self.step(&mut job, cause, "");
        if validate_only {
            let queue_position = self.queue_position(&job);
            let view = JobView { job, progress: None, steps_per_second: 0.0, queue_position };
            return Ok(Outcome::Shown(Reply::Job(Box::new(view))));
        }
        let name = job.name.clone();
        self.put_job(job);
        for checkpoint in start.into_iter().flat_map(|start| start.checkpoints) {
            self.put(Resource::Checkpoint(Box::new(checkpoint)));
        }
        Ok(Outcome::Done(Target::Job(name)))
    }

    /// Checks that one more job may wait.
    fn check_room(&self) -> Result<(), Problem> {
        let (open, limit) =
            (self.rows.jobs.values().filter(|job| !job.is_final()).count(), self.config.max_jobs);
        if open < limit {
            return Ok(());
        }
        let what = format!(
            "{open} jobs have not ended, and limits.jobs of the coordinator is {limit}; wait until some have, cancel some, or raise it"
        );
        Err(Problem::new(Code::ResourceExhausted, "TOO_MANY_JOBS", what).with("limit", limit))
    }

    /// What a new job begins with that goes on from another's checkpoint: that, and the best ones before it. Their files are the same
    /// blobs.
    fn start_of(&self, new: &NewJob, start: &CheckpointRef) -> Result<Start, Problem> {
        let from = self.job(&start.job)?;
        if start.step == StepRef::Best && !from.spec.tasks.is_empty() {
            let what = format!(
                "is the best of {}, each of whose tasks has its own; name a step, or last",
                from.name
            );
            return Err(Problem::field("continue_from", what));
        }
        let last = self.find_whole_checkpoint(start)?;
        self.check_continues(new, from, last)?;
        let copied = |checkpoint: &Checkpoint| Checkpoint {
            job: new.name.clone(),
            pinned: false,
            attempt: 0,
            epoch: 0,
            create_time: self.now,
            created_revision: 0,
            revision: 0,
            ..checkpoint.clone()
        };
        let is_best = |of: &&Checkpoint| !of.damaged && (of.best || of.tasks.iter().any(|task| task.best));
        let before = self.checkpoints_of(&last.job).filter(|of| of.step < last.step);
        let mut checkpoints: Vec<Checkpoint> = before.filter(is_best).map(copied).collect();
        checkpoints.sort_by_key(|checkpoint| checkpoint.step);
        checkpoints.push(copied(last));
        let best = from.best.filter(|best| checkpoints.iter().any(|of| of.step == best.step));
        Ok(Start { from: last.name(), best, checkpoints })
    }

    /// Checks what an engine would refuse as soon as it had the job, or could not do.
    fn check_continues(&self, new: &NewJob, from: &Job, last: &Checkpoint) -> Result<(), Problem> {
        if let Some(steps) = new.spec.steps.filter(|steps| *steps < last.step) {
            let what = format!("is {steps}, and {} is of step {} already", last.name(), last.step);
            return Err(Problem::field("job.spec.steps", what));
        }
        let backbones = &self.rows.backbones;
        if let Some(backbone) = backbones.get(&new.backbone) {
            let (here, there) = (&backbone.fingerprint, &last.backbone_fingerprint);
            if !here.is_empty() && !there.is_empty() && here != there {
                let what = format!(
                    "is another model than the one of {}: its fingerprint is {here}, not {there}; give a backbone with the same files",
                    last.name()
                );
                return Err(Problem::field("job.backbone", what));
            }
            let other = backbones
                .get(&from.backbone)
                .filter(|old| old.create_time <= last.create_time && old.spec.dtype != backbone.spec.dtype);
            if let Some(old) = other {
                let (here, there) = (backbone.spec.dtype, old.spec.dtype);
                let what = format!("has the model in {here}, and {} has it in {there}", old.name);
                return Err(Problem::field("job.backbone", what));
            }
        }
        let falls = !matches!(new.spec.schedule(), Schedule::Constant | Schedule::Unspecified);
        let moved = new.spec.steps.zip(from.spec.steps).is_some_and(|(new, old)| new != old);
        if falls && moved {
            let what =
                "moves the end of the schedule, and so every learning rate before it; leave it as it was";
            return Err(Problem::field("job.spec.steps", what));
        }
        Ok(())
    }

    fn new_job(&self, new: NewJob) -> Job {
        let before = self.rows.counters.get(new.name.as_str()).map_or(0, |counter| counter.value);
        Job {
            name: new.name,
            backbone: new.backbone,
            spec: new.spec,
            priority: new.priority,
            retry_policy: new.retry_policy,
            labels: new.labels,
            state: JobState::Unspecified,
            reason: JobReason::Unspecified,
            message: String::new(),
            wish: JobWish::Unspecified,
            attempts: Vec::new(),
            attempts_before: u32::try_from(before).unwrap_or(u32::MAX),
            num_failures: 0,
            suspicion: Suspicion::default(),
            continued_from: String::new(),
            committed_step: 0,
            best: None,
            warnings: Vec::new(),
            create_time: self.now,
            start_time: None,
            end_time: None,
            enqueue_time: self.now,
            created_revision: 0,
            revision: 0,
        }
    }

    pub(super) fn pause_job(&mut self, target: &JobTarget) -> Result<Target, Problem> {
        let mut job = self.target(target)?;
        match (job.state, job.wish) {
            (JobState::Paused, _) | (JobState::Running, JobWish::Pause) => {}
            (JobState::Running, JobWish::Unspecified) => {
                job.wish = JobWish::Pause;
                self.put_job(job);
            }
            _ => self.ask(job, JobCause::PauseRequested, "pause")?,
        }
        Ok(Target::Job(target.name.clone()))
    }

    pub(super) fn resume_job(&mut self, target: &JobTarget) -> Result<Target, Problem> {
        let mut job = self.target(target)?;
        match (job.state, job.wish) {
            (JobState::Queued, _) | (JobState::Running, JobWish::Unspecified) => {}
            // If it has left by now, its leave is answered by putting it into the queue.
            (JobState::Running, JobWish::Pause) => {
                job.wish = JobWish::Unspecified;
                self.put_job(job);
            }
            _ => {
                let ready = self.is_ready(&job.backbone);
                job.enqueue_time = self.now;
                let cause = if ready { JobCause::ResumeRequested } else { JobCause::ResumedEarly };
                self.ask(job, cause, "resume")?;
            }
        }
        Ok(Target::Job(target.name.clone()))
    }

    pub(super) fn cancel_job(&mut self, target: &JobTarget) -> Result<Target, Problem> {
        let mut job = self.target(target)?;
        match (job.state, job.wish) {
            (JobState::Cancelled, _) | (JobState::Running, JobWish::Cancel) => {}
            (JobState::Running, _) => {
                job.wish = JobWish::Cancel;
                self.put_job(job);
            }
            _ => self.ask(job, JobCause::CancelRequested, "cancel")?,
        }
        Ok(Target::Job(target.name.clone()))
    }

    pub(super) fn delete_job(&mut self, target: &JobTarget) -> Result<Target, Problem> {
        let job = self.target(target)?;
        if !job.is_final() {
            let what = format!("{} is {}; cancel it first", job.name, state_word(job.state));
            return Err(Problem::state("JOB_STATE", what).with("name", &job.name));
        }
        let promoted = self.rows.prompts.values().find(|version| version.job == job.name);
        if let Some(version) = promoted {
            let version = version.name();
            let what = format!("{} has a checkpoint that is {version}; delete that first", job.name);
            return Err(Problem::state("CHECKPOINT_PROMOTED", what).with("version", version));
        }
        self.forget_job(job);
        Ok(Target::Nothing)
    }

    /// Removes a job that has ended, with its checkpoints.
    pub(super) fn forget_job(&mut self, job: Job) {
        let steps: Vec<u64> = self.checkpoints_of(&job.name).map(|checkpoint| checkpoint.step).collect();
        for step in steps {
            self.remove_checkpoint(&job.name, step);
        }
        if job.last_attempt() > 0 {
            self.remember(job.name.as_str(), u64::from(job.last_attempt()));
        }
        self.progress.remove(&job.name);
        self.remove(Resource::Job(Box::new(job)));
    }

    /// Remembers for a while how far the attempts or epochs of something deleted went. Another one of its name goes on from there: reports
    /// that are late are of neither.
    pub(super) fn remember(&mut self, name: &str, value: u64) {
        let expire_time = Some(self.now.after(self.config.request_ttl_ms));
        self.change(Change::PutCounter(Counter { name: name.to_owned(), value, expire_time }));
    }

    pub(super) fn target(&self, target: &JobTarget) -> Result<Job, Problem> {
        let job = self.job(&target.name)?;
        check_etag(job.name.as_str(), target.etag, job.revision)?;
        Ok(job.clone())
    }

    /// Does what a person asks for, if the job's state allows it.
    fn ask(&mut self, mut job: Job, cause: JobCause, verb: &str) -> Result<(), Problem> {
        if job_transition(Some(job.state), cause).is_none() {
            let wish = match job.wish {
                JobWish::Cancel => ", and is being cancelled",
                _ => "",
            };
            let what = format!("{} is {}{wish}: there is nothing to {verb}", job.name, state_word(job.state));
            let problem = Problem::state("JOB_STATE", what).with("name", &job.name);
            return Err(problem.with("state", job.state.as_str_name()));
        }
        self.step(&mut job, cause, "");
        self.put_job(job);
        Ok(())
    }

    /// Moves a job to its next state. A cause that does not fit is a fault of the program; the job then stays as it is.
    pub(super) fn step(&self, job: &mut Job, cause: JobCause, message: &str) {
        let from = Some(job.state).filter(|state| *state != JobState::Unspecified);
        let to = job_transition(from, cause);
        debug_assert!(to.is_some(), "{job:?} has no way by {cause:?}");
        let Some((state, reason)) = to else { return };
        (job.state, job.reason, job.message) = (state, reason, cut(message));
        if state != JobState::Running {
            job.wish = JobWish::Unspecified;
        }
        if is_final(state) {
            job.end_time = Some(self.now);
        }
    }

    /// Gives a queued job to its backbone.
    pub(super) fn start_attempt(&mut self, name: &JobName, epoch: u64) {
        let Some(mut job) = self.rows.jobs.get(name).cloned() else { return };
        self.step(&mut job, JobCause::Admitted, "");
        job.attempts.push(Attempt {
            number: job.last_attempt() + 1,
            epoch,
            start_step: job.committed_step,
            end_step: job.committed_step,
            start_time: self.now,
            end: None,
        });
        let excess = job.attempts.len().saturating_sub(KEPT_ATTEMPTS);
        job.attempts.drain(..excess);
        self.progress.remove(name);
        self.put_job(job);
    }

    /// Ends the attempt of a running job, and moves the job on.
    pub(super) fn end_attempt(
        &mut self,
        name: &JobName,
        cause: JobCause,
        reason: JobReason,
        message: &str,
        step: Option<u64>,
    ) {
        let Some(mut job) = self.rows.jobs.get(name).cloned() else { return };
        let progress = self.progress.remove(name);
        let seen = progress.as_ref().map_or(0, |progress| progress.step);
        if let Some(attempt) = job.attempts.last_mut() {
            attempt.end_step = step.unwrap_or(seen).max(attempt.end_step);
            attempt.end = Some(AttemptEnd { time: self.now, reason, message: cut(message) });
        }
        self.step(&mut job, cause, message);
        match cause {
            JobCause::Retried => {
                job.num_failures += 1;
                job.enqueue_time = self.now;
            }
            JobCause::Failed(_) => job.num_failures += 1,
            // One whose data are on their way still has no part in it.
            JobCause::EngineLost if progress.is_some() => self.suspect(&mut job),
            _ => {}
        }
        self.put_job(job);
        self.retain(name);
    }

    /// Takes all running jobs off a backbone that cannot go on: they wait for it in front of the queue, or get what was wished.
    pub(super) fn throw_off(&mut self, backbone: &BackboneName, otherwise: JobCause, message: &str) {
        for name in self.names_of(backbone, JobState::Running) {
            let wish = self.rows.jobs.get(&name).map(|job| job.wish);
            let cause = match wish {
                Some(JobWish::Pause) => JobCause::PauseDone,
                Some(JobWish::Cancel) => JobCause::CancelDone,
                _ => otherwise,
            };
            self.end_attempt(&name, cause, JobReason::RankLost, message, None);
        }
    }

    pub(super) fn names_of(&self, backbone: &BackboneName, state: JobState) -> Vec<JobName> {
        let jobs = self.rows.jobs.values();
        let jobs = jobs.filter(|job| job.state == state && job.backbone == *backbone);
        jobs.map(|job| job.name.clone()).collect()
    }
}

/// A message, cut to what is kept.
pub(super) fn cut(message: &str) -> String {
    match message.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => message[..end].to_owned(),
        None => message.to_owned(),
    }
}

pub(super) fn state_word(state: JobState) -> &'static str {
    match state {
        JobState::Unspecified => "nowhere",
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Paused => "paused",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}
