//! Requests for changes of what is there, checked: the fields that a mask names, and no others.

use std::collections::BTreeMap;

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName},
    v1,
};
use pbjson_types::FieldMask;

use super::{
    Asked,
    check::Checks,
    requests::{asked, etag, max_running_jobs, priority, retry_policy},
};
use crate::core::input::{BackbonePatch, JobPatch, JobTarget, Relabel, Request};

/// `UpdateJob`.
///
/// # Errors
/// All that is wrong with it, in one problem.
pub fn update_job(message: &v1::UpdateJobRequest) -> Result<Asked, Problem> {
    let Some(job) = &message.job else {
        return Err(Problem::field("job", "is missing"));
    };
    let mut checks = Checks::default();
    let name = checks.take(JobName::parse("job.name", &job.name));
    let etag = checks.take(etag("job.etag", &job.etag)).flatten();
    let mut patch = JobPatch::default();
    for path in paths(&mut checks, message.update_mask.as_ref(), &["priority", "labels", "retry_policy"]) {
        match path {
            "priority" => patch.priority = Some(priority(&mut checks, job)),
            "retry_policy" => {
                patch.retry_policy = Some(retry_policy(&mut checks, job.retry_policy.as_ref()));
            }
            labels => relabel(&mut patch.labels, labels, &job.labels),
        }
    }
    checks.labels("job.labels", &job.labels);
    checks.finish()?;
    let Some(name) = name else {
        return Err(Problem::field("job.name", "is wrong")); // Said more exactly by `finish`.
    };
    let (target, patch) = (JobTarget { name, etag }, Box::new(patch));
    let request = Request::UpdateJob { target, patch, validate_only: message.validate_only };
    asked("UpdateJob", &message.request_id, message, request)
}

/// `UpdateBackbone`.
///
/// # Errors
/// All that is wrong with it, in one problem.
pub fn update_backbone(message: &v1::UpdateBackboneRequest) -> Result<Asked, Problem> {
    let Some(backbone) = &message.backbone else {
        return Err(Problem::field("backbone", "is missing"));
    };
    let mut checks = Checks::default();
    let name = checks.take(BackboneName::parse("backbone.name", &backbone.name));
    let etag = checks.take(etag("backbone.etag", &backbone.etag)).flatten();
    let mut patch = BackbonePatch::default();
    for path in paths(&mut checks, message.update_mask.as_ref(), &["max_running_jobs", "min_dp", "labels"]) {
        match path {
            "max_running_jobs" => patch.max_running_jobs = Some(max_running_jobs(&mut checks, backbone)),
            "min_dp" => patch.min_dp = Some(backbone.min_dp),
            labels => relabel(&mut patch.labels, labels, &backbone.labels),
        }
    }
    checks.labels("backbone.labels", &backbone.labels);
    checks.finish()?;
    let Some(name) = name else {
        return Err(Problem::field("backbone.name", "is wrong")); // Said more exactly by `finish`.
    };
    let (patch, validate_only) = (Box::new(patch), message.validate_only);
    let request = Request::UpdateBackbone { name, etag, patch, validate_only };
    asked("UpdateBackbone", &message.request_id, message, request)
}

/// The paths of a mask, which are among `known`, or are `labels.KEY`.
fn paths<'a>(checks: &mut Checks, mask: Option<&'a FieldMask>, known: &[&'static str]) -> Vec<&'a str> {
    let given = mask.map_or(&[][..], |mask| &mask.paths);
    if given.is_empty() {
        let what = format!("is empty; name the fields that are to change: {}, or *", known.join(", "));
        checks.wrong("update_mask", what);
    }
    let mut paths = Vec::new();
    for path in given {
        match path.as_str() {
            "*" => paths.extend(known),
            path if known.contains(&path) || label_of(path).is_some() => paths.push(path),
            path => {
                let what = format!("names {path:.80?}; what can be changed: {}", known.join(", "));
                checks.wrong("update_mask", what);
            }
        }
    }
    paths
}

/// The key in `labels.KEY`, which may have dots itself.
fn label_of(path: &str) -> Option<&str> {
    path.strip_prefix("labels.").filter(|key| !key.is_empty())
}

fn relabel(patch: &mut Relabel, path: &str, labels: &BTreeMap<String, String>) {
    match label_of(path) {
        Some(key) => drop(patch.changed.insert(key.to_owned(), labels.get(key).cloned())),
        None => patch.whole = Some(labels.clone()),
    }
}
