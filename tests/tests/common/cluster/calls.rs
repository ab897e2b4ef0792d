//! What a coordinator is asked.

use anyhow::{Context, Result, ensure};
use incipit_proto::v1;

use super::{Cluster, demo, id};

impl Cluster {
    /// Has the demo model held, on a mesh.
    pub(crate) fn create_backbone(&self, id: &str, mesh: (u32, u32), collective: &str) -> Result<()> {
        self.create_backbone_of(id, &demo("model"), mesh, collective)
    }

    /// Has a model held, on a mesh.
    pub(crate) fn create_backbone_of(
        &self,
        id: &str,
        model: &str,
        (tp, dp): (u32, u32),
        collective: &str,
    ) -> Result<()> {
        let backbone = v1::Backbone {
            model: model.to_owned(),
            dtype: "f32".to_owned(),
            tp,
            dp,
            collective: collective.to_owned(),
            ..v1::Backbone::default()
        };
        let request = v1::CreateBackboneRequest {
            backbone_id: id.to_owned(),
            backbone: Some(backbone),
            request_id: self::id(),
            validate_only: false,
        };
        self.call(async |client| client.backbones().create_backbone(request.clone()).await)?;
        Ok(())
    }

    pub(crate) fn backbone(&self, id: &str) -> Result<v1::Backbone> {
        let request = v1::GetBackboneRequest { name: format!("backbones/{id}") };
        Ok(self.call(async |client| client.backbones().get_backbone(request.clone()).await)?.into_inner())
    }

    pub(crate) fn wait_ready(&self, id: &str) -> Result<v1::Backbone> {
        self.wait_for("the backbone", |cluster| {
            let backbone = cluster.backbone(id)?;
            ensure!(
                backbone.state() != v1::BackboneState::Failed,
                "{}\n{}",
                backbone.message,
                cluster.logs()
            );
            Ok((backbone.state() == v1::BackboneState::Ready).then_some(backbone))
        })
    }

    /// Hands in a job; with the same `request_id` it is the same one.
    pub(crate) fn submit(
        &self,
        id: &str,
        backbone: &str,
        spec: v1::TrainingSpec,
        request_id: &str,
    ) -> Result<v1::Job> {
        self.create_job(id, backbone, v1::Job { spec: Some(spec), ..v1::Job::default() }, request_id)
    }

    /// Hands in a job with a priority.
    pub(crate) fn submit_with(
        &self,
        job_id: &str,
        backbone: &str,
        spec: v1::TrainingSpec,
        priority: u32,
    ) -> Result<()> {
        let job = v1::Job { spec: Some(spec), priority, ..v1::Job::default() };
        self.create_job(job_id, backbone, job, &id()).map(drop)
    }

    fn create_job(&self, id: &str, backbone: &str, job: v1::Job, request_id: &str) -> Result<v1::Job> {
        let request = v1::CreateJobRequest {
            job_id: id.to_owned(),
            job: Some(v1::Job { backbone: format!("backbones/{backbone}"), ..job }),
            request_id: request_id.to_owned(),
            ..v1::CreateJobRequest::default()
        };
        Ok(self.call(async |client| client.jobs().create_job(request.clone()).await)?.into_inner())
    }

    pub(crate) fn pause(&self, id: &str) -> Result<()> {
        let request =
            v1::PauseJobRequest { name: format!("jobs/{id}"), etag: String::new(), request_id: self::id() };
        self.call(async |client| client.jobs().pause_job(request.clone()).await).map(drop)
    }

    pub(crate) fn resume(&self, id: &str) -> Result<()> {
        let request =
            v1::ResumeJobRequest { name: format!("jobs/{id}"), etag: String::new(), request_id: self::id() };
        self.call(async |client| client.jobs().resume_job(request.clone()).await).map(drop)
    }

    pub(crate) fn cancel(&self, id: &str) -> Result<()> {
        let request = v1::CancelJobRequest { name: format!("jobs/{id}"), ..v1::CancelJobRequest::default() };
        self.call(async |client| client.jobs().cancel_job(request.clone()).await)?;
        Ok(())
    }

    /// Tokens that went through the backbone for a job.
    pub(crate) fn tokens(&self, id: &str) -> Result<u64> {
        let of_point = |point: &v1::MetricPoint| match &point.point {
            Some(v1::metric_point::Point::Training(step)) => step.num_tokens,
            _ => 0,
        };
        Ok(self.points(id)?.iter().map(of_point).sum())
    }

    pub(crate) fn job(&self, id: &str) -> Result<v1::Job> {
        let request = v1::GetJobRequest { name: format!("jobs/{id}") };
        Ok(self.call(async |client| client.jobs().get_job(request.clone()).await)?.into_inner())
    }

    pub(crate) fn jobs(&self) -> Result<Vec<v1::Job>> {
        let request = v1::ListJobsRequest { page_size: 1000, ..v1::ListJobsRequest::default() };
        Ok(self.call(async |client| client.jobs().list_jobs(request.clone()).await)?.into_inner().jobs)
    }

    /// Waits until a job has reached a final state.
    pub(crate) fn wait_end(&self, id: &str) -> Result<v1::Job> {
        use v1::JobState::{Cancelled, Failed, Succeeded};
        self.wait_for(&format!("the end of job {id}"), |cluster| {
            let job = cluster.job(id)?;
            Ok([Succeeded, Failed, Cancelled].contains(&job.state()).then_some(job))
        })
    }

    /// The prompt of a job's last checkpoint, as its file has it.
    pub(crate) fn last_prompt(&self, id: &str) -> Result<Vec<u8>> {
        self.last_file(id, "prompt.safetensors")
    }

    /// A file of a job's last checkpoint.
    pub(crate) fn last_file(&self, id: &str, name: &str) -> Result<Vec<u8>> {
        let request = v1::GetCheckpointRequest {
            name: format!("jobs/{id}/checkpoints/last"),
            ..v1::GetCheckpointRequest::default()
        };
        let checkpoint = self
            .call(async |client| client.checkpoints().get_checkpoint(request.clone()).await)?
            .into_inner();
        let file = checkpoint.files.iter().find(|file| file.name == name).context("no such file")?;
        let request = v1::ReadBlobRequest { digest: file.digest.clone(), offset: 0 };
        self.call(async |client| {
            let mut parts = client.blobs().read_blob(request.clone()).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(part) = parts.message().await? {
                bytes.extend(part.data);
            }
            Ok(bytes)
        })
    }

    /// A job's checkpoints, the newest first.
    pub(crate) fn checkpoints(&self, id: &str) -> Result<Vec<v1::Checkpoint>> {
        let parent = format!("jobs/{id}");
        let request =
            v1::ListCheckpointsRequest { parent, page_size: 100, ..v1::ListCheckpointsRequest::default() };
        let list = self.call(async |client| client.checkpoints().list_checkpoints(request.clone()).await)?;
        Ok(list.into_inner().checkpoints)
    }

    /// Their steps.
    pub(crate) fn checkpoint_steps(&self, id: &str) -> Result<Vec<u64>> {
        Ok(self.checkpoints(id)?.iter().map(|checkpoint| checkpoint.step).collect())
    }

    /// What is wrong with a checkpoint's files.
    pub(crate) fn verify(&self, name: &str) -> Result<Vec<String>> {
        let request = v1::VerifyCheckpointRequest { name: name.to_owned(), task: String::new() };
        let answer =
            self.call(async |client| client.checkpoints().verify_checkpoint(request.clone()).await)?;
        Ok(answer.into_inner().problems)
    }

    /// The lines of the log of a job or a backbone, by its name.
    pub(crate) fn log(&self, name: &str) -> Result<Vec<String>> {
        let request = v1::StreamLogsRequest { name: name.to_owned(), ..v1::StreamLogsRequest::default() };
        self.call(async |client| {
            let mut pages = client.jobs().stream_logs(request.clone()).await?.into_inner();
            let mut lines = Vec::new();
            while let Some(page) = pages.message().await? {
                lines.extend(page.lines.into_iter().map(|line| line.text));
            }
            Ok(lines)
        })
    }

    /// Everything that a job measured.
    pub(crate) fn points(&self, id: &str) -> Result<Vec<v1::MetricPoint>> {
        let request = v1::StreamMetricsRequest { name: format!("jobs/{id}"), offset: 0, follow: false };
        self.call(async |client| {
            let mut pages = client.jobs().stream_metrics(request.clone()).await?.into_inner();
            let mut points = Vec::new();
            while let Some(page) = pages.message().await? {
                points.extend(page.points);
            }
            Ok(points)
        })
    }

    /// Every change so far.
    pub(crate) fn events(&self) -> Result<Vec<v1::Event>> {
        let newest =
            self.call(async |client| client.events().get_server_info(v1::GetServerInfoRequest {}).await)?;
        let newest = newest.into_inner().revision;
        let request = v1::WatchEventsRequest { start_revision: 1, name_prefixes: Vec::new() };
        self.call(async |client| {
            let mut pages = client.events().watch_events(request.clone()).await?.into_inner();
            let mut events: Vec<v1::Event> = Vec::new();
            while events.last().map_or(0, |event| event.revision) < newest {
                let Some(page) = pages.message().await? else { break };
                events.extend(page.events);
            }
            Ok(events)
        })
    }
}
