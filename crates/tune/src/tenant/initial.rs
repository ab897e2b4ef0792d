//! The prompt that a job begins with.

use incipit_model::{Config, T5};
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    backbone::Backbone,
    init::{Initial, PromptInit, Sources, check_shape, initial_prompt},
    prompt::Prompt,
    spec::TrainSpec,
    task::Task,
};

/// What of a model a first prompt is made of.
#[derive(Clone, Copy)]
pub(crate) struct Ground<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) config: &'a Config,
    /// None before they are there: every embedding is then 0, and what is made tells only whether it can be made.
    pub(crate) weights: Option<&'a T5>,
}

impl<'a> Ground<'a> {
    pub(crate) fn of(backbone: &'a Backbone) -> Self {
        let weights = backbone.engine.model();
        Self { tokenizer: &backbone.tokenizer, config: weights.config(), weights: Some(weights) }
    }

    /// Does what draws on the model, the tokenizer and the task's words to make a prompt.
    pub(crate) fn with_sources<T>(
        self,
        spec: &TrainSpec,
        task: &Task,
        make: impl FnOnce(&Sources<'_>) -> Result<T>,
    ) -> Result<T> {
        let embedding = |id| match self.weights {
            Some(model) => model.embedding_row(id).map_err(Into::into),
            None => Ok(vec![0.0; self.config.d_model]),
        };
        let words = init_words(spec, task.labels.as_deref());
        make(&Sources { embedding: &embedding, tokenizer: self.tokenizer, labels: &words, seed: spec.seed })
    }
}

/// The words of a task with these labels that a prompt can begin as.
pub(crate) fn init_words(spec: &TrainSpec, labels: Option<&[String]>) -> Vec<String> {
    match spec.task {
        Some(named) => named.init_words.iter().map(|&word| word.to_owned()).collect(),
        None => labels.unwrap_or_default().to_vec(),
    }
}

/// The prompt before the first step, in its place; if each layer has rows of its own, all begin alike.
pub(crate) fn initial(ground: Ground<'_>, spec: &TrainSpec, task: &Task) -> Result<Initial> {
    let (shared, config) = (spec.shared_length.unwrap_or_default(), ground.config);
    let own = own_rows(ground, spec, task, shared)?;
    let Initial { prompt, warnings } =
        if shared == 0 { own } else { behind_shared(ground, spec, task, shared, own)? };
    let num_layers = spec.prompt_layers.of(config.num_layers);
    Ok(Initial { prompt: prompt.for_layers(num_layers)?.placed(spec.prompt_placement.into()), warnings })
}

/// A task's own rows behind those that it shares with others.
fn behind_shared(
    ground: Ground<'_>,
    spec: &TrainSpec,
    task: &Task,
    shared: usize,
    own: Initial,
) -> Result<Initial> {
    // Other pieces than those that fill up the rows of the tasks.
    let (seed, d_model) = (!spec.seed, ground.config.d_model);
    let rows = ground.with_sources(spec, task, |sources| {
        initial_prompt(&PromptInit::Vocab, shared, d_model, &Sources { seed, ..*sources })
    })?;
    let values = [rows.prompt.values(), own.prompt.values()].concat();
    Ok(Initial { prompt: Prompt::new(spec.prompt_length, d_model, values)?, ..own })
}

/// The rows of a prompt that are the task's own, behind `shared` ones.
fn own_rows(ground: Ground<'_>, spec: &TrainSpec, task: &Task, shared: usize) -> Result<Initial> {
    let (length, d_model) = (spec.prompt_length - shared, ground.config.d_model);
    if let PromptInit::File(path) = &spec.prompt_init {
        let prompt = task.initial.clone().map_or_else(|| Prompt::read(path), Ok)?;
        check_shape(&prompt, path, (length, shared), d_model)?;
        return Ok(Initial { prompt, warnings: Vec::new() });
    }
    ground.with_sources(spec, task, |sources| initial_prompt(&spec.prompt_init, length, d_model, sources))
}

/// Checks that a prompt to start from was trained on this backbone, if its files tell: elsewhere its numbers mean nothing.
pub(super) fn check_origin(backbone: &Backbone, spec: &TrainSpec, task: &Task) -> Result<()> {
    let PromptInit::File(path) = &spec.prompt_init else { return Ok(()) };
    let (model, now) = (backbone.name.clone(), backbone.fingerprint.to_string());
    match task.initial_backbone.clone().filter(|was| *was != now) {
        Some(was) => Err(Error::OtherOrigin { path: path.clone(), model, was, now }),
        None => Ok(()),
    }
}
