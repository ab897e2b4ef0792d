//! `incipit eval`: what a prompt is worth on a file of examples.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use incipit_collective::Ranks;
use incipit_data::metrics::Metric;
use incipit_data::pretrain::add_sentinel;
use incipit_data::tasks::{ExampleId, Split, Task, TaskSplit, Use, submission, transferred_labels};
use incipit_data::{
    LabelMap, LoadOptions, TaskFormat, TextExample, TokenizedSet, labels_of, load_text, tokenize,
};
use incipit_tune::atomic;
use incipit_tune::control::Control;
use incipit_tune::evaluate::{EvalOptions, Evaluation, evaluate};
use incipit_tune::rank::Predict;
use serde::Serialize;
use serde_json::{Map, Value};

use super::backbone::{self, Chosen, Ready, Settings};
use super::task::prefixed;
use crate::args::{BackboneArgs, FormatArgs, Global, NamedTaskArgs, check_place, choice, names, split};
use crate::exit::{Exit, bad_input};
use crate::output::{self, Printed};
use crate::progress::{self, note, warn};
use crate::ranks::{self, RankArgs};
use crate::{report, units};

/// More distinct targets than this are taken for free text.
const MAX_LABELS: usize = 100;

const AFTER_HELP: &str = "\
Answers are compared with the targets, and with --task as the benchmark does it. They are what the model writes by greedy decoding, or \
with --predict rank the label (of --labels, of the benchmark, or of few different targets) that it finds likeliest. What flags leave open \
(model, templates, labels, lengths, metrics, way of predicting) is taken from the run that made the prompt, where its run.toml lies \
beside it.

Examples:
  incipit eval --prompt runs/q --data test.jsonl
      the run's best prompt, on its model and with its templates

  incipit eval --model ./t5 --prompt adapter/ --data test.csv \\
      --targets \"{label}\" --metrics accuracy,macro-f1 --output predictions.jsonl

  incipit eval --model ./t5 --data test.jsonl
      the bare model, to compare with

  incipit eval --prompt runs/boolq --task boolq --data-dir SuperGLUE
  incipit eval --prompt runs/boolq --task boolq --data-dir SuperGLUE --split test --submission .
      a benchmark's development split; and BoolQ.jsonl for SuperGLUE's site, whose test split has no labels here

  incipit eval --prompt runs/qqp --task mrpc --data-dir MRPC
      a prompt on another task than it was trained on; labels of QQP and MRPC are read as each other's";

/// Flags of `eval`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    #[command(flatten)]
    measure: MeasureArgs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

/// What is measured, on what, and where the predictions go.
#[derive(Args)]
pub(crate) struct MeasureArgs {
    /// Examples to measure on
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    data: Option<PathBuf>,
    #[command(flatten)]
    named: NamedTaskArgs,
    /// Part of the benchmark's data [default: dev]
    #[arg(long, help_heading = "Data", requires = "task", value_parser = split())]
    split: Option<Split>,
    /// Text before every input, and a space between: the name of the task for a model that learnt several (`task mix`)
    #[arg(long, value_name = "TEXT", help_heading = "Data")]
    input_prefix: Option<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// What is measured [default: the benchmark's, else that of the run that made the prompt, else accuracy]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = choice::<Metric>(names::METRICS))]
    metrics: Option<Vec<Metric>>,
    /// How predictions are made: decode, what the model writes, or rank, the likeliest of the labels
    /// [default: that of the run that made the prompt, else decode]
    #[arg(long, value_parser = choice::<Predict>(names::PREDICTS))]
    predict: Option<Predict>,
    /// File to write the predictions to, one JSON object a line: index, inputs, target, prediction, loss; with --task
    /// the benchmark's id besides, and with --predict rank each label's log-likelihood
    #[arg(long, value_name = "FILE.jsonl")]
    pub(crate) output: Option<PathBuf>,
    /// File of predictions for SuperGLUE's or GLUE's site to write, or the directory for it (BoolQ.jsonl, SST-2.tsv and so on)
    #[arg(long, value_name = "DIR|FILE", requires = "task")]
    submission: Option<PathBuf>,
}

#[derive(Serialize)]
struct Summary {
    task: Option<&'static Task>,
    split: Option<&'static str>,
    examples: usize,
    metrics: Map<String, Value>,
    legal_share: Option<f64>,
    majority_share: Option<f64>,
    /// None without targets.
    loss: Option<f64>,
    seconds: f64,
    output: Option<PathBuf>,
    submission: Option<PathBuf>,
}

/// A benchmark's split.
pub(crate) struct Named {
    pub(crate) task: &'static Task,
    pub(crate) split: Split,
    found: TaskSplit,
    /// The file for the benchmark's site.
    pub(crate) submission: Option<PathBuf>,
}

/// Evaluates, writes the predictions where asked to, and prints the scores.
///
/// # Errors
/// If something given cannot be used, a loss is not finite, or the predictions cannot be written.
pub(crate) fn run(args: &EvalArgs, global: &Global) -> Result<Exit> {
    let summary =
        ranks::run(&args.ranks, args.backbone.model.device.unwrap_or_default(), global.threads, |ranks| {
            on_rank(args, ranks, global)
        })?;
    output::print(&summary, global.json)?;
    tell_files([&summary.output, &summary.submission], global);
    Ok(Exit::Ok)
}

/// Says where predictions were written.
pub(crate) fn tell_files(files: [&Option<PathBuf>; 2], global: &Global) {
    for path in files.into_iter().flatten().filter(|_| !global.json) {
        note(&format!("predictions are in {}", path.display()));
    }
}

fn on_rank(args: &EvalArgs, ranks: &Arc<Ranks>, global: &Global) -> Result<Summary> {
    // Before the weights, which may take minutes.
    let named = named(&args.measure, ranks.leads())?;
    let prompts = backbone::read(args.backbone.prompt.as_slice())?;
    let chosen = backbone::choose(&args.backbone.model, prompts, &args.measure.format, ranks)?;
    let (set, options) = prepared(&args.measure, &chosen, named.as_ref())?;
    let ready = chosen.load(global)?;
    let spinner = spinner(&set, &ready, global);
    let start = Instant::now();
    let Ready { backbone, prompts, .. } = &ready;
    let evaluation =
        evaluate(&backbone.engine, prompts.first(), &set, &backbone.tokenizer, &options, &Control::new())?;
    drop(spinner);
    if ranks.leads() {
        let written: Vec<&str> = evaluation.predictions.iter().map(|p| p.prediction.as_str()).collect();
        hand_over(&args.measure, &evaluation.predictions, &written, named.as_ref())?;
    }
    Ok(summary(&args.measure, &evaluation, start.elapsed().as_secs_f64(), named))
}

/// The examples to measure on, and how.
///
/// # Errors
/// If the data cannot be used, or labels are to be ranked and there are none.
pub(crate) fn prepared(
    args: &MeasureArgs,
    chosen: &Chosen,
    named: Option<&Named>,
) -> Result<(TokenizedSet, EvalOptions)> {
    let mut texts = match named {
        Some(named) => named.found.texts(),
        None => examples(args, chosen)?,
    };
    let transfer = named.and_then(|named| Transfer::of(chosen.settings.trained?, named.task));
    if let Some(transfer) = &transfer {
        texts.iter_mut().for_each(|text| text.targets = transfer.in_words_of_prompt(&text.targets));
    }
    if let Some(prefix) = &args.input_prefix {
        texts.iter_mut().for_each(|text| text.inputs = prefixed(prefix, &text.inputs));
    }
    let set = tokenized(&texts, chosen)?;
    let options = options(args, chosen, &set, (named, transfer))?;
    Ok((set, options))
}

/// Between the labels of the task that a prompt was trained on and those of the one that it is measured on.
struct Transfer {
    forth: LabelMap,
    back: LabelMap,
}

impl Transfer {
    /// None unless the two ask the same in other words.
    fn of(trained: &Task, evaluated: &Task) -> Option<Self> {
        let forth = transferred_labels(trained, evaluated)?;
        Some(Self { forth, back: transferred_labels(evaluated, trained)? })
    }

    fn in_words_of_prompt(&self, label: &str) -> String {
        self.back.get(label).unwrap_or(label).to_owned()
    }
}

/// On the rank that leads.
pub(crate) fn spinner(set: &TokenizedSet, ready: &Ready, global: &Global) -> Option<progress::Bar> {
    let what = || format!("evaluating {} examples", units::count(set.examples.len() as u64));
    ready.ranks().leads().then(|| progress::spinner(&what(), global))
}

/// Writes the predictions to the files that the flags name: a line of each, and what is `written` for SuperGLUE's site.
///
/// # Errors
/// If one cannot be written.
pub(crate) fn hand_over<P: Serialize>(
    args: &MeasureArgs,
    predictions: &[P],
    written: &[&str],
    named: Option<&Named>,
) -> Result<()> {
    if let Some(path) = &args.output {
        atomic::write_file(path, &lines(predictions, named.map(|named| &named.found))?)?;
    }
    named.map_or(Ok(()), |named| named.submit(written))
}

/// The split that the flags name, read; none if they name no task.
///
/// # Errors
/// If the flags contradict each other, or the split cannot be used.
pub(crate) fn named(args: &MeasureArgs, leads: bool) -> Result<Option<Named>> {
    if leads {
        check_place("--output", args.output.as_deref())?;
    }
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

/// Where the file for the benchmark's site goes.
fn submission_file(task: &Task, path: &Path) -> Result<PathBuf> {
    let empty = submission(task, &[], &[])?;
    let of_the_site = Path::new(&empty.file_name).extension();
    match path.extension() {
        _ if path.is_dir() => Ok(path.join(&empty.file_name)),
        end if end.is_some() && end == of_the_site => {
            check_place("--submission", Some(path)).map(|()| path.to_owned())
        }
        _ => bad_input(format!(
            "--submission {} is neither a directory that is there nor the name of a file that ends as {} does: give one of the two",
            path.display(),
            empty.file_name
        )),
    }
}

impl Named {
    /// Whether there is anything to measure against.
    pub(crate) fn is_labelled(&self) -> bool {
        self.found.is_labelled()
    }

    /// Writes the file for the benchmark's site, if it is asked for.
    fn submit(&self, predictions: &[&str]) -> Result<()> {
        let Some(path) = &self.submission else { return Ok(()) };
        let predictions: Vec<String> = predictions.iter().map(|text| (*text).to_owned()).collect();
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

fn options(
    args: &MeasureArgs,
    chosen: &Chosen,
    set: &TokenizedSet,
    (named, transfer): (Option<&Named>, Option<Transfer>),
) -> Result<EvalOptions> {
    let (tokenizer, vocab_size) = (&chosen.model.tokenizer, chosen.model.config.vocab_size);
    let predict = args.predict.unwrap_or(chosen.settings.predict);
    let labels = match named {
        Some(named) => named.task.label_texts(),
        None if predict == Predict::Rank && chosen.settings.format.labels.is_none() => {
            labels_of_run(chosen)?.or_else(|| label_set(&chosen.settings.format, &set.texts))
        }
        None => label_set(&chosen.settings.format, &set.texts),
    };
    let of_prompt = match &transfer {
        Some(transfer) => labels
            .as_ref()
            .map(|labels| labels.iter().map(|label| transfer.in_words_of_prompt(label)).collect()),
        None => labels.clone(),
    };
    let common = EvalOptions {
        max_new_tokens: max_new_tokens(chosen, of_prompt.as_deref())?,
        candidates: predict.candidates(
            of_prompt.as_deref(),
            tokenizer,
            vocab_size,
            chosen.settings.target_sentinel,
        )?,
        labels,
        rewrite: transfer.map(|transfer| transfer.forth),
        ..EvalOptions::default()
    };
    let Some(Named { task, found, .. }) = named else {
        return Ok(EvalOptions {
            metrics: args.metrics.as_ref().unwrap_or(&chosen.settings.metrics).clone(),
            ..common
        });
    };
    let references = found.references();
    let metrics = args.metrics.as_deref().unwrap_or(task.metrics);
    Ok(EvalOptions {
        metrics: if references.is_some() { metrics.to_vec() } else { Vec::new() },
        selection: task.selection,
        references: references.map(Arc::new),
        ..common
    })
}

/// What the run of the prompt chose among: the examples to measure on may not show every label.
fn labels_of_run(chosen: &Chosen) -> Result<Option<Vec<String>>> {
    let Some(run) = &chosen.settings.run else { return Ok(None) };
    if let Some(task) = &run.task {
        return Ok(Task::named(task)?.label_texts());
    }
    let Some(train) = run.train.as_deref().filter(|file| file.is_file()) else { return Ok(None) };
    let format = backbone::task_format(run)?;
    let options = LoadOptions { skip_bad_records: run.skip_bad_records.unwrap_or_default() };
    Ok(label_set(&format, &load_text(train, &format, options)?.examples))
}

/// Those of the file.
fn examples(args: &MeasureArgs, chosen: &Chosen) -> Result<Vec<TextExample>> {
    let path = args.data.as_deref().unwrap_or(Path::new(""));
    let options = LoadOptions { skip_bad_records: args.format.skip_bad_records };
    let loaded = load_text(path, &chosen.settings.format, options)?;
    if chosen.ranks.leads() && loaded.skipped > 0 {
        warn(&format!("{}: {} records do not fit and are left out", path.display(), loaded.skipped));
    }
    Ok(loaded.examples)
}

fn tokenized(texts: &[TextExample], chosen: &Chosen) -> Result<TokenizedSet> {
    let leads = chosen.ranks.leads();
    let Chosen { model, settings, .. } = chosen;
    let Settings { max_input_length, max_target_length, target_sentinel, .. } = settings;
    let room = max_target_length.saturating_sub(usize::from(*target_sentinel));
    let mut set = tokenize(texts, &model.tokenizer, *max_input_length, room, model.config.vocab_size)?;
    if *target_sentinel {
        add_sentinel(&mut set.examples, &model.tokenizer)?;
    }
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
    prediction: Map<String, Value>,
}

/// Predictions as they are written to a file: of a benchmark with its id, and without a label without what is said of it.
fn lines<P: Serialize>(predictions: &[P], found: Option<&TaskSplit>) -> Result<Vec<u8>> {
    let Some(found) = found else { return output::json_lines(predictions) };
    let mut named = Vec::with_capacity(predictions.len());
    for (prediction, example) in predictions.iter().zip(&found.examples) {
        let Value::Object(mut prediction) = serde_json::to_value(prediction)? else { continue };
        if example.reference.is_none() {
            prediction.retain(|name, _| name != "target" && name != "loss");
        }
        named.push(NamedPrediction { id: &example.id, prediction });
    }
    output::json_lines(&named)
}

fn summary(args: &MeasureArgs, evaluation: &Evaluation, seconds: f64, named: Option<Named>) -> Summary {
    let has_targets = named.as_ref().is_none_or(Named::is_labelled);
    Summary {
        task: named.as_ref().map(|named| named.task),
        split: named.as_ref().map(|named| named.split.name()),
        examples: evaluation.predictions.len(),
        metrics: by_name(&evaluation.metrics),
        legal_share: evaluation.legal_share,
        majority_share: evaluation.legal_share.filter(|_| has_targets).and(majority(evaluation)),
        loss: has_targets.then_some(evaluation.loss),
        seconds,
        output: args.output.clone(),
        submission: named.and_then(|named| named.submission),
    }
}

/// Metrics as JSON has them.
pub(crate) fn by_name(metrics: &[(Metric, f64)]) -> Map<String, Value> {
    metrics.iter().map(|(metric, value)| (metric.to_string(), (*value).into())).collect()
}

/// The texts that are answers at all: those of the label map, or the targets where so few stand for so many examples that they are classes.
pub(crate) fn label_set(format: &TaskFormat, examples: &[TextExample]) -> Option<Vec<String>> {
    match &format.labels {
        Some(map) => Some(map.texts().map(str::to_owned).collect()),
        None => labels_of(examples, MAX_LABELS.min(examples.len() / 2)),
    }
}

/// As in training: an answer longer than every label is none, so that nothing is lost by ending it there.
fn max_new_tokens(chosen: &Chosen, labels: Option<&[String]>) -> Result<usize> {
    let Some(labels) = labels else { return Ok(chosen.settings.max_target_length) };
    let mut longest = 0;
    for label in labels {
        let encoded = chosen.model.tokenizer.encode(label.as_str(), false);
        let encoded = encoded.map_err(|error| anyhow!("the label {label:?} cannot be tokenized: {error}"))?;
        // One for `</s>`, and one that tells a label from a text that begins with it.
        longest = longest.max(encoded.len() + 2 + usize::from(chosen.settings.target_sentinel));
    }
    Ok(longest.min(chosen.settings.max_target_length))
}

/// The share of the most frequent target: what an answer that never changes would reach.
pub(crate) fn majority(evaluation: &Evaluation) -> Option<f64> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for prediction in &evaluation.predictions {
        *counts.entry(prediction.target.as_str()).or_default() += 1;
    }
    counts.values().max().map(|most| *most as f64 / evaluation.predictions.len() as f64)
}

/// A metric for people.
pub(crate) fn percent(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), units::percent)
}

impl Printed for Summary {
    fn text(&self) -> String {
        let mut rows: Vec<Vec<String>> =
            self.metrics.iter().map(|(name, value)| vec![report::words(name), percent(value)]).collect();
        rows.extend(self.majority_share.map(|v| vec!["(majority class)".to_owned(), units::percent(v)]));
        rows.extend(self.legal_share.map(|v| vec!["legal labels".to_owned(), units::percent(v)]));
        rows.extend(self.loss.map(|loss| vec!["loss per token".to_owned(), format!("{loss:.4}")]));
        rows.push(vec!["examples".to_owned(), units::count(self.examples as u64)]);
        rows.push(vec!["examples a second".to_owned(), units::rate(self.examples as f64 / self.seconds)]);
        output::table(&["measure", "value"], &rows, true)
    }
}
