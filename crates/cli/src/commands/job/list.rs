//! `incipit job list` and `get`.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use incipit_proto::client::Client;
use incipit_proto::v1::{GetJobRequest, Job, JobState, ListJobsRequest, TrainingSpec, data_source::Source};
use incipit_worker::spec::tasks;

use super::words;
use crate::args::Global;
use crate::cluster::names::{self, short};
use crate::cluster::{call, list, show};
use crate::exit::Exit;
use crate::output;
use crate::units;

const STATES: [(&str, JobState); 6] = [
    ("queued", JobState::Queued),
    ("running", JobState::Running),
    ("paused", JobState::Paused),
    ("succeeded", JobState::Succeeded),
    ("failed", JobState::Failed),
    ("cancelled", JobState::Cancelled),
];

/// Flags of `job list`.
#[derive(Args)]
pub(super) struct ListArgs {
    /// Those of this backbone alone
    #[arg(long, value_name = "BACKBONE", value_parser = names::backbone)]
    backbone: Option<String>,
    /// Those in one of these states alone
    #[arg(long, value_name = "STATE,...", value_delimiter = ',',
          value_parser = PossibleValuesParser::new(STATES.map(|(name, _)| name)).map(|name| state_of(&name)))]
    state: Vec<JobState>,
    /// Those with this label alone; several: with all of them
    #[arg(long, value_name = "KEY=VALUE", value_parser = names::label)]
    label: Vec<(String, String)>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

fn state_of(name: &str) -> JobState {
    STATES.iter().find(|(known, _)| *known == name).map_or(JobState::Unspecified, |(_, state)| *state)
}

/// Lists jobs.
///
/// # Errors
/// What the coordinator says.
pub(super) async fn list(args: &ListArgs, client: &Client, global: &Global) -> Result<Exit> {
    let request = ListJobsRequest {
        backbone: args.backbone.clone().unwrap_or_default(),
        states: args.state.iter().map(|state| *state as i32).collect(),
        labels: args.label.iter().cloned().collect::<BTreeMap<_, _>>(),
        ..ListJobsRequest::default()
    };
    let jobs = list!(client, jobs.list_jobs(request), jobs, args.limit as usize);
    let all = args.backbone.is_none() && args.state.is_empty() && args.label.is_empty();
    let text = || if jobs.is_empty() && !all { "no such jobs".to_owned() } else { table(&jobs) };
    show::print(&jobs, text, global)?;
    Ok(Exit::Ok)
}

/// Jobs, one a line.
pub(super) fn table(jobs: &[Job]) -> String {
    let row = |job: &Job| {
        let progress = job.progress.clone().unwrap_or_default();
        vec![
            short(&job.name),
            short(&job.backbone),
            words::state(job),
            words::steps(job),
            show::loss(progress.loss),
            show::score(progress.best_score),
            show::age(job.create_time.as_ref()),
        ]
    };
    let header = ["NAME", "BACKBONE", "STATE", "STEP", "LOSS", "BEST", "AGE"];
    show::table(
        &header,
        jobs.iter().map(row).collect(),
        &[1, 2],
        "no jobs; hand one in with `incipit job submit`",
    )
}

/// Shows a job.
///
/// # Errors
/// What the coordinator says.
pub(super) async fn get(name: &str, client: &Client, global: &Global) -> Result<Exit> {
    let job = one(name, client).await?;
    show::print(&job, || facts(&job), global)?;
    Ok(Exit::Ok)
}

/// A job, as it is now.
///
/// # Errors
/// What the coordinator says.
pub(super) async fn one(name: &str, client: &Client) -> Result<Job> {
    call!(client, jobs.get_job(GetJobRequest { name: name.to_owned() }))
}

/// All there is to know of a job.
pub(super) fn facts(job: &Job) -> String {
    let progress = job.progress.clone().unwrap_or_default();
    let mut pairs = vec![
        ("job", short(&job.name)),
        ("backbone", short(&job.backbone)),
        ("state", words::state(job)),
        ("reason", words::why(job)),
    ];
    if !job.continued_from.is_empty() {
        pairs.push(("goes on from", job.continued_from.trim_start_matches("jobs/").to_owned()));
    }
    if job.state() == JobState::Queued {
        pairs.push(("before it", units::count(u64::from(job.queue_position))));
    }
    pairs.extend([("steps", words::steps(job)), ("loss", show::loss(progress.loss))]);
    if let Some(score) = progress.best_score {
        pairs.push(("best score", format!("{score:.3} (step {})", units::count(progress.best_step))));
    }
    pairs.push(("saved", format!("step {}", units::count(progress.committed_step))));
    if progress.steps_per_second > 0.0 {
        let left = words::left(job).map(|left| format!(", {left}")).unwrap_or_default();
        pairs.push(("speed", format!("{} steps/s{left}", units::rate(progress.steps_per_second))));
    }
    pairs.extend([("priority", job.priority.to_string()), ("labels", show::labels(&job.labels))]);
    if let Some(spec) = &job.spec {
        if spec.tasks.is_empty() {
            pairs.extend([("train", source(spec, true)), ("eval", source(spec, false))]);
        } else {
            let shared = spec.shared_length.unwrap_or_default();
            pairs.push(("tasks", format!("{}, whose prompts share {shared} rows", spec.tasks.len())));
            let line = |(name, [own, common]): (&str, [_; 2])| ("", of_task(name, own, common));
            pairs.extend(tasks(spec).into_iter().map(line));
        }
    }
    pairs.push(("created", show::time(job.create_time.as_ref())));
    for (name, time) in [("started", &job.start_time), ("ended", &job.end_time)] {
        if time.is_some() {
            pairs.push((name, show::time(time.as_ref())));
        }
    }
    let mut text = output::facts(pairs);
    for warning in &progress.warnings {
        text.push_str(&format!("\nwarning: {warning}"));
    }
    if !job.attempts.is_empty() {
        text.push_str(&format!("\n\n{}", attempts(job)));
    }
    text
}

/// `boolq: train.jsonl (blob abababababab), dev.jsonl (blob cdcdcdcdcdcd)`.
fn of_task(name: &str, own: TrainingSpec, common: TrainingSpec) -> String {
    let (train, eval) = (own.train.or(common.train), own.eval.or(common.eval));
    let files = TrainingSpec { train, eval, ..TrainingSpec::default() };
    format!("{name}: {}, {}", source(&files, true), source(&files, false))
}

fn source(spec: &TrainingSpec, train: bool) -> String {
    let source = if train { &spec.train } else { &spec.eval };
    match source.as_ref().map(|source| (&source.source, &source.file_name)) {
        Some((Some(Source::Digest(digest)), name)) => {
            format!("{name} (blob {})", digest.get(..12).unwrap_or(digest))
        }
        Some((Some(Source::Path(path)), _)) => format!("{path} (on the workers)"),
        _ => show::NONE.to_owned(),
    }
}

fn attempts(job: &Job) -> String {
    let row = |attempt: &incipit_proto::v1::JobAttempt| {
        let ended = attempt.end_time.is_some();
        vec![
            attempt.number.to_string(),
            attempt.epoch.to_string(),
            attempt.start_step.to_string(),
            if ended { attempt.end_step.to_string() } else { show::NONE.to_owned() },
            show::age(attempt.start_time.as_ref()),
            words::reason(attempt.reason()),
            show::or_none(attempt.message.clone()),
        ]
    };
    let header = ["ATTEMPT", "EPOCH", "FROM", "TO", "AGE", "ENDED", "MESSAGE"];
    show::table(&header, job.attempts.iter().map(row).collect(), &[6, 5], "")
}

#[cfg(test)]
mod tests {
    use incipit_proto::v1::{DataSource, JobAttempt, JobProgress, JobReason};

    use super::*;

    fn running() -> Job {
        let mut job = words::tests::job(JobState::Running, JobReason::Started);
        job.backbone = "backbones/t5-xxl-lm-adapt-bf16".into();
        job.priority = 10;
        job.progress = Some(JobProgress {
            step: 12_000,
            num_steps: 30_000,
            loss: Some(0.312_71),
            best_score: Some(0.9134),
            best_step: 11_500,
            steps_per_second: 4.0,
            committed_step: 11_500,
            warnings: vec!["3 records were left out".into()],
        });
        job
    }

    #[test]
    fn jobs_fit_a_terminal() {
        let mut jobs = vec![running(), running()];
        jobs[1].name = "jobs/superglue-boolq-1".into();
        jobs[1].set_wish(incipit_proto::v1::JobWish::Cancel);
        let text = table(&jobs);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for part in ["NAME", "superglue-boolq-1", "running", "12000/30000", "0.3127", "0.913"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(table(&[]).contains("incipit job submit"));
    }

    #[test]
    fn a_job_is_shown_with_its_attempts_data_and_warnings() {
        let mut job = running();
        job.continued_from = "jobs/older/checkpoints/00000500".into();
        let digest = Source::Digest("ab".repeat(32));
        let train = DataSource { source: Some(digest), file_name: "boolq.jsonl".into() };
        job.spec = Some(TrainingSpec { train: Some(train), ..TrainingSpec::default() });
        let message = "the worker w-2 gave no sign of life for 4 s, and its lease ran out; it is tried again"
            .to_owned();
        job.attempts = vec![
            JobAttempt {
                number: 1,
                epoch: 1,
                message,
                reason: JobReason::RankLost.into(),
                ..JobAttempt::default()
            },
            JobAttempt { number: 2, epoch: 2, start_step: 500, ..JobAttempt::default() },
        ];
        let text = facts(&job);
        for part in [
            "boolq.jsonl (blob abababababab)",
            "warning: 3 records",
            "older/checkpoints/00000500",
            "rank lost",
            "0.913 (step 11,500)",
            "left",
        ] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}
