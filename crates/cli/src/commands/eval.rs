//! `incipit eval`: what a prompt is worth on a file of examples.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use incipit_collective::Ranks;
use incipit_data::metrics::Metric;
use incipit_data::tasks::{ExampleId, Split, Task, TaskSplit, Use, submission};
use incipit_data::{LoadOptions, TaskFormat, TextExample, TokenizedSet, labels_of, load_text, tokenize};
use incipit_tune::atomic;
use incipit_tune::control::Control;
use incipit_tune::evaluate::{EvalOptions, Evaluation, Prediction, evaluate};
use serde::Serialize;

use super::backbone::{self, Ready};
use crate::args::{BackboneArgs, FormatArgs, Global, NamedTaskArgs, choice, names, split};
use crate::exit::{Exit, bad_input};
use crate::output::{self, Printed};
use crate::progress::{self, note, warn};
use crate::ranks::{self, RankArgs};
use crate::{report, units};

/// More distinct targets than this are taken for free text.
const MAX_LABELS: usize = 100;

const AFTER_HELP: &str = "\
Answers by greedy decoding are compared with the targets, and with --task as the benchmark does it. What flags leave open (model, \
templates, labels, lengths, metrics) is taken from the run that made the prompt, where its run.toml lies beside it.

Examples:
  incipit eval --prompt runs/q --data test.jsonl
      the run's best prompt, on its model and with its templates

  incipit eval --model ./t5 --prompt adapter/ --data test.csv \\
      --targets \"{label}\" --metrics accuracy,macro-f1 --output predictions.jsonl

  incipit eval --model ./t5 --data test.jsonl
      the bare model, to compare with

  incipit eval --prompt runs/boolq --task boolq --data-dir SuperGLUE
  incipit eval --prompt runs/boolq --task boolq --data-dir SuperGLUE --split test --submission .
      a benchmark's development split; and BoolQ.jsonl for SuperGLUE's site, whose test split has no labels here";

/// Flags of `eval`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// Examples to measure on
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    data: Option<PathBuf>,
    #[command(flatten)]
    named: NamedTaskArgs,
    /// Part of the benchmark's data [default: dev]
    #[arg(long, help_heading = "Data", requires = "task", value_parser = split())]
    split: Option<Split>,
    #[command(flatten)]
    format: FormatArgs,
    /// What is measured [default: the benchmark's, else that of the run that made the prompt, else accuracy]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = choice::<Metric>(names::METRICS))]
    metrics: Option<Vec<Metric>>,
    /// File to write the predictions to, one JSON object a line: index, inputs, target, prediction, loss; with --task
    /// the benchmark's id besides
    #[arg(long, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    /// File of predictions for SuperGLUE's site to write, or the directory for it (BoolQ.jsonl and so on)
    #[arg(long, value_name = "DIR|FILE.jsonl", requires = "task")]
    submission: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

#[derive(Serialize)]
struct Summary {
    task: Option<&'static Task>,
    split: Option<&'static str>,
    examples: usize,
    metrics: serde_json::Map<String, serde_json::Value>,
    legal_share: Option<f64>,
    majority_share: Option<f64>,
    /// None without targets.
    loss: Option<f64>,
    seconds: f64,
    output: Option<PathBuf>,
    submission: Option<PathBuf>,
}

/// A benchmark's split.
struct Named {
    task: &'static Task,
    split: Split,
    found: TaskSplit,
    /// The file for SuperGLUE's site.
    submission: Option<PathBuf>,
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
    for path in [&summary.output, &summary.submission].into_iter().flatten().filter(|_| !global.json) {
        note(&format!("predictions are in {}", path.display()));
    }
    Ok(Exit::Ok)
}

fn on_rank(args: &EvalArgs, ranks: &Arc<Ranks>, global: &Global) -> Result<Summary> {
    // Before the backbone, which may take minutes.
    let named = named(args, ranks.leads())?;
    let ready = backbone::load(&args.backbone, &args.format, ranks)?;
    let texts = match &named {
        Some(named) => named.found.texts(),
        None => examples(args, &ready)?,
    };
    let set = tokenized(&texts, &ready)?;
    let options = options(args, &ready, &set, named.as_ref())?;
    let what = || format!("evaluating {} examples", units::count(set.examples.len() as u64));
    let leads = ready.ranks().leads();
    let spinner = leads.then(|| progress::spinner(&what(), global));
    let start = Instant::now();
    let Ready { backbone, prompt, .. } = &ready;
    let evaluation =
        evaluate(&backbone.engine, prompt.as_ref(), &set, &backbone.tokenizer, &options, &Control::new())?;
    drop(spinner);
    if let Some(path) = args.output.as_ref().filter(|_| leads) {
        let lines = match &named {
            Some(named) => named_lines(&evaluation, &named.found)?,
            None => json_lines(&evaluation)?,
        };
        atomic::write_file(path, &lines)?;
    }
    if let Some(named) = named.as_ref().filter(|_| leads) {
        named.submit(&evaluation)?;
    }
    Ok(summary(args, &evaluation, start.elapsed().as_secs_f64(), named))
}

/// The split that the flags name, read; none if they name no task.
fn named(args: &EvalArgs, leads: bool) -> Result<Option<Named>> {
    let format = &args.format;
    let others = [
        ("--data", args.data.is_some()),
        ("--inputs", format.inputs.is_some()),
        ("--targets", format.targets.is_some()),
        ("--labels", format.labels.is_some()),
    ];
    let Some((task, dir)) = args.named.resolve(&others)? else {
        return match args.data {
            Some(_) => Ok(None),
            None => bad_input("--data is missing: give a file of examples, or a named task with --task"),
        };
    };
    let submission = args.submission.as_deref().map(|path| submission_file(task, path)).transpose()?;
    let split = args.split.unwrap_or(Split::Dev);
    let options = LoadOptions { skip_bad_records: format.skip_bad_records };
    let found = task.read(dir, split, Use::Evaluation, options)?;
    if leads && found.skipped > 0 {
        warn(&format!("{}: {} records do not fit and are left out", found.path.display(), found.skipped));
    }
    if let Some(said) = found.left_out().filter(|_| leads) {
        warn(&said);
    }
    if !found.is_labelled() {
        if args.output.is_none() && submission.is_none() {
            return bad_input(format!(
                "the {split} split of {task} has no labels to measure against: give --output or --submission for the predictions"
            ));
        }
        if leads {
            note(&format!("the {split} split of {task} has no labels: predictions only, no metrics"));
        }
    }
    Ok(Some(Named { task, split, found, submission }))
}

/// Where the file for SuperGLUE's site goes.
fn submission_file(task: &Task, path: &Path) -> Result<PathBuf> {
    let empty = submission(task, &[], &[])?;
    match path.extension() {
        _ if path.is_dir() => Ok(path.join(empty.file_name)),
        Some(end) if end == "jsonl" => Ok(path.to_owned()),
        _ => bad_input(format!(
            "--submission {} is neither a directory that is there nor the name of a .jsonl file: give one of the two",
            path.display()
        )),
    }
}

impl Named {
    /// Writes the file for SuperGLUE's site, if it is asked for.
    fn submit(&self, evaluation: &Evaluation) -> Result<()> {
        let Some(path) = &self.submission else { return Ok(()) };
        let predictions: Vec<String> = evaluation.predictions.iter().map(|p| p.prediction.clone()).collect();
        let made = submission(self.task, &self.found.examples, &predictions)?;
        if made.illegal > 0 {
            warn(&format!(
                "{} predictions are none that the site knows; the file has another answer in their place",
                made.illegal
            ));
        }
        Ok(atomic::write_file(path, made.text.as_bytes())?)
    }
}

fn options(args: &EvalArgs, ready: &Ready, set: &TokenizedSet, named: Option<&Named>) -> Result<EvalOptions> {
    let Some(Named { task, found, .. }) = named else {
        let labels = label_set(&ready.format, &set.texts);
        return Ok(EvalOptions {
            metrics: args.metrics.as_ref().unwrap_or(&ready.metrics).clone(),
            max_new_tokens: max_new_tokens(ready, labels.as_deref())?,
            labels,
            ..EvalOptions::default()
        });
    };
    let (labels, references) = (task.label_texts(), found.references());
    let metrics = args.metrics.as_deref().unwrap_or(task.metrics);
    Ok(EvalOptions {
        metrics: if references.is_some() { metrics.to_vec() } else { Vec::new() },
        selection: task.selection,
        max_new_tokens: max_new_tokens(ready, labels.as_deref())?,
        labels,
        references: references.map(Arc::new),
    })
}

/// Those of the file.
fn examples(args: &EvalArgs, ready: &Ready) -> Result<Vec<TextExample>> {
    let path = args.data.as_deref().unwrap_or(Path::new(""));
    let options = LoadOptions { skip_bad_records: args.format.skip_bad_records };
    let loaded = load_text(path, &ready.format, options)?;
    if ready.ranks().leads() && loaded.skipped > 0 {
        warn(&format!("{}: {} records do not fit and are left out", path.display(), loaded.skipped));
    }
    Ok(loaded.examples)
}

fn tokenized(texts: &[TextExample], ready: &Ready) -> Result<TokenizedSet> {
    let leads = ready.ranks().leads();
    let Ready { backbone, max_input_length, max_target_length, .. } = ready;
    let vocabulary = backbone.config().vocab_size;
    let set = tokenize(texts, &backbone.tokenizer, *max_input_length, *max_target_length, vocabulary)?;
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

/// A benchmark's prediction; a line of the file of predictions.
#[derive(Serialize)]
struct NamedPrediction<'a> {
    id: &'a ExampleId,
    #[serde(flatten)]
    prediction: &'a Prediction,
}

/// The same without a label.
#[derive(Serialize)]
struct Unlabelled<'a> {
    id: &'a ExampleId,
    index: usize,
    inputs: &'a str,
    prediction: &'a str,
}

/// A benchmark's predictions as they are written to a file.
fn named_lines(evaluation: &Evaluation, found: &TaskSplit) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (prediction, example) in evaluation.predictions.iter().zip(&found.examples) {
        let id = &example.id;
        if example.reference.is_some() {
            serde_json::to_writer(&mut bytes, &NamedPrediction { id, prediction })?;
        } else {
            let Prediction { index, inputs, prediction, .. } = prediction;
            serde_json::to_writer(&mut bytes, &Unlabelled { id, index: *index, inputs, prediction })?;
        }
        bytes.push(b'\n');
    }
    Ok(bytes)
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

fn summary(args: &EvalArgs, evaluation: &Evaluation, seconds: f64, named: Option<Named>) -> Summary {
    let has_targets = named.as_ref().is_none_or(|named| named.found.is_labelled());
    Summary {
        task: named.as_ref().map(|named| named.task),
        split: named.as_ref().map(|named| named.split.name()),
        examples: evaluation.predictions.len(),
        metrics: evaluation
            .metrics
            .iter()
            .map(|(metric, value)| (metric.to_string(), (*value).into()))
            .collect(),
        legal_share: evaluation.legal_share,
        majority_share: evaluation.legal_share.filter(|_| has_targets).and(majority(evaluation)),
        loss: has_targets.then_some(evaluation.loss),
        seconds,
        output: args.output.clone(),
        submission: named.and_then(|named| named.submission),
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
        rows.extend(self.loss.map(|loss| vec!["loss per token".to_owned(), format!("{loss:.4}")]));
        rows.push(vec!["examples".to_owned(), units::count(self.examples as u64)]);
        rows.push(vec!["examples a second".to_owned(), units::rate(self.examples as f64 / self.seconds)]);
        output::table(&["measure", "value"], &rows, true)
    }
}
