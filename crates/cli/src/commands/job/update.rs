//! `incipit job update`.

use anyhow::Result;
use clap::Args;
use incipit_proto::v1::{Job, UpdateJobRequest};
use pbjson_types::FieldMask;

use super::{control::worse, list, submit};
use crate::args::Global;
use crate::cluster::labels::LabelArgs;
use crate::cluster::{ConnectArgs, call, names, request_id, show};
use crate::exit::{Exit, bad_input, report};
use crate::progress::note;

/// Flags of `job update`.
#[derive(Args)]
pub(super) struct UpdateArgs {
    /// The jobs
    #[arg(value_name = "JOB", required = true, value_parser = names::job)]
    jobs: Vec<String>,
    /// Share of the backbone's time, against its other jobs; of queued jobs also their place
    #[arg(long, value_name = "1..100", value_parser = clap::value_parser!(u32).range(1..=100))]
    priority: Option<u32>,
    /// Attempts in all after one that failed for want of memory, within the program, or with its engine
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=10))]
    retries: Option<u32>,
    #[command(flatten)]
    labels: LabelArgs,
    /// Check everything, print what the jobs would be, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Changes jobs. Every one of them is asked, whatever becomes of the others.
///
/// # Errors
/// If nothing is to change, or the coordinator cannot be reached; what it refuses is told, and makes the exit code.
pub(super) async fn update(args: &UpdateArgs, connect: &ConnectArgs, global: &Global) -> Result<Exit> {
    let mut paths = Vec::new();
    let mut wanted = Job { labels: args.labels.changes(&mut paths), ..Job::default() };
    if let Some(priority) = args.priority {
        wanted.priority = priority;
        paths.push("priority".to_owned());
    }
    if let Some(retries) = args.retries {
        wanted.retry_policy = Some(submit::retry_policy(retries));
        paths.push("retry_policy".to_owned());
    }
    if paths.is_empty() {
        return bad_input("nothing is to change; give --priority, --retries, --label or --remove-label");
    }
    let client = connect.connect().await?;
    let (mut jobs, mut exit) = (Vec::new(), Exit::Ok);
    for name in &args.jobs {
        let request = UpdateJobRequest {
            job: Some(Job { name: name.clone(), ..wanted.clone() }),
            update_mask: Some(FieldMask { paths: paths.clone() }),
            request_id: request_id(None)?,
            validate_only: args.dry_run,
        };
        match call!(client, jobs.update_job(request)) {
            Ok(job) => jobs.push(job),
            Err(error) => exit = worse(exit, report(&error)),
        }
    }
    if !jobs.is_empty() {
        show::print(&jobs, || list::table(&jobs), global)?;
        if args.dry_run {
            note("so they would be; nothing was changed");
        }
    }
    Ok(exit)
}
