//! The leader, rank 0: takes the jobs that the agent hands on, decides each turn, and reports what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use incipit_collective::Ranks;
use incipit_proto::v1::{self, JobReason, JobState, JobWish, job_report::Report, metric_point::Point};
use incipit_tune::backbone::Backbone;
use incipit_tune::tenant::{Due, End};
use tracing::{Span, field};

use crate::engine::failure::{Failure, Result};
use crate::engine::load::{Loaded, Loader};
use crate::engine::plan::{Admission, Plan, SentTask};
use crate::engine::points;
use crate::engine::resident::{Begin, Evaluated};
use crate::engine::residents::{Outcome, Residents};
use crate::engine::saver::Saver;
use crate::engine::share::{FairShare, Key};
use crate::engine::voice::Voice;
use crate::engine::{Mail, Next};
use crate::frames::{Jobs, Join, LocalJob, Notice, Order};

/// How long the leader waits for something to do before it tells the other ranks that there is nothing: well within the deadline of
/// their wait, and often enough to find a rank that is gone.
const IDLE: Duration = Duration::from_secs(1);
/// How long what was measured is kept before it is reported.
const REPORT: Duration = Duration::from_millis(200);

/// An attempt of a job: its name and number.
type Attempt = (String, u32);

/// The leader of one group of ranks.
pub(crate) struct Leader<'a> {
    pub(crate) backbone: &'a Backbone,
    pub(crate) ranks: &'a Ranks,
    pub(crate) voice: &'a Voice,
    pub(crate) saver: Saver,
    pub(crate) loader: Loader,
    /// `backbones/{backbone}`.
    pub(crate) name: String,
    pub(crate) epoch: u64,
    /// How many turns it has taken, those among them with nothing to do.
    pub(crate) turns: Arc<AtomicU64>,
    pub(crate) state: State,
}

/// What the leader knows of its jobs.
#[derive(Default)]
pub(crate) struct State {
    residents: Residents,
    share: FairShare,
    /// Everything that is loading, waiting or resident.
    jobs: BTreeMap<Attempt, Entry>,
    /// Attempts that have left: they never come again.
    left: BTreeSet<Attempt>,
    dismissals: Vec<Key>,
    next_key: Key,
}

struct Entry {
    key: Key,
    priority: u32,
    wish: JobWish,
    spec: v1::TrainingSpec,
    stage: Stage,
    points: Vec<v1::MetricPoint>,
    reported: Option<Instant>,
    /// Of the checkpoint that it goes on from.
    start_step: u64,
    /// The step of the last evaluation, and what it measured.
    evaluated: Option<(u64, v1::EvalMetrics)>,
    /// Of its stay, which ends when it is forgotten.
    span: Span,
}

enum Stage {
    Loading,
    /// Its data are there.
    Waiting(Vec<Begin>),
    /// A plan has named it.
    Resident,
}

impl Leader<'_> {
    /// Leads until the agent wants another group.
    ///
    /// # Errors
    /// If the ranks cannot go on together.
    pub(crate) fn lead(mut self, inbox: &Receiver<Mail>) -> Result<Next> {
        loop {
            self.turns.fetch_add(1, Ordering::Relaxed);
            if let Some(next) = self.read(inbox) {
                return Ok(next);
            }
            self.settle();
            let (plan, begins) = self.plan();
            if plan == Plan::default() {
                match self.wait(inbox) {
                    Some(Ok(mail)) => {
                        if let Some(next) = self.take(mail) {
                            return Ok(next);
                        }
                        continue;
                    }
                    Some(Err(next)) => return Ok(next),
                    None => {}
                }
            }
            self.turn(&plan, begins)?;
        }
    }

    /// Everything that has come in. Something if the group is to end.
    fn read(&mut self, inbox: &Receiver<Mail>) -> Option<Next> {
        loop {
            match inbox.try_recv() {
                Ok(mail) => {
                    if let Some(next) = self.take(mail) {
                        return Some(next);
                    }
                }
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(Next::End),
            }
        }
    }

    fn wait(&mut self, inbox: &Receiver<Mail>) -> Option<std::result::Result<Mail, Next>> {
        match inbox.recv_timeout(if self.has_points() { REPORT } else { IDLE }) {
            Ok(mail) => Some(Ok(mail)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(Next::End)),
        }
    }

    fn has_points(&self) -> bool {
        self.state.jobs.values().any(|entry| !entry.points.is_empty())
    }

    fn take(&mut self, mail: Mail) -> Option<Next> {
        match mail {
            Mail::Order(Order::Join(join)) => return Some(Next::Join(Box::<Join>::new(join))),
            Mail::Order(Order::Jobs(jobs)) => self.assign(jobs),
            Mail::Order(Order::Rendezvous(_)) => {}
            Mail::Loaded(loaded) => self.loaded(*loaded),
        }
        None
    }

    /// Takes the list of jobs that the backbone is to have.
    fn assign(&mut self, Jobs { epoch, jobs }: Jobs) {
        if epoch != self.epoch {
            return;
        }
        let wanted: BTreeSet<Attempt> =
            jobs.iter().filter_map(|job| attempt(job.assignment.as_ref()?)).collect();
        let gone: Vec<Attempt> =
            self.state.jobs.keys().filter(|job| !wanted.contains(*job)).cloned().collect();
        for job in gone {
            self.forget(&job);
        }
        for job in jobs {
            self.assign_one(job);
        }
    }

    fn assign_one(&mut self, local: LocalJob) {
        let Some(assignment) = &local.assignment else { return };
        let Some(job) = attempt(assignment).filter(|job| !self.state.left.contains(job)) else { return };
        if let Some(entry) = self.state.jobs.get_mut(&job) {
            entry.wish = assignment.wish();
            entry.priority = assignment.priority;
            self.state.share.set_weight(entry.key, assignment.priority);
            return;
        }
        let key = self.state.next_key;
        self.state.next_key += 1;
        let (backbone, epoch) = (&*self.name, self.epoch);
        let span = tracing::info_span!(
            "attempt",
            job = job.0,
            attempt = job.1,
            backbone,
            epoch,
            state = field::Empty,
            step = field::Empty
        );
        let entry = Entry {
            key,
            priority: assignment.priority,
            wish: assignment.wish(),
            spec: assignment.spec.clone().unwrap_or_default(),
            stage: Stage::Loading,
            points: Vec::new(),
            reported: None,
            start_step: assignment.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step),
            evaluated: None,
            span,
        };
        self.state.jobs.insert(job, entry);
        self.loader.load(local);
    }

    fn loaded(&mut self, Loaded { job, attempt, begin }: Loaded) {
        let attempt = (job, attempt);
        let Some(entry) = self.state.jobs.get_mut(&attempt) else { return };
        match begin {
            Ok(begin) => entry.stage = Stage::Waiting(begin),
            Err(failure) => self.fail(&attempt, &failure),
        }
    }

    /// What needs no backbone: checkpoints, ends, and what was asked for.
    fn settle(&mut self) {
        let jobs: Vec<Attempt> = self.state.jobs.keys().cloned().collect();
        for job in &jobs {
            let wish = self.state.jobs.get(job).map_or(JobWish::Unspecified, |entry| entry.wish);
            match wish {
                JobWish::Unspecified => self.settle_one(job),
                JobWish::Pause => {
                    self.save(job);
                    self.leave(job, (JobState::Paused, JobReason::Requested), "paused as asked");
                }
                JobWish::Yield => {
                    self.save(job);
                    let why = "saved, for its backbone is to move";
                    self.leave(job, (JobState::Queued, JobReason::Requested), why);
                }
                JobWish::Cancel => {
                    self.leave(job, (JobState::Cancelled, JobReason::Requested), "cancelled as asked");
                }
            }
        }
        for job in &jobs {
            self.report(job, false);
        }
    }

    fn settle_one(&mut self, job: &Attempt) {
        loop {
            match self.due(job) {
                Some(Due::Checkpoint) => self.save(job),
                Some(Due::End(End::Patience)) => {
                    let why = "no evaluation was better for as long as its patience allows";
                    return self.leave(job, (JobState::Succeeded, JobReason::PatienceExhausted), why);
                }
                Some(Due::End(End::Steps | End::Requested)) => {
                    return self.leave(
                        job,
                        (JobState::Succeeded, JobReason::StepsDone),
                        "all its steps are made",
                    );
                }
                Some(Due::Step | Due::Evaluate) | None => return,
            }
        }
    }

    fn due(&mut self, job: &Attempt) -> Option<Due> {
        self.state.residents.due(self.state.jobs.get(job)?.key)
    }

    /// Saves a checkpoint of a job that is on the backbone, unless the last one holds all there is.
    fn save(&mut self, job: &Attempt) {
        self.report(job, true);
        let report = self.about(job);
        let Some(entry) = self.state.jobs.get(job) else { return };
        let Some(resident) = self.state.residents.get_mut(entry.key) else { return };
        let step = resident.num_steps();
        if !resident.is_saved() && step > 0 {
            let metrics = entry.evaluated.as_ref().filter(|(at, _)| *at == step).map(|(_, metrics)| metrics);
            let saved = points::of_checkpoint(step, &resident.best(), metrics);
            self.saver.make_room(|| _ = self.turns.fetch_add(1, Ordering::Relaxed));
            self.saver.save(resident.checkpoint(), saved, report);
        }
    }

    /// Says that a job leaves, and lets it go with the next plan.
    fn leave(&mut self, job: &Attempt, (state, reason): (JobState, JobReason), message: &str) {
        self.report(job, true);
        let Some(entry) = self.state.jobs.get(job) else { return };
        let resident = self.state.residents.get_mut(entry.key);
        let step = resident.map_or(entry.start_step, |resident| resident.num_steps());
        entry.span.record("state", state.as_str_name()).record("step", step);
        let (state, reason, message) = (state.into(), reason.into(), message.to_owned());
        self.saver.leave(self.about(job), v1::JobLeft { state, reason, message, step });
        self.forget(job);
        self.state.left.insert(job.clone());
    }

    fn fail(&mut self, job: &Attempt, failure: &Failure) {
        self.leave(job, (JobState::Failed, failure.reason), &failure.message);
    }

    /// Lets a job go without a word.
    fn forget(&mut self, job: &Attempt) {
        let Some(entry) = self.state.jobs.remove(job) else { return };
        self.state.share.remove(entry.key);
        if matches!(entry.stage, Stage::Resident) {
            self.state.dismissals.push(entry.key);
        }
    }

    /// The next turn, and what the jobs that come with it begin with.
    fn plan(&mut self) -> (Plan, BTreeMap<Key, Vec<Begin>>) {
        let State { residents, share, jobs, dismissals, .. } = &mut self.state;
        let mut plan = Plan { dismissals: std::mem::take(dismissals), ..Plan::default() };
        let (mut begins, mut failed) = (BTreeMap::new(), Vec::new());
        for (job, entry) in jobs {
            if let Stage::Waiting(_) = &entry.stage
                && let Stage::Waiting(begin) = std::mem::replace(&mut entry.stage, Stage::Resident)
            {
                match admission(entry, &begin, self.ranks.mesh().world() > 1) {
                    Ok(admission) => plan.admissions.push(admission),
                    Err(failure) => {
                        failed.push((job.clone(), failure));
                        continue;
                    }
                }
                begins.insert(entry.key, begin);
                share.add(entry.key, entry.priority);
            }
        }
        let budget = self.backbone.engine.microbatch_tokens() as u64;
        let wants = residents.wants(budget);
        let turn = share.turn(budget, |key| wants.get(&key).copied());
        match turn[..] {
            [key] if wants.get(&key).is_some_and(|want| !want.shared) => match residents.due(key) {
                Some(Due::Evaluate) => plan.evaluation = Some(key),
                _ => plan.alone = Some(key),
            },
            _ => plan.steps = turn,
        }
        for (job, failure) in failed {
            self.fail(&job, &failure);
        }
        (plan, begins)
    }

    fn turn(&mut self, plan: &Plan, mut begins: BTreeMap<Key, Vec<Begin>>) -> Result<()> {
        let start = Instant::now();
        plan.tell(self.ranks)?;
        let begin = |admission: &Admission| {
            self.turns.fetch_add(1, Ordering::Relaxed);
            begins.remove(&admission.key).ok_or_else(|| unreachable!("a job comes with what it begins with"))
        };
        let outcome = self.state.residents.carry_out(plan, self.backbone, begin)?;
        self.voice.advance();
        self.told(outcome, start.elapsed());
        Ok(())
    }

    fn told(&mut self, outcome: Outcome, took: Duration) {
        for (key, admitted) in outcome.admitted {
            let Some(job) = self.by_key(key) else { continue };
            match admitted {
                Ok(()) => self.started(&job, key),
                Err(failure) => self.fail(&job, &failure),
            }
        }
        for (key, step) in outcome.steps {
            let Some(job) = self.by_key(key) else { continue };
            match step {
                Ok(updates) => self.measured(&job, points::of_step(&updates, took)),
                Err(failure) => self.fail(&job, &failure),
            }
        }
        if let Some((key, evaluated)) = outcome.evaluated
            && let Some(job) = self.by_key(key)
        {
            match evaluated {
                Ok(evaluated) => self.evaluated(&job, key, &evaluated),
                Err(failure) => self.fail(&job, &failure),
            }
        }
    }

    fn evaluated(&mut self, job: &Attempt, key: Key, evaluated: &Evaluated) {
        let step = self.state.residents.get_mut(key).map_or(0, |job| job.num_steps());
        for (task, (evaluation, best)) in evaluated {
            let of_task = if task.is_empty() { String::new() } else { format!(" of {task}") };
            let best_yet = if *best { ", the best so far" } else { "" };
            let text = format!("step {step}: score{of_task} {:.4}{best_yet}", evaluation.score());
            self.voice.log(&job.0, "INFO", text);
        }
        let metrics = points::of_evaluation(evaluated);
        if let Some(entry) = self.state.jobs.get_mut(job) {
            entry.evaluated = Some((step, metrics.clone()));
        }
        self.measured(job, points::point(step, Point::Evaluation(metrics)));
    }

    fn by_key(&self, key: Key) -> Option<Attempt> {
        self.state.jobs.iter().find(|(_, entry)| entry.key == key).map(|(job, _)| job.clone())
    }

    fn started(&mut self, job: &Attempt, key: Key) {
        let Some(resident) = self.state.residents.get_mut(key) else { return };
        let (step, warnings) = (resident.num_steps(), resident.warnings());
        let examples = resident.num_examples();
        self.voice.log(&job.0, "INFO", format!("started at step {step}, with {examples} training examples"));
        let report = Some(Report::Started(v1::JobStarted { step, warnings }));
        self.saver.say(Notice::Job(v1::JobReport { report, ..self.about(job) }));
    }

    fn measured(&mut self, job: &Attempt, point: v1::MetricPoint) {
        if let Some(entry) = self.state.jobs.get_mut(job) {
            entry.points.push(point);
        }
        // Whoever waits for the first step hears of it at once.
        self.report(job, false);
    }

    /// Reports what a job has measured, if it is time.
    fn report(&mut self, job: &Attempt, at_once: bool) {
        let Some(entry) = self.state.jobs.get_mut(job) else { return };
        let due = at_once || entry.reported.is_none_or(|reported| reported.elapsed() >= REPORT);
        if entry.points.is_empty() || !due {
            return;
        }
        entry.reported = Some(Instant::now());
        let points = std::mem::take(&mut entry.points);
        let measured = Some(Report::Measured(v1::JobMeasured { points }));
        self.saver.say(Notice::Job(v1::JobReport { report: measured, ..self.about(job) }));
    }

    /// A report of a job, without what is reported.
    fn about(&self, (job, attempt): &Attempt) -> v1::JobReport {
        v1::JobReport {
            backbone: self.name.clone(),
            epoch: self.epoch,
            job: job.clone(),
            attempt: *attempt,
            report: None,
        }
    }
}

fn attempt(assignment: &v1::JobAssignment) -> Option<Attempt> {
    (!assignment.job.is_empty()).then(|| (assignment.job.clone(), assignment.attempt))
}

/// What the other ranks, where there are some, need of a job that comes.
///
/// # Errors
/// If its checkpoint cannot be sent.
fn admission(entry: &Entry, begin: &[Begin], to_others: bool) -> Result<Admission> {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let task = |Begin { spec, task, checkpoint, .. }: &Begin| {
        let eval = spec.eval.as_deref().map(path).unwrap_or_default();
        let mut sent = SentTask { train: path(&spec.train), eval, ..SentTask::default() };
        if to_others {
            sent.task = task.to_bytes();
            sent.checkpoint =
                checkpoint.as_ref().map_or(Ok(Vec::new()), |checkpoint| checkpoint.to_bytes())?;
        }
        Ok(sent)
    };
    let tasks = begin.iter().map(task).collect::<Result<_>>()?;
    Ok(Admission { key: entry.key, spec: Some(entry.spec.clone()), tasks })
}
