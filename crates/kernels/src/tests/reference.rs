//! What the operations should compute, in f64 and as plainly as can be.

use crate::Activation;

/// Row-major `[rows, cols]` of `a [rows, k]` and columns `b(i, col)`, and the same sum of absolute values.
pub(super) fn product(
    a: &[f64],
    (rows, k, cols): (usize, usize, usize),
    b: impl Fn(usize, usize) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let mut sums = Vec::new();
    let mut sizes = Vec::new();
    for row in 0..rows {
        for col in 0..cols {
            let terms = (0..k).map(|i| a[row * k + i] * b(i, col));
            sums.push(terms.clone().sum());
            sizes.push(terms.map(f64::abs).sum());
        }
    }
    (sums, sizes)
}

pub(super) fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let d = weight.len();
    let row = |x: &[f64]| {
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / d as f64 + epsilon).sqrt();
        x.iter().zip(weight).map(|(x, w)| x / rms * w).collect::<Vec<_>>()
    };
    x.chunks(d).flat_map(row).collect()
}

pub(super) fn activation(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Relu => x.max(0.0),
        Activation::GeluNew => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + z.tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// Token losses of logits `[T, V]`.
pub(super) fn cross_entropy(logits: &[f64], targets: &[u32], z_loss: f64) -> Vec<f64> {
    let v = logits.len() / targets.len();
    let loss = |(x, t): (&[f64], &u32)| {
        let lse = x.iter().map(|x| x.exp()).sum::<f64>().ln();
        lse - x[*t as usize] + z_loss * lse * lse
    };
    logits.chunks(v).zip(targets).map(loss).collect()
}

/// Attention as a whole: nothing is cut into strips or heads' parts.
pub(super) struct Attention<'a> {
    /// Query and key rows of each example.
    pub(super) lengths: &'a [(usize, usize)],
    pub(super) heads: usize,
    /// Numbers of a head.
    pub(super) width: usize,
    pub(super) causal: bool,
    /// Leading keys of each example, before the sequence.
    pub(super) prefix: usize,
    /// By head and `key - query`.
    pub(super) bias: &'a dyn Fn(usize, isize) -> f64,
    /// Dropout's factor by (example, head), query and key.
    pub(super) factor: &'a dyn Fn((usize, usize), usize, usize) -> f64,
}

impl Attention<'_> {
    pub(super) fn output(&self, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let stride = self.heads * self.width;
        let mut y = vec![0.0; q.len()];
        let (mut first_query, mut first_key) = (0, 0);
        for (example, (queries, keys)) in self.lengths.iter().enumerate() {
            for head in 0..self.heads {
                let place = |row: usize| row * stride + head * self.width;
                for query in 0..*queries {
                    let row = place(first_query + query);
                    let seen = if self.causal { (self.prefix + query + 1).min(*keys) } else { *keys };
                    let score = |key: usize| {
                        let other = place(first_key + key);
                        let dot: f64 = (0..self.width).map(|i| q[row + i] * k[other + i]).sum();
                        if key < self.prefix {
                            return dot;
                        }
                        dot + (self.bias)(head, (key - self.prefix) as isize - query as isize)
                    };
                    let scores: Vec<f64> = (0..seen).map(score).collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                    for (key, s) in scores.iter().enumerate() {
                        let p = (s - top).exp() / total * (self.factor)((example, head), query, key);
                        for i in 0..self.width {
                            y[row + i] += p * v[place(first_key + key) + i];
                        }
                    }
                }
            }
            first_query += queries;
            first_key += keys;
        }
        y
    }
}

/// The slope of `f` in its `i`-th number, by central differences.
pub(super) fn slope(x: &[f64], i: usize, f: impl Fn(&[f64]) -> f64) -> f64 {
    let h = 1e-5 * x[i].abs().max(1.0);
    let mut moved = x.to_vec();
    moved[i] = x[i] + h;
    let above = f(&moved);
    moved[i] = x[i] - h;
    (above - f(&moved)) / (2.0 * h)
}

/// All slopes of `f`.
pub(super) fn slopes(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    (0..x.len()).map(|i| slope(x, i, &f)).collect()
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
