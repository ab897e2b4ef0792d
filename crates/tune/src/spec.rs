//! What a training run is told: the flags, the configuration file, the recipe and the defaults, one over the other.

mod validate;

use std::path::{Path, PathBuf};

use candle_core::DType;
use incipit_data::{
    LabelMapError, TaskFormat, Template,
    metrics::Metric,
    tasks::{self, Split},
};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    choice::{choices, nearest},
    device::DeviceChoice,
    engine::{EngineOptions, Objective, Recompute},
    init::PromptInit,
    optimizer::OptimizerKind,
    recipe::{LossReduction, OptimizerName, Recipe},
    schedule::Schedule,
};

choices! {
    /// What is trained.
    Method, "method" {
        /// Rows before the embedded encoder input.
        Prompt => "prompt",
    }
}

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
    method: Method,
    recipe: Recipe,
    optimizer: OptimizerName,
    lr: f64,
    schedule: Schedule,
    warmup_steps: u64,
    weight_decay: f64,
    batch_size: usize,
    steps: u64,
    max_input_length: usize,
    max_target_length: usize,
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
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let place = || path.to_owned();
        let table: toml::Table =
            text.parse().map_err(|source| Error::ConfigFile { path: place(), source: Box::new(source) })?;
        let known = Self::keys();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        if let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) {
            let near = nearest(key, &known).map(str::to_owned);
            return Err(Error::ConfigKey { path: place(), key: key.clone(), near });
        }
        toml::from_str(&text).map_err(|source| Error::ConfigFile { path: place(), source: Box::new(source) })
    }

    /// What holds where neither the recipe, nor a file, nor a flag says otherwise.
    #[must_use]
    pub fn defaults() -> Self {
        Self {
            prompt_length: Some(100),
            prompt_init: Some("class-label".to_owned()),
            method: Some(Method::Prompt),
            optimizer: Some(OptimizerName::Adafactor),
            lr: Some(0.3),
            schedule: Some(Schedule::Constant),
            warmup_steps: Some(0),
            weight_decay: Some(1e-5),
            batch_size: Some(32),
            steps: Some(30_000),
            max_input_length: Some(512),
            max_target_length: Some(16),
            shuffle: Some(true),
            seed: Some(0),
            eval_every: Some(500),
            checkpoint_every: Some(500),
            keep: Some(3),
            metrics: Some(vec![Metric::Accuracy]),
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
    /// This layer over the recipe over the named task over the defaults, checked.
    fn whole(self, resume: bool) -> Result<TrainSpec> {
        let recipe = self.recipe.unwrap_or(Recipe::Paper);
        let task = self.task.as_deref().map(tasks::Task::named).transpose()?;
        let task = task.map(Self::of_task).unwrap_or_default();
        validate::whole(self.over(recipe.defaults()).over(task).over(Self::defaults()), resume)
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
    /// File of training examples; of a named task, `data_dir`.
    pub train: PathBuf,
    /// File of evaluation examples; of a named task, `data_dir`.
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
    /// What is trained.
    pub method: Method,
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
    /// Examples an update.
    pub batch_size: usize,
    /// Updates.
    pub steps: u64,
    /// Longest input, in tokens, `</s>` included.
    pub max_input_length: usize,
    /// Longest target, in tokens, `</s>` included.
    pub max_target_length: usize,
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
        if let Some(run) =
            given.out.as_ref().map(|out| out.join(RUN_FILE)).filter(|run| resume && run.exists())
        {
            given = given.over(PartialSpec::read(&run)?);
        }
        let spec = given.whole(resume)?;
        if let Some(task) = spec.task {
            // Before the backbone, which may take minutes.
            task.file(&spec.train, Split::Train)?;
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
        let fields = match self.task {
            None => toml::to_string(self).expect(written),
            Some(_) => {
                // A file may not name both a task and files.
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
            OptimizerName::Adafactor => {
                OptimizerKind::adafactor(self.weight_decay, self.recipe.step_offset())
            }
            OptimizerName::AdamW => OptimizerKind::adamw(self.weight_decay),
            OptimizerName::Sgd => OptimizerKind::sgd(0.0, self.weight_decay),
        }
    }

    /// What is made smaller.
    #[must_use]
    pub fn objective(&self) -> Objective {
        Objective { reduction: self.loss, dropout: self.dropout as f32, z_loss: self.z_loss as f32 }
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
