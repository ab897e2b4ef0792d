//! The prompt that a job begins with.

use std::path::Path;

use crate::{
    Error, Result,
    backbone::Backbone,
    init::{Initial, PromptInit, Sources, check_shape, initial_prompt},
    prompt::Prompt,
    spec::TrainSpec,
    task::Task,
};

/// The prompt before the first step, in its place; if each layer has rows of its own, all begin alike.
pub(super) fn initial(backbone: &Backbone, spec: &TrainSpec, task: &Task) -> Result<Initial> {
    let (shared, d_model) = (spec.shared_length.unwrap_or_default(), backbone.config().d_model);
    let own = own_rows(backbone, spec, task, shared)?;
    let Initial { prompt, warnings } =
        if shared == 0 { own } else { behind_shared(backbone, spec, task, (shared, d_model), own)? };
    let num_layers = spec.prompt_layers.of(backbone.config().num_layers);
    Ok(Initial { prompt: prompt.for_layers(num_layers)?.placed(spec.prompt_placement.into()), warnings })
}

/// A task's own rows behind those that it shares with others.
fn behind_shared(
    backbone: &Backbone,
    spec: &TrainSpec,
    task: &Task,
    (shared, d_model): (usize, usize),
    own: Initial,
) -> Result<Initial> {
    // Other pieces than those that fill up the rows of the tasks.
    let seed = !spec.seed;
    let rows = with_sources(backbone, spec, task, |sources| {
        initial_prompt(&PromptInit::Vocab, shared, d_model, &Sources { seed, ..*sources })
    })?;
    let values = [rows.prompt.values(), own.prompt.values()].concat();
    Ok(Initial { prompt: Prompt::new(spec.prompt_length, d_model, values)?, ..own })
}

/// The rows of a prompt that are the task's own, behind `shared` ones.
fn own_rows(backbone: &Backbone, spec: &TrainSpec, task: &Task, shared: usize) -> Result<Initial> {
    let (length, d_model) = (spec.prompt_length - shared, backbone.config().d_model);
    if let PromptInit::File(path) = &spec.prompt_init {
        check_origin(backbone, task, path)?;
        let prompt = task.initial.clone().map_or_else(|| Prompt::read(path), Ok)?;
        check_shape(&prompt, path, (length, shared), d_model)?;
        return Ok(Initial { prompt, warnings: Vec::new() });
    }
    with_sources(backbone, spec, task, |sources| initial_prompt(&spec.prompt_init, length, d_model, sources))
}

/// Checks that a prompt to start from was trained on this backbone, if its files tell: elsewhere its numbers mean nothing.
fn check_origin(backbone: &Backbone, task: &Task, path: &Path) -> Result<()> {
    let (model, now) = (backbone.name.clone(), backbone.fingerprint.to_string());
    match task.initial_backbone.clone().filter(|was| *was != now) {
        Some(was) => Err(Error::OtherOrigin { path: path.to_owned(), model, was, now }),
        None => Ok(()),
    }
}

/// Does what draws on the model, the tokenizer and the task's words to make a prompt.
pub(crate) fn with_sources<T>(
    backbone: &Backbone,
    spec: &TrainSpec,
    task: &Task,
    make: impl FnOnce(&Sources<'_>) -> Result<T>,
) -> Result<T> {
    let model = backbone.engine.model();
    let embedding = |id| model.embedding_row(id).map_err(Into::into);
    let words = match spec.task {
        Some(named) => named.init_words.iter().map(|&word| word.to_owned()).collect(),
        None => task.labels.clone().unwrap_or_default(),
    };
    make(&Sources { embedding: &embedding, tokenizer: &backbone.tokenizer, labels: &words, seed: spec.seed })
}
