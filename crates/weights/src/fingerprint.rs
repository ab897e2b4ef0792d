//! A name for the numbers of a backbone.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;

/// BLAKE3 over the architecture and, in the order of their names, each tensor's name, type, shape and digest. A tensor that
/// ranks share is hashed in parts, so that each can hash its own.
///
/// It is the same for one file or many shards, for safetensors or `.bin`, for any number of ranks, and whether or not the
/// file repeats the shared embedding under the names of its users; it differs between an f32 model and its bf16 copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

/// What this hash is used for; the number changes with what goes into it.
const CONTEXT: &str = "incipit backbone fingerprint, version 2";

/// The keys of `config.json` that decide what is computed, with what a missing key stands for (`num_decoder_layers`: as many
/// as the encoder has).
const ARCHITECTURE: [(&str, &str); 17] = [
    ("d_ff", "null"),
    ("d_kv", "null"),
    ("d_model", "null"),
    ("decoder_start_token_id", "0"),
    ("eos_token_id", "1"),
    ("feed_forward_proj", "\"relu\""),
    ("layer_norm_epsilon", "1e-6"),
    ("model_type", "null"),
    ("num_decoder_layers", "null"),
    ("num_heads", "null"),
    ("num_layers", "null"),
    ("pad_token_id", "0"),
    ("relative_attention_max_distance", "128"),
    ("relative_attention_num_buckets", "32"),
    ("scale_decoder_outputs", "null"),
    ("tie_word_embeddings", "true"),
    ("vocab_size", "null"),
];

/// The embedding of encoder and decoder.
pub(crate) const SHARED: &str = "shared.weight";

/// Whether a tensor of this name may be a copy of the shared embedding, for one that uses it.
pub(crate) fn uses_shared(name: &str) -> bool {
    name.ends_with(".embed_tokens.weight") || name == "lm_head.weight"
}

impl Fingerprint {
    /// The fingerprint of tensors of these names and digests, which must come in the order of their names.
    pub(crate) fn of(config: &str, tensors: &[(&str, [u8; 32])]) -> Result<Self, String> {
        let config: Map<String, Value> = serde_json::from_str(config).map_err(|error| error.to_string())?;
        let shared = tensors.iter().find(|(name, _)| *name == SHARED).map(|(_, digest)| digest);
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        for (key, default) in ARCHITECTURE {
            field(&mut hasher, key.as_bytes());
            field(&mut hasher, architecture_value(&config, key, default).as_bytes());
        }
        for (name, digest) in tensors {
            if uses_shared(name) && shared == Some(digest) {
                continue;
            }
            field(&mut hasher, name.as_bytes());
            field(&mut hasher, digest);
        }
        Ok(Self(*hasher.finalize().as_bytes()))
    }
}

/// What the configuration says under `key`, or means by not saying it.
fn architecture_value(config: &Map<String, Value>, key: &str, default: &str) -> String {
    let said = |key: &str| config.get(key).filter(|value| !value.is_null()).map(canonical);
    let meant = || match key {
        "num_decoder_layers" => said("num_layers"),
        _ => serde_json::from_str(default).ok().as_ref().map(canonical),
    };
    said(key).or_else(meant).unwrap_or_default()
}

/// `1e-06`, `1e-6` and `0.000001` are one number, and so are `2` and `2.0`.
fn canonical(value: &Value) -> String {
    match value.as_f64() {
        Some(number) => Value::from(number).to_string(),
        None => value.to_string(),
    }
}

/// Length and content, so that no two lists of fields run together.
pub(crate) fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| Error::NotAFingerprint(text.to_owned()))?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}
