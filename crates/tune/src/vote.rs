//! Votes: several prompts answer the same examples, in one pass through the backbone, and the answer of most of them counts (Lester et
//! al. 2021, section 6).

use std::sync::Arc;

use incipit_data::{
    TokenizedSet,
    metrics::{self, Metric},
};
use serde::Serialize;

use crate::{
    Error, Result,
    backbone::Backbone,
    control::Control,
    evaluate::{EvalOptions, Evaluation, PartialEvaluation, Prediction},
    prompt::Prompt,
};

/// What the members of an ensemble answered to one example, and what counts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Vote {
    /// Which record of its file, from 0.
    pub index: usize,
    /// Input text.
    pub inputs: String,
    /// Target text.
    pub target: String,
    /// The text with the most votes, white space around it aside; of several with as many, the one for which an earlier member voted
    /// first.
    pub prediction: String,
    /// One a member.
    pub votes: Vec<String>,
}

/// What an ensemble is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Election {
    /// Each member alone; at least one.
    pub members: Vec<Evaluation>,
    /// The metrics of the votes, in the order asked for, each from 0 to 1.
    pub metrics: Vec<(Metric, f64)>,
    /// Share of the votes' outcomes that are labels, where the labels are known.
    pub legal_share: Option<f64>,
    /// One an example, in the order of the file.
    pub votes: Vec<Vote>,
}

impl Election {
    /// Has all members answer `set`. The result depends neither on microbatches nor on the number of replicas.
    ///
    /// # Errors
    /// If there is no member; and as [`crate::evaluate::evaluate`].
    pub fn hold(
        backbone: &Backbone,
        members: &[&Prompt],
        set: Arc<TokenizedSet>,
        options: &EvalOptions,
        control: &Control,
    ) -> Result<Self> {
        if members.is_empty() {
            return Err(Error::Prompt { what: "an ensemble without members has no votes".to_owned() });
        }
        let Backbone { engine, tokenizer, .. } = backbone;
        let mut evaluation = PartialEvaluation::begin_each(engine, members, set, options.clone())?;
        evaluation.make_rounds(engine, control)?;
        Ok(Self::of(evaluation.finish_each(engine, tokenizer)?, options))
    }

    fn of(members: Vec<Evaluation>, options: &EvalOptions) -> Self {
        let vote =
            |i: usize| Vote::of(&members.iter().map(|member| &member.predictions[i]).collect::<Vec<_>>());
        let votes: Vec<Vote> = (0..members[0].predictions.len()).map(vote).collect();
        let predictions: Vec<String> = votes.iter().map(|vote| vote.prediction.clone()).collect();
        let targets: Vec<String> = votes.iter().map(|vote| vote.target.clone()).collect();
        Self {
            metrics: options.scores(&predictions, &targets),
            legal_share: options.labels.as_ref().map(|labels| metrics::legal_share(&predictions, labels)),
            members,
            votes,
        }
    }

    /// The mean of each metric over the members.
    #[must_use]
    pub fn average(&self) -> Vec<(Metric, f64)> {
        let mean = |(i, (metric, _)): (usize, &(Metric, f64))| {
            let sum: f64 = self.members.iter().map(|member| member.metrics[i].1).sum();
            (*metric, sum / self.members.len() as f64)
        };
        self.metrics.iter().enumerate().map(mean).collect()
    }

    /// Which member has the highest score; of equals the first.
    #[must_use]
    pub fn best(&self) -> usize {
        let scores: Vec<f64> = self.members.iter().map(Evaluation::score).collect();
        let higher = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
        (0..scores.len()).fold(0, higher)
    }
}

impl Vote {
    /// The members' predictions for one example.
    fn of(members: &[&Prediction]) -> Self {
        let votes: Vec<&str> = members.iter().map(|member| member.prediction.as_str()).collect();
        let first = members[0];
        Self {
            index: first.index,
            inputs: first.inputs.clone(),
            target: first.target.clone(),
            prediction: majority(&votes).to_owned(),
            votes: votes.iter().map(|vote| (*vote).to_owned()).collect(),
        }
    }
}

fn majority<'a>(votes: &[&'a str]) -> &'a str {
    let count = |text: &str| votes.iter().filter(|other| other.trim() == text.trim()).count();
    // The last of the largest is taken: from behind, that is the first.
    votes.iter().rev().max_by_key(|text| count(text)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_most_members_counts_and_of_a_tie_that_of_the_earliest() {
        for (votes, winner) in [
            (&["a"][..], "a"),
            (&["a", "b", "b"], "b"),
            (&["b", "a", " a", "b", "c"], "b"),
            (&["c", "b", "a", "a ", "b"], "b"),
            (&["c", "b", "a"], "c"),
            (&["c", " b", "b"], " b"),
        ] {
            assert_eq!(majority(votes), winner, "{votes:?}");
        }
    }
}
