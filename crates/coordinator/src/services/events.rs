//! The events' service.

use std::time::Duration;

use incipit_proto::{
    Problem,
    client::PROTOCOL,
    v1::{
        GetServerInfoRequest, GetServerInfoResponse, WatchEventsRequest, WatchEventsResponse,
        event_service_server::EventService,
    },
};
use tonic::{Code, Request, Response, Status};

use super::{
    Context,
    pages::{Out, Sink, stream},
};
use crate::wire;

/// How often a watcher to whom nothing is sent hears where everything stands.
const MARK: Duration = Duration::from_secs(10);

/// Implements the service.
#[derive(Clone, Debug)]
pub(crate) struct Events(pub(crate) Context);

#[tonic::async_trait]
impl EventService for Events {
    type WatchEventsStream = Out<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let newest = *self.0.handle.topics().revision().borrow();
        let start = if request.start_revision == 0 { newest + 1 } else { request.start_revision };
        if start > newest + 1 {
            let what =
                format!("is {start}, and the newest revision is {newest}; watch from {} at most", newest + 1);
            return Err(Problem::field("start_revision", what).with("revision", newest).into());
        }
        let watch = Watch { context: self.0.clone(), prefixes: request.name_prefixes, next: start };
        watch.check(start).await?;
        Ok(Response::new(stream(&self.0, |sink| watch.run(sink))?))
    }

    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let revision = self.0.handle.read(|core, _| core.revision()).await?;
        let oldest = self.0.reader.bounds().await.map_err(Problem::from)?.map_or(1, |(oldest, _)| oldest);
        Ok(Response::new(GetServerInfoResponse {
            cluster_id: self.0.cluster.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL,
            revision,
            compact_revision: oldest,
        }))
    }
}

struct Watch {
    context: Context,
    prefixes: Vec<String>,
    next: u64,
}

impl Watch {
    async fn run(mut self, sink: Sink<WatchEventsResponse>) -> Result<(), Problem> {
        let mut newest = self.context.handle.topics().revision();
        let mut mark = tokio::time::interval_at(tokio::time::Instant::now() + MARK, MARK);
        loop {
            newest.mark_unchanged(); // Before the reading: what comes meanwhile is read by the next round.
            let page = self.context.reader.events(self.next, self.prefixes.clone()).await?;
            let Some(first) = page.first else {
                tokio::select! {
                    changed = newest.changed() => changed.map_err(|_| super::stopping())?,
                    _ = mark.tick() => self.send(&sink, Vec::new(), self.next).await?,
                }
                continue;
            };
            if first != self.next {
                return Err(self.compacted().await?);
            }
            if !page.rows.is_empty() {
                let events = page.rows.iter().map(|row| wire::event(&row.stamp, &row.resource)).collect();
                self.send(&sink, events, page.next).await?;
                mark.reset();
            }
            self.next = page.next;
        }
    }

    async fn send(
        &self,
        sink: &Sink<WatchEventsResponse>,
        events: Vec<incipit_proto::v1::Event>,
        next_revision: u64,
    ) -> Result<(), Problem> {
        sink.send(WatchEventsResponse { events, next_revision }, "next_revision", self.next).await
    }

    /// Refuses to begin at what is not kept any more.
    async fn check(&self, start: u64) -> Result<(), Problem> {
        let bounds = self.context.reader.bounds().await?;
        match bounds {
            Some((oldest, _)) if start < oldest => Err(self.compacted().await?),
            _ => Ok(()),
        }
    }

    async fn compacted(&self) -> Result<Problem, Problem> {
        let (oldest, newest) = self.context.reader.bounds().await?.unwrap_or((1, 0));
        let what = format!(
            "revision {} is not kept any more, the oldest is {oldest}; list again, and watch from {newest}",
            self.next
        );
        let problem = Problem::new(Code::OutOfRange, "REVISION_COMPACTED", what);
        Ok(problem.with("compact_revision", oldest).with("revision", newest))
    }
}
