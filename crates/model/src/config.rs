//! A T5's configuration, as Hugging Face's `config.json` has it.

use incipit_kernels::{Activation, Buckets};
use incipit_weights::RandomTensor;
use serde::Deserialize;

use crate::{Error, Result};

/// The shape of a T5 and how its parts compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width `D` of the residual stream.
    pub d_model: usize,
    /// Width `K` of a head.
    pub d_kv: usize,
    /// Width `F` of the feed-forward layers.
    pub d_ff: usize,
    /// Encoder layers.
    pub num_layers: usize,
    /// Decoder layers.
    pub num_decoder_layers: usize,
    /// Heads `H`; `H * K` need not be `D`.
    pub num_heads: usize,
    /// Buckets of relative positions.
    pub relative_attention_num_buckets: usize,
    /// Distances from here on share a bucket.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in every norm.
    pub layer_norm_epsilon: f32,
    /// Function of the feed-forward layers.
    pub activation: Activation,
    /// Whether the feed-forward layers are gated.
    pub gated: bool,
    /// Whether logits are scaled by `d_model^-0.5`.
    pub scale_logits: bool,
    /// Whether the head has a weight of its own; a checkpoint that has `lm_head.weight` says so, whatever is said here.
    pub own_head: bool,
    /// The token that ends a sequence.
    pub eos_token_id: u32,
    /// The token that the decoder begins with.
    pub decoder_start_token_id: u32,
}

/// What kind of model a file describes.
#[derive(Deserialize)]
struct Kind {
    model_type: Option<String>,
}

/// The keys that are read. The names are Hugging Face's; keys that do not bear on the computation are passed over.
#[derive(Deserialize)]
struct Raw {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_layers: usize,
    num_decoder_layers: Option<usize>,
    num_heads: usize,
    relative_attention_num_buckets: usize,
    relative_attention_max_distance: Option<usize>,
    layer_norm_epsilon: Option<f32>,
    feed_forward_proj: Option<String>,
    tie_word_embeddings: Option<bool>,
    scale_decoder_outputs: Option<bool>,
    eos_token_id: Option<u32>,
    pad_token_id: Option<u32>,
    decoder_start_token_id: Option<u32>,
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// If it is no JSON, lacks a key, is of another architecture, or has a value that no T5 has.
    pub fn from_json(text: &str) -> Result<Self> {
        let bad = |e| Error::Config { what: format!("{e}; take the file that was published with the model") };
        // First of all: another model's file lacks much that is not worth telling.
        let Kind { model_type } = serde_json::from_str(text).map_err(bad)?;
        // umt5 looks alike, but each of its layers has a position bias of its own.
        if let Some(kind) = model_type.as_deref().filter(|k| !["t5", "mt5"].contains(k)) {
            let what = format!("model_type is {kind:?}; Incipit trains prompts for \"t5\" and \"mt5\"");
            return Err(Error::Config { what });
        }
        let raw: Raw = serde_json::from_str(text).map_err(bad)?;
        let (activation, gated) = feed_forward(raw.feed_forward_proj.as_deref().unwrap_or("relu"))?;
        let tied = raw.tie_word_embeddings.unwrap_or(true);
        // transformers never scales an mT5's logits, although it writes `tie_word_embeddings: true` for one.
        let scales_if_tied = model_type.as_deref() != Some("mt5");
        let config = Self {
            vocab_size: raw.vocab_size,
            d_model: raw.d_model,
            d_kv: raw.d_kv,
            d_ff: raw.d_ff,
            num_layers: raw.num_layers,
            num_decoder_layers: raw.num_decoder_layers.unwrap_or(raw.num_layers),
            num_heads: raw.num_heads,
            relative_attention_num_buckets: raw.relative_attention_num_buckets,
            relative_attention_max_distance: raw.relative_attention_max_distance.unwrap_or(128),
            layer_norm_epsilon: raw.layer_norm_epsilon.unwrap_or(1e-6),
            activation,
            gated,
            scale_logits: raw.scale_decoder_outputs.unwrap_or(tied && scales_if_tied),
            own_head: !tied,
            eos_token_id: raw.eos_token_id.unwrap_or(1),
            decoder_start_token_id: raw.decoder_start_token_id.or(raw.pad_token_id).unwrap_or(0),
        };
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_layers", self.num_layers),
            ("num_decoder_layers", self.num_decoder_layers),
            ("num_heads", self.num_heads),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::Config { what: format!("{name} is 0") });
        }
        if sizes.iter().any(|(_, size)| *size > 1 << 24) {
            return Err(Error::Config { what: format!("a size is beyond any T5: {sizes:?}") });
        }
        let (count, max) = (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        if count < 4 || count % 2 == 1 || max <= count / 2 {
            let what = format!(
                "relative_attention_num_buckets {count} and relative_attention_max_distance {max} do not fit: the \
                 buckets must be an even number of 4 or more, and the distance more than half of it"
            );
            return Err(Error::Config { what });
        }
        for (name, id) in [("eos", self.eos_token_id), ("decoder_start", self.decoder_start_token_id)] {
            if id as usize >= self.vocab_size {
                let what = format!("{name}_token_id {id} is outside of a vocabulary of {}", self.vocab_size);
                return Err(Error::Config { what });
            }
        }
        Ok(())
    }

    /// The published T5 v1.1 shapes (Raffel et al. 2020; the LM-adapted models have the same): `small`, `base`, `large`,
    /// `xl` or `xxl`.
    #[must_use]
    pub fn preset(name: &str) -> Option<Self> {
        let (d_model, d_ff, num_layers, num_heads) = match name {
            "small" => (512, 1024, 8, 6),
            "base" => (768, 2048, 12, 12),
            "large" => (1024, 2816, 24, 16),
            "xl" => (2048, 5120, 24, 32),
            "xxl" => (4096, 10240, 24, 64),
            _ => return None,
        };
        Some(Self {
            vocab_size: 32_128,
            d_model,
            d_kv: 64,
            d_ff,
            num_layers,
            num_decoder_layers: num_layers,
            num_heads,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            activation: Activation::GeluNew,
            gated: true,
            scale_logits: false,
            own_head: true,
            eos_token_id: 1,
            decoder_start_token_id: 0,
        })
    }

    /// Numbers in a row of queries, keys or values: `H * K`.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }

    /// The buckets of the encoder's (`bidirectional`) or the decoder's relative positions.
    #[must_use]
    pub fn buckets(&self, bidirectional: bool) -> Buckets {
        Buckets {
            count: self.relative_attention_num_buckets,
            max_distance: self.relative_attention_max_distance,
            bidirectional,
        }
    }

    /// Name and shape of every tensor of the model.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (v, d) = (self.vocab_size, self.d_model);
        let mut all = vec![("shared.weight".to_owned(), vec![v, d])];
        for (stack, layers) in [("encoder", self.num_layers), ("decoder", self.num_decoder_layers)] {
            for layer in 0..layers {
                all.extend(self.block(stack, layer));
            }
            all.push((format!("{stack}.final_layer_norm.weight"), vec![d]));
        }
        if self.own_head {
            all.push(("lm_head.weight".to_owned(), vec![v, d]));
        }
        all
    }

    /// Every tensor as random numbers of the size that T5's own initialisation gives them, so that activations stay in range.
    #[must_use]
    pub fn random_tensors(&self) -> Vec<RandomTensor> {
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let norm = name.contains("layer_norm");
            let deviation = match name.as_str() {
                _ if norm => 0.0,
                "shared.weight" => 1.0,
                n if n.ends_with(".q.weight") => ((self.d_model * self.d_kv) as f32).powf(-0.5),
                n if n.ends_with("relative_attention_bias.weight") => 0.1,
                _ => (shape[shape.len() - 1] as f32).powf(-0.5),
            };
            RandomTensor { name, shape, mean: if norm { 1.0 } else { 0.0 }, deviation }
        };
        self.tensors().into_iter().map(tensor).collect()
    }

    fn block(&self, stack: &str, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (d, f, inner) = (self.d_model, self.d_ff, self.inner());
        let mut tensors = Vec::new();
        let mut put = |name: String, shape: Vec<usize>| {
            tensors.push((format!("{stack}.block.{layer}.layer.{name}.weight"), shape));
        };
        let attentions: &[&str] =
            if stack == "encoder" { &["SelfAttention"] } else { &["SelfAttention", "EncDecAttention"] };
        for (i, attention) in attentions.iter().enumerate() {
            for part in ["q", "k", "v"] {
                put(format!("{i}.{attention}.{part}"), vec![inner, d]);
            }
            put(format!("{i}.{attention}.o"), vec![d, inner]);
            if layer == 0 && i == 0 {
                let shape = vec![self.relative_attention_num_buckets, self.num_heads];
                put(format!("{i}.{attention}.relative_attention_bias"), shape);
            }
            put(format!("{i}.layer_norm"), vec![d]);
        }
        let i = attentions.len();
        for part in if self.gated { &["wi_0", "wi_1"][..] } else { &["wi"] } {
            put(format!("{i}.DenseReluDense.{part}"), vec![f, d]);
        }
        put(format!("{i}.DenseReluDense.wo"), vec![d, f]);
        put(format!("{i}.layer_norm"), vec![d]);
        tensors
    }

    /// All parameters, as the paper's table 4 counts them.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
    }

    /// Parameters of linear layers that a token passes: (an encoder token, a decoder token). The first counts the
    /// cross-attention's keys and values, which decoder layers make of every encoder token where targets are long.
    #[must_use]
    pub fn parameters_passed(&self) -> (u64, u64) {
        let size = |n: usize| n as u64;
        let attention = size(self.d_model * self.inner());
        let feed_forward = size(self.d_model * self.d_ff) * if self.gated { 3 } else { 2 };
        let encoder = size(self.num_layers) * (4 * attention + feed_forward);
        let cross = size(self.num_decoder_layers) * 2 * attention;
        let decoder = size(self.num_decoder_layers) * (6 * attention + feed_forward);
        (encoder + cross, decoder + size(self.vocab_size * self.d_model))
    }
}

/// The activation and whether it is gated, from `feed_forward_proj`. The names are transformers'; "gated-gelu" means the
/// tanh form there.
fn feed_forward(name: &str) -> Result<(Activation, bool)> {
    let (gated, function) = match name.strip_prefix("gated-") {
        Some(function) => (true, function),
        None => (false, name),
    };
    match function {
        "relu" => Ok((Activation::Relu, gated)),
        "gelu_new" => Ok((Activation::GeluNew, gated)),
        "gelu" if gated => Ok((Activation::GeluNew, true)),
        "silu" | "swish" => Ok((Activation::Silu, gated)),
        _ => {
            let what = format!(
                "feed_forward_proj is {name:?}; known are relu, gelu_new and silu, each also as gated-…, and gated-gelu"
            );
            Err(Error::Config { what })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table 4 of the paper.
    #[test]
    fn presets_have_the_published_parameter_counts() {
        let counts = [
            ("small", 76_961_152),
            ("base", 247_577_856),
            ("large", 783_150_080),
            ("xl", 2_849_757_184),
            ("xxl", 11_135_332_352),
        ];
        for (name, count) in counts {
            assert_eq!(Config::preset(name).unwrap().num_parameters(), count, "{name}");
        }
    }

    fn json(extra: &str) -> String {
        format!(
            r#"{{"vocab_size": 100, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2,
                "relative_attention_num_buckets": 32{extra}}}"#
        )
    }

    #[test]
    fn the_head_follows_scale_decoder_outputs_and_else_tie_word_embeddings() {
        let scaled = |extra: &str| Config::from_json(&json(extra)).unwrap().scale_logits;
        assert!(scaled(""));
        assert!(!scaled(r#", "tie_word_embeddings": false"#));
        assert!(!scaled(r#", "tie_word_embeddings": true, "scale_decoder_outputs": false"#));
        assert!(scaled(r#", "tie_word_embeddings": false, "scale_decoder_outputs": true"#));
    }

    #[test]
    fn what_no_t5_has_is_refused_with_its_name() {
        let bad = [
            (r#", "feed_forward_proj": "mish""#, "mish"),
            (r#", "model_type": "bert""#, "bert"),
            (r#", "eos_token_id": 100"#, "eos_token_id"),
            (r#", "num_decoder_layers": 0"#, "num_decoder_layers"),
            (r#", "relative_attention_max_distance": 3"#, "relative_attention_max_distance"),
        ];
        for (extra, name) in bad {
            let message = Config::from_json(&json(extra)).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
        assert!(Config::from_json("{}").unwrap_err().to_string().contains("vocab_size"));
    }
}
