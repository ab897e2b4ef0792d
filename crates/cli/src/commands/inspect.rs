//! `incipit inspect`: what is in a model or a prompt.

mod labels;
mod model;
mod page;
mod prompt;
mod similarity;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::args::Global;
use crate::exit::Exit;
use crate::output;

const AFTER_PROMPT: &str = "\
The rows of a trained prompt tend to lie near to words that belong together, and labels that rows began as tend to stay there (Lester et \
al. 2021, section 7). docs/interpreting-prompts.md says what each number means.

Examples:
  incipit inspect prompt runs/q
  incipit inspect prompt adapter/ --model ./t5 --labels True,False
  incipit inspect prompt runs/boolq --html boolq.html";

const AFTER_SIMILARITY: &str = "\
Prompts of tasks that help each other tend to be alike (Vu et al. 2022, SPoT). Only prompts of one model can be compared.

Examples:
  incipit inspect similarity runs/*
  incipit inspect similarity runs/boolq runs/rte --html alike.html";

/// What can be looked into.
#[derive(Subcommand)]
pub(crate) enum InspectCommand {
    /// Show a model's parameters, shapes, types, configuration, fingerprint and tokenizer
    Model(ModelArgs),
    /// Show how long a prompt's rows are, which words of the vocabulary they lie near to, and whether labels are among them
    Prompt(PromptArgs),
    /// Show how like prompts of several tasks are to each other
    Similarity(SimilarityArgs),
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
#[command(after_help = AFTER_PROMPT)]
pub(crate) struct PromptArgs {
    /// Run directory, .npy file, PEFT directory or checkpoint
    #[arg(value_name = "PATH")]
    prompt: PathBuf,
    /// Backbone whose vocabulary the rows are compared with; of one on the Hub all files are downloaded first [default: that of the run that made the prompt, where its
    /// directory is still there, else none]
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: Option<String>,
    /// Nearest words of each row
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    neighbours: u16,
    /// Labels to look for among the words: True,False or, as for `train`, 0=False,1=True [default: those of the run that
    /// made the prompt]
    #[arg(long, value_name = "TEXT,...", conflicts_with = "task")]
    labels: Option<String>,
    /// Benchmark whose labels to look for; `incipit task list` has the names
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// File to write a page with figures to
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Flags of `inspect similarity`.
#[derive(Args)]
#[command(after_help = AFTER_SIMILARITY)]
pub(crate) struct SimilarityArgs {
    /// Two or more prompts: run directories, .npy files, PEFT directories or checkpoints
    #[arg(value_name = "PATH", required = true, num_args = 2..)]
    prompts: Vec<PathBuf>,
    /// File to write a page with figures to
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Looks, and prints what is there.
///
/// # Errors
/// If it cannot be read, or standard output or the page cannot be written.
pub(crate) fn run(command: &InspectCommand, global: &Global) -> Result<Exit> {
    match command {
        InspectCommand::Model(args) => output::print(&model::examine(args)?, global.json)?,
        InspectCommand::Prompt(args) => {
            let report = prompt::examine(args)?;
            page::write(args.html.as_deref(), || page::of_prompt(&report))?;
            output::print(&report, global.json)?;
        }
        InspectCommand::Similarity(args) => {
            let report = similarity::examine(args)?;
            page::write(args.html.as_deref(), || page::of_similarity(&report))?;
            output::print(&report, global.json)?;
        }
    }
    Ok(Exit::Ok)
}
