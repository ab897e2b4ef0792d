//! `incipit eval`: what a prompt is worth on a file of examples.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use incipit_collective::Ranks;
use incipit_data::metrics::Metric;
use incipit_data::{LoadOptions, TaskFormat, TextExample, TokenizedSet, labels_of, load_text, tokenize};
use incipit_tune::atomic;
use incipit_tune::control::Control;
use incipit_tune::evaluate::{EvalOptions, Evaluation, evaluate};
use serde::Serialize;

use super::backbone::{self, Ready};
use crate::args::{BackboneArgs, FormatArgs, Global, choice, names};
use crate::exit::Exit;
use crate::output::{self, Printed};
use crate::progress::{self, note, warn};
use crate::ranks::{self, RankArgs};
use crate::{report, units};

/// More distinct targets than this are taken for free text.
const MAX_LABELS: usize = 100;

const AFTER_HELP: &str = "\
Answers by greedy decoding are compared with the targets. What flags leave open (model, templates, labels, lengths, metrics) is \
taken from the run that made the prompt, where its run.toml lies beside it.

Examples:
  incipit eval --prompt runs/q --data test.jsonl
      the run's best prompt, on its model and with its templates

  incipit eval --model ./t5 --prompt adapter/ --data test.csv \\
      --targets \"{label}\" --metrics accuracy,macro-f1 --output predictions.jsonl

  incipit eval --model ./t5 --data test.jsonl
      the bare model, to compare with";

/// Flags of `eval`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// Examples to measure on
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    data: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    /// What is measured [default: that of the run that made the prompt, else accuracy]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = choice::<Metric>(names::METRICS))]
    metrics: Option<Vec<Metric>>,
    /// File to write the predictions to, one JSON object a line: index, inputs, target, prediction, loss
    #[arg(long, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

#[derive(Serialize)]
struct Summary {
    examples: usize,
    metrics: serde_json::Map<String, serde_json::Value>,
    legal_share: Option<f64>,
    majority_share: Option<f64>,
    loss: f64,
    seconds: f64,
    output: Option<PathBuf>,
}

/// Evaluates, writes the predictions where asked to, and prints the scores.
///
/// # Errors
/// If something given cannot be used, a loss is not finite, or the predictions cannot be written.
pub(crate) fn run(args: &EvalArgs, global: &Global) -> Result<Exit> {
    let summary =
        ranks::run(&args.ranks, args.backbone.device.unwrap_or_default(), global.threads, |ranks| {
            on_rank(args, ranks, global)
        })?;
    output::print(&summary, global.json)?;
    if let Some(path) = args.output.as_ref().filter(|_| !global.json) {
        note(&format!("predictions are in {}", path.display()));
    }
    Ok(Exit::Ok)
}

fn on_rank(args: &EvalArgs, ranks: &Arc<Ranks>, global: &Global) -> Result<Summary> {
    let ready = backbone::load(&args.backbone, &args.format, ranks)?;
    let set = examples(args, &ready)?;
    let labels = label_set(&ready.format, &set.texts);
    let options = EvalOptions {
        metrics: args.metrics.as_ref().unwrap_or(&ready.metrics).clone(),
        max_new_tokens: max_new_tokens(&ready, labels.as_deref())?,
        labels,
    };
    let what = || format!("evaluating {} examples", units::count(set.examples.len() as u64));
    let leads = ready.ranks().leads();
    let spinner = leads.then(|| progress::spinner(&what(), global));
    let start = Instant::now();
    let Ready { backbone, prompt, .. } = &ready;
    let evaluation =
        evaluate(&backbone.engine, prompt.as_ref(), &set, &backbone.tokenizer, &options, &Control::new())?;
    drop(spinner);
    if let Some(path) = args.output.as_ref().filter(|_| leads) {
        atomic::write_file(path, &json_lines(&evaluation)?)?;
    }
    Ok(summary(&evaluation, start.elapsed().as_secs_f64(), args.output.clone()))
}

fn examples(args: &EvalArgs, ready: &Ready) -> Result<TokenizedSet> {
    let options = LoadOptions { skip_bad_records: args.format.skip_bad_records };
    let loaded = load_text(&args.data, &ready.format, options)?;
    let leads = ready.ranks().leads();
    if leads && loaded.skipped > 0 {
        warn(&format!("{}: {} records do not fit and are left out", args.data.display(), loaded.skipped));
    }
    let Ready { backbone, max_input_length, max_target_length, .. } = ready;
    let vocabulary = backbone.config().vocab_size;
    let set =
        tokenize(&loaded.examples, &backbone.tokenizer, *max_input_length, *max_target_length, vocabulary)?;
    if leads && set.truncated_inputs > 0 {
        let (cut, longest) = (set.truncated_inputs, set.longest_input);
        warn(&format!(
            "{cut} inputs are longer than {max_input_length} tokens and are cut; --max-input-length {longest} would cut none"
        ));
    }
    if leads && set.truncated_targets > 0 {
        let (cut, longest) = (set.truncated_targets, set.longest_target);
        warn(&format!(
            "{cut} targets are longer than {max_target_length} tokens and are cut; --max-target-length {longest} would cut none"
        ));
    }
    Ok(set)
}

/// The predictions as they are written to a file.
///
/// # Errors
/// If a number cannot be written as JSON.
pub(crate) fn json_lines(evaluation: &Evaluation) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for prediction in &evaluation.predictions {
        serde_json::to_writer(&mut bytes, prediction)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

fn summary(evaluation: &Evaluation, seconds: f64, output: Option<PathBuf>) -> Summary {
    Summary {
        examples: evaluation.predictions.len(),
        metrics: evaluation
            .metrics
            .iter()
            .map(|(metric, value)| (metric.to_string(), (*value).into()))
            .collect(),
        legal_share: evaluation.legal_share,
        majority_share: evaluation.legal_share.and(majority(evaluation)),
        loss: evaluation.loss,
        seconds,
        output,
    }
}

/// The texts that are answers at all: those of the label map, or the targets where so few stand for so many examples that they are classes.
pub(crate) fn label_set(format: &TaskFormat, examples: &[TextExample]) -> Option<Vec<String>> {
    match &format.labels {
        Some(map) => Some(map.texts().map(str::to_owned).collect()),
        None => labels_of(examples, MAX_LABELS.min(examples.len() / 2)),
    }
}

/// As in training: an answer longer than every label is none, so that nothing is lost by ending it there.
fn max_new_tokens(ready: &Ready, labels: Option<&[String]>) -> Result<usize> {
    let Some(labels) = labels else { return Ok(ready.max_target_length) };
    let mut longest = 0;
    for label in labels {
        let encoded = ready.backbone.tokenizer.encode(label.as_str(), false);
        let encoded = encoded.map_err(|error| anyhow!("the label {label:?} cannot be tokenized: {error}"))?;
        // One for `</s>`, and one that tells a label from a text that begins with it.
        longest = longest.max(encoded.len() + 2);
    }
    Ok(longest.min(ready.max_target_length))
}

/// The share of the most frequent target: what an answer that never changes would reach.
pub(crate) fn majority(evaluation: &Evaluation) -> Option<f64> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for prediction in &evaluation.predictions {
        *counts.entry(prediction.target.as_str()).or_default() += 1;
    }
    counts.values().max().map(|most| *most as f64 / evaluation.predictions.len() as f64)
}

impl Printed for Summary {
    fn text(&self) -> String {
        let score = |value: &serde_json::Value| value.as_f64().map_or_else(|| "-".to_owned(), units::percent);
        let mut rows: Vec<Vec<String>> =
            self.metrics.iter().map(|(name, value)| vec![report::words(name), score(value)]).collect();
        rows.extend(self.majority_share.map(|v| vec!["(majority class)".to_owned(), units::percent(v)]));
        rows.extend(self.legal_share.map(|v| vec!["legal labels".to_owned(), units::percent(v)]));
        rows.push(vec!["loss per token".to_owned(), format!("{:.4}", self.loss)]);
        rows.push(vec!["examples".to_owned(), units::count(self.examples as u64)]);
        rows.push(vec!["examples a second".to_owned(), units::rate(self.examples as f64 / self.seconds)]);
        output::table(&["measure", "value"], &rows, true)
    }
}
