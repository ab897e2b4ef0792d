//! What `eval`, `generate` and `ensemble eval` begin with: a backbone, perhaps prompts, and the settings of the run that made them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use incipit_collective::Ranks;
use incipit_data::TaskFormat;
use incipit_data::metrics::Metric;
use incipit_data::tasks::Task;
use incipit_tune::backbone::{Backbone, Opened};
use incipit_tune::checkpoint;
use incipit_tune::engine::{EngineOptions, Recompute};
use incipit_tune::prompt::Prompt;
use incipit_tune::rank::Predict;
use incipit_tune::spec::{self, PartialSpec, Precision, RUN_FILE};
use incipit_tune::trained::Trained;

use crate::args::{FormatArgs, Global, ModelArgs};
use crate::exit::{BadInput, bad_input};
use crate::loading;
use crate::progress::note;

/// A model whose weights are not loaded yet, with prompts or what else a run has trained, and how their examples are written.
pub(crate) struct Chosen {
    pub(crate) model: Opened,
    pub(crate) ranks: Arc<Ranks>,
    pub(crate) settings: Settings,
    engine: EngineOptions,
    /// Each with its path.
    trained: Vec<(PathBuf, Trained)>,
    /// The fingerprints of the backbones on which they were trained, as far as that is to be checked and known; each with its path.
    origins: Vec<(PathBuf, String)>,
}

/// How examples are written, and what is to be made of them.
pub(crate) struct Settings {
    pub(crate) format: TaskFormat,
    pub(crate) max_input_length: usize,
    pub(crate) max_target_length: usize,
    pub(crate) metrics: Vec<Metric>,
    pub(crate) predict: Predict,
    /// Whether a sentinel stands before each target.
    pub(crate) target_sentinel: bool,
    /// The benchmark that the first prompt was trained on, if its run says so.
    pub(crate) trained: Option<&'static Task>,
    /// The settings of the run that made the first prompt, which told what the flags did not.
    pub(crate) run: Option<PartialSpec>,
}

/// A backbone with prompts, and how their examples are written.
pub(crate) struct Ready {
    pub(crate) backbone: Backbone,
    /// One, several that vote, or none.
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) settings: Settings,
}

/// Opens what the flags name, with what was trained on it, each from its path. What the flags leave open is taken from the run that made
/// the first prompt, where its `run.toml` lies beside it: a prompt works with the template that it was trained with. Of the backbone,
/// `ranks` will have a part or a copy each.
///
/// # Errors
/// If a file is missing or broken, the prompt is another model's, or no model is named.
pub(crate) fn choose(
    args: &ModelArgs,
    trained: Vec<(PathBuf, Trained)>,
    format: &FormatArgs,
    ranks: &Arc<Ranks>,
) -> Result<Chosen> {
    let run = match trained.first() {
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
        target_sentinel: format.target_sentinel.then_some(true),
        ..PartialSpec::default()
    };
    let given = given.over(run.clone().unwrap_or_default()).over(PartialSpec::defaults());
    let missing = || BadInput("--model is missing: give the backbone".to_owned());
    let name = given.model.as_deref().ok_or_else(missing)?;
    let (dtype, device) = (given.dtype.unwrap_or(Precision::Bf16), args.device.unwrap_or_default());
    let model = Opened::open(name, dtype, device, ranks)?;
    for (path, trained) in &trained {
        if let Trained::Prompt(prompt) = trained {
            prompt.check_fits(&model.config, path)?;
        }
    }
    let settings = Settings {
        format: task_format(&given)?,
        max_input_length: given.max_input_length.unwrap_or(512),
        max_target_length: given.max_target_length.unwrap_or(16),
        metrics: given.metrics.unwrap_or_else(|| vec![Metric::Accuracy]),
        predict: given.predict.unwrap_or(Predict::Decode),
        target_sentinel: given.target_sentinel.unwrap_or(false),
        trained: given.task.as_deref().map(Task::named).transpose()?,
        run,
    };
    let engine = EngineOptions { microbatch_tokens: args.microbatch_tokens, recompute: Recompute::Auto };
    let mut origins = Vec::new();
    for (path, _) in trained.iter().filter(|_| !args.allow_other_backbone) {
        origins.extend(checkpoint::backbone_of(path)?.map(|origin| (path.clone(), origin)));
    }
    Ok(Chosen { model, ranks: ranks.clone(), settings, engine, trained, origins })
}

impl Chosen {
    /// Loads the weights, and lays those that a run has trained over them.
    ///
    /// # Errors
    /// If a file is broken, or has not the weights that the model needs; or if a prompt was trained on another one.
    pub(crate) fn load(self, global: &Global) -> Result<Ready> {
        let Self { model, ranks, settings, engine, trained, origins } = self;
        if ranks.leads() {
            note(&format!("loading {}", model.name));
        }
        let shown = ranks.leads().then(|| loading::show(model.loading(), global));
        let mut backbone = model.load(engine, &ranks)?;
        drop(shown);
        let now = backbone.fingerprint.to_string();
        if let Some((path, was)) = origins.iter().find(|(_, was)| *was != now) {
            return bad_input(format!(
                "{} was trained on the backbone {was}, and {} is {now}; pass that one with --model, or --allow-other-backbone if they are \
                 meant to differ",
                path.display(),
                backbone.name
            ));
        }
        let mut prompts = Vec::with_capacity(trained.len());
        for (path, trained) in trained {
            match trained {
                Trained::Prompt(prompt) => prompts.push(prompt),
                Trained::Weights(weights) => {
                    let place = || format!("{} does not fit {}", path.display(), backbone.name);
                    backbone.engine = backbone.engine_with(&weights).with_context(place)?;
                }
            }
        }
        Ok(Ready { backbone, prompts, settings })
    }
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
    Ok(spec::task_format(
        settings.inputs.as_deref(),
        settings.targets.as_deref(),
        settings.labels.as_deref(),
    )?)
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
