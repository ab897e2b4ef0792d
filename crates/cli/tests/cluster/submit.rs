//! `incipit job submit`.

use std::path::Path;

use incipit_proto::v1::Optimizer as WireOptimizer;
use incipit_proto::v1::data_source::Source;
use incipit_proto::v1::*;
use incipit_tune::checkpoint;
use incipit_tune::prompt::Prompt;

use crate::common::{Ran, incipit};
use crate::fake::{Fake, State};
use crate::fixtures::{ask, backbone};
use crate::hash;

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
    let free: String =
        (0..40).map(|i| format!("{{\"q\": \"question {i}\", \"a\": \"answer {i}\"}}\n")).collect();
    std::fs::write(dir.path().join("train.jsonl"), free).expect("a file");
    for (given, part) in [
        (["--prompt-init", "class-label"], "the task has no labels"),
        (["--predict", "rank"], "--predict rank chooses among labels"),
    ] {
        let submit = ["job", "submit", "--coordinator", "http://127.0.0.1:1", "--config", &config];
        let ran = incipit(&[&submit[..], &given].concat());
        assert!(ran.code == 2 && ran.stderr.contains(part), "{given:?}: {}", ran.stderr);
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
        prompts: vec![promoted.clone()],
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

    // Of another backbone than this one only where that is allowed.
    let other = Backbone { fingerprint: "cd".repeat(32), ..backbone("base", "google/t5") };
    let promoted = PromptVersion { backbone_fingerprint: "ef".repeat(32), ..promoted };
    (fake.state().backbones, fake.state().prompts) = (vec![other], vec![promoted]);
    let ran = submit("prompt:greeter/3", &[]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    for part in ["efef", "base is cdcd", "--allow-other-backbone"] {
        assert!(ran.stderr.contains(part), "no {part} in {}", ran.stderr);
    }
    submit("prompt:greeter/3", &["--allow-other-backbone"]).ok();
    assert_eq!(fake.state().created.len(), 4);
}
