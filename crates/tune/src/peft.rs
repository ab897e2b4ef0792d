//! Prompts in the directories of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! PEFT trains and saves `[2P, D]` for a T5 (`num_transformer_submodules` is 2 unless it is set), of which it
//! only ever reads the first P rows: nothing goes to the decoder. We write `[P, D]` and say
//! `num_transformer_submodules: 1`, which PEFT loads to the same loss and the same generated text, without
//! rows that nobody reads; and we read both.

pub mod prefix;

use crate::{Error, Result, atomic, optimizer::NamedTensor, prompt::Prompt, tensors};
use candle_core::{DType, pickle};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The file that says what the adapter is.
pub const CONFIG: &str = "adapter_config.json";
/// The file that holds its rows.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The file that held its rows before PEFT wrote safetensors.
pub const OLD_WEIGHTS: &str = "adapter_model.bin";
/// As `peft_type` names prompts.
const TYPE: &str = "PROMPT_TUNING";
/// The tensor that holds its rows.
const TENSOR: &str = "prompt_embeddings";
/// The release whose fields are written.
const PEFT_VERSION: &str = "0.21.2";

/// What PEFT keeps about the model that a prompt is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseModel {
    /// Its directory or Hub id, from which PEFT's users load it.
    pub name: String,
    /// Encoder layers.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
}

/// Writes `prompt` as a PEFT adapter directory, atomically, in the place of the one that may be there.
///
/// # Errors
/// If the prompt is none that PEFT knows, which puts `[P, D]` before the input, or the system refuses.
pub fn write(dir: &Path, prompt: &Prompt, base: &BaseModel) -> Result<()> {
    if !prompt.is_plain() {
        let what = "PEFT knows only prompts of one layer that stand before the input, and this is another; use the run's own files, or `convert prompt --to checkpoint`";
        return Err(Error::Prompt { what: what.to_owned() });
    }
    let shape = [prompt.length(), prompt.width()];
    let weights = tensors::encode(&[(TENSOR, &shape, prompt.values())])
        .map_err(|what| Error::PromptFile { path: dir.join(WEIGHTS), what })?;
    write_files(dir, &weights, &config(prompt, base))
}

fn write_files(dir: &Path, weights: &[u8], config: &Value) -> Result<()> {
    let config = format!("{config:#}\n");
    atomic::write_dir(dir, |staged| {
        atomic::write_synced(&staged.join(WEIGHTS), weights)?;
        atomic::write_synced(&staged.join(CONFIG), config.as_bytes())
    })
}

/// The keys are those of PEFT's own file, in its order.
fn config(prompt: &Prompt, base: &BaseModel) -> Value {
    let (model, revision) = incipit_weights::split_revision(&base.name);
    json!({
        "auto_mapping": null,
        "base_model_name_or_path": model,
        "inference_mode": true,
        "modules_to_save": null,
        "num_attention_heads": base.num_heads,
        "num_layers": base.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.length(),
        "peft_type": TYPE,
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": null,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": prompt.width(),
        "tokenizer_kwargs": null,
        "tokenizer_name_or_path": null,
    })
}

/// Reads the encoder's rows of a PEFT adapter directory: the first `num_virtual_tokens`.
///
/// # Errors
/// If a file is missing or damaged, the adapter is of another type, or its rows do not fit its configuration.
pub fn read(dir: &Path) -> Result<Prompt> {
    let config = read_config(dir, &[TYPE])?;
    let (place, tensors) = read_tensors(dir)?;
    config.rows(tensors).map_err(|what| Error::PromptFile { path: place, what })
}

/// Whether `dir` is a PEFT directory with a prefix.
pub(crate) fn is_prefix(dir: &Path) -> bool {
    read_config(dir, &[prefix::TYPE]).is_ok()
}

/// The configuration, which must be of one of the `types`.
fn read_config(dir: &Path, types: &[&str]) -> Result<Config> {
    let place = dir.join(CONFIG);
    let text = std::fs::read_to_string(&place).map_err(Error::io("read", &place))?;
    Config::parse(&text, types).map_err(|what| Error::PromptFile { path: place, what })
}

/// The tensors, and the file that has them.
fn read_tensors(dir: &Path) -> Result<(PathBuf, Vec<NamedTensor>)> {
    let place = if dir.join(WEIGHTS).exists() || !dir.join(OLD_WEIGHTS).exists() {
        dir.join(WEIGHTS)
    } else {
        dir.join(OLD_WEIGHTS)
    };
    let found = if place.ends_with(OLD_WEIGHTS) { read_old(&place)? } else { read_new(&place)? };
    Ok((place, found))
}

fn read_new(path: &Path) -> Result<Vec<NamedTensor>> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    tensors::decode(&bytes).map_err(|what| Error::PromptFile { path: path.to_owned(), what })
}

fn read_old(path: &Path) -> Result<Vec<NamedTensor>> {
    let damaged = |e: candle_core::Error| Error::PromptFile {
        path: path.to_owned(),
        what: format!("it cannot be read ({e}); load and save it with a newer PEFT"),
    };
    let mut tensors = Vec::new();
    for (name, tensor) in pickle::read_all(path).map_err(damaged)? {
        let shape = tensor.dims().to_vec();
        let flat = tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()).map_err(damaged)?;
        tensors.push(NamedTensor { name, shape, data: flat.to_vec1().map_err(damaged)? });
    }
    Ok(tensors)
}

/// What of the configuration decides about the rows.
struct Config {
    num_virtual_tokens: usize,
    token_dim: Option<usize>,
    num_layers: Option<usize>,
    num_transformer_submodules: Option<usize>,
}

impl Config {
    fn parse(text: &str, types: &[&str]) -> Result<Self, String> {
        let config: Value = serde_json::from_str(text).map_err(|e| format!("it is no JSON ({e})"))?;
        let number = |key: &str| config[key].as_u64().and_then(|n| usize::try_from(n).ok());
        match config["peft_type"].as_str() {
            Some(found) if types.contains(&found) => {}
            Some(prefix::TYPE) => {
                return Err(format!(
                    "its peft_type is {}, which is no prompt but keys and values within the decoder; pass it to a command that takes \
                     either (eval, generate)",
                    prefix::TYPE
                ));
            }
            Some(other) => {
                return Err(format!(
                    "its peft_type is {other}, and only {TYPE} is a prompt of free rows before the encoder's input"
                ));
            }
            None => return Err("it has no peft_type; is it PEFT's?".to_owned()),
        }
        let num_virtual_tokens = number("num_virtual_tokens").ok_or("it has no num_virtual_tokens")?;
        Ok(Self {
            num_virtual_tokens,
            token_dim: number("token_dim"),
            num_layers: number("num_layers"),
            num_transformer_submodules: number("num_transformer_submodules"),
        })
    }

    fn rows(&self, tensors: Vec<NamedTensor>) -> Result<Prompt, String> {
        let names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
        let Some(found) = tensors.into_iter().find(|t| t.name == TENSOR) else {
            return Err(format!("it has no tensor {TENSOR:?}, but {names:?}"));
        };
        let length = self.num_virtual_tokens;
        let [rows, width] = found.shape[..] else {
            return Err(format!("{TENSOR:?} has the shape {:?} and should have two dimensions", found.shape));
        };
        if let Some(expected) = self.token_dim.filter(|d| *d != width) {
            return Err(format!("{TENSOR:?} has {width} columns, and {CONFIG} says token_dim {expected}"));
        }
        if rows < length {
            return Err(format!("{TENSOR:?} has {rows} rows, and {CONFIG} says num_virtual_tokens {length}"));
        }
        let mut values = found.data;
        values.truncate(length * width);
        Prompt::new(length, width, values).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn base() -> BaseModel {
        BaseModel { name: "google/t5-v1_1-small".to_owned(), num_layers: 8, num_heads: 6 }
    }

    fn prompt() -> Prompt {
        Prompt::new(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.5]).unwrap()
    }

    /// An adapter directory with the given change to its configuration and the given tensor.
    fn adapter(change: (&str, &Value), name: &str, shape: &[usize]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(&prompt(), &base());
        config[change.0] = change.1.clone();
        fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
        let data: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
        fs::write(dir.path().join(WEIGHTS), tensors::encode(&[(name, shape, &data)]).unwrap()).unwrap();
        dir
    }

    fn error(dir: &tempfile::TempDir) -> String {
        read(dir.path()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_back_and_may_be_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("adapter");
        for _ in 0..2 {
            write(&place, &prompt(), &base()).unwrap();
            assert_eq!(read(&place).unwrap(), prompt());
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&place).unwrap().count(), 2);
    }

    #[test]
    fn the_configuration_has_pefts_keys_in_pefts_order() {
        let keys: Vec<String> = config(&prompt(), &base()).as_object().unwrap().keys().cloned().collect();
        let mut sorted = keys.clone();
        sorted.sort();
        assert_eq!(keys, sorted);
        assert_eq!(keys.len(), 17);
    }

    #[test]
    fn of_two_submodules_the_first_rows_are_taken() {
        let dir = adapter(("num_transformer_submodules", &json!(2)), TENSOR, &[4, 3]);
        let read = read(dir.path()).unwrap();
        assert_eq!((read.length(), read.values()), (2, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0][..]));
    }

    #[test]
    fn other_types_of_adapters_are_refused_by_name() {
        for other in ["LORA", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"] {
            let error = error(&adapter(("peft_type", &json!(other)), TENSOR, &[2, 3]));
            assert!(error.contains(other) && error.contains(CONFIG), "{error}");
        }
        assert!(error(&adapter(("peft_type", &Value::Null), TENSOR, &[2, 3])).contains("no peft_type"));
    }

    #[test]
    fn rows_that_do_not_fit_the_configuration_are_refused() {
        let none = ("revision", &Value::Null);
        assert!(error(&adapter(none, TENSOR, &[1, 3])).contains("has 1 rows"));
        assert!(error(&adapter(none, TENSOR, &[6])).contains("two dimensions"));
        assert!(error(&adapter(none, "lora_A", &[2, 3])).contains("[\"lora_A\"]"));
        assert!(error(&adapter(("token_dim", &json!(4)), TENSOR, &[2, 3])).contains("token_dim 4"));
        assert!(
            error(&adapter(("num_virtual_tokens", &Value::Null), TENSOR, &[2, 3]))
                .contains("num_virtual_tokens")
        );
        assert!(error(&adapter(("num_virtual_tokens", &json!(0)), TENSOR, &[2, 3])).contains("no rows"));
        read(adapter(("token_dim", &Value::Null), TENSOR, &[2, 3]).path()).unwrap();
    }

    #[test]
    fn missing_and_damaged_files_are_named() {
        for name in [CONFIG, WEIGHTS] {
            let dir = adapter(("revision", &Value::Null), TENSOR, &[2, 3]);
            fs::write(dir.path().join(name), "{").unwrap();
            assert!(error(&dir).contains(name), "{}", error(&dir));
            fs::remove_file(dir.path().join(name)).unwrap();
            assert!(error(&dir).contains(name), "{}", error(&dir));
        }
        let dir = adapter(("revision", &Value::Null), TENSOR, &[2, 3]);
        fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
        fs::write(dir.path().join(OLD_WEIGHTS), "no pickle").unwrap();
        assert!(error(&dir).contains(OLD_WEIGHTS), "{}", error(&dir));
    }
}
