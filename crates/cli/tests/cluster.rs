//! The commands that ask a coordinator, run as people run them, against one that has what the test puts into it.

mod common;
#[path = "common/fake.rs"]
mod fake;
#[path = "cluster/fixtures.rs"]
mod fixtures;
#[path = "cluster/updates.rs"]
mod updates;

use std::path::Path;

use common::{Ran, incipit};
use fake::{Fake, State};
use fixtures::{ask, backbone, job, with_job};
use incipit_proto::v1::Optimizer as WireOptimizer;
use incipit_proto::v1::data_source::Source;
use incipit_proto::v1::metric_point::Point;
use incipit_proto::v1::*;
use incipit_tune::checkpoint::{self, TrainState};
use incipit_tune::optimizer::{Optimizer, OptimizerKind};
use incipit_tune::prompt::Prompt;
use incipit_tune::trained::Trained;

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Two files of examples, and a `run.toml` that names them, as `incipit train` takes it.
fn run_file(dir: &Path) -> String {
    let lines = |count: usize| {
        (0..count).map(|i| format!("{{\"q\": \"question {i}\", \"a\": \"yes\"}}\n")).collect::<String>()
    };
    std::fs::write(dir.join("train.jsonl"), lines(40)).expect("a file");
    std::fs::write(dir.join("eval.jsonl"), lines(6)).expect("a file");
    let (train, eval) = (dir.join("train.jsonl"), dir.join("eval.jsonl"));
    let text = format!(
        "model = \"google/t5\"\ntrain = {train:?}\neval = {eval:?}\nout = \"runs/q\"\ninputs = \"question: {{q}}\"\ntargets = \"{{a}}\"\n\
         lr = 0.5\nsteps = 100\nbatch-size = 4\nprompt-length = 20\nprompt-init = \"vocab\"\nrecipe = \"released-code\"\n\
         metrics = [\"accuracy\", \"token-f1\"]\ndevice = \"cuda:3\"\ndtype = \"f32\"\ntp = 8\ncollective = \"nccl\"\n"
    );
    let path = dir.join("run.toml");
    std::fs::write(&path, text).expect("a file");
    path.display().to_string()
}

#[test]
fn submit_sends_what_a_training_file_says_and_uploads_what_is_missing() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = run_file(dir.path());
    let fake = Fake::start(State {
        backbones: vec![backbone("other", "x"), backbone("base", "google/t5")],
        ..State::default()
    });
    let token = dir.path().join("token");
    std::fs::write(&token, "secret\n").expect("a file");
    let token = token.display().to_string();
    let words = format!(
        "job submit --config {config} --lr 0.1 --priority 20 --label team=nlp --retries 2 --name q-1 --token-file {token} --json"
    );
    let ran = ask(&fake, &words.split(' ').collect::<Vec<_>>()).ok();
    assert_eq!(ran.json()["name"], "jobs/q-1");
    for part in [
        "out, device, dtype, tp, collective are left to the backbone",
        "on the backbone base",
        "incipit job watch q-1",
    ] {
        assert!(ran.stderr.contains(part), "no {part:?} in:\n{}", ran.stderr);
    }
    let state = fake.state();
    let (request, token) = &state.created[0];
    assert_eq!(
        (token.as_deref(), request.request_id.len(), request.validate_only),
        (Some("Bearer secret"), 36, false)
    );
    let job = request.job.clone().expect("a job");
    assert_eq!((&*job.backbone, job.priority, &*job.labels["team"]), ("backbones/base", 20, "nlp"));
    assert_eq!(job.retry_policy.expect("a policy").max_retries, 2);
    let spec = job.spec.expect("a specification");
    let train = std::fs::read(dir.path().join("train.jsonl")).expect("a file");
    let source = spec.train.clone().expect("a source");
    assert_eq!((source.source, &*source.file_name), (Some(Source::Digest(hash(&train))), "train.jsonl"));
    assert_eq!(
        (spec.lr, spec.steps, spec.batch_size, spec.prompt_length),
        (Some(0.1), Some(100), Some(4), Some(20))
    );
    assert_eq!((spec.inputs.as_deref(), spec.prompt_init.as_deref()), (Some("question: {q}"), Some("vocab")));
    assert_eq!(
        (spec.recipe(), spec.optimizer(), spec.dropout),
        (Recipe::ReleasedCode, WireOptimizer::Unspecified, None)
    );
    assert_eq!(spec.metrics, [Metric::Accuracy as i32, Metric::TokenF1 as i32]);
    assert_eq!(state.uploads.len(), 2);
    assert_eq!(state.blobs[&hash(&train)], train);
}

#[test]
fn a_file_is_uploaded_again_where_that_broke_off_or_was_turned_away_for_now() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = run_file(dir.path());
    let backbones = vec![backbone("base", "google/t5")];
    let fake = Fake::start(State { backbones, turned_away: 1, cut_off: 1, ..State::default() });
    ask(&fake, &["job", "submit", "--config", &config]).ok();
    let state = fake.state();
    assert_eq!((state.turned_away, state.cut_off, state.uploads.len(), state.created.len()), (0, 0, 2, 1));
}

#[test]
fn what_is_there_is_not_uploaded_again_and_a_given_request_id_is_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = run_file(dir.path());
    let fake = Fake::start(State { backbones: vec![backbone("base", "google/t5")], ..State::default() });
    let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    for _ in 0..2 {
        ask(&fake, &["job", "submit", "--config", &config, "--request-id", id]).ok();
    }
    let state = fake.state();
    assert_eq!(state.uploads.len(), 2);
    assert!(state.created.iter().all(|(request, _)| request.request_id == id), "both have the id");
}

#[test]
fn settings_are_refused_as_train_refuses_them_before_anybody_is_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = run_file(dir.path());
    for (flag, value) in
        [("--lr", "0"), ("--inputs", "{q"), ("--prompt-length", "20000"), ("--prompt-init", "zeros")]
    {
        let out = dir.path().join("out").display().to_string();
        let train = incipit(&[
            "train",
            "--config",
            &config,
            "--device",
            "cpu",
            "--collective",
            "local",
            "--out",
            &out,
            flag,
            value,
        ]);
        let submit = incipit(&[
            "job",
            "submit",
            "--coordinator",
            "http://127.0.0.1:1",
            "--config",
            &config,
            flag,
            value,
        ]);
        assert_eq!((train.code, submit.code), (2, 2), "{}", submit.stderr);
        let error = |ran: &Ran| ran.stderr.lines().find(|line| line.starts_with("error")).map(str::to_owned);
        assert_eq!(error(&submit), error(&train), "{flag}");
    }
    std::fs::write(dir.path().join("train.jsonl"), "{\"q\": \"no answer\"}\n").expect("a file");
    let ran = incipit(&["job", "submit", "--coordinator", "http://127.0.0.1:1", "--config", &config]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("train.jsonl") && ran.stderr.contains("line 1"), "{}", ran.stderr);
}

#[test]
fn a_dry_run_prints_the_plan_and_sends_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = run_file(dir.path());
    let fake = Fake::start(State { backbones: vec![backbone("base", "google/t5")], ..State::default() });
    let ran = ask(&fake, &["job", "submit", "--config", &config, "--dry-run"]).ok();
    for part in ["10.0 epochs", "40 to train, 6 to evaluate", "3 jobs", "roughly", "train.jsonl"] {
        assert!(ran.stdout.contains(part), "no {part:?} in:\n{}", ran.stdout);
    }
    let plan = ask(&fake, &["job", "submit", "--config", &config, "--dry-run", "--json"]).ok().json();
    assert_eq!(
        (&plan["steps"], &plan["queue_position"], &plan["prompt_bytes"]),
        (&100.into(), &3.into(), &(20 * 64 * 4).into())
    );
    assert_eq!(plan["uploads"].as_array().map(Vec::len), Some(2));
    let state = fake.state();
    assert!(state.uploads.is_empty() && state.jobs.is_empty());
    assert!(state.created.iter().all(|(request, _)| request.validate_only), "nothing was handed in");
}

#[test]
fn data_on_the_workers_is_neither_read_nor_sent() {
    let fake = Fake::start(State { backbones: vec![backbone("base", "google/t5")], ..State::default() });
    let args = ["job", "submit", "--data-on-workers", "--train", "/data/on/them.csv", "--backbone", "base"];
    ask(&fake, &args).ok();
    let state = fake.state();
    let spec = state.created[0].0.job.clone().and_then(|job| job.spec).expect("a specification");
    let train = spec.train.expect("a source");
    assert_eq!(
        (train.source, &*train.file_name),
        (Some(Source::Path("/data/on/them.csv".into())), "them.csv")
    );
}

#[test]
fn a_job_starts_as_a_prompt_of_this_machine_or_of_the_registry() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = run_file(dir.path());
    let at = |name: &str| dir.path().join(name);
    let prompt = Prompt::new(20, 2, (0..40).map(|i| i as f32).collect()).expect("a prompt");
    incipit_tune::npy::write(&at("p.npy"), &prompt).expect("a file");
    checkpoint::write_prompt(&at("p.safetensors"), &prompt).expect("a file");
    let bytes = std::fs::read(at("p.safetensors")).expect("a file");
    let promoted = PromptVersion {
        name: "prompts/greeter/versions/3".into(),
        digest: "ab".repeat(32),
        ..PromptVersion::default()
    };
    let fake = Fake::start(State {
        backbones: vec![backbone("base", "google/t5")],
        prompts: vec![promoted],
        ..State::default()
    });
    let submit = |init: &str, more: &[&str]| {
        let args = ["job", "submit", "--config", &config, "--prompt-init", init];
        ask(&fake, &[&args[..], more].concat())
    };
    let file = |name: &str| format!("file:{}", at(name).display());
    submit(&file("p.npy"), &[]).ok();
    submit(&file("p.safetensors"), &["--data-on-workers"]).ok();
    submit("prompt:greeter/3", &[]).ok();
    let digests = [hash(&bytes), hash(&bytes), "ab".repeat(32)];
    let state = fake.state();
    for ((request, _), digest) in state.created.iter().zip(&digests) {
        let spec = request.job.clone().and_then(|job| job.spec).expect("a specification");
        let initial = spec.initial.expect("a prompt");
        assert_eq!(initial.source, Some(Source::Digest(digest.clone())));
        assert_eq!(
            (spec.prompt_init.as_deref(), &*initial.file_name),
            (Some("file:prompt.safetensors"), "prompt.safetensors")
        );
    }
    assert_eq!(
        (state.created.len(), state.uploads.len()),
        (3, 3),
        "two files of examples, and the prompt once"
    );
    assert_eq!(state.blobs[&hash(&bytes)], bytes);
    drop(state);

    for (init, more, part) in [
        (file("absent.npy"), &[][..], "absent.npy"),
        (file("p.npy"), &["--prompt-length", "7"], "has 20 rows, not 7; give --prompt-length 20"),
        ("prompt:greeter/no".to_owned(), &[], "is no version"),
    ] {
        let ran = submit(&init, more);
        assert!(ran.code == 2 && ran.stderr.contains(part), "no {part:?} in {}:\n{}", ran.code, ran.stderr);
    }
    let ran = submit("prompt:greeter/4", &[]);
    assert!(ran.code != 0 && ran.stderr.contains("greeter/versions/4"), "{}", ran.stderr);
    assert_eq!(fake.state().created.len(), 3);
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
    owner.spec = Some(TrainingSpec { inputs: Some("question: {q}".into()), ..TrainingSpec::default() });
    state.jobs = [(owner.name.clone(), owner)].into();
    state.backbones = vec![backbone("base", "google/t5")];
    let fake = Fake::start(state);
    let out = dir.path().join("deep/fetched");
    let to = out.display().to_string();
    let ran = ask(&fake, &["checkpoint", "download", "j", "--out", &to, "--json"]).ok();
    assert_eq!((&ran.json()["name"], &ran.json()["files"]), (&checkpoint.name.as_str().into(), &4.into()));
    let next = format!("incipit eval --prompt {to} --model google/t5 --inputs 'question: {{q}}' --data FILE");
    assert!(ran.stderr.contains(&next), "no {next:?} in:\n{}", ran.stderr);
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
