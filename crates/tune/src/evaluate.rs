//! Evaluation: greedy decoding over a set of examples, and what it is worth.

use candle_core::Tensor;
use incipit_collective::gather_bytes;
use incipit_data::{
    TokenizedExample, TokenizedSet,
    metrics::{self, Metric},
};
use incipit_model::{Example, GenerateOptions, Microbatch};
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::{
    Error, Result, control::Control, engine::Engine, job::prompt_rows, microbatch, prompt::Prompt, ranks,
};

/// What is measured, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalOptions {
    /// What is measured.
    pub metrics: Vec<Metric>,
    /// The label set, if the task has one: the share of predictions that lie in it is reported.
    pub labels: Option<Vec<String>>,
    /// Longest prediction, in tokens, without `</s>`.
    pub max_new_tokens: usize,
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
    /// Share of predictions that are labels, where the labels are known.
    pub legal_share: Option<f64>,
    /// Mean cross-entropy over all target tokens, in nats.
    pub loss: f64,
    /// One an example, in the order of the file.
    pub predictions: Vec<Prediction>,
}

impl Evaluation {
    /// The mean of the metrics, which chooses the best checkpoint; 0 without metrics.
    #[must_use]
    pub fn score(&self) -> f64 {
        self.metrics.iter().map(|(_, value)| value).sum::<f64>() / self.metrics.len().max(1) as f64
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
    ranks::agree(engine.ranks(), || {
        let examples = ranks::tokens_digest(&set.examples);
        [
            ("another prompt", prompt.map(ranks::prompt_digest).unwrap_or_default()),
            ("other examples", format!("{examples} {}", options.max_new_tokens)),
        ]
    })?;
    let prompt = prompt.map(prompt_rows).transpose()?;
    let outcomes = outcomes(engine, prompt.as_ref(), set, options.max_new_tokens, control)?;
    engine.confirm()?;
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
        metrics: options.metrics.iter().map(|m| (*m, metrics::score(*m, &written, &targets))).collect(),
        legal_share: options.labels.as_ref().map(|labels| metrics::legal_share(&written, labels)),
        loss,
        predictions,
    })
}

/// What the backbone gives for one example.
#[derive(Clone, Default)]
struct Outcome {
    /// Sum over the target's tokens.
    loss: f32,
    /// Greedy decoding's.
    tokens: Vec<u32>,
}

/// Examples of like length together, the longest first, so that memory is at its highest at the beginning; outcomes in the
/// order of the set.
fn outcomes(
    engine: &Engine,
    prompt: Option<&Tensor>,
    set: &TokenizedSet,
    max_new_tokens: usize,
    control: &Control,
) -> Result<Vec<Outcome>> {
    let rows = prompt.map_or(0, |prompt| prompt.dims()[0]);
    let cost = |e: &TokenizedExample| rows + e.input.len() + e.target.len().max(max_new_tokens);
    let ranks = engine.ranks();
    let costs: Vec<usize> = set.examples.iter().map(cost).collect();
    let replicas = microbatch::deal(&costs, ranks.mesh().dp());
    let own = |place: &usize| replicas[*place] == ranks.coordinates().data;
    let mut places: Vec<usize> = (0..set.examples.len()).filter(own).collect();
    places.sort_by_key(|place| std::cmp::Reverse(costs[*place]));
    let costs: Vec<usize> = places.iter().map(|place| costs[*place]).collect();
    let generate = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
    let prompts: Vec<Tensor> = prompt.cloned().into_iter().collect();
    let mut outcomes = vec![Outcome::default(); set.examples.len()];
    let runs = microbatch::cut(&costs, engine.microbatch_tokens());
    // Every replica goes through as many rounds as the one with the most microbatches, so that all can agree to stop.
    let rounds = ranks::largest(ranks, &[runs.len() as i64])?[0];
    for round in 0..rounds as usize {
        if ranks::any(ranks, control.stop_requested())? {
            return Err(Error::Interrupted);
        }
        let places = runs.get(round).map_or(&[][..], |run| &places[run.clone()]);
        if places.is_empty() {
            continue;
        }
        let example = |place: &usize| {
            let TokenizedExample { input, target, .. } = &set.examples[*place];
            Example { prompt: prompt.map(|_| 0), input, target, key: 0 }
        };
        let examples: Vec<Example<'_>> = places.iter().map(example).collect();
        let batch = Microbatch { prompts: &prompts, examples: &examples };
        let encoded = engine.model().encoded(&batch)?;
        let losses = engine.model().loss_after(&encoded, &batch)?;
        let generated = engine.model().generate_after(&encoded, &batch, &generate)?;
        for ((place, loss), generated) in places.iter().zip(losses).zip(generated) {
            outcomes[*place] = Outcome { loss, tokens: generated.tokens };
        }
    }
    merged(engine, &places, outcomes)
}

/// The outcomes of all replicas, of which each has those of its `places`.
fn merged(engine: &Engine, places: &[usize], mut outcomes: Vec<Outcome>) -> Result<Vec<Outcome>> {
    let group = &**engine.ranks().data();
    if group.size() == 1 {
        return Ok(outcomes);
    }
    // An outcome is its place, its loss, the number of its tokens, and these.
    let words = places.iter().flat_map(|place| {
        let Outcome { loss, tokens } = &outcomes[*place];
        [*place as u32, loss.to_bits(), tokens.len() as u32].into_iter().chain(tokens.iter().copied())
    });
    let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    for bytes in gather_bytes(group, &bytes)? {
        let mut words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
        while let (Some(place), Some(loss), Some(count)) = (words.next(), words.next(), words.next()) {
            let tokens = words.by_ref().take(count as usize).collect();
            outcomes[place as usize] = Outcome { loss: f32::from_bits(loss), tokens };
        }
    }
    Ok(outcomes)
}
