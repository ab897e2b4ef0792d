//! A coordinator that has what a test puts into it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use incipit_proto::Problem;
use incipit_proto::v1::backbone_service_server::{BackboneService, BackboneServiceServer};
use incipit_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use incipit_proto::v1::checkpoint_service_server::{CheckpointService, CheckpointServiceServer};
use incipit_proto::v1::event::Resource;
use incipit_proto::v1::event_service_server::{EventService, EventServiceServer};
use incipit_proto::v1::job_service_server::{JobService, JobServiceServer};
use incipit_proto::v1::prompt_service_server::{PromptService, PromptServiceServer};
use incipit_proto::v1::*;
use pbjson_types::Empty;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Pages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What it has, and what it was asked.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) backbones: Vec<Backbone>,
    pub(crate) jobs: BTreeMap<String, Job>,
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) prompts: Vec<PromptVersion>,
    pub(crate) blobs: BTreeMap<String, Bytes>,
    pub(crate) points: Vec<MetricPoint>,
    pub(crate) lines: Vec<LogLine>,
    /// How many of those are not kept any more.
    pub(crate) dropped: u64,
    /// What becomes of a job that is watched.
    pub(crate) end: Option<Job>,
    /// Streams that break off before their end.
    pub(crate) breaks: usize,
    /// Whether what is logged of is deleted once streams break off no more.
    pub(crate) deleted: bool,
    /// Requests to create a job, each with its token.
    pub(crate) created: Vec<(CreateJobRequest, Option<String>)>,
    /// Requests to change a job, and to change a backbone.
    pub(crate) updates: Vec<UpdateJobRequest>,
    pub(crate) backbone_updates: Vec<UpdateBackboneRequest>,
    /// Offsets that metrics were asked from.
    pub(crate) offsets: Vec<u64>,
    /// Uploads that are turned away for now, and those that break off.
    pub(crate) turned_away: usize,
    pub(crate) cut_off: usize,
    /// Digests of what was uploaded.
    pub(crate) uploads: Vec<String>,
}

/// The services.
#[derive(Clone, Default)]
struct Services(Arc<Mutex<State>>);

/// A coordinator on a port of this machine, as long as it lives.
pub(crate) struct Fake {
    services: Services,
    pub(crate) url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub(crate) fn start(state: State) -> Self {
        let services = Services(Arc::new(Mutex::new(state)));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server = tonic::transport::Server::builder()
            .add_service(JobServiceServer::new(services.clone()))
            .add_service(BackboneServiceServer::new(services.clone()))
            .add_service(CheckpointServiceServer::new(services.clone()))
            .add_service(BlobServiceServer::new(services.clone()))
            .add_service(PromptServiceServer::new(services.clone()))
            .add_service(EventServiceServer::new(services.clone()));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        runtime.spawn(async move { server.serve_with_incoming(incoming).await });
        Self { services, url, _runtime: runtime }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.services.state()
    }
}

impl Services {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics with it")
    }

    fn job(&self, name: &str) -> Answer<Job> {
        let job = self.state().jobs.get(name).cloned();
        job.map(Response::new).ok_or_else(|| Problem::not_found(name).into())
    }

    /// A job that was asked to change its state.
    fn change(&self, name: &str, to: JobState) -> Answer<Job> {
        let mut job = self.job(name)?.into_inner();
        if [JobState::Succeeded, JobState::Failed].contains(&job.state()) {
            let message = format!("{name} has ended (SUCCEEDED); only a job that has not can be changed");
            return Err(Problem::state("JOB_STATE", message).with("state", "SUCCEEDED").into());
        }
        job.set_state(to);
        self.state().jobs.insert(name.to_owned(), job.clone());
        Ok(Response::new(job))
    }

    /// Pages of two, and after the first a break, if there are breaks left.
    fn pages<T: Clone + Send + 'static, R: Send + 'static>(
        &self,
        all: &[T],
        from: u64,
        page: impl Fn(Vec<T>, u64) -> R,
    ) -> Pages<R> {
        let mut pages = Vec::new();
        let mut next = from;
        for part in all[usize::try_from(from).expect("an offset")..].chunks(2) {
            next += part.len() as u64;
            pages.push(Ok(page(part.to_vec(), next)));
            let mut state = self.state();
            if state.breaks > 0 {
                state.breaks -= 1;
                pages.push(Err(Status::unavailable("the network is gone")));
                break;
            }
        }
        Box::pin(tokio_stream::iter(pages))
    }
}

fn none<T>() -> Answer<T> {
    Err(Status::unimplemented("no test asks for it"))
}

#[tonic::async_trait]
impl JobService for Services {
    type StreamMetricsStream = Pages<StreamMetricsResponse>;
    type StreamLogsStream = Pages<StreamLogsResponse>;

    async fn create_job(&self, request: Request<CreateJobRequest>) -> Answer<Job> {
        let token =
            request.metadata().get("authorization").and_then(|token| token.to_str().ok()).map(str::to_owned);
        let request = request.into_inner();
        let id = if request.job_id.is_empty() { "j-made-up" } else { &request.job_id };
        let mut job =
            Job { name: format!("jobs/{id}"), queue_position: 3, ..request.job.clone().unwrap_or_default() };
        job.set_state(JobState::Queued);
        let mut state = self.state();
        if !request.validate_only {
            state.jobs.insert(job.name.clone(), job.clone());
        }
        state.created.push((request, token));
        Ok(Response::new(job))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Answer<Job> {
        self.job(&request.get_ref().name)
    }

    async fn list_jobs(&self, request: Request<ListJobsRequest>) -> Answer<ListJobsResponse> {
        // A page is one job.
        let from: usize = request.get_ref().page_token.parse().unwrap_or(0);
        let state = self.state();
        let jobs: Vec<Job> = state.jobs.values().skip(from).take(1).cloned().collect();
        let more = from + 1 < state.jobs.len();
        let next_page_token = if more { (from + 1).to_string() } else { String::new() };
        Ok(Response::new(ListJobsResponse { jobs, next_page_token }))
    }

    async fn update_job(&self, request: Request<UpdateJobRequest>) -> Answer<Job> {
        let request = request.into_inner();
        let name = request.job.as_ref().map(|job| job.name.clone()).unwrap_or_default();
        self.state().updates.push(request);
        self.job(&name)
    }

    async fn delete_job(&self, request: Request<DeleteJobRequest>) -> Answer<Empty> {
        let name = request.into_inner().name;
        self.job(&name)?;
        self.state().jobs.remove(&name);
        Ok(Response::new(Empty {}))
    }

    async fn pause_job(&self, request: Request<PauseJobRequest>) -> Answer<Job> {
        self.change(&request.get_ref().name, JobState::Paused)
    }

    async fn resume_job(&self, request: Request<ResumeJobRequest>) -> Answer<Job> {
        self.change(&request.get_ref().name, JobState::Queued)
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Answer<Job> {
        self.change(&request.get_ref().name, JobState::Cancelled)
    }

    async fn stream_metrics(
        &self,
        request: Request<StreamMetricsRequest>,
    ) -> Answer<Self::StreamMetricsStream> {
        let from = request.get_ref().offset;
        let points = {
            let mut state = self.state();
            state.offsets.push(from);
            state.points.clone()
        };
        let page = |points, next_offset| StreamMetricsResponse { points, next_offset };
        Ok(Response::new(self.pages(&points, from, page)))
    }

    async fn stream_logs(&self, request: Request<StreamLogsRequest>) -> Answer<Self::StreamLogsStream> {
        if self.state().deleted && self.state().breaks == 0 {
            return Err(Problem::not_found(&request.get_ref().name).into());
        }
        let first_offset = self.state().dropped;
        let lines = self.state().lines.clone();
        let page = |lines, next_offset| StreamLogsResponse { lines, next_offset, first_offset };
        let from = request.get_ref().offset.max(first_offset);
        Ok(Response::new(self.pages(&lines, from, page)))
    }
}

#[tonic::async_trait]
impl EventService for Services {
    type WatchEventsStream = Pages<WatchEventsResponse>;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let revision = request.get_ref().start_revision;
        let mut state = self.state();
        let Some(end) = state.end.clone() else {
            return Ok(Response::new(Box::pin(tokio_stream::pending())));
        };
        state.jobs.insert(end.name.clone(), end.clone());
        // Another job's event comes first: its name begins with this one's.
        let other = Job { name: format!("{}0", end.name), state: JobState::Failed.into(), ..Job::default() };
        let event = |revision, job: Job| Event {
            revision,
            kind: EventKind::Changed.into(),
            name: job.name.clone(),
            resource: Some(Resource::Job(job)),
            ..Event::default()
        };
        let events = vec![event(revision, other), event(revision + 1, end)];
        let page = WatchEventsResponse { events, next_revision: revision + 2 };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(page)).chain(tokio_stream::pending()))))
    }

    async fn get_server_info(&self, _: Request<GetServerInfoRequest>) -> Answer<GetServerInfoResponse> {
        Ok(Response::new(GetServerInfoResponse { revision: 7, ..GetServerInfoResponse::default() }))
    }
}

#[tonic::async_trait]
impl BackboneService for Services {
    async fn create_backbone(&self, request: Request<CreateBackboneRequest>) -> Answer<Backbone> {
        let request = request.into_inner();
        let mut backbone = Backbone {
            name: format!("backbones/{}", request.backbone_id),
            ..request.backbone.unwrap_or_default()
        };
        backbone.set_state(BackboneState::Pending);
        // It is loaded, or not, as soon as anybody looks.
        let mut settled = backbone.clone();
        settled.set_state(if backbone.model == "broken" {
            BackboneState::Failed
        } else {
            BackboneState::Ready
        });
        settled.message =
            if backbone.model == "broken" { "no config.json in broken".to_owned() } else { String::new() };
        if !request.validate_only {
            self.state().backbones.push(settled);
        }
        Ok(Response::new(backbone))
    }

    async fn get_backbone(&self, request: Request<GetBackboneRequest>) -> Answer<Backbone> {
        let name = &request.get_ref().name;
        let found = self.state().backbones.iter().find(|backbone| backbone.name == *name).cloned();
        found.map(Response::new).ok_or_else(|| Problem::not_found(name).into())
    }

    async fn list_backbones(&self, _: Request<ListBackbonesRequest>) -> Answer<ListBackbonesResponse> {
        let backbones = self.state().backbones.clone();
        Ok(Response::new(ListBackbonesResponse { backbones, next_page_token: String::new() }))
    }

    async fn update_backbone(&self, request: Request<UpdateBackboneRequest>) -> Answer<Backbone> {
        let request = request.into_inner();
        let name = request.backbone.as_ref().map(|backbone| backbone.name.clone()).unwrap_or_default();
        self.state().backbone_updates.push(request);
        let found = self.state().backbones.iter().find(|backbone| backbone.name == name).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(name))
    }

    async fn retry_backbone(&self, request: Request<RetryBackboneRequest>) -> Answer<Backbone> {
        let RetryBackboneRequest { name, .. } = request.into_inner();
        let mut state = self.state();
        let found = state.backbones.iter_mut().find(|backbone| backbone.name == name);
        let backbone = found.ok_or_else(|| Status::not_found(name))?;
        // It is loaded as soon as anybody looks.
        backbone.set_state(BackboneState::Ready);
        let mut pending = backbone.clone();
        pending.set_state(BackboneState::Pending);
        Ok(Response::new(pending))
    }

    async fn delete_backbone(&self, _: Request<DeleteBackboneRequest>) -> Answer<Empty> {
        none()
    }
}

#[tonic::async_trait]
impl CheckpointService for Services {
    async fn get_checkpoint(&self, request: Request<GetCheckpointRequest>) -> Answer<Checkpoint> {
        let name = &request.get_ref().name;
        let fits = |checkpoint: &&Checkpoint| {
            checkpoint.name == *name || (name.ends_with("/checkpoints/best") && checkpoint.best)
        };
        let found = self.state().checkpoints.iter().find(fits).cloned();
        found.map(Response::new).ok_or_else(|| Problem::not_found(name).into())
    }

    async fn list_checkpoints(&self, _: Request<ListCheckpointsRequest>) -> Answer<ListCheckpointsResponse> {
        let checkpoints = self.state().checkpoints.clone();
        Ok(Response::new(ListCheckpointsResponse { checkpoints, next_page_token: String::new() }))
    }

    async fn delete_checkpoint(&self, _: Request<DeleteCheckpointRequest>) -> Answer<Empty> {
        none()
    }

    async fn pin_checkpoint(&self, _: Request<PinCheckpointRequest>) -> Answer<Checkpoint> {
        none()
    }

    async fn verify_checkpoint(
        &self,
        request: Request<VerifyCheckpointRequest>,
    ) -> Answer<VerifyCheckpointResponse> {
        let (name, problems) =
            (request.into_inner().name, vec!["prompt.safetensors: another hash".to_owned()]);
        Ok(Response::new(VerifyCheckpointResponse { name, valid: false, problems, bytes: 9 }))
    }

    async fn collect_garbage(&self, _: Request<CollectGarbageRequest>) -> Answer<CollectGarbageResponse> {
        none()
    }
}

#[tonic::async_trait]
impl BlobService for Services {
    type ReadBlobStream = Pages<ReadBlobResponse>;

    async fn find_blobs(&self, request: Request<FindBlobsRequest>) -> Answer<FindBlobsResponse> {
        let state = self.state();
        let missing = request
            .into_inner()
            .digests
            .into_iter()
            .filter(|digest| !state.blobs.contains_key(digest))
            .collect();
        Ok(Response::new(FindBlobsResponse { missing }))
    }

    async fn write_blob(&self, request: Request<Streaming<WriteBlobRequest>>) -> Answer<WriteBlobResponse> {
        let mut parts = request.into_inner();
        let first = parts.message().await?.ok_or_else(|| Status::invalid_argument("nothing came"))?;
        let mut bytes = first.data.to_vec();
        while let Some(part) = parts.message().await? {
            assert!(part.data.len() <= 1 << 20, "a message is too long");
            bytes.extend_from_slice(&part.data);
        }
        if blake3::hash(&bytes).to_hex().as_str() != first.digest || bytes.len() as u64 != first.size {
            return Err(Problem::field("digest", "is not that of the bytes").into());
        }
        let mut state = self.state();
        if state.turned_away > 0 {
            state.turned_away -= 1;
            return Err(Problem::later("RATE_LIMIT", "too many calls", Duration::ZERO).into());
        }
        if state.cut_off > 0 {
            state.cut_off -= 1;
            return Err(Status::unavailable("the connection broke"));
        }
        state.uploads.push(first.digest.clone());
        state.blobs.insert(first.digest, bytes.into());
        Ok(Response::new(WriteBlobResponse { size: first.size }))
    }

    async fn read_blob(&self, request: Request<ReadBlobRequest>) -> Answer<Self::ReadBlobStream> {
        let digest = &request.get_ref().digest;
        let bytes = self
            .state()
            .blobs
            .get(digest)
            .cloned()
            .ok_or_else(|| Status::from(Problem::not_found(digest)))?;
        let parts: Vec<_> = bytes
            .chunks(1000)
            .map(|part| Ok(ReadBlobResponse { data: Bytes::copy_from_slice(part) }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }
}

#[tonic::async_trait]
impl PromptService for Services {
    async fn promote_prompt(&self, _: Request<PromotePromptRequest>) -> Answer<PromptVersion> {
        none()
    }

    async fn get_prompt_version(&self, request: Request<GetPromptVersionRequest>) -> Answer<PromptVersion> {
        let name = &request.get_ref().name;
        let found = self.state().prompts.iter().find(|version| version.name == *name).cloned();
        found.map(Response::new).ok_or_else(|| Problem::not_found(name).into())
    }

    async fn list_prompt_versions(
        &self,
        _: Request<ListPromptVersionsRequest>,
    ) -> Answer<ListPromptVersionsResponse> {
        none()
    }

    async fn delete_prompt_version(&self, _: Request<DeletePromptVersionRequest>) -> Answer<Empty> {
        none()
    }
}
