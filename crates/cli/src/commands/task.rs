//! `incipit task`: the benchmarks that are known by name, and mixtures of tasks.

mod average;
mod mix;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use incipit_data::LoadOptions;
use incipit_data::tasks::{ExampleId, Selection, Split, Task, TaskExample, Use};
use incipit_tune::atomic;
use serde::Serialize;

use crate::args::{Global, split};
use crate::exit::Exit;
use crate::output::{self, Printed};
use crate::progress::note;

pub(crate) use mix::prefixed;

/// What can be asked of benchmarks.
#[derive(Subcommand)]
pub(crate) enum TaskCommand {
    /// List the benchmarks: splits, labels, metrics, and the words that a prompt starts from
    List,
    /// Show what a benchmark is, the files that are read, and its first examples as the model sees them
    Show(ShowArgs),
    /// Write a split as JSON lines with inputs and targets, for other programs
    Export(ExportArgs),
    /// Write examples of several tasks to one file, each input with its task's name before it, so that one model learns all
    Mix(mix::MixArgs),
    /// Print SuperGLUE's score, from what evaluations of its eight tasks printed
    Average(average::AverageArgs),
}

/// Flags of `task show`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  incipit task show multirc
  incipit task show multirc --data-dir SuperGLUE --split dev -n 2

The benchmark's files are those that its owners publish, under their own names. Nothing is downloaded.")]
pub(crate) struct ShowArgs {
    /// Name of the benchmark, as `task list` has it
    #[arg(value_name = "NAME")]
    task: String,
    /// Directory of the benchmark's files, or the one that holds it [default: none, no examples]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Part of the data whose examples are shown
    #[arg(long, default_value = "train", requires = "data_dir", value_parser = split())]
    split: Split,
    /// Examples to show
    #[arg(short, value_name = "N", default_value_t = 3, requires = "data_dir")]
    number: usize,
}

/// Flags of `task export`.
#[derive(Args)]
#[command(after_help = "\
A line is an object with id, inputs, targets and answers (all that are accepted); without a label, with id and inputs. Examples whose \
target is wrong on purpose (WSC's) are left out. `incipit train --train` reads such files, and scores against the one target.

Example:
  incipit task export multirc --data-dir SuperGLUE --split train --output train.jsonl")]
pub(crate) struct ExportArgs {
    /// Name of the benchmark, as `task list` has it
    #[arg(value_name = "NAME")]
    task: String,
    /// Directory of the benchmark's files, or the one that holds it
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Part of the data
    #[arg(long, value_parser = split())]
    split: Split,
    /// File to write
    #[arg(long, value_name = "FILE.jsonl")]
    output: PathBuf,
}

/// Answers.
///
/// # Errors
/// If there is no such benchmark, its files cannot be used, or the answer cannot be written.
pub(crate) fn run(command: &TaskCommand, global: &Global) -> Result<Exit> {
    match command {
        TaskCommand::List => output::print(&List(Task::all().map(About::of).collect()), global.json)?,
        TaskCommand::Show(args) => output::print(&show(args)?, global.json)?,
        TaskCommand::Export(args) => output::print(&export(args)?, global.json)?,
        TaskCommand::Mix(args) => output::print(&mix::mix(args)?, global.json)?,
        TaskCommand::Average(args) => output::print(&average::average(args)?, global.json)?,
    }
    Ok(Exit::Ok)
}

/// What a benchmark is.
#[derive(Serialize)]
struct About {
    name: &'static str,
    title: &'static str,
    family: String,
    splits: Vec<&'static str>,
    labels: &'static [&'static str],
    metrics: Vec<&'static str>,
    /// What chooses the best checkpoint.
    selection: &'static str,
    init_words: &'static [&'static str],
}

impl About {
    fn of(task: &'static Task) -> Self {
        Self {
            name: task.name,
            title: task.title,
            family: task.family.to_string(),
            splits: task.splits().map(Split::name).collect(),
            labels: task.labels,
            metrics: task.metrics.iter().map(|metric| metric.name()).collect(),
            selection: match task.selection {
                Selection::Mean => "mean",
                Selection::One(metric) => metric.name(),
            },
            init_words: task.init_words,
        }
    }
}

#[derive(Serialize)]
#[serde(transparent)]
struct List(Vec<About>);

impl Printed for List {
    fn text(&self) -> String {
        let header = ["name", "family", "splits", "labels", "metrics", "init words"];
        let row = |about: &About| {
            let same = !about.labels.is_empty() && about.init_words == about.labels;
            vec![
                about.name.to_owned(),
                about.family.clone(),
                about.splits.join(", "),
                listed(about.labels, "free text"),
                about.metrics.join(", "),
                if same { "the labels".to_owned() } else { listed(about.init_words, "none") },
            ]
        };
        output::table(&header, &self.0.iter().map(row).collect::<Vec<_>>(), false)
    }
}

fn listed(words: &[&str], none: &str) -> String {
    if words.is_empty() { none.to_owned() } else { words.join(", ") }
}

/// An example, as the model sees it and as it is scored.
#[derive(Serialize)]
struct Example {
    id: ExampleId,
    inputs: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    targets: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answers: Option<Vec<String>>,
}

impl From<TaskExample> for Example {
    fn from(example: TaskExample) -> Self {
        let TaskExample { text, id, reference, .. } = example;
        Self {
            id,
            inputs: text.inputs,
            targets: reference.is_some().then_some(text.targets),
            answers: reference.map(|reference| reference.answers),
        }
    }
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    about: About,
    folder: &'static str,
    /// The names of each split's file; the first that is there is read.
    files: serde_json::Map<String, serde_json::Value>,
    /// The file that the examples come from.
    file: Option<PathBuf>,
    split: Option<&'static str>,
    examples: Vec<Example>,
}

fn show(args: &ShowArgs) -> Result<Shown> {
    let task = Task::named(&args.task)?;
    let names = |split: Split| (split.name().to_owned(), serde_json::Value::from(task.files[split as usize]));
    let mut shown = Shown {
        about: About::of(task),
        folder: task.folder,
        files: task.splits().map(names).collect(),
        file: None,
        split: None,
        examples: Vec::new(),
    };
    if let Some(dir) = &args.data_dir {
        let examples = task.examples(dir, args.split, Use::of(args.split))?;
        (shown.file, shown.split) = (Some(examples.path().to_owned()), Some(args.split.name()));
        let first: Result<Vec<_>, _> = examples.take(args.number).collect();
        shown.examples = first?.into_iter().map(Example::from).collect();
    }
    Ok(shown)
}

impl Printed for Shown {
    fn text(&self) -> String {
        let Self { about, folder, files, .. } = self;
        let mut facts = vec![
            ("task", about.name.to_owned()),
            ("what is asked", about.title.to_owned()),
            ("family", about.family.clone()),
            ("folder", (*folder).to_owned()),
        ];
        for split in &about.splits {
            let names = files.get(*split).and_then(serde_json::Value::as_array).into_iter().flatten();
            let names: Vec<&str> = names.filter_map(serde_json::Value::as_str).collect();
            facts.push((*split, names.join(" or ")));
        }
        let best = if about.selection == "mean" { "the mean of the metrics" } else { about.selection };
        facts.extend([
            ("labels", listed(about.labels, "none, free text")),
            ("metrics", about.metrics.join(", ")),
            ("best by", best.to_owned()),
            ("init words", listed(about.init_words, "none, --prompt-init vocab")),
        ]);
        let mut text = output::facts(facts);
        if let (Some(file), Some(split)) = (&self.file, self.split) {
            text.push_str(&format!("\n\nfirst examples of {split}, from {}", file.display()));
        }
        for example in &self.examples {
            let targets = example.targets.as_deref().unwrap_or("(no label)");
            text.push_str(&format!("\n\ninputs   {}\ntargets  {targets}", example.inputs));
            let answers = example.answers.as_deref().unwrap_or_default();
            if answers.len() > 1 {
                text.push_str(&format!("\nanswers  {}", answers.join(" | ")));
            }
        }
        text
    }
}

#[derive(Serialize)]
struct Exported {
    task: &'static Task,
    split: &'static str,
    examples: usize,
    output: PathBuf,
}

fn export(args: &ExportArgs) -> Result<Exported> {
    let task = Task::named(&args.task)?;
    let found = task.read(&args.data_dir, args.split, Use::of(args.split), LoadOptions::default())?;
    let left_out = found.left_out();
    let examples: Vec<Example> =
        found.examples.into_iter().filter(TaskExample::holds).map(Example::from).collect();
    atomic::write_file(&args.output, &output::json_lines(&examples)?)?;
    if let Some(said) = left_out {
        note(&said);
    }
    Ok(Exported { task, split: args.split.name(), examples: examples.len(), output: args.output.clone() })
}

impl Printed for Exported {
    fn text(&self) -> String {
        let Self { task, split, examples, output } = self;
        format!("{examples} examples of {task}, split {split}, are in {}", output.display())
    }
}
