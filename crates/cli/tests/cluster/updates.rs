//! `job update`, `job continue`, `backbone update` and `backbone logs`.

use incipit_proto::v1::*;

use super::fake::{Fake, State};
use super::fixtures::{ask, backbone, job, with_job};

#[test]
fn an_update_names_what_is_to_change_and_nothing_else() {
    let fake = Fake::start(with_job(job("on", JobState::Running, JobReason::Started)));
    let args = ["job", "update", "on", "--priority", "30", "--label", "a.b=c=d", "--remove-label", "old"];
    let ran = ask(&fake, &args).ok();
    assert!(ran.stdout.contains("on ") && ran.stdout.contains("running"), "{}", ran.stdout);
    let mut sent = fake.state().updates.remove(0);
    let mut paths = sent.update_mask.take().expect("a mask").paths;
    paths.sort();
    assert_eq!(paths, ["labels.a.b", "labels.old", "priority"]);
    let new = sent.job.expect("a job");
    assert_eq!(
        (&*new.name, new.priority, new.labels),
        ("jobs/on", 30, [("a.b".into(), "c=d".into())].into())
    );
    assert!(!sent.request_id.is_empty());
    let ran = ask(&fake, &["job", "update", "on", "absent", "--retries", "2"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("there is no jobs/absent") && ran.stdout.contains("on "), "{}", ran.stderr);
    let sent = fake.state().updates.remove(0);
    assert_eq!(sent.update_mask.expect("a mask").paths, ["retry_policy"]);
    assert_eq!(sent.job.expect("a job").retry_policy.expect("a policy").max_retries, 2);
}

#[test]
fn a_job_goes_on_with_other_steps_checkpoints_and_patience() {
    let mut old = job("old", JobState::Succeeded, JobReason::PatienceExhausted);
    let settings = |patience, keep, checkpoint_every, steps| TrainingSpec {
        patience,
        keep,
        checkpoint_every,
        steps,
        lr: Some(0.5),
        ..TrainingSpec::default()
    };
    old.spec = Some(settings(Some(3), Some(2), Some(50), Some(900)));
    let fake = Fake::start(with_job(old));
    let go_on = |more: &[&str]| ask(&fake, &[&["job", "continue", "old"], more].concat());
    let flags = ["--patience", "5", "--keep", "4", "--checkpoint-every", "10", "--steps", "950"];
    go_on(&flags).ok();
    go_on(&["--patience", "0"]).ok();
    go_on(&["--checkpoint", "best"]).ok();
    let sent = |request: &CreateJobRequest| request.job.clone().and_then(|job| job.spec);
    let sent: Vec<_> = fake.state().created.iter().filter_map(|(request, _)| sent(request)).collect();
    let expected = [
        settings(Some(5), Some(4), Some(10), Some(950)),
        settings(None, Some(2), Some(50), Some(900)),
        settings(Some(3), Some(2), Some(50), Some(900)),
    ];
    assert_eq!(sent, expected);
    for same in [&[][..], &["--patience", "3"], &["--steps", "2000", "--checkpoint", "last"]] {
        let ran = go_on(same);
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        for part in ["old ended after 3 evaluations", "--patience", "--checkpoint"] {
            assert!(ran.stderr.contains(part), "no {part:?} in:\n{}", ran.stderr);
        }
    }
    assert_eq!(fake.state().created.len(), 3);
}

#[test]
fn the_places_of_a_backbone_can_be_changed() {
    let fake = Fake::start(State { backbones: vec![backbone("base", "google/t5")], ..State::default() });
    ask(&fake, &["backbone", "update", "base", "--max-running-jobs", "64", "--label", "gpu=h100"]).ok();
    let sent = fake.state().backbone_updates.remove(0);
    assert_eq!(sent.update_mask.expect("a mask").paths, ["labels.gpu", "max_running_jobs"]);
    let new = sent.backbone.expect("a backbone");
    assert_eq!((new.max_running_jobs, &*new.labels["gpu"]), (64, "h100"));
}

#[test]
fn a_dry_run_asks_what_would_be_and_says_that_nothing_was_done() {
    let jobs = with_job(job("on", JobState::Running, JobReason::Started)).jobs;
    let fake =
        Fake::start(State { backbones: vec![backbone("base", "google/t5")], jobs, ..State::default() });
    let ran = ask(&fake, &["job", "update", "on", "--priority", "30", "--dry-run"]).ok();
    assert!(fake.state().updates.remove(0).validate_only);
    assert!(ran.stdout.contains("on ") && ran.stderr.contains("nothing was changed"), "{}", ran.stderr);
    let ran = ask(&fake, &["backbone", "update", "base", "--max-running-jobs", "64", "--dry-run"]).ok();
    assert!(fake.state().backbone_updates.remove(0).validate_only);
    assert!(ran.stderr.contains("nothing was changed"), "{}", ran.stderr);
    let new = ["backbone", "create", "--name", "new", "--model", "google/t5", "--dry-run"];
    let ran = ask(&fake, &new).ok();
    assert!(ran.stdout.contains("google/t5") && ran.stderr.contains("nothing is loaded"), "{}", ran.stderr);
    assert_eq!(fake.state().backbones.len(), 1);
    let ran = super::common::incipit(&[&new[..], &["--wait"]].concat());
    super::common::refused(&ran, &["--dry-run", "--wait"]);
}

#[test]
fn a_backbone_that_failed_is_retried_and_waited_for() {
    let mut failed = backbone("base", "google/t5");
    failed.set_state(BackboneState::Failed);
    let fake = Fake::start(State { backbones: vec![failed], ..State::default() });
    let ran = ask(&fake, &["backbone", "retry", "base", "--wait", "--json"]).ok();
    assert_eq!(ran.json()["state"], "BACKBONE_STATE_READY");
    assert!(ran.stderr.contains("incipit job submit --backbone base"), "{}", ran.stderr);
    let ran = ask(&fake, &["backbone", "retry", "absent"]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("backbones/absent"), "{}", ran.stderr);
}

#[test]
fn an_update_of_nothing_is_refused() {
    for (args, flag) in
        [(["job", "update", "on"], "--priority"), (["backbone", "update", "b"], "--max-running-jobs")]
    {
        let ran = super::common::incipit(&args);
        super::common::refused(&ran, &["nothing is to change", flag]);
    }
}

#[test]
fn the_logs_of_a_backbone_are_printed_a_line_each() {
    let line = |text: &str| LogLine { worker: "workers/w".into(), text: text.into(), ..LogLine::default() };
    let fake = Fake::start(State { lines: vec![line("loading"), line("ready")], ..State::default() });
    let ran = ask(&fake, &["backbone", "logs", "base"]).ok();
    assert_eq!(ran.stdout.lines().collect::<Vec<_>>(), ["w/0 loading", "w/0 ready"]);
}

#[test]
fn logs_that_are_followed_end_with_what_they_are_of() {
    let lines = ["loading", "ready"].map(|text| LogLine { text: text.into(), ..LogLine::default() }).into();
    let fake = Fake::start(State { lines, breaks: 1, deleted: true, ..State::default() });
    let ran = ask(&fake, &["backbone", "logs", "base", "--follow"]).ok();
    assert!(ran.stdout.contains("loading"), "{}", ran.stdout);
    let ran = ask(&fake, &["backbone", "logs", "base", "--follow"]);
    assert!(ran.code == 2 && ran.stderr.contains("there is no backbones/base"), "{}", ran.stderr);
}

#[test]
fn lines_that_were_dropped_before_those_that_are_printed_are_told_of_once() {
    let lines: Vec<LogLine> =
        (0..9).map(|n| LogLine { text: format!("no. {n}"), ..LogLine::default() }).collect();
    let fake = Fake::start(State { lines, dropped: 4, ..State::default() });
    let ran = ask(&fake, &["backbone", "logs", "base"]).ok();
    assert!(ran.stdout.contains("no. 4") && !ran.stdout.contains("no. 3"), "{}", ran.stdout);
    assert_eq!(ran.stderr.matches("lines 1 to 4 were dropped").count(), 1, "{}", ran.stderr);
}
