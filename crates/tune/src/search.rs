//! A prompt of tokens, found along the gradient: AutoPrompt (Shin et al. 2020).
//!
//! Each step looks at one place of the prompt. To first order, the loss changes by `(e_w - e_now) . g` if the token there becomes `w`,
//! where `e` are rows of the embedding and `g` is the loss's gradient to the row at that place. The tokens for which this is lowest
//! are tried on another batch, all at once, and the best one is taken if it is better than the one that is there.

use candle_core::{Device, Tensor};
use incipit_data::TokenizedSet;
use incipit_kernels::rng::Philox;
use incipit_model::{SoftPrompt, T5};
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    engine::{Engine, JobBatch, JobFault, Objective},
    recipe::LossReduction,
    tokens::{self, TokenPrompt},
};

/// Distinguishes these random numbers from the job's others.
const STREAM: u64 = u64::from_be_bytes(*b"search 0");
/// What is compared is the loss as it is.
const OBJECTIVE: Objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };

/// How a search goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SearchOptions {
    /// Tokens that are tried at a step; the paper tries 10 and 100. Each is a prompt of its own on the host meanwhile.
    pub candidates: usize,
    /// Decides which place a step looks at.
    pub seed: u64,
}

/// Some examples of a set.
#[derive(Clone, Copy, Debug)]
pub struct SearchBatch<'a> {
    /// The set.
    pub set: &'a TokenizedSet,
    /// Their places in it; at least one.
    pub places: &'a [usize],
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchUpdate {
    /// Steps made, this one included.
    pub step: u64,
    /// Mean cross-entropy over the target tokens of the gradient's batch before the step, in nats.
    pub loss: f64,
    /// That of the evaluation's batch before the step.
    pub before: f64,
    /// That of the evaluation's batch behind it: never above `before`.
    pub after: f64,
    /// The place of the prompt at which the step looked, from 0.
    pub position: usize,
    /// The token that was there.
    pub old: u32,
    /// The token that is there now; the same if none was better.
    pub new: u32,
    /// Inputs, prompt rows and targets that went through the backbone, in tokens.
    pub num_tokens: usize,
}

/// A token that may be better.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// By how much the loss changes with it, to first order.
    pub change: f32,
}

/// A prompt being searched for. Its whole state is the prompt and the number of steps. Where several ranks have the backbone, each has
/// the search and they make every step together.
#[derive(Clone, Debug)]
pub struct Search {
    prompt: TokenPrompt,
    num_steps: u64,
    options: SearchOptions,
    pieces: Vec<u32>,
}

/// The tokens that a search may use, on a model with a vocabulary of `vocab_size`: ordinary pieces, but for those of the texts
/// `without`, such as labels that a prompt is not to name.
///
/// # Errors
/// If the tokenizer fails.
pub fn searchable(tokenizer: &Tokenizer, vocab_size: usize, without: &[String]) -> Result<Vec<u32>> {
    let mut excluded = Vec::new();
    for text in without {
        excluded.extend(tokens::pieces(tokenizer, text)?);
    }
    let mut pieces = tokens::ordinary(tokenizer);
    pieces.retain(|id| (*id as usize) < vocab_size && !excluded.contains(id));
    Ok(pieces)
}

/// The `count` tokens among `pieces` that lower the loss most, to first order, in the place of `current`, whose row has the gradient
/// `gradient` `[D]`; the most promising first, and of equal ones the lower number. A token with an embedding that is not finite is none.
///
/// # Errors
/// If `gradient` is no row of the model's, or an exchange with other ranks fails.
pub fn candidates(
    model: &T5,
    gradient: &[f32],
    current: u32,
    pieces: &[u32],
    count: usize,
) -> Result<Vec<Candidate>> {
    let scores = model.embedding_scores(gradient)?;
    let score = |token: u32| scores.get(token as usize).copied().unwrap_or(f32::NAN);
    let candidate = |token: &u32| Candidate { token: *token, change: score(*token) - score(current) };
    let mut candidates: Vec<Candidate> = pieces
        .iter()
        .map(candidate)
        .filter(|candidate| candidate.token != current && candidate.change.is_finite())
        .collect();
    candidates.sort_by(|a, b| a.change.total_cmp(&b.change).then(a.token.cmp(&b.token)));
    candidates.truncate(count);
    Ok(candidates)
}

impl Search {
    /// A search that has made `num_steps` steps and come to `prompt`; it may use the tokens `pieces`.
    ///
    /// # Errors
    /// If no token is to be tried, or there is none.
    pub fn new(
        prompt: TokenPrompt,
        num_steps: u64,
        options: SearchOptions,
        pieces: Vec<u32>,
    ) -> Result<Self> {
        if options.candidates == 0 {
            return Err(Error::spec(
                "candidates",
                &"is 0; pass at least 1, so that there is something to try",
            ));
        }
        if pieces.is_empty() {
            let what = "the model's tokenizer has no ordinary pieces to search among; use its own tokenizer";
            return Err(Error::Prompt { what: what.to_owned() });
        }
        Ok(Self { prompt, num_steps, options, pieces })
    }

    /// Tokens that a step tries.
    pub(crate) fn num_candidates(&self) -> usize {
        self.options.candidates
    }

    /// The prompt as it is now.
    #[must_use]
    pub fn prompt(&self) -> &TokenPrompt {
        &self.prompt
    }

    /// Steps made.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// The place of the prompt at which the next step looks: a function of the seed and the number of steps.
    #[must_use]
    pub fn position(&self) -> usize {
        let mut random = Philox::new(self.options.seed, &[STREAM, self.num_steps]);
        random.below(self.prompt.ids().len() as u64) as usize
    }

    /// One step: candidates by the gradient on the one batch, of which the best on the other is taken if it is better than what is
    /// there. The microbatches and the replicas do not change what is found.
    ///
    /// # Errors
    /// If the backbone finds a fault with the prompt as it is, or an exchange with other ranks fails; the prompt stays as it was.
    ///
    /// # Panics
    /// If a place is not in its set.
    pub fn step(
        &mut self,
        engine: &Engine,
        gradient: SearchBatch<'_>,
        evaluation: SearchBatch<'_>,
    ) -> Result<SearchUpdate> {
        let (model, ids) = (engine.model(), self.prompt.ids());
        let width = model.config().d_model;
        let rows = self.prompt.rows(model)?.into_values();
        let prompt = SoftPrompt::from(Tensor::from_slice(&rows, (ids.len(), width), &Device::Cpu)?);
        let found = engine.gradients(&[gradient.job(&prompt)])?.swap_remove(0);
        let found = found.map_err(|fault| self.stopped(&fault, gradient))?;

        let position = self.position();
        let (old, place) = (ids[position], position * width..(position + 1) * width);
        let slope = &found.gradient[place.clone()];
        let candidates = candidates(model, slope, old, &self.pieces, self.options.candidates)?;
        let tried: Vec<u32> = candidates.iter().map(|candidate| candidate.token).collect();
        let mut prompts = vec![prompt];
        for row in model.embedding_rows(&tried)?.chunks_exact(width) {
            let mut rows = rows.clone();
            rows[place.clone()].copy_from_slice(row);
            prompts.push(Tensor::from_vec(rows, (ids.len(), width), &Device::Cpu)?.into());
        }

        let jobs: Vec<JobBatch<'_>> = prompts.iter().map(|prompt| evaluation.job(prompt)).collect();
        let num_tokens = found.num_tokens + jobs.iter().map(JobBatch::num_tokens).sum::<usize>();
        let mut losses = engine.losses(&jobs)?.into_iter();
        let before = losses.next().unwrap_or_else(|| unreachable!("one loss a job"));
        let before = before.map_err(|fault| self.stopped(&fault, evaluation))?;
        let (mut after, mut new) = (before, old);
        for (token, loss) in tried.into_iter().zip(losses) {
            // A token at which the backbone finds a fault is not better.
            if let Ok(loss) = loss
                && loss < after
            {
                (after, new) = (loss, token);
            }
        }
        self.prompt.replace(position, new);
        self.num_steps += 1;
        let step = self.num_steps;
        Ok(SearchUpdate { step, loss: found.loss, before, after, position, old, new, num_tokens })
    }

    fn stopped(&self, fault: &JobFault, batch: SearchBatch<'_>) -> Error {
        let place = match fault {
            JobFault::Loss { example, .. } | JobFault::Gradient { example, .. } => batch.places[*example],
            JobFault::Refused(why) => {
                return Error::Stopped { step: self.num_steps + 1, why: why.clone() };
            }
        };
        let line = batch.set.texts[place].line;
        let what =
            format!("{fault} (line {line} of its file); look at that record and at the model's weights");
        Error::Stopped { step: self.num_steps + 1, why: what.into() }
    }
}

impl<'a> SearchBatch<'a> {
    fn job(&self, prompt: &'a SoftPrompt) -> JobBatch<'a> {
        JobBatch {
            prompt,
            examples: self.places.iter().map(|place| &self.set.examples[*place]).collect(),
            keys: vec![0; self.places.len()], // nothing is drawn
            objective: OBJECTIVE,
        }
    }
}
