//! Writes a T5 1.1 of a published shape with random weights, for tests of size (`scripts/make-random-checkpoint`).
//!
//! One tensor is in memory at a time, and a seed gives the same bytes every time.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use incipit_model::Config;
use incipit_weights::{Random, load_tokenizer, write_safetensors};
use serde_json::json;

const USAGE: &str = "\
make-random-checkpoint [--shape small|base|large|xl|xxl] [--seed N] [--dtype bf16|f32] [--max-shard-gb G] DIR

Writes config.json, the weights as safetensors, and a tokenizer into DIR, which must be absent or empty.

  --shape         a T5 1.1 of this size [default: small]
  --seed          of the weights [default: 0]
  --dtype         type of the weights [default: bf16]
  --max-shard-gb  size of a file in GB of 10^9 bytes, beyond which the weights are cut into shards [default: 5]";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Args {
    shape: String,
    seed: u64,
    dtype: DType,
    max_shard_gb: f64,
    dir: PathBuf,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match parse(args).and_then(|args| write(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(args: Vec<String>) -> Result<Args> {
    let mut parsed = Args {
        shape: "small".to_owned(),
        seed: 0,
        dtype: DType::BF16,
        max_shard_gb: 5.0,
        dir: PathBuf::new(),
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n\n{USAGE}"));
        match arg.as_str() {
            "--shape" => parsed.shape = value()?,
            "--seed" => parsed.seed = number(&arg, &value()?)?,
            "--dtype" => parsed.dtype = dtype(&value()?)?,
            "--max-shard-gb" => parsed.max_shard_gb = number(&arg, &value()?)?,
            flag if flag.starts_with('-') => return Err(format!("unknown flag {flag}\n\n{USAGE}").into()),
            dir if parsed.dir.as_os_str().is_empty() => parsed.dir = PathBuf::from(dir),
            more => return Err(format!("one directory is enough, and {more} is another\n\n{USAGE}").into()),
        }
    }
    if parsed.dir.as_os_str().is_empty() {
        return Err(format!("no directory was given\n\n{USAGE}").into());
    }
    if parsed.max_shard_gb.is_nan() || parsed.max_shard_gb <= 0.0 {
        return Err(format!("--max-shard-gb is {}: give a size above 0", parsed.max_shard_gb).into());
    }
    Ok(parsed)
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| format!("{flag} {text:?} is not a number that can be used").into())
}

fn dtype(text: &str) -> Result<DType> {
    match text {
        "bf16" => Ok(DType::BF16),
        "f32" => Ok(DType::F32),
        _ => Err(format!("--dtype {text:?} is neither bf16 nor f32").into()),
    }
}

fn write(args: &Args) -> Result<()> {
    let config = Config::preset(&args.shape)
        .ok_or_else(|| format!("--shape {:?} is none of small, base, large, xl and xxl", args.shape))?;
    let mut files = vec![("config.json".to_owned(), config_json(&config, args.dtype))];
    files.extend(tokenizer_files(&config)?);
    let source = Random::new(config.random_tensors(), args.dtype, args.seed)?.with_side_files(files);
    let written = write_safetensors(&args.dir, &source, args.dtype, (args.max_shard_gb * 1e9) as u64)?;
    println!(
        "{}: {} parameters in {} tensors, {} bytes of numbers in {} files",
        args.dir.display(),
        config.num_parameters(),
        written.num_tensors,
        written.num_bytes,
        written.files.len()
    );
    Ok(())
}

/// The configuration as transformers writes it for a T5 1.1.
fn config_json(config: &Config, dtype: DType) -> Vec<u8> {
    let json = json!({
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": config.decoder_start_token_id,
        "dropout_rate": 0.1,
        "eos_token_id": config.eos_token_id,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": true,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "tie_word_embeddings": false,
        "torch_dtype": if dtype == DType::BF16 { "bfloat16" } else { "float32" },
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    format!("{json:#}\n").into_bytes()
}

/// The demo's tokenizer. Its vocabulary is a part of the model's, as that of T5's own tokenizer is.
fn tokenizer_files(config: &Config) -> Result<Vec<(String, Vec<u8>)>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model");
    let size = load_tokenizer(&dir)?.get_vocab_size(true);
    if size > config.vocab_size {
        return Err(
            format!("the demo's tokenizer has {size} pieces, the model only {}", config.vocab_size).into()
        );
    }
    let read = |name: &str| Ok((name.to_owned(), std::fs::read(dir.join(name))?));
    ["spiece.model", "tokenizer.json"].into_iter().map(read).collect()
}
