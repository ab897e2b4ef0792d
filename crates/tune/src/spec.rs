//! What a training run is told: the flags, the configuration file, the recipe and the defaults, one over the other.

mod method;
mod partial;
pub(crate) mod validate;

use std::path::{Path, PathBuf};

use candle_core::DType;
use incipit_data::{
    LabelMapError, TaskFormat, Template,
    metrics::Metric,
    pretrain::{self, PretrainOptions},
    tasks::{self, Split},
};
use serde::Serialize;

use crate::{
    Error, Result,
    choice::choices,
    device::DeviceChoice,
    engine::{EngineOptions, Objective, Recompute},
    init::PromptInit,
    optimizer::{Adafactor, OptimizerKind},
    placement::{PromptLayers, PromptPlacement},
    rank::Predict,
    recipe::{LossReduction, OptimizerName, Recipe},
    schedule::Schedule,
};

pub use method::{Method, PrefixPart};
pub use partial::PartialSpec;

choices! {
    /// The type of the backbone's weights.
    Precision, "dtype" {
        /// 16 bits with the range of f32.
        Bf16 => "bf16",
        /// 32 bits.
        F32 => "f32",
    }
}

choices! {
    /// What carries numbers between ranks.
    Backend, "collective" {
        /// Ranks are threads of one process.
        Local => "local",
        /// Ranks are processes, on one machine or many.
        Gloo => "gloo",
        /// Ranks are processes with a GPU each.
        Nccl => "nccl",
    }
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Bf16 => Self::BF16,
            Precision::F32 => Self::F32,
        }
    }
}

/// A whole specification, every field decided and checked. Written as TOML it is a configuration file again.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrainSpec {
    /// Backbone: a directory, or a name on the Hugging Face hub.
    pub model: String,
    /// Named task that is trained, in place of files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<&'static tasks::Task>,
    /// Directory of the named task's files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// File of training examples; of a named task `data_dir`, or where that is not given its split's file.
    pub train: PathBuf,
    /// File of evaluation examples; of a named task likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<PathBuf>,
    /// Directory of the run.
    pub out: PathBuf,
    /// Template of the input text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inputs: Option<String>,
    /// Template of the target text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<String>,
    /// Texts of the labels, `0=False,1=True`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// `P`: rows of the prompt.
    pub prompt_length: usize,
    /// Where the prompt starts.
    pub prompt_init: PromptInit,
    /// Rows at its beginning that it shares with the prompts of other tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_length: Option<usize>,
    /// Where the prompt's rows stand. Not written where it is the default, so that runs of versions without it go on.
    #[serde(skip_serializing_if = "PromptPlacement::is_default")]
    pub prompt_placement: PromptPlacement,
    /// At which layers of the encoder the prompt has rows. Written as the place is.
    #[serde(skip_serializing_if = "PromptLayers::is_default")]
    pub prompt_layers: PromptLayers,
    /// What is trained.
    pub method: Method,
    /// Of a run on a corpus of plain text: what of it is learnt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objective: Option<pretrain::Objective>,
    /// Of span corruption: the share of the text that is taken out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_density: Option<f64>,
    /// Of span corruption: how many tokens are taken out together, on average.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_span_length: Option<f64>,
    /// Of a run on a corpus: the examples of the evaluation text that are looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_examples: Option<usize>,
    /// Of a prefix: which attentions have one. None, and `all`, are all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_part: Option<PrefixPart>,
    /// Of a prefix: inner columns of the MLP that makes it while it is trained; none trains keys and values themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_projection: Option<usize>,
    /// Inner columns of an adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_width: Option<usize>,
    /// Examples that are shown before the input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shots: Option<usize>,
    /// Template of such an example.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shot_template: Option<String>,
    /// What follows each of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shot_separator: Option<String>,
    /// What stands before the first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// Most tokens of the instruction and the examples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_prompt_tokens: Option<usize>,
    /// Tokens that a search tries at each step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidates: Option<usize>,
    /// Which set of defaults was taken.
    pub recipe: Recipe,
    /// What turns gradients into updates.
    pub optimizer: OptimizerName,
    /// Learning rate, at its highest.
    pub lr: f64,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// Weight decay of Adafactor and AdamW.
    pub weight_decay: f64,
    /// Whether Adafactor's learning rate is relative to the size of what is trained.
    pub parameter_scaling: bool,
    /// Examples an update.
    pub batch_size: usize,
    /// Updates.
    pub steps: u64,
    /// Longest input, in tokens, `</s>` included.
    pub max_input_length: usize,
    /// Longest target, in tokens, `</s>` included.
    pub max_target_length: usize,
    /// Whether `<extra_id_0>` stands before each target, as a model that knows only span corruption expects it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub target_sentinel: bool,
    /// Dropout inside the frozen backbone.
    pub dropout: f64,
    /// Weight of the squared logarithm of the softmax's denominator in the loss.
    pub z_loss: f64,
    /// How token losses become one number.
    pub loss: LossReduction,
    /// Whether each epoch has a random order of its own, or the file's.
    pub shuffle: bool,
    /// Seed of the prompt's start, the data's order and dropout.
    pub seed: u64,
    /// Steps from one evaluation to the next.
    pub eval_every: u64,
    /// Steps from one checkpoint to the next.
    pub checkpoint_every: u64,
    /// Newest checkpoints to keep (the best is kept besides).
    pub keep: usize,
    /// Evaluations without a better one after which the run ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u32>,
    /// What is measured; the mean of it chooses the best checkpoint, unless the named task says which metric does.
    pub metrics: Vec<Metric>,
    /// How predictions are made. Not written where it is the default, so that runs of versions without it go on.
    #[serde(skip_serializing_if = "Predict::is_default")]
    pub predict: Predict,
    /// Where the backbone computes.
    pub device: DeviceChoice,
    /// Type of the backbone's weights.
    pub dtype: Precision,
    /// Ranks that share a backbone.
    pub tp: usize,
    /// Replicas of the backbone.
    pub dp: usize,
    /// What carries numbers between ranks. Not part of the file: how ranks are started is told anew each time.
    #[serde(skip)]
    pub collective: Backend,
    /// Tokens that go through the backbone at once; chosen from the model and the free memory where none are given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub microbatch_tokens: Option<usize>,
    /// Whether activations are computed again in the backward pass instead of kept.
    pub recompute: Recompute,
    /// Whether records that do not fit are left out (and counted).
    pub skip_bad_records: bool,
    /// Whether a checkpoint of another backbone may be resumed.
    pub allow_other_backbone: bool,
    /// Threads of the CPU; as many as it has cores where none are given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Whether the run in `out` goes on. Not part of the file.
    #[serde(skip)]
    pub resume: bool,
}

/// The file in a run's directory that holds its specification.
pub const RUN_FILE: &str = "run.toml";

/// The model in a run's directory that a run on a corpus begins with, if it begins with random weights.
pub const INITIAL_DIR: &str = "initial";

/// Fields that may differ when a run goes on: they change no number of it (another `tp` or `device` rounds differently,
/// and checkpoints are its all the same), or name things whose content is compared.
const FREE_ON_RESUME: &[&str] = &[
    "model",
    "train",
    "eval",
    "data-dir",
    "out",
    "checkpoint-every",
    "keep",
    "patience",
    "device",
    "tp",
    "dp",
    "collective",
    "microbatch-tokens",
    "recompute",
    "threads",
    "skip-bad-records",
    "allow-other-backbone",
];

impl TrainSpec {
    /// Puts the layers together: the flags over `config` over, with `resume`, the `run.toml` of the directory, over the
    /// recipe, over the defaults; then checks the whole.
    ///
    /// # Errors
    /// If a file cannot be read, or a field is missing, impossible, or asks for what is not built (the message names the flag), or a
    /// file of the named task is not there.
    pub fn resolve(flags: PartialSpec, config: Option<&Path>, resume: bool) -> Result<Self> {
        let mut given = flags;
        if let Some(path) = config {
            given = given.over(PartialSpec::read(path)?);
        }
        if let Some(out) = given.out.clone().filter(|_| resume) {
            let run = out.join(RUN_FILE);
            if run.exists() {
                given = given.over(PartialSpec::read(&run)?);
            } else if given.train.is_none() && given.data_dir.is_none() {
                let what = format!("finds no run in {}; name the directory of one with --out", out.display());
                return Err(Error::spec("resume", &what));
            }
        }
        let spec = given.whole(resume)?;
        if let (Some(task), Some(dir)) = (spec.task, &spec.data_dir) {
            // Before the backbone, which may take minutes.
            task.file(dir, Split::Train)?;
            spec.eval.as_deref().map(|dir| task.file(dir, Split::Dev)).transpose()?;
        }
        Ok(spec)
    }

    /// Reads a file that holds a whole specification, such as a run's `run.toml`.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn read(path: &Path) -> Result<Self> {
        PartialSpec::read(path)?.whole(false)
    }

    /// The specification as a configuration file.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let written = "strings, numbers and lists of strings are TOML";
        let fields = match self.data_dir {
            None => toml::to_string(self).expect(written),
            Some(_) => {
                // A file may not name both a directory and files.
                let mut table = toml::Table::try_from(self).expect(written);
                table.retain(|key, _| !["train", "eval"].contains(&key));
                table.to_string()
            }
        };
        format!("# Written by incipit train; `incipit train --config` reads it.\n{fields}")
    }

    /// Checks that a run which began with `earlier` can go on with this.
    ///
    /// # Errors
    /// [`Error::OtherSpec`]: the first field that differs and that the run's numbers depend on, with both values.
    pub fn continues(&self, earlier: &Self) -> Result<()> {
        let (ours, theirs) = (self.identity(), earlier.identity());
        let differs = |key: &&String| ours.get(*key) != theirs.get(*key);
        let Some(key) = ours.keys().chain(theirs.keys()).find(differs) else { return Ok(()) };
        let show = |table: &toml::Table| table.get(key).map_or("nothing".to_owned(), ToString::to_string);
        Err(Error::OtherSpec { flag: key.clone(), was: show(&theirs), now: show(&ours) })
    }

    /// Hash of the fields that the run's numbers depend on.
    #[must_use]
    pub fn identity_hash(&self) -> String {
        blake3::hash(self.identity().to_string().as_bytes()).to_hex().to_string()
    }

    fn identity(&self) -> toml::Table {
        let mut table = toml::Table::try_from(self).expect("strings, numbers and lists of strings are TOML");
        table.retain(|key, _| !FREE_ON_RESUME.contains(&key));
        if !self.parameter_scaling {
            // As runs of versions are known that had no such field.
            table.remove("parameter-scaling");
        }
        if self.prefix_part == Some(PrefixPart::All) {
            table.remove("prefix-part");
        }
        if self.schedule == Schedule::Constant {
            // A schedule that ends with the run has another learning rate at each step if the end moves; this one has not.
            table.remove("steps");
        }
        table
    }

    /// How records become texts.
    ///
    /// # Errors
    /// If a template or the labels cannot be read; the message names the flag.
    pub fn task_format(&self) -> Result<TaskFormat> {
        task_format(self.inputs.as_deref(), self.targets.as_deref(), self.labels.as_deref())
    }

    /// The optimizer with its hyperparameters.
    #[must_use]
    pub fn optimizer_kind(&self) -> OptimizerKind {
        match self.optimizer {
            OptimizerName::Adafactor => OptimizerKind::Adafactor(Adafactor {
                parameter_scaling: self.parameter_scaling,
                ..Adafactor::new(self.weight_decay, self.recipe.step_offset())
            }),
            OptimizerName::AdamW => OptimizerKind::adamw(self.weight_decay),
            OptimizerName::Sgd => OptimizerKind::sgd(0.0, self.weight_decay),
        }
    }

    /// What is made smaller.
    #[must_use]
    pub fn engine_objective(&self) -> Objective {
        Objective { reduction: self.loss, dropout: self.dropout as f32, z_loss: self.z_loss as f32 }
    }

    /// How a corpus becomes examples, if the run is on one.
    #[must_use]
    pub fn pretraining(&self) -> Option<PretrainOptions> {
        let defaults = PretrainOptions::default();
        Some(PretrainOptions {
            objective: self.objective?,
            input_length: self.max_input_length,
            target_length: self.max_target_length,
            noise_density: self.noise_density.unwrap_or(defaults.noise_density),
            mean_span_length: self.mean_span_length.unwrap_or(defaults.mean_span_length),
            seed: self.seed,
            shuffle: self.shuffle,
            epochs: None,
        })
    }

    /// How the backbone is run.
    #[must_use]
    pub fn engine_options(&self) -> EngineOptions {
        EngineOptions { microbatch_tokens: self.microbatch_tokens, recompute: self.recompute }
    }
}

/// How records become texts, from the values of `--inputs`, `--targets` and `--labels`.
///
/// # Errors
/// If a template or the labels cannot be read; the message names the flag.
pub fn task_format(inputs: Option<&str>, targets: Option<&str>, labels: Option<&str>) -> Result<TaskFormat> {
    let mut format = TaskFormat::default();
    if let Some(inputs) = inputs {
        format.inputs = Template::parse(inputs).map_err(|error| Error::spec("inputs", &error))?;
    }
    if let Some(targets) = targets {
        format.targets = Template::parse(targets).map_err(|error| Error::spec("targets", &error))?;
    }
    format.labels =
        labels.map(str::parse).transpose().map_err(|error: LabelMapError| Error::spec("labels", &error))?;
    Ok(format)
}

#[cfg(test)]
mod tests;
