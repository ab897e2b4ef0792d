//! Checkpoints of one job: `out/checkpoints/step-00001000/`, with `out/best` and `out/last` pointing to one
//! each.
//!
//! A checkpoint holds `prompt.safetensors` (the tensor `prompt` `[P, D]`, or `[L, P, D]` with rows for each layer; named
//! `prompt.after` or `prompt.decoder` where the rows do not stand before the input) or, of a job that trains weights,
//! `weights.safetensors`; `optimizer.safetensors`, `state.json` and, written last, `MANIFEST`: the BLAKE3 hash of each,
//! in the form that `b3sum --check` reads. It appears by one rename or not at all, and nothing in it depends on threads, devices or the number
//! of processes.

use crate::{
    Error, Result, atomic,
    optimizer::{NamedTensor, OptimizerKind},
    placement,
    prompt::Prompt,
    tensors,
    trained::{Trained, WEIGHTS},
};
use incipit_data::pretrain::Cursor;
use serde::{Deserialize, Serialize};
use std::{fmt::Write as _, path::Path};

mod store;
pub(crate) use store::lock;
pub use store::{Found, Store};

/// The file that holds the hashes of the others.
pub const MANIFEST: &str = "MANIFEST";
/// The file that holds the prompt.
pub const PROMPT: &str = "prompt.safetensors";
/// The tensor in it, of a prompt before the input.
const TENSOR: &str = "prompt";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// The version of the files written here.
const FORMAT: u32 = 1;

/// All that a job needs to go on as if nothing had happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// What is trained, after [`TrainState::step`] steps.
    pub trained: Trained,
    /// The optimizer's tensors.
    pub optimizer: Vec<NamedTensor>,
    /// Everything else.
    pub state: TrainState,
}

impl Checkpoint {
    /// Bytes of its numbers.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        let optimizer: usize = self.optimizer.iter().map(|tensor| tensor.data.len()).sum();
        (self.trained.num_parameters() + optimizer as u64) * 4
    }
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// How many steps were made.
    pub step: u64,
    /// How often the data was gone through to its end.
    pub epoch: u64,
    /// How many batches of this epoch were used.
    pub batch: u64,
    /// The job's seed.
    pub seed: u64,
    /// Hash of the part of the specification that the result depends on.
    pub spec: String,
    /// Fingerprint of the backbone.
    pub backbone: String,
    /// The optimizer, whose tensors lie beside this.
    pub optimizer: OptimizerKind,
    /// How many steps the optimizer made.
    pub optimizer_steps: u64,
    /// The best evaluation so far, if there was one.
    pub best: Option<Best>,
    /// How many evaluations came after the best one.
    pub evaluations_since_best: u64,
    /// After how many steps the last evaluation was made; 0 before the first.
    pub evaluated: u64,
    /// BLAKE3 hash of the file of training examples.
    pub train_data: String,
    /// BLAKE3 hash of the file of evaluation examples, if there is one.
    pub eval_data: Option<String>,
    /// Of a prompt of tokens, which they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<u32>>,
    /// Of a job on a corpus, where in it the next step's examples begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corpus: Option<Cursor>,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// After how many steps.
    pub step: u64,
    /// What it gave: the mean of the metrics, finite.
    pub score: f64,
}

/// `state.json`: the version comes first, so that a later one is told from a damaged one.
#[derive(Serialize, Deserialize)]
struct StateFile<S> {
    format: u32,
    written_by: String,
    state: S,
}

impl Checkpoint {
    /// The three files and their contents.
    fn files(&self) -> Result<[(&'static str, Vec<u8>); 3], String> {
        let trained = self.trained.encode()?;
        let optimizer: Vec<_> = self.optimizer.iter().map(|t| (&*t.name, &*t.shape, &*t.data)).collect();
        let state = StateFile {
            format: FORMAT,
            written_by: concat!("incipit ", env!("CARGO_PKG_VERSION")).to_owned(),
            state: &self.state,
        };
        let mut state = serde_json::to_vec_pretty(&state).map_err(|e| e.to_string())?;
        state.push(b'\n');
        Ok([(self.trained.file(), trained), (OPTIMIZER, tensors::encode(&optimizer)?), (STATE, state)])
    }

    /// All of it as bytes, to be sent to another rank.
    ///
    /// # Errors
    /// If the tensors cannot be written down, because the shape of one does not fit its numbers.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let files = self.files().map_err(|what| Error::Received { thing: "checkpoint", what })?;
        let with_length =
            |(_, bytes): &(_, Vec<u8>)| [&(bytes.len() as u64).to_le_bytes(), &bytes[..]].concat();
        let kind = u8::from(self.trained.file() == WEIGHTS);
        Ok(std::iter::once(kind).chain(files.iter().flat_map(with_length)).collect())
    }

    /// What [`Self::to_bytes`] made.
    ///
    /// # Errors
    /// [`Error::Received`] if the bytes are cut short or are none of a checkpoint.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |what| Error::Received { thing: "checkpoint", what };
        let Some((kind, mut bytes)) = bytes.split_first() else {
            return Err(refuse("it is empty".to_owned()));
        };
        let mut next = || {
            let (length, rest) = bytes.split_first_chunk()?;
            let (file, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            bytes = rest;
            Some(file)
        };
        let (Some(trained), Some(optimizer), Some(state)) = (next(), next(), next()) else {
            return Err(refuse("it is cut short".to_owned()));
        };
        Ok(Self {
            trained: Trained::decode(if *kind == 0 { PROMPT } else { WEIGHTS }, trained).map_err(refuse)?,
            optimizer: tensors::decode(optimizer).map_err(refuse)?,
            state: decode_state(state).map_err(refuse)?,
        })
    }
}

/// Writes a checkpoint directory: it is at `path` whole, or not at all. One that is there is replaced.
///
/// # Errors
/// If the system refuses.
pub fn save(path: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let files = checkpoint.files().map_err(|what| Error::Checkpoint { path: path.to_owned(), what })?;
    atomic::write_dir(path, |staged| {
        let mut manifest = String::new();
        for (name, bytes) in &files {
            atomic::write_synced(&staged.join(name), bytes)?;
            let _ = writeln!(manifest, "{}  {name}", blake3::hash(bytes)); // Writing to a string cannot fail.
        }
        atomic::write_synced(&staged.join(MANIFEST), manifest.as_bytes())
    })
}

/// Reads a checkpoint directory, or a link to one, and verifies it against its `MANIFEST`.
///
/// # Errors
/// If a file is missing, or its hash is not the one written down; the message names it.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let refuse = |what| Error::Checkpoint { path: path.to_owned(), what };
    if !path.join(MANIFEST).exists() {
        let what = if path.exists() {
            "it has no MANIFEST; it was not written to the end"
        } else {
            "it is not there"
        };
        return Err(refuse(what.to_owned()));
    }
    let manifest = read(path, MANIFEST)?;
    let verified = |name| -> Result<Vec<u8>> {
        let bytes = read(path, name)?;
        verify(&manifest, name, &bytes).map_err(refuse)?;
        Ok(bytes)
    };
    let file = if path.join(WEIGHTS).exists() { WEIGHTS } else { PROMPT };
    let (trained, optimizer, state) = (verified(file)?, verified(OPTIMIZER)?, verified(STATE)?);
    let within = |name: &'static str| move |what| refuse(format!("{name}: {what}"));
    Ok(Checkpoint {
        trained: Trained::decode(file, &trained).map_err(within(file))?,
        optimizer: tensors::decode(&optimizer).map_err(within(OPTIMIZER))?,
        state: decode_state(&state).map_err(within(STATE))?,
    })
}

/// The fingerprint of the backbone on which that was trained which lies at `path`, if a checkpoint tells: the path is one or a file of one, or
/// it is a run's directory or lies in one.
///
/// # Errors
/// If the checkpoint's state cannot be read.
pub fn backbone_of(path: &Path) -> Result<Option<String>> {
    let Ok(path) = path.canonicalize() else { return Ok(None) };
    let is_checkpoint = |dir: &Path| [STATE, MANIFEST].iter().all(|file| dir.join(file).is_file());
    let within = |dir: &Path| [dir.to_owned(), dir.join("best"), dir.join("last")];
    let Some(dir) = path.ancestors().take(3).flat_map(within).find(|dir| is_checkpoint(dir.as_path())) else {
        return Ok(None);
    };
    let state = decode_state(&read(&dir, STATE)?);
    let refuse = |what| Error::Checkpoint { path: dir, what: format!("{STATE}: {what}") };
    Ok(Some(state.map_err(refuse)?.backbone))
}

/// Writes a prompt alone, as a checkpoint's `prompt.safetensors`, atomically. [`Prompt::read`] reads it.
///
/// # Errors
/// If the system refuses.
pub fn write_prompt(path: &Path, prompt: &Prompt) -> Result<()> {
    atomic::write_file(path, &prompt_bytes(prompt)?)
}

/// The bytes of a checkpoint's `prompt.safetensors`.
///
/// # Errors
/// None for a prompt.
pub fn prompt_bytes(prompt: &Prompt) -> Result<Vec<u8>> {
    encode_prompt(prompt).map_err(|what| Error::PromptFile { path: PROMPT.into(), what })
}

/// The bytes of a `prompt.safetensors`.
pub(crate) fn encode_prompt(prompt: &Prompt) -> Result<Vec<u8>, String> {
    let name = format!("{TENSOR}{}", placement::suffix(prompt.placement()));
    tensors::encode(&[(&name, &prompt.shape(), prompt.values())])
}

/// The prompt in the bytes of a `prompt.safetensors`.
pub(crate) fn decode_prompt(bytes: &[u8]) -> Result<Prompt, String> {
    let tensors = tensors::decode(bytes)?;
    let names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
    let placed = |tensor: NamedTensor| Some((placement::of_name(&tensor.name, TENSOR)?, tensor));
    let Some((place, prompt)) = tensors.into_iter().find_map(placed) else {
        return Err(format!("it has no tensor {TENSOR:?}, but {names:?}"));
    };
    Ok(Prompt::of_shape(&prompt.shape, prompt.data)?.placed(place))
}

fn decode_state(bytes: &[u8]) -> Result<TrainState, String> {
    let file: StateFile<serde_json::Value> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if file.format != FORMAT {
        return Err(format!(
            "it has the format {} of {}, and this is {FORMAT}; use that version",
            file.format, file.written_by
        ));
    }
    serde_json::from_value(file.state).map_err(|e| e.to_string())
}

fn read(path: &Path, name: &str) -> Result<Vec<u8>> {
    let file = path.join(name);
    std::fs::read(&file).map_err(Error::io("read", file))
}

/// Checks `bytes` against the line of the file `name`.
fn verify(manifest: &[u8], name: &str, bytes: &[u8]) -> Result<(), String> {
    let manifest = String::from_utf8_lossy(manifest);
    let line = manifest.lines().find_map(|line| line.split_once("  ").filter(|(_, n)| *n == name));
    let Some((expected, _)) = line else {
        return Err(format!("its {MANIFEST} does not name {name}; it is damaged"));
    };
    let found = blake3::hash(bytes).to_hex();
    if found.as_str() == expected {
        return Ok(());
    }
    Err(format!("{name} is damaged: its BLAKE3 hash is {found}, and {MANIFEST} says {expected}"))
}

#[cfg(test)]
mod tests;
