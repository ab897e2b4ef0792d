//! Jobs that train weights: the model's own, or small ones laid into it.

mod initial;
pub(crate) mod projection;
mod room;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use incipit_data::{
    TokenizedSet,
    pretrain::{Cursor, Pretraining},
};
use incipit_model::SoftPrompt;
use rayon::prelude::*;

use crate::{
    Result,
    backbone::Backbone,
    course::{Course, norm},
    engine::{Engine, JobBatch, JobFault, Refusal, WeightGradient},
    job::{JobSpec, Update},
    optimizer::{NamedTensor, Optimizer, OptimizerKind},
};

pub(crate) use initial::initial;
pub(crate) use room::{Promises, Room, find_room};

/// Weights being trained, and the model with them in it. They and their optimizers' states are f32 and whole on every rank; what the
/// model reads of them has its type, and each rank's model only its part.
pub struct Weights {
    tensors: Vec<NamedTensor>,
    optimizers: Vec<Optimizer>,
    num_steps: u64,
    /// What the model takes, where it is made of what is trained.
    projected: Option<Vec<NamedTensor>>,
    engine: Engine,
    /// The prompt of an example that has none: `[0, D]`.
    no_prompt: SoftPrompt,
}

impl Weights {
    /// Weights before their first step, by the names under which the model takes them; or those of an MLP that makes
    /// them.
    ///
    /// # Errors
    /// If the model does not take one of them.
    pub fn new(backbone: &Backbone, tensors: Vec<NamedTensor>, kind: &OptimizerKind) -> Result<Self> {
        let optimizer = |tensor: &NamedTensor| {
            let (rows, cols) = matrix(&tensor.shape);
            Optimizer::new(kind, rows, cols)
        };
        let optimizers = tensors.iter().map(optimizer).collect();
        Self::with_optimizers(backbone, tensors, optimizers, 0)
    }

    /// Weights that have made `num_steps` steps, with the optimizers' state that [`Self::optimizer_state`] gave.
    ///
    /// # Errors
    /// As [`Self::new`]; also if a part of the state is missing or belongs to another kind of optimizer.
    pub fn restore(
        backbone: &Backbone,
        tensors: Vec<NamedTensor>,
        kind: &OptimizerKind,
        num_steps: u64,
        state: &[NamedTensor],
    ) -> Result<Self> {
        let optimizer = |tensor: &NamedTensor| {
            let (rows, cols) = matrix(&tensor.shape);
            let own = |part: &NamedTensor| {
                let (of, name) = part.name.rsplit_once('/')?;
                (of == tensor.name).then(|| NamedTensor { name: name.to_owned(), ..part.clone() })
            };
            let own: Vec<NamedTensor> = state.iter().filter_map(own).collect();
            Optimizer::restore(kind, rows, cols, num_steps, &own)
        };
        let optimizers = tensors.iter().map(optimizer).collect::<Result<_>>()?;
        Self::with_optimizers(backbone, tensors, optimizers, num_steps)
    }

    fn with_optimizers(
        backbone: &Backbone,
        tensors: Vec<NamedTensor>,
        optimizers: Vec<Optimizer>,
        num_steps: u64,
    ) -> Result<Self> {
        let projected = projection::results(&tensors)?;
        let engine = backbone.engine_with(projected.as_ref().unwrap_or(&tensors))?;
        let no_prompt = Tensor::zeros((0, backbone.config().d_model), DType::F32, &Device::Cpu)?.into();
        Ok(Self { tensors, optimizers, num_steps, projected, engine, no_prompt })
    }

    /// The model with the weights as they are now.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The weights as they are now.
    #[must_use]
    pub fn tensors(&self) -> &[NamedTensor] {
        &self.tensors
    }

    /// What the model takes, and all that is left when training is over: the weights, or what an MLP makes of them.
    #[must_use]
    pub fn kept(&self) -> &[NamedTensor] {
        self.projected.as_ref().unwrap_or(&self.tensors)
    }

    /// Steps made.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// A copy of the optimizers' state, each tensor's as `NAME/STATE`.
    #[must_use]
    pub fn optimizer_state(&self) -> Vec<NamedTensor> {
        let named = |(tensor, optimizer): (&NamedTensor, &Optimizer)| {
            let with_name =
                |part: NamedTensor| NamedTensor { name: format!("{}/{}", tensor.name, part.name), ..part };
            optimizer.state().into_iter().map(with_name).collect::<Vec<_>>()
        };
        self.tensors.iter().zip(&self.optimizers).flat_map(named).collect()
    }

    /// The prompt of a batch of these weights, which has no rows.
    pub(crate) fn no_prompt(&self) -> &SoftPrompt {
        &self.no_prompt
    }

    /// The loss and gradients of a batch.
    ///
    /// # Errors
    /// If an exchange with other ranks fails.
    pub(crate) fn gradients(&self, batch: &JobBatch<'_>) -> Result<Result<WeightGradient, JobFault>> {
        let wanted: Vec<(&str, usize)> =
            self.kept().iter().map(|tensor| (&*tensor.name, tensor.data.len())).collect();
        let gradient = self.engine.weight_gradients(batch, &wanted)?;
        let gradient = match gradient {
            Ok(gradient) if self.projected.is_some() => gradient,
            gradient => return Ok(gradient),
        };
        let gradients = projection::gradients(&self.tensors, &gradient.gradients)?;
        if let Some((name, _)) = gradients.iter().find(|(_, values)| !values.iter().all(|g| g.is_finite())) {
            return Ok(Err(Refusal::from(format!("the gradient to {name} is not finite")).into()));
        }
        Ok(Ok(WeightGradient { gradients, ..gradient }))
    }

    /// Makes a step. False if an updated weight would have a number that is not finite; then the weights are spoilt.
    ///
    /// # Errors
    /// If the model cannot take the updated weights.
    pub(crate) fn update(&mut self, backbone: &Backbone, gradient: &WeightGradient, lr: f32) -> Result<bool> {
        self.num_steps += 1;
        let gradients = &gradient.gradients;
        let finite = self.tensors.par_iter_mut().zip(&mut self.optimizers).all(|(tensor, optimizer)| {
            optimizer.step(&mut tensor.data, &gradients[&tensor.name], lr);
            tensor.data.iter().all(|value| value.is_finite())
        });
        if !finite {
            return Ok(false);
        }
        self.projected = projection::results(&self.tensors)?;
        if !self.kept().iter().all(|tensor| tensor.data.iter().all(|value| value.is_finite())) {
            return Ok(false);
        }
        self.engine = backbone.engine_with(self.kept())?;
        Ok(true)
    }
}

/// A job that trains weights. It shares no batch with others, for its model is its own.
pub struct WeightJob {
    course: Course,
    weights: Weights,
}

impl WeightJob {
    /// A job that goes on with `weights` on examples that lie in memory.
    ///
    /// # Errors
    /// If the data are less than one batch.
    pub fn new(spec: JobSpec, data: Arc<TokenizedSet>, weights: Weights) -> Result<Self> {
        Ok(Self { course: Course::new(spec, data, weights.num_steps())?, weights })
    }

    /// A job that goes on with `weights` on a corpus, from `cursor` on, or from its beginning.
    ///
    /// # Errors
    /// If the corpus cannot be read, or is another than the cursor's.
    pub fn pretraining(
        spec: JobSpec,
        stream: Pretraining,
        cursor: Option<&Cursor>,
        weights: Weights,
    ) -> Result<Self> {
        Ok(Self { course: Course::of_corpus(spec, stream, cursor)?, weights })
    }

    /// The weights as they are now.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where the next step's data lie: the epoch, and the batch in it or in a whole corpus, both from 0.
    #[must_use]
    pub fn place(&self) -> (u64, u64) {
        self.course.place(self.weights.num_steps())
    }

    /// Where in a corpus the next step's examples begin.
    #[must_use]
    pub fn cursor(&self) -> Option<&Cursor> {
        self.course.cursor()
    }

    /// The next step's batch, without a prompt.
    pub(crate) fn batch(&self) -> JobBatch<'_> {
        let (examples, keys) = self.course.batch(self.weights.num_steps());
        let objective = self.course.spec.objective;
        JobBatch { prompt: self.weights.no_prompt(), examples, keys, objective }
    }

    /// Makes a step.
    ///
    /// # Errors
    /// If an exchange with other ranks fails, a number is not finite, or the model refuses the batch. The message names the step and,
    /// where there is one, the example. The job is over.
    pub fn step(&mut self, backbone: &Backbone) -> Result<Update> {
        let step = self.weights.num_steps();
        let gradient =
            self.weights.gradients(&self.batch())?.map_err(|fault| self.course.fault(step, &fault))?;
        if !self.weights.update(backbone, &gradient, self.course.lr(step))? {
            return Err(self.course.overflow(step));
        }
        let norm = norm(gradient.gradients.values().flatten());
        self.course.advance(step, gradient.loss, norm, gradient.num_tokens)
    }
}

/// Rows and columns of a tensor as a matrix: a vector has one row.
pub(crate) fn matrix(shape: &[usize]) -> (usize, usize) {
    match shape {
        [rows, cols] => (*rows, *cols),
        _ => (1, shape.iter().product()),
    }
}
