//! What a prediction is scored against, and the scoring.

use std::collections::BTreeMap;

use super::classes::{macro_f1, positive_f1};
use super::containment::names_referent;
use super::text::{best_token_f1, normalize_answer};
use super::{Metric, mean};

/// What is known of the right answer to one example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The accepted answers; of a task with labels the one right label.
    pub answers: Vec<String>,
    /// The group that the example is scored with, such as the question whose answer it judges; none if it stands
    /// alone.
    pub group: Option<(u64, u64)>,
    /// Whether the answer is right: a Winograd schema also asks about wrong referents.
    pub holds: bool,
}

impl Reference {
    /// The reference that has one right answer.
    pub fn of(answer: &str) -> Self {
        Self { answers: vec![answer.to_owned()], group: None, holds: true }
    }

    fn target(&self) -> &str {
        self.answers.first().map_or("", |answer| answer.trim())
    }
}

/// The score of predictions against references; 0 if there are none. `labels` are the task's, the positive one
/// last; none for free text.
///
/// # Panics
/// If there are not as many predictions as references.
pub fn score_references(
    metric: Metric,
    predictions: &[String],
    references: &[Reference],
    labels: &[&str],
) -> f64 {
    assert_eq!(predictions.len(), references.len(), "one prediction a reference");
    let average = |of: fn(&str, &Reference) -> f64| {
        mean(predictions.iter().zip(references).map(|(prediction, reference)| of(prediction, reference)))
    };
    let pairs = || -> Vec<(&str, &str)> {
        predictions.iter().zip(references).map(|(p, reference)| (p.trim(), reference.target())).collect()
    };
    match metric {
        Metric::Accuracy => average(|p, reference| f64::from(p.trim() == reference.target())),
        Metric::ExactMatch => average(|p, reference| {
            let normal = normalize_answer(p);
            f64::from(reference.answers.iter().any(|answer| normalize_answer(answer) == normal))
        }),
        Metric::TokenF1 => average(|p, reference| best_token_f1(p, &reference.answers)),
        Metric::MacroF1 => macro_f1(&pairs(), labels),
        Metric::PositiveF1 => positive_f1(&pairs(), labels),
        Metric::GroupExactMatch => group_exact_match(predictions, references),
        Metric::Containment => {
            average(|p, reference| f64::from(names_referent(p, reference.target()) == Some(reference.holds)))
        }
    }
}

fn group_exact_match(predictions: &[String], references: &[Reference]) -> f64 {
    let mut alone = Vec::new();
    let mut groups: BTreeMap<(u64, u64), bool> = BTreeMap::new();
    for (prediction, reference) in predictions.iter().zip(references) {
        let right = prediction.trim() == reference.target();
        match reference.group {
            None => alone.push(right),
            Some(group) => *groups.entry(group).or_insert(true) &= right,
        }
    }
    mean(groups.into_values().chain(alone).map(f64::from))
}
