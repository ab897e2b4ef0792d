//! Reports on their way to the coordinator: each is said until it is acknowledged, in order.
//!
//! A report is numbered once it can be said. A checkpoint's waits until its files are stored, and only what must come after it waits with it:
//! the job's next checkpoints, and its leave. All else (other jobs, metrics, lines) goes before; so does the loss of an engine, unless all goes
//! well with the files, which it then waits for, for a moment.
//!
//! The files of a job's checkpoints are stored one after the other. So those behind the first can still be dropped: of them stay the few that
//! the coordinator would keep, however long its store is away.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use incipit_proto::v1::{self, AttachRequest, attach_request::Message, job_report::Report};

use crate::agent::core::{FileKey, Time};

/// More reports, points and lines than this, and engines are not listened to until the coordinator has caught up: they fill this machine's memory.
const FULL: usize = 1_000_000;
/// Points or lines of one report, at most.
const MERGED: usize = 200;
/// How far back a report is looked for that new points or lines can go with.
const NEAR: usize = 1000;

/// How long the loss of an engine waits for checkpoints of its backbone whose files are being stored just then, in milliseconds: behind the
/// loss, which begins another epoch, they would count for nothing.
const PATIENCE: Time = 1_000;
/// Checkpoints of a job that wait, at most, besides the best ones and the one whose files are being stored. They fill this machine's disk.
const BEHIND: usize = 16;

/// The reports.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// Those with a number, without gaps, that are not acknowledged.
    reports: VecDeque<Entry>,
    /// The weight of those.
    weight: usize,
    /// Those that wait for files, in the order in which they were made.
    waiting: VecDeque<Waiting>,
    /// Sequence of the last report.
    last: u64,
    /// Sequence of the last report that this connection has carried.
    sent: u64,
    /// The last ticket.
    tickets: u64,
    /// Losses of engines, and how long each may wait.
    losses: VecDeque<(v1::EngineReport, Time)>,
    /// Attempts of jobs whose last checkpoint could not be stored, and why.
    unsaved: BTreeMap<FileKey, String>,
    /// Attempts of jobs whose checkpoint could not be stored, and is tried again.
    failing: BTreeSet<FileKey>,
    /// Attempts of jobs that are to be cancelled.
    cancelled: BTreeSet<FileKey>,
}

#[derive(Debug)]
struct Entry {
    sequence: u64,
    message: Message,
    /// A directory that is needed until it is acknowledged.
    dir: Option<String>,
}

/// A checkpoint, or a leave behind one.
#[derive(Debug)]
struct Waiting {
    job: FileKey,
    message: Message,
    dir: Option<String>,
    /// Of a checkpoint, as long as its files are not stored.
    ticket: Option<u64>,
    /// Whether its files are on their way.
    begun: bool,
}

/// A checkpoint whose files are to be stored.
pub(crate) struct ToStore {
    pub(crate) ticket: u64,
    pub(crate) report: v1::JobReport,
    /// Where the files are.
    pub(crate) dir: String,
}

impl Outbox {
    /// A report. Points and lines go with those before them of the same thing, where these have not been sent.
    pub(crate) fn report(&mut self, mut message: Message) {
        let Message::Job(report) = &mut message else { return self.merge(message) };
        let job = key(report);
        let Some(Report::Left(left)) = &mut report.report else { return self.merge(message) };
        if let Some(why) = self.unsaved.remove(&job) {
            without_checkpoint(left, &why);
        }
        self.waiting.push_back(Waiting { job, message, dir: None, ticket: None, begun: false });
        self.advance();
    }

    /// The report of a checkpoint, whose files in `dir` have to be stored first. Returns the ticket under which that is told.
    pub(crate) fn hold(&mut self, job: FileKey, message: Message, dir: String) -> u64 {
        self.unsaved.remove(&job);
        self.tickets += 1;
        let ticket = Some(self.tickets);
        self.waiting.push_back(Waiting { job, message, dir: Some(dir), ticket, begun: false });
        self.tickets
    }

    /// The checkpoints whose files are to be stored from now on: of each job the first that waits.
    pub(crate) fn begin(&mut self) -> Vec<ToStore> {
        let (mut jobs, mut begun) = (BTreeSet::new(), Vec::new());
        for entry in &mut self.waiting {
            let (Some(ticket), Some(dir)) = (entry.ticket, &entry.dir) else { continue };
            if jobs.insert(&entry.job)
                && !entry.begun
                && let Message::Job(report) = &entry.message
            {
                entry.begun = true;
                begun.push(ToStore { ticket, report: report.clone(), dir: dir.clone() });
            }
        }
        begun
    }

    /// Drops those checkpoints of a job that wait behind another's files, and that the coordinator, which keeps the `keep` newest and the best,
    /// would not keep either once all were stored (and more, where `keep` is beyond what this machine's disk is to carry). The job's last one
    /// stays. Returns the steps of the others, and where their files are.
    pub(crate) fn drop_old(&mut self, job: &FileKey, keep: usize) -> Vec<(u64, String)> {
        let (mut newer, mut bests, mut dropped) = (0, BTreeSet::new(), Vec::new());
        let mut stay = VecDeque::new();
        for entry in std::mem::take(&mut self.waiting).into_iter().rev() {
            if entry.job == *job
                && let Some(dir) = &entry.dir
                && let Message::Job(v1::JobReport { report: Some(Report::Saved(saved)), .. }) = &entry.message
            {
                let is_best = best_of(saved).filter(|task| bests.insert((*task).to_owned())).count() > 0;
                if newer >= keep.clamp(1, BEHIND) && !is_best && !entry.begun {
                    dropped.push((saved.step, dir.clone()));
                    continue;
                }
                newer += 1;
            }
            stay.push_front(entry);
        }
        self.waiting = stay;
        dropped.reverse();
        dropped
    }

    /// The loss of an engine.
    pub(crate) fn lose(&mut self, report: v1::EngineReport, now: Time) {
        self.losses.push_back((report, now + PATIENCE));
        self.settle(now);
    }

    /// Reports the losses that wait for nothing any more.
    pub(crate) fn settle(&mut self, now: Time) {
        for (report, until) in std::mem::take(&mut self.losses) {
            if now < until && self.is_storing(&report.backbone) {
                self.losses.push_back((report, until));
            } else {
                self.number(Message::Engine(report), None);
            }
        }
    }

    /// Whether a checkpoint of the backbone is being stored, and nothing is wrong with that.
    fn is_storing(&self, backbone: &str) -> bool {
        let storing = |entry: &Waiting| {
            let of = matches!(&entry.message, Message::Job(report) if report.backbone == backbone);
            of && entry.ticket.is_some() && !self.failing.contains(&entry.job)
        };
        self.waiting.iter().any(storing)
    }

    /// The report of the first checkpoint that is not acknowledged, and where its files are.
    pub(crate) fn first_checkpoint(&self) -> Option<(v1::JobReport, String)> {
        self.reports.iter().find_map(|entry| match (&entry.message, &entry.dir) {
            (Message::Job(report), Some(dir)) => Some((report.clone(), dir.clone())),
            _ => None,
        })
    }

    /// A line.
    pub(crate) fn log(&mut self, backbone: &str, job: String, line: v1::LogLine) {
        self.report(Message::Logs(v1::LogReport { backbone: backbone.to_owned(), job, lines: vec![line] }));
    }

    /// Adds a report to the last one of the same thing, if that has not been sent and has room; or numbers it.
    fn merge(&mut self, mut message: Message) {
        let sent = self.sent;
        let mut unsent = self.reports.iter_mut().rev().take(NEAR).take_while(|entry| entry.sequence > sent);
        let last = unsent.find(|entry| is_of_one(&entry.message, &message));
        match last.and_then(|last| take_in(&mut last.message, &mut message)) {
            Some(added) => self.weight += added,
            None => self.number(message, None),
        }
    }

    fn number(&mut self, message: Message, dir: Option<String>) {
        self.last += 1;
        self.weight += weight(&message);
        self.reports.push_back(Entry { sequence: self.last, message, dir });
    }

    /// Numbers what waits for nothing any more.
    fn advance(&mut self) {
        // Jobs that have a checkpoint that is not stored.
        let mut held = BTreeSet::new();
        for mut entry in std::mem::take(&mut self.waiting) {
            let is_held = held.contains(&entry.job);
            // Nobody needs the checkpoint of a job that is to be cancelled, so that its leave does not wait for one that cannot be stored.
            let is_vain = self.failing.contains(&entry.job) && self.cancelled.contains(&entry.job);
            let gives_up = is_held && is_vain && entry.give_up();
            if entry.ticket.is_none() && (!is_held || gives_up) {
                self.number(entry.message, entry.dir);
                continue;
            }
            held.insert(entry.job.clone());
            self.waiting.push_back(entry);
        }
    }

    fn find(&mut self, ticket: u64) -> Option<usize> {
        self.waiting.iter().position(|entry| entry.ticket == Some(ticket))
    }

    /// The files of a report are stored.
    pub(crate) fn release(&mut self, ticket: u64) {
        let Some(place) = self.find(ticket) else { return };
        self.waiting[place].ticket = None;
        self.failing.remove(&self.waiting[place].job);
        self.advance();
    }

    /// The files of a job's checkpoint could not be stored yet, and are tried again.
    pub(crate) fn fails(&mut self, job: &FileKey) {
        if self.waiting.iter().any(|entry| entry.job == *job && entry.begun && entry.ticket.is_some()) {
            self.failing.insert(job.clone());
        }
        self.advance();
    }

    /// These attempts of jobs, and no others, are to be cancelled.
    pub(crate) fn cancel(&mut self, jobs: BTreeSet<FileKey>) {
        self.cancelled = jobs;
        self.advance();
    }

    /// The files of a report cannot be stored: the log is told in its place. If the job leaves without another checkpoint, it has not
    /// succeeded: nobody would have its prompt. Its leave waits behind the report, and so is not said yet.
    pub(crate) fn replace(&mut self, ticket: u64, why: &str) {
        let Some(place) = self.find(ticket) else { return };
        let entry = &mut self.waiting[place];
        entry.ticket = None;
        let job = entry.job.clone();
        self.failing.remove(&job);
        if let Message::Job(report) = &entry.message
            && let Some(Report::Saved(saved)) = &report.report
        {
            let text =
                format!("the checkpoint of step {} was not stored, and training goes on: {why}", saved.step);
            let line = v1::LogLine { level: "ERROR".to_owned(), text, ..v1::LogLine::default() };
            let (backbone, name) = (report.backbone.clone(), report.job.clone());
            entry.message = Message::Logs(v1::LogReport { backbone, job: name, lines: vec![line] });
        }
        let next = self.waiting.iter_mut().skip(place + 1).find(|entry| entry.job == job);
        match next.map(|next| &mut next.message) {
            Some(Message::Job(v1::JobReport { report: Some(Report::Left(left)), .. })) => {
                without_checkpoint(left, why);
            }
            Some(_) => {}
            None => drop(self.unsaved.insert(job, why.to_owned())),
        }
        self.advance();
    }

    /// All up to `sequence` is stored at the coordinator. Returns directories that are not needed any more.
    pub(crate) fn acknowledge(&mut self, sequence: u64) -> Vec<String> {
        let mut dirs = Vec::new();
        while let Some(entry) = self.reports.pop_front_if(|entry| entry.sequence <= sequence) {
            self.weight -= weight(&entry.message);
            dirs.extend(entry.dir);
        }
        dirs
    }

    /// The connection is new: whatever is not acknowledged is said again.
    pub(crate) fn say_again(&mut self) {
        self.sent = self.reports.front().map_or(self.last, |entry| entry.sequence - 1);
    }

    /// What can be said now, in order.
    pub(crate) fn take_unsent(&mut self) -> VecDeque<AttachRequest> {
        // Sequences have no gaps: the place follows from the first.
        let first = self.reports.front().map_or(self.last + 1, |entry| entry.sequence);
        let unsent = self.reports.iter().skip((self.sent + 1).saturating_sub(first) as usize);
        self.sent = self.last;
        unsent
            .map(|entry| AttachRequest { sequence: entry.sequence, message: Some(entry.message.clone()) })
            .collect()
    }

    /// Whether engines should wait.
    pub(crate) fn is_full(&self) -> bool {
        self.weight + self.waiting.len() >= FULL
    }

    /// Whether all is acknowledged.
    pub(crate) fn is_empty(&self) -> bool {
        self.reports.is_empty() && self.waiting.is_empty() && self.losses.is_empty()
    }
}

impl Waiting {
    /// Makes the leave of a job that was to be cancelled one that is; whether it is a leave.
    fn give_up(&mut self) -> bool {
        let Message::Job(v1::JobReport { report: Some(Report::Left(left)), .. }) = &mut self.message else {
            return false;
        };
        if left.state() != v1::JobState::Cancelled {
            left.message = "cancelled as asked, before its last checkpoint could be stored".to_owned();
            left.set_state(v1::JobState::Cancelled);
            left.set_reason(v1::JobReason::Requested);
        }
        true
    }
}

/// The tasks whose best a checkpoint is, by their names; the only task of a job has none.
fn best_of(saved: &v1::CheckpointSaved) -> impl Iterator<Item = &str> {
    let tasks = saved.tasks.iter().filter(|task| task.best).map(|task| &*task.name);
    saved.best.then_some("").into_iter().chain(tasks)
}

/// How much a report is: itself, and the points or lines that it has.
fn weight(message: &Message) -> usize {
    1 + match message {
        Message::Job(v1::JobReport { report: Some(Report::Measured(measured)), .. }) => measured.points.len(),
        Message::Logs(logs) => logs.lines.len(),
        _ => 0,
    }
}

/// Whether both are lines of one log, or points of one stay of a job.
fn is_of_one(a: &Message, b: &Message) -> bool {
    match (a, b) {
        (Message::Logs(a), Message::Logs(b)) => (&a.backbone, &a.job) == (&b.backbone, &b.job),
        (Message::Job(a), Message::Job(b)) => {
            let measured = |report: &v1::JobReport| matches!(report.report, Some(Report::Measured(_)));
            let is_of_one_stay = (a.attempt, a.epoch) == (b.attempt, b.epoch)
                && (&a.job, &a.backbone) == (&b.job, &b.backbone);
            measured(a) && measured(b) && is_of_one_stay
        }
        _ => false,
    }
}

/// Has a report take in the points or lines of a later one of the same thing, if there is room for all; how many.
fn take_in(report: &mut Message, later: &mut Message) -> Option<usize> {
    match (report, later) {
        (Message::Logs(report), Message::Logs(later)) => append(&mut report.lines, &mut later.lines),
        (Message::Job(report), Message::Job(later)) => match (&mut report.report, &mut later.report) {
            (Some(Report::Measured(report)), Some(Report::Measured(later))) => {
                append(&mut report.points, &mut later.points)
            }
            _ => None,
        },
        _ => None,
    }
}

fn append<T>(before: &mut Vec<T>, later: &mut Vec<T>) -> Option<usize> {
    let added = later.len();
    (before.len() + added <= MERGED).then(|| {
        before.append(later);
        added
    })
}

fn key(report: &v1::JobReport) -> FileKey {
    (report.job.clone(), report.attempt)
}

/// A job leaves whose last checkpoint could not be stored.
fn without_checkpoint(left: &mut v1::JobLeft, why: &str) {
    if left.state() == v1::JobState::Succeeded {
        left.message = format!("its last checkpoint could not be stored: {why}");
        left.set_state(v1::JobState::Failed);
        left.set_reason(v1::JobReason::Internal);
    }
}

#[cfg(test)]
mod tests;
