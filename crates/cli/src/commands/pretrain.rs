//! `incipit pretrain`: trains a whole model on plain text, from random weights or from another model's.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use candle_core::DType;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args};
use incipit_data::pretrain::Objective;
use incipit_model::Config;
use incipit_tune::spec::{INITIAL_DIR, Method, PartialSpec, Precision, RUN_FILE, TrainSpec};
use incipit_weights::{Random, load_tokenizer, write_safetensors};

use crate::args::Global;
use crate::commands::train::{self, MachineArgs};
use crate::commands::training::{CheckArgs, OptimizationArgs};
use crate::exit::{Exit, bad_input};
use crate::progress::note;
use crate::ranks::{self, RankArgs};

/// Learning rate of a model that begins with random weights (Raffel et al. 2020), and of one that goes on.
const LEARNING_RATES: (f64, f64) = (0.01, 0.001);

/// A tokenizer's files, one kind or both.
const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json"];

const AFTER_HELP: &str = "\
OUT/model receives the model as Hugging Face's libraries read it, with the lowest evaluation loss where --eval is given, or as it was \
last. All else is as with `incipit train`: checkpoints, metrics.jsonl, report.html, --resume.

Text: .txt files, in which each line is a document; records (.jsonl, .parquet) with a field `text`; also .gz. Documents are laid end to
end and cut, so that no example is padded, however large the corpus is: it is read as it goes by.

Examples:
  incipit pretrain --config tiny.json --tokenizer ./t5-small --corpus books/ --out models/tiny \\
      --max-input-length 64 --max-target-length 32 --batch-size 64 --steps 5000
      a new model of the shape that tiny.json (a T5's config.json) says, by span corruption

  incipit pretrain --model models/tiny/model --corpus books/ --out models/tiny-lm --objective prefix-lm --steps 500
      goes on with it as a language model, as Lester et al. adapt T5 before they tune prompts

Next: incipit train --model OUT/model --help";

/// Flags of `pretrain`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PretrainArgs {
    /// Model to go on with: a directory, or a name on the Hugging Face Hub
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "Run", conflicts_with = "config")]
    model: Option<String>,
    /// Begin with random weights of the shape in this file, a T5's config.json
    #[arg(long, value_name = "FILE", help_heading = "Run", requires = "tokenizer")]
    config: Option<PathBuf>,
    /// Directory of the tokenizer of a new model
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    tokenizer: Option<PathBuf>,
    /// Text to learn from: a file, or a directory of files
    #[arg(long, value_name = "PATH", help_heading = "Run")]
    corpus: Option<PathBuf>,
    /// Text that is not learnt from, to measure the loss on
    #[arg(long, value_name = "PATH", help_heading = "Run")]
    eval: Option<PathBuf>,
    /// Directory of the run: new, or empty, or with --resume a run's
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: PathBuf,
    /// Go on with the run in --out from its last checkpoint
    #[arg(long, help_heading = "Run")]
    resume: bool,
    /// What of the text is learnt: what was taken out of it, or how it goes on [default: span-corruption]
    #[arg(long, help_heading = "Objective", value_parser = objective())]
    objective: Option<Objective>,
    /// Share of the text that span corruption takes out [default: 0.15]
    #[arg(long, value_name = "SHARE", help_heading = "Objective")]
    noise_density: Option<f64>,
    /// Tokens that span corruption takes out together, on average [default: 3]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    mean_span_length: Option<f64>,
    /// Longest input in tokens [default: 512]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    max_input_length: Option<usize>,
    /// Longest target in tokens [default: 114 for span corruption, else as the input]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    max_target_length: Option<usize>,
    /// Examples of the evaluation text that are looked at [default: 256]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    eval_examples: Option<usize>,
    /// Whether Adafactor's learning rate is relative to the size of what is trained [default: true]
    #[arg(long, value_name = "true|false", help_heading = "Optimization", action = ArgAction::Set)]
    parameter_scaling: Option<bool>,
    #[command(flatten)]
    optimization: OptimizationArgs,
    #[command(flatten)]
    checks: CheckArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

/// Trains, then prints what came of it.
///
/// # Errors
/// As those of [`train::run`]; also if a new model cannot be written.
pub(crate) fn run(args: &PretrainArgs, global: &Global) -> Result<Exit> {
    let options = args.ranks.options();
    let goes_on = args.resume && args.out.join(RUN_FILE).exists();
    let flags = if goes_on { args.flags(global, None) } else { args.beginning(global)? };
    let spec = TrainSpec::resolve(PartialSpec { out: Some(args.out.clone()), ..flags }, None, args.resume)?;
    train::carry_out(&spec, &options, global)
}

impl PretrainArgs {
    /// The flags, and what holds where one is left out, of a run that begins.
    fn beginning(&self, global: &Global) -> Result<PartialSpec> {
        if self.corpus.is_none() {
            return bad_input(
                "--corpus is missing: give the text to learn from, a file or a directory of files",
            );
        }
        let (from_random, from_model) = LEARNING_RATES;
        let (model, lr) = match (&self.model, &self.config, &self.tokenizer) {
            (Some(model), ..) => (model.clone(), from_model),
            (None, Some(config), Some(tokenizer)) => (self.random_model(config, tokenizer)?, from_random),
            _ => {
                return bad_input(
                    "there is no model to train: give one with --model, or a new one's shape with --config and its --tokenizer",
                );
            }
        };
        let objective = self.objective.unwrap_or_default();
        let inputs = self.max_input_length.unwrap_or(512);
        let targets = match objective {
            Objective::SpanCorruption => 114,
            Objective::PrefixLm => inputs,
        };
        let defaults = PartialSpec {
            objective: Some(objective),
            method: Some(Method::Model),
            max_input_length: Some(inputs),
            max_target_length: Some(targets),
            lr: Some(lr),
            dropout: Some(0.0),
            ..PartialSpec::default()
        };
        Ok(self.flags(global, Some(model)).over(defaults))
    }

    /// What the flags say. Absent ones leave the word to the run's file.
    fn flags(&self, global: &Global, model: Option<String>) -> PartialSpec {
        PartialSpec {
            model,
            train: self.corpus.clone(),
            eval: self.eval.clone(),
            objective: self.objective,
            parameter_scaling: self.parameter_scaling,
            noise_density: self.noise_density,
            mean_span_length: self.mean_span_length,
            max_input_length: self.max_input_length,
            max_target_length: self.max_target_length,
            eval_examples: self.eval_examples,
            threads: global.threads.map(usize::from),
            ..self
                .optimization
                .spec()
                .over(self.checks.spec())
                .over(self.machine.spec())
                .over(self.ranks.spec())
        }
    }

    /// Writes the model that the run begins with, and says where.
    fn random_model(&self, config: &Path, tokenizer: &Path) -> Result<String> {
        ranks::refuse_several_processes()?;
        let dir = self.out.join(INITIAL_DIR);
        if dir.exists() {
            let dir = dir.display();
            return bad_input(format!("{dir} is there already: remove it, or choose another --out"));
        }
        let text =
            std::fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
        let mut shape = Config::from_json(&text).with_context(|| config.display().to_string())?;
        // T5 1.0's head is its embedding, T5 1.1's is not.
        shape.own_head = !shape.scale_logits;
        let mut files = tokenizer_files(tokenizer)?;
        files.push(("config.json".to_owned(), text.into_bytes()));
        let seed = self.optimization.spec().seed.unwrap_or_default();
        let random = Random::new(shape.random_tensors(), DType::F32, seed)?.with_side_files(files);
        let dtype = self.machine.spec().dtype.unwrap_or(Precision::Bf16);
        note(&format!("writing random weights to {}", dir.display()));
        write_safetensors(&dir, &random, dtype.into(), u64::MAX)?;
        Ok(dir.display().to_string())
    }
}

fn objective() -> impl TypedValueParser<Value = Objective> {
    let named = |name: String| Objective::ALL.into_iter().find(|objective| objective.name() == name);
    PossibleValuesParser::new(Objective::ALL.map(Objective::name))
        .map(move |name| named(name).expect("no other name is let through"))
}

/// The files of a tokenizer, which must be one that can be read.
fn tokenizer_files(dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    load_tokenizer(dir)?;
    let found = TOKENIZER_FILES.into_iter().filter(|name| dir.join(name).is_file());
    let read = |name: &str| {
        let path = dir.join(name);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok((name.to_owned(), bytes))
    };
    found.map(read).collect()
}
