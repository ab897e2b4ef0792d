//! Checkpoints and prompts: what is asked of them.

use incipit_proto::{
    Problem,
    names::{JobName, PromptName},
};

use super::{
    Core,
    checkpoint::{Checkpoint, PROMPT_FILE, PromptVersion, version_name},
    effects::{Change, Resource},
    input::{CheckpointRef, StepRef},
    requests::check_etag,
    rows::{Counter, Target},
};

impl Core {
    pub(super) fn delete_checkpoint(
        &mut self,
        target: &CheckpointRef,
        etag: Option<u64>,
    ) -> Result<Target, Problem> {
        let checkpoint = self.find_checkpoint(target)?;
        let (name, step) = (checkpoint.name(), checkpoint.step);
        check_etag(&name, etag, checkpoint.revision)?;
        let refuse = |reason: &str, why: &str| {
            Err(Problem::state(reason, format!("{name} {why}")).with("name", &name))
        };
        if checkpoint.pinned {
            return refuse("CHECKPOINT_PINNED", "is pinned; unpin it first");
        }
        if self.is_promoted(&target.job, step) {
            return refuse("CHECKPOINT_PROMOTED", "is a version of a prompt; delete that first");
        }
        let job = self.job(&target.job)?;
        if !job.is_final() && job.committed_step == step {
            return refuse(
                "CHECKPOINT_NEEDED",
                "is the last of a job that has not ended; cancel the job first",
            );
        }
        if job.open_attempt().is_some_and(|attempt| attempt.start_step == step) {
            return refuse("CHECKPOINT_NEEDED", "is what its job went on from; wait until the job has left");
        }
        let mut job = job.clone();
        if job.best.is_some_and(|best| best.step == step) {
            job.best = None;
            self.put_job(job);
        }
        self.remove_checkpoint(&target.job, step);
        Ok(Target::Nothing)
    }

    pub(super) fn pin_checkpoint(
        &mut self,
        target: &CheckpointRef,
        etag: Option<u64>,
        pinned: bool,
    ) -> Result<Target, Problem> {
        let mut checkpoint = self.find_checkpoint(target)?.clone();
        check_etag(&checkpoint.name(), etag, checkpoint.revision)?;
        let step = checkpoint.step;
        if checkpoint.pinned != pinned {
            checkpoint.pinned = pinned;
            self.put(Resource::Checkpoint(Box::new(checkpoint)));
        }
        Ok(Target::Checkpoint(target.job.clone(), step))
    }

    /// The files of a checkpoint are whole: it was marked as damaged by what has passed, if it was.
    pub(super) fn verified(&mut self, job: &JobName, step: u64) {
        if let Some(checkpoint) = self.rows.checkpoints.get(&(job.clone(), step)).filter(|of| of.damaged) {
            let checkpoint = Checkpoint { damaged: false, ..checkpoint.clone() };
            self.put(Resource::Checkpoint(Box::new(checkpoint)));
        }
    }

    pub(super) fn promote(
        &mut self,
        prompt: PromptName,
        target: &CheckpointRef,
        etag: Option<u64>,
        description: String,
    ) -> Result<Target, Problem> {
        let checkpoint = self.find_whole_checkpoint(target)?.clone();
        check_etag(&checkpoint.name(), etag, checkpoint.revision)?;
        let tasks = checkpoint.tasks.iter().map(|task| &*task.name);
        check_task(&checkpoint.name(), tasks, target.task.as_deref())?;
        let name =
            target.task.as_ref().map_or(PROMPT_FILE.to_owned(), |task| format!("{task}/{PROMPT_FILE}"));
        let Some(file) = checkpoint.files.iter().find(|file| file.name == name) else {
            let what = format!("{} has no file {name}; choose another one", checkpoint.name());
            return Err(Problem::state("NO_PROMPT", what));
        };
        let of_task = checkpoint.tasks.iter().find(|task| Some(&task.name) == target.task.as_ref());
        let last = self.rows.counters.get(prompt.as_str()).map_or(0, |counter| counter.value);
        let versions = self.rows.prompts.range((prompt.clone(), 0)..=(prompt.clone(), u64::MAX));
        let version = PromptVersion {
            prompt: prompt.clone(),
            version: last + 1,
            job: checkpoint.job.clone(),
            step: checkpoint.step,
            task: target.task.clone(),
            previous: versions.last().map(|((_, version), _)| *version),
            digest: file.digest.clone(),
            backbone_fingerprint: checkpoint.backbone_fingerprint.clone(),
            score: of_task.map_or(checkpoint.score, |task| task.score),
            description,
            create_time: self.now,
            created_revision: 0,
            revision: 0,
        };
        let counter = Counter { name: prompt.to_string(), value: last + 1, expire_time: None };
        self.change(Change::PutCounter(counter));
        self.put(Resource::Prompt(Box::new(version)));
        Ok(Target::Prompt(prompt, last + 1))
    }

    pub(super) fn delete_version(
        &mut self,
        prompt: &PromptName,
        version: u64,
        etag: Option<u64>,
    ) -> Result<Target, Problem> {
        let Some(row) = self.rows.prompts.get(&(prompt.clone(), version)) else {
            return Err(Problem::not_found(&version_name(prompt, version)));
        };
        check_etag(&row.name(), etag, row.revision)?;
        let row = Box::new(row.clone());
        self.remove(Resource::Prompt(row));
        Ok(Target::Nothing)
    }

    /// The checkpoint that a caller means, to make something of it.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub(super) fn find_whole_checkpoint(&self, target: &CheckpointRef) -> Result<&Checkpoint, Problem> {
        let checkpoint = self.find_checkpoint(target)?;
        if checkpoint.damaged {
            let name = checkpoint.name();
            let what = format!("files of {name} are damaged or gone; choose another one of its job's");
            return Err(Problem::state("CHECKPOINT_DAMAGED", what).with("name", name));
        }
        Ok(checkpoint)
    }

    /// The checkpoint that a caller means.
    ///
    /// # Errors
    /// If there is none.
    pub fn find_checkpoint(&self, target: &CheckpointRef) -> Result<&Checkpoint, Problem> {
        let job = self.job(&target.job)?;
        if target.task.is_some() || target.step == StepRef::Best {
            let tasks = job.spec.tasks.iter().map(|task| &*task.name);
            check_task(job.name.as_str(), tasks, target.task.as_deref())?;
        }
        let step = match target.step {
            StepRef::At(step) => Some(step),
            StepRef::Best => match &target.task {
                Some(task) => self.checkpoints_of(&job.name).find(|of| of.is_best_of(task)).map(|of| of.step),
                None => job.best.map(|best| best.step),
            },
            StepRef::Last => self.checkpoints_of(&job.name).find(|of| !of.damaged).map(|of| of.step),
        };
        match step {
            Some(step) => self.checkpoint(&target.job, step),
            None => {
                let (which, why) = if target.step == StepRef::Best {
                    ("best", ": nothing of it has been evaluated and saved; its last may be there")
                } else {
                    ("last", ": nothing of it has been saved")
                };
                let of_task = target.task.as_ref().map(|task| format!(" of {task}")).unwrap_or_default();
                let mut problem = Problem::not_found(&format!("{}/checkpoints/{which}{of_task}", target.job));
                problem.message.push_str(why);
                Err(problem)
            }
        }
    }
}

/// Checks that a task is named where there are several, one of them, and none where there is one.
fn check_task<'a>(
    what: &str,
    tasks: impl Iterator<Item = &'a str>,
    task: Option<&str>,
) -> Result<(), Problem> {
    let tasks: Vec<&str> = tasks.collect();
    let all = tasks.join(", ");
    match task {
        None if tasks.is_empty() => Ok(()),
        None => Err(Problem::field("task", format!("is missing: {what} has {all}; name one"))),
        Some(task) if tasks.contains(&task) => Ok(()),
        Some(task) if tasks.is_empty() => {
            let why = format!("is {task:.80?}, and {what} is of one task, which has no name; leave it out");
            Err(Problem::field("task", why))
        }
        Some(task) => Err(Problem::field("task", format!("is {task:.80?}; {what} has {all}"))),
    }
}
