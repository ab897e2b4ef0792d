//! The jobs' service.

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName},
    v1::{
        CancelJobRequest, CreateJobRequest, DeleteJobRequest, GetJobRequest, Job, ListJobsRequest,
        ListJobsResponse, Method, PauseJobRequest, ResumeJobRequest, StreamLogsRequest, StreamLogsResponse,
        StreamMetricsRequest, StreamMetricsResponse, UpdateJobRequest, job_service_server::JobService,
    },
};
use pbjson_types::Empty;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{
    Context,
    ask::{ask, unexpected},
    pages::{Out, Sink, stream},
};
use crate::{
    blobs::Digest,
    core::{Core, effects::Reply, input::Request as Wanted},
    wire::{self, Asked},
};

/// Implements the service.
#[derive(Clone, Debug)]
pub(crate) struct Jobs(pub(crate) Context);

fn job_of(reply: Reply) -> Result<Response<Job>, Status> {
    match reply {
        Reply::Job(view) => Ok(Response::new(wire::job(&view))),
        other => Err(unexpected(&other).into()),
    }
}

impl Jobs {
    /// Refuses a job whose checkpoints would be too large to be stored: all weights of a model, in f32. Of a backbone that was never loaded
    /// nobody knows.
    async fn check_size(&self, asked: &Asked) -> Result<(), Problem> {
        let Wanted::CreateJob { job, .. } = &asked.request else { return Ok(()) };
        if job.spec.method() != Method::Model {
            return Ok(());
        }
        let name = job.backbone.clone();
        let count =
            move |core: &Core, _| Ok::<_, Problem>(core.backbone_view(&name)?.backbone.num_parameters);
        let bytes = self.0.handle.read(count).await??.saturating_mul(4);
        let limit = self.0.limits.max_blob_bytes;
        if bytes > limit {
            let what = format!(
                "is model, whose checkpoints have about {bytes} bytes here, and a file may have {limit}; raise limits.max_blob_bytes, or \
                 train something smaller"
            );
            return Err(Problem::field("job.spec.method", what));
        }
        Ok(())
    }

    /// Checks what the core cannot know: that the data is there. While what this returns is held, it stays.
    async fn check_data(&self, asked: &Asked) -> Result<impl Send + use<>, Problem> {
        let held = self.0.blobs.hold().await;
        let Wanted::CreateJob { job, .. } = &asked.request else { return Ok(held) };
        let digests = wire::digests_of(&job.spec).map(|digest| Digest::parse("job.spec", digest));
        let digests = digests.collect::<Result<Vec<_>, _>>()?;
        if let Some(digest) = self.0.blobs.missing(digests).await?.first() {
            let what = format!("{} wants the data {digest}, which is not there; upload it first", job.name);
            return Err(Problem::state("BLOB_MISSING", what).with("digest", digest));
        }
        Ok(held)
    }
}

#[tonic::async_trait]
impl JobService for Jobs {
    async fn create_job(&self, request: Request<CreateJobRequest>) -> Result<Response<Job>, Status> {
        let asked = wire::create_job(request.get_ref(), &made_up(), &self.0.roots)?;
        self.check_size(&asked).await?;
        let held = self.check_data(&asked).await?;
        let name = match &asked.request {
            Wanted::CreateJob { job, .. } => job.name.to_string(),
            _ => String::new(),
        };
        let reply = ask(&self.0, &request, &name, asked).await?;
        drop(held);
        job_of(reply)
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        let name = JobName::parse("name", &request.get_ref().name)?;
        let view = self.0.handle.read(move |core, _| core.job_view(&name)).await??;
        Ok(Response::new(wire::job(&view)))
    }

    async fn list_jobs(
        &self,
        request: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        let request = request.into_inner();
        let filter = wire::job_filter(&request)?;
        let (size, token) = (request.page_size, request.page_token);
        let list = move |core: &Core, _| core.list_jobs(&filter, size, &token);
        let page = self.0.handle.read(list).await??;
        let jobs = page.items.iter().map(wire::job).collect();
        Ok(Response::new(ListJobsResponse { jobs, next_page_token: page.next_page_token }))
    }

    async fn update_job(&self, request: Request<UpdateJobRequest>) -> Result<Response<Job>, Status> {
        let asked = wire::update_job(request.get_ref())?;
        let name = request.get_ref().job.as_ref().map_or("", |job| &job.name);
        job_of(ask(&self.0, &request, name, asked).await?)
    }

    async fn delete_job(&self, request: Request<DeleteJobRequest>) -> Result<Response<Empty>, Status> {
        let asked = wire::delete_job(request.get_ref())?;
        ask(&self.0, &request, &request.get_ref().name, asked).await?;
        Ok(Response::new(Empty {}))
    }

    async fn pause_job(&self, request: Request<PauseJobRequest>) -> Result<Response<Job>, Status> {
        let asked = wire::pause_job(request.get_ref())?;
        job_of(ask(&self.0, &request, &request.get_ref().name, asked).await?)
    }

    async fn resume_job(&self, request: Request<ResumeJobRequest>) -> Result<Response<Job>, Status> {
        let asked = wire::resume_job(request.get_ref())?;
        job_of(ask(&self.0, &request, &request.get_ref().name, asked).await?)
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Result<Response<Job>, Status> {
        let asked = wire::cancel_job(request.get_ref())?;
        job_of(ask(&self.0, &request, &request.get_ref().name, asked).await?)
    }

    type StreamMetricsStream = Out<StreamMetricsResponse>;

    async fn stream_metrics(
        &self,
        request: Request<StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        let StreamMetricsRequest { name, offset, follow } = request.into_inner();
        JobName::parse("name", &name)?;
        let tail = Tail { context: self.0.clone(), name, offset, follow, rank: None };
        tail.lasts().await?;
        Ok(Response::new(stream(&self.0, |sink| tail.metrics(sink))?))
    }

    type StreamLogsStream = Out<StreamLogsResponse>;

    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let StreamLogsRequest { name, offset, follow, rank } = request.into_inner();
        if BackboneName::parse("name", &name).is_err() {
            JobName::parse("name", &name)?;
        }
        let tail = Tail { context: self.0.clone(), name, offset, follow, rank };
        tail.lasts().await?;
        Ok(Response::new(stream(&self.0, |sink| tail.logs(sink))?))
    }
}

/// An id for a job that was given none.
fn made_up() -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("job-{}", &random[..12])
}

/// Someone who reads to the end of something that may go on.
struct Tail {
    context: Context,
    name: String,
    offset: u64,
    follow: bool,
    rank: Option<u32>,
}

impl Tail {
    async fn metrics(mut self, sink: Sink<StreamMetricsResponse>) -> Result<(), Problem> {
        let mut more = self.context.handle.topics().of(&self.name);
        loop {
            more.mark_unchanged(); // Before the reading: what comes meanwhile is read by the next round.
            let lasts = self.follow && self.lasts().await.unwrap_or(false);
            let page = self.context.reader.metrics(&self.name, self.offset).await?;
            if page.rows.is_empty() {
                if !wait(&mut more, lasts).await {
                    return Ok(());
                }
                continue;
            }
            let message = StreamMetricsResponse { points: page.rows, next_offset: page.next };
            sink.send(message, "next_offset", self.offset).await?;
            self.offset = page.next;
        }
    }

    async fn logs(mut self, sink: Sink<StreamLogsResponse>) -> Result<(), Problem> {
        let mut more = self.context.handle.topics().of(&self.name);
        loop {
            more.mark_unchanged();
            let lasts = self.follow && self.lasts().await.unwrap_or(false);
            let page = self.context.reader.logs(&self.name, self.offset, self.rank).await?;
            if page.rows.is_empty() {
                if !wait(&mut more, lasts).await {
                    return Ok(());
                }
                continue;
            }
            // Some may have been dropped since the page was read, which it has.
            let oldest = self.context.reader.oldest_line(&self.name).await?;
            let first_offset = oldest.into_iter().chain(page.first).min().unwrap_or_default();
            let message = StreamLogsResponse { lines: page.rows, next_offset: page.next, first_offset };
            sink.send(message, "next_offset", self.offset).await?;
            self.offset = page.next;
        }
    }

    /// Whether more may come: of a job until it has ended, of a backbone as long as it is there. Asked before a page is read, so that an
    /// empty page after a `false` is the end.
    async fn lasts(&self) -> Result<bool, Problem> {
        let name = self.name.clone();
        let look = move |core: &Core, _| match JobName::parse("name", &name) {
            Ok(job) => core.job(&job).map(|job| !job.is_final()),
            Err(_) => core.backbone_view(&BackboneName::parse("name", &name)?).map(|_| true),
        };
        self.context.handle.read(look).await?
    }
}

/// Waits for more, if more may come.
async fn wait(more: &mut watch::Receiver<()>, lasts: bool) -> bool {
    lasts && more.changed().await.is_ok()
}
