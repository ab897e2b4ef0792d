//! Jobs whose prompt is of tokens: a search for the best ones, or examples that are shown and not trained at all.

use std::sync::Arc;

use incipit_data::{Template, TokenizedSet};

use crate::{
    Error, Result,
    backbone::Backbone,
    engine::{Engine, JobBatch, JobFault},
    fewshot::{self, FewShotOptions, few_shot},
    init::{Sources, initial_tokens},
    job::{JobSpec, Update, prompt_rows},
    order::DataOrder,
    prompt::Prompt,
    search::{Search, SearchBatch, SearchOptions, searchable},
    spec::{Method, TrainSpec},
    task::Task,
    tenant::Ground,
    tokens::TokenPrompt,
};

/// One prompt of tokens. A step of a search takes two batches: one for the gradient and one to choose by.
pub struct TokenJob {
    spec: JobSpec,
    data: Arc<TokenizedSet>,
    /// Of batches; a step has two.
    order: DataOrder,
    work: Work,
    /// The tokens' rows.
    prompt: Prompt,
    /// Of an example: its input and target.
    mean_tokens: usize,
}

enum Work {
    Search(Search),
    /// Nothing: the prompt stays, and the only step measures its loss.
    Show {
        prompt: TokenPrompt,
        num_steps: u64,
    },
}

impl TokenJob {
    /// A job before its first step, and what a person should know of its prompt. All ranks make this call together.
    ///
    /// # Errors
    /// If the prompt cannot be made as the specification says, or there is less than one batch of examples.
    pub(crate) fn start(backbone: &Backbone, spec: &TrainSpec, task: &Task) -> Result<(Self, Vec<String>)> {
        let (prompt, warnings) = first_tokens(Ground::of(backbone), spec, task)?;
        Ok((Self::go_on(backbone, spec, task, prompt, 0)?, warnings))
    }

    /// A job that has come to `prompt` in `num_steps` steps. All ranks make this call together.
    ///
    /// # Errors
    /// If the prompt is none of the model's, or there is less than one batch of examples.
    pub(crate) fn go_on(
        backbone: &Backbone,
        spec: &TrainSpec,
        task: &Task,
        prompt: TokenPrompt,
        num_steps: u64,
    ) -> Result<Self> {
        let (job, data) = (JobSpec::from(spec), task.train.clone());
        let mut order = DataOrder::of(&job, data.examples.len())?;
        order.seek(2 * num_steps);
        let rows = prompt.rows(backbone.engine.model())?;
        let work = match spec.method {
            Method::Text => Work::Show { prompt, num_steps },
            _ => {
                let options =
                    SearchOptions { candidates: spec.candidates.unwrap_or_default(), seed: spec.seed };
                let pieces = search_space(backbone, task)?;
                Work::Search(Search::new(prompt, num_steps, options, pieces)?)
            }
        };
        let tokens = data.examples.iter().map(|example| example.input.len() + example.target.len());
        let mean_tokens = tokens.sum::<usize>().div_ceil(data.examples.len().max(1));
        Ok(Self { spec: job, data, order, work, prompt: rows, mean_tokens })
    }

    /// The prompt's rows as they are now.
    #[must_use]
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// Its tokens.
    #[must_use]
    pub fn tokens(&self) -> &TokenPrompt {
        match &self.work {
            Work::Search(search) => search.prompt(),
            Work::Show { prompt, .. } => prompt,
        }
    }

    /// Steps made.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        match &self.work {
            Work::Search(search) => search.num_steps(),
            Work::Show { num_steps, .. } => *num_steps,
        }
    }

    /// About how many tokens a step takes through the backbone: a search tries its candidates on the second batch.
    pub(crate) fn step_tokens(&self) -> usize {
        let passes = match &self.work {
            Work::Search(search) => 2 + search.num_candidates(),
            Work::Show { .. } => 1,
        };
        passes * self.spec.batch_size * (self.prompt.length() + self.mean_tokens)
    }

    /// Where the next step's data lie: the epoch, and the batch in it, both from 0.
    #[must_use]
    pub fn place(&self) -> (u64, u64) {
        let batch = 2 * self.num_steps();
        (self.order.epoch(batch), self.order.place(batch))
    }
}

/// The tokens before the first step, and what a person should know of them.
///
/// # Errors
/// If they cannot be as the specification says.
pub(crate) fn first_tokens(
    ground: Ground<'_>,
    spec: &TrainSpec,
    task: &Task,
) -> Result<(TokenPrompt, Vec<String>)> {
    let vocab_size = ground.config.vocab_size;
    if spec.method != Method::Text {
        let init = |sources: &Sources<'_>| initial_tokens(&spec.prompt_init, spec.prompt_length, sources);
        let (ids, warnings) = ground.with_sources(spec, task, init)?;
        return Ok((TokenPrompt::new(ids, vocab_size)?, warnings));
    }
    let options = FewShotOptions {
        shots: spec.shots.unwrap_or_default(),
        seed: spec.seed,
        template: Template::parse(spec.shot_template.as_deref().unwrap_or(fewshot::TEMPLATE))
            .map_err(|error| Error::spec("shot-template", &error))?,
        separator: spec.shot_separator.clone().unwrap_or(fewshot::SEPARATOR.to_owned()),
        instruction: spec.instruction.clone().unwrap_or_default(),
        max_tokens: spec.max_prompt_tokens.unwrap_or(spec.max_input_length),
    };
    let labels = task.labels.as_deref();
    let shown = few_shot(&task.train.texts, labels, &options, ground.tokenizer, vocab_size)?;
    Ok((shown.prompt, shown.warnings))
}

impl TokenJob {
    /// Makes a step. All ranks make this call together.
    ///
    /// # Errors
    /// If the backbone finds a fault with the prompt, in which case the job is over, or an exchange with other ranks fails.
    pub fn step(&mut self, engine: &Engine) -> Result<Update> {
        let (step, (epoch, _)) = (self.num_steps(), self.place());
        let mut next = |batch: u64| {
            self.order.seek(batch);
            self.order.batch(batch)
        };
        let (first, second) = (next(2 * step), next(2 * step + 1));
        self.order.seek(2 * step + 2);
        let batch = |places| SearchBatch { set: &self.data, places };
        let (loss, num_tokens) = match &mut self.work {
            Work::Search(search) => {
                let found = search.step(engine, batch(&first), batch(&second))?;
                self.prompt = search.prompt().rows(engine.model())?;
                (found.loss, found.num_tokens)
            }
            Work::Show { num_steps, .. } => {
                let rows = prompt_rows(&self.prompt)?;
                let examples = first.iter().map(|place| &self.data.examples[*place]).collect();
                // Nothing is drawn.
                let keys = vec![0; first.len()];
                let shown = JobBatch { prompt: &rows, examples, keys, objective: self.spec.objective };
                let loss = engine.losses(std::slice::from_ref(&shown))?.swap_remove(0);
                let stopped = |fault: JobFault| Error::Stopped { step: step + 1, why: fault.into() };
                *num_steps += 1;
                (loss.map_err(stopped)?, shown.num_tokens())
            }
        };
        // Nothing is scaled by a learning rate, and the gradient only points.
        let (lr, gradient_norm, num_examples) = (0.0, 0.0, self.spec.batch_size);
        Ok(Update { step: step + 1, epoch, loss, lr, gradient_norm, num_examples, num_tokens })
    }
}

/// The tokens that a search may use: not those of the labels, which the prompt is to lead to and not to name.
fn search_space(backbone: &Backbone, task: &Task) -> Result<Vec<u32>> {
    let labels = task.labels.as_deref().unwrap_or_default();
    searchable(&backbone.tokenizer, backbone.config().vocab_size, labels)
}
