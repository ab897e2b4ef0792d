//! A job with everything that decides what it does next: it reads and writes nothing, so that one process can carry many of them on
//! over one backbone, a step of this and a step of that.

use crate::{
    Error, Result,
    backbone::Backbone,
    checkpoint::{Best, Checkpoint, TrainState},
    engine::{Engine, JobFault, JobGradient},
    evaluate::{EvalOptions, Evaluation, PartialEvaluation},
    init::{Initial, PromptInit, Sources, check_shape, initial_prompt},
    job::{Job, JobSpec, Update},
    spec::TrainSpec,
    task::Task,
};

/// What a job does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Its prompt is evaluated: [`Tenant::evaluation`], then [`Tenant::evaluated`].
    Evaluate,
    /// A checkpoint is saved: [`Tenant::checkpoint`].
    Checkpoint,
    /// A step is made: the batch of [`Tenant::job`] goes through the engine, and the result to [`Tenant::stepped`].
    Step,
    /// Nothing: it is over, and was saved. Never [`End::Requested`].
    End(End),
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All its steps are made.
    Steps,
    /// No evaluation was better for as long as `--patience` allows.
    Patience,
    /// Someone asked; `--resume` goes on.
    Requested,
}

/// A job, its examples, and how far it has come. Where several ranks have the backbone, each has a tenant, and whoever carries them on
/// does the same on all of them; since their results are the same, so are their answers.
pub struct Tenant {
    spec: TrainSpec,
    /// Of the backbone.
    fingerprint: String,
    task: Task,
    job: Job,
    warnings: Vec<String>,
    best: Option<Best>,
    evaluations_since_best: u64,
    /// The step of the last evaluation; 0 before the first.
    evaluated: u64,
    /// The step of the last checkpoint.
    saved: Option<u64>,
}

impl Tenant {
    /// A job before its first step. Where the model is cut into parts, all ranks make this call together.
    ///
    /// # Errors
    /// If the prompt cannot begin as the specification says, there is less than one batch of examples, or an exchange with other
    /// ranks fails.
    pub fn start(backbone: &Backbone, spec: &TrainSpec, task: Task) -> Result<Self> {
        let initial = initial(backbone, spec, &task)?;
        let job = Job::new(JobSpec::from(spec), task.train.clone(), initial.prompt)?;
        let warnings = task.warnings.iter().cloned().chain(initial.warnings).collect();
        Ok(Self {
            spec: spec.clone(),
            fingerprint: backbone.fingerprint.to_string(),
            task,
            job,
            warnings,
            best: None,
            evaluations_since_best: 0,
            evaluated: 0,
            saved: None,
        })
    }

    /// A job as a checkpoint left it.
    ///
    /// # Errors
    /// If the checkpoint is one of another backbone, other data or another specification, or does not fit them.
    pub fn resume(backbone: &Backbone, spec: &TrainSpec, task: Task, earlier: &Checkpoint) -> Result<Self> {
        let job = restored(backbone, spec, &task, earlier)?;
        let state = &earlier.state;
        Ok(Self {
            spec: spec.clone(),
            fingerprint: backbone.fingerprint.to_string(),
            warnings: task.warnings.clone(),
            task,
            job,
            best: state.best,
            evaluations_since_best: state.evaluations_since_best,
            evaluated: state.evaluated,
            saved: Some(state.step),
        })
    }

    /// What comes next. Between any two of these a job can be left, and goes on from its checkpoint as if nothing had happened.
    #[must_use]
    pub fn due(&self) -> Due {
        let step = self.job.num_steps();
        if self.evaluation_is_due() {
            return Due::Evaluate;
        }
        let patience = self.spec.patience.map_or(u64::MAX, u64::from);
        let end = if step >= self.spec.steps {
            Some(End::Steps)
        } else if self.evaluations_since_best >= patience {
            Some(End::Patience)
        } else {
            None
        };
        let to_save = step > 0 && (step.is_multiple_of(self.spec.checkpoint_every) || self.is_best());
        match end {
            _ if (to_save || end.is_some()) && !self.is_saved() => Due::Checkpoint,
            Some(end) => Due::End(end),
            None => Due::Step,
        }
    }

    /// Where the specification says so, unless it was done before.
    fn evaluation_is_due(&self) -> bool {
        let step = self.job.num_steps();
        let due = step > 0 && (step.is_multiple_of(self.spec.eval_every) || step >= self.spec.steps);
        due && self.task.eval.is_some() && self.evaluated != step
    }

    /// The job: its prompt, the number of its steps, and the next one's batch for [`Engine::gradients`].
    #[must_use]
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// Its data.
    #[must_use]
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// What a person should know of its data and of its first prompt.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The best evaluation so far, if there was one.
    #[must_use]
    pub fn best(&self) -> Option<Best> {
        self.best
    }

    /// Whether the best evaluation is that of the prompt as it is now.
    #[must_use]
    pub fn is_best(&self) -> bool {
        self.best.is_some_and(|best| best.step == self.job.num_steps())
    }

    /// Whether the last checkpoint holds all that there is.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        self.saved == Some(self.job.num_steps())
    }

    /// Makes a step alone on the backbone.
    ///
    /// # Errors
    /// As [`Job::step`]; after a fault of its own, rather than of an exchange with other ranks, the job is over.
    pub fn step(&mut self, engine: &Engine) -> Result<Update> {
        self.job.step(engine)
    }

    /// Makes a step of what the engine gave for the job's batch.
    ///
    /// # Errors
    /// As [`Job::update`]; then the job is over.
    pub fn stepped(&mut self, gradient: Result<JobGradient, JobFault>) -> Result<Update> {
        self.job.update(gradient)
    }

    /// Begins an evaluation of the prompt as it is now.
    ///
    /// # Errors
    /// If there is nothing to evaluate on, in which case none is due; and as [`PartialEvaluation::begin`].
    pub fn evaluation(&self, engine: &Engine) -> Result<PartialEvaluation> {
        let Some(eval) = &self.task.eval else {
            return Err(Error::spec("eval", &"is missing; pass a file of examples to evaluate on"));
        };
        let options = EvalOptions {
            metrics: self.spec.metrics.clone(),
            selection: self.spec.task.map(|task| task.selection).unwrap_or_default(),
            labels: self.task.labels.clone(),
            references: self.task.references.clone(),
            max_new_tokens: self.task.max_new_tokens,
        };
        PartialEvaluation::begin(engine, Some(self.job.prompt()), eval.clone(), options)
    }

    /// Takes note of the outcome of an evaluation of the prompt as it is now. Returns whether it is the best so far.
    pub fn evaluated(&mut self, evaluation: &Evaluation) -> bool {
        let (step, score) = (self.job.num_steps(), evaluation.score());
        let best = self.best.is_none_or(|best| score > best.score);
        if best {
            self.best = Some(Best { step, score });
        }
        self.evaluations_since_best = if best { 0 } else { self.evaluations_since_best + 1 };
        self.evaluated = step;
        self.saved = None;
        best
    }

    /// Where it stands. From now on it [`is_saved`](Self::is_saved).
    pub fn checkpoint(&mut self) -> Checkpoint {
        let step = self.job.num_steps();
        let (epoch, batch) = self.job.cursor();
        let state = TrainState {
            step,
            epoch,
            batch,
            seed: self.spec.seed,
            spec: self.spec.identity_hash(),
            backbone: self.fingerprint.clone(),
            optimizer: self.spec.optimizer_kind(),
            optimizer_steps: step,
            best: self.best,
            evaluations_since_best: self.evaluations_since_best,
            evaluated: self.evaluated,
            train_data: self.task.train_hash.clone(),
            eval_data: self.task.eval_hash.clone(),
        };
        self.saved = Some(step);
        let optimizer = self.job.optimizer_state();
        Checkpoint { prompt: self.job.prompt().clone(), optimizer, state }
    }
}

/// The prompt before the first step.
fn initial(backbone: &Backbone, spec: &TrainSpec, task: &Task) -> Result<Initial> {
    let (length, d_model) = (spec.prompt_length, backbone.config().d_model);
    if let (PromptInit::File(path), Some(prompt)) = (&spec.prompt_init, &task.initial) {
        check_shape(prompt, path, length, d_model)?;
        return Ok(Initial { prompt: prompt.clone(), warnings: Vec::new() });
    }
    let model = backbone.engine.model();
    let embedding = |id| model.embedding_row(id).map_err(Into::into);
    let words = match spec.task {
        Some(named) => named.init_words.iter().map(|&word| word.to_owned()).collect(),
        None => task.labels.clone().unwrap_or_default(),
    };
    let sources =
        Sources { embedding: &embedding, tokenizer: &backbone.tokenizer, labels: &words, seed: spec.seed };
    initial_prompt(&spec.prompt_init, length, d_model, &sources)
}

/// The job of a checkpoint, if it is the same job.
fn restored(backbone: &Backbone, spec: &TrainSpec, task: &Task, earlier: &Checkpoint) -> Result<Job> {
    let state = &earlier.state;
    let fingerprint = backbone.fingerprint.to_string();
    if state.backbone != fingerprint && !spec.allow_other_backbone {
        let (model, was) = (backbone.name.clone(), state.backbone.clone());
        return Err(Error::OtherBackbone { model, was, now: fingerprint });
    }
    earlier.prompt.check_width(backbone.config().d_model, spec.out.join("last"))?;
    if state.train_data != task.train_hash {
        return Err(Error::OtherData { path: spec.train.clone() });
    }
    if state.eval_data != task.eval_hash {
        let path = spec.eval.clone().unwrap_or_else(|| "the file of --eval".into());
        return Err(Error::OtherData { path });
    }
    if state.spec != spec.identity_hash() {
        let what =
            "it was made with another specification than run.toml says; was that file changed?".to_owned();
        return Err(Error::Checkpoint { path: spec.out.join("last"), what });
    }
    let prompt = earlier.prompt.clone();
    Job::restore(JobSpec::from(spec), task.train.clone(), prompt, state.optimizer_steps, &earlier.optimizer)
}
