//! One layer of a specification: what flags, a file, a method, a recipe or the defaults say.

use std::path::{Path, PathBuf};

use incipit_data::{metrics::Metric, pretrain, tasks};
use serde::{Deserialize, Serialize};

use super::{Backend, Method, Precision, PrefixPart, TrainSpec, validate};
use crate::{
    Error, Result,
    choice::nearest,
    engine::Recompute,
    init::PromptInit,
    placement::{PromptLayers, PromptPlacement},
    rank::Predict,
    recipe::{LossReduction, OptimizerName, Recipe},
    schedule::Schedule,
};

macro_rules! partial_spec {
    ($($field:ident: $type:ty,)+) => {
        /// What one layer (the flags, a file, a recipe, the defaults) says. In a file the names are those of the flags,
        /// without their two dashes.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        pub struct PartialSpec {
            $(
                #[doc = concat!("`", stringify!($field), "` of [`TrainSpec`], where this layer gives it.")]
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $field: Option<$type>,
            )+
        }

        impl PartialSpec {
            /// This layer, and where it says nothing, the one below.
            #[must_use]
            pub fn over(self, below: Self) -> Self {
                Self { $($field: self.$field.or(below.$field),)+ }
            }

            /// The names that a file may give.
            fn keys() -> Vec<String> {
                vec![$(stringify!($field).replace('_', "-")),+]
            }
        }
    };
}

partial_spec! {
    model: String,
    train: PathBuf,
    eval: PathBuf,
    task: String,
    data_dir: PathBuf,
    out: PathBuf,
    inputs: String,
    targets: String,
    labels: String,
    prompt_length: usize,
    prompt_init: String,
    shared_length: usize,
    prompt_placement: PromptPlacement,
    prompt_layers: PromptLayers,
    method: Method,
    objective: pretrain::Objective,
    noise_density: f64,
    mean_span_length: f64,
    eval_examples: usize,
    prefix_part: PrefixPart,
    prefix_projection: usize,
    adapter_width: usize,
    shots: usize,
    shot_template: String,
    shot_separator: String,
    instruction: String,
    max_prompt_tokens: usize,
    candidates: usize,
    recipe: Recipe,
    optimizer: OptimizerName,
    lr: f64,
    schedule: Schedule,
    warmup_steps: u64,
    weight_decay: f64,
    parameter_scaling: bool,
    batch_size: usize,
    steps: u64,
    max_input_length: usize,
    max_target_length: usize,
    target_sentinel: bool,
    dropout: f64,
    z_loss: f64,
    loss: LossReduction,
    shuffle: bool,
    seed: u64,
    eval_every: u64,
    checkpoint_every: u64,
    keep: usize,
    patience: u32,
    metrics: Vec<Metric>,
    predict: Predict,
    device: String,
    dtype: Precision,
    tp: usize,
    dp: usize,
    collective: Backend,
    microbatch_tokens: usize,
    recompute: Recompute,
    skip_bad_records: bool,
    allow_other_backbone: bool,
    threads: usize,
}

impl PartialSpec {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// If it cannot be read, is no TOML, or has a key or a value that means nothing; the message gives the place.
    pub fn read(path: &Path) -> Result<Self> {
        let (text, table) = table(path)?;
        Self::check_keys(path, &table)?;
        let place = || path.to_owned();
        toml::from_str(&text).map_err(|source| Error::ConfigFile { path: place(), source: Box::new(source) })
    }

    /// Reads a TOML file in which every table is a layer, by its name, in the order of the names.
    ///
    /// # Errors
    /// As [`Self::read`]; also if something stands outside of the tables.
    pub fn read_several(path: &Path) -> Result<Vec<(String, Self)>> {
        let layer = |(name, value): (String, toml::Value)| {
            let toml::Value::Table(table) = value else {
                return Err(Error::ConfigKey { path: path.to_owned(), key: name, near: None });
            };
            Self::check_keys(path, &table)?;
            let place = || path.to_owned();
            let layer = table.try_into();
            Ok((name, layer.map_err(|source| Error::ConfigFile { path: place(), source: Box::new(source) })?))
        };
        table(path)?.1.into_iter().map(layer).collect()
    }

    fn check_keys(path: &Path, table: &toml::Table) -> Result<()> {
        let known = Self::keys();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
        let near = nearest(key, &known).map(str::to_owned);
        Err(Error::ConfigKey { path: path.to_owned(), key: key.clone(), near })
    }

    /// What holds where neither the recipe, nor a file, nor a flag says otherwise.
    #[must_use]
    pub fn defaults() -> Self {
        Self {
            prompt_length: Some(100),
            prompt_init: Some("class-label".to_owned()),
            prompt_placement: Some(PromptPlacement::Before),
            prompt_layers: Some(PromptLayers::First),
            method: Some(Method::Prompt),
            optimizer: Some(OptimizerName::Adafactor),
            lr: Some(0.3),
            schedule: Some(Schedule::Constant),
            warmup_steps: Some(0),
            weight_decay: Some(1e-5),
            parameter_scaling: Some(false),
            batch_size: Some(32),
            steps: Some(30_000),
            max_input_length: Some(512),
            max_target_length: Some(16),
            target_sentinel: Some(false),
            shuffle: Some(true),
            seed: Some(0),
            eval_every: Some(500),
            checkpoint_every: Some(500),
            keep: Some(3),
            metrics: Some(vec![Metric::Accuracy]),
            predict: Some(Predict::Decode),
            device: Some("cpu".to_owned()),
            dtype: Some(Precision::Bf16),
            tp: Some(1),
            dp: Some(1),
            collective: Some(Backend::Local),
            recompute: Some(Recompute::Auto),
            skip_bad_records: Some(false),
            allow_other_backbone: Some(false),
            ..Self::default()
        }
    }
}

impl PartialSpec {
    /// This layer over the method over the recipe over the named task over the defaults, checked.
    pub(super) fn whole(self, resume: bool) -> Result<TrainSpec> {
        validate::whole(self.with_presets()?.over(Self::defaults()), resume)
    }

    /// This layer over what its method, its recipe and its named task say: all but the defaults.
    ///
    /// # Errors
    /// If no task has the name.
    pub fn with_presets(self) -> Result<Self> {
        let recipe = self.recipe.unwrap_or(Recipe::Paper);
        let task = self.task.as_deref().map(tasks::Task::named).transpose()?;
        let task = task.map(Self::of_task).unwrap_or_default();
        let mut method = self.method.unwrap_or(Method::Prompt).defaults();
        if self.objective.is_some() {
            method.metrics = Some(Vec::new());
        }
        Ok(self.over(method).over(recipe.defaults()).over(task))
    }

    /// What a named task says: its metrics, and where it has no words for a prompt to start from, another start.
    fn of_task(task: &tasks::Task) -> Self {
        Self {
            metrics: Some(task.metrics.to_vec()),
            prompt_init: task.init_words.is_empty().then(|| PromptInit::Vocab.to_string()),
            ..Self::default()
        }
    }
}

/// A TOML file, as text and as a table.
fn table(path: &Path) -> Result<(String, toml::Table)> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let table = text
        .parse()
        .map_err(|source| Error::ConfigFile { path: path.to_owned(), source: Box::new(source) })?;
    Ok((text, table))
}
