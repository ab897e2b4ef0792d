//! What `eval` and `generate` begin with: a backbone, perhaps a prompt, and the settings of the run that made it.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use incipit_collective::Ranks;
use incipit_data::metrics::Metric;
use incipit_data::{TaskFormat, Template};
use incipit_tune::backbone::Backbone;
use incipit_tune::engine::{EngineOptions, Recompute};
use incipit_tune::prompt::Prompt;
use incipit_tune::spec::{PartialSpec, Precision, RUN_FILE};

use crate::args::{BackboneArgs, FormatArgs};
use crate::exit::BadInput;
use crate::progress::note;

/// A backbone with a prompt, and how its examples are written.
pub(crate) struct Ready {
    pub(crate) backbone: Backbone,
    pub(crate) prompt: Option<Prompt>,
    pub(crate) format: TaskFormat,
    pub(crate) max_input_length: usize,
    pub(crate) max_target_length: usize,
    pub(crate) metrics: Vec<Metric>,
    /// Whether the prompt's run told what the flags did not.
    pub(crate) from_run: bool,
}

/// Loads what the flags name. What they leave open is taken from the run that made the prompt, where its `run.toml` lies beside it: a
/// prompt works with the template that it was trained with. Of the backbone, `ranks` have a part or a copy each.
///
/// # Errors
/// If a file is missing or broken, the prompt is another model's, or no model is named.
pub(crate) fn load(args: &BackboneArgs, format: &FormatArgs, ranks: &Arc<Ranks>) -> Result<Ready> {
    let run = match &args.prompt {
        Some(path) => run_settings(path)?,
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
    let from_run = run.is_some();
    let settings = given.over(run.unwrap_or_default()).over(PartialSpec::defaults());
    let model = settings
        .model
        .as_deref()
        .ok_or_else(|| BadInput("--model is missing: give the backbone".to_owned()))?;
    let prompt =
        args.prompt.as_deref().map(|path| Prompt::read(path).map(|prompt| (path, prompt))).transpose()?;
    if ranks.leads() {
        note(&format!("loading {model}"));
    }
    let options = EngineOptions { microbatch_tokens: args.microbatch_tokens, recompute: Recompute::Auto };
    let (dtype, device) = (settings.dtype.unwrap_or(Precision::Bf16), args.device.unwrap_or_default());
    let backbone = Backbone::load_on(model, dtype, device, options, ranks)?;
    if let Some((path, prompt)) = &prompt {
        prompt.check_width(backbone.config().d_model, path)?;
    }
    Ok(Ready {
        backbone,
        prompt: prompt.map(|(_, prompt)| prompt),
        format: task_format(&settings)?,
        max_input_length: settings.max_input_length.unwrap_or(512),
        max_target_length: settings.max_target_length.unwrap_or(16),
        metrics: settings.metrics.unwrap_or_else(|| vec![Metric::Accuracy]),
        from_run,
    })
}

fn task_format(settings: &PartialSpec) -> Result<TaskFormat> {
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
