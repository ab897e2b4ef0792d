//! The agents' service: one stream each way for as long as an agent is connected.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use incipit_proto::{
    Problem,
    names::WorkerName,
    v1::{AttachRequest, AttachResponse, agent_service_server::AgentService, attach_request},
};
use tokio::sync::oneshot;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Context, pages::Out, stopping};
use crate::{
    blobs::Digest,
    core::{
        Core,
        input::{AgentMessage, Input, JobEvent, Report, Saved},
    },
    doors::Subject,
    shell::Outbox,
    wire,
};

/// How long an agent may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

/// How often the core hears that an agent is there whose report is being checked.
const ALIVE: Duration = Duration::from_secs(1);

/// Implements the service.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    context: Context,
    connections: Arc<AtomicU64>,
}

impl Agent {
    pub(crate) fn new(context: Context) -> Self {
        Self { context, connections: Arc::new(AtomicU64::new(1)) }
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    type AttachStream = Out<AttachResponse>;

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let subject = request.extensions().get::<Subject>().cloned().unwrap_or_default();
        let mut messages = request.into_inner();
        let first = tokio::time::timeout(HELLO, messages.message()).await;
        let first = first.map_err(|_| no_hello())??.and_then(|first| first.message);
        let Some(attach_request::Message::Hello(hello)) = first else { return Err(no_hello().into()) };
        subject.set(&hello.worker);
        let hello = wire::hello(hello, &self.context.cluster)?;
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let (worker, outbox) = (hello.worker.clone(), Arc::new(Outbox::default()));
        self.context.handle.connect(hello, connection, Arc::clone(&outbox)).await?;
        let (listening, gone) = oneshot::channel();
        let leaves = AtomicBool::new(false);
        let inbound = Inbound { context: self.context.clone(), worker, connection, outbox, leaves };
        let outgoing = outgoing(&inbound, listening);
        tokio::spawn(inbound.run(messages, gone));
        Ok(Response::new(outgoing))
    }
}

fn no_hello() -> Problem {
    Problem::state("NO_HELLO", "an agent says hello first, and at once")
}

/// What is sent over a connection; `listening` is dropped with it.
fn outgoing(inbound: &Inbound, listening: oneshot::Sender<()>) -> Out<AttachResponse> {
    let (context, outbox) = (inbound.context.clone(), Arc::clone(&inbound.outbox));
    let state = (context, outbox, Some(listening));
    let messages = futures::stream::unfold(state, |(context, outbox, listening)| async move {
        listening.as_ref()?;
        let next = tokio::select! {
            next = outbox.next() => next?,
            () = context.stopped() => Err(stopping()),
        };
        match next.and_then(|message| wire::to_agent(message, &context.cluster, &context.roots.data)) {
            Ok(message) => Some((Ok(message), (context, outbox, listening))),
            Err(problem) => Some((Err(Status::from(problem)), (context, outbox, None))),
        }
    });
    messages.boxed()
}

/// The incoming side of a connection.
struct Inbound {
    context: Context,
    worker: WorkerName,
    connection: u64,
    outbox: Arc<Outbox>,
    /// Whether the agent has said last that it is to end.
    leaves: AtomicBool,
}

impl Inbound {
    async fn run(self, messages: Streaming<AttachRequest>, gone: oneshot::Receiver<()>) {
        let ended = tokio::select! {
            ended = self.hear(messages) => ended,
            _ = gone => Ok(()),
        };
        if let Err(problem) = ended {
            if self.leaves.load(Ordering::Relaxed) {
                tracing::info!("{} has left: {problem}", self.worker);
            } else {
                tracing::warn!("the connection of {} is ended: {problem}", self.worker);
            }
            self.outbox.close(problem);
        }
        let input = Input::Disconnected { worker: self.worker, connection: self.connection };
        let _ = self.context.handle.tell(input).await; // The coordinator ends: nobody is left to be told.
    }

    async fn hear(&self, mut messages: Streaming<AttachRequest>) -> Result<(), Problem> {
        loop {
            let message = match messages.message().await {
                Ok(Some(message)) => message,
                Ok(None) => {
                    let what = "the agent has said all that it wanted to";
                    return Err(Problem::new(Code::Cancelled, "AGENT_LEFT", what));
                }
                Err(status) => return Err(Problem::from(&status)),
            };
            let message = wire::agent_message(message)?;
            if let AgentMessage::Heartbeat { draining, .. } = message {
                self.leaves.store(draining, Ordering::Relaxed);
            }
            let held = self.check(&message).await?;
            self.tell(message).await?;
            if let Some(held) = held {
                // Blobs may be deleted again once the core has named these.
                let handle = self.context.handle.clone();
                tokio::spawn(async move {
                    let _ = handle.read(|_, _| ()).await; // The coordinator ends: it deletes nothing.
                    drop(held);
                });
            }
        }
    }

    async fn tell(&self, message: AgentMessage) -> Result<(), Problem> {
        let (worker, connection) = (self.worker.clone(), self.connection);
        self.context.handle.tell(Input::Agent { worker, connection, message }).await
    }

    /// Checks that the files of a checkpoint are stored, if this is the report of one and can take effect: of others the blobs may be gone,
    /// and nothing is lost. While what it returns is held, they stay.
    async fn check(
        &self,
        message: &AgentMessage,
    ) -> Result<Option<tokio::sync::OwnedRwLockReadGuard<()>>, Problem> {
        let AgentMessage::Report { sequence, report } = message else { return Ok(None) };
        let Report::Job { job, event: JobEvent::Saved(Saved { files, .. }), .. } = report else {
            return Ok(None);
        };
        let digests = files.iter().map(|file| Digest::parse("files.digest", &file.digest));
        let digests = digests.collect::<Result<Vec<_>, _>>()?;
        let (worker, sequence, asked) = (self.worker.clone(), *sequence, report.clone());
        let look = move |core: &Core, _| core.awaits(&worker, sequence, &asked);
        if !self.context.handle.read(look).await? {
            return Ok(None);
        }
        let look = async {
            let held = self.context.blobs.hold().await;
            let missing = self.context.blobs.missing(digests).await?;
            Ok::<_, Problem>((held, missing))
        };
        tokio::pin!(look);
        let (held, missing) = loop {
            // A slow object store is not the agent's fault.
            match tokio::time::timeout(ALIVE, &mut look).await {
                Ok(Ok(found)) => break found,
                Ok(Err(problem)) => {
                    // An agent that was hung up on could tell of nothing else, lost engines among it.
                    tracing::warn!(
                        "{} has stored a checkpoint of {job}, and is believed: {problem}",
                        self.worker
                    );
                    return Ok(None);
                }
                Err(_) => {
                    self.tell(AgentMessage::Heartbeat { draining: false, loading: Vec::new() }).await?;
                }
            }
        };
        if let Some(digest) = missing.first() {
            let what = format!(
                "{} reports a checkpoint of {job} whose blob {digest} is not there; upload it, and report again",
                self.worker
            );
            return Err(Problem::state("BLOB_MISSING", what).with("digest", digest).with("job", job));
        }
        Ok(Some(held))
    }
}
