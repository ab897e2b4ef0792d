//! Requests: one effect a request id, and the answer.

use incipit_proto::{Problem, names::WorkerName, v1::WorkerState};
use tonic::Code;

use super::{
    Core,
    effects::{Change, Reply},
    input::{Request, RequestKey},
    rows::{RequestRecord, Target},
};

/// What a request led to: the answer is made from it, once all is settled.
pub(super) enum Outcome {
    /// It took effect, or asked for what is so already.
    Done(Target),
    /// Nothing was to be done; this is what it would have led to.
    Shown(Reply),
}

impl Core {
    pub(super) fn request(&mut self, key: Option<RequestKey>, request: Request) -> Result<Outcome, Problem> {
        if let Some(key) = &key
            && let Some(record) = self.rows.requests.get(&key.id)
        {
            if record.hash == key.hash {
                return Ok(Outcome::Done(record.target.clone()));
            }
            let what =
                format!("request_id {} was used for another request before; give each its own", key.id);
            let problem = Problem::new(Code::InvalidArgument, "REQUEST_ID_REUSED", what);
            return Err(problem.with("request_id", &key.id));
        }
        let outcome = self.dispatch(request)?;
        if let (Outcome::Done(target), Some(RequestKey { id, hash })) = (&outcome, key) {
            let record = RequestRecord { id, hash, target: target.clone(), time: self.now };
            self.change(Change::PutRequest(record));
        }
        Ok(outcome)
    }

    fn dispatch(&mut self, request: Request) -> Result<Outcome, Problem> {
        let target = match request {
            Request::CreateJob { job, validate_only } => return self.create_job(*job, validate_only),
            Request::CreateBackbone { backbone, validate_only } => {
                return self.create_backbone(*backbone, validate_only);
            }
            Request::UpdateJob { target, patch, validate_only } => {
                return self.update_job(&target, *patch, validate_only);
            }
            Request::UpdateBackbone { name, etag, patch, validate_only } => {
                let backbone = self.updated_backbone(&name, etag, *patch)?;
                return Ok(self.update_backbone(backbone, validate_only));
            }
            Request::DeleteJob(target) => self.delete_job(&target)?,
            Request::PauseJob(target) => self.pause_job(&target)?,
            Request::ResumeJob(target) => self.resume_job(&target)?,
            Request::CancelJob(target) => self.cancel_job(&target)?,
            Request::RetryBackbone { name, etag } => self.retry_backbone(name, etag)?,
            Request::DeleteBackbone { name, etag, force } => self.delete_backbone(&name, etag, force)?,
            Request::DrainWorker { name, etag } => self.drain_worker(name, etag)?,
            Request::DeleteCheckpoint { checkpoint, etag } => self.delete_checkpoint(&checkpoint, etag)?,
            Request::PinCheckpoint { checkpoint, etag, pinned } => {
                self.pin_checkpoint(&checkpoint, etag, pinned)?
            }
            Request::PromotePrompt { prompt, checkpoint, etag, description } => {
                self.promote(prompt, &checkpoint, etag, description)?
            }
            Request::DeletePromptVersion { prompt, version, etag } => {
                self.delete_version(&prompt, version, etag)?
            }
        };
        Ok(Outcome::Done(target))
    }

    /// The answer, with everything as it is now.
    pub(super) fn reply(&self, outcome: Outcome) -> Result<Reply, Problem> {
        let target = match outcome {
            Outcome::Shown(reply) => return Ok(reply),
            Outcome::Done(target) => target,
        };
        Ok(match target {
            Target::Job(name) => Reply::Job(Box::new(self.job_view(&name)?)),
            Target::Backbone(name) => Reply::Backbone(Box::new(self.backbone_view(&name)?)),
            Target::Worker(name) => Reply::Worker(Box::new(self.worker_view(&name)?)),
            Target::Checkpoint(job, step) => {
                Reply::Checkpoint(Box::new(self.checkpoint(&job, step)?.clone()))
            }
            Target::Prompt(prompt, version) => {
                Reply::Prompt(Box::new(self.prompt_version(&prompt, Some(version))?.clone()))
            }
            Target::Nothing => Reply::Done,
        })
    }

    fn drain_worker(&mut self, name: WorkerName, etag: Option<u64>) -> Result<Target, Problem> {
        let worker = self.rows.workers.get(&name).ok_or_else(|| Problem::not_found(name.as_str()))?;
        check_etag(name.as_str(), etag, worker.revision)?;
        if worker.state == WorkerState::Lost {
            let what = format!("{name} is lost, and has nothing that could be drained");
            return Err(Problem::state("WORKER_LOST", what).with("name", &name));
        }
        self.drain(&name);
        Ok(Target::Worker(name))
    }

    /// Forgets requests and counters that are too old to matter.
    pub(super) fn prune_requests(&mut self) {
        let (now, ttl) = (self.now, self.config.request_ttl_ms);
        let old = self.rows.requests.values().filter(|record| now.since(record.time) >= ttl);
        let old: Vec<String> = old.map(|record| record.id.clone()).collect();
        for id in old {
            self.change(Change::RemoveRequest(id));
        }
        let old = self.rows.counters.values();
        let old = old.filter(|counter| counter.expire_time.is_some_and(|time| time <= now));
        let old: Vec<String> = old.map(|counter| counter.name.clone()).collect();
        for name in old {
            self.change(Change::RemoveCounter(name));
        }
    }
}

/// Refuses a request that was made for another state of a resource.
pub(super) fn check_etag(name: &str, etag: Option<u64>, revision: u64) -> Result<(), Problem> {
    match etag {
        Some(etag) if etag != revision => {
            let what = format!(
                "{name} has changed: its etag is {revision}, not {etag}; read it again, and decide again"
            );
            Err(Problem::new(Code::Aborted, "ETAG_MISMATCH", what).with("name", name).with("etag", revision))
        }
        _ => Ok(()),
    }
}
