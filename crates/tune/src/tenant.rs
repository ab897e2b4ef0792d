//! A job with everything that decides what it does next: it reads and writes nothing, so that one process can carry many of them on
//! over one backbone, a step of this and a step of that.

mod initial;

use std::sync::Arc;

use incipit_data::pretrain::{Cursor, Pretraining};

use crate::{
    Error, Result,
    backbone::Backbone,
    checkpoint::{Best, Checkpoint, TrainState},
    engine::{Engine, JobBatch, JobFault, JobGradient},
    evaluate::{EvalOptions, Evaluation, PartialEvaluation},
    init::Initial,
    job::{Job, JobSpec, Update},
    prompt::Prompt,
    rank::Candidates,
    spec::{Method, TrainSpec},
    task::Task,
    token_job::TokenJob,
    tokens::TokenPrompt,
    trained::Trained,
    weights::{self, Room, WeightJob, Weights},
};

pub(crate) use initial::{Ground, init_words, initial};

/// What a job does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Its prompt is evaluated: [`Tenant::evaluation`], then [`Tenant::evaluated`].
    Evaluate,
    /// A checkpoint is saved: [`Tenant::checkpoint`].
    Checkpoint,
    /// A step is made: [`Tenant::batch`] goes through the engine, perhaps with others', and the result to [`Tenant::stepped`]; or, where
    /// there is no such batch, [`Tenant::step`].
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
    /// What predictions are chosen among, if they are chosen.
    candidates: Option<Arc<Candidates>>,
    trainee: Trainee,
    /// What was promised to it, where it trains all weights.
    _room: Option<Room>,
    warnings: Vec<String>,
    best: Option<Best>,
    evaluations_since_best: u64,
    /// The step of the last evaluation; 0 before the first.
    evaluated: u64,
    /// The step of the last checkpoint.
    saved: Option<u64>,
}

/// What is trained, and by what.
enum Trainee {
    Prompt(Job),
    Tokens(TokenJob),
    Weights(WeightJob),
}

impl Tenant {
    /// A job before its first step. Where the model is cut into parts, all ranks make this call together.
    ///
    /// # Errors
    /// If the prompt cannot begin as the specification says, there is less than one batch of examples, labels are to be ranked and there
    /// are none, or an exchange with other ranks fails.
    pub fn start(backbone: &Backbone, spec: &TrainSpec, task: Task) -> Result<Self> {
        let (job, data) = (JobSpec::from(spec), task.train.clone());
        let room = weights::find_room(backbone, spec, None)?;
        let (trainee, told) = match spec.method {
            Method::Prompt => {
                initial::check_origin(backbone, spec, &task)?;
                let Initial { prompt, warnings } = initial(Ground::of(backbone), spec, &task)?;
                (Trainee::Prompt(Job::new(job, data, prompt)?), warnings)
            }
            Method::Text | Method::Search => {
                let (job, warnings) = TokenJob::start(backbone, spec, &task)?;
                (Trainee::Tokens(job), warnings)
            }
            Method::Model | Method::Adapter | Method::Prefix => {
                let weights = Weights::new(backbone, weights::initial(backbone, spec)?, &job.optimizer)?;
                (Trainee::Weights(weight_job(backbone, spec, &task, weights, None)?), Vec::new())
            }
        };
        let warnings = task.warnings.iter().cloned().chain(told).collect();
        Ok(Self {
            spec: spec.clone(),
            fingerprint: backbone.fingerprint.to_string(),
            candidates: candidates(backbone, spec, &task)?,
            task,
            trainee,
            _room: room,
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
        let room = weights::find_room(backbone, spec, Some(earlier))?;
        let trainee = restored(backbone, spec, &task, earlier)?;
        let state = &earlier.state;
        Ok(Self {
            spec: spec.clone(),
            fingerprint: backbone.fingerprint.to_string(),
            warnings: task.warnings.clone(),
            candidates: candidates(backbone, spec, &task)?,
            task,
            trainee,
            _room: room,
            best: state.best,
            evaluations_since_best: state.evaluations_since_best,
            evaluated: state.evaluated,
            saved: Some(state.step),
        })
    }

    /// What comes next. Between any two of these a job can be left, and goes on from its checkpoint as if nothing had happened.
    #[must_use]
    pub fn due(&self) -> Due {
        let step = self.num_steps();
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
        let step = self.num_steps();
        let due = step > 0 && (step.is_multiple_of(self.spec.eval_every) || step >= self.spec.steps);
        due && self.task.eval.is_some() && self.evaluated != step
    }

    /// Steps made.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        match &self.trainee {
            Trainee::Prompt(job) => job.num_steps(),
            Trainee::Tokens(job) => job.num_steps(),
            Trainee::Weights(job) => job.weights().num_steps(),
        }
    }

    /// The prompt as it is now, if one is trained.
    #[must_use]
    pub fn prompt(&self) -> Option<&Prompt> {
        match &self.trainee {
            Trainee::Prompt(job) => Some(job.prompt()),
            Trainee::Tokens(job) => Some(job.prompt()),
            Trainee::Weights(_) => None,
        }
    }

    /// How many numbers at the beginning of the prompt other jobs have too.
    #[must_use]
    pub fn num_shared(&self) -> Option<usize> {
        match &self.trainee {
            Trainee::Prompt(job) => Some(job.num_shared()).filter(|shared| *shared > 0),
            Trainee::Tokens(_) | Trainee::Weights(_) => None,
        }
    }

    /// How many numbers are trained.
    #[must_use]
    pub fn num_trained(&self) -> u64 {
        match &self.trainee {
            Trainee::Prompt(job) => job.prompt().values().len() as u64,
            // As the paper's figure 4 counts prompt design and search: a number a token.
            Trainee::Tokens(job) => job.tokens().ids().len() as u64,
            Trainee::Weights(job) => job.weights().tensors().iter().map(|t| t.data.len() as u64).sum(),
        }
    }

    /// How many numbers are left when training is over.
    #[must_use]
    pub fn num_kept(&self) -> u64 {
        match &self.trainee {
            Trainee::Weights(job) => job.weights().kept().iter().map(|t| t.data.len() as u64).sum(),
            Trainee::Prompt(_) | Trainee::Tokens(_) => self.num_trained(),
        }
    }

    /// A copy of what is trained as it is now.
    #[must_use]
    pub fn trained(&self) -> Trained {
        match &self.trainee {
            Trainee::Prompt(job) => Trained::Prompt(job.prompt().clone()),
            Trainee::Tokens(job) => Trained::Prompt(job.prompt().clone()),
            Trainee::Weights(job) => Trained::Weights(job.weights().tensors().to_vec()),
        }
    }

    /// The next step's batch for [`Engine::gradients`], which other jobs' batches can go with; none if the job makes its steps alone.
    #[must_use]
    pub fn batch(&self) -> Option<JobBatch<'_>> {
        match &self.trainee {
            Trainee::Prompt(job) => Some(job.batch()),
            Trainee::Tokens(_) | Trainee::Weights(_) => None,
        }
    }

    /// Whether its steps can go with other jobs': whether there is a [`Self::batch`].
    #[must_use]
    pub fn shares_steps(&self) -> bool {
        matches!(self.trainee, Trainee::Prompt(_))
    }

    /// About how many tokens the next step takes through the backbone: rows of prompts, inputs and targets.
    #[must_use]
    pub fn step_tokens(&self) -> u64 {
        let of_step = match &self.trainee {
            Trainee::Prompt(job) => job.batch().num_tokens(),
            Trainee::Tokens(job) => job.step_tokens(),
            Trainee::Weights(job) => job.batch().num_tokens(),
        };
        of_step as u64
    }

    /// What evaluates the job as it is now: the backbone's engine, or that of a model with trained weights in it.
    #[must_use]
    pub fn engine<'a>(&'a self, backbone: &'a Backbone) -> &'a Engine {
        match &self.trainee {
            Trainee::Prompt(_) | Trainee::Tokens(_) => &backbone.engine,
            Trainee::Weights(job) => job.weights().engine(),
        }
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
        self.best.is_some_and(|best| best.step == self.num_steps())
    }

    /// Whether the last checkpoint holds all that there is.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        self.saved == Some(self.num_steps())
    }

    /// Makes a step alone on the backbone.
    ///
    /// # Errors
    /// As [`Job::step`] or [`WeightJob::step`]; after a fault of its own, rather than of an exchange with other ranks, the job is over.
    pub fn step(&mut self, backbone: &Backbone) -> Result<Update> {
        match &mut self.trainee {
            Trainee::Prompt(job) => job.step(&backbone.engine),
            Trainee::Tokens(job) => job.step(&backbone.engine),
            Trainee::Weights(job) => job.step(backbone),
        }
    }

    /// Makes a step of what the engine gave for [`Self::batch`].
    ///
    /// # Errors
    /// As [`Job::update`]; then the job is over.
    ///
    /// # Panics
    /// If the job has no such batch.
    pub fn stepped(&mut self, gradient: Result<JobGradient, JobFault>) -> Result<Update> {
        match &mut self.trainee {
            Trainee::Prompt(job) => job.update(gradient),
            Trainee::Tokens(_) | Trainee::Weights(_) => panic!("a job without a batch makes its steps alone"),
        }
    }

    /// Begins an evaluation of the job as it is now, for [`Self::engine`].
    ///
    /// # Errors
    /// If there is nothing to evaluate on, in which case none is due; and as [`PartialEvaluation::begin`].
    pub fn evaluation(&self, backbone: &Backbone) -> Result<PartialEvaluation> {
        let Some(eval) = &self.task.eval else {
            return Err(Error::spec("eval", &"is missing; pass a file of examples to evaluate on"));
        };
        let options = EvalOptions {
            metrics: self.spec.metrics.clone(),
            selection: self.spec.task.map(|task| task.selection).unwrap_or_default(),
            labels: self.task.labels.clone(),
            references: self.task.references.clone(),
            max_new_tokens: self.task.max_new_tokens,
            candidates: self.candidates.clone(),
            rewrite: None,
        };
        PartialEvaluation::begin(self.engine(backbone), self.prompt(), eval.clone(), options)
    }

    /// Takes note of the outcome of an evaluation of the job as it is now. Returns whether it is the best so far.
    pub fn evaluated(&mut self, evaluation: &Evaluation) -> bool {
        let (step, score) = (self.num_steps(), evaluation.score());
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
        let step = self.num_steps();
        let ((epoch, batch), corpus, tokens) = match &self.trainee {
            Trainee::Prompt(job) => (job.cursor(), None, None),
            Trainee::Tokens(job) => (job.place(), None, Some(job.tokens().ids().to_vec())),
            Trainee::Weights(job) => (job.place(), job.cursor().cloned(), None),
        };
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
            tokens,
            corpus,
        };
        self.saved = Some(step);
        let optimizer = match &self.trainee {
            Trainee::Prompt(job) => job.optimizer_state(),
            Trainee::Tokens(_) => Vec::new(),
            Trainee::Weights(job) => job.weights().optimizer_state(),
        };
        Checkpoint { trained: self.trained(), optimizer, state }
    }
}

/// What the predictions of an evaluation are chosen among.
fn candidates(backbone: &Backbone, spec: &TrainSpec, task: &Task) -> Result<Option<Arc<Candidates>>> {
    task.candidates(spec, &backbone.tokenizer, backbone.config().vocab_size)
}

/// The job of a checkpoint, if it is the same job.
fn restored(backbone: &Backbone, spec: &TrainSpec, task: &Task, earlier: &Checkpoint) -> Result<Trainee> {
    let state = &earlier.state;
    let fingerprint = backbone.fingerprint.to_string();
    if state.backbone != fingerprint && !spec.allow_other_backbone {
        let (model, was) = (backbone.name.clone(), state.backbone.clone());
        return Err(Error::OtherBackbone { model, was, now: fingerprint });
    }
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
    let (job, data, steps) = (JobSpec::from(spec), task.train.clone(), state.optimizer_steps);
    if let Some(tokens) = &state.tokens {
        let prompt = TokenPrompt::new(tokens.clone(), backbone.config().vocab_size)?;
        return Ok(Trainee::Tokens(TokenJob::go_on(backbone, spec, task, prompt, steps)?));
    }
    match &earlier.trained {
        Trained::Prompt(prompt) => {
            prompt.check_fits(backbone.config(), spec.out.join("last"))?;
            Ok(Trainee::Prompt(Job::restore(job, data, prompt.clone(), steps, &earlier.optimizer)?))
        }
        Trained::Weights(tensors) => {
            let kind = job.optimizer;
            let weights = Weights::restore(backbone, tensors.clone(), &kind, steps, &earlier.optimizer)?;
            Ok(Trainee::Weights(weight_job(backbone, spec, task, weights, state.corpus.as_ref())?))
        }
    }
}

/// A job that goes on with `weights`; on a corpus from `cursor` on.
fn weight_job(
    backbone: &Backbone,
    spec: &TrainSpec,
    task: &Task,
    weights: Weights,
    cursor: Option<&Cursor>,
) -> Result<WeightJob> {
    let Some(options) = spec.pretraining() else {
        return WeightJob::new(spec.into(), task.train.clone(), weights);
    };
    let (paths, vocab_size) = ([spec.train.clone()], backbone.config().vocab_size);
    let stream = Pretraining::open(&paths, &backbone.tokenizer, vocab_size, &options)?;
    WeightJob::pretraining(spec.into(), stream, cursor, weights)
}
