//! `incipit multitask`: tunes prompts of several tasks that share rows.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use incipit_tune::multitask::{self, MULTITASK};
use incipit_tune::spec::PartialSpec;

use crate::args::Global;
use crate::commands::group;
use crate::commands::train::TrainArgs;
use crate::exit::{Exit, bad_input};

const AFTER_HELP: &str = "\
The first --shared-length rows of every task's prompt are the same in all of them; the others are the task's own. A step takes a batch of every task, all in \
one pass through the backbone, and moves the shared rows by the mean of the tasks' gradients. OUT/NAME is the directory of a task, as `train` makes it, and \
its prompt serves alone. Shared rows begin with pieces of the vocabulary, a task's own as --prompt-init says.

FILE has a table for each task, with settings by the names of the flags:
  [rte]
  task = \"rte\"
  data-dir = \"SuperGLUE\"
  [reviews]
  train = \"reviews.jsonl\"
  eval = \"reviews-dev.jsonl\"
  inputs = \"review: {text}\"
  targets = \"{label}\"

Examples:
  incipit multitask --model ./t5 --tasks tasks.toml --shared-length 50 --prompt-length 60 --out runs/both
  incipit multitask --out runs/both --resume
      goes on with all tasks from the newest step of which all have a checkpoint

Next: `incipit eval --prompt OUT/NAME`, or another task's prompt from one of these: `incipit train --prompt-init file:OUT/NAME`.";

/// Flags of `multitask`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct MultitaskArgs {
    /// File with a table for each task
    #[arg(long, value_name = "FILE.toml", help_heading = "Run")]
    tasks: Option<PathBuf>,
    /// Rows that the prompts of all tasks have in common, of --prompt-length
    #[arg(long, value_name = "S", help_heading = "Prompt")]
    shared_length: Option<usize>,
    #[command(flatten)]
    pub(crate) train: TrainArgs,
}

/// Trains, then prints what came of each task.
///
/// # Errors
/// Whatever stops a run: see the exit codes.
pub(crate) fn run(args: MultitaskArgs, global: &Global) -> Result<Exit> {
    let options = args.train.ranks.options();
    let (flags, config, resume) = args.train.layers(global);
    let flags = PartialSpec { shared_length: args.shared_length, ..flags };
    let flags = match config {
        Some(path) => flags.over(PartialSpec::read(&path)?),
        None => flags,
    };
    if flags.train.is_some() || flags.eval.is_some() || flags.task.is_some() {
        return bad_input(
            "--train, --eval and --task are for one task: give a table for each in the file of --tasks",
        );
    }
    let specs = multitask::resolve(&flags, args.tasks.as_deref(), resume)?;
    let next = |out: &Path| format!("incipit eval --prompt {}/NAME --data FILE", out.display());
    group::carry_out(&specs, &MULTITASK, &options, global, ("multitask", &next))
}
