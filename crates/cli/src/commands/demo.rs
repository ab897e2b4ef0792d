//! `incipit demo`: a prompt is tuned on the bundled model, before one's eyes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use incipit_data::metrics::Metric;
use incipit_data::{LoadOptions, TokenizedSet, load_text, tokenize};
use incipit_tune::atomic;
use incipit_tune::backbone::Backbone;
use incipit_tune::control::Control;
use incipit_tune::evaluate::{EvalOptions, Evaluation, Prediction, evaluate};
use incipit_tune::spec::{PartialSpec, TrainSpec};
use incipit_tune::train::{Event, Observer, train_on};
use serde::Serialize;

use super::eval::{label_set, majority};
use crate::args::Global;
use crate::exit::{Exit, bad_input};
use crate::interrupt::stop_on_ctrl_c;
use crate::output::{self, Printed};
use crate::progress::{Watch, note};
use crate::report::{self, Records};
use crate::units;

/// The bundled files. `demo/README.md` says how they were made.
const FILES: [(&str, &[u8]); 5] = [
    ("model/config.json", include_bytes!("../../../../demo/model/config.json")),
    ("model/model.safetensors", include_bytes!("../../../../demo/model/model.safetensors")),
    ("model/tokenizer.json", include_bytes!("../../../../demo/model/tokenizer.json")),
    ("data/train.jsonl", include_bytes!("../../../../demo/data/train.jsonl")),
    ("data/eval.jsonl", include_bytes!("../../../../demo/data/eval.jsonl")),
];
const STEPS: u64 = 300;
const EVAL_EVERY: u64 = 25;
const BATCH_SIZE: usize = 32;
const PROMPT_LENGTH: usize = 20;
const LEARNING_RATE: f64 = 0.3;
/// Examples whose answers are shown before and after.
const SHOWN: usize = 4;
/// Width of the bars of accuracy.
const BAR: usize = 30;

/// Flags of `demo`.
#[derive(Args)]
#[command(
    after_help = "It shows how accuracy climbs from the bare model's, answers before and after, and where the report lies. It takes \
                        about a minute and no network."
)]
pub(crate) struct DemoArgs {
    /// Directory to put model, data and run into [default: a new one among the system's temporary files]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Steps to train
    #[arg(long, value_name = "N", default_value_t = STEPS)]
    steps: u64,
    /// Seed of the prompt's start and of the data's order
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(Serialize)]
struct Demo {
    directory: PathBuf,
    report: PathBuf,
    frozen_parameters: u64,
    trained_parameters: usize,
    majority_share: f64,
    /// Step 0 is the bare model, without a prompt.
    accuracy: Vec<Point>,
    best_accuracy: f64,
    answers: Vec<Answer>,
    seconds: f64,
    #[serde(skip)]
    interrupted: bool,
}

#[derive(Serialize)]
struct Point {
    step: u64,
    accuracy: f64,
}

#[derive(Serialize)]
struct Answer {
    inputs: String,
    target: String,
    before: String,
    after: String,
}

/// Shows the run as `train` does, and keeps what the demo tells at its end.
struct DemoWatch {
    watch: Watch,
    points: Vec<Point>,
    best: Vec<Prediction>,
}

impl Observer for DemoWatch {
    fn on(&mut self, event: &Event<'_>) {
        if let Event::Evaluated { step, evaluation, best, .. } = event {
            self.points.push(Point { step: *step, accuracy: evaluation.score() });
            if *best {
                self.best.clone_from(&evaluation.predictions);
            }
        }
        self.watch.on(event);
    }
}

/// Unpacks, measures the bare model, trains, and tells.
///
/// # Errors
/// If the directory is taken or cannot be written, or the run fails.
pub(crate) fn run(args: &DemoArgs, global: &Global) -> Result<Exit> {
    let start = Instant::now();
    let dir = unpack(args)?;
    let spec = spec(args, &dir)?;
    let control = Control::new();
    stop_on_ctrl_c(control.clone())?;
    let backbone = Backbone::load(&spec.model, spec.dtype, spec.engine_options())?;
    note("the bare model first: what does it answer without a prompt?");
    let set = eval_set(&spec, &backbone)?;
    let bare = bare(&spec, &backbone, &set, &control)?;
    note(&format!(
        "accuracy {} without a prompt; now {} rows are tuned, and the model stays frozen",
        units::percent(bare.score()),
        spec.prompt_length
    ));
    let mut watch = DemoWatch { watch: Watch::new(global), points: Vec::new(), best: Vec::new() };
    let outcome = train_on(&backbone, &spec, &control, &mut watch)?;
    if let Some(failure) = watch.watch.failure {
        return Err(failure);
    }
    let report = report::write(&Records::read(&spec.out)?, &spec.out)?;
    let mut accuracy = vec![Point { step: 0, accuracy: bare.score() }];
    accuracy.extend(watch.points);
    let demo = Demo {
        report,
        frozen_parameters: backbone.num_parameters,
        trained_parameters: spec.prompt_length * backbone.config().d_model,
        majority_share: majority(&bare).unwrap_or(0.0),
        best_accuracy: outcome.best.map_or(0.0, |best| best.score),
        answers: answers(&bare.predictions, &watch.best),
        accuracy,
        seconds: start.elapsed().as_secs_f64(),
        interrupted: control.stop_requested(),
        directory: dir,
    };
    output::print(&demo, global.json)?;
    Ok(if demo.interrupted { Exit::Interrupted } else { Exit::Ok })
}

/// Writes the bundled files into the demo's directory.
fn unpack(args: &DemoArgs) -> Result<PathBuf> {
    let dir = match &args.out {
        Some(out) => out.clone(),
        None => fresh_directory(),
    };
    if std::fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some()) {
        return bad_input(format!("{} is not empty: give another directory with --out", dir.display()));
    }
    for (name, bytes) in FILES {
        let path = dir.join(name);
        atomic::create_dir(path.parent().unwrap_or(&dir))?;
        atomic::write_file(&path, bytes)?;
    }
    let absolute = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    note(&format!("model and data are in {}", absolute.display()));
    Ok(absolute)
}

/// A name among the temporary files that nothing has yet.
fn fresh_directory() -> PathBuf {
    let name = |n: u32| std::env::temp_dir().join(format!("incipit-demo-{}", std::process::id() + n));
    (0..1000).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(1000))
}

fn spec(args: &DemoArgs, dir: &Path) -> Result<TrainSpec> {
    let flags = PartialSpec {
        model: Some(dir.join("model").display().to_string()),
        train: Some(dir.join("data/train.jsonl")),
        eval: Some(dir.join("data/eval.jsonl")),
        out: Some(dir.join("run")),
        prompt_length: Some(PROMPT_LENGTH),
        lr: Some(LEARNING_RATE),
        batch_size: Some(BATCH_SIZE),
        steps: Some(args.steps),
        eval_every: Some(EVAL_EVERY),
        checkpoint_every: Some(EVAL_EVERY),
        max_input_length: Some(96),
        max_target_length: Some(8),
        seed: Some(args.seed),
        ..PartialSpec::default()
    };
    Ok(TrainSpec::resolve(flags, None, false)?)
}

fn eval_set(spec: &TrainSpec, backbone: &Backbone) -> Result<TokenizedSet> {
    let path = spec.eval.as_deref().context("the demo evaluates")?;
    let loaded = load_text(path, &spec.task_format()?, LoadOptions::default())?;
    let (input, target) = (spec.max_input_length, spec.max_target_length);
    Ok(tokenize(&loaded.examples, &backbone.tokenizer, input, target, backbone.config().vocab_size)?)
}

fn bare(spec: &TrainSpec, backbone: &Backbone, set: &TokenizedSet, control: &Control) -> Result<Evaluation> {
    let options = EvalOptions {
        metrics: vec![Metric::Accuracy],
        labels: label_set(&spec.task_format()?, &set.texts),
        max_new_tokens: spec.max_target_length,
        ..EvalOptions::default()
    };
    Ok(evaluate(&backbone.engine, None, set, &backbone.tokenizer, &options, control)?)
}

/// Examples with different targets, and what was answered before and after.
fn answers(before: &[Prediction], after: &[Prediction]) -> Vec<Answer> {
    let mut shown: Vec<Answer> = Vec::new();
    for (before, after) in before.iter().zip(after) {
        if shown.len() < SHOWN && shown.iter().all(|answer| answer.target != after.target) {
            shown.push(Answer {
                inputs: after.inputs.clone(),
                target: after.target.clone(),
                before: before.prediction.clone(),
                after: after.prediction.clone(),
            });
        }
    }
    shown
}

impl Printed for Demo {
    fn text(&self) -> String {
        let mut lines = vec![
            String::new(),
            format!(
                "{} numbers were trained in front of {} frozen ones, in {}.",
                units::count(self.trained_parameters as u64),
                units::count(self.frozen_parameters),
                units::duration(Duration::from_secs_f64(self.seconds))
            ),
            String::new(),
            "Accuracy on examples that were not trained on:".to_owned(),
        ];
        let bar = |share: f64| "█".repeat((share * BAR as f64).round() as usize);
        let row =
            |name: &str, share: f64| format!("  {name:<14} {:>7}  {}", units::percent(share), bar(share));
        lines.push(row("majority class", self.majority_share));
        for point in &self.accuracy {
            let name = if point.step == 0 { "no prompt".to_owned() } else { format!("step {}", point.step) };
            lines.push(row(&name, point.accuracy));
        }
        lines.extend([String::new(), "Answers, without a prompt and with it:".to_owned()]);
        for answer in &self.answers {
            lines.push(format!("  {}", clipped(&answer.inputs, 110)));
            let (before, after) = (clipped(&answer.before, 40), clipped(&answer.after, 40));
            lines.push(format!("      target {:?}   before {before:?}   after {after:?}", answer.target));
        }
        let dir = self.directory.display();
        lines.extend([
            String::new(),
            format!("The report, to open in a browser:  {}", self.report.display()),
            String::new(),
            "What to try next:".to_owned(),
            format!("  incipit generate --prompt {dir}/run --input \"Hello, I was charged twice for the same lamp.\""),
            format!("  incipit inspect prompt {dir}/run --model {dir}/model"),
            format!("  incipit train --config {dir}/run/run.toml --out another-run --prompt-length 5 --seed 1"),
            "  incipit train --help    your own model and data".to_owned(),
        ]);
        lines.join("\n")
    }
}

/// The beginning of a text, so that it fits a line.
fn clipped(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
