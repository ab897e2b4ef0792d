//! What agents report: each report once, in order, and only what is of the current epoch and attempt.

use incipit_proto::{
    Problem,
    names::{BackboneName, JobName, WorkerName},
    v1::{BackboneState, JobReason, JobState, JobWish, LogLine, MetricPoint, metric_point::Point},
};
use tonic::Code;

use super::{
    Core,
    checkpoint::{Checkpoint, CheckpointFile, PromptVersion},
    effects::{Change, Resource, ToAgent},
    input::{JobEvent, Report, Saved},
    job::{Best, Job},
    jobs::cut,
    suspects::Suspicion,
    transitions::JobCause,
    worker::WorkerReports,
};

/// Warnings of a loader that are kept, at most.
const MAX_WARNINGS: usize = 20;
/// Characters of a line of a log, at most.
const MAX_LINE: usize = 16 * 1024;

impl Core {
    pub(super) fn report(&mut self, worker: &WorkerName, sequence: u64, report: Report) {
        let Some(reports) = self.rows.reports.get(worker) else { return };
        let last = reports.sequence;
        if sequence > last + 1 {
            let what = format!("{worker} sent report {sequence}, and {} is next; connect again", last + 1);
            self.close(worker, Problem::new(Code::Aborted, "SEQUENCE_GAP", what).with("acknowledged", last));
            return;
        }
        if sequence == last + 1 {
            let incarnation = reports.incarnation.clone();
            self.take(worker, report);
            self.change(Change::PutReports(WorkerReports { worker: worker.clone(), incarnation, sequence }));
        }
        self.send(worker, ToAgent::Acknowledged(last.max(sequence)));
    }

    fn take(&mut self, worker: &WorkerName, report: Report) {
        match report {
            Report::Engine { backbone, epoch, rank, event } => {
                self.engine_report(worker, &backbone, (epoch, rank), event);
            }
            Report::Job { backbone, epoch, job, attempt, event } => {
                if self.is_current(worker, &backbone, epoch, (&job, attempt)) {
                    self.job_report(&job, event);
                }
            }
            Report::Logs { backbone, job, lines } => self.log_report(worker, &backbone, job.as_ref(), lines),
        }
    }

    /// Whether a report, which has not been taken yet, will have an effect. Reports of engines and lines of logs have none that matters here.
    #[must_use]
    pub fn awaits(&self, worker: &WorkerName, sequence: u64, report: &Report) -> bool {
        let is_new = self.rows.reports.get(worker).is_none_or(|stored| sequence > stored.sequence);
        match report {
            Report::Job { backbone, epoch, job, attempt, .. } => {
                is_new && self.is_current(worker, backbone, *epoch, (job, *attempt))
            }
            Report::Engine { .. } | Report::Logs { .. } => false,
        }
    }

    /// Whether what is said of a job comes from where the job is.
    fn is_current(
        &self,
        worker: &WorkerName,
        backbone: &BackboneName,
        epoch: u64,
        (job, attempt): (&JobName, u32),
    ) -> bool {
        let Some(backbone) = self.rows.backbones.get(backbone) else { return false };
        let Some(job) = self.rows.jobs.get(job) else { return false };
        backbone.state == BackboneState::Ready
            && backbone.epoch == epoch
            && backbone.ranks.first().is_some_and(|rank| rank.worker == *worker)
            && job.backbone == backbone.name
            && job.state == JobState::Running
            && job.open_attempt().is_some_and(|open| open.number == attempt && open.epoch == epoch)
    }

    fn job_report(&mut self, name: &JobName, event: JobEvent) {
        match event {
            JobEvent::Started { step, warnings } => {
                self.progress.entry(name.clone()).or_default().step = step;
                let Some(job) = self.rows.jobs.get(name) else { return };
                let warnings: Vec<String> =
                    warnings.iter().take(MAX_WARNINGS).map(|line| cut(line)).collect();
                if job.warnings != warnings {
                    self.put_job(Job { warnings, ..job.clone() });
                }
            }
            JobEvent::Measured(points) => self.measured(name, points),
            JobEvent::Saved(saved) => self.saved(name, saved),
            JobEvent::Left { state, reason, message, step } => {
                self.left(name, (state, reason), &message, step);
            }
        }
    }

    fn measured(&mut self, name: &JobName, mut points: Vec<MetricPoint>) {
        let Some(job) = self.rows.jobs.get(name) else { return };
        let backbone = job.backbone.clone();
        let now = self.now;
        let progress = self.progress.entry(name.clone()).or_default();
        for point in &points {
            progress.step = progress.step.max(point.step);
            match &point.point {
                Some(Point::Training(training)) => {
                    progress.loss = Some(training.loss);
                    progress.rate.add(1.0, now);
                    let tokens = self.token_rates.entry(backbone.clone()).or_default();
                    tokens.add(training.num_tokens as f64, now);
                }
                Some(Point::Evaluation(evaluation)) if evaluation.best => {
                    progress.best = Some((point.step, evaluation.score));
                }
                _ => {}
            }
        }
        let mut marks = self.rows.metrics.get(name).copied().unwrap_or_default();
        points.retain_mut(|point| marks.take(point));
        if points.is_empty() {
            return;
        }
        self.change(Change::AppendMetrics(name.clone(), points));
        self.forgive_losses(&backbone);
        self.got_on(name);
    }

    /// A job measured something new.
    fn got_on(&mut self, name: &JobName) {
        let Some(job) = self.rows.jobs.get(name) else { return };
        if job.start_time.is_none() || job.suspicion != Suspicion::default() {
            let start_time = job.start_time.or(Some(self.now));
            self.put_job(Job { start_time, suspicion: Suspicion::default(), ..job.clone() });
        }
    }

    fn saved(&mut self, name: &JobName, Saved { step, files, score, best, tasks }: Saved) {
        let Some(mut job) = self.rows.jobs.get(name).cloned() else { return };
        let known = self.rows.checkpoints.get(&(name.clone(), step));
        let (pinned, created_revision) =
            known.map_or((false, 0), |known| (known.pinned, known.created_revision));
        let completes = known.is_some_and(|last| self.completes(&job, last, &files));
        if step <= job.committed_step && !completes {
            // A checkpoint that is there already, told again by an engine that began anew, is no news; another one of the same step is a
            // fault.
            if known.is_none_or(|known| known.files != files) {
                let text = format!(
                    "refused a checkpoint of step {step}: that of step {} is committed already, and is kept",
                    job.committed_step
                );
                self.own_line(name, text);
            }
            return;
        }
        let Some(attempt) = job.open_attempt() else { return };
        let (attempt, epoch) = (attempt.number, attempt.epoch);
        let backbone = self.rows.backbones.get(&job.backbone);
        let checkpoint = Checkpoint {
            job: name.clone(),
            step,
            files,
            backbone_fingerprint: backbone.map(|backbone| backbone.fingerprint.clone()).unwrap_or_default(),
            score,
            best,
            pinned,
            damaged: false,
            attempt,
            epoch,
            create_time: self.now,
            created_revision,
            revision: 0,
            tasks,
        };
        self.dethrone(&job, &checkpoint);
        if best {
            job.best = Some(Best { step, score });
        }
        job.committed_step = step;
        job.start_time = job.start_time.or(Some(self.now));
        job.suspicion = Suspicion::default();
        let backbone = job.backbone.clone();
        self.put(Resource::Checkpoint(Box::new(checkpoint)));
        self.put_job(job);
        let progress = self.progress.entry(name.clone()).or_default();
        progress.step = progress.step.max(step);
        self.forgive_losses(&backbone);
        self.retain(name);
    }

    /// Whether a checkpoint takes the place of the last one, of the same step: a job that was put aside before that step's evaluation
    /// has gone on from there, and is saved again with what the evaluation came to. Not where a prompt was made from other files.
    fn completes(&self, job: &Job, last: &Checkpoint, files: &[CheckpointFile]) -> bool {
        let is_there = |digest: &String| files.iter().any(|file| file.digest == *digest);
        let of_last = |made: &&PromptVersion| made.job == job.name && made.step == last.step;
        let mut made = self.rows.prompts.values().filter(of_last);
        last.step == job.committed_step
            && last.files != files
            && last.attempt < job.last_attempt()
            && made.all(|version| is_there(&version.digest))
    }

    /// The best checkpoints so far are that no more where the new one is better.
    fn dethrone(&mut self, job: &Job, new: &Checkpoint) {
        let is_passed = |old: &&Checkpoint| {
            let of_a_task = || old.tasks.iter().any(|task| task.best && new.is_best_of(&task.name));
            old.step != new.step && (old.best && new.best || of_a_task())
        };
        let passed: Vec<Checkpoint> = self.checkpoints_of(&job.name).filter(is_passed).cloned().collect();
        for mut old in passed {
            old.best &= !new.best;
            for task in &mut old.tasks {
                task.best &= !new.is_best_of(&task.name);
            }
            self.put(Resource::Checkpoint(Box::new(old)));
        }
    }

    /// A job left its backbone. What was wished of it meanwhile goes before what its engine made of that.
    fn left(&mut self, name: &JobName, (state, reason): (JobState, JobReason), message: &str, step: u64) {
        let Some(job) = self.rows.jobs.get(name) else { return };
        let wish = match job.wish {
            JobWish::Pause => Some(JobCause::PauseDone),
            JobWish::Cancel => Some(JobCause::CancelDone),
            JobWish::Unspecified | JobWish::Yield => None,
        };
        let (cause, reason) = match (state, reason) {
            (JobState::Succeeded, JobReason::PatienceExhausted) => (JobCause::PatienceExhausted, reason),
            (JobState::Succeeded, _) => (JobCause::StepsDone, JobReason::StepsDone),
            (JobState::Cancelled, _) => (JobCause::CancelDone, JobReason::Requested),
            (JobState::Paused, _) => (wish.unwrap_or(JobCause::PauseTakenBack), JobReason::Requested),
            (JobState::Queued, _) => (wish.unwrap_or(JobCause::Yielded), JobReason::Requested),
            (_, JobReason::CheckpointDamaged) => return self.go_back(name, wish, message),
            (_, reason) => {
                let reason = failure(reason);
                let again = job.may_retry(reason);
                let cause = if again { wish.unwrap_or(JobCause::Retried) } else { JobCause::Failed(reason) };
                (cause, reason)
            }
        };
        self.end_attempt(name, cause, reason, message, Some(step));
    }

    /// The files of the checkpoint that a job was to go on from cannot be had: it goes on from the one before, if there is one.
    fn go_back(&mut self, name: &JobName, wish: Option<JobCause>, message: &str) {
        let Some(mut job) = self.rows.jobs.get(name).cloned() else { return };
        let damaged = job.open_attempt().map_or(0, |attempt| attempt.start_step);
        if let Some(checkpoint) = self.rows.checkpoints.get(&(name.clone(), damaged)) {
            self.put(Resource::Checkpoint(Box::new(Checkpoint { damaged: true, ..checkpoint.clone() })));
        }
        let before =
            self.checkpoints_of(name).find(|checkpoint| !checkpoint.damaged).map(|before| before.step);
        let reason = JobReason::CheckpointDamaged;
        let (cause, message) = match before {
            Some(step) => {
                job.committed_step = step;
                self.put_job(job);
                (wish.unwrap_or(JobCause::WentBack), format!("it goes on from step {step}: {message}"))
            }
            None => (JobCause::Failed(reason), format!("it has no checkpoint before that: {message}")),
        };
        self.end_attempt(name, cause, reason, &message, None);
    }

    fn log_report(
        &mut self,
        worker: &WorkerName,
        backbone: &BackboneName,
        job: Option<&JobName>,
        mut lines: Vec<LogLine>,
    ) {
        let name = match job {
            None if self.rows.backbones.contains_key(backbone) => backbone.to_string(),
            Some(job) if self.rows.jobs.get(job).is_some_and(|job| job.backbone == *backbone) => {
                job.to_string()
            }
            // Of something that is deleted: nobody can read it any more.
            _ => return,
        };
        for line in &mut lines {
            line.worker = worker.to_string();
        }
        self.append_lines(name, lines);
    }

    /// A line of the coordinator's own in a job's log.
    fn own_line(&mut self, job: &JobName, text: String) {
        let time = crate::wire::timestamp(self.now);
        let line = LogLine { time: Some(time), level: "ERROR".to_owned(), text, ..LogLine::default() };
        self.append_lines(job.to_string(), vec![line]);
    }

    fn append_lines(&mut self, name: String, mut lines: Vec<LogLine>) {
        if lines.is_empty() {
            return;
        }
        let next = self.rows.logs.get(&name).copied().unwrap_or(0);
        for (offset, line) in (next..).zip(&mut lines) {
            line.offset = offset;
            if let Some((end, _)) = line.text.char_indices().nth(MAX_LINE) {
                line.text.truncate(end);
            }
        }
        self.change(Change::AppendLogs(name, lines));
    }
}

/// The reason as far as a job can fail for it. Whatever else a worker gives is a fault of the worker's.
fn failure(reason: JobReason) -> JobReason {
    match reason {
        JobReason::NonFinite
        | JobReason::BadData
        | JobReason::BadSpec
        | JobReason::OutOfMemory
        | JobReason::Internal => reason,
        _ => JobReason::Internal,
    }
}
