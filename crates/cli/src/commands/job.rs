//! `incipit job`: prompts being trained on a resident backbone.

mod continuation;
mod control;
mod draft;
mod list;
mod plan;
mod plot;
mod start;
mod submit;
mod update;
mod view;
mod watch;
mod words;

pub(crate) use draft::job_fields;

use anyhow::Result;
use clap::{Args, Subcommand};
use incipit_proto::v1::JobState;

use crate::args::Global;
use crate::cluster::logs::{self, LogsArgs};
use crate::cluster::{ConnectArgs, block_on, names};
use crate::exit::Exit;

/// Flags of `job`.
#[derive(Args)]
pub(crate) struct JobArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: JobCommand,
}

/// What can be done with jobs.
#[derive(Subcommand)]
enum JobCommand {
    /// Hand in a job: the flags and files of `train`, trained on a backbone of the cluster
    Submit(Box<submit::SubmitArgs>),
    /// Go on from a checkpoint of a job as another job: after a failure, for more steps, on another backbone, or from further back
    Continue(continuation::ContinueArgs),
    /// List jobs, the newest first
    List(list::ListArgs),
    /// Show a job
    Get(OneArgs),
    /// Follow a job until it ends: its state, its loss and its scores
    #[command(after_help = WATCH_HELP)]
    Watch(OneArgs),
    /// Print what was logged of a job
    Logs(JobLogsArgs),
    /// Change jobs: their priority, retries or labels
    Update(update::UpdateArgs),
    /// Take jobs off their backbones, behind a checkpoint
    Pause(ManyArgs),
    /// Put paused jobs into the queue again
    Resume(ManyArgs),
    /// End jobs; their checkpoints stay
    Cancel(ManyArgs),
    /// Forget jobs that have ended, with their checkpoints, metrics and logs
    Delete(DeleteArgs),
}

const WATCH_HELP: &str = "\
On a terminal a view that changes, elsewhere a line for each change and measurement, with --json an object a line: {\"job\": ...} or
{\"point\": ...}. After a break it goes on where it was. Ctrl-C leaves; the job goes on.

It ends as the job does: 0 succeeded, 1 failed, 2 failed for its data or settings, 3 failed at a loss that was not finite, 5 cancelled.";

/// A job.
#[derive(Args)]
struct OneArgs {
    /// The job
    #[arg(value_name = "JOB", value_parser = names::job)]
    job: String,
}

/// Jobs.
#[derive(Args)]
struct ManyArgs {
    /// The jobs
    #[arg(value_name = "JOB", required = true, value_parser = names::job)]
    jobs: Vec<String>,
    /// Wait until it is so
    #[arg(long)]
    wait: bool,
}

/// A job whose logs are wanted.
#[derive(Args)]
struct JobLogsArgs {
    #[command(flatten)]
    one: OneArgs,
    #[command(flatten)]
    logs: LogsArgs,
}

/// Jobs to be forgotten.
#[derive(Args)]
struct DeleteArgs {
    /// The jobs
    #[arg(value_name = "JOB", required = true, value_parser = names::job)]
    jobs: Vec<String>,
}

/// Does it.
///
/// # Errors
/// What the coordinator says, or if it cannot be reached.
pub(crate) fn run(args: JobArgs, global: &Global) -> Result<Exit> {
    let JobArgs { connect, command } = args;
    block_on(async move {
        match command {
            // It reads its files before it asks anybody.
            JobCommand::Submit(args) => submit::run(*args, &connect, global).await,
            JobCommand::Continue(args) => continuation::run(args, &connect.connect().await?, global).await,
            JobCommand::List(args) => list::list(&args, &connect.connect().await?, global).await,
            JobCommand::Get(args) => list::get(&args.job, &connect.connect().await?, global).await,
            JobCommand::Watch(args) => watch::watch(&connect.connect().await?, &args.job, global).await,
            JobCommand::Logs(JobLogsArgs { one: OneArgs { job }, logs: args }) => {
                let client = connect.connect().await?;
                let ended = async || Ok(words::has_ended(&list::one(&job, &client).await?));
                logs::logs(&args, &job, &client, global, ended).await
            }
            JobCommand::Update(args) => update::update(&args, &connect, global).await,
            JobCommand::Pause(args) => control::change(&args, JobState::Paused, &connect, global).await,
            JobCommand::Resume(args) => control::change(&args, JobState::Running, &connect, global).await,
            JobCommand::Cancel(args) => control::change(&args, JobState::Cancelled, &connect, global).await,
            JobCommand::Delete(args) => control::delete(&args.jobs, &connect.connect().await?).await,
        }
    })
}
