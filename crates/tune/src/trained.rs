//! What a job has trained, and reading it from whatever holds it.

use std::path::{Path, PathBuf};

use crate::{
    Error, Result, checkpoint, optimizer::NamedTensor, peft, prompt::Prompt, tensors, weights::projection,
};

/// The trained part of a model whose rest is frozen.
#[derive(Clone, Debug, PartialEq)]
pub enum Trained {
    /// A soft prompt.
    Prompt(Prompt),
    /// Tensors of the model itself, or laid into it, by the names under which the model takes them; each of its whole shape.
    Weights(Vec<NamedTensor>),
}

/// The file that holds trained weights, in a checkpoint and in a run's directory.
pub const WEIGHTS: &str = "weights.safetensors";

impl Trained {
    /// Reads a prompt as [`Prompt::read`] does, or weights as they are [`Self::kept`]: a PEFT directory of a prefix, a `weights.safetensors`, a checkpoint, or a training directory.
    ///
    /// # Errors
    /// If `path` holds neither, or what it holds is damaged.
    pub fn read(path: &Path) -> Result<Self> {
        if let Some(dir) = weights_checkpoint(path) {
            return checkpoint::load(&dir)?.trained.kept();
        }
        let adapter = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        if peft::is_prefix(adapter) {
            return Ok(Self::Weights(peft::prefix::read(adapter)?));
        }
        let file = if path.is_dir() { path.join(WEIGHTS) } else { path.to_owned() };
        if file.file_name().is_none_or(|name| name != WEIGHTS) || !file.is_file() {
            return Ok(Self::Prompt(Prompt::read(path)?));
        }
        let bytes = std::fs::read(&file).map_err(Error::io("read", &file))?;
        Self::decode(WEIGHTS, &bytes).map_err(|what| Error::PromptFile { path: file, what })
    }

    /// What is left when training is over: of an MLP that makes a prefix, the prefix.
    ///
    /// # Errors
    /// If the MLP is not whole.
    pub fn kept(self) -> Result<Self> {
        match self {
            Self::Weights(tensors) => Ok(Self::Weights(projection::results(&tensors)?.unwrap_or(tensors))),
            Self::Prompt(_) => Ok(self),
        }
    }

    /// The prompt, if it is one.
    #[must_use]
    pub fn prompt(&self) -> Option<&Prompt> {
        match self {
            Self::Prompt(prompt) => Some(prompt),
            Self::Weights(_) => None,
        }
    }

    /// How many numbers it has.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        match self {
            Self::Prompt(prompt) => prompt.values().len() as u64,
            Self::Weights(tensors) => tensors.iter().map(|tensor| tensor.data.len() as u64).sum(),
        }
    }

    /// Its file in a checkpoint.
    pub(crate) fn file(&self) -> &'static str {
        match self {
            Self::Prompt(_) => checkpoint::PROMPT,
            Self::Weights(_) => WEIGHTS,
        }
    }

    /// The bytes of that file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::Prompt(prompt) => checkpoint::encode_prompt(prompt),
            Self::Weights(weights) => {
                let weights: Vec<_> = weights.iter().map(|t| (&*t.name, &*t.shape, &*t.data)).collect();
                tensors::encode(&weights)
            }
        }
    }

    /// What the file `name` holds.
    pub(crate) fn decode(name: &str, bytes: &[u8]) -> Result<Self, String> {
        if name != WEIGHTS {
            return Ok(Self::Prompt(checkpoint::decode_prompt(bytes)?));
        }
        let weights = tensors::decode(bytes)?;
        match weights.iter().find(|tensor| !tensor.data.iter().all(|value| value.is_finite())) {
            Some(tensor) => Err(format!("its tensor {} has a number that is not finite", tensor.name)),
            None => Ok(Self::Weights(weights)),
        }
    }
}

/// The checkpoint of trained weights that `path` is, or, of a run, the best or else the last; what a run shows at its end is older while
/// it goes on.
fn weights_checkpoint(path: &Path) -> Option<PathBuf> {
    let dirs = [path.to_owned(), path.join("best"), path.join("last")];
    dirs.into_iter().find(|dir| dir.join(checkpoint::MANIFEST).is_file() && dir.join(WEIGHTS).is_file())
}
