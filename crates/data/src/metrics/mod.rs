//! How good predictions are. Every score lies in 0..=1.
//!
//! [`score`] compares predictions with one target each. A named task knows more of an example, which answers are
//! right and which examples belong together; that is a [`Reference`], and [`score_references`] compares with those.

mod classes;
mod confusion;
mod containment;
mod reference;
mod text;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

pub use confusion::Confusion;
pub use containment::names_referent;
pub use reference::{Reference, score_references};
pub(crate) use text::is_space;
pub use text::{best_token_f1, normalize_answer, token_f1};

/// A measure of predicted texts against target texts.
///
/// White space around a text is dropped before it is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Share of predictions that are the target, but for white space around them.
    Accuracy,
    /// Share of predictions that are an accepted answer after SQuAD's normalisation ([`normalize_answer`]).
    ExactMatch,
    /// Mean over the examples of SQuAD's token F1 ([`token_f1`]; of several accepted answers the best,
    /// [`best_token_f1`]).
    TokenF1,
    /// Mean of the F1 of every class, each weighing the same: of a named task all its labels, else the classes
    /// seen in the targets. A prediction that is no such class is wrong wherever it stands.
    MacroF1,
    /// F1 of the positive class, which is the last of a task's labels, else the last of the sorted targets. A
    /// prediction that is no label counts as the wrong one of the two.
    PositiveF1,
    /// Share of groups all of whose predictions are the target. Without groups it is the accuracy.
    GroupExactMatch,
    /// Share of examples where a prediction that names the referent ([`names_referent`]) is labelled true, and
    /// any other false. Without such labels every target is the right referent.
    Containment,
}

impl Metric {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Accuracy,
        Self::ExactMatch,
        Self::TokenF1,
        Self::MacroF1,
        Self::PositiveF1,
        Self::GroupExactMatch,
        Self::Containment,
    ];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::ExactMatch => "exact-match",
            Self::TokenF1 => "token-f1",
            Self::MacroF1 => "macro-f1",
            Self::PositiveF1 => "positive-f1",
            Self::GroupExactMatch => "group-exact-match",
            Self::Containment => "containment",
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
#[error(
    "there is no metric {name:?}; known are accuracy, exact-match, token-f1, macro-f1, positive-f1, \
     group-exact-match and containment"
)]
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

/// The score of predictions against one target each; 0 if there are none.
///
/// # Panics
/// If there are not as many predictions as targets.
pub fn score(metric: Metric, predictions: &[String], targets: &[String]) -> f64 {
    assert_eq!(predictions.len(), targets.len(), "one prediction a target");
    if metric == Metric::TokenF1 {
        return mean(
            predictions.iter().zip(targets).map(|(prediction, target)| token_f1(prediction, target)),
        );
    }
    let references: Vec<Reference> = targets.iter().map(|target| Reference::of(target)).collect();
    let labels: BTreeSet<&str> = targets.iter().map(|target| target.trim()).collect();
    let labels: Vec<&str> = labels.into_iter().collect();
    score_references(metric, predictions, &references, &labels)
}

/// Share of predictions that are one of the labels, but for white space around them; 0 if there are no
/// predictions. Near 0 it tells of a model that does not write labels at all, whatever the accuracy.
pub fn legal_share(predictions: &[String], labels: &[String]) -> f64 {
    let labels: BTreeSet<&str> = labels.iter().map(|label| label.trim()).collect();
    mean(predictions.iter().map(|prediction| f64::from(labels.contains(prediction.trim()))))
}

pub(crate) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0_usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}
