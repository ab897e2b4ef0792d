//! `incipit job continue`: another job, from a checkpoint of one that is there.

use anyhow::Result;
use clap::Args;
use incipit_proto::client::Client;
use incipit_proto::v1::{CreateJobRequest, Job};

use super::{OneArgs, list};
use crate::args::Global;
use crate::cluster::names::{self, short};
use crate::cluster::{call, request_id, show};
use crate::exit::Exit;
use crate::progress::note;

/// Flags of `job continue`.
#[derive(Args)]
#[command(
    after_help = "The new job has the settings, data, priority and labels of the old one, its optimizer and its place in the data. The old one stays as it is. \
                  The backbone has to hold the same model in the same type. On as many ranks a model (--tp) and the same kind of device a prompt ends in \
                  the bytes in which the old job's would have; on others it goes on, and is rounded differently."
)]
pub(super) struct ContinueArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Which checkpoint: a step, `best` or `last`
    #[arg(long, value_name = "STEP", default_value = "last")]
    checkpoint: String,
    /// Name of the new job [default: made up]
    #[arg(long, value_name = "JOB", value_parser = names::new_id)]
    name: Option<String>,
    /// The backbone to train on [default: the old job's]
    #[arg(long, value_name = "BACKBONE", value_parser = names::backbone)]
    backbone: Option<String>,
    /// Steps in all, those that are made already included; others than the old job's need a constant schedule [default: as the old
    /// job]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
}

/// Hands it in.
///
/// # Errors
/// What the coordinator says.
pub(super) async fn run(args: ContinueArgs, client: &Client, global: &Global) -> Result<Exit> {
    let old = list::one(&args.one.job, client).await?;
    let mut spec = old.spec.unwrap_or_default();
    spec.steps = args.steps.or(spec.steps);
    let job = Job {
        backbone: args.backbone.unwrap_or(old.backbone),
        spec: Some(spec),
        priority: old.priority,
        retry_policy: old.retry_policy,
        labels: old.labels,
        ..Job::default()
    };
    let request = CreateJobRequest {
        job_id: args.name.unwrap_or_default(),
        job: Some(job),
        request_id: request_id(None)?,
        validate_only: false,
        continue_from: format!("{}/checkpoints/{}", old.name, args.checkpoint),
    };
    let job = call!(client, jobs.create_job(request))?;
    show::print(&job, || list::table(std::slice::from_ref(&job)), global)?;
    note(&format!(
        "it goes on from {}; watch it: incipit job watch {}",
        job.continued_from,
        short(&job.name)
    ));
    Ok(Exit::Ok)
}
