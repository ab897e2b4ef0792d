//! Requests for changes, checked.

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName, PromptName, WorkerName},
    v1,
};
use prost::Message;

use super::{
    Roots,
    check::{Checks, MAX_TEXT},
    checkpoint_ref, request_key,
    spec::check_spec,
    version_ref,
};
use crate::core::{
    backbone::{BackboneSpec, Collective, Device, Dtype},
    input::{Input, JobTarget, NewBackbone, NewJob, Request, RequestKey, StepRef},
    job::RetryPolicy,
};

/// A request, as the core takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Tells it from the same sent again.
    pub key: Option<RequestKey>,
    /// What for.
    pub request: Request,
}

impl Asked {
    /// The input, with who asks.
    #[must_use]
    pub fn by(self, actor: impl Into<String>) -> Input {
        Input::Request { actor: actor.into(), key: self.key, request: self.request }
    }
}

pub(super) fn asked(
    method: &str,
    id: &str,
    message: &impl Message,
    request: Request,
) -> Result<Asked, Problem> {
    Ok(Asked { key: request_key(method, id, message)?, request })
}

/// `made_up` is the job's id where the caller gives none.
///
/// # Errors
/// All that is wrong with it, in one problem.
pub fn create_job(message: &v1::CreateJobRequest, made_up: &str, roots: &Roots) -> Result<Asked, Problem> {
    let mut checks = Checks::default();
    let id = if message.job_id.is_empty() { made_up } else { &message.job_id };
    let name = checks.take(JobName::of_id("job_id", id));
    let Some(job) = &message.job else {
        return Err(Problem::field("job", "is missing"));
    };
    let backbone = checks.take(BackboneName::parse("job.backbone", &job.backbone));
    let spec = job.spec.clone().unwrap_or_default();
    check_spec(&mut checks, &spec, roots);
    let priority = priority(&mut checks, job);
    checks.labels("job.labels", &job.labels);
    let retry_policy = retry_policy(&mut checks, job.retry_policy.as_ref());
    let start = Some(&message.continue_from).filter(|name| !name.is_empty());
    let start = start.and_then(|name| checks.take(super::checkpoint_ref("continue_from", name, "")));
    let key = checks.take(request_key("CreateJob", &message.request_id, message));
    checks.finish()?;
    let (Some(name), Some(backbone)) = (name, backbone) else {
        return Err(Problem::field("job", "is wrong")); // Said more exactly by `finish`.
    };
    let labels = job.labels.clone();
    let job = Box::new(NewJob { name, backbone, spec, priority, retry_policy, labels, start });
    let request = Request::CreateJob { job, validate_only: message.validate_only };
    Ok(Asked { key: key.flatten(), request })
}

pub(super) fn priority(checks: &mut Checks, job: &v1::Job) -> u32 {
    let priority = if job.priority == 0 { 10 } else { job.priority };
    checks.range("job.priority", Some(priority), 1..=100);
    priority
}

pub(super) fn retry_policy(checks: &mut Checks, policy: Option<&v1::RetryPolicy>) -> RetryPolicy {
    use v1::JobReason::{BadData, BadSpec, EngineCrashed, Internal, NonFinite, OutOfMemory};
    let Some(policy) = policy else { return RetryPolicy::default() };
    checks.range("job.retry_policy.max_retries", Some(policy.max_retries), 0..=10);
    let mut reasons = Vec::new();
    for number in &policy.reasons {
        match v1::JobReason::try_from(*number) {
            Ok(reason @ (NonFinite | BadData | BadSpec | OutOfMemory | Internal | EngineCrashed)) => {
                if !reasons.contains(&reason) {
                    reasons.push(reason);
                }
            }
            _ => {
                let what = format!(
                    "has {number}; give NON_FINITE, BAD_DATA, BAD_SPEC, OUT_OF_MEMORY, INTERNAL or ENGINE_CRASHED"
                );
                checks.wrong("job.retry_policy.reasons", what);
            }
        }
    }
    RetryPolicy { max_retries: policy.max_retries, reasons }
}

pub(super) fn etag(field: &str, text: &str) -> Result<Option<u64>, Problem> {
    match text {
        "" => Ok(None),
        text => match super::number(text) {
            Some(number) => Ok(Some(number)),
            None => Err(Problem::field(field, format!("is {text:.80?}; give one that the coordinator gave"))),
        },
    }
}

macro_rules! of_a_job {
    ($($function:ident, $message:ident, $method:literal, $variant:ident;)+) => {
        $(
            #[doc = concat!("`", $method, "`.\n\n# Errors\nIf a field is wrong.")]
            pub fn $function(message: &v1::$message) -> Result<Asked, Problem> {
                let (name, etag) = (JobName::parse("name", &message.name)?, etag("etag", &message.etag)?);
                let target = JobTarget { name, etag };
                asked($method, &message.request_id, message, Request::$variant(target))
            }
        )+
    };
}

of_a_job! {
    delete_job, DeleteJobRequest, "DeleteJob", DeleteJob;
    pause_job, PauseJobRequest, "PauseJob", PauseJob;
    resume_job, ResumeJobRequest, "ResumeJob", ResumeJob;
    cancel_job, CancelJobRequest, "CancelJob", CancelJob;
}

/// `CreateBackbone`.
///
/// # Errors
/// All that is wrong with it, in one problem.
pub fn create_backbone(message: &v1::CreateBackboneRequest, roots: &Roots) -> Result<Asked, Problem> {
    let mut checks = Checks::default();
    let name = checks.take(BackboneName::of_id("backbone_id", &message.backbone_id));
    let Some(backbone) = &message.backbone else {
        return Err(Problem::field("backbone", "is missing"));
    };
    let spec = backbone_spec(&mut checks, backbone, roots);
    checks.labels("backbone.labels", &backbone.labels);
    let key = checks.take(request_key("CreateBackbone", &message.request_id, message));
    checks.finish()?;
    let Some(name) = name else {
        return Err(Problem::field("backbone_id", "is wrong")); // Said more exactly by `finish`.
    };
    let backbone = Box::new(NewBackbone { name, spec, labels: backbone.labels.clone() });
    let request = Request::CreateBackbone { backbone, validate_only: message.validate_only };
    Ok(Asked { key: key.flatten(), request })
}

fn backbone_spec(checks: &mut Checks, backbone: &v1::Backbone, roots: &Roots) -> BackboneSpec {
    let or = |given: u32, default: u32| if given == 0 { default } else { given };
    let spec = BackboneSpec {
        model: backbone.model.clone(),
        dtype: choice(checks, "backbone.dtype", &backbone.dtype, Dtype::ALL, Dtype::as_str),
        device: choice(checks, "backbone.device", &backbone.device, Device::ALL, Device::as_str),
        tp: or(backbone.tp, 1),
        dp: or(backbone.dp, 1),
        min_dp: backbone.min_dp,
        collective: choice(
            checks,
            "backbone.collective",
            &backbone.collective,
            Collective::ALL,
            Collective::as_str,
        ),
        microbatch_tokens: backbone.microbatch_tokens,
        max_running_jobs: max_running_jobs(checks, backbone),
    };
    if spec.model.starts_with('/') {
        checks.path("backbone.model", &spec.model, &roots.models, "model");
    } else if !is_hub_id(&spec.model) {
        let what = format!(
            "is {:.100?}; give an absolute path, or a name on the Hub (ORG/NAME or ORG/NAME@REVISION)",
            spec.model
        );
        checks.wrong("backbone.model", what);
    } else if !roots.hub {
        let what =
            format!("is {:?} on the Hub, which this coordinator does not allow; give a path", spec.model);
        checks.wrong("backbone.model", what);
    }
    checks.range("backbone.tp", Some(spec.tp), 1..=64);
    checks.range("backbone.dp", Some(spec.dp), 1..=256);
    checks.range("backbone.microbatch_tokens", Some(spec.microbatch_tokens), 0..=1 << 24);
    checks.take(spec.check_min_dp());
    if spec.collective == Collective::Nccl && spec.device != Device::Cuda {
        checks.wrong("backbone.collective", "is nccl, which joins GPUs alone; give the device cuda, or gloo");
    }
    spec
}

pub(super) fn max_running_jobs(checks: &mut Checks, backbone: &v1::Backbone) -> u32 {
    let places = if backbone.max_running_jobs == 0 { 32 } else { backbone.max_running_jobs };
    checks.range("backbone.max_running_jobs", Some(places), 1..=1024);
    places
}

fn choice<T: Copy>(
    checks: &mut Checks,
    field: &str,
    given: &str,
    all: &[T],
    word: impl Fn(T) -> &'static str,
) -> T {
    let found = all.iter().find(|choice| word(**choice) == given);
    if found.is_none() && !given.is_empty() {
        let words: Vec<_> = all.iter().map(|choice| word(*choice)).collect();
        checks.wrong(field, format!("is {given:.40?}; give one of {}", words.join(", ")));
    }
    // The first is the default.
    *found.unwrap_or(&all[0])
}

fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
    id.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name))
        && revision.split('/').all(part)
}

/// `RetryBackbone`.
///
/// # Errors
/// If a field is wrong.
pub fn retry_backbone(message: &v1::RetryBackboneRequest) -> Result<Asked, Problem> {
    let (name, etag) = (BackboneName::parse("name", &message.name)?, etag("etag", &message.etag)?);
    asked("RetryBackbone", &message.request_id, message, Request::RetryBackbone { name, etag })
}

/// `DeleteBackbone`.
///
/// # Errors
/// If a field is wrong.
pub fn delete_backbone(message: &v1::DeleteBackboneRequest) -> Result<Asked, Problem> {
    let name = BackboneName::parse("name", &message.name)?;
    let request = Request::DeleteBackbone { name, etag: etag("etag", &message.etag)?, force: message.force };
    asked("DeleteBackbone", &message.request_id, message, request)
}

/// `DrainWorker`.
///
/// # Errors
/// If a field is wrong.
pub fn drain_worker(message: &v1::DrainWorkerRequest) -> Result<Asked, Problem> {
    let (name, etag) = (WorkerName::parse("name", &message.name)?, etag("etag", &message.etag)?);
    asked("DrainWorker", &message.request_id, message, Request::DrainWorker { name, etag })
}

/// `DeleteCheckpoint`.
///
/// # Errors
/// If a field is wrong; `best` and `last` are too vague for this.
pub fn delete_checkpoint(message: &v1::DeleteCheckpointRequest) -> Result<Asked, Problem> {
    let checkpoint = checkpoint_ref("name", &message.name, "")?;
    if !matches!(checkpoint.step, StepRef::At(_)) {
        return Err(Problem::field("name", format!("is {:?}; say which step", message.name)));
    }
    let request = Request::DeleteCheckpoint { checkpoint, etag: etag("etag", &message.etag)? };
    asked("DeleteCheckpoint", &message.request_id, message, request)
}

/// `PinCheckpoint`.
///
/// # Errors
/// If a field is wrong.
pub fn pin_checkpoint(message: &v1::PinCheckpointRequest) -> Result<Asked, Problem> {
    let checkpoint = checkpoint_ref("name", &message.name, &message.task)?;
    let etag = etag("etag", &message.etag)?;
    let request = Request::PinCheckpoint { checkpoint, etag, pinned: message.pinned };
    asked("PinCheckpoint", &message.request_id, message, request)
}

/// `PromotePrompt`.
///
/// # Errors
/// All that is wrong with it, in one problem.
pub fn promote_prompt(message: &v1::PromotePromptRequest) -> Result<Asked, Problem> {
    let prompt = PromptName::parse("prompt", &message.prompt)?;
    let checkpoint = checkpoint_ref("checkpoint", &message.checkpoint, &message.task)?;
    if message.description.len() > MAX_TEXT {
        let what = format!("has {} bytes; {MAX_TEXT} are allowed", message.description.len());
        return Err(Problem::field("description", what));
    }
    let (etag, description) = (etag("etag", &message.etag)?, message.description.clone());
    let request = Request::PromotePrompt { prompt, checkpoint, etag, description };
    asked("PromotePrompt", &message.request_id, message, request)
}

/// `DeletePromptVersion`.
///
/// # Errors
/// If a field is wrong; `latest` is too vague for this.
pub fn delete_prompt_version(message: &v1::DeletePromptVersionRequest) -> Result<Asked, Problem> {
    let (prompt, version) = version_ref("name", &message.name)?;
    let Some(version) = version else {
        return Err(Problem::field("name", format!("is {:?}; say which version", message.name)));
    };
    let etag = etag("etag", &message.etag)?;
    let request = Request::DeletePromptVersion { prompt, version, etag };
    asked("DeletePromptVersion", &message.request_id, message, request)
}
