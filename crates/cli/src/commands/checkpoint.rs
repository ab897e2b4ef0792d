//! `incipit checkpoint`: what jobs have saved.

pub(crate) mod download;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use incipit_proto::client::Client;
use incipit_proto::v1::{
    Checkpoint, CheckpointFile, CheckpointTask, CollectGarbageRequest, DeleteCheckpointRequest,
    GetCheckpointRequest, ListCheckpointsRequest, PinCheckpointRequest, VerifyCheckpointRequest,
    VerifyCheckpointResponse,
};

use crate::args::Global;
use crate::cluster::names::{self, short};
use crate::cluster::{ConnectArgs, block_on, call, list, request_id, show};
use crate::exit::{Exit, bad_input};
use crate::output;
use crate::progress::note;
use crate::units;

const AFTER_HELP: &str = "\
A checkpoint is named JOB/STEP, JOB/best or JOB/last; JOB alone is its best. Each of several tasks that share rows has a best of its own, \
which --task names.";

/// Flags of `checkpoint`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CheckpointArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: CheckpointCommand,
}

/// What can be done with checkpoints.
#[derive(Subcommand)]
enum CheckpointCommand {
    /// List a job's checkpoints, the newest first
    List(JobArgs),
    /// Show a checkpoint and its files
    Get(OfTaskArgs),
    /// Write a checkpoint to a directory, as `incipit train` has it, for `eval`, `generate` and the rest
    Download(DownloadArgs),
    /// Keep a checkpoint, whatever its job's --keep says
    Pin(OfTaskArgs),
    /// Keep it no longer than its job's --keep says
    Unpin(OfTaskArgs),
    /// Delete a checkpoint
    Delete(OneArgs),
    /// Read a checkpoint's files on the store, and compare their hashes
    Verify(VerifyArgs),
    /// Delete files on the store that no checkpoint and no job names any more
    Gc(GcArgs),
}

#[derive(Args)]
struct JobArgs {
    /// The job
    #[arg(value_name = "JOB", value_parser = names::job)]
    job: String,
}

#[derive(Args)]
struct OneArgs {
    /// The checkpoint: JOB/500, JOB/best, JOB/last, or JOB for its best
    #[arg(value_name = "CHECKPOINT", value_parser = names::checkpoint)]
    checkpoint: String,
}

#[derive(Args)]
struct OfTaskArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The task that is meant, of a job of several
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    task: String,
}

#[derive(Args)]
struct DownloadArgs {
    #[command(flatten)]
    of: OfTaskArgs,
    /// Directory to write: new, or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Args)]
struct VerifyArgs {
    /// The checkpoint: JOB/500, JOB/best, JOB/last, or JOB for its best
    #[arg(value_name = "CHECKPOINT", value_parser = names::checkpoint, required_unless_present = "job", conflicts_with = "job")]
    checkpoint: Option<String>,
    /// The task that is meant, of a job of several
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true, conflicts_with = "job")]
    task: String,
    /// All checkpoints of a job
    #[arg(long, value_name = "JOB", value_parser = names::job)]
    job: Option<String>,
}

#[derive(Args)]
struct GcArgs {
    /// Say what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
}

/// Does it.
///
/// # Errors
/// What the coordinator says, or if it cannot be reached.
pub(crate) fn run(args: CheckpointArgs, global: &Global) -> Result<Exit> {
    block_on(async move {
        let client = args.connect.connect().await?;
        match args.command {
            CheckpointCommand::List(args) => {
                let all = of_job(&client, &args.job).await?;
                show::print(&all, || table(&all), global)?;
            }
            CheckpointCommand::Get(args) => {
                let checkpoint = get(&client, &args.one.checkpoint, &args.task).await?;
                show::print(&checkpoint, || facts(&checkpoint), global)?;
            }
            CheckpointCommand::Download(args) => {
                download::check_out(&args.out)?;
                let OfTaskArgs { one, task } = &args.of;
                let checkpoint = get(&client, &one.checkpoint, task).await?;
                download::download(&client, (&checkpoint, task), &args.out, global).await?;
            }
            CheckpointCommand::Pin(args) => pin(&client, &args, true, global).await?,
            CheckpointCommand::Unpin(args) => pin(&client, &args, false, global).await?,
            CheckpointCommand::Delete(args) => delete(&client, args.checkpoint).await?,
            CheckpointCommand::Verify(args) => return verify(&client, &args, global).await,
            CheckpointCommand::Gc(args) => gc(&client, args.dry_run, global).await?,
        }
        Ok(Exit::Ok)
    })
}

/// A checkpoint by its name, which may end in `best` or `last`; of a task of several, if it is named.
///
/// # Errors
/// What the coordinator says.
pub(crate) async fn get(client: &Client, name: &str, task: &str) -> Result<Checkpoint> {
    let request = GetCheckpointRequest { name: name.to_owned(), task: task.to_owned() };
    call!(client, checkpoints.get_checkpoint(request))
}

async fn of_job(client: &Client, job: &str) -> Result<Vec<Checkpoint>> {
    let request = ListCheckpointsRequest { parent: job.to_owned(), ..ListCheckpointsRequest::default() };
    Ok(list!(client, checkpoints.list_checkpoints(request), checkpoints, usize::MAX))
}

async fn pin(client: &Client, args: &OfTaskArgs, pinned: bool, global: &Global) -> Result<()> {
    let (name, task, etag) = (args.one.checkpoint.clone(), args.task.clone(), String::new());
    let request = PinCheckpointRequest { name, task, pinned, request_id: request_id(None)?, etag };
    let checkpoint = call!(client, checkpoints.pin_checkpoint(request))?;
    show::print(&checkpoint, || table(std::slice::from_ref(&checkpoint)), global)
}

async fn delete(client: &Client, name: String) -> Result<()> {
    if name.ends_with("/best") || name.ends_with("/last") {
        return bad_input(format!("{} may be another one by now; name the step: JOB/500", short(&name)));
    }
    let told = short(&name);
    let request = DeleteCheckpointRequest { name, request_id: request_id(None)?, etag: String::new() };
    call!(client, checkpoints.delete_checkpoint(request))?;
    note(&format!("deleted {told}"));
    Ok(())
}

async fn verify(client: &Client, args: &VerifyArgs, global: &Global) -> Result<Exit> {
    let names = match (&args.checkpoint, &args.job) {
        (Some(name), _) => vec![name.clone()],
        (None, Some(job)) => {
            of_job(client, job).await?.into_iter().map(|checkpoint| checkpoint.name).collect()
        }
        (None, None) => Vec::new(),
    };
    let mut found = Vec::new();
    for name in names {
        found.push(call!(
            client,
            checkpoints.verify_checkpoint(VerifyCheckpointRequest { name, task: args.task.clone() })
        )?);
    }
    show::print(&found, || verified(&found), global)?;
    Ok(if found.iter().all(|one| one.valid) { Exit::Ok } else { Exit::Failure })
}

async fn gc(client: &Client, dry_run: bool, global: &Global) -> Result<()> {
    let collected =
        call!(client, checkpoints.collect_garbage(CollectGarbageRequest { validate_only: dry_run }))?;
    let text = || {
        let done = if dry_run { "would be deleted" } else { "deleted" };
        format!(
            "{} files, {}, {done}",
            units::count(collected.digests.len() as u64),
            units::bytes(collected.bytes)
        )
    };
    show::print(&collected, text, global)
}

/// Checkpoints, one a line.
fn table(checkpoints: &[Checkpoint]) -> String {
    let row = |checkpoint: &Checkpoint| {
        let size = checkpoint.files.iter().map(|file| file.size).sum();
        vec![
            short(&checkpoint.name),
            show::score(checkpoint.score),
            show::or_none(marks(checkpoint)),
            units::bytes(size),
            checkpoint.attempt.to_string(),
            show::age(checkpoint.create_time.as_ref()),
        ]
    };
    let header = ["NAME", "SCORE", "MARKS", "SIZE", "ATTEMPT", "AGE"];
    show::table(&header, checkpoints.iter().map(row).collect(), &[2], "no checkpoints yet")
}

/// `best pinned damaged`; of a job of several tasks `best of boolq, rte`.
fn marks(checkpoint: &Checkpoint) -> String {
    let best = checkpoint.tasks.iter().filter(|task| task.best).map(|task| &*task.name);
    let best = best.collect::<Vec<_>>().join(", ");
    let of_tasks = (!best.is_empty()).then(|| format!("best of {best}"));
    let best = checkpoint.best.then(|| "best".to_owned());
    let pinned = checkpoint.pinned.then(|| "pinned".to_owned());
    let damaged = checkpoint.damaged.then(|| "damaged".to_owned());
    [best, of_tasks, pinned, damaged].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// All there is to know of a checkpoint.
fn facts(checkpoint: &Checkpoint) -> String {
    let mut pairs = vec![
        ("checkpoint", short(&checkpoint.name)),
        ("step", units::count(checkpoint.step)),
        ("score", show::score(checkpoint.score)),
        ("marks", show::or_none(marks(checkpoint))),
        ("made by", format!("attempt {}, epoch {} of the backbone", checkpoint.attempt, checkpoint.epoch)),
        ("backbone", show::or_none(checkpoint.backbone_fingerprint.clone())),
        ("created", show::time(checkpoint.create_time.as_ref())),
    ];
    let of_task = |task: &CheckpointTask| {
        let best = if task.best { "  best" } else { "" };
        ("task", format!("{}  score {}{best}", task.name, show::score(task.score)))
    };
    pairs.extend(checkpoint.tasks.iter().map(of_task));
    let text = output::facts(pairs);
    let row = |file: &CheckpointFile| vec![file.name.clone(), units::bytes(file.size), file.digest.clone()];
    let files = show::table(
        &["FILE", "SIZE", "BLAKE3"],
        checkpoint.files.iter().map(row).collect(),
        &[2],
        "no files",
    );
    format!("{text}\n\n{files}")
}

fn verified(found: &[VerifyCheckpointResponse]) -> String {
    let line = |one: &VerifyCheckpointResponse| {
        let verdict = if one.valid { "valid" } else { "damaged" };
        let problems: String = one.problems.iter().map(|problem| format!("\n  {problem}")).collect();
        format!("{} {verdict} ({} read){problems}", short(&one.name), units::bytes(one.bytes))
    };
    if found.is_empty() {
        "no checkpoints".to_owned()
    } else {
        found.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_listed_under_names_that_can_be_given_back() {
        let files = vec![CheckpointFile { name: "MANIFEST".into(), digest: "ab".repeat(32), size: 2048 }];
        let name = "jobs/superglue-boolq-1/checkpoints/00000500".to_owned();
        let checkpoint = Checkpoint {
            name,
            step: 500,
            files,
            score: Some(0.5),
            best: true,
            pinned: true,
            damaged: true,
            ..Checkpoint::default()
        };
        for text in [table(std::slice::from_ref(&checkpoint)), facts(&checkpoint)] {
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            for part in ["superglue-boolq-1/500", "0.500", "best", "pinned", "damaged", "2.0 KiB"] {
                assert!(text.contains(part), "no {part} in\n{text}");
            }
        }
    }

    #[test]
    fn what_is_damaged_is_told_file_by_file() {
        let name = "jobs/j/checkpoints/00000500".to_owned();
        let problems = vec!["prompt.safetensors: another hash".to_owned()];
        let text = verified(&[VerifyCheckpointResponse { name, valid: false, problems, bytes: 3 }]);
        assert_eq!(text, "j/500 damaged (3 B read)\n  prompt.safetensors: another hash");
    }
}
