//! What came of the runs: each cell's values over the seeds.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::execute::Progress;
use super::suites::{Cell, Source};
use crate::report::Records;

/// A run is taken to have arrived when it is this near to the mean of its like (Lester et al. 2021, table 5).
const NEAR: f64 = 0.01;

/// A cell's values.
#[derive(Clone, Default, Serialize)]
pub(super) struct Values {
    /// One a seed, of those that are there.
    pub(super) values: Vec<f64>,
    pub(super) mean: Option<f64>,
    /// Standard deviation of a sample; none of fewer than two.
    pub(super) deviation: Option<f64>,
    /// Seeds that are not there yet, or have failed.
    pub(super) missing: usize,
    /// Seeds that are there and have no value, since they were never good enough.
    pub(super) below: usize,
}

impl Values {
    fn new(values: Vec<Option<f64>>) -> Self {
        let missing = values.iter().filter(|value| value.is_none()).count();
        let values: Vec<f64> = values.into_iter().flatten().collect();
        let count = values.len() as f64;
        let mean = (!values.is_empty()).then(|| values.iter().sum::<f64>() / count);
        let deviation = mean.filter(|_| values.len() > 1).map(|mean| {
            (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0)).sqrt()
        });
        Self { values, mean, deviation, missing, below: 0 }
    }
}

impl Progress {
    /// What a cell comes to so far.
    ///
    /// # Errors
    /// If a run's files cannot be read.
    pub(super) fn values(&self, cell: &Cell) -> Result<Values> {
        match cell {
            Cell::Known(value) => Ok(Values::new(vec![Some(*value)])),
            Cell::Means(seeds) => Ok(Values::new(seeds.iter().map(|sources| self.mean(sources)).collect())),
            Cell::Times(runs) => self.arrivals(runs),
        }
    }

    /// The mean over some numbers, once they are all there.
    fn mean(&self, sources: &[Source]) -> Option<f64> {
        let values = sources.iter().map(|source| self.number(source)).collect::<Option<Vec<f64>>>()?;
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }

    /// Of each seed, when it was as good as all seeds are at their best, on average. A seed that never was has no time.
    fn arrivals(&self, runs: &[(usize, PathBuf)]) -> Result<Values> {
        let done = runs.iter().filter(|(run, _)| self.done[*run].is_some());
        let records = done.map(|(_, dir)| Records::read(dir)).collect::<Result<Vec<_>>>()?;
        let best: Vec<f64> = records.iter().filter_map(|r| r.best().map(|best| best.score)).collect();
        let mean = best.iter().sum::<f64>() / best.len() as f64;
        let values = Values::new(records.iter().map(|records| arrival(records, mean - NEAR)).collect());
        Ok(Values { below: values.missing, missing: runs.len() - records.len(), ..values })
    }

    /// The number that a source names.
    pub(super) fn number(&self, source: &Source) -> Option<f64> {
        match self.done[source.run].as_ref()?.summary.pointer(&source.at)? {
            // Several metrics count as their mean, as in SuperGLUE's score.
            Value::Object(metrics) => {
                let metrics = metrics.values().map(Value::as_f64).collect::<Option<Vec<f64>>>()?;
                (!metrics.is_empty()).then(|| metrics.iter().sum::<f64>() / metrics.len() as f64)
            }
            value => value.as_f64(),
        }
    }
}

/// Seconds of training until an evaluation was as good as `score`.
fn arrival(records: &Records, score: f64) -> Option<f64> {
    let arrived = records.evaluations.iter().find(|evaluation| evaluation.score >= score)?.step;
    Some(records.steps.iter().filter(|step| step.step <= arrived).map(|step| step.seconds).sum())
}

#[cfg(test)]
mod tests {
    use super::Values;

    #[test]
    fn spread_is_that_of_a_sample_and_missing_seeds_are_counted() {
        let values = Values::new(vec![Some(0.1), Some(0.3), None]);
        assert_eq!((values.values.len(), values.missing), (2, 1));
        assert!((values.mean.unwrap() - 0.2).abs() < 1e-12);
        assert!((values.deviation.unwrap() - 0.02f64.sqrt()).abs() < 1e-12);
        assert!(Values::new(vec![Some(0.5)]).deviation.is_none());
        assert!(Values::new(vec![None]).mean.is_none());
    }
}
