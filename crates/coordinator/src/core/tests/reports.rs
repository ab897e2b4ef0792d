//! Stories of reports.

use incipit_proto::v1::{EngineLossCause, JobReason, JobState, LogLine};

use super::world::{World, backbone_name, job_name, left, saved, target, training, worker_name};
use crate::core::{
    AgentMessage, Change, Request, ToAgent,
    checkpoint::CheckpointFile,
    input::{CheckpointRef, JobEvent, Report, Saved, StepRef},
};

#[test]
fn a_report_takes_effect_once_and_is_acknowledged_as_often_as_it_comes() {
    let mut world = World::running();
    let report = world.job_report("j", JobEvent::Measured(vec![training(1)]));
    let effects = world.report("w", report.clone());
    assert!(effects.changes.iter().any(|change| matches!(change, Change::AppendMetrics(..))));
    let sequence = world.agents[&worker_name("w")].sequence;
    let effects = world.say("w", AgentMessage::Report { sequence, report });
    assert!(effects.changes.is_empty());
    assert_eq!(effects.sends.last().unwrap().message, ToAgent::Acknowledged(sequence));
    // Also by a coordinator that was away.
    world.restart();
    let effects = world.connect("w", 4, false);
    let ToAgent::Welcome { acknowledged, .. } = effects.sends[0].message else { panic!("{effects:?}") };
    assert_eq!(acknowledged, sequence);
}

#[test]
fn a_gap_ends_the_connection_and_takes_no_effect() {
    let mut world = World::running();
    let report = world.job_report("j", JobEvent::Measured(vec![training(1)]));
    let sequence = world.agents[&worker_name("w")].sequence + 2;
    let effects = world.say("w", AgentMessage::Report { sequence, report });
    assert!(effects.changes.is_empty());
    assert_eq!(world.agents[&worker_name("w")].closed.clone().unwrap().reason, "SEQUENCE_GAP");
    assert_eq!(world.state("j").0, JobState::Running);
}

#[test]
fn what_is_of_an_old_epoch_or_attempt_is_acknowledged_and_has_no_effect() {
    let mut world = World::running();
    let old = [
        world.job_report("j", saved(7)),
        world.job_report("j", JobEvent::Measured(vec![training(7)])),
        world.job_report("j", left(JobState::Succeeded, JobReason::StepsDone)),
    ];
    world.engine_lost("w", "b", 0, EngineLossCause::Exited);
    world.load("w");
    let revision = world.core.revision();
    for report in old {
        let effects = world.report("w", report);
        assert!(matches!(&*effects.changes, [Change::PutReports(_)]), "{effects:?}");
        assert!(matches!(&effects.sends[0].message, ToAgent::Acknowledged(_)));
    }
    assert_eq!(world.core.revision(), revision);
}

#[test]
fn a_checkpoint_behind_its_jobs_leave_has_no_effect() {
    let mut world = World::running();
    let late = world.job_report("j", saved(7));
    world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
    world.ask(crate::core::Request::PauseJob(super::world::target("j"))).unwrap();
    world.report("w", late);
    assert!(world.core.rows().checkpoints.is_empty());
}

#[test]
fn only_the_leader_speaks_for_jobs() {
    let mut world = World::running();
    world.connect("v", 1, true);
    world.job_event("v", "j", saved(7));
    assert!(world.core.rows().checkpoints.is_empty());
}

#[test]
fn a_step_made_twice_has_one_point_and_offsets_have_no_gaps() {
    let mut world = World::running();
    world.job_event("w", "j", JobEvent::Measured(vec![training(1), training(2)]));
    let effects = world.job_event("w", "j", JobEvent::Measured(vec![training(2), training(3)]));
    let points: Vec<_> = effects
        .changes
        .iter()
        .filter_map(|change| match change {
            Change::AppendMetrics(_, points) => {
                Some(points.iter().map(|point| (point.offset, point.step)).collect::<Vec<_>>())
            }
            _ => None,
        })
        .collect();
    assert_eq!(points, [[(2, 3)]]);
    let view = world.core.job_view(&job_name("j")).unwrap();
    assert_eq!(view.progress.unwrap().step, 3);
    assert!(view.job.start_time.is_some());
}

#[test]
fn another_checkpoint_of_a_committed_step_is_refused_in_the_jobs_log() {
    let mut world = World::running();
    world.job_event("w", "j", saved(7));
    let effects = world.job_event("w", "j", saved(7));
    assert!(matches!(&*effects.changes, [Change::PutReports(_)]));
    let files = vec![CheckpointFile { name: "x".to_owned(), digest: "0".repeat(64), size: 1 }];
    let other = JobEvent::Saved(Saved { step: 7, files, ..Saved::default() });
    let effects = world.job_event("w", "j", other);
    let [Change::AppendLogs(name, lines), Change::PutReports(_)] = &*effects.changes else {
        panic!("{effects:?}")
    };
    assert_eq!((&**name, &*lines[0].level), ("jobs/j", "ERROR"));
    assert_eq!(world.core.checkpoint(&job_name("j"), 7).unwrap().files, super::world::files(7));
}

#[test]
fn lines_are_counted_by_what_they_are_of() {
    let mut world = World::running();
    let logs = |job: Option<&str>| Report::Logs {
        backbone: backbone_name("b"),
        job: job.map(job_name),
        lines: vec![LogLine { text: "x".repeat(20_000), offset: 77, ..LogLine::default() }],
    };
    for _ in 0..2 {
        world.report("w", logs(None));
    }
    let effects = world.report("w", logs(Some("j")));
    let Change::AppendLogs(_, lines) = &effects.changes[0] else { panic!() };
    assert_eq!((lines[0].offset, &*lines[0].worker, lines[0].text.len()), (0, "workers/w", 16 * 1024));
    world.report("w", logs(Some("nobody")));
    let rows = world.core.rows();
    let counts: Vec<_> = rows.logs.iter().map(|(name, count)| (name.as_str(), *count)).collect();
    assert_eq!(counts, [("backbones/b", 2), ("jobs/j", 1)]);
}

#[test]
fn a_job_that_was_put_aside_before_an_evaluation_is_saved_again_behind_it() {
    let mut world = World::running();
    world.job_event("w", "j", saved(7));
    let checkpoint = CheckpointRef { job: job_name("j"), step: StepRef::Last, task: None };
    world.ask(Request::PinCheckpoint { checkpoint: checkpoint.clone(), etag: None, pinned: true }).unwrap();
    let prompt = incipit_proto::names::PromptName::of_id("id", "p").unwrap();
    let promote = Request::PromotePrompt { prompt, checkpoint, etag: None, description: String::new() };
    world.ask(promote).unwrap();
    world.ask(Request::PauseJob(target("j"))).unwrap();
    world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
    world.ask(Request::ResumeJob(target("j"))).unwrap();

    let state = CheckpointFile { name: "state.json".to_owned(), digest: "0".repeat(64), size: 1 };
    let with =
        |files| JobEvent::Saved(Saved { step: 7, files, score: Some(0.5), best: true, ..Saved::default() });
    // A version of a prompt stands on the file that is missing here.
    world.job_event("w", "j", with(vec![state.clone()]));
    assert_eq!(world.job("j").best, None);
    let files = [super::world::files(7), vec![state]].concat();
    world.job_event("w", "j", with(files.clone()));
    let now = world.core.checkpoint(&job_name("j"), 7).unwrap();
    assert_eq!((&now.files, now.best, now.pinned, now.score), (&files, true, true, Some(0.5)));
    assert_eq!(world.job("j").best.unwrap().step, 7);
}
