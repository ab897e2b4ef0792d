//! Optimizers of one prompt `[P, D]`, or of another matrix, in f32: [`Adafactor`] as T5X has it, [`AdamW`] and [`Sgd`] as PyTorch
//! has them.
//!
//! Elementwise arithmetic is f32, scalars that depend on the step alone are computed in f64 and rounded once,
//! and sums run in f64 in index order: the same gradients give the same bits, with any number of threads.

mod adafactor;
mod adamw;
mod sgd;

pub use adafactor::Adafactor;
pub use adamw::AdamW;
pub use sgd::Sgd;

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which optimizer, with its hyperparameters. The learning rate is not among them: a schedule gives it at
/// each step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum OptimizerKind {
    /// The paper's.
    Adafactor(Adafactor),
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Gradient descent.
    Sgd(Sgd),
}

impl OptimizerKind {
    /// Adafactor with decay 0.8 and clipping 1.0. `step_offset` is 0 in the paper and 1,100,000 in its
    /// released code.
    #[must_use]
    pub const fn adafactor(weight_decay: f64, step_offset: u64) -> Self {
        Self::Adafactor(Adafactor::new(weight_decay, step_offset))
    }

    /// AdamW with PyTorch's other defaults.
    #[must_use]
    pub const fn adamw(weight_decay: f64) -> Self {
        Self::AdamW(AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay })
    }

    /// Gradient descent; a momentum of 0 keeps no state.
    #[must_use]
    pub const fn sgd(momentum: f64, weight_decay: f64) -> Self {
        Self::Sgd(Sgd { momentum, weight_decay })
    }

    /// As the command line names it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Adafactor(_) => "adafactor",
            Self::AdamW(_) => "adamw",
            Self::Sgd(_) => "sgd",
        }
    }

    /// The state before the first step: zeros.
    fn state(&self, rows: usize, cols: usize) -> Vec<NamedTensor> {
        match self {
            Self::Adafactor(_) => Adafactor::state(rows, cols),
            Self::AdamW(_) => AdamW::state(rows, cols),
            Self::Sgd(sgd) => sgd.state(rows, cols),
        }
    }
}

/// A tensor of an optimizer's state, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Such as `v_row`.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// As many numbers as the product of `shape`.
    pub data: Vec<f32>,
}

impl NamedTensor {
    pub(crate) fn zeros(name: &str, shape: &[usize]) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }
    }
}

/// An optimizer of one prompt, with its state.
#[derive(Clone, Debug)]
pub struct Optimizer {
    kind: OptimizerKind,
    shape: [usize; 2],
    num_steps: u64,
    state: Vec<NamedTensor>,
}

impl Optimizer {
    /// An optimizer of a prompt of `rows` by `cols`, before its first step.
    #[must_use]
    pub fn new(kind: &OptimizerKind, rows: usize, cols: usize) -> Self {
        Self { kind: *kind, shape: [rows, cols], num_steps: 0, state: kind.state(rows, cols) }
    }

    /// Updates `prompt` by `gradient`, both `[rows, cols]` row-major, with the learning rate `lr`.
    ///
    /// The caller looks first whether the gradient is finite: one that is not would spoil the state for ever.
    ///
    /// # Panics
    /// If the prompt or the gradient has another size than the optimizer was made for.
    pub fn step(&mut self, prompt: &mut [f32], gradient: &[f32], lr: f32) {
        let [rows, cols] = self.shape;
        assert_eq!(prompt.len(), rows * cols, "the prompt has another size than its optimizer");
        assert_eq!(gradient.len(), rows * cols, "the gradient has another size than its optimizer");
        self.num_steps += 1;
        match &self.kind {
            OptimizerKind::Adafactor(rule) => {
                rule.update(&mut self.state, self.num_steps, prompt, gradient, lr);
            }
            OptimizerKind::AdamW(rule) => rule.update(&mut self.state, self.num_steps, prompt, gradient, lr),
            OptimizerKind::Sgd(rule) => rule.update(&mut self.state, prompt, gradient, lr),
        }
    }

    /// How many steps it has made.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// Which optimizer it is.
    #[must_use]
    pub fn kind(&self) -> &OptimizerKind {
        &self.kind
    }

    /// A copy of the state's tensors, for a checkpoint. Gradient descent without momentum has none.
    #[must_use]
    pub fn state(&self) -> Vec<NamedTensor> {
        self.state.clone()
    }

    /// The optimizer that [`Self::state`] was taken from after `num_steps` steps.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape, or does not belong to this kind of optimizer.
    pub fn restore(
        kind: &OptimizerKind,
        rows: usize,
        cols: usize,
        num_steps: u64,
        tensors: &[NamedTensor],
    ) -> Result<Self> {
        let mut optimizer = Self { num_steps, ..Self::new(kind, rows, cols) };
        let refuse = |what| Err(Error::OptimizerState { what });
        let other = "; was it written with another --optimizer?";
        if let Some(extra) = tensors.iter().find(|t| !optimizer.state.iter().any(|w| w.name == t.name)) {
            return refuse(format!("{} keeps no tensor {:?}{other}", kind.name(), extra.name));
        }
        for wanted in &mut optimizer.state {
            let name = &wanted.name;
            let Some(found) = tensors.iter().find(|t| t.name == *name) else {
                return refuse(format!("{} needs the tensor {name:?}{other}", kind.name()));
            };
            if found.shape != wanted.shape || found.data.len() != wanted.data.len() {
                let (is, should) = (&found.shape, &wanted.shape);
                return refuse(format!("{name:?} has the shape {is:?} and should have {should:?}"));
            }
            wanted.data.copy_from_slice(&found.data);
        }
        Ok(optimizer)
    }
}

/// Root mean square, summed in f64 in index order.
fn rms(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    (sum / values.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests;
