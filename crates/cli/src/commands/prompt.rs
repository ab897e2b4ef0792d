//! `incipit prompt`: checkpoints that were found good, under a name, with versions.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use incipit_proto::client::Client;
use incipit_proto::v1::{
    DeletePromptVersionRequest, GetPromptVersionRequest, ListPromptVersionsRequest, PromotePromptRequest,
    PromptVersion,
};
use incipit_tune::checkpoint::PROMPT;

use super::checkpoint::{self, download};
use crate::args::Global;
use crate::cluster::names::{self, short};
use crate::cluster::{ConnectArgs, block_on, call, list, request_id, show};
use crate::exit::Exit;
use crate::output;
use crate::progress::note;

/// Flags of `prompt`.
#[derive(Args)]
pub(crate) struct PromptArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: PromptCommand,
}

/// What can be done with prompts.
#[derive(Subcommand)]
enum PromptCommand {
    /// Make a checkpoint the next version of a prompt; it is kept from then on
    Promote(PromoteArgs),
    /// List versions of a prompt, or of all, the newest first
    List(ListArgs),
    /// Show a version, or with --out write it to a directory
    Get(GetArgs),
    /// Delete a version; its number is not given again
    Delete(DeleteArgs),
}

#[derive(Args)]
struct PromoteArgs {
    /// The checkpoint: JOB/500, JOB/best, JOB/last, or JOB for its best
    #[arg(value_name = "CHECKPOINT", value_parser = names::checkpoint)]
    checkpoint: String,
    /// The prompt: new, or one that gets another version
    #[arg(long, value_name = "PROMPT", value_parser = names::prompt)]
    name: String,
    /// The task whose prompt it is, of a job of several; JOB/best is then its best
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    task: String,
    /// What there is to say
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    /// The same request sent again under the same id makes no second version [default: a new one]
    #[arg(long, value_name = "UUID")]
    request_id: Option<String>,
}

#[derive(Args)]
struct ListArgs {
    /// The prompt [default: all]
    #[arg(value_name = "PROMPT", value_parser = names::prompt)]
    prompt: Option<String>,
}

#[derive(Args)]
struct GetArgs {
    /// The version: PROMPT/3, or PROMPT for the newest
    #[arg(value_name = "PROMPT[/VERSION]", value_parser = names::prompt_version)]
    version: String,
    /// Directory to write its checkpoint to: new, or empty
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct DeleteArgs {
    /// The version
    #[arg(value_name = "PROMPT/VERSION", value_parser = names::numbered_version)]
    version: String,
}

/// Does it.
///
/// # Errors
/// What the coordinator says, or if it cannot be reached.
pub(crate) fn run(args: PromptArgs, global: &Global) -> Result<Exit> {
    block_on(async move {
        let client = args.connect.connect().await?;
        match args.command {
            PromptCommand::Promote(args) => promote(&client, args, global).await?,
            PromptCommand::List(args) => {
                let parent = args.prompt.unwrap_or_else(|| "prompts/-".to_owned());
                let request = ListPromptVersionsRequest { parent, ..ListPromptVersionsRequest::default() };
                let all = list!(client, prompts.list_prompt_versions(request), versions, usize::MAX);
                show::print(&all, || table(&all), global)?;
            }
            PromptCommand::Get(args) => get(&client, &args, global).await?,
            PromptCommand::Delete(args) => {
                let told = short(&args.version);
                let (name, etag) = (args.version, String::new());
                let request = DeletePromptVersionRequest { name, request_id: request_id(None)?, etag };
                call!(client, prompts.delete_prompt_version(request))?;
                note(&format!("deleted {told}"));
            }
        }
        Ok(Exit::Ok)
    })
}

async fn promote(client: &Client, args: PromoteArgs, global: &Global) -> Result<()> {
    let request = PromotePromptRequest {
        prompt: args.name,
        checkpoint: args.checkpoint,
        task: args.task,
        description: args.description,
        request_id: request_id(args.request_id.as_deref())?,
        etag: String::new(),
    };
    let version = call!(client, prompts.promote_prompt(request))?;
    show::print(&version, || table(std::slice::from_ref(&version)), global)?;
    note(&format!("fetch it: incipit prompt get {} --out DIR", short(&version.name)));
    Ok(())
}

async fn get(client: &Client, args: &GetArgs, global: &Global) -> Result<()> {
    let request = GetPromptVersionRequest { name: args.version.clone() };
    let version = call!(client, prompts.get_prompt_version(request))?;
    match &args.out {
        Some(out) => write(client, &version, out, global).await,
        None => show::print(&version, || facts(&version), global),
    }
}

/// Writes the checkpoint that the version was made from, if it has the version's prompt.
async fn write(client: &Client, version: &PromptVersion, out: &Path, global: &Global) -> Result<()> {
    download::check_out(out)?;
    let checkpoint = checkpoint::get(client, &version.checkpoint, &version.task).await?;
    let name = if version.task.is_empty() { PROMPT.to_owned() } else { format!("{}/{PROMPT}", version.task) };
    let prompt = checkpoint.files.iter().find(|file| file.name == name);
    if prompt.is_none_or(|prompt| prompt.digest != version.digest) {
        bail!(
            "{} has the prompt {}, and its checkpoint {} has another; nothing was written",
            short(&version.name),
            version.digest,
            short(&checkpoint.name)
        );
    }
    download::download(client, (&checkpoint, &version.task), out, global).await
}

fn table(versions: &[PromptVersion]) -> String {
    let row = |version: &PromptVersion| {
        vec![
            short(&version.name),
            short(&version.checkpoint),
            show::score(version.score),
            show::age(version.create_time.as_ref()),
            show::or_none(version.description.clone()),
        ]
    };
    let header = ["NAME", "CHECKPOINT", "SCORE", "AGE", "DESCRIPTION"];
    let nothing = "no prompts; promote a checkpoint with `incipit prompt promote`";
    show::table(&header, versions.iter().map(row).collect(), &[4], nothing)
}

fn facts(version: &PromptVersion) -> String {
    output::facts([
        ("prompt", short(&version.name)),
        ("checkpoint", short(&version.checkpoint)),
        ("task", show::or_none(version.task.clone())),
        (
            "before it",
            if version.previous.is_empty() { show::NONE.to_owned() } else { short(&version.previous) },
        ),
        ("score", show::score(version.score)),
        ("description", show::or_none(version.description.clone())),
        ("digest", version.digest.clone()),
        ("backbone", show::or_none(version.backbone_fingerprint.clone())),
        ("created", show::time(version.create_time.as_ref())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_fit_a_terminal() {
        let version = PromptVersion {
            name: "prompts/greeter/versions/3".into(),
            checkpoint: "jobs/superglue-boolq-1/checkpoints/00012500".into(),
            previous: "prompts/greeter/versions/2".into(),
            description: "better with questions that have no question mark at their end".into(),
            score: Some(0.875),
            ..PromptVersion::default()
        };
        let text = table(std::slice::from_ref(&version));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for part in ["greeter/3", "superglue-boolq-1/12500", "0.875", "better"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(facts(&version).contains("greeter/2"));
    }
}
