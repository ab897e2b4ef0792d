//! A tiny random backbone with a tokenizer of its own, and data files for it.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::DType;
use incipit_kernels::Frozen;
use incipit_model::{Config, T5};
use incipit_tune::{
    backbone::Backbone,
    control::Control,
    engine::{Engine, EngineOptions, Recompute},
    evaluate::Evaluation,
    log::{self, Line},
    spec::{PartialSpec, TrainSpec},
    train::{Event, Observer},
};
use incipit_weights::{Random, RandomTensor, Source, TensorInfo};
use tokenizers::Tokenizer;

/// Words of the vocabulary; the last one's embedding is not a number.
const WORDS: [&str; 14] = [
    "yes", "no", "maybe", "red", "green", "blue", "one", "two", "three", "four", "is", "was", "not", "poison",
];

/// Seed of the weights.
const SEED: u64 = 20;

pub(crate) fn config() -> Config {
    Config {
        vocab_size: 24,
        d_model: 16,
        d_kv: 4,
        d_ff: 24,
        num_layers: 2,
        num_decoder_layers: 2,
        num_heads: 3,
        relative_attention_num_buckets: 8,
        relative_attention_max_distance: 16,
        ..Config::preset("small").unwrap()
    }
}

pub(crate) fn id(word: &str) -> u32 {
    3 + WORDS.iter().position(|w| *w == word).unwrap() as u32
}

pub(crate) fn tokenizer() -> Tokenizer {
    let mut vocab = r#""<pad>":0,"</s>":1,"<unk>":2"#.to_owned();
    for word in WORDS {
        write!(vocab, r#","{word}":{}"#, id(word)).unwrap();
    }
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"normalizer":null,"post_processor":null,"decoder":null,
        "added_tokens":[{{"id":1,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,
        "special":true}}],"pre_tokenizer":{{"type":"WhitespaceSplit"}},
        "model":{{"type":"WordLevel","vocab":{{{vocab}}},"unk_token":"<unk>"}}}}"#
    );
    Tokenizer::from_bytes(json).unwrap()
}

/// Random weights, but for one row of the embedding.
struct Poisoned {
    random: Random,
    row: usize,
}

impl Source for Poisoned {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.random.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.random.contains(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> incipit_weights::Result<Frozen> {
        let frozen = self.random.frozen(name, shape)?;
        if name != "shared.weight" {
            return Ok(frozen);
        }
        let (rows, cols) = (shape[0], shape[1]);
        let mut values = vec![0.0; rows * cols];
        values.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| frozen.copy_row(row, out));
        values[self.row * cols..(self.row + 1) * cols].fill(f32::NAN);
        Ok(Frozen::from_f32(values, rows, cols))
    }
}

fn source() -> Poisoned {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let norm = name.contains("layer_norm");
        let deviation = match shape[..] {
            _ if norm => 0.1,
            _ if name.contains("shared") || name.contains("relative") => 1.0,
            [_, cols] => 1.5 / (cols as f32).sqrt(),
            _ => 1.0,
        };
        RandomTensor { name, shape, mean: f32::from(u8::from(norm)), deviation }
    };
    let tensors = config().tensors().into_iter().map(tensor).collect();
    let random = Random::new(tensors, DType::F32, SEED).unwrap();
    Poisoned { random, row: id("poison") as usize }
}

pub(crate) fn model() -> Arc<T5> {
    Arc::new(T5::load(config(), &source(), DType::F32).unwrap())
}

pub(crate) fn engine(microbatch_tokens: usize, recompute: Recompute) -> Engine {
    Engine::new(model(), EngineOptions { microbatch_tokens: Some(microbatch_tokens), recompute })
}

pub(crate) fn backbone() -> Backbone {
    Backbone {
        engine: engine(64, Recompute::Auto),
        tokenizer: tokenizer(),
        fingerprint: "ab".repeat(32).parse().unwrap(),
        num_parameters: config().num_parameters(),
        name: "tiny".to_owned(),
        source: Arc::new(source()),
    }
}

/// A directory with data files: which colour an input begins with decides the target.
pub(crate) struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        files.write("train.jsonl", &records(0..44));
        files.write("eval.jsonl", &records(44..60));
        files
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// A short run of these files into `out`.
    pub(crate) fn flags(&self, out: &str) -> PartialSpec {
        PartialSpec {
            model: Some("tiny".to_owned()),
            train: Some(self.path("train.jsonl")),
            eval: Some(self.path("eval.jsonl")),
            out: Some(self.path(out)),
            prompt_length: Some(5),
            batch_size: Some(8),
            steps: Some(24),
            max_target_length: Some(4),
            eval_every: Some(4),
            checkpoint_every: Some(3),
            ..PartialSpec::default()
        }
    }

    pub(crate) fn spec(&self, out: &str) -> TrainSpec {
        resolve(self.flags(out))
    }
}

pub(crate) fn resolve(flags: PartialSpec) -> TrainSpec {
    TrainSpec::resolve(flags, None, false).unwrap()
}

fn records(numbers: std::ops::Range<usize>) -> String {
    let colours = [("red", "yes"), ("green", "no"), ("blue", "maybe")];
    let others = ["one", "two three", "four is not", "was"];
    let record = |n: usize| {
        let (colour, target) = colours[n % 3];
        format!("{{\"inputs\": \"{colour} {}\", \"targets\": \"{target}\"}}\n", others[n * 7 / 3 % 4])
    };
    numbers.map(record).collect()
}

/// Asks to stop after the step with this number.
pub(crate) struct StopAfter<'a> {
    pub(crate) step: u64,
    pub(crate) control: &'a Control,
}

impl Observer for StopAfter<'_> {
    fn on(&mut self, event: &Event<'_>) {
        if matches!(event, Event::Step { update, .. } if update.step == self.step) {
            self.control.request_stop();
        }
    }
}

/// The last evaluation of a run.
#[derive(Default)]
pub(crate) struct Last(pub(crate) Option<Evaluation>);

impl Observer for Last {
    fn on(&mut self, event: &Event<'_>) {
        if let Event::Evaluated { evaluation, .. } = event {
            self.0 = Some((*evaluation).clone());
        }
    }
}

/// The losses of a run's steps.
pub(crate) fn losses(out: &Path) -> Vec<f64> {
    let step = |line: Line| match line {
        Line::Step { loss, .. } => Some(loss),
        Line::Eval { .. } => None,
    };
    log::read(&out.join("metrics.jsonl")).unwrap().into_iter().filter_map(step).collect()
}

/// Every file of a directory that a run leaves and that no clock has written in: path and content.
pub(crate) fn tree(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    walk(dir, "", &mut files);
    files.sort();
    files
}

fn walk(dir: &Path, prefix: &str, files: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        if path.is_symlink() {
            files.push((name, std::fs::read_link(&path).unwrap().to_str().unwrap().into()));
        } else if path.is_dir() {
            walk(&path, &format!("{name}/"), files);
        } else if name == "metrics.jsonl" {
            files.push((name, without_clock(&std::fs::read_to_string(&path).unwrap()).into()));
        } else if name != "run.toml" && !name.starts_with("events.out.tfevents.") {
            files.push((name, std::fs::read(&path).unwrap()));
        }
    }
}

fn without_clock(metrics: &str) -> String {
    let strip = |line: &str| {
        let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        line.retain(|field, _| !incipit_tune::log::CLOCK_FIELDS.contains(&field.as_str()));
        serde_json::to_string(&line).unwrap()
    };
    metrics.lines().map(strip).collect::<Vec<_>>().join("\n")
}
