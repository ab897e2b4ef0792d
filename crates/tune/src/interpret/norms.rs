//! How long rows are.

use serde::Serialize;

/// How Euclidean norms spread. A quantile between two of them is interpolated linearly (Hyndman and Fan 1996, their seventh definition,
/// which is NumPy's).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Norms {
    /// The smallest.
    pub min: f64,
    /// 5 % are below it.
    pub q05: f64,
    /// A quarter is below it.
    pub q25: f64,
    /// Half are below it.
    pub median: f64,
    /// A quarter is above it.
    pub q75: f64,
    /// 5 % are above it.
    pub q95: f64,
    /// The largest.
    pub max: f64,
    /// Their mean.
    pub mean: f64,
}

impl Norms {
    /// Of these norms; `None` if there are none.
    #[must_use]
    pub fn of(mut norms: Vec<f64>) -> Option<Self> {
        norms.sort_by(f64::total_cmp);
        let (&min, &max) = (norms.first()?, norms.last()?);
        let quantile = |share: f64| {
            let place = share * (norms.len() - 1) as f64;
            let (low, high) = (norms[place.floor() as usize], norms[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Some(Self {
            min,
            q05: quantile(0.05),
            q25: quantile(0.25),
            median: quantile(0.5),
            q75: quantile(0.75),
            q95: quantile(0.95),
            max,
            mean: norms.iter().sum::<f64>() / norms.len() as f64,
        })
    }
}
