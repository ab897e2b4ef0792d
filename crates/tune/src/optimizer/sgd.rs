//! Gradient descent in PyTorch's form.

use super::NamedTensor;
use serde::{Deserialize, Serialize};

/// Gradient descent as `torch.optim.SGD` computes it, without dampening and Nesterov's correction.
///
/// `g = g + weight_decay x`; with momentum `b = momentum b + g` (in the first step `b = g`) and `x = x - lr
/// b`, without it `x = x - lr g`. The state is `momentum` `[P, D]`, or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Sgd {
    /// Share of the earlier direction that is kept; 0 keeps no state.
    pub momentum: f64,
    /// Times the prompt: what is added to the gradient.
    pub weight_decay: f64,
}

impl Sgd {
    pub(super) fn state(&self, rows: usize, cols: usize) -> Vec<NamedTensor> {
        if self.momentum == 0.0 { Vec::new() } else { vec![NamedTensor::zeros("momentum", &[rows, cols])] }
    }

    pub(super) fn update(&self, state: &mut [NamedTensor], prompt: &mut [f32], gradient: &[f32], lr: f32) {
        let (momentum, weight_decay) = (self.momentum as f32, self.weight_decay as f32);
        let Some(direction) = state.first_mut() else {
            for (x, g) in prompt.iter_mut().zip(gradient) {
                *x -= lr * (g + weight_decay * *x);
            }
            return;
        };
        for ((x, g), b) in prompt.iter_mut().zip(gradient).zip(&mut direction.data) {
            *b = momentum * *b + (g + weight_decay * *x);
            *x -= lr * *b;
        }
    }
}
