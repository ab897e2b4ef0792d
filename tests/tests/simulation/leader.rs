//! What an engine of rank 0 does with jobs: a step of each in every turn, checkpoints, and leaves. A prompt is a number that each
//! step makes another one of.

use std::collections::{BTreeMap, BTreeSet};

use incipit_proto::v1::{
    self, CheckpointFile, JobReason, JobState, JobWish, StepMetrics, job_report::Report, metric_point::Point,
};
use incipit_worker::frames::{Jobs, LocalJob, Log, Notice, Saved};

use crate::simulation::chance::{digest, first_prompt, loss, next_prompt};
use crate::simulation::client::FAILS_AT;
use crate::simulation::engine::{Pid, Stage};
use crate::simulation::world::{Event, Time, World};

/// How long what was measured is kept before it is reported.
const REPORT: Time = 200;

/// An attempt of a job.
type Attempt = (String, u32);

/// What a leader has.
#[derive(Default)]
pub(crate) struct Leader {
    jobs: BTreeMap<Attempt, Resident>,
    left: BTreeSet<Attempt>,
}

/// A job on the backbone, or on its way there.
#[derive(Clone)]
struct Resident {
    spec: v1::TrainingSpec,
    wish: JobWish,
    /// When its data are loaded.
    loaded_at: Time,
    started: bool,
    prompt: u64,
    step: u64,
    saved_step: u64,
    points: Vec<v1::MetricPoint>,
    reported: Time,
}

impl World {
    /// Takes the list of jobs that a backbone is to have.
    pub(crate) fn take_jobs(&mut self, pid: Pid, Jobs { epoch, jobs }: Jobs) {
        let Some(engine) = self.engines.get(&pid) else { return };
        if engine.epoch != epoch || engine.stage != Stage::Ready {
            return;
        }
        let key = |local: &LocalJob| local.assignment.as_ref().map(|job| (job.job.clone(), job.attempt));
        let wanted: BTreeSet<Attempt> = jobs.iter().filter_map(key).collect();
        if let Some(engine) = self.engines.get_mut(&pid) {
            engine.leader.jobs.retain(|job, _| wanted.contains(job));
        }
        for job in jobs {
            self.take_job(pid, job);
        }
    }

    fn take_job(&mut self, pid: Pid, local: LocalJob) {
        let Some(assignment) = local.assignment else { return };
        let (key, wish) = ((assignment.job.clone(), assignment.attempt), assignment.wish());
        let spec = assignment.spec.unwrap_or_default();
        let begin = match local.checkpoint.as_str() {
            "" => Some((spec.seed(), 0, first_prompt(spec.seed()))),
            digest => self.made.get(digest).copied(),
        };
        let Some((_, step, prompt)) = begin.filter(|(seed, ..)| *seed == spec.seed()) else {
            return self.broken("S3 (a job goes on from its own checkpoint)", || {
                format!("{key:?} {}", local.checkpoint)
            });
        };
        let loaded_at = self.now + self.chance.between(10, 300);
        let Some(engine) = self.engines.get_mut(&pid) else { return };
        if engine.leader.left.contains(&key) {
            return;
        }
        let new = Resident {
            spec,
            wish,
            loaded_at,
            started: false,
            prompt,
            step,
            saved_step: step,
            points: Vec::new(),
            reported: 0,
        };
        engine.leader.jobs.entry(key).or_insert(new).wish = wish;
    }

    /// Every job gets what it wants next.
    pub(crate) fn engine_turns(&mut self, pid: Pid, group: u64) {
        let Some(engine) = self.in_group(pid, group).filter(|engine| engine.stage == Stage::Ready) else {
            return;
        };
        let jobs: Vec<Attempt> = engine.leader.jobs.keys().cloned().collect();
        self.soon(5, 50, Event::EngineTurns(pid, group));
        let epoch = engine_epoch(self, pid);
        let works = |other: &Pid| {
            let engine = self.alive(*other).filter(|engine| !engine.hung && engine.stage == Stage::Ready);
            engine.is_some_and(|engine| engine.epoch == epoch)
        };
        if !self.members(pid).iter().all(works) {
            return;
        }
        self.advance(pid);
        for job in jobs {
            self.turn(pid, &job);
        }
    }

    fn turn(&mut self, pid: Pid, job: &Attempt) {
        let now = self.now;
        let Some(resident) = self.resident(pid, job) else { return };
        let (wish, step, steps) = (resident.wish, resident.step, resident.spec.steps());
        let every = resident.spec.checkpoint_every().max(1);
        match wish {
            JobWish::Cancel => return self.leave(pid, job, JobState::Cancelled, JobReason::Requested),
            JobWish::Pause => {
                self.save(pid, job);
                return self.leave(pid, job, JobState::Paused, JobReason::Requested);
            }
            JobWish::Yield => {
                self.save(pid, job);
                return self.leave(pid, job, JobState::Queued, JobReason::Requested);
            }
            JobWish::Unspecified => {}
        }
        if resident.loaded_at > now {
            return;
        }
        if !resident.started {
            return self.started(pid, job);
        }
        if step == steps {
            self.save(pid, job);
            return self.leave(pid, job, JobState::Succeeded, JobReason::StepsDone);
        }
        if resident.spec.warmup_steps.is_some_and(|at| step == at && at == FAILS_AT) {
            return self.leave(pid, job, JobState::Failed, JobReason::NonFinite);
        }
        if step.is_multiple_of(every) {
            self.save(pid, job);
        }
        self.step(pid, job);
        self.report(pid, job, false);
    }

    fn resident(&mut self, pid: Pid, job: &Attempt) -> Option<&mut Resident> {
        self.engines.get_mut(&pid)?.leader.jobs.get_mut(job)
    }

    fn started(&mut self, pid: Pid, job: &Attempt) {
        let Some(resident) = self.resident(pid, job) else { return };
        resident.started = true;
        let step = resident.step;
        self.tell_of(
            pid,
            job,
            Report::Started(v1::JobStarted { step, warnings: vec!["short lines".to_owned()] }),
        );
    }

    fn step(&mut self, pid: Pid, job: &Attempt) {
        let Some(resident) = self.resident(pid, job) else { return };
        resident.prompt = next_prompt(resident.prompt, resident.spec.seed(), resident.step);
        resident.step += 1;
        let point = StepMetrics { loss: loss(resident.prompt), num_tokens: 10, ..StepMetrics::default() };
        let (step, point) = (resident.step, Some(Point::Training(point)));
        resident.points.push(v1::MetricPoint { step, point, ..v1::MetricPoint::default() });
        self.told.steps += 1;
    }

    fn report(&mut self, pid: Pid, job: &Attempt, at_once: bool) {
        let now = self.now;
        let Some(resident) = self.resident(pid, job) else { return };
        if resident.points.is_empty() || !(at_once || now >= resident.reported + REPORT) {
            return;
        }
        resident.reported = now;
        let points = std::mem::take(&mut resident.points);
        self.tell_of(pid, job, Report::Measured(v1::JobMeasured { points }));
    }

    fn save(&mut self, pid: Pid, job: &Attempt) {
        self.report(pid, job, true);
        let report = self.about(pid, job);
        let Some(resident) = self.resident(pid, job) else { return };
        if resident.saved_step == resident.step {
            return;
        }
        resident.saved_step = resident.step;
        let (seed, step, prompt) = (resident.spec.seed(), resident.step, resident.prompt);
        let digest = digest(prompt);
        self.made.insert(digest.clone(), (seed, step, prompt));
        let files = vec![CheckpointFile { name: "prompt.safetensors".to_owned(), digest, size: 8 }];
        let saved = v1::CheckpointSaved { step, files, ..v1::CheckpointSaved::default() };
        let report = Some(v1::JobReport { report: Some(Report::Saved(saved)), ..report });
        let dir = format!("outbox/{}-{}-{step}", job.0, job.1);
        self.notice(pid, Notice::Saved(Saved { report, dir }));
        let line = v1::LogLine { text: format!("saved step {step}"), ..v1::LogLine::default() };
        self.notice(pid, Notice::Log(Log { job: job.0.clone(), line: Some(line) }));
    }

    fn leave(&mut self, pid: Pid, job: &Attempt, state: JobState, reason: JobReason) {
        self.report(pid, job, true);
        let Some(resident) = self.resident(pid, job) else { return };
        let (step, state, reason) = (resident.step, state.into(), reason.into());
        self.tell_of(pid, job, Report::Left(v1::JobLeft { state, reason, message: String::new(), step }));
        if let Some(engine) = self.engines.get_mut(&pid) {
            engine.leader.jobs.remove(job);
            engine.leader.left.insert(job.clone());
        }
    }

    fn tell_of(&mut self, pid: Pid, job: &Attempt, report: Report) {
        let report = v1::JobReport { report: Some(report), ..self.about(pid, job) };
        self.notice(pid, Notice::Job(report));
    }

    fn about(&self, pid: Pid, (job, attempt): &Attempt) -> v1::JobReport {
        let engine = &self.engines[&pid];
        let (backbone, epoch) = (engine.key.backbone.clone(), engine.epoch);
        v1::JobReport { backbone, epoch, job: job.clone(), attempt: *attempt, report: None }
    }
}

fn engine_epoch(world: &World, pid: Pid) -> u64 {
    world.engines.get(&pid).map_or(0, |engine| engine.epoch)
}
