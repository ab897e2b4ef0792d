//! Reports on their way to the coordinator: each is said until it is acknowledged, in order.

use std::collections::{BTreeMap, VecDeque};

use incipit_proto::v1::{self, AttachRequest, attach_request::Message, job_report::Report};

use crate::agent::core::FileKey;

/// More than this, and engines are not listened to until the coordinator has caught up.
const FULL: usize = 20_000;
/// Lines of one report, at most.
const LINES: usize = 200;

/// The reports.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    reports: VecDeque<Entry>,
    /// Sequence of the last report.
    last: u64,
    /// Sequence of the last report that this connection has carried.
    sent: u64,
    /// Attempts of jobs whose last checkpoint could not be stored, and why.
    unsaved: BTreeMap<FileKey, String>,
}

#[derive(Debug)]
struct Entry {
    sequence: u64,
    message: Message,
    /// Whether its files are at the coordinator.
    ready: bool,
    /// A directory that is needed until it is acknowledged.
    dir: Option<String>,
}

impl Outbox {
    /// A report.
    pub(crate) fn report(&mut self, message: Message) {
        self.push(message, true, None);
    }

    /// A report whose files in `dir` have to be stored first. Returns its sequence.
    pub(crate) fn hold(&mut self, message: Message, dir: String) -> u64 {
        self.push(message, false, Some(dir))
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

    fn push(&mut self, mut message: Message, ready: bool, dir: Option<String>) -> u64 {
        if let Message::Job(report) = &mut message {
            let job = key(report);
            match &mut report.report {
                Some(Report::Saved(_)) => drop(self.unsaved.remove(&job)),
                Some(Report::Left(left)) => {
                    if let Some(why) = self.unsaved.remove(&job) {
                        without_checkpoint(left, &why);
                    }
                }
                _ => {}
            }
        }
        self.last += 1;
        self.reports.push_back(Entry { sequence: self.last, message, ready, dir });
        self.last
    }

    /// The files of a report are stored.
    pub(crate) fn release(&mut self, sequence: u64) {
        if let Some(entry) = self.reports.iter_mut().find(|entry| entry.sequence == sequence) {
            entry.ready = true;
        }
    }

    /// The files of a report cannot be stored: the log is told in its place. If the job leaves without another checkpoint, it has not
    /// succeeded: nobody would have its prompt. Its leave waits behind the report, and so is not said yet.
    pub(crate) fn replace(&mut self, sequence: u64, why: &str) {
        let mut behind = self.reports.iter_mut().skip_while(|entry| entry.sequence != sequence);
        let Some(entry) = behind.next() else { return };
        entry.ready = true;
        let Message::Job(report) = &entry.message else { return };
        let (Some(Report::Saved(saved)), job) = (&report.report, key(report)) else { return };
        let text =
            format!("the checkpoint of step {} was not stored, and training goes on: {why}", saved.step);
        let line = v1::LogLine { level: "ERROR".to_owned(), text, ..v1::LogLine::default() };
        let (backbone, name) = (report.backbone.clone(), report.job.clone());
        entry.message = Message::Logs(v1::LogReport { backbone, job: name, lines: vec![line] });
        for later in behind {
            let Message::Job(report) = &mut later.message else { continue };
            if key(report) != job {
                continue;
            }
            match &mut report.report {
                Some(Report::Saved(_)) => return,
                Some(Report::Left(left)) => return without_checkpoint(left, why),
                _ => {}
            }
        }
        self.unsaved.insert(job, why.to_owned());
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
        let sent = (self.sent + 1).saturating_sub(first) as usize;
        let ready: VecDeque<AttachRequest> = self
            .reports
            .iter()
            .skip(sent)
            .take_while(|entry| entry.ready)
            .map(|entry| AttachRequest { sequence: entry.sequence, message: Some(entry.message.clone()) })
            .collect();
        self.sent += ready.len() as u64;
        ready
    }

    /// Whether engines should wait.
    pub(crate) fn is_full(&self) -> bool {
        self.reports.len() >= FULL
    }

    /// Whether all is acknowledged.
    pub(crate) fn is_empty(&self) -> bool {
        self.reports.is_empty()
    }
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
        Message::Job(v1::JobReport {
            job: "jobs/j".to_owned(),
            attempt: 1,
            report: Some(report),
            ..v1::JobReport::default()
        })
    }

    fn saved(step: u64) -> Message {
        of_job(Report::Saved(v1::CheckpointSaved { step, ..v1::CheckpointSaved::default() }))
    }

    fn succeeded() -> Message {
        let (state, reason) = (v1::JobState::Succeeded.into(), v1::JobReason::StepsDone.into());
        of_job(Report::Left(v1::JobLeft { state, reason, ..v1::JobLeft::default() }))
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
        let sequence = outbox.hold(saved(7), "dir".to_owned());
        outbox.report(succeeded());
        outbox.replace(sequence, "no space");
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Failed, "it had left already");
        let mut outbox = Outbox::default();
        let sequence = outbox.hold(saved(7), "dir".to_owned());
        outbox.replace(sequence, "no space");
        outbox.report(succeeded());
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Failed, "it left later");
    }

    #[test]
    fn a_checkpoint_that_is_stored_makes_up_for_an_earlier_one_that_is_not() {
        let mut outbox = Outbox::default();
        let first = outbox.hold(saved(5), "first".to_owned());
        let second = outbox.hold(saved(7), "second".to_owned());
        outbox.report(succeeded());
        outbox.replace(first, "no space");
        outbox.release(second);
        assert_eq!(state_at_the_end(&mut outbox), v1::JobState::Succeeded);
    }
}
