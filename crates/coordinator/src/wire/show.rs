//! What the core knows, as messages.

use incipit_proto::v1::{self, event};

use crate::core::{
    Backbone, Checkpoint, Job, PromptVersion, Resource, Stamp, Time, Worker,
    checkpoint::TaskScore,
    job::DEFAULT_STEPS,
    read::{BackboneView, JobView, WorkerView},
};

/// A time, as a message.
#[must_use]
pub fn timestamp(time: Time) -> pbjson_types::Timestamp {
    // Both fit: a u64 of milliseconds is less than an i64 of seconds.
    pbjson_types::Timestamp { seconds: (time.0 / 1000) as i64, nanos: (time.0 % 1000) as i32 * 1_000_000 }
}

/// A job, with what is known of the moment.
#[must_use]
pub fn job(view: &JobView) -> v1::Job {
    let mut message = job_row(&view.job);
    message.queue_position = view.queue_position;
    if let (Some(moment), Some(progress)) = (&view.progress, &mut message.progress) {
        progress.step = progress.step.max(moment.step);
        progress.loss = moment.loss;
        progress.steps_per_second = view.steps_per_second;
        if let Some((step, score)) = moment.best {
            (progress.best_step, progress.best_score) = (step, Some(score));
        }
    }
    message
}

fn job_row(job: &Job) -> v1::Job {
    let progress = v1::JobProgress {
        step: job.committed_step,
        num_steps: job.spec.steps.unwrap_or(DEFAULT_STEPS),
        loss: None,
        committed_step: job.committed_step,
        best_score: job.best.and_then(|best| best.score),
        best_step: job.best.map_or(0, |best| best.step),
        steps_per_second: 0.0,
        warnings: job.warnings.clone(),
    };
    let retry_policy = v1::RetryPolicy {
        max_retries: job.retry_policy.max_retries,
        reasons: job.retry_policy.reasons.iter().map(|reason| i32::from(*reason)).collect(),
    };
    v1::Job {
        name: job.name.to_string(),
        backbone: job.backbone.to_string(),
        spec: Some(job.spec.clone()),
        priority: job.priority,
        retry_policy: Some(retry_policy),
        labels: job.labels.clone(),
        continued_from: job.continued_from.clone(),
        state: job.state.into(),
        reason: job.reason.into(),
        message: job.message.clone(),
        wish: job.wish.into(),
        attempts: job.attempts.iter().map(attempt).collect(),
        progress: Some(progress),
        create_time: Some(timestamp(job.create_time)),
        start_time: job.start_time.map(timestamp),
        end_time: job.end_time.map(timestamp),
        etag: job.revision.to_string(),
        queue_position: 0,
    }
}

fn attempt(attempt: &crate::core::job::Attempt) -> v1::JobAttempt {
    let end = attempt.end.as_ref();
    v1::JobAttempt {
        number: attempt.number,
        epoch: attempt.epoch,
        start_step: attempt.start_step,
        end_step: if end.is_some() { attempt.end_step } else { 0 },
        start_time: Some(timestamp(attempt.start_time)),
        end_time: end.map(|end| timestamp(end.time)),
        reason: end.map(|end| end.reason.into()).unwrap_or_default(),
        message: end.map(|end| end.message.clone()).unwrap_or_default(),
    }
}

/// A backbone, with what is known of the moment.
#[must_use]
pub fn backbone(view: &BackboneView) -> v1::Backbone {
    let mut message = backbone_row(&view.backbone);
    message.running_jobs = view.running_jobs;
    message.queued_jobs = view.queued_jobs;
    message.tokens_per_second = view.tokens_per_second;
    for rank in &mut message.ranks {
        if let Some((loaded, total)) = view.loading.get(&rank.rank) {
            (rank.loaded_bytes, rank.total_bytes) = (*loaded, *total);
        }
    }
    message
}

fn backbone_row(backbone: &Backbone) -> v1::Backbone {
    let spec = &backbone.spec;
    let ranks = backbone.ranks.iter().filter(|rank| !rank.lost).map(|rank| v1::RankPlacement {
        rank: rank.rank,
        worker: rank.worker.to_string(),
        pid: rank.pid,
        ready: rank.ready,
        loaded_bytes: 0,
        total_bytes: 0,
    });
    v1::Backbone {
        name: backbone.name.to_string(),
        model: spec.model.clone(),
        dtype: spec.dtype.to_string(),
        device: spec.device.to_string(),
        tp: spec.tp,
        dp: spec.dp,
        min_dp: spec.min_dp,
        collective: spec.collective.to_string(),
        microbatch_tokens: spec.microbatch_tokens,
        max_running_jobs: spec.max_running_jobs,
        labels: backbone.labels.clone(),
        state: backbone.state.into(),
        reason: backbone.reason.into(),
        message: backbone.message.clone(),
        epoch: backbone.epoch,
        ranks: ranks.collect(),
        fingerprint: backbone.fingerprint.clone(),
        num_parameters: backbone.num_parameters,
        d_model: backbone.d_model,
        num_layers: backbone.num_layers,
        running_jobs: 0,
        queued_jobs: 0,
        tokens_per_second: 0.0,
        create_time: Some(timestamp(backbone.create_time)),
        ready_time: backbone.ready_time.map(timestamp),
        etag: backbone.revision.to_string(),
    }
}

/// A worker, with what is known of the moment.
#[must_use]
pub fn worker(view: &WorkerView) -> v1::Worker {
    v1::Worker {
        used_slots: view.used_slots,
        heartbeat_time: view.heartbeat_time.map(timestamp),
        ..worker_row(&view.worker)
    }
}

fn worker_row(worker: &Worker) -> v1::Worker {
    v1::Worker {
        name: worker.name.to_string(),
        state: worker.state.into(),
        machine: Some(worker.machine.clone()),
        slots: worker.slots,
        used_slots: 0,
        version: worker.version.clone(),
        heartbeat_time: None,
        connect_time: Some(timestamp(worker.connect_time)),
        etag: worker.revision.to_string(),
    }
}

/// A checkpoint.
#[must_use]
pub fn checkpoint(checkpoint: &Checkpoint) -> v1::Checkpoint {
    let files = checkpoint.files.iter().map(|file| v1::CheckpointFile {
        name: file.name.clone(),
        digest: file.digest.clone(),
        size: file.size,
    });
    v1::Checkpoint {
        name: checkpoint.name(),
        step: checkpoint.step,
        files: files.collect(),
        backbone_fingerprint: checkpoint.backbone_fingerprint.clone(),
        score: checkpoint.score,
        best: checkpoint.best,
        pinned: checkpoint.pinned,
        damaged: checkpoint.damaged,
        attempt: checkpoint.attempt,
        epoch: checkpoint.epoch,
        create_time: Some(timestamp(checkpoint.create_time)),
        tasks: checkpoint.tasks.iter().map(task).collect(),
        etag: checkpoint.revision.to_string(),
    }
}

fn task(task: &TaskScore) -> v1::CheckpointTask {
    v1::CheckpointTask { name: task.name.clone(), score: task.score, best: task.best }
}

/// A version of a prompt.
#[must_use]
pub fn prompt_version(version: &PromptVersion) -> v1::PromptVersion {
    let previous = version.previous.map(|previous| format!("{}/versions/{previous}", version.prompt));
    v1::PromptVersion {
        name: version.name(),
        checkpoint: crate::core::checkpoint::checkpoint_name(&version.job, version.step),
        previous: previous.unwrap_or_default(),
        digest: version.digest.clone(),
        backbone_fingerprint: version.backbone_fingerprint.clone(),
        score: version.score,
        description: version.description.clone(),
        create_time: Some(timestamp(version.create_time)),
        task: version.task.clone().unwrap_or_default(),
        etag: version.revision.to_string(),
    }
}

/// An event, from what was written with it. What is known of the moment alone (rates, counts) is not in it.
#[must_use]
pub fn event(stamp: &Stamp, resource: &Resource) -> v1::Event {
    let body = match resource {
        Resource::Job(job) => event::Resource::Job(job_row(job)),
        Resource::Backbone(backbone) => event::Resource::Backbone(backbone_row(backbone)),
        Resource::Worker(worker) => event::Resource::Worker(worker_row(worker)),
        Resource::Checkpoint(row) => event::Resource::Checkpoint(checkpoint(row)),
        Resource::Prompt(version) => event::Resource::PromptVersion(prompt_version(version)),
    };
    v1::Event {
        revision: stamp.revision,
        time: Some(timestamp(stamp.time)),
        kind: stamp.kind.into(),
        name: resource.name(),
        resource: Some(body),
        actor: stamp.actor.clone(),
    }
}
