//! A job: one prompt being trained.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use incipit_data::TokenizedSet;
use incipit_model::SoftPrompt;

use crate::{
    Result,
    course::{Course, norm},
    engine::{Engine, JobBatch, JobFault, JobGradient, Objective},
    optimizer::{NamedTensor, Optimizer, OptimizerKind},
    prompt::Prompt,
    schedule::Schedule,
    spec::TrainSpec,
};

/// What a job is told. Together with its data, its first prompt and the backbone it decides the prompt after every step.
#[derive(Clone, Debug, PartialEq)]
pub struct JobSpec {
    /// What turns gradients into updates.
    pub optimizer: OptimizerKind,
    /// Learning rate, at its highest.
    pub lr: f32,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises.
    pub warmup_steps: u64,
    /// Steps in all.
    pub num_steps: u64,
    /// Examples an update.
    pub batch_size: usize,
    /// Whether each epoch has a random order of its own.
    pub shuffle: bool,
    /// Of the data's order and of dropout.
    pub seed: u64,
    /// What is made smaller.
    pub objective: Objective,
    /// Rows at the prompt's beginning that other jobs have too: an optimizer of their own updates them, so that the same gradients make
    /// the same rows in each. 0 if there are none.
    pub shared_length: usize,
}

impl From<&TrainSpec> for JobSpec {
    fn from(spec: &TrainSpec) -> Self {
        Self {
            optimizer: spec.optimizer_kind(),
            lr: spec.lr as f32,
            schedule: spec.schedule,
            warmup_steps: spec.warmup_steps,
            num_steps: spec.steps,
            batch_size: spec.batch_size,
            shuffle: spec.shuffle,
            seed: spec.seed,
            objective: spec.engine_objective(),
            shared_length: spec.shared_length.unwrap_or_default(),
        }
    }
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// Steps made, this one included.
    pub step: u64,
    /// Epoch of its data, from 0.
    pub epoch: u64,
    /// Mean cross-entropy over the batch's target tokens before the update, in nats.
    pub loss: f64,
    /// Learning rate of the update.
    pub lr: f32,
    /// Euclidean norm of the objective's gradient.
    pub gradient_norm: f64,
    /// Examples of the batch.
    pub num_examples: usize,
    /// Its inputs, prompt rows and targets, in tokens.
    pub num_tokens: usize,
}

/// One prompt being trained. Its data lie in memory, and its whole state is the prompt, the optimizer's tensors and the
/// number of steps: the data's order and dropout are functions of the seed and that number.
pub struct Job {
    course: Course,
    prompt: Prompt,
    /// The same, as the model takes it.
    rows: SoftPrompt,
    /// Of the rows that are the job's own.
    optimizer: Optimizer,
    /// Of those that it shares.
    of_shared: Option<Optimizer>,
}

/// What the names of the state of the shared rows' optimizer begin with.
const SHARED: &str = "shared.";

impl Job {
    /// A job before its first step.
    ///
    /// # Errors
    /// If the data are less than one batch.
    pub fn new(spec: JobSpec, data: Arc<TokenizedSet>, prompt: Prompt) -> Result<Self> {
        let (shared, width) = (spec.shared_length, prompt.width());
        let optimizer = Optimizer::new(&spec.optimizer, prompt.num_rows() - shared, width);
        let of_shared = (shared > 0).then(|| Optimizer::new(&spec.optimizer, shared, width));
        Self::with_optimizers(spec, data, prompt, (optimizer, of_shared))
    }

    /// A job that has made `num_steps` steps, from what a checkpoint kept of it.
    ///
    /// # Errors
    /// As [`Self::new`]; also if the optimizer's tensors belong to another kind of optimizer.
    pub fn restore(
        spec: JobSpec,
        data: Arc<TokenizedSet>,
        prompt: Prompt,
        num_steps: u64,
        optimizer: &[NamedTensor],
    ) -> Result<Self> {
        let (shared, width) = (spec.shared_length, prompt.width());
        let (of_shared, own): (Vec<NamedTensor>, Vec<NamedTensor>) =
            optimizer.iter().cloned().partition(|tensor| tensor.name.starts_with(SHARED));
        let optimizer =
            Optimizer::restore(&spec.optimizer, prompt.num_rows() - shared, width, num_steps, &own)?;
        let unnamed =
            |tensor: NamedTensor| NamedTensor { name: tensor.name[SHARED.len()..].to_owned(), ..tensor };
        let of_shared: Vec<NamedTensor> = of_shared.into_iter().map(unnamed).collect();
        let restore = || Optimizer::restore(&spec.optimizer, shared, width, num_steps, &of_shared);
        let of_shared = (shared > 0).then(restore).transpose()?;
        Self::with_optimizers(spec, data, prompt, (optimizer, of_shared))
    }

    fn with_optimizers(
        spec: JobSpec,
        data: Arc<TokenizedSet>,
        prompt: Prompt,
        (optimizer, of_shared): (Optimizer, Option<Optimizer>),
    ) -> Result<Self> {
        let course = Course::new(spec, data, optimizer.num_steps())?;
        let rows = prompt_rows(&prompt)?;
        Ok(Self { course, prompt, rows, optimizer, of_shared })
    }

    /// What it was told.
    #[must_use]
    pub fn spec(&self) -> &JobSpec {
        &self.course.spec
    }

    /// The prompt as it is now.
    #[must_use]
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// A copy of the optimizer's state.
    #[must_use]
    pub fn optimizer_state(&self) -> Vec<NamedTensor> {
        let named = |tensor: NamedTensor| NamedTensor { name: format!("{SHARED}{}", tensor.name), ..tensor };
        let of_shared = self.of_shared.iter().flat_map(Optimizer::state).map(named);
        self.optimizer.state().into_iter().chain(of_shared).collect()
    }

    /// How many numbers it shares with other jobs.
    #[must_use]
    pub fn num_shared(&self) -> usize {
        self.spec().shared_length * self.prompt.width()
    }

    /// Steps made.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.optimizer.num_steps()
    }

    /// Where the next step's data lie: the epoch, and the batch in it, both from 0.
    #[must_use]
    pub fn cursor(&self) -> (u64, u64) {
        self.course.place(self.num_steps())
    }

    /// The next step's batch, for [`Engine::gradients`].
    #[must_use]
    pub fn batch(&self) -> JobBatch<'_> {
        let (examples, keys) = self.course.batch(self.num_steps());
        JobBatch { prompt: &self.rows, examples, keys, objective: self.spec().objective }
    }

    /// Updates the prompt by what the engine gave for [`Self::batch`].
    ///
    /// # Errors
    /// If the engine found a fault, or the updated prompt would have a number that is not finite. The message names the step
    /// and, where there is one, the example. The prompt stays as it was, and the job is over.
    pub fn update(&mut self, gradient: Result<JobGradient, JobFault>) -> Result<Update> {
        let step = self.num_steps();
        let gradient = gradient.map_err(|fault| self.course.fault(step, &fault))?;
        let mut values = self.prompt.values().to_vec();
        let lr = self.course.lr(step);
        let (shared, own) = values.split_at_mut(self.num_shared());
        let (to_shared, to_own) = gradient.gradient.split_at(shared.len());
        self.optimizer.step(own, to_own, lr);
        if let Some(optimizer) = &mut self.of_shared {
            optimizer.step(shared, to_shared, lr);
        }
        if !values.iter().all(|x| x.is_finite()) {
            return Err(self.course.overflow(step));
        }
        self.prompt = self.prompt.with_values(values)?;
        self.rows = prompt_rows(&self.prompt)?;
        self.course.advance(step, gradient.loss, norm(&gradient.gradient), gradient.num_tokens)
    }

    /// One step alone on the backbone.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub fn step(&mut self, engine: &Engine) -> Result<Update> {
        let [gradient] = <[_; 1]>::try_from(engine.gradients(&[self.batch()])?).expect("one result a job");
        self.update(gradient)
    }
}

/// The prompt as the model takes it.
///
/// # Errors
/// None on a CPU.
pub fn prompt_rows(prompt: &Prompt) -> Result<SoftPrompt> {
    let rows = Tensor::from_slice(prompt.values(), (prompt.num_rows(), prompt.width()), &Device::Cpu)?;
    Ok(SoftPrompt { rows, num_layers: prompt.num_layers(), placement: prompt.placement() })
}
