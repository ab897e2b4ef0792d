//! `incipit paper`: suites of runs, from a scale's file to tables.

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Ran, command, demo, few_examples, incipit, path, refused};
use serde_json::Value;

/// A scale on the demo's model: every kind of suite, a step or two a run.
fn scale(dir: &Path, steps: u32) -> String {
    few_examples(dir);
    let text = format!(
        r#"
about = "The demo's model."
seeds = 2

[train]
steps = {steps}
batch-size = 4
eval-every = 1
checkpoint-every = 1
keep = 1
prompt-length = 2
max-input-length = 32
max-target-length = 6

[methods.text]
max-prompt-tokens = 64
shots = 2
steps = 1

[stages.more]
from = "lm"
[stages.more.settings]
objective = "prefix-lm"
max-input-length = 8
max-target-length = 8
batch-size = 4
steps = 1

[[models]]
name = "demo"
shape = {{ d-model = 128, d-ff = 256, d-kv = 32, num-heads = 4, num-layers = 2 }}
found = {{ lm = '{model}' }}

[tasks.few]
train = "few.jsonl"
eval = "few.jsonl"
input-tokens = 12
eval-examples = 12

[tasks.other]
eval = "few.jsonl"
input-tokens = 12
eval-examples = 12

[tasks.twin]
train = "few.jsonl"
eval = "few.jsonl"
input-tokens = 12
eval-examples = 12

[tasks.gone]
train = "gone.jsonl"
input-tokens = 12
eval-examples = 12

[[suite]]
name = "figure-1"
kind = "models"
title = "All tasks at once"
models = ["demo"]
tasks = ["few", "twin"]
variants = [{{ name = "at once", mixture = true }}]

[[suite]]
name = "figure-3d"
kind = "models"
title = "Steps of adaptation"
models = ["demo"]
tasks = ["few"]
variants = [{{ name = "0 steps" }}, {{ name = "1 step", stage = "more" }}]

[[suite]]
name = "methods"
kind = "tasks"
title = "Methods"
model = "main"
tasks = ["few"]
variants = [{{ name = "prompt" }}, {{ name = "text", method = "text" }}]

[[suite]]
name = "table-1"
kind = "transfer"
title = "Domains"
model = "main"
pairs = [{{ from = "few", to = ["few", "other"] }}]
metrics = ["accuracy"]
variants = [{{ name = "prompt" }}]

[[suite]]
name = "table-3"
kind = "ensemble"
title = "Votes"
model = "main"
tasks = ["few"]
members = 3

[[suite]]
name = "table-4"
kind = "parameters"
title = "Numbers"
variants = [{{ name = "100 rows", prompt-length = 100 }}, {{ name = "the model", method = "model" }}]

[[suite]]
name = "table-5"
kind = "time"
title = "Time"
models = ["demo"]
task = "few"
variants = [{{ name = "1 row", prompt-length = 1 }}]

[[suite]]
name = "table-6"
kind = "search"
title = "Settings, drawn"
model = "main"
task = "few"
trials = 2
space = [{{ setting = "lr", values = [0.1, 0.2, 0.3, 0.4] }}]

[[suite]]
name = "lost"
kind = "ensemble"
title = "Without data"
model = "main"
tasks = ["gone"]
members = 2
"#,
        model = demo("model")
    );
    let path = dir.join(format!("scale-{steps}.toml"));
    std::fs::write(&path, text).expect("a file");
    path.display().to_string()
}

fn corpus(dir: &Path) -> String {
    let path = dir.join("corpus.txt");
    std::fs::write(&path, "the parcel came late and the box was torn\n".repeat(60)).expect("a file");
    path.display().to_string()
}

fn args<'a>(scale: &'a str, dir: &'a str, corpus: &'a str, out: &'a str) -> Vec<&'a str> {
    vec!["paper", "--scale", scale, "--data-dir", dir, "--corpus", corpus, "--out", out, "--json"]
}

fn to_run(plan: &Value) -> usize {
    plan["runs"].as_array().expect("runs").iter().filter(|run| run["done"] == false).count()
}

/// The cell of a suite in what was printed.
fn cell<'a>(printed: &'a Value, suite: &str, row: usize, column: usize) -> &'a Value {
    let suites = printed["suites"].as_array().expect("suites");
    let suite = suites.iter().find(|found| found["name"] == suite).expect("the suite");
    &suite["rows"][row]["cells"][column]
}

#[test]
fn every_kind_of_suite_is_run_once_and_told_in_every_form() {
    let dir = tempfile::tempdir().expect("a directory");
    let (scale, corpus) = (scale(dir.path(), 2), corpus(dir.path()));
    let (at, out) = (dir.path().display().to_string(), path(dir.path(), "out"));
    let all = args(&scale, &at, &corpus, &out);
    let dry = [&all[..], &["--dry-run"]].concat();

    let plan = incipit(&dry).ok();
    assert!(plan.stderr.contains("lost is left out"), "{}", plan.stderr);
    assert!(!Path::new(&out).exists(), "a dry run writes nothing");
    let planned = to_run(&plan.json());
    let printed = incipit(&all).ok().json();
    assert_eq!(to_run(&incipit(&dry).ok().json()), 0, "of {planned} runs");

    for suite in ["figure-1", "figure-3d", "methods", "table-1", "table-3", "table-4", "table-5", "table-6"] {
        for extension in ["txt", "json", "csv", "svg"] {
            let file = Path::new(&out).join(format!("{suite}.{extension}"));
            assert!(file.metadata().is_ok_and(|file| file.len() > 80), "{}", file.display());
        }
    }
    assert!(Path::new(&out).join("paper.html").is_file());
    // Of two seeds, with their spread; the same run serves several suites.
    let values = |suite, row, column| cell(&printed, suite, row, column)["values"].clone();
    assert_eq!(values("figure-3d", 0, 0).as_array().map(Vec::len), Some(2));
    assert!(cell(&printed, "figure-3d", 1, 0)["deviation"].is_number());
    assert_eq!(values("figure-3d", 0, 0), values("methods", 0, 0));
    // What learnt both tasks is told which it is asked, and these two are of one file.
    assert_eq!(values("figure-1", 0, 0).as_array().map(Vec::len), Some(2));
    let mixed = common::text(Path::new(&out).join("runs/mixture/few+twin/examples/train.jsonl"));
    let starts =
        |task: &str| mixed.lines().filter(|line| line.contains(&format!("\"inputs\":\"{task} "))).count();
    assert_eq!((starts("few"), starts("twin")), (12, 12));
    let plan = plan.json();
    let commands: Vec<&str> =
        plan["runs"].as_array().expect("runs").iter().filter_map(|run| run["command"].as_str()).collect();
    assert!(commands.iter().any(|command| command.contains("--input-prefix twin")), "{commands:?}");
    // The other task is the same file, so that its evaluation gives what training measured.
    assert_eq!(values("table-1", 0, 0), values("table-1", 1, 0));
    assert_eq!(cell(&printed, "table-4", 1, 4)["values"][0], 11_135_332_352.0);
    assert_eq!(cell(&printed, "table-4", 0, 4)["paper"], "409,600");
    let trained = |row: usize| printed["suites"][2]["rows"][row]["num_trained"].clone();
    assert_eq!(trained(0), 2.0 * 128.0, "P rows of the model's width");
    assert!(trained(1).as_f64().is_some_and(|tokens| tokens > 2.0), "{printed}");

    // What was lost alone is done again.
    let lost = Path::new(&out).join("runs/few/demo-lm/prompt/3-prompts.json");
    std::fs::remove_file(&lost).expect("a record");
    assert_eq!(to_run(&incipit(&dry).ok().json()), 1);
    assert_eq!(incipit(&all).ok().json(), printed);
}

#[test]
fn a_run_that_fails_costs_what_needs_it_and_is_tried_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let scale = scale(dir.path(), 1);
    let (at, out) = (dir.path().display().to_string(), path(dir.path(), "out"));
    let empty = path(dir.path(), "empty.txt");
    std::fs::write(&empty, "").expect("a file");
    let run = |corpus: &str| incipit(&[&args(&scale, &at, corpus, &out)[..], &["figure-3d"]].concat());

    let first = run(&empty);
    assert_eq!(first.code, 1, "{}", first.stderr);
    for part in ["model/demo-more failed: error: ", "is left out, since model/demo-more failed"] {
        assert!(first.stderr.contains(part), "no {part:?} in {}", first.stderr);
    }
    let printed = first.json();
    assert_eq!(cell(&printed, "figure-3d", 0, 0)["missing"], 0);
    assert_eq!(cell(&printed, "figure-3d", 1, 0)["missing"], 2);

    std::fs::write(&empty, "the parcel came late and the box was torn\n".repeat(60)).expect("a file");
    assert_eq!(cell(&run(&empty).ok().json(), "figure-3d", 1, 0)["missing"], 0);
}

#[test]
fn an_interrupted_suite_goes_on_and_comes_to_the_same() {
    let dir = tempfile::tempdir().expect("a directory");
    let (scale, corpus) = (scale(dir.path(), 40), corpus(dir.path()));
    let at = dir.path().display().to_string();
    let (out, whole) = (path(dir.path(), "out"), path(dir.path(), "whole"));
    let with = |out: &str| {
        let all = args(&scale, &at, &corpus, out);
        [&all[..], &["table-5"]].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let run = |args: &[String]| command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child =
        run(&with(&out)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let begun = Path::new(&out).join("runs/few/demo-lm/prompt,prompt-length=1/seed-0/checkpoints");
    let start = Instant::now();
    while !begun.exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it is there");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(130));

    let scores = |ran: Ran| cell(&ran.ok().json(), "table-5", 0, 0)["missing"].clone();
    assert_eq!(scores(run(&with(&out)).output().expect("it starts").into()), 0);
    run(&with(&whole)).output().expect("it starts");
    let prompt = |out: &str, seed| {
        let run = format!("runs/few/demo-lm/prompt,prompt-length=1/seed-{seed}/prompt.npy");
        std::fs::read(Path::new(out).join(run)).expect("a prompt")
    };
    for seed in [0, 1] {
        assert_eq!(prompt(&out, seed), prompt(&whole, seed), "seed {seed}");
    }
}

#[test]
fn what_a_scale_says_wrongly_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let (good, corpus) = (scale(dir.path(), 1), corpus(dir.path()));
    let (at, out) = (dir.path().display().to_string(), path(dir.path(), "out"));
    let text = std::fs::read_to_string(&good).expect("the scale");
    let bad = path(dir.path(), "bad.toml");
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        std::fs::write(&bad, text.replacen(from, to, 1)).expect("a file");
        incipit(&args(&bad, &at, &corpus, &out))
    };
    refused(&with("batch-size = 4", "batchsize = 4"), &["bad.toml", "batchsize"]);
    refused(&with("method = \"text\"", "method = \"texts\""), &["bad.toml", "texts"]);
    refused(&with("kind = \"time\"", "kind = \"hour\""), &["bad.toml", "hour"]);
    let mixed = with("method = \"text\"", "method = \"text\", mixture = true");
    refused(&mixed, &["text of methods is a mixture", "several tasks"]);
    refused(&with("seeds = 2", "seeds = 0"), &["bad.toml", "at least one seed"]);
    refused(&with("name = \"table-5\"", "name = \"table-6\""), &["two suites are called table-6"]);

    let named = |name: &str| incipit(&[&args(&good, &at, &corpus, &out)[..], &[name]].concat());
    refused(&named("table-9"), &["no suite table-9", "table-6"]);
    refused(&named("lost"), &["suite lost", "gone.jsonl is missing"]);
    refused(&incipit(&args("huge", &at, &corpus, &out)), &["--scale huge", "tiny", "paper"]);
    assert!(!Path::new(&out).exists());

    // Another scale's runs are not taken for this one's.
    let one = incipit(&[&args(&good, &at, &corpus, &out)[..], &["table-5"]].concat());
    one.ok();
    let other = scale(dir.path(), 2);
    let refusal = incipit(&[&args(&other, &at, &corpus, &out)[..], &["table-5"]].concat());
    refused(&refusal, &["made with other settings", "choose another --out"]);
}

#[test]
fn the_scales_that_come_along_can_be_read_and_begun_with() {
    for name in ["tiny", "paper"] {
        let text = incipit(&["paper", "--scale", name, "--print-scale"]).ok().stdout;
        assert!(text.contains("[[suite]]"), "{text}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let at = dir.path().display().to_string();
    let plan =
        incipit(&["paper", "--scale", "paper", "--data-dir", &at, "--out", &at, "--dry-run", "--json"]);
    // Without data, what needs none.
    assert_eq!(plan.ok().json()["suites"], serde_json::json!(["figure-4", "table-4"]));
}
