//! Evaluation: predictions for a set of examples, by greedy decoding or by ranking labels, and what they are worth.

use std::{collections::BTreeMap, sync::Arc};

use incipit_collective::gather_bytes;
use incipit_data::{
    LabelMap, TokenizedExample, TokenizedSet,
    metrics::{self, Metric, Reference, score_references},
    tasks::Selection,
};
use incipit_model::{Example, GenerateOptions, Generated, Microbatch, SoftPrompt};
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::{
    Error, Result, control::Control, engine::Engine, job::prompt_rows, microbatch, pace::Work,
    prompt::Prompt, rank::Candidates, ranks,
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
    /// Longest prediction, in tokens, without `</s>`; 0 if only the loss is of interest.
    pub max_new_tokens: usize,
    /// What predictions are chosen among; where there is none, the model writes them by greedy decoding.
    pub candidates: Option<Arc<Candidates>>,
    /// Of a prompt of another task that asks the same in other words: from its labels, in which targets and candidates are given, to
    /// those in which predictions are scored.
    pub rewrite: Option<LabelMap>,
}

impl EvalOptions {
    /// Tokens that the decoder reads for an example's prediction, at most.
    fn num_answer_tokens(&self) -> usize {
        self.candidates.as_ref().map_or(self.max_new_tokens, |candidates| candidates.num_tokens())
    }

    /// What goes through the backbone.
    fn work(&self) -> Work {
        let candidates = self.candidates.as_ref().map_or(0, |candidates| candidates.tokens().len());
        Work::Evaluation { new_tokens: self.max_new_tokens, candidates }
    }

    /// How many times as long predictions could have been as these are.
    fn shortfall(&self, outcomes: &[Outcome]) -> f64 {
        if self.candidates.is_some() {
            return 1.0;
        }
        let longest = outcomes.iter().map(|outcome| outcome.tokens.len()).max().unwrap_or_default();
        (self.max_new_tokens + 1) as f64 / (longest + 1) as f64
    }

    /// A label in the words in which it is scored.
    fn rewritten(&self, label: String) -> String {
        match self.rewrite.as_ref().and_then(|map| map.get(&label)) {
            Some(text) => text.to_owned(),
            None => label,
        }
    }

    /// The metrics of the predictions.
    pub(crate) fn scores(&self, written: &[String], targets: &[String]) -> Vec<(Metric, f64)> {
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
    /// What the model wrote, or the label that it finds likeliest.
    pub prediction: String,
    /// Mean cross-entropy over the target's tokens, in nats.
    pub loss: f64,
    /// Of labels that were ranked, each one's log-likelihood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<BTreeMap<String, f64>>,
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
    /// What chooses the best checkpoint: the mean of the metrics, or the one that counts; without metrics the loss, less of which is
    /// more.
    #[must_use]
    pub fn score(&self) -> f64 {
        if self.metrics.is_empty() {
            return -self.loss;
        }
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
    /// None for the bare backbone.
    prompts: Vec<SoftPrompt>,
    rounds: Vec<Round>,
    /// How many are done.
    done: usize,
    /// One a trial, as far as they are known here. A trial is an example with a prompt; those of an example follow each other.
    outcomes: Vec<Outcome>,
}

/// A microbatch of each replica.
#[derive(Clone, Default)]
struct Round {
    /// This replica's trials: their places among all.
    places: Vec<usize>,
    /// Tokens of all replicas.
    cost: usize,
}

/// What the backbone gives for one trial.
#[derive(Clone, Default)]
struct Outcome {
    /// Sum over the target's tokens.
    loss: f32,
    /// Greedy decoding's; none where labels are ranked.
    tokens: Vec<u32>,
    /// Of the labels that are ranked.
    scores: Vec<f32>,
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
        Self::begin_each(engine, prompt.as_slice(), set, options)
    }

    /// An evaluation of several prompts at once: an example goes through the backbone with each of them, in one microbatch as far as it
    /// holds them. Ends with [`Self::finish_each`]. Without prompts it is one of the bare backbone.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_each(
        engine: &Engine,
        prompts: &[&Prompt],
        set: Arc<TokenizedSet>,
        options: EvalOptions,
    ) -> Result<Self> {
        ranks::agree(engine.ranks(), || {
            let examples = ranks::tokens_digest(&set.examples);
            let candidates = options.candidates.as_ref().map(|candidates| candidates.tokens());
            [
                ("another prompt", prompts.iter().map(|prompt| ranks::prompt_digest(prompt)).collect()),
                ("other examples", format!("{examples} {} {candidates:?}", options.max_new_tokens)),
            ]
        })?;
        let rows: Vec<usize> = match prompts {
            [] => vec![0],
            _ => prompts.iter().map(|prompt| prompt.length()).collect(),
        };
        let answer = options.num_answer_tokens();
        let tokens = |e: &TokenizedExample| e.input.len() + e.target.len().max(answer);
        let costs: Vec<usize> =
            set.examples.iter().flat_map(|e| rows.iter().map(move |rows| rows + tokens(e))).collect();
        Ok(Self {
            prompts: prompts.iter().map(|prompt| prompt_rows(prompt)).collect::<Result<_>>()?,
            rounds: rounds(engine, &costs),
            done: 0,
            outcomes: vec![Outcome::default(); costs.len()],
            set,
            options,
        })
    }

    /// How many trials an example has.
    fn num_trials(&self) -> usize {
        self.prompts.len().max(1)
    }

    fn trial(&self, place: usize) -> Example<'_> {
        let TokenizedExample { input, target, .. } = &self.set.examples[place / self.num_trials()];
        let prompt = (!self.prompts.is_empty()).then_some(place % self.num_trials());
        Example { prompt, input, target, key: 0 }
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
            let examples: Vec<Example<'_>> = round.places.iter().map(|place| self.trial(*place)).collect();
            let batch = Microbatch { prompts: &self.prompts, examples: &examples };
            let under = engine.begin(self.options.work(), round.cost);
            let outcomes = self.outcomes(engine, &batch)?;
            under.succeeds(self.options.shortfall(&outcomes));
            for (place, outcome) in round.places.iter().zip(outcomes) {
                self.outcomes[*place] = outcome;
            }
        }
        self.done += 1;
        Ok(self.is_complete())
    }

    /// What a microbatch gives; its examples are encoded once.
    fn outcomes(&self, engine: &Engine, batch: &Microbatch<'_>) -> Result<Vec<Outcome>> {
        let model = engine.model();
        let encoded = model.encoded(batch)?;
        let losses = model.loss_after(&encoded, batch)?.into_iter();
        if let Some(candidates) = &self.options.candidates {
            let labels = model.label_losses_after(&encoded, batch, candidates.tokens())?;
            let scores =
                labels.chunks(candidates.tokens().len()).map(|part| part.iter().map(|x| -x).collect());
            let outcome = |(loss, scores)| Outcome { loss, tokens: Vec::new(), scores };
            return Ok(losses.zip(scores).map(outcome).collect());
        }
        let max_new_tokens = self.options.max_new_tokens;
        if max_new_tokens == 0 {
            return Ok(losses.map(|loss| Outcome { loss, ..Outcome::default() }).collect());
        }
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let generated = model.generate_after(&encoded, batch, &options)?.into_iter();
        let outcome = |(loss, generated): (f32, Generated)| Outcome {
            loss,
            tokens: generated.tokens,
            scores: Vec::new(),
        };
        Ok(losses.zip(generated).map(outcome).collect())
    }

    /// The outcome, unless someone asks to stop before it is there.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn complete(
        mut self,
        engine: &Engine,
        tokenizer: &Tokenizer,
        control: &Control,
    ) -> Result<Evaluation> {
        self.make_rounds(engine, control)?;
        self.finish(engine, tokenizer)
    }

    /// Does the rounds that are left, unless someone asks to stop.
    ///
    /// # Errors
    /// As [`Self::advance`], and [`Error::Interrupted`].
    pub fn make_rounds(&mut self, engine: &Engine, control: &Control) -> Result<()> {
        while !self.is_complete() {
            if ranks::any(engine.ranks(), control.stop_requested())? {
                return Err(Error::Interrupted);
            }
            self.advance(engine)?;
        }
        Ok(())
    }

    /// The outcome. Rounds that are left are done first.
    ///
    /// # Errors
    /// As [`Self::advance`]; also if a loss is not finite (the message names the line).
    pub fn finish(self, engine: &Engine, tokenizer: &Tokenizer) -> Result<Evaluation> {
        Ok(self.finish_each(engine, tokenizer)?.swap_remove(0))
    }

    /// The outcome of each prompt, the same as if it were evaluated alone; without prompts that of the bare backbone.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn finish_each(mut self, engine: &Engine, tokenizer: &Tokenizer) -> Result<Vec<Evaluation>> {
        while !self.advance(engine)? {}
        self.merge(engine)?;
        engine.confirm()?;
        (0..self.num_trials()).map(|trial| self.evaluation(trial, tokenizer)).collect()
    }

    /// What came of one trial of each example.
    fn evaluation(&self, trial: usize, tokenizer: &Tokenizer) -> Result<Evaluation> {
        let Self { set, options, .. } = self;
        let outcomes = self.outcomes.iter().skip(trial).step_by(self.num_trials());
        let mut predictions = Vec::with_capacity(set.examples.len());
        let (mut loss, mut num_targets) = (0.0, 0);
        for ((outcome, text), example) in outcomes.zip(&set.texts).zip(&set.examples) {
            if let Some(number) = outcome.non_finite() {
                let what = format!("the evaluation loss is {number}");
                return Err(Error::NonFiniteEvaluation { what, index: text.index, line: text.line });
            }
            loss += f64::from(outcome.loss);
            num_targets += example.target.len();
            let decoded = || tokenizer.decode(&outcome.tokens, true);
            let decoded = || decoded().map_err(|cause| Error::Tokenizer { cause: cause.to_string() });
            let candidates = options.candidates.as_ref();
            predictions.push(Prediction {
                index: text.index,
                inputs: text.inputs.clone(),
                target: options.rewritten(text.targets.clone()),
                prediction: options
                    .rewritten(candidates.map_or_else(decoded, |candidates| {
                        Ok(candidates.best(&outcome.scores).to_owned())
                    })?),
                loss: f64::from(outcome.loss) / example.target.len() as f64,
                scores: candidates.map(|candidates| candidates.named(&outcome.scores)),
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
        // An outcome is its place, its loss, the number of its tokens, these, and the labels' scores.
        let places = self.rounds.iter().flat_map(|round| &round.places);
        let words = places.flat_map(|place| {
            let Outcome { loss, tokens, scores } = &self.outcomes[*place];
            let head = [*place as u32, loss.to_bits(), tokens.len() as u32];
            let scores = scores.iter().map(|score| score.to_bits());
            head.into_iter().chain(tokens.iter().copied()).chain(scores)
        });
        let num_scores = self.options.candidates.as_ref().map_or(0, |candidates| candidates.tokens().len());
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        for bytes in gather_bytes(group, &bytes)? {
            let mut words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
            while let (Some(place), Some(loss), Some(count)) = (words.next(), words.next(), words.next()) {
                let tokens = words.by_ref().take(count as usize).collect();
                let scores = words.by_ref().take(num_scores).map(f32::from_bits).collect();
                self.outcomes[place as usize] = Outcome { loss: f32::from_bits(loss), tokens, scores };
            }
        }
        Ok(())
    }
}

impl Outcome {
    /// A number that is none.
    fn non_finite(&self) -> Option<f32> {
        std::iter::once(&self.loss).chain(&self.scores).copied().find(|number| !number.is_finite())
    }
}

/// Trials of like length together, the longest first, so that memory is at its highest at the beginning. There are as many rounds
/// as the replica with the most microbatches needs; every rank finds the same, for all were told the same lengths.
fn rounds(engine: &Engine, costs: &[usize]) -> Vec<Round> {
    let num_replicas = engine.ranks().mesh().dp();
    let replicas = microbatch::deal(costs, num_replicas);
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
