//! AdamW in PyTorch's form.

use super::NamedTensor;
use serde::{Deserialize, Serialize};

/// AdamW (Loshchilov and Hutter 2019) as `torch.optim.AdamW` computes it.
///
/// At step `t`, from 1: `x = x (1 - lr weight_decay)`; `m = m + (1 - beta1)(g - m)`; `v = beta2 v + (1 -
/// beta2) g²`; `x = x - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)`. The state is `m`
/// and `v`, both `[P, D]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AdamW {
    /// Share of the mean gradient that is kept.
    pub beta1: f64,
    /// Share of the mean squared gradient that is kept.
    pub beta2: f64,
    /// Added to the root of the mean squared gradient.
    pub epsilon: f64,
    /// Times the learning rate: the share of the prompt that each step takes away.
    pub weight_decay: f64,
}

impl AdamW {
    pub(super) fn state(rows: usize, cols: usize) -> Vec<NamedTensor> {
        vec![NamedTensor::zeros("m", &[rows, cols]), NamedTensor::zeros("v", &[rows, cols])]
    }

    pub(super) fn update(
        &self,
        state: &mut [NamedTensor],
        num_steps: u64,
        prompt: &mut [f32],
        gradient: &[f32],
        lr: f32,
    ) {
        let [m, v] = state else { unreachable!("the state has two tensors") };
        let (lr, t) = (f64::from(lr), num_steps as f64);
        let keep = (1.0 - lr * self.weight_decay) as f32;
        let mix1 = (1.0 - self.beta1) as f32;
        let (keep2, mix2) = (self.beta2 as f32, (1.0 - self.beta2) as f32);
        let rate = (lr / (1.0 - self.beta1.powf(t))) as f32;
        let root_correction = (1.0 - self.beta2.powf(t)).sqrt() as f32;
        let epsilon = self.epsilon as f32;
        let moments = m.data.iter_mut().zip(&mut v.data);
        for ((x, g), (m, v)) in prompt.iter_mut().zip(gradient).zip(moments) {
            *m += mix1 * (g - *m);
            *v = keep2 * *v + mix2 * g * g;
            *x = keep * *x - rate * (*m / (v.sqrt() / root_correction + epsilon));
        }
    }
}
