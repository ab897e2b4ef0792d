//! The benchmarks that are known by name, from their owners' files to scores, on the bundled demo model.

mod common;
#[path = "common/fake.rs"]
mod fake;

use std::path::{Path, PathBuf};

use common::{Ran, command, demo, few_examples, incipit, path, refused, text};
use fake::{Fake, State};
use incipit_proto::v1::{Backbone, data_source::Source};
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
    refused(&incipit(&["job", "submit", "--task", "boolq"]), &["--data-dir is missing"]);
}

#[test]
fn a_job_of_a_benchmark_hands_in_the_files_of_its_splits() {
    let base = Backbone { name: "backbones/base".to_owned(), d_model: 64, ..Backbone::default() };
    let fake = Fake::start(State { backbones: vec![base], ..State::default() });
    let submit = |more: &[&str]| -> Ran {
        let args =
            [&["job", "submit", "--json", "--backbone", "base", "--task", "multirc"][..], more].concat();
        command(&args).env("INCIPIT_COORDINATOR", &fake.url).output().expect("the program starts").into()
    };
    submit(&["--data-dir", &data(), "--prompt-layers", "all", "--predict", "rank"]).ok();
    let files = ["train.jsonl", "val.jsonl"].map(|file| data_dir().join("MultiRC").join(file));
    let [train, val] = files.map(|file| (std::fs::read(&file).expect("a file"), file.display().to_string()));
    let plan = submit(&["--train", &train.1, "--eval", &val.1, "--dry-run"]).ok().json();
    assert_eq!(plan["examples"]["eval"], 8, "examples, of which a record has several: {plan}");

    let state = fake.state();
    let spec = state.created[0].0.job.clone().and_then(|job| job.spec).expect("a specification");
    assert_eq!((spec.task.as_deref(), spec.metrics.len()), (Some("multirc"), 0), "it brings its own");
    for (source, (bytes, path)) in [(spec.train, &train), (spec.eval, &val)] {
        let (source, digest) = (source.expect("a source"), blake3::hash(bytes).to_hex().to_string());
        assert!(path.ends_with(&source.file_name), "the name tells the format");
        assert_eq!(state.blobs[&digest], bytes);
        assert_eq!(source.source, Some(Source::Digest(digest)));
    }
    drop(state);

    refused(&submit(&["--data-dir", &data(), "--data-on-workers"]), &["--train and --eval"]);
    refused(&submit(&["--data-dir", &data(), "--labels", "0=no"]), &["--task multirc", "--labels"]);
    let mrpc = ["job", "submit", "--task", "mrpc", "--data-dir", &data()];
    refused(&incipit(&mrpc), &["two splits of mrpc", "incipit task export mrpc"]);
}

#[test]
fn several_tasks_are_mixed_into_one_set_whose_inputs_name_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let few = few_examples(dir.path());
    let (list, data) = (path(dir.path(), "tasks.toml"), data());
    let table = |name: &str, settings: &str| format!("[{name}]\n{settings}\n");
    let named = |name: &str| table(name, &format!("task = \"{name}\"\ndata-dir = '{data}'"));
    let file = table("few", &format!("train = '{few}'\neval = '{few}'"));
    std::fs::write(&list, named("wsc") + &file + &named("multirc")).expect("a file");
    let mix = |output: &str, more: &[&str]| {
        let at = path(dir.path(), output);
        let ran =
            incipit(&[&["task", "mix", "--tasks", &list, "--output", &at, "--json"][..], more].concat());
        (ran.ok().json(), lines(Path::new(&at).join("train.jsonl")), lines(Path::new(&at).join("dev.jsonl")))
    };
    let (said, train, dev) = mix("all", &[]);
    assert_eq!(said["tasks"][0], serde_json::json!({"task": "few", "train": 12, "dev": 12}));
    let (inputs, task) = (&train[0]["inputs"], &train[0]["task"]);
    assert!(task == "few" && inputs.as_str().is_some_and(|text| text.starts_with("few ")), "{train:?}");
    let of = |lines: &[Value], task: &str| lines.iter().filter(|line| line["task"] == task).count();
    let exported = |task: &str, split: &str| {
        let output = path(dir.path(), "exported.jsonl");
        let args = ["task", "export", task, "--data-dir", &data, "--split", split, "--output", &output];
        incipit(&args).ok();
        lines(&output).len()
    };
    for task in ["wsc", "multirc"] {
        let counts = (of(&train, task), of(&dev, task));
        assert_eq!(counts, (exported(task, "train"), exported(task, "dev")), "{task}");
    }

    // A draw is that of its seed, and in the file's order.
    let (_, some, all_dev) = mix("some", &["--limit", "5"]);
    assert_eq!((of(&some, "few"), all_dev), (5, dev));
    let places = some.iter().map(|line| train.iter().position(|other| other == line).expect("an example"));
    assert!(places.collect::<Vec<_>>().is_sorted());
    assert_eq!(mix("again", &["--limit", "5"]).1, some);
    assert_ne!(mix("other", &["--limit", "5", "--seed", "1"]).1, some);

    std::fs::write(&list, &file).expect("a file");
    let none = path(dir.path(), "none");
    let refusal = incipit(&["task", "mix", "--tasks", &list, "--output", &none]);
    refused(&refusal, &["tasks.toml has fewer than two tasks"]);
    std::fs::write(&list, file + &table("gone", "train = 'gone.jsonl'")).expect("a file");
    refused(&incipit(&["task", "mix", "--tasks", &list, "--output", &none]), &["gone.jsonl"]);
    assert!(!Path::new(&none).exists(), "a refused mixture leaves nothing");
}

#[test]
fn a_prefix_stands_before_every_input_that_is_evaluated() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, few) = (demo("model"), few_examples(dir.path()));
    let loss = |more: &[&str]| {
        let args = [&["eval", "--model", &model, "--json", "--data", &few][..], more].concat();
        incipit(&args).ok().json()["loss"].clone()
    };
    let prefixed = loss(&["--input-prefix", "parcels"]);
    assert_eq!(prefixed, loss(&["--inputs", "parcels {inputs}"]));
    assert_ne!(prefixed, loss(&[]));
}

#[test]
fn the_average_of_super_glue_is_that_of_its_eight_tasks_by_their_own_metrics() {
    let dir = tempfile::tempdir().expect("a directory");
    let scores = [
        ("boolq", serde_json::json!({"accuracy": 0.91})),
        ("cb", serde_json::json!({"macro-f1": 0.5, "accuracy": 0.7})),
        ("copa", serde_json::json!({"accuracy": 0.8})),
        ("multirc", serde_json::json!({"positive-f1": 0.2, "group-exact-match": 0.4})),
        ("record", serde_json::json!({"token-f1": 0.3, "exact-match": 0.1})),
        ("rte", serde_json::json!({"accuracy": 0.6})),
        ("wic", serde_json::json!({"accuracy": 0.5})),
        ("wsc", serde_json::json!({"containment": 0.4})),
    ];
    let files = scores.map(|(task, metrics)| {
        let file = path(dir.path(), task);
        std::fs::write(&file, serde_json::json!({"task": task, "metrics": metrics}).to_string())
            .expect("a file");
        file
    });
    let average = |files: &[String], more: &[&str]| {
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        incipit(&[&["task", "average"][..], &files, more].concat())
    };
    let printed = average(&files, &["--json"]).ok().json();
    let expected = (0.91 + 0.6 + 0.8 + 0.3 + 0.2 + 0.6 + 0.5 + 0.4) / 8.0;
    assert!(
        printed["average"].as_f64().is_some_and(|average| (average - expected).abs() < 1e-12),
        "{printed}"
    );
    assert!(average(&files, &[]).ok().stdout.contains("53.9 %"));

    refused(&average(&files[1..], &[]), &["boolq is missing", "incipit eval --task boolq"]);
    refused(&average(&[&files[..], &files[..1]].concat(), &[]), &["2 files are of boolq"]);
    std::fs::write(&files[1], r#"{"task": "cb", "metrics": {"accuracy": 0.7}}"#).expect("a file");
    refused(&average(&files, &[]), &["cb is measured by accuracy and macro-f1", "without --metrics"]);
    std::fs::write(&files[1], r#"{"task": "mrpc", "metrics": {}}"#).expect("a file");
    refused(&average(&files, &[]), &["mrpc is none of SuperGLUE's"]);
    std::fs::write(&files[1], "[]").expect("a file");
    refused(&average(&files, &[]), &["cb: it is not what"]);
}
