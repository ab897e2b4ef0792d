//! Lengths and directions. Sums are f64: long rows and large numbers cost no digits.

/// The Euclidean norm.
pub(super) fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}

/// Writes the direction of `values`, of norm 1, into `out`; `false`, and zeros, where there is none: for a row of zeros, or one with a
/// number that is not finite.
pub(super) fn unit(values: &[f32], out: &mut [f32]) -> bool {
    let norm = norm(values);
    let directed = norm > 0.0 && norm.is_finite();
    if directed {
        let scale = 1.0 / norm;
        out.iter_mut().zip(values).for_each(|(out, v)| *out = (f64::from(*v) * scale) as f32);
    } else {
        out.fill(0.0);
    }
    directed
}

/// Adds `values`, each times `factor`, to `sums`.
pub(super) fn add(sums: &mut [f64], values: &[f32], factor: f64) {
    sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += factor * f64::from(*v));
}

/// The inner product.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The mean cosine over the pairs of `count` vectors whose directions add up to `sum`: `(|sum|^2 - count) / (count (count - 1))`, for
/// each one's cosine with itself is 1. `None` where there is no pair.
pub(super) fn mean_of_pairs(sum: &[f64], count: usize) -> Option<f64> {
    let n = count as f64;
    (count > 1).then(|| (dot(sum, sum) - n) / (n * (n - 1.0)))
}
