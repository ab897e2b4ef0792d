//! The commands that ask a coordinator, run as people run them, against one that has what the test puts into it.

mod common;
#[path = "common/fake.rs"]
mod fake;
#[path = "cluster/fixtures.rs"]
mod fixtures;
#[path = "cluster/submit.rs"]
mod submit;
#[path = "cluster/updates.rs"]
mod updates;

use std::path::Path;

use common::incipit;
use fake::{Fake, State};
use fixtures::{ask, backbone, job, with_job};
use incipit_proto::v1::metric_point::Point;
use incipit_proto::v1::*;
use incipit_tune::checkpoint::{self, TrainState};
use incipit_tune::optimizer::{Optimizer, OptimizerKind};
use incipit_tune::prompt::Prompt;
use incipit_tune::spec::{PartialSpec, Precision};
use incipit_tune::trained::Trained;

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

#[test]
fn all_pages_of_a_list_are_one_table_or_one_array() {
    let state = State {
        jobs: ["a", "b", "c"]
            .map(|id| (id.to_owned(), job(id, JobState::Running, JobReason::Started)))
            .into(),
        ..State::default()
    };
    let fake = Fake::start(state);
    let table = ask(&fake, &["job", "list"]).ok().stdout;
    assert_eq!(table.lines().count(), 5, "a head, a rule and three jobs:\n{table}");
    let json = ask(&fake, &["job", "list", "--json", "--limit", "2"]).ok().json();
    let names: Vec<_> = json.as_array().expect("an array").iter().map(|job| job["name"].clone()).collect();
    assert_eq!(names, ["jobs/a", "jobs/b"]);
    assert_eq!(json[0]["state"], "JOB_STATE_RUNNING");
}

#[test]
fn the_exit_code_of_watch_tells_how_the_job_ended() {
    for (state, reason, code) in [
        (JobState::Succeeded, JobReason::StepsDone, 0),
        (JobState::Failed, JobReason::Internal, 1),
        (JobState::Failed, JobReason::BadData, 2),
        (JobState::Failed, JobReason::NonFinite, 3),
        (JobState::Cancelled, JobReason::Requested, 5),
    ] {
        let mut state_now = with_job(job("j", JobState::Running, JobReason::Started));
        state_now.end = Some(job("j", state, reason));
        let fake = Fake::start(state_now);
        let ran = ask(&fake, &["job", "watch", "j"]);
        assert_eq!(ran.code, code, "{state:?} {reason:?}:\n{}{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains("j running (started)"), "{}", ran.stdout);
    }
}

#[test]
fn watch_goes_on_where_it_was_when_the_connection_breaks() {
    let mut state = with_job(job("j", JobState::Running, JobReason::Started));
    state.end = Some(job("j", JobState::Succeeded, JobReason::StepsDone));
    let point = |offset: u64| {
        let training = Point::Training(StepMetrics { loss: 0.5, ..StepMetrics::default() });
        MetricPoint { offset, step: offset + 1, point: Some(training), ..MetricPoint::default() }
    };
    state.points = (0..5).map(point).collect();
    state.breaks = 2;
    let fake = Fake::start(state);
    let ran = ask(&fake, &["job", "watch", "j", "--json"]).ok();
    let lines: Vec<serde_json::Value> =
        ran.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let steps: Vec<u64> =
        lines.iter().filter_map(|line| line["point"]["step"].as_str()?.parse().ok()).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5], "{}", ran.stdout);
    let states: Vec<_> = lines.iter().filter_map(|line| line["job"]["state"].as_str()).collect();
    assert_eq!(
        states.last(),
        Some(&"JOB_STATE_SUCCEEDED"),
        "another job's failure is not told: {}",
        ran.stdout
    );
    assert_eq!(fake.state().offsets[..3], [0, 2, 4]);
}

#[test]
fn logs_are_printed_once_each_whatever_breaks() {
    let mut state = with_job(job("j", JobState::Succeeded, JobReason::StepsDone));
    state.lines = (0..5)
        .map(|offset| LogLine { offset, text: format!("line {offset}"), ..LogLine::default() })
        .collect();
    state.breaks = 1;
    let fake = Fake::start(state);
    let ran = ask(&fake, &["job", "logs", "j", "--follow"]).ok();
    let told: Vec<&str> =
        ran.stdout.lines().filter_map(|line| line.split_once("line ")).map(|(_, number)| number).collect();
    assert_eq!(told, ["0", "1", "2", "3", "4"]);
}

/// A checkpoint as a run writes it, and the files of it by their digests.
fn saved(dir: &Path) -> (Checkpoint, State) {
    let values = (0..8).map(|i| i as f32).collect();
    let optimizer = Optimizer::new(&OptimizerKind::adamw(0.0), 2, 4);
    let state = TrainState {
        step: 500,
        epoch: 0,
        batch: 0,
        seed: 0,
        spec: String::new(),
        backbone: String::new(),
        optimizer: *optimizer.kind(),
        optimizer_steps: 500,
        best: None,
        evaluations_since_best: 0,
        evaluated: 0,
        train_data: String::new(),
        eval_data: None,
        tokens: None,
        corpus: None,
    };
    let prompt = Prompt::new(2, 4, values).expect("a prompt");
    checkpoint::save(
        dir,
        &checkpoint::Checkpoint { trained: Trained::Prompt(prompt), optimizer: optimizer.state(), state },
    )
    .expect("saved");
    let (mut files, mut blobs) = (Vec::new(), std::collections::BTreeMap::new());
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let entry = entry.expect("an entry");
        let bytes = std::fs::read(entry.path()).expect("a file");
        let (name, digest, size) =
            (entry.file_name().into_string().expect("UTF-8"), hash(&bytes), bytes.len() as u64);
        blobs.insert(digest.clone(), bytes.into());
        files.push(CheckpointFile { name, digest, size });
    }
    let name = "jobs/j/checkpoints/00000500".to_owned();
    let checkpoint = Checkpoint { name, step: 500, files, best: true, ..Checkpoint::default() };
    let state = State { blobs, checkpoints: vec![checkpoint.clone()], ..State::default() };
    (checkpoint, state)
}

#[test]
fn a_downloaded_checkpoint_is_the_directory_that_was_saved() {
    let dir = tempfile::tempdir().expect("a directory");
    let (checkpoint, mut state) = saved(&dir.path().join("made"));
    let mut owner = job("j", JobState::Succeeded, JobReason::StepsDone);
    owner.spec = Some(TrainingSpec {
        inputs: Some("question: {q}".into()),
        max_target_length: Some(7),
        ..TrainingSpec::default()
    });
    state.jobs = [(owner.name.clone(), owner)].into();
    state.backbones = vec![Backbone { dtype: "f32".into(), ..backbone("base", "google/t5") }];
    let fake = Fake::start(state);
    let out = dir.path().join("deep/fetched");
    let to = out.display().to_string();
    let ran = ask(&fake, &["checkpoint", "download", "j", "--out", &to, "--json"]).ok();
    assert_eq!((&ran.json()["name"], &ran.json()["files"]), (&checkpoint.name.as_str().into(), &4.into()));
    let next = format!("incipit eval --prompt {to} --data FILE");
    assert!(ran.stderr.contains(&next), "no {next:?} in:\n{}", ran.stderr);
    let settings = PartialSpec::read(&out.join("run.toml")).expect("the settings of the job");
    assert_eq!((settings.model.as_deref(), settings.dtype), (Some("google/t5"), Some(Precision::F32)));
    assert_eq!((settings.inputs.as_deref(), settings.max_target_length), (Some("question: {q}"), Some(7)));
    let (ours, theirs) =
        (checkpoint::load(&out).expect("valid"), checkpoint::load(&dir.path().join("made")).expect("valid"));
    assert_eq!(ours, theirs);
    incipit(&["inspect", "prompt", &to]).ok();
    let again = ask(&fake, &["checkpoint", "download", "j/500", "--out", &to]);
    assert_eq!(again.code, 2);
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
}

#[test]
fn a_checkpoint_with_a_wrong_hash_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let (checkpoint, mut state) = saved(&dir.path().join("made"));
    let bad = checkpoint.files.iter().find(|file| file.name == "optimizer.safetensors").expect("a file");
    let mut bytes = state.blobs[&bad.digest].to_vec();
    bytes[100] ^= 1;
    state.blobs.insert(bad.digest.clone(), bytes.into());
    let fake = Fake::start(state);
    let into = dir.path().join("into");
    std::fs::create_dir(&into).expect("a directory");
    let ran = ask(
        &fake,
        &["checkpoint", "download", "j/500", "--out", &into.join("fetched").display().to_string()],
    );
    assert_eq!(ran.code, 1);
    for part in ["j/500", "optimizer.safetensors is damaged", "nothing was written"] {
        assert!(ran.stderr.contains(part), "no {part:?} in:\n{}", ran.stderr);
    }
    assert_eq!(std::fs::read_dir(&into).expect("a directory").count(), 0);
    let ran = ask(&fake, &["checkpoint", "verify", "--job", "j"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stdout.contains("j/500 damaged"), "{}", ran.stdout);
}

#[test]
fn a_file_of_a_checkpoint_does_not_lead_out_of_its_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut checkpoint, mut state) = saved(&dir.path().join("made"));
    checkpoint.files[0].name = "../escaped".into();
    state.checkpoints = vec![checkpoint];
    let fake = Fake::start(state);
    let ran =
        ask(&fake, &["checkpoint", "download", "j", "--out", &dir.path().join("new").display().to_string()]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no plain name"), "{}", ran.stderr);
    assert!(!dir.path().join("escaped").exists() && !dir.path().join("new").exists());
}

#[test]
fn what_the_coordinator_refuses_is_told_with_its_reason_and_the_others_are_done() {
    let mut state = with_job(job("done", JobState::Succeeded, JobReason::StepsDone));
    state.jobs.insert("jobs/on".into(), job("on", JobState::Running, JobReason::Started));
    let fake = Fake::start(state);
    let ran = ask(&fake, &["job", "pause", "done", "on", "absent", "--wait"]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    for part in ["jobs/done has ended (SUCCEEDED)", "[JOB_STATE]", "there is no jobs/absent [NOT_FOUND]"] {
        assert!(ran.stderr.contains(part), "no {part:?} in:\n{}", ran.stderr);
    }
    assert!(ran.stdout.contains("on ") && ran.stdout.contains("paused"), "{}", ran.stdout);
    let ran = ask(&fake, &["job", "delete", "done"]).ok();
    assert!(ran.stderr.contains("deleted done") && ran.stdout.is_empty(), "{}", ran.stderr);
}

#[test]
fn a_coordinator_that_is_not_there_is_named_with_what_to_start() {
    let ran = incipit(&["job", "list", "--coordinator", "http://127.0.0.1:1"]);
    assert_eq!((ran.code, &*ran.stdout), (1, ""));
    for part in ["http://127.0.0.1:1", "refused", "incipit up", "--coordinator"] {
        assert!(ran.stderr.contains(part), "no {part:?} in:\n{}", ran.stderr);
    }
    let ran = incipit(&["job", "list", "--coordinator", "localhost"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("http://HOST:PORT"), "{}", ran.stderr);
}

#[test]
fn creating_a_backbone_waits_until_it_is_ready_or_has_failed() {
    let fake = Fake::start(State::default());
    let create = |name: &str, model: &str| {
        ask(
            &fake,
            &[
                "backbone", "create", "--name", name, "--model", model, "--tp", "2", "--dtype", "f32",
                "--wait", "--json",
            ],
        )
    };
    let ran = create("base", "google/t5").ok();
    assert_eq!(
        (&ran.json()["state"], &ran.json()["tp"], &ran.json()["dtype"]),
        (&"BACKBONE_STATE_READY".into(), &2.into(), &"f32".into())
    );
    assert!(ran.stderr.contains("incipit job submit --backbone base"), "{}", ran.stderr);
    let ran = create("bad", "broken");
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("the backbone bad failed") && ran.stderr.contains("no config.json"),
        "{}",
        ran.stderr
    );
}
