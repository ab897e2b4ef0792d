//! Which label was taken for which.

use std::collections::{BTreeMap, BTreeSet};

/// How often each label was predicted where each was right.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Confusion {
    /// The labels, sorted: the rows, and the first columns.
    pub labels: Vec<String>,
    /// `counts[gold][predicted]`; the last column, one more than there are labels, counts predictions that
    /// are no label.
    pub counts: Vec<Vec<usize>>,
}

impl Confusion {
    /// Counts predictions. The labels are those given and all that the targets have; white space around texts
    /// is dropped.
    ///
    /// # Panics
    /// If there are not as many predictions as targets.
    pub fn new(predictions: &[String], targets: &[String], labels: &[String]) -> Self {
        assert_eq!(predictions.len(), targets.len(), "one prediction a target");
        let distinct: BTreeSet<&str> = labels.iter().chain(targets).map(|label| label.trim()).collect();
        let index: BTreeMap<&str, usize> =
            distinct.iter().enumerate().map(|(i, &label)| (label, i)).collect();
        let other = distinct.len();
        let mut counts = vec![vec![0; other + 1]; other];
        for (prediction, target) in predictions.iter().zip(targets) {
            let predicted = index.get(prediction.trim()).copied().unwrap_or(other);
            counts[index[target.trim()]][predicted] += 1;
        }
        Self { labels: distinct.into_iter().map(str::to_owned).collect(), counts }
    }

    /// How often a label was right and no label at all was predicted.
    pub fn other(&self, gold: usize) -> usize {
        self.counts[gold][self.labels.len()]
    }
}
