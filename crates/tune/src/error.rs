//! What this crate refuses, and how to mend it.

use std::{io, path::PathBuf};

use crate::engine::Refusal;

/// Why a step of tuning, or a file that it reads or writes, failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused to read or write something.
    #[error("cannot {action} {}: {source}{}", path.display(), mend(source))]
    Io {
        /// What was tried: a verb, such as "write".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that holds a prompt cannot be used.
    #[error("{}: {what}", path.display())]
    PromptFile {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it, and how to mend it.
        what: String,
    },
    /// A prompt that cannot be.
    #[error("{what}")]
    Prompt {
        /// What is wrong with it.
        what: String,
    },
    /// A prompt does not fit the model.
    #[error(
        "{}: its rows have {found} columns and the model's have {expected}; it was trained for another model, \
         give that one with --model",
        path.display()
    )]
    PromptWidth {
        /// Where the prompt came from.
        path: PathBuf,
        /// `d_model` of the model.
        expected: usize,
        /// Columns of the prompt.
        found: usize,
    },
    /// A prompt cannot be initialised as asked.
    #[error("prompt initialisation {init}: {what}")]
    Init {
        /// The initialisation, as it was given.
        init: String,
        /// What is missing, and how to mend it.
        what: String,
    },
    /// The embedding of a piece could not be read.
    #[error("prompt initialisation: the embedding of piece {id} cannot be read")]
    Embedding {
        /// The piece's number in the vocabulary.
        id: u32,
        /// What the model said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A word that names no choice.
    #[error("unknown {what} {given:?}; choose one of {choices}")]
    Choice {
        /// What is chosen, such as "schedule".
        what: &'static str,
        /// What was given.
        given: String,
        /// What can be given.
        choices: &'static str,
    },
    /// A checkpoint is damaged, or was written by something else.
    #[error("checkpoint {}: {what}", path.display())]
    Checkpoint {
        /// Its directory.
        path: PathBuf,
        /// Which file of it, and what differs.
        what: String,
    },
    /// Another process writes to the same training directory.
    #[error("another process is training in {}; wait for it, or pass another --out", path.display())]
    OutInUse {
        /// The training directory.
        path: PathBuf,
    },
    /// The optimizer state that was read does not belong to the optimizer.
    #[error("optimizer state: {what}")]
    OptimizerState {
        /// Which tensor, what was expected and what was found.
        what: String,
    },
    /// An operation on the backbone's device failed.
    #[error(transparent)]
    Kernels(#[from] incipit_kernels::Error),
    /// A line of `metrics.jsonl` is none of ours.
    #[error("{}, line {line}: {source}; was the file changed?", path.display())]
    MetricsLine {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What was expected there.
        source: serde_json::Error,
    },
    /// A flag, or a key of a configuration file, has a value that cannot be.
    #[error("--{flag} {what}")]
    Spec {
        /// The flag, without its dashes.
        flag: &'static str,
        /// What is wrong with the value, and how to mend it.
        what: String,
    },
    /// A configuration file is no TOML, or a value in it is of the wrong kind.
    #[error("configuration {}: {source}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Line, column and what was expected there.
        source: Box<toml::de::Error>,
    },
    /// A configuration file has a key that means nothing.
    #[error(
        "configuration {}: there is no key `{key}`{}",
        path.display(),
        near.as_ref().map_or("; `incipit train --help` lists them, without the dashes".to_owned(), |near| format!("; is `{near}` meant?"))
    )]
    ConfigKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The key that is probably meant.
        near: Option<String>,
    },
    /// A run's directory holds something already.
    #[error("{} is not empty; pass --resume to go on with the run in it, or another --out", path.display())]
    OutNotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// A directory holds something, and no run.
    #[error("{} holds no run that could go on (there is no run.toml); pass another --out", path.display())]
    NoRun {
        /// The directory.
        path: PathBuf,
    },
    /// What is said to hold an ensemble does not.
    #[error("{}: {what}", path.display())]
    Ensemble {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it, and how to mend it.
        what: String,
    },
    /// A run cannot go on with another specification.
    #[error(
        "the run began with --{flag} {was} and would go on with {now}; pass what it began with, or another --out"
    )]
    OtherSpec {
        /// The flag, without its dashes.
        flag: String,
        /// Its value when the run began.
        was: String,
        /// Its value now.
        now: String,
    },
    /// A run cannot go on with other data.
    #[error("{} has changed since the run began; restore it, or start anew with another --out", path.display())]
    OtherData {
        /// The file.
        path: PathBuf,
    },
    /// A run cannot go on with another backbone.
    #[error(
        "the run began on the backbone {was} and {model} is {now}; pass that one with --model, \
         or --allow-other-backbone if they are meant to differ"
    )]
    OtherBackbone {
        /// The model given.
        model: String,
        /// Fingerprint of the one with which the run began.
        was: String,
        /// Fingerprint of the one given.
        now: String,
    },
    /// A run cannot start from a prompt of another backbone.
    #[error(
        "the prompt {} was trained on the backbone {was} and {model} is {now}; pass that one with --model, \
         or --allow-other-backbone if they are meant to differ", path.display()
    )]
    OtherOrigin {
        /// Where the prompt lies.
        path: PathBuf,
        /// The model given.
        model: String,
        /// Fingerprint of the one on which the prompt was trained.
        was: String,
        /// Fingerprint of the one given.
        now: String,
    },
    /// The configuration of a backbone is none that can be trained on.
    #[error("{}: {source}", dir.display())]
    ModelConfig {
        /// The directory of the backbone.
        dir: PathBuf,
        /// What is wrong with the `config.json` in it.
        source: Box<incipit_model::Error>,
    },
    /// A number went out of range in the pass over an example; the prompt was not updated.
    #[error(
        "step {step} was stopped before the update: {what} for the example with index {index}, on line {line} of the \
         training file (on rank {rank}); look at that record, or {}",
        if *step == 1 { "at the model's weights, for nothing was learned yet" } else { "pass a smaller --lr" }
    )]
    NonFinite {
        /// The step, from 1.
        step: u64,
        /// The rank that met it; of a replica the first.
        rank: usize,
        /// Which number, and what it is.
        what: String,
        /// Which record of its file, from 0.
        index: usize,
        /// Its line, from 1.
        line: usize,
    },
    /// A number went out of range in the pass over an example of an evaluation.
    #[error(
        "{what} for the example with index {index}, on line {line} of its file; look at that record and at the prompt"
    )]
    NonFiniteEvaluation {
        /// Which number, and what it is.
        what: String,
        /// Which record of its file, from 0.
        index: usize,
        /// Its line, from 1.
        line: usize,
    },
    /// A step could not be made; the prompt was not updated.
    #[error("step {step} was stopped before the update: {why}")]
    Stopped {
        /// The step, from 1.
        step: u64,
        /// And how to mend it.
        why: Refusal,
    },
    /// Someone asked to stop.
    #[error("stopped as asked")]
    Interrupted,
    /// The tokenizer cannot turn ids into text.
    #[error("the tokenizer failed: {cause}; use the tokenizer that came with the model")]
    Tokenizer {
        /// What it said.
        cause: String,
    },
    /// The worker threads could not be started.
    #[error("cannot start the threads: {cause}; pass a smaller --threads")]
    Threads {
        /// What the system said.
        cause: String,
    },
    /// This machine, or that of another rank, has no room for all weights of a model to be trained.
    #[error(
        "to train all weights takes about {} GiB of memory besides the backbone, and {} GiB are wanting on the machine that has the least; \
         train a prompt, a prefix or an adapter, or use machines with more memory",
        gib(*needed), gib(*short)
    )]
    Memory {
        /// Bytes that the ranks of this machine need.
        needed: u64,
        /// Bytes that the machine lacks that has the least.
        short: u64,
    },
    /// A rank has run out of GPU memory while others waited for its share of something.
    #[error(
        "rank {rank} has run out of GPU memory, and the ranks with which it shares the model cannot go on without it: {what}"
    )]
    RankMemory {
        /// Which rank.
        rank: usize,
        /// How much was asked for, and how to mend it.
        what: String,
    },
    /// The ranks of a run were not told the same.
    #[error("rank {rank} has {what} than rank 0; start all ranks with the same flags and the same files")]
    RanksDiffer {
        /// The rank that differs.
        rank: usize,
        /// In what, such as "another specification".
        what: &'static str,
    },
    /// What another rank sent is none of ours.
    #[error("what rank 0 sent of the {thing} cannot be read: {what}")]
    Received {
        /// Of what, such as "checkpoint".
        thing: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// A rank cannot go on in another group with the weights that it has.
    #[error("the rank cannot go on in the new group: {what}; start it anew")]
    Regroup {
        /// What differs.
        what: String,
    },
    /// The ranks cannot be laid out as asked.
    #[error(transparent)]
    Mesh(#[from] incipit_mesh::Error),
    /// An exchange between ranks failed.
    #[error(transparent)]
    Collective(#[from] incipit_collective::Error),
    /// The data were refused.
    #[error(transparent)]
    Data(#[from] incipit_data::Error),
    /// The files of the backbone were refused.
    #[error(transparent)]
    Weights(#[from] incipit_weights::Error),
    /// The backbone refused something.
    #[error(transparent)]
    Model(#[from] incipit_model::Error),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Kernels(error.into())
    }
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether this only tells that another rank has failed.
    #[must_use]
    pub fn is_echo(&self) -> bool {
        match self {
            Self::Collective(error) | Self::Model(incipit_model::Error::Collective(error)) => error.is_echo(),
            Self::Embedding { source, .. } => match source.downcast_ref() {
                Some(incipit_model::Error::Collective(error)) => error.is_echo(),
                _ => false,
            },
            _ => false,
        }
    }

    /// Whether ranks could not go on together, of which no job is to blame.
    #[must_use]
    pub fn is_of_group(&self) -> bool {
        match self {
            Self::Collective(_)
            | Self::Model(incipit_model::Error::Collective(_))
            | Self::RankMemory { .. }
            | Self::RanksDiffer { .. }
            | Self::Received { .. }
            | Self::Regroup { .. } => true,
            Self::Embedding { source, .. } => {
                matches!(source.downcast_ref(), Some(incipit_model::Error::Collective(_)))
            }
            _ => false,
        }
    }

    /// Whether a GPU, its driver or one of its libraries failed.
    #[must_use]
    pub fn is_of_gpu(&self) -> bool {
        matches!(self.of_kernels(), Some(incipit_kernels::Error::Gpu { .. }))
    }

    fn of_kernels(&self) -> Option<&incipit_kernels::Error> {
        match self {
            Self::Kernels(error) | Self::Model(incipit_model::Error::Kernel(error)) => Some(error),
            _ => None,
        }
    }

    /// Whether memory ran out.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Memory { .. } | Self::RankMemory { .. } => true,
            Self::Stopped { why, .. } => why.out_of_memory,
            _ => self.is_of_gpu_memory(),
        }
    }

    /// Whether the memory of this rank's GPU ran out, of which no other rank knows.
    #[must_use]
    pub fn is_of_gpu_memory(&self) -> bool {
        match self {
            Self::Collective(error) | Self::Model(incipit_model::Error::Collective(error)) => {
                error.is_out_of_memory()
            }
            _ => matches!(self.of_kernels(), Some(incipit_kernels::Error::GpuMemory { .. })),
        }
    }

    /// A value of a flag that cannot be.
    pub(crate) fn spec(flag: &'static str, what: &impl ToString) -> Self {
        Self::Spec { flag, what: what.to_string() }
    }

    /// Gives an error of the system its place: `map_err(Error::io("write", path))`.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

/// What a person can do about an error of the system, where that is known.
fn mend(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space there or choose another directory"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a directory that you may write to, or change its permissions"
        }
        io::ErrorKind::NotADirectory => "; a part of that path is a file, choose another directory",
        _ => "",
    }
}
