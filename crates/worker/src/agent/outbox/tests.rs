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

/// So many points, from a step on.
fn measured(job: &str, step: u64, count: u64) -> Message {
    let points = (step..step + count).map(|step| v1::MetricPoint { step, ..v1::MetricPoint::default() });
    of(job, Report::Measured(v1::JobMeasured { points: points.collect() }))
}

#[test]
fn points_and_lines_that_wait_for_the_coordinator_go_together_each_in_their_order() {
    let mut outbox = Outbox::default();
    outbox.report(measured("jobs/j", 0, 1));
    let sent = outbox.take_unsent();
    // That is on its way, and stays as it is.
    for step in 1..1000 {
        outbox.report(measured("jobs/j", step, 1));
        outbox.report(measured("jobs/k", step, 1));
        let text = step.to_string();
        outbox.log("backbones/b", "jobs/j".to_owned(), v1::LogLine { text, ..v1::LogLine::default() });
    }
    // More than goes with what is there; and what is smaller goes behind it.
    outbox.report(measured("jobs/j", 1000, MERGED as u64 - 1));
    outbox.report(measured("jobs/j", 999 + MERGED as u64, 1));
    assert_eq!((sent.len(), outbox.reports.len()), (1, 1 + 3 * 999_usize.div_ceil(MERGED) + 1));
    let (mut steps, mut lines, mut num_others) = (Vec::new(), Vec::new(), 0);
    for request in sent.into_iter().chain(outbox.take_unsent()) {
        match request.message.unwrap() {
            Message::Job(v1::JobReport { job, report: Some(Report::Measured(measured)), .. }) => {
                assert!(measured.points.len() <= MERGED);
                if job == "jobs/j" {
                    steps.extend(measured.points.iter().map(|point| point.step));
                } else {
                    num_others += measured.points.len();
                }
            }
            Message::Logs(logs) => lines.extend(logs.lines.into_iter().map(|line| line.text)),
            other => panic!("{other:?}"),
        }
    }
    assert!(steps.into_iter().eq(0..1000 + MERGED as u64));
    assert!(lines.into_iter().eq((1..1000).map(|step: u32| step.to_string())));
    assert_eq!(num_others, 999);
}

#[test]
fn points_of_another_stay_of_a_job_are_a_report_of_their_own() {
    let mut outbox = Outbox::default();
    outbox.report(measured("jobs/j", 0, 1));
    let Message::Job(of_next) = measured("jobs/j", 0, 1) else { unreachable!() };
    outbox.report(Message::Job(v1::JobReport { attempt: 2, ..of_next.clone() }));
    outbox.report(Message::Job(v1::JobReport { epoch: 2, ..of_next }));
    assert_eq!(said(&mut outbox), ["measured", "measured", "measured"]);
}

#[test]
fn engines_wait_when_hours_of_points_wait_and_no_longer_once_they_are_taken() {
    let mut outbox = Outbox::default();
    let mut step = 0;
    while !outbox.is_full() {
        outbox.report(measured("jobs/j", step, 5));
        step += 5;
    }
    assert!((990_000..1_000_000).contains(&step), "{step}");
    let last = outbox.last;
    outbox.acknowledge(last - 1);
    assert!(!outbox.is_full());
    outbox.acknowledge(last);
    assert_eq!(outbox.weight, 0);
}
