//! Checkpoints and the prompts that were made from them, as they are stored.

use incipit_proto::names::{JobName, PromptName};
use serde::{Deserialize, Serialize};

use super::time::Time;

/// The file of a checkpoint that a prompt's version is.
pub const PROMPT_FILE: &str = "prompt.safetensors";

/// A checkpoint of a job. There is a row of it only once all its blobs are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its job.
    pub job: JobName,
    /// Steps made.
    pub step: u64,
    /// Its files.
    pub files: Vec<CheckpointFile>,
    /// Fingerprint of the backbone.
    pub backbone_fingerprint: String,
    /// Score of the evaluation at this step, if there was one.
    pub score: Option<f64>,
    /// Whether it is its job's best.
    pub best: bool,
    /// Whether it is kept whatever the retention says.
    pub pinned: bool,
    /// Whether files of it were found damaged or gone.
    #[serde(default)]
    pub damaged: bool,
    /// The attempt that made it.
    pub attempt: u32,
    /// The backbone's epoch then.
    pub epoch: u64,
    /// When it was committed.
    pub create_time: Time,
    /// The revision that made it.
    pub created_revision: u64,
    /// The revision that changed it last.
    pub revision: u64,
    /// The tasks of a job of several.
    #[serde(default)]
    pub tasks: Vec<TaskScore>,
}

/// One of several tasks that a checkpoint is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// The task's name: that of the directory of its files.
    pub name: String,
    /// Score of its evaluation at this step, if there was one.
    pub score: Option<f64>,
    /// Whether it is the task's best.
    pub best: bool,
}

/// A file of a checkpoint: a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFile {
    /// Its name in the directory; of a job of several tasks `{task}/{file}`.
    pub name: String,
    /// BLAKE3 of its bytes, 64 hexadecimal digits.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
}

impl Checkpoint {
    /// `jobs/{job}/checkpoints/{step}`.
    #[must_use]
    pub fn name(&self) -> String {
        checkpoint_name(&self.job, self.step)
    }

    /// Whether it is the best of a task of several.
    #[must_use]
    pub fn is_best_of(&self, task: &str) -> bool {
        self.tasks.iter().any(|of| of.best && of.name == task)
    }
}

/// `jobs/{job}/checkpoints/{step}`.
#[must_use]
pub fn checkpoint_name(job: &JobName, step: u64) -> String {
    format!("{job}/checkpoints/{step:08}")
}

/// A checkpoint under a name that lasts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptVersion {
    /// The prompt.
    pub prompt: PromptName,
    /// The version, from 1.
    pub version: u64,
    /// The job it was trained by.
    pub job: JobName,
    /// The checkpoint's step.
    pub step: u64,
    /// The task whose prompt it is, of a job of several.
    #[serde(default)]
    pub task: Option<String>,
    /// The version before it, if there was one.
    pub previous: Option<u64>,
    /// The blob of its `prompt.safetensors`.
    pub digest: String,
    /// Fingerprint of the backbone.
    pub backbone_fingerprint: String,
    /// The checkpoint's score.
    pub score: Option<f64>,
    /// What whoever promoted it had to say.
    pub description: String,
    /// When it was promoted.
    pub create_time: Time,
    /// The revision that made it.
    pub created_revision: u64,
    /// The revision that changed it last.
    pub revision: u64,
}

impl PromptVersion {
    /// `prompts/{prompt}/versions/{version}`.
    #[must_use]
    pub fn name(&self) -> String {
        version_name(&self.prompt, self.version)
    }
}

/// `prompts/{prompt}/versions/{version}`.
#[must_use]
pub fn version_name(prompt: &PromptName, version: u64) -> String {
    format!("{prompt}/versions/{version}")
}
