//! Adafactor in T5X's form.

use super::{NamedTensor, rms};
use serde::{Deserialize, Serialize};

/// With parameter scaling: a tensor's root mean square, at least.
const MIN_SCALE: f64 = 1e-3;

/// Both dimensions must reach this for the second moment to be factored.
const MIN_DIM_TO_FACTOR: usize = 128;

/// Adafactor (Shazeer and Stern 2018) as T5X runs it: no first moment, and parameter scaling for weights but not for prompts.
///
/// With gradient `g`, prompt `x`, learning rate `lr`, `t = step_offset + number of the step, from 1` and
/// `b = 1 - t^-decay`:
///
/// * second moment, unfactored: `v = b v + (1 - b)(g² + epsilon)`, `u = g / sqrt(v)`;
/// * second moment, factored, where `P >= 128` and `D >= 128`:
///   `r = b r + (1 - b) mean_over_columns(g² + epsilon)`,
///   `c = b c + (1 - b) mean_over_rows(g² + epsilon)`,
///   `u = g / sqrt(r / mean(r)) / sqrt(c)`;
/// * clipping: `u = u / max(1, rms(u) / clip)`;
/// * parameter scaling: `lr = lr max(rms(x), 1e-3)`;
/// * update: `x = (1 - weight_decay) x - lr u`.
///
/// The state is `v` `[P, D]`, or `v_row` `[P]` and `v_col` `[D]`.
///
/// # How transformers' `Adafactor(scale_parameter=False, relative_step=False)` differs
///
/// * It factors every matrix. A prompt of 100 rows, whose elements each have a scale of their own here, is
///   scaled by its rows and columns there. Where both dimensions are 128 or more the two agree.
/// * Its weight decay is multiplied by the learning rate: `x = (1 - lr weight_decay) x - lr u`. To have there
///   what `weight_decay` does here, give `weight_decay / lr`.
/// * Its counter starts at 0 always. T5X's goes on from the backbone's, and the released code does not reset
///   it: at `t = 1,100,001`, `1 - b` is 1.5e-5, the second moment all but adds up, and clipping alone bounds
///   the update.
/// * It writes `decay` with the other sign (`decay_rate=-0.8`).
///
/// # How T5X itself differs
///
/// T5X computes `b` in f32, and its rounding moves `1 - b` by up to 0.2 % at `t = 1,100,001`; here both are
/// computed in f64 and rounded once. T5X's own option `step_offset` is subtracted from a counter that goes
/// on; ours is added to one that starts at 0. For a prompt with more rows than columns T5X swaps the parts of `r`
/// and `c`, which is the same but for rounding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Adafactor {
    /// Exponent of the decay: the second moment keeps `1 - t^-decay` of itself at step `t`.
    pub decay: f64,
    /// Largest root mean square of an update, before the learning rate.
    pub clip: f64,
    /// Share of the prompt that each step takes away, whatever the learning rate.
    pub weight_decay: f64,
    /// Added to squared gradients.
    pub epsilon: f64,
    /// Steps that count as made before the first one.
    pub step_offset: u64,
    /// Whether the learning rate is one of a tensor whose numbers have a root mean square of 1, and changes with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parameter_scaling: bool,
}

impl Adafactor {
    /// With decay 0.8, clipping 1.0 and no parameter scaling.
    #[must_use]
    pub const fn new(weight_decay: f64, step_offset: u64) -> Self {
        Self { decay: 0.8, clip: 1.0, weight_decay, epsilon: 1e-30, step_offset, parameter_scaling: false }
    }

    pub(super) fn state(rows: usize, cols: usize) -> Vec<NamedTensor> {
        if rows.min(cols) >= MIN_DIM_TO_FACTOR {
            vec![NamedTensor::zeros("v_row", &[rows]), NamedTensor::zeros("v_col", &[cols])]
        } else {
            vec![NamedTensor::zeros("v", &[rows, cols])]
        }
    }

    pub(super) fn update(
        &self,
        state: &mut [NamedTensor],
        num_steps: u64,
        prompt: &mut [f32],
        gradient: &[f32],
        lr: f32,
    ) {
        let mix = ((num_steps + self.step_offset) as f64).powf(-self.decay);
        let rates = Rates { keep: (1.0 - mix) as f32, mix: mix as f32, epsilon: self.epsilon as f32 };
        let update = match state {
            [v_row, v_col] => rates.factored(&mut v_row.data, &mut v_col.data, gradient),
            [v] => rates.unfactored(&mut v.data, gradient),
            _ => unreachable!("the state has one tensor or two"),
        };
        let shrink = (rms(&update) / self.clip).max(1.0) as f32;
        let keep = (1.0 - self.weight_decay) as f32;
        let scale = if self.parameter_scaling { rms(prompt).max(MIN_SCALE) as f32 } else { 1.0 };
        let lr = lr * scale;
        for (x, u) in prompt.iter_mut().zip(&update) {
            *x = keep * *x - lr * (u / shrink);
        }
    }
}

/// What goes into the second moment at one step.
struct Rates {
    keep: f32,
    mix: f32,
    epsilon: f32,
}

impl Rates {
    /// The update before clipping `[P, D]`, from `v` `[P, D]`.
    fn unfactored(&self, v: &mut [f32], gradient: &[f32]) -> Vec<f32> {
        let scale = |(v, g): (&mut f32, &f32)| {
            *v = self.keep * *v + self.mix * (g * g + self.epsilon);
            g / v.sqrt()
        };
        v.iter_mut().zip(gradient).map(scale).collect()
    }

    /// The update before clipping `[P, D]`, from `v_row` `[P]` and `v_col` `[D]`.
    fn factored(&self, v_row: &mut [f32], v_col: &mut [f32], gradient: &[f32]) -> Vec<f32> {
        let (num_rows, num_cols) = (v_row.len(), v_col.len());
        let mut col_sums = vec![0.0f64; num_cols];
        for (v, gradient) in v_row.iter_mut().zip(gradient.chunks_exact(num_cols)) {
            let mut row_sum = 0.0f64;
            for (col_sum, g) in col_sums.iter_mut().zip(gradient) {
                let square = f64::from(g * g + self.epsilon);
                row_sum += square;
                *col_sum += square;
            }
            *v = self.keep * *v + self.mix * (row_sum / num_cols as f64) as f32;
        }
        for (v, col_sum) in v_col.iter_mut().zip(col_sums) {
            *v = self.keep * *v + self.mix * (col_sum / num_rows as f64) as f32;
        }
        let row_mean = (v_row.iter().map(|v| f64::from(*v)).sum::<f64>() / num_rows as f64) as f32;
        let col_factors: Vec<f32> = v_col.iter().map(|v| 1.0 / v.sqrt()).collect();
        let mut update = Vec::with_capacity(gradient.len());
        for (v, gradient) in v_row.iter().zip(gradient.chunks_exact(num_cols)) {
            let row_factor = 1.0 / (v / row_mean).sqrt();
            update
                .extend(gradient.iter().zip(&col_factors).map(|(g, col_factor)| g * row_factor * col_factor));
        }
        update
    }
}
