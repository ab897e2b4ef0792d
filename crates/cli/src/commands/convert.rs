//! `incipit convert`: models and prompts from one kind of file to another.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use incipit_model::{Config, Placement};
use incipit_tune::backbone::Backbone;
use incipit_tune::engine::EngineOptions;
use incipit_tune::peft::{self, BaseModel};
use incipit_tune::prompt::Prompt;
use incipit_tune::trained::{Trained, WEIGHTS};
use incipit_tune::{atomic, checkpoint, npy, spec::Precision};
use incipit_weights::{Checkpoint, Written, resolve, resolve_config, write_safetensors};
use serde::Serialize;

use super::backbone::run_settings;
use crate::args::{Global, choice, names};
use crate::exit::{BadInput, Exit, bad_input};
use crate::output::{self, Printed};
use crate::units;

/// How the file of a checkpoint's prompt ends.
const SAFETENSORS: &str = "safetensors";

/// What can be converted.
#[derive(Subcommand)]
pub(crate) enum ConvertCommand {
    /// Rewrite a model (pytorch_model.bin or safetensors; f32, bf16 or f16) as safetensors, in shards where it is large
    Model(ModelArgs),
    /// Rewrite a prompt as an .npy file, a PEFT directory, or a file as checkpoints have it
    Prompt(PromptArgs),
}

/// Flags of `convert model`.
#[derive(Args)]
#[command(
    after_help = "One tensor is in memory at a time; with --weights the model is, and all that was trained. The configuration and the tokenizer \
                  are copied beside the weights, and DST is whole or absent, whatever happens."
)]
pub(crate) struct ModelArgs {
    /// Directory of the model, or a name on the Hugging Face Hub
    #[arg(value_name = "SRC")]
    source: String,
    /// Directory to make; it must not exist, or be empty
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// Type to write
    #[arg(long, default_value = "bf16", value_parser = choice::<Precision>(names::DTYPES))]
    dtype: Precision,
    /// Largest file; more weights become shards with an index
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
    /// Trained weights to put in the place of the model's own: a run of --method model, or a checkpoint of such a run or job
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
}

/// Flags of `convert prompt`.
#[derive(Args)]
pub(crate) struct PromptArgs {
    /// Prompt to read: a run's directory (its best prompt), an .npy file, a PEFT directory, a checkpoint or its
    /// prompt.safetensors
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// File or directory to write; it must not exist
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// What to write [default: npy where DST ends in .npy, checkpoint where it ends in .safetensors, else peft]
    #[arg(long, value_enum)]
    to: Option<PromptKind>,
    /// Backbone that the prompt is for; PEFT's file names it. Of it only the config.json is read, and fetched where it is
    /// on the Hub [default: that of the run that made the prompt]
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: Option<String>,
}

/// What a prompt can be written as.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum PromptKind {
    /// One array [P, D] of f32, as google-research/prompt-tuning reads it
    Npy,
    /// A directory as Hugging Face PEFT loads it
    Peft,
    /// The prompt.safetensors of a checkpoint, for --prompt and --prompt-init: of any prompt, wherever its rows stand
    Checkpoint,
}

#[derive(Serialize)]
struct ModelWritten {
    destination: PathBuf,
    files: Vec<String>,
    tensors: usize,
    bytes: u64,
    dtype: String,
}

#[derive(Serialize)]
struct PromptWritten {
    destination: PathBuf,
    kind: PromptKind,
    rows: usize,
    width: usize,
}

/// Converts, and prints what was written.
///
/// # Errors
/// If the source cannot be read, the destination is taken, or the disk refuses.
pub(crate) fn run(command: &ConvertCommand, global: &Global) -> Result<Exit> {
    match command {
        ConvertCommand::Model(args) => output::print(&model(args)?, global.json)?,
        ConvertCommand::Prompt(args) => output::print(&prompt(args)?, global.json)?,
    }
    Ok(Exit::Ok)
}

fn model(args: &ModelArgs) -> Result<ModelWritten> {
    let written = match &args.weights {
        Some(weights) => with_weights(args, weights)?,
        None => {
            let source = Checkpoint::open(&resolve(&args.source)?, args.dtype.into())?;
            write_safetensors(&args.destination, &source, args.dtype.into(), args.max_shard_size)?
        }
    };
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(ModelWritten {
        destination: args.destination.clone(),
        files: written.files.iter().map(name).collect(),
        tensors: written.num_tensors,
        bytes: written.num_bytes,
        dtype: args.dtype.to_string(),
    })
}

fn with_weights(args: &ModelArgs, path: &Path) -> Result<Written> {
    refuse_to_overwrite(&args.destination)?;
    let Trained::Weights(weights) = Trained::read(path)? else {
        return bad_input(format!(
            "{} holds a prompt, which stays beside its model: `eval` and `generate` take it as it is, and `convert prompt` rewrites it",
            path.display()
        ));
    };
    let backbone = Backbone::load(&args.source, args.dtype, EngineOptions::default())?;
    let written = backbone.write_with(&weights, &args.destination, args.max_shard_size);
    written.with_context(|| format!("cannot write {} with the weights of {}", args.source, path.display()))
}

fn prompt(args: &PromptArgs) -> Result<PromptWritten> {
    let prompt = Prompt::read(&args.source)?;
    let kind = args.to.unwrap_or(match args.destination.extension().and_then(OsStr::to_str) {
        Some("npy") => PromptKind::Npy,
        Some(SAFETENSORS) => PromptKind::Checkpoint,
        _ => PromptKind::Peft,
    });
    refuse_to_overwrite(&args.destination)?;
    if let Some(parent) = args.destination.parent().filter(|p| !p.as_os_str().is_empty()) {
        atomic::create_dir(parent)?;
    }
    match kind {
        PromptKind::Npy if prompt.placement() != Placement::Before => {
            return bad_input(
                "an .npy file has no room to tell that the prompt does not stand before the input: give --to checkpoint, and a DST \
                 that ends in .safetensors",
            );
        }
        PromptKind::Npy => npy::write(&args.destination, &prompt)?,
        PromptKind::Checkpoint => {
            check_file_name(&args.destination)?;
            checkpoint::write_prompt(&args.destination, &prompt)?;
        }
        PromptKind::Peft => peft::write(&args.destination, &prompt, &base_model(args, &prompt)?)?,
    }
    Ok(PromptWritten {
        destination: args.destination.clone(),
        kind,
        rows: prompt.num_rows(),
        width: prompt.width(),
    })
}

/// Checks that a prompt under this name is read as what it is.
fn check_file_name(path: &Path) -> Result<()> {
    let others = [peft::WEIGHTS, WEIGHTS];
    let is_other = path.file_name().is_some_and(|name| others.iter().any(|other| name == *other));
    if is_other || path.extension().is_none_or(|end| end != SAFETENSORS) {
        return bad_input(format!(
            "{} would not be read as a prompt: give a name that ends in .safetensors, such as prompt.safetensors, and is none of {}",
            path.display(),
            others.join(", ")
        ));
    }
    Ok(())
}

fn refuse_to_overwrite(path: &Path) -> Result<()> {
    let taken = match std::fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.exists(),
    };
    if taken {
        bad_input(format!("{} is there already: remove it, or give another place", path.display()))
    } else {
        Ok(())
    }
}

/// The model that PEFT's file names: from `--model`, or from the run beside the prompt.
fn base_model(args: &PromptArgs, prompt: &Prompt) -> Result<BaseModel> {
    let of_run = || Ok::<_, anyhow::Error>(run_settings(&args.source)?.and_then(|settings| settings.model));
    let name = match &args.model {
        Some(model) => Some(model.clone()),
        None => of_run()?,
    };
    let name = name.ok_or_else(|| {
        BadInput(
            "a PEFT directory names the backbone that its prompt is for: give it with --model".to_owned(),
        )
    })?;
    let path = resolve_config(&name)?;
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = Config::from_json(&text)?;
    prompt.check_width(config.d_model, &args.source)?;
    Ok(BaseModel { name, num_layers: config.num_layers, num_heads: config.num_heads })
}

impl Printed for ModelWritten {
    fn text(&self) -> String {
        output::facts([
            ("wrote", self.destination.display().to_string()),
            ("files", self.files.join(", ")),
            ("tensors", self.tensors.to_string()),
            ("size", format!("{} of {}", units::bytes(self.bytes), self.dtype)),
        ])
    }
}

impl Printed for PromptWritten {
    fn text(&self) -> String {
        let kind = match self.kind {
            PromptKind::Npy => "an .npy file",
            PromptKind::Peft => "a PEFT directory",
            PromptKind::Checkpoint => "a prompt.safetensors, as checkpoints have it",
        };
        output::facts([
            ("wrote", self.destination.display().to_string()),
            ("as", kind.to_owned()),
            ("shape", format!("{} rows of {}", self.rows, self.width)),
        ])
    }
}
