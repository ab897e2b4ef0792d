//! What can be changed of a job or a backbone that is there.

use std::collections::BTreeMap;

use incipit_proto::{Problem, names::BackboneName};

use super::{
    Core,
    backbone::Backbone,
    effects::Reply,
    input::{BackbonePatch, JobPatch, JobTarget, Relabel},
    job::MAX_LABELS,
    jobs::state_word,
    requests::{Outcome, check_etag},
    rows::Target,
};

impl Core {
    pub(super) fn update_job(
        &mut self,
        target: &JobTarget,
        patch: JobPatch,
        validate_only: bool,
    ) -> Result<Outcome, Problem> {
        let mut job = self.target(target)?;
        let JobPatch { priority, retry_policy, labels } = patch;
        if job.is_final() && (priority.is_some() || retry_policy.is_some()) {
            let what = format!(
                "{} is {}: its labels can be changed, and nothing else",
                job.name,
                state_word(job.state)
            );
            return Err(Problem::state("JOB_STATE", what).with("name", &job.name));
        }
        job.priority = priority.unwrap_or(job.priority);
        job.retry_policy = retry_policy.unwrap_or(job.retry_policy);
        relabel("job.labels", &mut job.labels, labels)?;
        if validate_only {
            let view = self.view_of(&job, self.queue_position(&job));
            return Ok(Outcome::Shown(Reply::Job(Box::new(view))));
        }
        if self.rows.jobs.get(&job.name) != Some(&job) {
            self.put_job(job);
        }
        Ok(Outcome::Done(Target::Job(target.name.clone())))
    }

    /// What a backbone becomes by a patch.
    pub(super) fn updated_backbone(
        &self,
        name: &BackboneName,
        etag: Option<u64>,
        patch: BackbonePatch,
    ) -> Result<Backbone, Problem> {
        let old = self.rows.backbones.get(name).ok_or_else(|| Problem::not_found(name.as_str()))?;
        check_etag(name.as_str(), etag, old.revision)?;
        let mut backbone = old.clone();
        let BackbonePatch { max_running_jobs, min_dp, labels } = patch;
        backbone.spec.max_running_jobs = max_running_jobs.unwrap_or(backbone.spec.max_running_jobs);
        if let Some(min_dp) = min_dp {
            backbone.spec.min_dp = min_dp;
            backbone.spec.check_min_dp()?;
        }
        relabel("backbone.labels", &mut backbone.labels, labels)?;
        Ok(backbone)
    }

    pub(super) fn update_backbone(&mut self, backbone: Backbone, validate_only: bool) -> Outcome {
        if validate_only {
            return Outcome::Shown(Reply::Backbone(Box::new(self.view_of_backbone(&backbone))));
        }
        let name = backbone.name.clone();
        if self.rows.backbones.get(&name) != Some(&backbone) {
            self.put_backbone(backbone);
        }
        Outcome::Done(Target::Backbone(name))
    }
}

fn relabel(field: &str, labels: &mut BTreeMap<String, String>, patch: Relabel) -> Result<(), Problem> {
    if let Some(whole) = patch.whole {
        *labels = whole;
    }
    for (key, value) in patch.changed {
        match value {
            Some(value) => drop(labels.insert(key, value)),
            None => drop(labels.remove(&key)),
        }
    }
    if labels.len() > MAX_LABELS {
        let what = format!("would have {} entries; {MAX_LABELS} are allowed", labels.len());
        return Err(Problem::field(field, what));
    }
    Ok(())
}
