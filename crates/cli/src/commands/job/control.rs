//! `incipit job pause`, `resume`, `cancel` and `delete`.

use std::time::Duration;

use anyhow::Result;
use incipit_proto::client::Client;
use incipit_proto::v1::{
    CancelJobRequest, DeleteJobRequest, Job, JobState, PauseJobRequest, ResumeJobRequest,
};

use super::{ManyArgs, list, words};
use crate::args::Global;
use crate::cluster::names::short;
use crate::cluster::{ConnectArgs, call, request_id, show};
use crate::exit::{Exit, report};
use crate::progress::{note, warn};

/// How often a job is looked at that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Asks that jobs be paused, run again or be cancelled. Every one of them is asked, whatever becomes of the others.
///
/// # Errors
/// If the coordinator cannot be reached; what it refuses is told, and makes the exit code.
pub(super) async fn change(
    args: &ManyArgs,
    to: JobState,
    connect: &ConnectArgs,
    global: &Global,
) -> Result<Exit> {
    let client = connect.connect().await?;
    let (mut jobs, mut exit) = (Vec::new(), Exit::Ok);
    for name in &args.jobs {
        match ask(&client, name, to).await {
            Ok(job) => jobs.push(job),
            Err(error) => exit = worse(exit, report(&error)),
        }
    }
    if args.wait {
        for job in &mut jobs {
            *job = wait(&client, &job.name, to).await?;
            exit = worse(exit, arrived(job, to));
        }
    }
    if !jobs.is_empty() {
        show::print(&jobs, || list::table(&jobs), global)?;
    }
    Ok(exit)
}

async fn ask(client: &Client, name: &str, to: JobState) -> Result<Job> {
    let (name, request_id, etag) = (name.to_owned(), request_id(None)?, String::new());
    match to {
        JobState::Paused => call!(client, jobs.pause_job(PauseJobRequest { name, etag, request_id })),
        JobState::Running => call!(client, jobs.resume_job(ResumeJobRequest { name, etag, request_id })),
        _ => call!(client, jobs.cancel_job(CancelJobRequest { name, etag, request_id })),
    }
}

async fn wait(client: &Client, name: &str, to: JobState) -> Result<Job> {
    let mut told = false;
    loop {
        let job = list::one(name, client).await?;
        if job.state() == to || words::has_ended(&job) {
            return Ok(job);
        }
        if !std::mem::replace(&mut told, true) {
            note(&format!("waiting for {}: {}", short(name), words::state(&job)));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What is not as it was asked for, because the job ended before, is a failure.
fn arrived(job: &Job, to: JobState) -> Exit {
    if job.state() == to {
        return Exit::Ok;
    }
    warn(&format!("{} has ended instead: {} ({})", short(&job.name), words::state(job), words::why(job)));
    Exit::Failure
}

pub(super) fn worse(one: Exit, other: Exit) -> Exit {
    if other == Exit::Ok { one } else { other }
}

/// Forgets jobs.
///
/// # Errors
/// If the coordinator cannot be reached; what it refuses is told, and makes the exit code.
pub(super) async fn delete(jobs: &[String], client: &Client) -> Result<Exit> {
    let mut exit = Exit::Ok;
    for name in jobs {
        let request =
            DeleteJobRequest { name: name.clone(), etag: String::new(), request_id: request_id(None)? };
        match call!(client, jobs.delete_job(request)) {
            Ok(_) => note(&format!("deleted {}", short(name))),
            Err(error) => exit = worse(exit, report(&error)),
        }
    }
    Ok(exit)
}
