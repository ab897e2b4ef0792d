//! What `eval`, `generate` and `ensemble eval` begin with: a backbone, perhaps prompts, and the settings of the run that made them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use incipit_collective::Ranks;
use incipit_data::metrics::Metric;
use incipit_data::tasks::Task;
use incipit_data::{TaskFormat, Template};
use incipit_tune::backbone::Backbone;
use incipit_tune::engine::{EngineOptions, Recompute};
use incipit_tune::prompt::Prompt;
use incipit_tune::rank::Predict;
use incipit_tune::spec::{PartialSpec, Precision, RUN_FILE};
use incipit_tune::trained::Trained;

use crate::args::{FormatArgs, ModelArgs};
use crate::exit::BadInput;
use crate::progress::note;

/// A backbone with prompts, and how their examples are written.
pub(crate) struct Ready {
    pub(crate) backbone: Backbone,
    /// One, several that vote, or none.
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) format: TaskFormat,
    pub(crate) max_input_length: usize,
    pub(crate) max_target_length: usize,
    pub(crate) metrics: Vec<Metric>,
    pub(crate) predict: Predict,
    /// Whether the prompt's run put a sentinel before each target.
    pub(crate) target_sentinel: bool,
    /// The benchmark that the first prompt was trained on, if its run says so.
    pub(crate) trained: Option<&'static Task>,
    /// The settings of the run that made the first prompt, which told what the flags did not.
    pub(crate) run: Option<PartialSpec>,
}

/// Loads what the flags name, with `prompts`, each from its path. What the flags leave open is taken from the run that made the first
/// prompt, where its `run.toml` lies beside it: a prompt works with the template that it was trained with. Of the backbone, `ranks` have
/// a part or a copy each.
///
/// # Errors
/// If a file is missing or broken, the prompt is another model's, or no model is named.
pub(crate) fn load(
    args: &ModelArgs,
    prompts: Vec<(PathBuf, Trained)>,
    format: &FormatArgs,
    ranks: &Arc<Ranks>,
) -> Result<Ready> {
    let run = match prompts.first() {
        Some((path, _)) => run_settings(path)?,
        None => None,
    };
    let given = PartialSpec {
        model: args.model.clone(),
        dtype: args.dtype,
        inputs: format.inputs.clone(),
        targets: format.targets.clone(),
        labels: format.labels.clone(),
        max_input_length: format.max_input_length,
        max_target_length: format.max_target_length,
        ..PartialSpec::default()
    };
    let settings = given.over(run.clone().unwrap_or_default()).over(PartialSpec::defaults());
    let model = settings
        .model
        .as_deref()
        .ok_or_else(|| BadInput("--model is missing: give the backbone".to_owned()))?;
    if ranks.leads() {
        note(&format!("loading {model}"));
    }
    let options = EngineOptions { microbatch_tokens: args.microbatch_tokens, recompute: Recompute::Auto };
    let (dtype, device) = (settings.dtype.unwrap_or(Precision::Bf16), args.device.unwrap_or_default());
    let mut backbone = Backbone::load_on(model, dtype, device, options, ranks)?;
    let mut rows = Vec::with_capacity(prompts.len());
    for (path, trained) in prompts {
        match trained {
            Trained::Prompt(prompt) => {
                prompt.check_fits(backbone.config(), &path)?;
                rows.push(prompt);
            }
            Trained::Weights(weights) => {
                let place = || format!("{} does not fit {model}", path.display());
                backbone.engine = backbone.engine_with(&weights).with_context(place)?;
            }
        }
    }
    Ok(Ready {
        backbone,
        prompts: rows,
        format: task_format(&settings)?,
        max_input_length: settings.max_input_length.unwrap_or(512),
        max_target_length: settings.max_target_length.unwrap_or(16),
        metrics: settings.metrics.unwrap_or_else(|| vec![Metric::Accuracy]),
        predict: settings.predict.unwrap_or(Predict::Decode),
        target_sentinel: settings.target_sentinel.unwrap_or(false),
        trained: settings.task.as_deref().map(Task::named).transpose()?,
        run,
    })
}

/// The prompts, or the weights that a run has trained in their place, that lie at `paths`, each with its path.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<(PathBuf, Trained)>> {
    paths.iter().map(|path| Ok((path.clone(), Trained::read(path)?))).collect()
}

/// How the settings say that records become texts.
///
/// # Errors
/// If a template or the labels cannot be read.
pub(crate) fn task_format(settings: &PartialSpec) -> Result<TaskFormat> {
    let mut format = TaskFormat::default();
    if let Some(inputs) = &settings.inputs {
        format.inputs = Template::parse(inputs)?;
    }
    if let Some(targets) = &settings.targets {
        format.targets = Template::parse(targets)?;
    }
    format.labels = settings.labels.as_deref().map(str::parse).transpose()?;
    Ok(format)
}

impl Ready {
    /// The ranks that work together.
    pub(crate) fn ranks(&self) -> &Ranks {
        self.backbone.engine.ranks()
    }
}

/// The `run.toml` of the run that a prompt's path belongs to: in the directory itself, or up to two above a file or checkpoint in it.
///
/// # Errors
/// If there is one and it cannot be read.
pub(crate) fn run_settings(prompt: &Path) -> Result<Option<PartialSpec>> {
    let Ok(path) = prompt.canonicalize() else { return Ok(None) };
    let found = path.ancestors().take(3).map(|dir| dir.join(RUN_FILE)).find(|file| file.is_file());
    Ok(found.map(|file| PartialSpec::read(&file)).transpose()?)
}
