//! A model directory, without computing with it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use incipit_model::Config;
use incipit_weights::{Checkpoint, Source, TensorInfo, load_tokenizer, resolve};
use serde::Serialize;
use serde_json::{Map, Value};

use super::ModelArgs;
use crate::output::{self, Printed};
use crate::units;

/// What is shown of `config.json`, in this order.
const SHOWN: [&str; 14] = [
    "model_type",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "vocab_size",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "scale_decoder_outputs",
];

#[derive(Serialize)]
pub(super) struct Model {
    path: PathBuf,
    files: Vec<File>,
    parameters: u64,
    bytes: u64,
    fingerprint: Option<String>,
    /// Why this program cannot run the model; absent where it can.
    obstacle: Option<String>,
    config: Map<String, Value>,
    tokenizer: Tokenizer,
    components: Vec<Component>,
    tensors: Vec<Kind>,
}

#[derive(Serialize)]
struct File {
    name: String,
    bytes: u64,
}

#[derive(Serialize)]
struct Tokenizer {
    /// Absent where there is none, or a broken one.
    pieces: Option<usize>,
    obstacle: Option<String>,
}

/// A part of the model.
#[derive(Serialize)]
struct Component {
    name: &'static str,
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

/// Tensors that differ in the number of their block alone.
#[derive(Serialize)]
struct Kind {
    name: String,
    count: usize,
    shape: Vec<usize>,
    dtype: &'static str,
    parameters: u64,
}

pub(super) fn examine(args: &ModelArgs) -> Result<Model> {
    let path = resolve(&args.model)?;
    // With f32, tensors are as the files have them.
    let checkpoint = Checkpoint::open(&path, DType::F32)?;
    let config_text = checkpoint.config_json()?;
    let config: Value = serde_json::from_str(&config_text)
        .with_context(|| format!("{} has a broken config.json", path.display()))?;
    let obstacle = Config::from_json(&config_text).err().map(|error| error.to_string());
    let tensors = checkpoint.tensors();
    let files = checkpoint.files().into_iter().map(|file| File {
        name: file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: std::fs::metadata(file).map_or(0, |m| m.len()),
    });
    Ok(Model {
        files: files.collect(),
        parameters: checkpoint.num_parameters(),
        bytes: tensors.iter().map(bytes).sum(),
        fingerprint: if args.no_fingerprint {
            None
        } else {
            Some(checkpoint.fingerprint(&incipit_model::sharding::sharded_dim)?.to_string())
        },
        obstacle,
        config: shown(&config),
        tokenizer: match load_tokenizer(&path) {
            Ok(tokenizer) => Tokenizer { pieces: Some(tokenizer.get_vocab_size(true)), obstacle: None },
            Err(error) => Tokenizer { pieces: None, obstacle: Some(error.to_string()) },
        },
        components: components(&tensors),
        tensors: kinds(&tensors),
        path,
    })
}

fn shown(config: &Value) -> Map<String, Value> {
    let pair = |key: &str| config.get(key).map(|value| (key.to_owned(), value.clone()));
    SHOWN.iter().filter_map(|key| pair(key)).collect()
}

fn parameters(tensor: &TensorInfo) -> u64 {
    tensor.shape.iter().map(|n| *n as u64).product()
}

fn bytes(tensor: &TensorInfo) -> u64 {
    parameters(tensor) * tensor.dtype.size_in_bytes() as u64
}

fn components(tensors: &[TensorInfo]) -> Vec<Component> {
    const NAMES: [&str; 8] = [
        "embedding",
        "encoder attention",
        "encoder feed-forward",
        "decoder attention",
        "decoder cross-attention",
        "decoder feed-forward",
        "norms and biases",
        "head",
    ];
    let mut parts: Vec<Component> =
        NAMES.iter().map(|name| Component { name, tensors: 0, parameters: 0, bytes: 0 }).collect();
    for tensor in tensors {
        let part = &mut parts[component(&tensor.name)];
        part.tensors += 1;
        part.parameters += parameters(tensor);
        part.bytes += bytes(tensor);
    }
    parts.retain(|part| part.tensors > 0);
    parts
}

/// The place among the components' names.
fn component(name: &str) -> usize {
    let encoder = name.starts_with("encoder.");
    match name {
        "lm_head.weight" => 7,
        n if n == "shared.weight" || n.ends_with("embed_tokens.weight") => 0,
        n if n.contains("relative_attention_bias") || n.contains("layer_norm") => 6,
        n if n.contains("EncDecAttention") => 4,
        n if n.contains("SelfAttention") => {
            if encoder {
                1
            } else {
                3
            }
        }
        n if n.contains("DenseReluDense") => {
            if encoder {
                2
            } else {
                5
            }
        }
        _ => 6,
    }
}

/// Tensors whose names differ in the block's number alone, and that are alike, are one line.
fn kinds(tensors: &[TensorInfo]) -> Vec<Kind> {
    let mut seen: BTreeMap<(String, Vec<usize>, &'static str), Kind> = BTreeMap::new();
    for tensor in tensors {
        let (name, dtype) = (without_block(&tensor.name), tensor.dtype.as_str());
        let kind = seen.entry((name.clone(), tensor.shape.clone(), dtype)).or_insert_with(|| Kind {
            name,
            count: 0,
            shape: tensor.shape.clone(),
            dtype,
            parameters: 0,
        });
        kind.count += 1;
        kind.parameters += parameters(tensor);
    }
    seen.into_values().collect()
}

/// `encoder.block.7.layer.0.q` as `encoder.block.*.layer.0.q`.
fn without_block(name: &str) -> String {
    let Some((before, rest)) = name.split_once(".block.") else { return name.to_owned() };
    match rest.split_once('.') {
        Some((_, after)) => format!("{before}.block.*.{after}"),
        None => name.to_owned(),
    }
}

impl Printed for Model {
    fn text(&self) -> String {
        let files = self.files.iter().map(|f| format!("{} ({})", f.name, units::bytes(f.bytes)));
        let tokenizer = match (&self.tokenizer.pieces, &self.tokenizer.obstacle) {
            (Some(pieces), _) => format!("{} pieces", units::count(*pieces as u64)),
            (None, obstacle) => {
                format!("none that can be used: {}", obstacle.as_deref().unwrap_or("unknown"))
            }
        };
        let mut facts = vec![
            ("model", self.path.display().to_string()),
            ("files", files.collect::<Vec<_>>().join(", ")),
            ("parameters", units::count(self.parameters)),
            ("weights", units::bytes(self.bytes)),
            ("tokenizer", tokenizer),
        ];
        facts.extend(self.fingerprint.clone().map(|f| ("fingerprint", f)));
        facts
            .push(("runs here", self.obstacle.as_ref().map_or("yes".to_owned(), |why| format!("no: {why}"))));
        let config =
            self.config.iter().map(|(key, value)| (key.as_str(), value.to_string().replace('"', "")));
        let part = |c: &Component| {
            vec![c.name.to_owned(), c.tensors.to_string(), units::count(c.parameters), units::bytes(c.bytes)]
        };
        let kind = |k: &Kind| {
            let shape = k.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
            vec![k.name.clone(), k.count.to_string(), shape, k.dtype.to_owned(), units::count(k.parameters)]
        };
        let parts: Vec<_> = self.components.iter().map(part).collect();
        let kinds: Vec<_> = self.tensors.iter().map(kind).collect();
        [
            output::facts(facts),
            output::facts(config),
            output::table(&["component", "tensors", "parameters", "size"], &parts, true),
            output::table(&["tensor (* is the block)", "count", "shape", "type", "parameters"], &kinds, true),
        ]
        .join("\n\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_of_a_t5_belongs_to_its_component() {
        for (name, place) in [
            ("shared.weight", 0),
            ("encoder.embed_tokens.weight", 0),
            ("encoder.block.0.layer.0.SelfAttention.q.weight", 1),
            ("encoder.block.3.layer.1.DenseReluDense.wi_0.weight", 2),
            ("decoder.block.0.layer.0.SelfAttention.o.weight", 3),
            ("decoder.block.0.layer.1.EncDecAttention.k.weight", 4),
            ("decoder.block.0.layer.2.DenseReluDense.wo.weight", 5),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 6),
            ("decoder.final_layer_norm.weight", 6),
            ("lm_head.weight", 7),
        ] {
            assert_eq!(component(name), place, "{name}");
        }
    }

    #[test]
    fn blocks_that_are_alike_become_one_line() {
        let tensor = |block: usize, rows: usize| TensorInfo {
            name: format!("encoder.block.{block}.layer.0.SelfAttention.q.weight"),
            shape: vec![rows, 4],
            dtype: DType::F32,
        };
        let kinds = kinds(&[tensor(0, 8), tensor(1, 8), tensor(2, 16)]);
        let lines: Vec<_> = kinds.iter().map(|k| (k.count, k.shape.clone(), k.parameters)).collect();
        assert_eq!(lines, [(2, vec![8, 4], 64), (1, vec![16, 4], 64)]);
        assert_eq!(kinds[0].name, "encoder.block.*.layer.0.SelfAttention.q.weight");
    }
}
