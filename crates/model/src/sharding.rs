//! Which part of each tensor a rank of the tensor axis holds: a table from names to rules, total over every T5 checkpoint.

use std::ops::Range;

use candle_core::{DType, Device};
use incipit_kernels::Frozen;
use incipit_mesh::Shard;
use incipit_weights::{Source, TensorInfo};

use crate::config::Config;
use crate::{Error, Result};

/// How a tensor is cut over the ranks of the tensor axis (Shoeybi et al. 2019). A linear layer's weight is `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Every rank has all of it.
    Replicated,
    /// By outputs: a rank computes some of the columns of the result.
    Column,
    /// By inputs: a rank computes a part of every sum.
    Row,
    /// A table with columns for each head, by heads.
    Heads,
    /// A table with a row for each token, by tokens.
    Vocabulary,
}

impl Rule {
    /// The rule of the tensor of this name; none for a name that no T5 has.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let Some(rest) = name.strip_suffix(".weight") else {
            let replicated = [".adapter.down.bias", ".adapter.up.bias"].iter().any(|end| name.ends_with(end));
            return replicated.then_some(Self::Replicated);
        };
        match rest.rsplit('.').next()? {
            "shared" | "lm_head" | "embed_tokens" => Some(Self::Vocabulary),
            "layer_norm" | "final_layer_norm" | "down" | "up" => Some(Self::Replicated),
            "relative_attention_bias" | "prefix_k" | "prefix_v" | "past_k" | "past_v" => Some(Self::Heads),
            "q" | "k" | "v" | "wi" | "wi_0" | "wi_1" => Some(Self::Column),
            "o" | "wo" => Some(Self::Row),
            _ => None,
        }
    }

    /// The dim of the tensor that is cut, if one is.
    #[must_use]
    pub fn dim(self) -> Option<usize> {
        match self {
            Self::Replicated => None,
            Self::Column | Self::Vocabulary => Some(0),
            Self::Row | Self::Heads => Some(1),
        }
    }
}

/// The dim by which the tensor of this name is cut, if it is: what a checkpoint's fingerprint is computed along.
#[must_use]
pub fn sharded_dim(name: &str) -> Option<usize> {
    Rule::of(name)?.dim()
}

/// The rows and columns that `shard` has of the tensor `name` of shape `shape`, taken as a matrix (a vector has one row).
///
/// # Errors
/// If no T5 has a tensor of this name, or its dim cannot be divided.
pub fn slice(name: &str, shape: &[usize], shard: Shard) -> Result<(Range<usize>, Range<usize>)> {
    let rule = Rule::of(name).ok_or_else(|| Error::Config {
        what: format!("no T5 has a tensor {name}, so that there is no rule for cutting it"),
    })?;
    let (rows, cols) = match shape {
        [rows, cols] => (*rows, *cols),
        _ => (1, shape.iter().product()),
    };
    Ok(match rule.dim() {
        None => (0..rows, 0..cols),
        Some(0) => (shard.range("rows of a weight", rows)?, 0..cols),
        Some(_) => (0..rows, shard.range("columns of a weight", cols)?),
    })
}

/// Bytes that `shard` has of a model's tensors, as they are stored.
#[must_use]
pub fn part_bytes(source: &dyn Source, shard: Shard) -> u64 {
    let bytes = |tensor: &TensorInfo| match slice(&tensor.name, &tensor.shape, shard) {
        Ok((rows, cols)) => (rows.len() * cols.len() * tensor.dtype.size_in_bytes()) as u64,
        // No part of the model.
        Err(_) => 0,
    };
    source.tensors().iter().map(bytes).sum()
}

/// A batch's target tokens, where targets are labels or short phrases.
const TARGET_ROWS: usize = 256;

/// Whether the weight of this name is multiplied by rows of targets, which are few, and not by those of inputs.
fn meets_targets(name: &str) -> bool {
    let makes_memory =
        [".EncDecAttention.k.weight", ".EncDecAttention.v.weight"].iter().any(|end| name.ends_with(end));
    Rule::of(name) == Some(Rule::Vocabulary) || name.starts_with("decoder.") && !makes_memory
}

/// What a rank takes its weights from.
#[derive(Clone, Copy)]
pub(crate) struct Slices<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) shard: Shard,
    /// Where weights go.
    pub(crate) device: &'a Device,
    /// What they are there.
    pub(crate) dtype: DType,
}

/// A matrix of the model, and its name in a checkpoint.
#[derive(Clone)]
pub(crate) struct Weight {
    pub(crate) name: String,
    pub(crate) matrix: Frozen,
}

impl Slices<'_> {
    /// This rank's part of the tensor `name`, whose whole shape is `shape`, on the device, with its name.
    pub(crate) fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let [weight] = self.weights([name.to_owned()], shape)?;
        Ok(weight)
    }

    /// The same of several tensors of one shape, which meet the same rows: on a GPU each lies below the one before.
    pub(crate) fn weights<const N: usize>(&self, names: [String; N], shape: &[usize]) -> Result<[Weight; N]> {
        let parts = names.iter().map(|name| self.on_host(name, shape)).collect::<Result<Vec<_>>>()?;
        let parts = Frozen::to_device_together(&parts, self.device, self.dtype)?;
        let mut parts = parts.into_iter();
        Ok(names.map(|name| {
            let matrix = parts.next().unwrap_or_else(|| unreachable!("each name has a part"));
            let matrix = if meets_targets(&name) { matrix.for_rows(TARGET_ROWS) } else { matrix };
            Weight { name, matrix }
        }))
    }

    /// As [`Self::weight`], in main memory.
    pub(crate) fn weight_on_host(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        Ok(Weight { name: name.to_owned(), matrix: self.on_host(name, shape)? })
    }

    /// The rows of the tensor `name`, if there is one.
    pub(crate) fn rows_of(&self, name: &str) -> Option<usize> {
        if !self.source.contains(name) {
            return None;
        }
        self.source.tensors().into_iter().find(|info| info.name == name)?.shape.first().copied()
    }

    /// This rank's part of the tensor `name`, whose whole shape is `shape`, in main memory.
    pub(crate) fn on_host(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        if self.shard.is_whole() {
            return Ok(self.source.frozen(name, shape)?);
        }
        let (rows, cols) = slice(name, shape, self.shard)?;
        Ok(self.source.part(name, shape, rows, cols)?)
    }
}

/// Checks that the model can be cut: heads, feed-forward width and vocabulary each into equal parts.
///
/// # Errors
/// What cannot be divided, with the degrees that would do.
pub fn check(config: &Config, shard: Shard) -> Result<()> {
    shard.range("attention heads (num_heads)", config.num_heads)?;
    shard.range("columns of the feed-forward layers (d_ff)", config.d_ff)?;
    shard.range("tokens of the vocabulary (vocab_size)", config.vocab_size)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn weights_of_the_decoder_meet_targets_but_for_those_that_make_its_memory() {
        for (name, expected) in [
            ("shared.weight", true),
            ("lm_head.weight", true),
            ("encoder.block.0.layer.0.SelfAttention.q.weight", false),
            ("encoder.block.3.layer.1.DenseReluDense.wi_0.weight", false),
            ("decoder.block.0.layer.0.SelfAttention.k.weight", true),
            ("decoder.block.0.layer.1.EncDecAttention.q.weight", true),
            ("decoder.block.0.layer.1.EncDecAttention.k.weight", false),
            ("decoder.block.0.layer.1.EncDecAttention.v.weight", false),
            ("decoder.block.5.layer.2.DenseReluDense.wo.weight", true),
        ] {
            assert_eq!(meets_targets(name), expected, "{name}");
        }
    }

    #[test]
    fn every_tensor_of_every_preset_has_one_rule_and_its_slices_tile_it() {
        for name in ["small", "base", "large", "xl", "xxl"] {
            let config = Config::preset(name).unwrap();
            for count in [1, 2, 4, 8] {
                if check(&config, Shard::new(0, count).unwrap()).is_err() {
                    assert!(name == "small" && count > 2 || name == "base" && count == 8, "{name} {count}");
                    continue;
                }
                for (tensor, shape) in config.tensors() {
                    tiles(&tensor, &shape, count);
                }
            }
        }
    }

    /// The slices of all ranks hold each number once, or, where the rule says so, all of them each.
    fn tiles(tensor: &str, shape: &[usize], count: usize) {
        let parts: Vec<_> = (0..count)
            .map(|index| slice(tensor, shape, Shard::new(index, count).unwrap()).unwrap())
            .collect();
        let all: usize = shape.iter().product();
        let held: usize = parts.iter().map(|(rows, cols)| rows.len() * cols.len()).sum();
        if Rule::of(tensor) == Some(Rule::Replicated) {
            assert_eq!(held, count * all, "{tensor}");
            return;
        }
        let starts: BTreeSet<_> = parts.iter().map(|(rows, cols)| (rows.start, cols.start)).collect();
        assert_eq!((held, starts.len()), (all, count), "{tensor}");
    }

    #[test]
    fn copies_of_the_embedding_and_old_names_have_rules_and_other_names_have_none() {
        assert_eq!(Rule::of("encoder.embed_tokens.weight"), Some(Rule::Vocabulary));
        let old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
        assert_eq!(Rule::of(old), Some(Rule::Heads));
        assert_eq!(Rule::of("encoder.block.0.layer.1.DenseReluDense.wi.weight"), Some(Rule::Column));
        for unknown in ["encoder.block.0.mlp.weight", "lm_head.bias", "q"] {
            assert_eq!(Rule::of(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn what_cannot_be_divided_is_named_with_its_size() {
        let config = Config::preset("small").unwrap();
        let message = check(&config, Shard::new(1, 4).unwrap()).unwrap_err().to_string();
        assert!(message.contains("num_heads") && message.contains('6'), "{message}");
    }
}
