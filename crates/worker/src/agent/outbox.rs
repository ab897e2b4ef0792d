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

/// More than this, and engines are not listened to until the coordinator has caught up.
const FULL: usize = 20_000;
/// Lines of one report, at most.
const LINES: usize = 200;

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
    /// A report.
    pub(crate) fn report(&mut self, mut message: Message) {
        let Message::Job(report) = &mut message else { return self.number(message, None) };
        let job = key(report);
        let Some(Report::Left(left)) = &mut report.report else { return self.number(message, None) };
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

    /// A line, in one report with those before it where that has not been sent.
    pub(crate) fn log(&mut self, backbone: &str, job: String, line: v1::LogLine) {
        if let Some(Entry { sequence, message: Message::Logs(logs), .. }) = self.reports.back_mut()
            && *sequence > self.sent
            && (&*logs.backbone, &*logs.job) == (backbone, &*job)
            && logs.lines.len() < LINES
        {
            logs.lines.push(line);
            return;
        }
        self.report(Message::Logs(v1::LogReport { backbone: backbone.to_owned(), job, lines: vec![line] }));
    }

    fn number(&mut self, message: Message, dir: Option<String>) {
        self.last += 1;
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
        while self.reports.front().is_some_and(|entry| entry.sequence <= sequence) {
            dirs.extend(self.reports.pop_front().and_then(|entry| entry.dir));
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
        self.reports.len() + self.waiting.len() >= FULL
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
mod tests {
    use super::*;

    fn of_job(report: Report) -> Message {
        of("jobs/j", report)
    }

    fn of(job: &str, report: Report) -> Message {
        Message::Job(v1::JobReport {
            job: job.to_owned(),
            attempt: 1,
            report: Some(report),
            ..v1::JobReport::default()
        })
    }

    fn saved(step: u64) -> Message {
        of_job(Report::Saved(v1::CheckpointSaved { step, ..v1::CheckpointSaved::default() }))
    }

    fn hold(outbox: &mut Outbox, step: u64) -> u64 {
        let ticket = outbox.hold(attempt(), saved(step), "dir".to_owned());
        outbox.begin();
        ticket
    }

    /// A checkpoint whose tasks are at their best so far: `u`, `v`, or both.
    fn of_tasks(step: u64, bests: [bool; 2]) -> Message {
        let task = |(name, best): (&str, bool)| v1::CheckpointTask {
            name: name.to_owned(),
            best,
            ..v1::CheckpointTask::default()
        };
        let tasks = ["u", "v"].into_iter().zip(bests).map(task).collect();
        of_job(Report::Saved(v1::CheckpointSaved { step, tasks, ..v1::CheckpointSaved::default() }))
    }

    /// Steps of the job's checkpoints that wait.
    fn waits(outbox: &Outbox) -> Vec<u64> {
        let step = |entry: &Waiting| match &entry.message {
            Message::Job(v1::JobReport { report: Some(Report::Saved(saved)), .. }) => Some(saved.step),
            _ => None,
        };
        outbox.waiting.iter().filter_map(step).collect()
    }

    fn attempt() -> FileKey {
        ("jobs/j".to_owned(), 1)
    }

    fn succeeded() -> Message {
        left(v1::JobState::Succeeded, v1::JobReason::StepsDone)
    }

    fn left(state: v1::JobState, reason: v1::JobReason) -> Message {
        let (state, reason) = (state.into(), reason.into());
        of_job(Report::Left(v1::JobLeft { state, reason, ..v1::JobLeft::default() }))
    }

    /// Kinds of what can be said now; sequences have no gaps.
    fn said(outbox: &mut Outbox) -> Vec<&'static str> {
        let first = outbox.sent + 1;
        let unsent = outbox.take_unsent();
        let sequences: Vec<u64> = unsent.iter().map(|request| request.sequence).collect();
        assert!(sequences.iter().copied().eq(first..first + unsent.len() as u64), "{sequences:?}");
        let kind = |request: AttachRequest| match request.message.unwrap() {
            Message::Engine(_) => "engine",
            Message::Logs(_) => "logs",
            Message::Job(report) if report.job != "jobs/j" => "other job",
            Message::Job(report) => match report.report.unwrap() {
                Report::Started(_) => "started",
                Report::Measured(_) => "measured",
                Report::Saved(_) => "saved",
                Report::Left(_) => "left",
            },
            other => panic!("{other:?}"),
        };
        unsent.into_iter().map(kind).collect()
    }

    fn state_at_the_end(outbox: &mut Outbox) -> v1::JobState {
        match outbox.take_unsent().pop_back().unwrap().message.unwrap() {
            Message::Job(v1::JobReport { report: Some(Report::Left(left)), .. }) => left.state(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_job_whose_last_checkpoint_cannot_be_stored_has_not_succeeded() {
        let mut outbox = Outbox::default();
        let ticket = hold(&mut outbox, 7);
        outbox.report(succeeded());
        outbox.replace(ticket, "no space");
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Failed, "it had left already");
        let mut outbox = Outbox::default();
        let ticket = hold(&mut outbox, 7);
        outbox.replace(ticket, "no space");
        outbox.report(succeeded());
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Failed, "it left later");
    }

    #[test]
    fn a_checkpoint_that_is_stored_makes_up_for_an_earlier_one_that_is_not() {
        let mut outbox = Outbox::default();
        let first = hold(&mut outbox, 5);
        let second = hold(&mut outbox, 7);
        outbox.report(succeeded());
        outbox.replace(first, "no space");
        outbox.release(second);
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Succeeded);
    }

    #[test]
    fn a_checkpoint_on_its_way_holds_back_its_jobs_checkpoints_and_leave_and_nothing_else() {
        let mut outbox = Outbox::default();
        let first = hold(&mut outbox, 5);
        outbox.report(Message::Engine(v1::EngineReport::default()));
        outbox.report(of("jobs/k", Report::Left(v1::JobLeft::default())));
        outbox.report(of_job(Report::Measured(v1::JobMeasured::default())));
        let second = hold(&mut outbox, 7);
        outbox.report(succeeded());
        outbox.log("backbones/b", "jobs/j".to_owned(), v1::LogLine::default());
        assert_eq!(said(&mut outbox), ["engine", "other job", "measured", "logs"]);
        outbox.release(second);
        assert_eq!(said(&mut outbox), [""; 0], "checkpoints come in their order");
        outbox.release(first);
        assert_eq!(said(&mut outbox), ["saved", "saved", "left"]);
        outbox.say_again();
        assert_eq!(outbox.take_unsent().len(), 7);
        assert_eq!(outbox.acknowledge(6), ["dir", "dir"]);
        assert!(!outbox.is_empty() && outbox.acknowledge(7).is_empty() && outbox.is_empty());
    }

    #[test]
    fn the_files_of_a_job_are_stored_one_after_the_other_and_other_jobs_do_not_wait() {
        let mut outbox = Outbox::default();
        let begun = |outbox: &mut Outbox| -> Vec<u64> {
            outbox.begin().into_iter().map(|ToStore { ticket, .. }| ticket).collect()
        };
        for step in 1..=3 {
            outbox.hold(attempt(), saved(step), format!("{step}"));
        }
        outbox.hold(
            ("jobs/k".to_owned(), 1),
            of("jobs/k", Report::Saved(v1::CheckpointSaved::default())),
            String::new(),
        );
        assert_eq!(begun(&mut outbox), [1, 4]);
        assert_eq!(begun(&mut outbox), [0; 0], "they are on their way");
        outbox.release(1);
        assert_eq!(begun(&mut outbox), [2]);
        outbox.replace(2, "no space");
        assert_eq!(begun(&mut outbox), [3]);
        assert_eq!(said(&mut outbox), ["saved", "logs"]);
    }

    #[test]
    fn of_many_that_wait_the_one_on_its_way_the_best_ones_and_the_newest_stay() {
        let mut outbox = Outbox::default();
        let (mut dropped, mut most) = (Vec::new(), 0);
        for step in 1..=40 {
            // Task `u` is at its best at first, and task `v` once in a while.
            outbox.hold(attempt(), of_tasks(step, [step == 4, step % 10 == 2]), format!("step {step}"));
            outbox.begin();
            dropped.extend(outbox.drop_old(&attempt(), 3));
            most = most.max(outbox.waiting.len());
        }
        outbox.report(succeeded());
        assert_eq!(waits(&outbox), [1, 4, 32, 38, 39, 40]);
        assert_eq!((dropped.len(), most), (34, 6));
        assert_eq!(dropped[0], (3, "step 3".to_owned()));
        assert!(dropped.contains(&(2, "step 2".to_owned())), "it was the best until step 12 alone");
        outbox.release(1);
        while let Some(ToStore { ticket, .. }) = outbox.begin().pop() {
            outbox.release(ticket);
        }
        assert_eq!(said(&mut outbox), ["saved", "saved", "saved", "saved", "saved", "saved", "left"]);

        // Another job's, and those of one that keeps all.
        let mut outbox = Outbox::default();
        for step in 1..=40 {
            hold(&mut outbox, step);
            outbox.drop_old(&("jobs/k".to_owned(), 1), 1);
        }
        assert_eq!(waits(&outbox).len(), 40);
        outbox.drop_old(&attempt(), usize::MAX);
        assert_eq!(waits(&outbox).len(), BEHIND + 1);
    }

    /// Checkpoints as the coordinator keeps them: the newest, and the best one of each task.
    #[derive(Debug, Default, PartialEq)]
    struct Kept {
        steps: BTreeSet<u64>,
        bests: BTreeMap<String, u64>,
    }

    impl Kept {
        fn take(&mut self, message: &Message, keep: usize) {
            let Message::Job(v1::JobReport { report: Some(Report::Saved(saved)), .. }) = message else {
                return;
            };
            self.steps.insert(saved.step);
            self.bests.extend(best_of(saved).map(|task| (task.to_owned(), saved.step)));
            let old: Vec<u64> = self.steps.iter().rev().skip(keep).copied().collect();
            let bests: Vec<u64> = self.bests.values().copied().collect();
            self.steps.retain(|step| !old.contains(step) || bests.contains(step));
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_dropped_the_coordinator_would_not_have_kept(
            keep in 1..6_usize,
            saves in proptest::collection::vec((proptest::bool::weighted(0.2), proptest::bool::weighted(0.2), 0..4_u8), 1..60),
        ) {
            let (mut outbox, mut with, mut without) = (Outbox::default(), Kept::default(), Kept::default());
            let mut on_its_way = None;
            let take = |outbox: &mut Outbox, with: &mut Kept| {
                for request in outbox.take_unsent() {
                    with.take(&request.message.unwrap(), keep);
                }
            };
            for (step, (u, v, stored)) in (1..).zip(saves) {
                let message = of_tasks(step, [u, v]);
                without.take(&message, keep);
                outbox.hold(attempt(), message, String::new());
                outbox.drop_old(&attempt(), keep);
                on_its_way = on_its_way.or_else(|| outbox.begin().pop());
                if stored == 0 && let Some(stored) = on_its_way.take() {
                    outbox.release(stored.ticket);
                    on_its_way = outbox.begin().pop();
                }
                proptest::prop_assert!(outbox.waiting.len() <= keep + 3, "{}", outbox.waiting.len());
                take(&mut outbox, &mut with);
            }
            while let Some(stored) = on_its_way.take().or_else(|| outbox.begin().pop()) {
                outbox.release(stored.ticket);
            }
            take(&mut outbox, &mut with);
            proptest::prop_assert_eq!(with, without);
        }
    }

    #[test]
    fn a_job_is_cancelled_although_its_checkpoint_cannot_be_stored() {
        let wishes = || BTreeSet::from([attempt()]);
        // Put aside, and cancelled while its checkpoint is on its way.
        let mut outbox = Outbox::default();
        let ticket = hold(&mut outbox, 5);
        outbox.report(left(v1::JobState::Paused, v1::JobReason::Requested));
        outbox.fails(&attempt());
        assert_eq!(said(&mut outbox), [""; 0], "the pause waits for its checkpoint");
        outbox.cancel(wishes());
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Cancelled);
        outbox.release(ticket);
        assert_eq!(said(&mut outbox), ["saved"], "late, and of no effect");
        // Cancelled first.
        let mut outbox = Outbox::default();
        hold(&mut outbox, 5);
        outbox.cancel(wishes());
        outbox.report(left(v1::JobState::Cancelled, v1::JobReason::Requested));
        assert_eq!(said(&mut outbox), [""; 0], "the checkpoint is well on its way");
        outbox.fails(&attempt());
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Cancelled);
    }
}
