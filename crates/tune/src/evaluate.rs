//! Evaluation: greedy decoding over a set of examples, and what it is worth.

use std::sync::Arc;

use candle_core::Tensor;
use incipit_collective::gather_bytes;
use incipit_data::{
    TokenizedExample, TokenizedSet,
    metrics::{self, Metric, Reference, score_references},
    tasks::Selection,
};
use incipit_model::{Example, GenerateOptions, Microbatch};
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::{
    Error, Result, control::Control, engine::Engine, job::prompt_rows, microbatch, prompt::Prompt, ranks,
};

/// What is measured, and how.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalOptions {
    /// What is measured.
    pub metrics: Vec<Metric>,
    /// Which of it is the score.
    pub selection: Selection,
    /// The label set, if the task has one: the share of predictions that lie in it is reported.
    pub labels: Option<Vec<String>>,
    /// Of a named task, what predictions are scored against, one an example, the task's labels being `labels`. Otherwise they are
    /// scored against the target texts.
    pub references: Option<Arc<Vec<Reference>>>,
    /// Longest prediction, in tokens, without `</s>`.
    pub max_new_tokens: usize,
}

impl EvalOptions {
    /// The metrics of the predictions.
    fn scores(&self, written: &[String], targets: &[String]) -> Vec<(Metric, f64)> {
        let Some(references) = &self.references else {
            return self.metrics.iter().map(|m| (*m, metrics::score(*m, written, targets))).collect();
        };
        let labels: Vec<&str> = self.labels.iter().flatten().map(String::as_str).collect();
        let score = |metric: &Metric| (*metric, score_references(*metric, written, references, &labels));
        self.metrics.iter().map(score).collect()
    }
}

/// One example's outcome; a line of `predictions.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Which record of its file, from 0.
    pub index: usize,
    /// Input text.
    pub inputs: String,
    /// Target text.
    pub target: String,
    /// What the model wrote.
    pub prediction: String,
    /// Mean cross-entropy over the target's tokens, in nats.
    pub loss: f64,
}

/// The outcome of an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// The metrics, in the order asked for, each from 0 to 1.
    pub metrics: Vec<(Metric, f64)>,
    /// Which of them is the score.
    pub selection: Selection,
    /// Share of predictions that are labels, where the labels are known.
    pub legal_share: Option<f64>,
    /// Mean cross-entropy over all target tokens, in nats.
    pub loss: f64,
    /// One an example, in the order of the file.
    pub predictions: Vec<Prediction>,
}

impl Evaluation {
    /// What chooses the best checkpoint: the mean of the metrics, or the one that counts; 0 without metrics.
    #[must_use]
    pub fn score(&self) -> f64 {
        self.selection.score(&self.metrics)
    }
}

/// Evaluates the backbone, with a prompt or without, on `set`. The result depends neither on the engine's microbatches nor on
/// the number of replicas, to which the examples are dealt out; every rank gets all of it.
///
/// # Errors
/// If the model refuses an example, a loss is not finite (the message names the line), an exchange with other ranks fails, or
/// `control` of any rank asks to stop ([`Error::Interrupted`]).
pub fn evaluate(
    engine: &Engine,
    prompt: Option<&Prompt>,
    set: &TokenizedSet,
    tokenizer: &Tokenizer,
    options: &EvalOptions,
    control: &Control,
) -> Result<Evaluation> {
    let set = Arc::new(set.clone());
    PartialEvaluation::begin(engine, prompt, set, options.clone())?.complete(engine, tokenizer, control)
}

/// An evaluation that goes through the backbone round by round, so that other work can be done in between. What it needs of others
/// it shares or has copied. Several ranks make each call together; one whose group was lost is dropped and begun anew.
pub struct PartialEvaluation {
    set: Arc<TokenizedSet>,
    options: EvalOptions,
    /// `[P, D]`; none without a prompt.
    prompts: Vec<Tensor>,
    rounds: Vec<Round>,
    /// How many are done.
    done: usize,
    /// In the order of the set, as far as they are known here.
    outcomes: Vec<Outcome>,
}

/// A microbatch of each replica.
#[derive(Clone, Default)]
struct Round {
    /// This replica's examples: places in the set.
    places: Vec<usize>,
    /// Tokens of all replicas.
    cost: usize,
}

/// What the backbone gives for one example.
#[derive(Clone, Default)]
struct Outcome {
    /// Sum over the target's tokens.
    loss: f32,
    /// Greedy decoding's.
    tokens: Vec<u32>,
}

impl PartialEvaluation {
    /// An evaluation before its first round. The result is that of [`evaluate`].
    ///
    /// # Errors
    /// If the ranks were given different things, or an exchange between them fails.
    pub fn begin(
        engine: &Engine,
        prompt: Option<&Prompt>,
        set: Arc<TokenizedSet>,
        options: EvalOptions,
    ) -> Result<Self> {
        ranks::agree(engine.ranks(), || {
            let examples = ranks::tokens_digest(&set.examples);
            [
                ("another prompt", prompt.map(ranks::prompt_digest).unwrap_or_default()),
                ("other examples", format!("{examples} {}", options.max_new_tokens)),
            ]
        })?;
        let rows = prompt.map_or(0, Prompt::length);
        Ok(Self {
            prompts: prompt.map(prompt_rows).transpose()?.into_iter().collect(),
            rounds: rounds(engine, rows, &set, options.max_new_tokens),
            done: 0,
            outcomes: vec![Outcome::default(); set.examples.len()],
            set,
            options,
        })
    }

    /// How many tokens of all replicas the next round takes, predictions at their longest; 0 if none is left. The same on every rank.
    #[must_use]
    pub fn next_cost(&self) -> usize {
        self.rounds.get(self.done).map_or(0, |round| round.cost)
    }

    /// Whether all rounds are done, and [`Self::finish`] has nothing more to send through the backbone.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.done == self.rounds.len()
    }

    /// Does one round, if one is left: a microbatch of every replica. Returns whether all are done.
    ///
    /// # Errors
    /// If the model refuses an example, or an exchange with other ranks fails.
    pub fn advance(&mut self, engine: &Engine) -> Result<bool> {
        let Some(round) = self.rounds.get(self.done) else { return Ok(true) };
        // Another replica may have more microbatches.
        if !round.places.is_empty() {
            let example = |place: &usize| {
                let TokenizedExample { input, target, .. } = &self.set.examples[*place];
                Example { prompt: (!self.prompts.is_empty()).then_some(0), input, target, key: 0 }
            };
            let examples: Vec<Example<'_>> = round.places.iter().map(example).collect();
            let batch = Microbatch { prompts: &self.prompts, examples: &examples };
            let generate =
                GenerateOptions { max_new_tokens: self.options.max_new_tokens, ..GenerateOptions::default() };
            let encoded = engine.model().encoded(&batch)?;
            let losses = engine.model().loss_after(&encoded, &batch)?;
            let generated = engine.model().generate_after(&encoded, &batch, &generate)?;
            for ((place, loss), generated) in round.places.iter().zip(losses).zip(generated) {
                self.outcomes[*place] = Outcome { loss, tokens: generated.tokens };
            }
        }
        self.done += 1;
        Ok(self.is_complete())
    }

    /// Does the rounds that are left, unless someone asks to stop.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn complete(
        mut self,
        engine: &Engine,
        tokenizer: &Tokenizer,
        control: &Control,
    ) -> Result<Evaluation> {
        while !self.is_complete() {
            if ranks::any(engine.ranks(), control.stop_requested())? {
                return Err(Error::Interrupted);
            }
            self.advance(engine)?;
        }
        self.finish(engine, tokenizer)
    }

    /// The outcome. Rounds that are left are done first.
    ///
    /// # Errors
    /// As [`Self::advance`]; also if a loss is not finite (the message names the line).
    pub fn finish(mut self, engine: &Engine, tokenizer: &Tokenizer) -> Result<Evaluation> {
        while !self.advance(engine)? {}
        self.merge(engine)?;
        engine.confirm()?;
        let Self { set, options, outcomes, .. } = self;
        let mut predictions = Vec::with_capacity(outcomes.len());
        let (mut loss, mut num_targets) = (0.0, 0);
        for ((outcome, text), example) in outcomes.into_iter().zip(&set.texts).zip(&set.examples) {
            if !outcome.loss.is_finite() {
                let what = format!("the evaluation loss is {}", outcome.loss);
                return Err(Error::NonFiniteEvaluation { what, index: text.index, line: text.line });
            }
            loss += f64::from(outcome.loss);
            num_targets += example.target.len();
            let decoded = tokenizer.decode(&outcome.tokens, true);
            predictions.push(Prediction {
                index: text.index,
                inputs: text.inputs.clone(),
                target: text.targets.clone(),
                prediction: decoded.map_err(|cause| Error::Tokenizer { cause: cause.to_string() })?,
                loss: f64::from(outcome.loss) / example.target.len() as f64,
            });
        }
        let loss = loss / num_targets as f64;
        let written: Vec<String> = predictions.iter().map(|p| p.prediction.clone()).collect();
        let targets: Vec<String> = predictions.iter().map(|p| p.target.clone()).collect();
        Ok(Evaluation {
            metrics: options.scores(&written, &targets),
            selection: options.selection,
            legal_share: options.labels.as_ref().map(|labels| metrics::legal_share(&written, labels)),
            loss,
            predictions,
        })
    }

    /// Tells all replicas each other's outcomes.
    fn merge(&mut self, engine: &Engine) -> Result<()> {
        let group = &**engine.ranks().data();
        if group.size() == 1 {
            return Ok(());
        }
        // An outcome is its place, its loss, the number of its tokens, and these.
        let places = self.rounds.iter().flat_map(|round| &round.places);
        let words = places.flat_map(|place| {
            let Outcome { loss, tokens } = &self.outcomes[*place];
            [*place as u32, loss.to_bits(), tokens.len() as u32].into_iter().chain(tokens.iter().copied())
        });
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        for bytes in gather_bytes(group, &bytes)? {
            let mut words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
            while let (Some(place), Some(loss), Some(count)) = (words.next(), words.next(), words.next()) {
                let tokens = words.by_ref().take(count as usize).collect();
                self.outcomes[place as usize] = Outcome { loss: f32::from_bits(loss), tokens };
            }
        }
        Ok(())
    }
}

/// Examples of like length together, the longest first, so that memory is at its highest at the beginning. There are as many rounds
/// as the replica with the most microbatches needs; every rank finds the same, for all were told the same lengths.
fn rounds(engine: &Engine, rows: usize, set: &TokenizedSet, max_new_tokens: usize) -> Vec<Round> {
    let cost = |e: &TokenizedExample| rows + e.input.len() + e.target.len().max(max_new_tokens);
    let costs: Vec<usize> = set.examples.iter().map(cost).collect();
    let num_replicas = engine.ranks().mesh().dp();
    let replicas = microbatch::deal(&costs, num_replicas);
    let mut rounds = Vec::new();
    for replica in 0..num_replicas {
        let mut places: Vec<usize> = (0..costs.len()).filter(|place| replicas[*place] == replica).collect();
        places.sort_by_key(|place| std::cmp::Reverse(costs[*place]));
        let sorted: Vec<usize> = places.iter().map(|place| costs[*place]).collect();
        for (i, run) in microbatch::cut(&sorted, engine.microbatch_tokens()).into_iter().enumerate() {
            if i == rounds.len() {
                rounds.push(Round::default());
            }
            rounds[i].cost += sorted[run.clone()].iter().sum::<usize>();
            if replica == engine.ranks().coordinates().data {
                rounds[i].places = places[run].to_vec();
            }
        }
    }
    rounds
}
