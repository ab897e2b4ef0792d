//! The command line: what can be asked, and the words of `--help`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Result;
use clap::builder::styling::{AnsiColor, Style, Styles};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use incipit_data::tasks::{Split, Task};
use incipit_tune::device::DeviceChoice;
use incipit_tune::spec::Precision;

use crate::commands::{
    backbones, bench, checkpoint, convert, coordinator, demo, doctor, engine, ensemble, eval, generate,
    inspect, job, launch, multitask, paper, pretrain, prompt, task, train, up, worker, workers,
};
use crate::exit::bad_input;
use crate::telemetry::{self, LogFormat};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Red.on_default().bold())
    .usage(AnsiColor::Red.on_default().bold())
    .literal(Style::new().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const AFTER_HELP: &str = "\
Start here:
  incipit demo            see a prompt being learned, in about a minute
  incipit doctor          see what this machine offers
  incipit train --help    tune a prompt on your own data
  incipit job --help      train many prompts on one resident model

Exit codes:
  0    done
  1    something failed: a file could not be written, memory ran out
  2    what was given cannot be used: flags, files, data (the message says what to change)
  3    training stopped at a loss or gradient that was not finite; nothing was updated by it
  4    another rank failed first: its message tells why
  5    the job that was watched was cancelled
  130  interrupted; `train` saved a checkpoint first, go on with --resume

Results go to standard output, all else to standard error.";

/// The command line.
#[derive(Parser)]
#[command(
    name = "incipit",
    version,
    about = "Tunes soft prompts: a few rows of numbers, put before the input of a frozen T5, are trained for a task, and the model \
             itself stays as it is",
    after_help = AFTER_HELP,
    styles = STYLES,
    max_term_width = 100,
    arg_required_else_help = true,
    subcommand_required = true,
    disable_help_subcommand = true,
    infer_long_args = false
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Args, Clone)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Global {
    /// Print results as JSON instead of tables
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Threads of this process to compute with (results do not depend on it) [default: all cores, shared with the other
    /// ranks on this machine]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Say more on standard error (-vv: still more)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say nothing on standard error but warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// How standard error is written: text, or json, an object a line [default: what INCIPIT_LOG_FORMAT says, or text]
    #[arg(long, global = true, value_name = "FORMAT", hide_possible_values = true, value_parser = telemetry::log_format())]
    pub(crate) log_format: Option<LogFormat>,
}

/// What can be asked.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Tune a prompt on the bundled small model, and show that it learned
    Demo(demo::DemoArgs),
    /// Tune a prompt on your model and data
    Train(Box<train::TrainArgs>),
    /// Train a whole model on plain text, from random weights or another model's
    Pretrain(Box<pretrain::PretrainArgs>),
    /// Measure a prompt on a file of examples
    Eval(eval::EvalArgs),
    /// Let the model answer inputs, with a prompt or without
    Generate(generate::GenerateArgs),
    /// Tune several prompts on the same data at once, and let them vote
    #[command(subcommand)]
    Ensemble(ensemble::EnsembleCommand),
    /// Tune prompts of several tasks at once that have rows in common
    Multitask(Box<multitask::MultitaskArgs>),
    /// Run the tables and figures of the paper again, at a scale of your choice
    Paper(Box<paper::PaperArgs>),
    /// See the benchmarks that are known by name and their examples, mix tasks, and average SuperGLUE's
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// Look into a model or a prompt
    #[command(subcommand)]
    Inspect(inspect::InspectCommand),
    /// Rewrite a model or a prompt in another format
    #[command(subcommand)]
    Convert(convert::ConvertCommand),
    /// Time the engine on this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Start the ranks of a command as processes, and see to it that they end together
    Launch(launch::LaunchArgs),
    /// Start a coordinator and a worker on this machine
    Up(up::UpArgs),
    /// Keep the jobs, checkpoints and workers of a cluster together
    Coordinator(coordinator::CoordinatorArgs),
    /// Give this machine to a cluster
    Worker(worker::WorkerArgs),
    /// Hand in jobs for the backbones of a cluster, follow them, and steer them
    Job(job::JobArgs),
    /// Keep models loaded on a cluster, for any number of jobs
    Backbone(backbones::BackboneArgs),
    /// Fetch, keep and verify what jobs have saved
    Checkpoint(checkpoint::CheckpointArgs),
    /// Give good prompts a name and versions
    Prompt(prompt::PromptArgs),
    /// See the machines of a cluster, and drain them
    Workers(workers::WorkersArgs),
    /// Hold a backbone for the agent that started this
    #[command(hide = true)]
    Engine(engine::EngineArgs),
    /// Say what this machine has, what this build uses of it, and what is missing
    Doctor(doctor::DoctorArgs),
}

/// How records become texts and tokens, where the defaults do not fit.
#[derive(Args, Clone)]
pub(crate) struct FormatArgs {
    /// Template of the input text, with a record's fields in braces: "question: {question}"
    /// [default: the field `inputs`]
    #[arg(long, value_name = "TEMPLATE", help_heading = "Data")]
    pub(crate) inputs: Option<String>,
    /// Template of the target text: "{label}" [default: the field `targets`]
    #[arg(long, value_name = "TEMPLATE", help_heading = "Data")]
    pub(crate) targets: Option<String>,
    /// Text of each label: 0=False,1=True
    #[arg(long, value_name = "A=TEXT,...", help_heading = "Data")]
    pub(crate) labels: Option<String>,
    /// Longest input in tokens; what is longer is cut, and counted [default: 512]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub(crate) max_input_length: Option<usize>,
    /// Longest target in tokens [default: 16]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub(crate) max_target_length: Option<usize>,
    /// Put <extra_id_0> before each target, as a model that knows only span corruption expects it (Lester et al. 2021,
    /// section 3.2); it is no part of a prediction
    #[arg(long, help_heading = "Data")]
    pub(crate) target_sentinel: bool,
    /// Leave out records that do not fit, and count them, instead of refusing to start
    #[arg(long, help_heading = "Data")]
    pub(crate) skip_bad_records: bool,
}

/// A benchmark in place of files and templates.
#[derive(Args, Clone)]
pub(crate) struct NamedTaskArgs {
    /// Benchmark whose own files are read and which brings its texts, labels and metrics, in place of files and
    /// templates; `incipit task list` has the names
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    pub(crate) task: Option<String>,
    /// Directory of the benchmark's files, or the one that holds it
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    pub(crate) data_dir: Option<PathBuf>,
}

impl NamedTaskArgs {
    /// The benchmark that is named, if one is, and the directory of its files. `others` are the flags that say what the benchmark has of
    /// its own, and whether they are given.
    ///
    /// # Errors
    /// If no benchmark has the name, its directory is missing, or one of the others is given too.
    pub(crate) fn resolve(&self, others: &[(&str, bool)]) -> Result<Option<(&'static Task, &Path)>> {
        let Some(name) = &self.task else {
            if self.data_dir.is_some() {
                return bad_input("--data-dir is the directory of a named task: name the task with --task");
            }
            return Ok(None);
        };
        let task = Task::named(name)?;
        if let Some((other, _)) = others.iter().find(|(_, given)| *given) {
            return bad_input(format!(
                "--task and {other} are both given, and {name} has data, texts and labels of its own: leave one of them out"
            ));
        }
        match self.data_dir.as_deref() {
            Some(dir) => Ok(Some((task, dir))),
            None => bad_input("--data-dir is missing: give the directory of the task's files"),
        }
    }
}

/// A prompt, and a backbone to run with it.
#[derive(Args, Clone)]
pub(crate) struct BackboneArgs {
    /// Prompt: a run's directory (its best prompt), an .npy file, a PEFT directory or a checkpoint [default: none, the
    /// bare model]
    #[arg(long, value_name = "PATH", help_heading = "Model and prompt")]
    pub(crate) prompt: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

/// A backbone to run.
#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// Backbone: a directory, or a name on the Hugging Face Hub [default: that of the run that made the prompt]
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "Model and prompt")]
    pub(crate) model: Option<String>,
    /// Where the backbone runs: cpu, cuda (each rank on the GPU of its number) or cuda:N; GPUs need a build with the
    /// feature `cuda` [default: cpu]
    #[arg(long, value_name = "DEVICE", help_heading = "Model and prompt")]
    pub(crate) device: Option<DeviceChoice>,
    /// Type of the backbone's weights [default: bf16]
    #[arg(long, help_heading = "Model and prompt", value_parser = choice::<Precision>(names::DTYPES))]
    pub(crate) dtype: Option<Precision>,
    /// Tokens that go through the backbone at once [default: by the memory there is]
    #[arg(long, value_name = "N", help_heading = "Model and prompt")]
    pub(crate) microbatch_tokens: Option<usize>,
    /// Use a prompt on another backbone than it was trained on, such as a copy in another type
    #[arg(long, help_heading = "Model and prompt")]
    pub(crate) allow_other_backbone: bool,
}

/// The names that flags take, for `--help` to list.
pub(crate) mod names {
    pub(crate) const DTYPES: &[&str] = &["bf16", "f32"];
    pub(crate) const LOG_FORMATS: &[&str] = &["text", "json"];
    pub(crate) const LOSSES: &[&str] = &["mean", "sum"];
    pub(crate) const PLACEMENTS: &[&str] = &["before", "after", "decoder"];
    pub(crate) const PROMPT_LAYERS: &[&str] = &["first", "all"];
    pub(crate) const METHODS: &[&str] = &["prompt", "model", "prefix", "adapter", "text", "search"];
    pub(crate) const PREFIX_PARTS: &[&str] = &["all", "decoder"];
    pub(crate) const METRICS: &[&str] = &[
        "accuracy",
        "exact-match",
        "token-f1",
        "macro-f1",
        "positive-f1",
        "group-exact-match",
        "containment",
    ];
    pub(crate) const OPTIMIZERS: &[&str] = &["adafactor", "adamw", "sgd"];
    pub(crate) const PREDICTS: &[&str] = &["decode", "rank"];
    pub(crate) const RECIPES: &[&str] = &["paper", "released-code"];
    pub(crate) const RECOMPUTES: &[&str] = &["auto", "on", "off"];
    pub(crate) const SCHEDULES: &[&str] = &["constant", "linear", "cosine"];
}

/// Checks that there is a directory for a file that is to be written when all else is done.
///
/// # Errors
/// If there is none, or one is where the file is to be.
pub(crate) fn check_place(flag: &str, path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
        let (path, parent) = (path.display(), parent.display());
        return bad_input(format!(
            "{flag} is {path}, and there is no directory {parent}: make it, or give another place"
        ));
    }
    if path.is_dir() {
        return bad_input(format!("{flag} is {}, a directory: name a file in it", path.display()));
    }
    Ok(())
}

/// A flag that takes a part of a benchmark's data.
pub(crate) fn split() -> impl TypedValueParser<Value = Split> {
    let named = |name: String| Split::ALL.into_iter().find(|split| split.name() == name);
    PossibleValuesParser::new(Split::ALL.map(Split::name))
        .map(move |name| named(name).expect("no other name is let through"))
}

/// A flag that takes one of a few names.
pub(crate) fn choice<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr + Clone + Send + Sync + 'static,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
