//! What of a job is checked before the model's weights are there, which may take minutes.

use incipit_data::TextExample;

use crate::{
    Result,
    backbone::Opened,
    init::check_labels,
    order::DataOrder,
    spec::{Method, TrainSpec},
    task::{self, Task},
    tenant::{Ground, init_words, initial},
    token_job::first_tokens,
};

/// Checks what the texts of the training examples decide: that there are labels where the job cannot do without.
///
/// # Errors
/// If there are none.
pub fn check_texts(spec: &TrainSpec, train: &[TextExample]) -> Result<()> {
    let labels = task::labels(spec, train)?;
    if spec.method == Method::Prompt {
        check_labels(&spec.prompt_init, &init_words(spec, labels.as_deref()))?;
    }
    spec.predict.check(labels.as_deref())
}

/// Checks what [`crate::tenant::Tenant::start`] needs besides weights, as that does it. A run that goes on was checked when it began.
///
/// # Errors
/// As that.
pub(crate) fn check(spec: &TrainSpec, task: &Task, model: &Opened) -> Result<()> {
    let Opened { tokenizer, config, .. } = model;
    let ground = Ground { tokenizer, config, weights: None };
    match spec.method {
        _ if spec.resume => {}
        Method::Prompt => drop(initial(ground, spec, task)?),
        Method::Text | Method::Search => drop(first_tokens(ground, spec, task)?),
        Method::Model | Method::Adapter | Method::Prefix => {}
    }
    if spec.objective.is_none() {
        DataOrder::of(&spec.into(), task.train.examples.len())?;
    }
    task.candidates(spec, tokenizer, config.vocab_size).map(drop)
}
