//! `incipit ensemble train`: tunes the prompts of an ensemble.

use std::path::Path;

use anyhow::Result;
use clap::Args;
use incipit_tune::ensemble::{self, ENSEMBLE};

use crate::args::Global;
use crate::commands::group;
use crate::commands::train::TrainArgs;
use crate::exit::Exit;

const AFTER_HELP: &str = "\
Member i is trained with the seed --seed + i: another start of the prompt and another order of the data. A step of all members goes \
through the backbone as one batch, and each member ends in the bytes of `incipit train` with its seed. OUT/member-0 and so on are run \
directories as `train` makes them, OUT/ensemble.json lists them, and OUT/ensemble.safetensors has the best prompts of all as one \
tensor, [members, rows, columns].

Examples:
  incipit ensemble train --model ./t5 --train train.jsonl --eval dev.jsonl --out runs/five
  incipit ensemble train --model ./t5 --task rte --data-dir SuperGLUE --out runs/rte --members 3 --seed 10
  incipit ensemble train --out runs/five --resume
      goes on with every member from its own last checkpoint, after Ctrl-C, a crash or a kill

Files of examples and prompt initialisations are those that `incipit train --help` lists.
Next: `incipit ensemble eval --ensemble OUT --data test.jsonl`.";

/// Flags of `ensemble train`.
#[derive(Args)]
#[command(
    after_help = AFTER_HELP,
    mut_arg("out", |arg| arg.help("Directory of the ensemble: new, or empty, or with --resume an ensemble's")),
    mut_arg("resume", |arg| arg.help("Go on with the ensemble in --out, every member from its last checkpoint")),
    mut_arg("seed", |arg| {
        arg.help("Seed of the first member's prompt, order of data and dropout; each of the others has the next one [default: 0]")
    })
)]
pub(crate) struct EnsembleTrainArgs {
    /// Prompts to train [default: 5, or with --resume as many as there are]
    #[arg(long, value_name = "N", help_heading = "Run")]
    members: Option<usize>,
    #[command(flatten)]
    pub(super) train: TrainArgs,
}

/// Trains, then prints what came of each member.
///
/// # Errors
/// Whatever stops a run: see the exit codes. If a member alone has failed, the others are told of first.
pub(crate) fn run(args: EnsembleTrainArgs, global: &Global) -> Result<Exit> {
    let options = args.train.ranks.options();
    let (flags, config, resume) = args.train.layers(global);
    let specs = ensemble::resolve(flags, config.as_deref(), resume, args.members)?;
    let next = |out: &Path| format!("incipit ensemble eval --ensemble {} --data FILE", out.display());
    group::carry_out(&specs, &ENSEMBLE, &options, global, ("ensemble train", &next))
}
