//! Prefixes in PEFT's directories: `peft_type` `PREFIX_TUNING`.
//!
//! For a T5, PEFT gives its rows to the decoder as a cache: keys and values before those of each layer's attention to itself, at the
//! positions before the first token's. The cache's other half, for the attention to the encoder, it makes and throws away. So of
//! `prompt_embeddings` `[P, num_layers * 2 * token_dim]`, slots of `token_dim` columns, with two submodules (its default for T5) all
//! slots are laid end to end twice and dealt out four a layer: layer `i` has the keys of slot `4 i`, the values of slot `4 i + 1`, each
//! modulo `2 num_layers`. Half of the slots are never read where `num_layers` is even, and two layers share one pair.
//!
//! A prefix with a pair for each of `L` layers is therefore written with `num_layers` `2 L`, the two slots behind each pair being 0: PEFT
//! reads pair `i` in layer `i`, and no model asks for the layers beyond.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    BaseModel, CONFIG, Config, PEFT_VERSION, TENSOR, WEIGHTS, read_config, read_tensors, write_files,
};
use crate::{Error, Result, optimizer::NamedTensor, tensors};

/// As `peft_type` names it.
pub(super) const TYPE: &str = "PREFIX_TUNING";

/// The name under which the model takes keys or values (`part` `k` or `v`) of the decoder's layer `i`.
fn name(i: usize, part: &str) -> String {
    format!("decoder.block.{i}.layer.0.SelfAttention.past_{part}.weight")
}

/// Whether `weights` are a prefix as PEFT has them: of the decoder alone.
pub(crate) fn is_whole(weights: &[NamedTensor]) -> bool {
    weights.iter().any(|weight| weight.name == name(0, "k"))
}

/// Writes a prefix of the decoder's attentions to themselves, by the names under which the model takes it, as a PEFT adapter directory,
/// atomically, in the place of the one that may be there.
///
/// # Errors
/// If it is no such prefix, or the system refuses.
pub fn write(dir: &Path, prefix: &[NamedTensor], base: &BaseModel) -> Result<()> {
    let refuse = |what: String| Error::PromptFile { path: dir.join(WEIGHTS), what };
    let num_layers = prefix.len() / 2;
    let of = |name: String| prefix.iter().find(|tensor| tensor.name == name);
    let pairs = (0..num_layers).flat_map(|i| ["k", "v"].map(|part| of(name(i, part))));
    let pairs: Option<Vec<&NamedTensor>> = pairs.collect();
    let Some(pairs) = pairs.filter(|pairs| !pairs.is_empty() && 2 * num_layers == prefix.len()) else {
        return Err(refuse(
            "PEFT's prefix is one of the decoder alone; train with --prefix-part decoder".to_owned(),
        ));
    };
    let (length, width) = match pairs[0].shape[..] {
        [length, width] if pairs.iter().all(|tensor| tensor.shape == [length, width]) => (length, width),
        _ => return Err(refuse("the layers' prefixes have not one shape".to_owned())),
    };
    let nothing = vec![0.0; width];
    let mut rows = Vec::with_capacity(4 * num_layers * length * width);
    for row in 0..length {
        for pair in pairs.chunks(2) {
            pair.iter().for_each(|tensor| rows.extend(&tensor.data[row * width..][..width]));
            rows.extend(nothing.iter().chain(&nothing));
        }
    }
    let weights = tensors::encode(&[(TENSOR, &[length, 4 * num_layers * width], &rows)]).map_err(refuse)?;
    write_files(dir, &weights, &config(2 * num_layers, [length, width], base))
}

/// The keys are those of PEFT's own file, in its order.
fn config(num_layers: usize, [length, width]: [usize; 2], base: &BaseModel) -> Value {
    let (model, revision) = incipit_weights::split_revision(&base.name);
    json!({
        "auto_mapping": null,
        "base_model_name_or_path": model,
        "encoder_hidden_size": width,
        "inference_mode": true,
        "init_weights": null,
        "modules_to_save": null,
        "num_attention_heads": base.num_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 2,
        "num_virtual_tokens": length,
        "peft_type": TYPE,
        "peft_version": PEFT_VERSION,
        "prefix_projection": false,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": width,
    })
}

/// Reads the keys and values of a PEFT adapter directory, by the names under which the model takes them: those of as many layers as
/// the adapter says that it has.
///
/// # Errors
/// If a file is missing or damaged, the adapter is of another type, or its rows do not fit its configuration.
pub fn read(dir: &Path) -> Result<Vec<NamedTensor>> {
    let config = read_config(dir, &[TYPE])?;
    let (place, found) = read_tensors(dir)?;
    pairs(&config, &found).map_err(|what| Error::PromptFile { path: place, what })
}

fn pairs(config: &Config, tensors: &[NamedTensor]) -> Result<Vec<NamedTensor>, String> {
    if config.num_transformer_submodules.is_some_and(|n| n != 2) {
        return Err(format!(
            "{CONFIG} says num_transformer_submodules {}, with which PEFT's cache for a T5 also goes to the attention to the encoder and mixes \
             there with the target's own keys; train it with 2, PEFT's default for this task_type",
            config.num_transformer_submodules.unwrap_or_default()
        ));
    }
    let number = |found: Option<usize>, key: &str| {
        found
            .filter(|n| *n > 0)
            .ok_or_else(|| format!("{CONFIG} has no {key}; save the adapter with PEFT again"))
    };
    let (num_layers, width) =
        (number(config.num_layers, "num_layers")?, number(config.token_dim, "token_dim")?);
    let names: Vec<&str> = tensors.iter().map(|tensor| &*tensor.name).collect();
    let Some(found) = tensors.iter().find(|tensor| tensor.name == TENSOR) else {
        return Err(format!("it has no tensor {TENSOR:?}, but {names:?}"));
    };
    let (length, slots) = (config.num_virtual_tokens, 2 * num_layers);
    if length == 0 || found.shape != [length, slots * width] {
        return Err(format!(
            "{TENSOR:?} has the shape {:?}, and by {CONFIG} (num_virtual_tokens, num_layers * 2 * token_dim) it should be {:?}",
            found.shape,
            [length, slots * width]
        ));
    }
    if !found.data.iter().all(|value| value.is_finite()) {
        return Err(format!("{TENSOR:?} has a number that is not finite"));
    }
    let slot = |slot: usize| -> Vec<f32> {
        found
            .data
            .chunks(slots * width)
            .flat_map(|row| &row[slot % slots * width..][..width])
            .copied()
            .collect()
    };
    let layer = |i: usize| {
        [("k", slot(4 * i)), ("v", slot(4 * i + 1))].map(|(part, data)| NamedTensor {
            name: name(i, part),
            shape: vec![length, width],
            data,
        })
    };
    Ok((0..num_layers).flat_map(layer).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn base() -> BaseModel {
        BaseModel { name: "t5".to_owned(), num_layers: 6, num_heads: 2 }
    }

    /// A prefix of three rows for so many layers; no number is there twice.
    fn prefix(num_layers: usize) -> Vec<NamedTensor> {
        let tensor = |n: usize| NamedTensor {
            name: name(n / 2, ["k", "v"][n % 2]),
            shape: vec![3, 4],
            data: (0..12).map(|i| (100 * n + i) as f32 + 0.5).collect(),
        };
        (0..2 * num_layers).map(tensor).collect()
    }

    fn error(dir: &Path) -> String {
        read(dir).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_back_in_the_first_layers() {
        let dir = tempfile::tempdir().unwrap();
        for num_layers in [1, 2, 3] {
            let place = dir.path().join("adapter");
            write(&place, &prefix(num_layers), &base()).unwrap();
            let read = read(&place).unwrap();
            assert_eq!(read[..2 * num_layers], prefix(num_layers));
            assert_eq!(read.len(), 4 * num_layers);
        }
    }

    /// `i` counts the slots that PEFT would give to layer after layer.
    #[test]
    fn slots_are_dealt_out_as_peft_deals_them() {
        let slots = |num_layers: usize| -> Vec<[f32; 2]> {
            let config = Config {
                num_virtual_tokens: 1,
                token_dim: Some(1),
                num_layers: Some(num_layers),
                num_transformer_submodules: None,
            };
            let data = (0..2 * num_layers).map(|i| i as f32).collect();
            let rows = NamedTensor { name: TENSOR.to_owned(), shape: vec![1, 2 * num_layers], data };
            pairs(&config, &[rows])
                .unwrap()
                .chunks(2)
                .map(|pair| [pair[0].data[0], pair[1].data[0]])
                .collect()
        };
        assert_eq!(slots(2), [[0.0, 1.0], [0.0, 1.0]]);
        assert_eq!(slots(3), [[0.0, 1.0], [4.0, 5.0], [2.0, 3.0]]);
        assert_eq!(slots(4), [[0.0, 1.0], [4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]);
    }

    #[test]
    fn what_does_not_fit_its_configuration_is_refused_with_the_mend() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("adapter");
        write(&place, &prefix(2), &base()).unwrap();
        let text = fs::read_to_string(place.join(CONFIG)).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        for (key, value, word) in [
            ("num_transformer_submodules", json!(1), "train it with 2"),
            ("num_layers", Value::Null, "no num_layers; save the adapter"),
            ("num_layers", json!(3), "[3, 24]"),
            ("num_virtual_tokens", json!(4), "[4, 32]"),
            ("peft_type", json!("PROMPT_TUNING"), "PROMPT_TUNING"),
        ] {
            let mut changed = config.clone();
            changed[key] = value;
            fs::write(place.join(CONFIG), changed.to_string()).unwrap();
            assert!(error(&place).contains(word), "{key}: {}", error(&place));
        }
    }

    #[test]
    fn only_a_prefix_of_the_decoder_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut all = prefix(2);
        all[3].name = "encoder.block.0.layer.0.SelfAttention.prefix_k.weight".to_owned();
        for prefix in [&all[..], &prefix(2)[..3], &[]] {
            let error = write(dir.path(), prefix, &base()).unwrap_err().to_string();
            assert!(error.contains("--prefix-part decoder"), "{error}");
        }
    }
}
