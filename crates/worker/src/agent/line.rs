//! The line to the coordinator: made again whenever it breaks.

use std::time::Duration;

use incipit_proto::Problem;
use incipit_proto::client::{Client, ClientConfig, problem_of};
use incipit_proto::v1::{AttachRequest, AttachResponse};
use tokio::sync::mpsc::{Sender, UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// The first pause before the line is made again, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Reasons for which a coordinator turns an agent away that are no others the next time.
const FOR_GOOD: [&str; 4] = ["WORKER_REPLACED", "OTHER_CLUSTER", "PROTOCOL", "ROLE"];

/// What happens on the line.
pub(crate) enum Event {
    /// It is there: whatever is sent here goes out.
    Up(Client, UnboundedSender<AttachRequest>),
    /// The coordinator said something.
    Received(AttachResponse),
    /// It is broken.
    Down,
    /// The coordinator will never take this agent: why.
    TurnedAway(Problem),
    /// It does not find a file of a checkpoint that was reported to it.
    Missing,
}

/// Keeps the line up for as long as somebody listens, and the coordinator wants it.
pub(crate) async fn keep(config: ClientConfig, events: Sender<Event>) {
    let mut pause = PAUSES.0;
    let mut told = String::new();
    while !events.is_closed() {
        let (heard, problem) = talk(&config, &events, !told.is_empty()).await;
        if heard {
            told.clear();
        }
        if events.send(Event::Down).await.is_err() {
            return;
        }
        if FOR_GOOD.contains(&&*problem.reason) {
            // Nobody listens any more if this is not heard.
            let _ = events.send(Event::TurnedAway(problem)).await;
            return;
        }
        if problem.reason == "BLOB_MISSING" && events.send(Event::Missing).await.is_err() {
            return;
        }
        // The same complaint is told once for each time that the line is down.
        if problem.message != told {
            tracing::warn!("no connection to the coordinator: {problem}");
            told.clone_from(&problem.message);
        }
        pause = if heard { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
        tokio::time::sleep(pause).await;
    }
}

/// One connection, to its end. Whether the coordinator said anything, and why it ended. `complained` says whether it was told that there was
/// none: whoever reads that reads as well that there is one again.
async fn talk(config: &ClientConfig, events: &Sender<Event>, complained: bool) -> (bool, Problem) {
    let client = match Client::connect(config).await {
        Ok(client) => client,
        Err(problem) => return (false, problem),
    };
    let (sender, outgoing) = unbounded_channel();
    let closed = || Problem::new(tonic::Code::Cancelled, "CLOSED", "the agent hung up");
    if events.send(Event::Up(client.clone(), sender)).await.is_err() {
        return (false, closed());
    }
    let mut incoming = match client.agent().attach(UnboundedReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return (false, problem_of(&status)),
    };
    let mut heard = false;
    loop {
        match incoming.message().await {
            Ok(Some(response)) => {
                if !heard && complained {
                    tracing::warn!("connected to the coordinator at {} again", config.endpoint);
                } else if !heard {
                    tracing::info!("connected to the coordinator at {}", config.endpoint);
                }
                heard = true;
                if events.send(Event::Received(response)).await.is_err() {
                    return (heard, closed());
                }
            }
            Ok(None) => {
                return (heard, Problem::new(tonic::Code::Unavailable, "CLOSED", "the coordinator hung up"));
            }
            Err(status) => return (heard, problem_of(&status)),
        }
    }
}
