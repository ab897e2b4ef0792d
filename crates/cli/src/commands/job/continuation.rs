//! `incipit job continue`: another job, from a checkpoint of one that is there.

use anyhow::Result;
use clap::Args;
use incipit_proto::client::Client;
use incipit_proto::v1::{CreateJobRequest, Job, JobReason, TrainingSpec};

use super::{OneArgs, list};
use crate::args::Global;
use crate::cluster::names::{self, short};
use crate::cluster::{call, request_id, show};
use crate::exit::{Exit, bad_input};
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
    /// Evaluations without a better one after which the job ends, those that are made already included; 0 to do all steps [default: as
    /// the old job]
    #[arg(long, value_name = "N")]
    patience: Option<u32>,
    /// Steps from one checkpoint to the next [default: as the old job]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,
    /// Newest checkpoints to keep, beside the best [default: as the old job]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
}

impl ContinueArgs {
    /// The settings of the new job.
    fn spec(&self, old: &Job) -> Result<TrainingSpec> {
        let spec = old.spec.clone().unwrap_or_default();
        let patience = self.patience.or(spec.patience).filter(|patience| *patience > 0);
        let ended_by = spec.patience.filter(|_| old.reason() == JobReason::PatienceExhausted);
        if self.checkpoint == "last" && ended_by.is_some_and(|was| patience.is_some_and(|now| now <= was)) {
            return bad_input(format!(
                "{} ended after {} evaluations without a better one, and would end there again: give a larger --patience, 0 for \
                 all steps, or an earlier --checkpoint, such as best",
                short(&old.name),
                ended_by.unwrap_or_default()
            ));
        }
        Ok(TrainingSpec {
            steps: self.steps.or(spec.steps),
            patience,
            checkpoint_every: self.checkpoint_every.or(spec.checkpoint_every),
            keep: self.keep.or(spec.keep),
            ..spec
        })
    }
}

/// Hands it in.
///
/// # Errors
/// What the coordinator says.
pub(super) async fn run(args: ContinueArgs, client: &Client, global: &Global) -> Result<Exit> {
    let old = list::one(&args.one.job, client).await?;
    let spec = args.spec(&old)?;
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
