//! The benchmarks that are known by name, from their owners' files to scores, on the bundled demo model.

mod common;

use std::path::{Path, PathBuf};

use common::{Ran, demo, incipit, path, refused, text};
use serde_json::Value;

/// Small files in the manner of each benchmark's own.
fn data() -> String {
    data_dir().display().to_string()
}

fn data_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/goldens/tasks/data")
}

fn lines(file: impl AsRef<Path>) -> Vec<Value> {
    text(file).lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

fn train(out: &str, task: &str, data: &str, more: &[&str]) -> Ran {
    let model = demo("model");
    let mut args = vec!["train", "--json", "--model", &model, "--task", task, "--data-dir", data];
    args.extend(["--out", out, "--prompt-length", "4", "--batch-size", "2", "--max-input-length", "32"]);
    args.extend(["--eval-every", "1", "--checkpoint-every", "1"]);
    args.extend(more);
    if !more.contains(&"--steps") {
        args.extend(["--steps", "2"]);
    }
    incipit(&args)
}

#[test]
fn the_benchmarks_are_listed_and_shown() {
    let list = incipit(&["task", "list", "--json"]).ok().json();
    let list = list.as_array().expect("a list");
    assert_eq!(list.len(), 29);
    let multirc = list.iter().find(|task| task["name"] == "multirc").expect("MultiRC");
    assert_eq!(multirc["metrics"], serde_json::json!(["positive-f1", "group-exact-match"]));
    assert_eq!(multirc["labels"], serde_json::json!(["False", "True"]));
    let table = incipit(&["task", "list"]).ok().stdout;
    assert!(table.contains("boolq") && table.contains("SuperGLUE") && table.contains("free text"), "{table}");

    let about = incipit(&["task", "show", "boolq"]).ok().stdout;
    assert!(about.contains("val.jsonl or dev.jsonl") && !about.contains("inputs"), "{about}");
    let show = ["task", "show", "multirc", "--data-dir", &data(), "--split", "dev", "-n", "2"];
    let shown = incipit(&[&show[..], &["--json"]].concat()).ok().json();
    let examples = shown["examples"].as_array().expect("examples");
    assert_eq!(examples.len(), 2);
    assert_eq!(examples[0]["id"], serde_json::json!({"passage": 1, "question": 10, "answer": 100}));
    assert_eq!(examples[0]["targets"], "False");
    assert!(incipit(&show).ok().stdout.contains("targets  False"));
    let unlabelled = ["task", "show", "boolq", "--data-dir", &data(), "--split", "test"];
    assert!(incipit(&unlabelled).ok().stdout.contains("(no label)"));
}

#[test]
fn a_labelled_benchmark_is_trained_evaluated_and_resumed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (run, parts) = (path(dir.path(), "run"), path(dir.path(), "parts"));
    let trained = train(&run, "boolq", &data(), &[]).ok().json();
    assert!(trained["metrics"]["accuracy"].is_number(), "{trained}");
    assert!(trained["legal_share"].is_number(), "{trained}");
    let config = text(dir.path().join("run/run.toml"));
    assert!(config.contains("task = \"boolq\"") && config.contains("data-dir = "), "{config}");
    assert!(!config.contains("\ntrain = ") && config.contains("prompt-init = \"class-label\""), "{config}");
    let report = text(dir.path().join("run/report.html"));
    assert!(report.contains("boolq on") && report.contains("--task boolq --data-dir"), "the report");

    // The same data from another place, and the settings from run.toml.
    train(&parts, "boolq", &data(), &["--steps", "1"]).ok();
    let boolq = data_dir().join("BoolQ").display().to_string();
    incipit(&["train", "--out", &parts, "--resume", "--steps", "2", "--data-dir", &boolq]).ok();
    let last = |run: &str| std::fs::read(Path::new(run).join("last/prompt.safetensors")).expect("a prompt");
    assert_eq!(last(&run), last(&parts));

    let output = path(dir.path(), "p.jsonl");
    let eval = ["eval", "--json", "--prompt", &run, "--task", "boolq", "--data-dir", &data()];
    let measured = incipit(&[&eval[..], &["--output", &output]].concat()).ok().json();
    assert_eq!((&measured["metrics"], &measured["loss"]), (&trained["metrics"], &trained["eval_loss"]));
    assert_eq!((&measured["task"], &measured["split"]), (&"boolq".into(), &"dev".into()));
    assert!(lines(&output)[0]["id"].is_number() && lines(&output)[0]["target"].is_string());
}

#[test]
fn benchmarks_are_scored_against_their_references() {
    let dir = tempfile::tempdir().expect("a directory");
    for (task, metrics) in [
        ("multirc", vec!["group-exact-match", "positive-f1"]),
        ("squad", vec!["exact-match", "token-f1"]),
        ("wsc", vec!["containment"]),
    ] {
        let run = path(dir.path(), task);
        let trained = train(&run, task, &data(), &[]).ok().json();
        let mut measured: Vec<&String> = trained["metrics"].as_object().expect("metrics").keys().collect();
        measured.sort();
        assert_eq!(measured, metrics, "{task}");
        let eval = ["eval", "--json", "--prompt", &run, "--task", task, "--data-dir", &data()];
        assert_eq!(incipit(&eval).ok().json()["metrics"], trained["metrics"], "{task}");
        let log = lines(dir.path().join(task).join("metrics.jsonl"));
        let last = log.iter().rev().find(|line| line["event"] == "eval").expect("an evaluation");
        let metric = |name: &str| last["metrics"][name].as_f64().expect("a number");
        let score = match task {
            "multirc" => f64::midpoint(metric("positive-f1"), metric("group-exact-match")),
            "squad" => metric("token-f1"),
            _ => metric("containment"),
        };
        assert_eq!(last["score"].as_f64(), Some(score), "{task}");
    }
    assert!(text(dir.path().join("squad/run.toml")).contains("prompt-init = \"vocab\""));
    let generated = ["generate", "--json", "--prompt", &path(dir.path(), "squad"), "--task", "squad"];
    let answers = incipit(&[&generated[..], &["--data-dir", &data()]].concat()).ok().stdout;
    let first: Value = serde_json::from_str(answers.lines().next().expect("an answer")).expect("JSON");
    assert!(first["id"].is_string() && first["input"].as_str().expect("a text").starts_with("question:"));
}

#[test]
fn a_split_without_labels_is_predicted_and_handed_in() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, output) = (demo("model"), path(dir.path(), "p.jsonl"));
    let eval = |task: &str, more: &[&str]| {
        let args = ["eval", "--model", &model, "--task", task, "--data-dir", &data(), "--split", "test"];
        incipit(&[&args[..], &["--max-input-length", "32", "--json"], more].concat())
    };
    let ran = eval("boolq", &["--output", &output, "--submission", &dir.path().display().to_string()]).ok();
    assert!(ran.stderr.contains("no labels: predictions only, no metrics"), "{}", ran.stderr);
    let summary = ran.json();
    assert_eq!((&summary["metrics"], &summary["loss"]), (&serde_json::json!({}), &Value::Null));
    let predictions = lines(&output);
    assert!(predictions[0].get("target").is_none() && predictions[0]["prediction"].is_string());
    let handed_in = lines(dir.path().join("BoolQ.jsonl"));
    assert_eq!(handed_in.len(), predictions.len());
    assert_eq!(handed_in[0]["idx"], predictions[0]["id"]);
    let file = path(dir.path(), "mine.jsonl");
    eval("multirc", &["--submission", &file]).ok();
    assert!(lines(&file)[0]["passage"]["questions"].is_array());

    refused(&eval("boolq", &[]), &["no labels", "--output or --submission"]);
    refused(&eval("boolq", &["--submission", "/nowhere/at-all"]), &["--submission /nowhere/at-all"]);
    refused(&eval("glue-rte", &["--submission", &file]), &["mine.jsonl", "ends as RTE.tsv does"]);
    refused(&eval("squad", &["--submission", &file]), &["squad", "only SuperGLUE's and GLUE's"]);
    refused(&eval("squad", &["--output", &output]), &["squad has no test split", "dev"]);
}

#[test]
fn an_exported_split_is_a_file_of_examples() {
    let dir = tempfile::tempdir().expect("a directory");
    let (file, run) = (path(dir.path(), "train.jsonl"), path(dir.path(), "run"));
    let export = ["task", "export", "wsc", "--data-dir", &data(), "--split", "dev", "--output", &file];
    let made = incipit(&[&export[..], &["--json"]].concat()).ok().json();
    assert_eq!(made["examples"], lines(&file).len());
    let model = demo("model");
    let args = ["train", "--model", &model, "--train", &file, "--out", &run, "--steps", "1", "--prompt-init"];
    incipit(&[&args[..], &["vocab", "--prompt-length", "4", "--batch-size", "1"]].concat()).ok();
}

#[test]
fn what_is_wrong_with_a_benchmark_is_told_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = path(dir.path(), "run");
    refused(&train(&out, "boolqs", &data(), &[]), &["there is no task \"boolqs\"", "boolq"]);
    refused(&train(&out, "boolq", "/nowhere/at-all", &[]), &["/nowhere/at-all", "BoolQ", "--data-dir"]);
    let multirc = data_dir().join("MultiRC").display().to_string();
    refused(&train(&out, "boolq", &multirc, &[]), &["train.jsonl, line 1", "boolq needs a text there"]);
    refused(&train(&out, "mrqa-drop", &data(), &[]), &["mrqa-drop has no train split"]);
    refused(&train(&out, "boolq", &data(), &["--train", "x.jsonl"]), &["--task", "--train is given too"]);
    refused(&train(&out, "boolq", &data(), &["--labels", "0=a"]), &["--task", "--labels is given too"]);
    let model = demo("model");
    let bare = ["train", "--model", &model, "--out", &out];
    refused(&incipit(&[&bare[..], &["--task", "boolq"]].concat()), &["--data-dir"]);
    refused(&incipit(&[&bare[..], &["--data-dir", &data()]].concat()), &["--data-dir", "--task"]);

    let own = dir.path().join("BoolQ");
    std::fs::create_dir(&own).expect("a directory");
    let golden = data_dir().join("BoolQ/train.jsonl");
    std::fs::copy(&golden, own.join("train.jsonl")).expect("a copy");
    let own = own.display().to_string();
    refused(&train(&out, "boolq", &own, &[]), &["no dev split", "val.jsonl"]);
    let odd =
        text(&golden).replace("\"label\": true", "\"label\": 7").replace("\"label\": false", "\"label\": 7");
    std::fs::write(dir.path().join("BoolQ/val.jsonl"), odd).expect("a file");
    refused(&train(&out, "boolq", &own, &[]), &["val.jsonl, line 1", "the label 7", "False, True"]);
    assert!(!Path::new(&out).exists(), "a refused run leaves nothing");

    let eval = ["eval", "--model", &model, "--task", "boolq", "--data-dir", &data()];
    refused(&incipit(&[&eval[..], &["--data", "x.jsonl"]].concat()), &["--task and --data are both given"]);
    refused(&incipit(&["eval", "--model", &model]), &["--data is missing"]);
    refused(&incipit(&["generate", "--model", &model, "--task", "boolq"]), &["--data-dir is missing"]);
    refused(&incipit(&["job", "submit", "--task", "boolq"]), &["--task boolq", "incipit task export boolq"]);
}
