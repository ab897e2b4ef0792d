//! A real model and real data: the losses of the reference loop, the tokenizer's two files, and every data set with its template.
//! They lie outside of the repository, in the folder that `INCIPIT_SHARED` names; without it these tests say that they are skipped.

mod common;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use incipit_data::{LoadOptions, TaskFormat, Template, TextExample, labels_of, load_text, tokenize};
use incipit_model::Config;
use incipit_tune::log::{self, Line};
use serde::Deserialize;

use common::{arg, incipit, root, shared};

/// How far a training loss may be from the reference's.
const TOLERANCE: f64 = 1e-3;

/// Data sets with labels: their splits, the template of their input, and their labels.
const LABELLED: [(&str, &str, usize); 5] = [
    ("sst2", "{sentence}", 2),
    ("trec", "{question}", 6),
    ("subj", "{sentence}", 2),
    ("mrpc", "sentence1: {sentence1} sentence2: {sentence2}", 2),
    ("rte", "hypothesis: {hypothesis} premise: {premise}", 2),
];

/// Official SuperGLUE records with flat fields: templates of input and target, and the texts of their labels.
const FEWGLUE: [(&str, &str, &str, Option<&str>); 6] = [
    ("BoolQ", "question: {question} passage: {passage}", "{label}", Some("false=False,true=True")),
    ("CB", "hypothesis: {hypothesis} premise: {premise}", "{label}", None),
    ("COPA", "premise: {premise} {question}: {choice1} or {choice2}", "{label}", Some("0=choice1,1=choice2")),
    ("RTE", "hypothesis: {hypothesis} premise: {premise}", "{label}", None),
    ("WSC", "{text}", "{label}", Some("false=False,true=True")),
    (
        "WiC",
        "sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        "{label}",
        Some("false=False,true=True"),
    ),
];

/// The two tasks whose texts lie deeper than one field.
const NESTED: [(&str, &str); 2] = [("MultiRC", "{passage}"), ("ReCoRD", "{passage}")];

fn model(shared: &Path) -> PathBuf {
    shared.join("models/t5-mini-lm")
}

fn format(inputs: &str, targets: &str, labels: Option<&str>) -> Result<TaskFormat> {
    let labels = labels.map(str::parse).transpose()?;
    Ok(TaskFormat { inputs: Template::parse(inputs)?, targets: Template::parse(targets)?, labels })
}

/// Every labelled data set's examples, with its name.
fn labelled(shared: &Path) -> Result<Vec<(String, Vec<TextExample>)>> {
    let mut found = Vec::new();
    for (name, template, labels) in LABELLED {
        let format = format(template, "{label}", None)?;
        for split in ["train", "dev", "test"] {
            let path = shared.join(format!("data/{name}/{split}.jsonl"));
            let examples = load_text(&path, &format, LoadOptions::default())?.examples;
            let classes = labels_of(&examples, 10).with_context(|| format!("{name} has no label set"))?;
            ensure!(classes.len() == labels, "{name} has the labels {classes:?}");
            found.push((format!("{name}/{split}"), examples));
        }
    }
    Ok(found)
}

/// FewGLUE's examples, with the name of the task.
fn fewglue(shared: &Path) -> Result<Vec<(String, Vec<TextExample>)>> {
    let load = |(name, inputs, targets, labels): (&str, &str, &str, Option<&str>)| {
        let path = shared.join(format!("data/fewglue/{name}/train.jsonl"));
        let examples = load_text(&path, &format(inputs, targets, labels)?, LoadOptions::default())?.examples;
        Ok((format!("fewglue/{name}"), examples))
    };
    FEWGLUE.into_iter().map(load).collect()
}

/// `losses.json` of `scripts/goldens/reference_losses.py`.
#[derive(Deserialize)]
struct Reference {
    batch: usize,
    steps: usize,
    max_input: usize,
    losses: Vec<f64>,
    losses_float64: Vec<f64>,
    order: Vec<usize>,
}

/// The losses of our run on the reference's examples in their order, from the reference's prompt.
fn losses(shared: &Path, golden: &Path, reference: &Reference) -> Result<Vec<f64>> {
    let dir = tempfile::tempdir()?;
    let (train, out) = (dir.path().join("train.jsonl"), arg(dir.path().join("out")));
    let records = std::fs::read_to_string(shared.join("data/trec/train.jsonl"))?;
    let records: Vec<&str> = records.lines().collect();
    let ordered: String = reference.order.iter().map(|place| records[*place].to_owned() + "\n").collect();
    std::fs::write(&train, ordered)?;
    let (model, train) = (arg(model(shared)), arg(train));
    let init = format!("file:{}", arg(golden.join("prompt.npy")));
    let (batch, steps) = (reference.batch.to_string(), reference.steps.to_string());
    let longest = reference.max_input.to_string();
    let files = ["train", "--model", &model, "--train", &train, "--out", &out, "--prompt-init", &init];
    let format = ["--inputs", "{question}", "--targets", "{label}", "--max-input-length", &longest];
    let recipe = ["--prompt-length", "20", "--lr", "0.3", "--batch-size", &batch, "--steps", &steps];
    let numbers = ["--shuffle", "false", "--dtype", "f32"];
    incipit(&[&files[..], &format, &recipe, &numbers].concat())?.ok()?;
    let lines = log::read(Path::new(&out).join("metrics.jsonl").as_ref())?;
    let loss = |line: &Line| match line {
        Line::Step { loss, .. } => Some(*loss),
        Line::Eval { .. } => None,
    };
    Ok(lines.iter().filter_map(loss).collect())
}

/// Largest of `distance` over two runs' losses, and its step from 1.
fn largest(ours: &[f64], theirs: &[f64], distance: impl Fn(f64, f64) -> f64) -> (f64, usize) {
    let steps = ours.iter().zip(theirs).enumerate();
    steps.fold((0.0, 0), |most, (step, (a, b))| {
        let d = distance(*a, *b);
        if d > most.0 { (d, step + 1) } else { most }
    })
}

/// From the same prompt and order, in f32. Rounding grows from step to step, faster than the loss falls: the reference itself, in
/// f32, ends 1.8e-3 away from what it computes in f64. So our losses are compared with those in f64 absolutely, and with those in
/// f32 relative to the loss.
#[test]
fn the_first_hundred_losses_are_the_reference_loops() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let golden = root().join("tests/goldens/reference_losses");
    let reference: Reference = serde_json::from_str(&std::fs::read_to_string(golden.join("losses.json"))?)?;
    let ours = losses(&shared, &golden, &reference)?;
    ensure!(ours.len() == 100 && reference.losses.len() == 100, "{} losses", ours.len());
    let absolute = |a: f64, b: f64| (a - b).abs();
    let relative = |a: f64, b: f64| (a - b).abs() / b;
    let to_f64 = largest(&ours, &reference.losses_float64, absolute);
    let to_f32 = largest(&ours, &reference.losses, relative);
    let early = largest(&ours[..50], &reference.losses[..50], absolute);
    println!("from the reference in f64: at most {:.1e}, at step {}", to_f64.0, to_f64.1);
    println!("from the reference in f32: at most {:.1e} of the loss, at step {}", to_f32.0, to_f32.1);
    println!("from the reference in f32, first 50 steps: at most {:.1e}, at step {}", early.0, early.1);
    ensure!(to_f64.0 <= TOLERANCE && to_f32.0 <= TOLERANCE && early.0 <= TOLERANCE / 10.0);
    Ok(())
}

#[test]
fn the_model_loads_and_tells_its_size() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let seen = incipit(&["inspect", "model", &arg(model(&shared)), "--json"])?.ok()?;
    let seen: serde_json::Value = serde_json::from_str(&seen.stdout)?;
    ensure!(seen["parameters"] == 11_245_312, "{seen}");
    let text = "Dear reader , this is";
    let said = incipit(&["generate", "--model", &arg(model(&shared)), "--input", text])?.ok()?;
    ensure!(said.stdout.lines().count() == 1, "{}", said.stdout);
    Ok(())
}

#[test]
fn both_tokenizer_files_give_the_same_ids_on_every_text() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    std::fs::copy(model(&shared).join("spiece.model"), dir.path().join("spiece.model"))?;
    let fast = incipit_weights::load_tokenizer(&model(&shared))?;
    let pieces = incipit_weights::load_tokenizer(dir.path())?;
    let config = Config::from_json(&std::fs::read_to_string(model(&shared).join("config.json"))?)?;
    let mut tokens = 0;
    for (name, texts) in labelled(&shared)?.into_iter().chain(fewglue(&shared)?) {
        let [fast, pieces] =
            [&fast, &pieces].map(|tokenizer| tokenize(&texts, tokenizer, 4096, 64, config.vocab_size));
        let (fast, pieces) = (fast?, pieces?);
        for ((a, b), text) in fast.examples.iter().zip(&pieces.examples).zip(&texts) {
            ensure!(a == b, "{name}, line {}: {:?}", text.line, text.inputs);
            ensure!(a.input.ends_with(&[1]) && a.target.ends_with(&[1]), "{name}, line {}", text.line);
            tokens += a.input.len() + a.target.len();
        }
    }
    println!("{tokens} tokens");
    ensure!(tokens > 100_000, "only {tokens} tokens");
    Ok(())
}

#[test]
fn every_data_set_is_read_with_its_template() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let sets = labelled(&shared)?;
    let size = |name: &str| sets.iter().find(|set| set.0 == name).map(|set| set.1.len());
    ensure!(size("sst2/train") == Some(6920) && size("trec/dev") == Some(500), "other sizes");
    ensure!(size("subj/test") == Some(1000) && size("mrpc/train") == Some(3668), "other sizes");
    ensure!(size("rte/train") == Some(2567), "other sizes");
    for (name, examples) in fewglue(&shared)? {
        ensure!(examples.len() == 32, "{name} has {} examples", examples.len());
        let whole = |e: &TextExample| !e.inputs.contains('{') && !e.targets.is_empty();
        ensure!(examples.iter().all(whole), "{name}");
    }
    Ok(())
}

#[test]
fn a_field_that_holds_more_than_a_text_is_refused_with_its_line() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    for (name, inputs) in NESTED {
        let path = shared.join(format!("data/fewglue/{name}/train.jsonl"));
        let error = load_text(&path, &format(inputs, "{idx}", None)?, LoadOptions::default()).err();
        let error = error.with_context(|| format!("{name} was read"))?.to_string();
        println!("{error}");
        ensure!(error.contains("line 1") && error.contains("passage"), "{error}");
    }
    Ok(())
}
