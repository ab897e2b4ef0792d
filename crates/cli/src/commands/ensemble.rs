//! `incipit ensemble`: prompts that differ in their seed alone, trained together, and their votes.

mod eval;
mod train;

use anyhow::Result;
use clap::Subcommand;
use incipit_tune::spec::Backend;

use crate::args::Global;
use crate::exit::Exit;

/// What can be done with ensembles.
#[derive(Subcommand)]
pub(crate) enum EnsembleCommand {
    /// Tune several prompts at once on one backbone, each with a seed of its own
    Train(Box<train::EnsembleTrainArgs>),
    /// Measure the prompts of an ensemble and their majority vote, in one pass over the examples
    Eval(Box<eval::EnsembleEvalArgs>),
}

impl EnsembleCommand {
    /// What is to carry numbers between ranks.
    pub(crate) fn collective(&self) -> Option<Backend> {
        match self {
            Self::Train(args) => args.train.ranks.collective,
            Self::Eval(args) => args.ranks.collective,
        }
    }
}

/// Trains or measures.
///
/// # Errors
/// As `train` and `eval`.
pub(crate) fn run(command: EnsembleCommand, global: &Global) -> Result<Exit> {
    match command {
        EnsembleCommand::Train(args) => train::run(*args, global),
        EnsembleCommand::Eval(args) => eval::run(&args, global),
    }
}
