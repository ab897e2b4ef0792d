//! How good predictions are. Every score lies in 0..=1.

mod confusion;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

pub use confusion::Confusion;
pub use text::{normalize_answer, token_f1};

/// A measure of predicted texts against target texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Share of predictions that are the target, but for white space around them.
    Accuracy,
    /// Share of predictions that are the target after SQuAD's normalisation ([`normalize_answer`]).
    ExactMatch,
    /// Mean over the examples of SQuAD's token F1 ([`token_f1`]).
    TokenF1,
    /// Mean of the F1 of every class seen in the targets, each weighing the same. A prediction that is no
    /// such class is wrong wherever it stands.
    MacroF1,
}

impl Metric {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Accuracy, Self::ExactMatch, Self::TokenF1, Self::MacroF1];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::ExactMatch => "exact-match",
            Self::TokenF1 => "token-f1",
            Self::MacroF1 => "macro-f1",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no metric's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no metric {name:?}; known are accuracy, exact-match, token-f1 and macro-f1")]
pub struct UnknownMetric {
    /// The name.
    pub name: String,
}

impl FromStr for Metric {
    type Err = UnknownMetric;

    fn from_str(name: &str) -> Result<Self, UnknownMetric> {
        let found = Self::ALL.into_iter().find(|metric| metric.name() == name.trim());
        found.ok_or_else(|| UnknownMetric { name: name.to_owned() })
    }
}

/// The score of predictions; 0 if there are none.
///
/// # Panics
/// If there are not as many predictions as targets.
pub fn score(metric: Metric, predictions: &[String], targets: &[String]) -> f64 {
    assert_eq!(predictions.len(), targets.len(), "one prediction a target");
    let pairs = || predictions.iter().map(String::as_str).zip(targets.iter().map(String::as_str));
    let average =
        |of: fn(&str, &str) -> f64| mean(pairs().map(|(prediction, target)| of(prediction, target)));
    match metric {
        Metric::Accuracy => average(|p, t| f64::from(p.trim() == t.trim())),
        Metric::ExactMatch => average(|p, t| f64::from(normalize_answer(p) == normalize_answer(t))),
        Metric::TokenF1 => average(token_f1),
        Metric::MacroF1 => macro_f1(pairs()),
    }
}

/// Share of predictions that are one of the labels, but for white space around them; 0 if there are no
/// predictions. Near 0 it tells of a model that does not write labels at all, whatever the accuracy.
pub fn legal_share(predictions: &[String], labels: &[String]) -> f64 {
    let labels: BTreeSet<&str> = labels.iter().map(|label| label.trim()).collect();
    mean(predictions.iter().map(|prediction| f64::from(labels.contains(prediction.trim()))))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0_usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// What is counted of a class for its F1.
#[derive(Default)]
struct ClassCounts {
    predicted: usize,
    gold: usize,
    both: usize,
}

fn macro_f1<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> f64 {
    let mut classes: BTreeMap<&str, ClassCounts> = BTreeMap::new();
    for (_, target) in pairs.clone() {
        classes.entry(target.trim()).or_default().gold += 1;
    }
    for (prediction, target) in pairs {
        if let Some(class) = classes.get_mut(prediction.trim()) {
            class.predicted += 1;
            class.both += usize::from(prediction.trim() == target.trim());
        }
    }
    mean(classes.values().map(|class| 2.0 * class.both as f64 / (class.predicted + class.gold) as f64))
}
