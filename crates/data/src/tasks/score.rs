//! Scores as the benchmarks define them.

use super::{Family, Selection, Task};
use crate::metrics::{Metric, Reference, mean, score_references};

impl Task {
    /// The task's metrics of predictions, in the order of [`Task::metrics`].
    ///
    /// # Panics
    /// If there are not as many predictions as references.
    pub fn scores(&self, predictions: &[String], references: &[Reference]) -> Vec<(Metric, f64)> {
        let score = |&metric| (metric, score_references(metric, predictions, references, self.labels));
        self.metrics.iter().map(score).collect()
    }

    /// The texts of its labels; none if its targets are free text.
    pub fn label_texts(&self) -> Option<Vec<String>> {
        (!self.labels.is_empty()).then(|| self.labels.iter().map(|&label| label.to_owned()).collect())
    }
}

impl Selection {
    /// The one number of several scores: the one that counts, or their mean, also where that one was not measured.
    pub fn score(self, scores: &[(Metric, f64)]) -> f64 {
        let one = match self {
            Self::Mean => None,
            Self::One(one) => scores.iter().find(|(metric, _)| *metric == one),
        };
        one.map_or_else(|| mean(scores.iter().map(|(_, score)| *score)), |(_, score)| *score)
    }
}

/// SuperGLUE's score: the mean over its eight tasks of the mean of the task's metrics. None unless each of the eight
/// is there once and has a score.
pub fn super_glue_average(scores: &[(&Task, Vec<(Metric, f64)>)]) -> Option<f64> {
    let of = |task: &Task| {
        let mut own = scores.iter().filter(|(other, _)| other.name == task.name);
        let (_, scores) = own.next().filter(|(_, scores)| !scores.is_empty())?;
        own.next().is_none().then(|| mean(scores.iter().map(|(_, score)| *score)))
    };
    let tasks = Task::all().filter(|task| task.family == Family::SuperGlue);
    let means: Option<Vec<f64>> = tasks.map(of).collect();
    means.map(|means| mean(means.into_iter()))
}
