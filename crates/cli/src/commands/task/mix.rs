//! `incipit task mix`: examples of several tasks in one file, so that one model learns them all (Raffel et al. 2020, section 3.5).

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use incipit_data::TextExample;
use incipit_data::tasks::{Split, TaskExample};
use incipit_kernels::rng::Philox;
use incipit_tune::atomic;
use incipit_tune::spec::{PartialSpec, TrainSpec};
use serde::Serialize;

use crate::examples::{texts, trained_elsewhere};
use crate::exit::bad_input;
use crate::output::{self, Printed};
use crate::units::count;

/// Distinguishes the draw of the examples from other random numbers.
const STREAM: u64 = u64::from_be_bytes(*b"mixture0");

const AFTER_HELP: &str = "\
Each input begins with the name of its task, as T5 has it. FILE has a table for each task, as `incipit multitask` takes it:
  [rte]
  task = \"rte\"
  data-dir = \"SuperGLUE\"
  [reviews]
  train = \"reviews.jsonl\"
  eval = \"reviews-dev.jsonl\"
  inputs = \"review: {text}\"
  targets = \"{label}\"
The training examples of all tasks are in OUTPUT/train.jsonl, those to evaluate on in OUTPUT/dev.jsonl: a line is an object with task, inputs and \
targets. A training run takes examples in a random order, so that tasks take part by the number of their examples; --limit bounds that of a \
large one. Examples whose target is wrong on purpose (WSC's) are left out.

Examples:
  incipit task mix --tasks tasks.toml --limit 50000 --output mixed
  incipit train --model ./t5 --method model --train mixed/train.jsonl --eval mixed/dev.jsonl --out runs/all
  incipit eval --prompt runs/all --task rte --data-dir SuperGLUE --input-prefix rte";

/// Flags of `task mix`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct MixArgs {
    /// File with a table for each task
    #[arg(long, value_name = "FILE.toml")]
    tasks: PathBuf,
    /// Most training examples of a task, drawn at random [default: all of them]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Directory to write to
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// A line of the files.
#[derive(Serialize)]
struct Line {
    task: String,
    inputs: String,
    targets: String,
}

/// What was written of a task.
#[derive(Serialize)]
struct Part {
    task: String,
    train: usize,
    dev: usize,
}

/// What was written.
#[derive(Serialize)]
pub(super) struct Mixed {
    tasks: Vec<Part>,
    output: PathBuf,
}

/// Reads every task, then writes the files.
///
/// # Errors
/// If a task cannot be read, or the files cannot be written.
pub(super) fn mix(args: &MixArgs) -> Result<Mixed> {
    let tasks = PartialSpec::read_several(&args.tasks)?;
    if tasks.len() < 2 {
        return bad_input(format!(
            "{} has fewer than two tasks, and there is nothing to mix: add a table for each",
            args.tasks.display()
        ));
    }
    let (mut train, mut dev, mut parts) = (Vec::new(), Vec::new(), Vec::new());
    for (place, (name, given)) in (0..).zip(tasks) {
        let spec = trained_elsewhere(given)?;
        let learnt = drawn(read(&spec, &spec.train, Split::Train)?, args, place);
        let measured = spec.eval.as_deref().map(|eval| read(&spec, eval, Split::Dev)).transpose()?;
        let measured = measured.unwrap_or_default();
        train.extend(lines(&name, &learnt)?);
        dev.extend(lines(&name, &measured)?);
        parts.push(Part { task: name, train: learnt.len(), dev: measured.len() });
    }
    atomic::create_dir(&args.output)?;
    atomic::write_file(&args.output.join("train.jsonl"), &train)?;
    if !dev.is_empty() {
        atomic::write_file(&args.output.join("dev.jsonl"), &dev)?;
    }
    Ok(Mixed { tasks: parts, output: args.output.clone() })
}

fn read(spec: &TrainSpec, path: &Path, split: Split) -> Result<Vec<TextExample>> {
    texts(spec, path, split, TaskExample::holds)
}

/// As many as may be, each as likely as the others, in the order of the file.
fn drawn(examples: Vec<TextExample>, args: &MixArgs, place: u64) -> Vec<TextExample> {
    let Some(limit) = args.limit.filter(|limit| (*limit as usize) < examples.len()) else { return examples };
    let mut random = Philox::new(args.seed, &[STREAM, place]);
    let mut chosen = random.permutation(examples.len());
    chosen.truncate(limit as usize);
    chosen.sort_unstable();
    chosen.into_iter().map(|index| examples[index as usize].clone()).collect()
}

fn lines(task: &str, examples: &[TextExample]) -> Result<Vec<u8>> {
    let line = |TextExample { inputs, targets, .. }: &TextExample| Line {
        task: task.to_owned(),
        inputs: prefixed(task, inputs),
        targets: targets.clone(),
    };
    output::json_lines(&examples.iter().map(line).collect::<Vec<_>>())
}

/// An input that says what is asked.
pub(crate) fn prefixed(prefix: &str, input: &str) -> String {
    format!("{prefix} {input}")
}

impl Printed for Mixed {
    fn text(&self) -> String {
        let row = |part: &Part| vec![part.task.clone(), count(part.train as u64), count(part.dev as u64)];
        let rows: Vec<Vec<String>> = self.tasks.iter().map(row).collect();
        let table = output::table(&["task", "to train", "to evaluate"], &rows, true);
        format!("{table}\n\nthe examples are in {}", self.output.display())
    }
}
