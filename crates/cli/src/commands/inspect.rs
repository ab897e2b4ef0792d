//! `incipit inspect`: what is in a model or a prompt.

mod model;
mod prompt;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::args::Global;
use crate::exit::Exit;
use crate::output;

/// What can be looked into.
#[derive(Subcommand)]
pub(crate) enum InspectCommand {
    /// Show a model's parameters, shapes, types, configuration, fingerprint and tokenizer
    Model(ModelArgs),
    /// Show the norms of a prompt's rows and, with --model, the words of the vocabulary nearest to them
    Prompt(PromptArgs),
}

/// Flags of `inspect model`.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Directory of the model, or a name on the Hugging Face Hub
    #[arg(value_name = "DIR|HUB_ID")]
    model: String,
    /// Leave the fingerprint out: it reads every number of the weights
    #[arg(long)]
    no_fingerprint: bool,
}

/// Flags of `inspect prompt`.
#[derive(Args)]
pub(crate) struct PromptArgs {
    /// Run directory, .npy file, PEFT directory or checkpoint
    #[arg(value_name = "PATH")]
    prompt: PathBuf,
    /// Backbone whose vocabulary the rows are compared with
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: Option<String>,
    /// Nearest words of each row
    #[arg(long, value_name = "N", default_value_t = 5)]
    neighbours: usize,
}

/// Looks, and prints what is there.
///
/// # Errors
/// If it cannot be read, or standard output cannot be written.
pub(crate) fn run(command: &InspectCommand, global: &Global) -> Result<Exit> {
    match command {
        InspectCommand::Model(args) => output::print(&model::examine(args)?, global.json)?,
        InspectCommand::Prompt(args) => output::print(&prompt::examine(args)?, global.json)?,
    }
    Ok(Exit::Ok)
}
