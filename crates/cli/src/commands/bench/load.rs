//! `incipit bench load`: how soon a coordinator answers when many ask at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use incipit_coordinator::{Config, serve};
use incipit_proto::client::{Client, ClientConfig};
use incipit_proto::{Problem, v1};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::output::{self, Printed};

/// Jobs of a page.
const PAGE: i32 = 100;
/// How long watchers have to hear of the last job.
const ECHO: Duration = Duration::from_secs(20);

/// Flags of `bench load`.
#[derive(Args)]
#[command(
    after_help = "A coordinator of its own, in a directory that is removed afterwards, takes jobs at a steady rate while others watch every \
                  change; then all jobs are listed in pages of 100. No worker and no model takes part. A submit is answered when it is on \
                  the disk. The time of a watcher is from that answer to its hearing of the job."
)]
pub(crate) struct LoadArgs {
    /// Jobs that are submitted
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    jobs: u32,
    /// Submits a second
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Watchers of all changes
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=1000))]
    watchers: u32,
}

/// Milliseconds.
#[derive(Serialize)]
struct Times {
    what: &'static str,
    count: usize,
    median_ms: f64,
    p99_ms: f64,
    worst_ms: f64,
}

impl Times {
    fn of(what: &'static str, mut times: Vec<Duration>) -> Self {
        times.sort();
        let at = |share: f64| {
            let place = (times.len() as f64 * share).ceil() as usize;
            times.get(place.saturating_sub(1)).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
        };
        Self { what, count: times.len(), median_ms: at(0.5), p99_ms: at(0.99), worst_ms: at(1.0) }
    }
}

/// What was measured.
#[derive(Serialize)]
pub(super) struct Load {
    jobs: u32,
    rate: u32,
    watchers: u32,
    times: [Times; 3],
}

impl Printed for Load {
    fn text(&self) -> String {
        let ms = |value: f64| format!("{value:.2}");
        let row = |t: &Times| {
            vec![t.what.to_owned(), t.count.to_string(), ms(t.median_ms), ms(t.p99_ms), ms(t.worst_ms)]
        };
        let rows: Vec<Vec<String>> = self.times.iter().map(row).collect();
        output::table(&["", "count", "median, ms", "p99, ms", "worst, ms"], &rows, true)
    }
}

/// When each job's submit was answered.
type Answers = Arc<Mutex<BTreeMap<String, Instant>>>;

/// Measures.
///
/// # Errors
/// If the coordinator cannot run here, or refuses something.
pub(super) fn measure(args: &LoadArgs) -> Result<Load> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let dir = std::env::temp_dir().join(format!("incipit-load-{}", std::process::id()));
    let measured = runtime.block_on(run(args, &dir));
    let removed = std::fs::remove_dir_all(&dir);
    let load = measured?;
    removed.with_context(|| format!("cannot remove {}", dir.display()))?;
    Ok(load)
}

async fn run(args: &LoadArgs, dir: &std::path::Path) -> Result<Load> {
    let mut config = Config::new(dir);
    (config.insecure, config.data_roots, config.model_roots) = (true, vec!["/".into()], vec!["/".into()]);
    config.listen.set_port(0);
    config.limits.jobs = config.limits.jobs.max(args.jobs as usize);
    let running = serve(config, std::future::pending()).await?;
    let client = Client::connect(&ClientConfig::new(format!("http://{}", running.address()))).await?;
    create_backbone(&client).await?;
    let answers = Answers::default();
    let mut watchers = JoinSet::new();
    for _ in 0..args.watchers {
        watchers.spawn(watch(client.clone(), args.jobs, answers.clone()));
    }
    let submits = submit(&client, args, &answers).await?;
    let mut echoes = Vec::new();
    while let Some(heard) = watchers.join_next().await {
        echoes.extend(heard??);
    }
    let pages = list(&client).await?;
    let times = [Times::of("submit", submits), Times::of("watch", echoes), Times::of("page of 100", pages)];
    Ok(Load { jobs: args.jobs, rate: args.rate, watchers: args.watchers, times })
}

async fn create_backbone(client: &Client) -> Result<(), Problem> {
    let backbone = v1::Backbone { model: "/nowhere".to_owned(), ..v1::Backbone::default() };
    let request = v1::CreateBackboneRequest {
        backbone_id: "b".to_owned(),
        backbone: Some(backbone),
        request_id: uuid::Uuid::new_v4().to_string(),
        validate_only: false,
    };
    client.unary(request, async |request| client.backbones().create_backbone(request).await).await.map(drop)
}

/// Submits at a steady rate, whether answers have come or not; how long each answer took.
async fn submit(client: &Client, args: &LoadArgs, answers: &Answers) -> Result<Vec<Duration>> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / args.rate);
    let mut submits = JoinSet::new();
    for number in 0..args.jobs {
        ticks.tick().await;
        let (client, answers) = (client.clone(), answers.clone());
        submits.spawn(async move {
            let start = Instant::now();
            let job = client.jobs().create_job(job(number)).await.map_err(|status| Problem::from(&status))?;
            let now = Instant::now();
            answers.lock().unwrap_or_else(PoisonError::into_inner).insert(job.into_inner().name, now);
            Ok::<_, Problem>(now - start)
        });
    }
    let mut times = Vec::new();
    while let Some(time) = submits.join_next().await {
        times.push(time??);
    }
    Ok(times)
}

fn job(number: u32) -> v1::CreateJobRequest {
    let train = v1::DataSource {
        file_name: "train.jsonl".to_owned(),
        source: Some(v1::data_source::Source::Path("/nowhere/train.jsonl".to_owned())),
    };
    let spec = v1::TrainingSpec { train: Some(train), ..v1::TrainingSpec::default() };
    v1::CreateJobRequest {
        job_id: format!("j{number}"),
        job: Some(v1::Job { backbone: "backbones/b".to_owned(), spec: Some(spec), ..v1::Job::default() }),
        request_id: uuid::Uuid::new_v4().to_string(),
        ..v1::CreateJobRequest::default()
    }
}

/// Hears of all jobs; how long after its answer each was heard of.
async fn watch(client: Client, jobs: u32, answers: Answers) -> Result<Vec<Duration>> {
    let request = v1::WatchEventsRequest { start_revision: 1, name_prefixes: vec!["jobs/".to_owned()] };
    let mut pages = client.events().watch_events(request).await?.into_inner();
    let mut heard: Vec<(String, Instant)> = Vec::new();
    while heard.len() < jobs as usize {
        let page = tokio::time::timeout(ECHO, pages.message())
            .await
            .context("a watcher heard nothing for too long")??;
        let Some(page) = page else { break };
        let now = Instant::now();
        let new = page.events.into_iter().filter(|event| event.kind() == v1::EventKind::Created);
        heard.extend(new.map(|event| (event.name, now)));
    }
    // The answer may come after the watcher has heard: then it waited for nothing.
    let answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    let after = |(job, at): &(String, Instant)| at.saturating_duration_since(*answers.get(job).unwrap_or(at));
    Ok(heard.iter().map(after).collect())
}

/// Lists everything; how long each page took.
async fn list(client: &Client) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let mut request = v1::ListJobsRequest { page_size: PAGE, ..v1::ListJobsRequest::default() };
    loop {
        let start = Instant::now();
        let page =
            client.unary(request.clone(), async |request| client.jobs().list_jobs(request).await).await?;
        times.push(start.elapsed());
        if page.next_page_token.is_empty() {
            return Ok(times);
        }
        request.page_token = page.next_page_token;
    }
}
