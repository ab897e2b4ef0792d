//! `incipit job watch`: a job's changes and measurements as they come, until it ends.

use std::convert::Infallible;

use anyhow::{Result, anyhow};
use incipit_proto::client::{Client, problem_of};
use incipit_proto::v1::event::Resource;
use incipit_proto::v1::{
    EventKind, GetJobRequest, GetServerInfoRequest, Job, MetricPoint, StreamMetricsRequest,
    WatchEventsRequest,
};
use tokio::sync::mpsc::Sender;
use tonic::{Code, Status};

use super::view::View;
use super::words;
use crate::args::Global;
use crate::cluster::call;
use crate::cluster::follow::Patience;
use crate::cluster::names::short;
use crate::exit::Exit;

/// Things seen that wait to be shown.
const WAITING: usize = 64;

/// What was seen.
enum Seen {
    Job(Box<Job>),
    Points(Vec<MetricPoint>),
    /// The job has ended, and every point was sent.
    NoMorePoints,
}

type Seer = Sender<Result<Seen>>;

/// Follows a job until it ends; the exit code tells how.
///
/// # Errors
/// What the coordinator says, or if it stays away.
pub(super) async fn watch(client: &Client, name: &str, global: &Global) -> Result<Exit> {
    let job = call!(client, jobs.get_job(GetJobRequest { name: name.to_owned() }))?;
    let (seer, mut seen) = tokio::sync::mpsc::channel(WAITING);
    let (states, measured) = (client.clone(), client.clone());
    let (of_states, of_points, name) = (seer.clone(), seer, job.name.clone());
    tokio::spawn({
        let name = name.clone();
        async move { told(&of_states, follow_states(&states, &name, &of_states).await).await }
    });
    tokio::spawn(async move { told(&of_points, follow_points(&measured, &name, &of_points).await).await });
    let (mut view, mut all_points) = (View::new(job, global), false);
    while let Some(next) = seen.recv().await {
        match next? {
            Seen::Job(job) => view.job(*job)?,
            Seen::Points(points) => view.points(&points)?,
            Seen::NoMorePoints => all_points = true,
        }
        if all_points && words::has_ended(&view.job) {
            break;
        }
    }
    view.end()?;
    Ok(words::exit(&view.job))
}

/// An error is seen, too.
async fn told(seer: &Seer, outcome: Result<()>) {
    if let Err(error) = outcome {
        let _ = seer.send(Err(error)).await; // Nobody listens any more.
    }
}

/// Why no more changes come.
enum Stop {
    Ended,
    Broke(Status),
    Failed(anyhow::Error),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Broke(status)
    }
}

/// The job as it is now, and each time that it changes, until it has ended.
async fn follow_states(client: &Client, name: &str, seer: &Seer) -> Result<()> {
    let (mut patience, mut next) = (Patience::default(), None);
    loop {
        let Err(stop) = states(client, name, seer, &mut next, &mut patience).await;
        match stop {
            Stop::Ended => return Ok(()),
            Stop::Failed(error) => return Err(error),
            // Too old to be watched from: another look.
            Stop::Broke(status) if status.code() == Code::OutOfRange => next = None,
            Stop::Broke(status) => patience.after(&status).await?,
        }
    }
}

/// Tells of every change from the revision `next` on, which moves with what was seen; where there is none, first of what is now.
async fn states(
    client: &Client,
    name: &str,
    seer: &Seer,
    next: &mut Option<u64>,
    patience: &mut Patience,
) -> Result<Infallible, Stop> {
    let start_revision = match *next {
        Some(revision) => revision,
        None => {
            // The revision first: what comes between is seen twice, and not missed.
            let info = client.events().get_server_info(GetServerInfoRequest {}).await?.into_inner();
            let job = client.jobs().get_job(GetJobRequest { name: name.to_owned() }).await?;
            saw(seer, job.into_inner()).await?;
            *next.insert(info.revision + 1)
        }
    };
    let request = WatchEventsRequest { start_revision, name_prefixes: vec![name.to_owned()] };
    let mut stream = client.events().watch_events(request).await?.into_inner();
    while let Some(page) = stream.message().await? {
        patience.fine();
        let after = page.next_revision.max(start_revision);
        // The prefix is that of other jobs' names and of this one's checkpoints, too.
        for event in page.events.into_iter().filter(|event| event.name == name) {
            match (event.kind(), event.resource) {
                (EventKind::Deleted, _) => return Err(Stop::Failed(anyhow!("{} was deleted", short(name)))),
                (_, Some(Resource::Job(job))) => saw(seer, job).await?,
                _ => {}
            }
        }
        *next = Some(after);
    }
    Err(Status::unavailable("the coordinator ended the stream").into())
}

/// Hands a job on, and stops when it has ended.
async fn saw(seer: &Seer, job: Job) -> Result<(), Stop> {
    let ended = words::has_ended(&job);
    let listening = seer.send(Ok(Seen::Job(Box::new(job)))).await.is_ok();
    if ended || !listening { Err(Stop::Ended) } else { Ok(()) }
}

/// Every point from the first on, once, until the job has ended.
async fn follow_points(client: &Client, name: &str, seer: &Seer) -> Result<()> {
    let mut request = StreamMetricsRequest { name: name.to_owned(), offset: 0, follow: true };
    let mut patience = Patience::default();
    loop {
        let status = match pages(client, &mut request, seer, &mut patience).await {
            Ok(()) => {
                let job = client.jobs().get_job(GetJobRequest { name: name.to_owned() }).await;
                match job {
                    Ok(job) if words::has_ended(job.get_ref()) => break,
                    // A coordinator that is about to end ends its streams, too.
                    Ok(_) => Status::unavailable("the coordinator ended the stream"),
                    Err(status) => status,
                }
            }
            Err(status) => status,
        };
        patience.after_problem(problem_of(&status)).await?;
    }
    let _ = seer.send(Ok(Seen::NoMorePoints)).await; // Nobody listens any more.
    Ok(())
}

async fn pages(
    client: &Client,
    request: &mut StreamMetricsRequest,
    seer: &Seer,
    patience: &mut Patience,
) -> Result<(), Status> {
    let mut stream = client.jobs().stream_metrics(request.clone()).await?.into_inner();
    while let Some(page) = stream.message().await? {
        patience.fine();
        request.offset = page.next_offset.max(request.offset);
        if !page.points.is_empty() {
            let _ = seer.send(Ok(Seen::Points(page.points))).await; // Nobody listens any more.
        }
    }
    Ok(())
}
