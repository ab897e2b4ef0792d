//! Between the messages on the wire and what the core knows: everything that comes in is checked here, and nowhere else.

mod agent;
mod check;
mod requests;
mod show;
mod spec;
mod updates;

use std::path::PathBuf;

use incipit_proto::{
    Problem,
    names::{JobName, PromptName},
    v1::{JobState, ListJobsRequest, TrainingSpec, data_source::Source},
};
use prost::Message;

pub use self::{
    agent::{agent_message, hello, to_agent},
    requests::{
        Asked, cancel_job, create_backbone, create_job, delete_backbone, delete_checkpoint, delete_job,
        delete_prompt_version, drain_worker, pause_job, pin_checkpoint, promote_prompt, resume_job,
        retry_backbone,
    },
    show::{backbone, checkpoint, event, job, prompt_version, timestamp, worker},
    updates::{update_backbone, update_job},
};
use crate::core::{
    input::{CheckpointRef, RequestKey, StepRef},
    read::JobFilter,
};

/// What may be named on the workers' machines, and beyond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots {
    /// Directories under which data may lie.
    pub data: Vec<PathBuf>,
    /// Directories under which models may lie.
    pub models: Vec<PathBuf>,
    /// Whether models of the Hugging Face Hub may be named.
    pub hub: bool,
}

/// Digests of the blobs that a specification names. The service sees to it that they are there.
pub fn digests_of(spec: &TrainingSpec) -> impl Iterator<Item = &str> {
    let tasks = spec.tasks.iter().filter_map(|task| task.spec.as_ref());
    let named = [spec].into_iter().chain(tasks).flat_map(|spec| [&spec.train, &spec.eval, &spec.initial]);
    named.flatten().filter_map(|data| match &data.source {
        Some(Source::Digest(digest)) => Some(digest.as_str()),
        _ => None,
    })
}

/// The checkpoint in a name, `jobs/{job}/checkpoints/{step}`, the step also `best` or `last`; and the task that is meant, if it is named.
///
/// # Errors
/// If it is none; the problem names `field`.
pub fn checkpoint_ref(field: &str, text: &str, task: &str) -> Result<CheckpointRef, Problem> {
    let (job, step) = text.split_once("/checkpoints/").ok_or_else(|| {
        Problem::field(
            field,
            format!("is {text:?}; give jobs/JOB/checkpoints/STEP, or best or last for STEP"),
        )
    })?;
    let job = JobName::parse(field, job)?;
    let step =
        match step {
            "best" => StepRef::Best,
            "last" => StepRef::Last,
            step => StepRef::At(number(step).ok_or_else(|| {
                Problem::field(field, format!("is {text:?}; STEP is a number, best or last"))
            })?),
        };
    let task = Some(task.to_owned()).filter(|task| !task.is_empty());
    Ok(CheckpointRef { job, step, task })
}

/// The version in a name, `prompts/{prompt}/versions/{version}`; nothing for `latest`.
///
/// # Errors
/// If it is none; the problem names `field`.
pub fn version_ref(field: &str, text: &str) -> Result<(PromptName, Option<u64>), Problem> {
    let wrong =
        || Problem::field(field, format!("is {text:?}; give prompts/PROMPT/versions/N, or latest for N"));
    let (prompt, version) = text.split_once("/versions/").ok_or_else(wrong)?;
    let prompt = PromptName::parse(field, prompt)?;
    match version {
        "latest" => Ok((prompt, None)),
        version => Ok((prompt, Some(number(version).ok_or_else(wrong)?))),
    }
}

/// Which jobs a list is to have.
///
/// # Errors
/// If the backbone's name is none, or a state is unknown.
pub fn job_filter(request: &ListJobsRequest) -> Result<JobFilter, Problem> {
    let backbone = match request.backbone.as_str() {
        "" => None,
        text => Some(incipit_proto::names::BackboneName::parse("backbone", text)?),
    };
    let state = |number: &i32| {
        let state = JobState::try_from(*number).ok().filter(|state| *state != JobState::Unspecified);
        state.ok_or_else(|| Problem::field("states", format!("has the unknown state {number}")))
    };
    let states = request.states.iter().map(state).collect::<Result<_, _>>()?;
    Ok(JobFilter { backbone, states, labels: request.labels.clone() })
}

/// Tells a request from the same sent again: nothing where the caller gave no id.
///
/// # Errors
/// If the id is no UUID.
pub fn request_key(method: &str, id: &str, request: &impl Message) -> Result<Option<RequestKey>, Problem> {
    if id.is_empty() {
        return Ok(None);
    }
    let Ok(id) = uuid::Uuid::try_parse(id) else {
        return Err(Problem::field("request_id", format!("is {id:?}; give a UUID, or nothing")));
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(method.as_bytes()).update(&[0]).update(&request.encode_to_vec());
    Ok(Some(RequestKey { id: id.to_string(), hash: hasher.finalize().to_hex().to_string() }))
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests;
