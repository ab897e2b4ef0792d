//! The named tasks against T5's own preprocessing, postprocessing and metrics; `scripts/goldens/tasks/make.py` made
//! the files and what is expected of them.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::golden;
use incipit_data::metrics::{Metric, Reference, legal_share};
use incipit_data::tasks::{
    Family, Split, Task, TaskExample, TaskSplit, Use, super_glue_average, transferred_labels,
};
use incipit_data::{LoadOptions, TextExample, load_text};
use serde_json::Value;
use std::path::Path;
use std::slice::from_ref;

fn goldens(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden("tasks").join(name)).unwrap()).unwrap()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap()
}

fn texts(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

fn split(name: &str) -> Split {
    Split::ALL.into_iter().find(|split| split.name() == name).unwrap()
}

fn read(task: &str, dir: &Path, split: Split, purpose: Use) -> TaskSplit {
    Task::named(task).unwrap().read(dir, split, purpose, LoadOptions::default()).unwrap()
}

/// Asserts that an example is the expected one, byte for byte.
#[track_caller]
fn assert_example(found: &TaskExample, expected: &Value, place: &str) {
    assert_eq!(found.text.inputs, expected["inputs"].as_str().unwrap(), "{place}");
    let target = expected["targets"].as_str().unwrap();
    assert_eq!(found.text.targets, target, "{place}");
    assert_eq!(found.reference.is_none(), target.is_empty(), "{place}");
    if let Some(referent) = expected.get("referent") {
        assert_eq!(found.referent.as_deref(), referent.as_str(), "{place}");
    }
    let Some(reference) = &found.reference else { return };
    let answers = expected.get("answers").map_or_else(|| vec![target.to_owned()], texts);
    assert_eq!(reference.answers, answers, "{place}");
    assert_eq!(reference.holds, expected.get("holds").is_none_or(|holds| holds == true), "{place}");
    let group = expected.get("group").map(|group| group.as_u64().unwrap());
    assert_eq!(reference.group.map(|(_, question)| question), group, "{place}");
}

#[test]
fn examples_equal_t5s_byte_for_byte() {
    let goldens = goldens("examples.json");
    for expected in list(&goldens, "splits") {
        let (task, name) = (expected["task"].as_str().unwrap(), expected["split"].as_str().unwrap());
        let purpose = if expected["use"] == "training" { Use::Training } else { Use::Evaluation };
        let found = read(task, &golden("tasks/data"), split(name), purpose);
        let examples = list(expected, "examples");
        assert_eq!(found.examples.len(), examples.len(), "{task} {name}");
        for (i, (found, expected)) in found.examples.iter().zip(examples).enumerate() {
            assert_example(found, expected, &format!("{task} {name} {i}"));
            assert_eq!(found.text.index, i);
        }
    }
}

#[test]
fn a_tasks_own_folder_does_as_well_as_the_one_that_holds_it() {
    let data = golden("tasks/data");
    for (task, folder) in
        [("boolq", "BoolQ"), ("sst2", "SST-2"), ("squad", "SQuAD"), ("mrqa-hotpotqa", "MRQA")]
    {
        let read = |dir: &Path| read(task, dir, Split::Dev, Use::Evaluation).examples;
        assert_eq!(read(&data), read(&data.join(folder)), "{task}");
    }
}

#[test]
fn glues_tables_of_mrpc_give_what_microsofts_file_gives() {
    let folder = common::Folder::new();
    let whole = std::fs::read_to_string(golden("tasks/data/MRPC/msr_paraphrase_train.txt")).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    folder.write("train.tsv", [lines[0], lines[1], lines[3]].join("\n"));
    folder.write("dev.tsv", [lines[0], lines[2]].join("\r\n"));
    for split in [Split::Train, Split::Dev] {
        let texts = |dir: &Path| -> Vec<(String, String)> {
            let found = read("mrpc", dir, split, Use::Evaluation);
            found.texts().into_iter().map(|text| (text.inputs, text.targets)).collect()
        };
        assert_eq!(texts(&folder.path("")), texts(&golden("tasks/data")), "{split}");
    }
}

#[test]
fn incomplete_rows_of_a_glue_table_are_left_out_and_counted() {
    let found = read("qqp", &golden("tasks/data"), Split::Train, Use::Training);
    assert_eq!((found.examples.len(), found.dropped, found.skipped), (2, 2, 0));
}

/// A 64-bit hash of a text, as the golden has it.
fn fnv(text: &str) -> String {
    let step = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

#[test]
fn fewglues_records_make_the_examples_that_t5_makes() {
    let Some(shared) = std::env::var_os("INCIPIT_SHARED").filter(|dir| Path::new(dir).is_dir()) else {
        println!("skipped: INCIPIT_SHARED names no directory with the labelled data");
        return;
    };
    let fewglue = Path::new(&shared).join("data/fewglue");
    let goldens = goldens("fewglue.json");
    assert_eq!(list(&goldens, "splits").len(), 16);
    let mut count = 0;
    for expected in list(&goldens, "splits") {
        let (task, purpose) = expected["split"].as_str().unwrap().split_once(' ').unwrap();
        let purpose = if purpose == "training" { Use::Training } else { Use::Evaluation };
        let found = read(task, &fewglue, Split::Train, purpose);
        let hash = |e: &TaskExample| fnv(&format!("{}\x1f{}", e.text.inputs, e.text.targets));
        let hashes: Vec<String> = found.examples.iter().map(hash).collect();
        assert_eq!(hashes, texts(&expected["hashes"]), "{task} {purpose:?}");
        count += hashes.len();
    }
    println!("{count} examples are T5's");
}

#[test]
fn label_string_files_give_what_templates_give() {
    let Some(shared) = std::env::var_os("INCIPIT_SHARED").filter(|dir| Path::new(dir).is_dir()) else {
        println!("skipped: INCIPIT_SHARED names no directory with the labelled data");
        return;
    };
    let data = Path::new(&shared).join("data");
    let pair = "sentence1: {sentence1} sentence2: {sentence2}";
    let two = "hypothesis: {hypothesis} premise: {premise}";
    for (name, inputs) in [
        ("trec", "question: {question}"),
        ("subj", "sentence: {sentence}"),
        ("sst2", "sentence: {sentence}"),
        ("mrpc", pair),
        ("rte", two),
    ] {
        for split in Split::ALL {
            let found = read(name, &data, split, Use::Evaluation).texts();
            let path = data.join(name).join(format!("{split}.jsonl"));
            let expected = load_text(&path, &common::format(inputs, "{label}", None), LoadOptions::default());
            let bare = |texts: &[TextExample]| -> Vec<(String, String)> {
                texts.iter().map(|text| (text.inputs.clone(), text.targets.clone())).collect()
            };
            assert_eq!(bare(&found), bare(&expected.unwrap().examples), "{name} {split}");
        }
    }
}

/// The references of a golden case.
fn references(case: &Value) -> Vec<Reference> {
    let group = |i: usize| case.get("groups").map(|groups| (0, groups[i].as_u64().unwrap()));
    let holds = |i: usize| case.get("holds").is_none_or(|holds| holds[i] == true);
    let answers = case.get("answers").unwrap_or(&case["targets"]).as_array().unwrap();
    let reference = |(i, answers): (usize, &Value)| Reference {
        answers: answers.as_str().map_or_else(|| texts(answers), |answer| vec![answer.to_owned()]),
        group: group(i),
        holds: holds(i),
    };
    answers.iter().enumerate().map(reference).collect()
}

#[test]
fn scores_equal_t5s() {
    let goldens = goldens("metrics.json");
    let cases = list(&goldens, "cases");
    assert!(cases.len() > 30);
    for case in cases {
        let task = Task::named(case["task"].as_str().unwrap()).unwrap();
        let scores = task.scores(&texts(&case["predictions"]), &references(case));
        assert_eq!(scores.len(), case["scores"].as_object().unwrap().len(), "{task}");
        for (metric, score) in scores {
            let expected = case["scores"][metric.name()].as_f64().unwrap();
            assert!((score - expected).abs() < 1e-12, "{task}: {metric} {score} is not {expected}");
        }
    }
}

#[test]
fn a_prediction_names_a_referent_as_t5_judges_it() {
    let goldens = goldens("metrics.json");
    let case = list(&goldens, "cases").iter().find(|case| case["task"] == "wsc").unwrap();
    let predictions = texts(&case["predictions"]);
    for (i, (prediction, reference)) in predictions.iter().zip(references(case)).enumerate() {
        let task = Task::named("wsc").unwrap();
        let [(Metric::Containment, score)] = task.scores(from_ref(prediction), from_ref(&reference))[..]
        else {
            panic!("one score");
        };
        assert_eq!(score == 1.0, case["right"][i] == true, "{prediction:?} {reference:?}");
    }
}

#[test]
fn answers_without_tokens_have_no_words_in_common() {
    // SQuAD 1.1's script gives such a pair an exact match and an F1 of 0; version 2.0's gives both 1.
    let scores = Task::named("squad").unwrap().scores(&["the".to_owned()], &[Reference::of("A")]);
    assert_eq!(scores, [(Metric::ExactMatch, 1.0), (Metric::TokenF1, 0.0)]);
}

#[test]
fn a_checkpoint_is_chosen_by_the_mean_or_by_the_metric_that_counts() {
    let choose = |task: &str, scores: &[(Metric, f64)]| Task::named(task).unwrap().selection.score(scores);
    assert_eq!(choose("cb", &[(Metric::MacroF1, 0.5), (Metric::Accuracy, 1.0)]), 0.75);
    assert_eq!(choose("squad", &[(Metric::ExactMatch, 0.5), (Metric::TokenF1, 0.9)]), 0.9);
}

#[test]
fn super_glues_average_is_the_mean_of_the_eight_tasks_means() {
    // The paper's table of T5-XXL, whose average it gives as 90.5.
    let paper: [(&str, &[f64]); 8] = [
        ("boolq", &[91.1]),
        ("cb", &[99.0, 99.3]),
        ("copa", &[98.8]),
        ("multirc", &[88.7, 65.7]),
        ("record", &[92.7, 93.4]),
        ("rte", &[92.6]),
        ("wic", &[76.2]),
        ("wsc", &[95.8]),
    ];
    let mut scores: Vec<(&Task, Vec<(Metric, f64)>)> = Vec::new();
    for (name, values) in paper {
        let task = Task::named(name).unwrap();
        assert_eq!(task.metrics.len(), values.len(), "{task}");
        let of = |(&metric, value): (&Metric, &f64)| (metric, value / 100.0);
        scores.push((task, task.metrics.iter().zip(values).map(of).collect()));
    }
    let average = super_glue_average(&scores).unwrap();
    assert!((average - 0.9049).abs() < 1e-4, "{average}");
    let last = scores.pop().unwrap();
    assert_eq!(super_glue_average(&scores), None);
    scores.extend([last.clone(), last]);
    assert_eq!(super_glue_average(&scores), None);
}

#[test]
fn paraphrase_tasks_and_no_others_know_each_others_labels() {
    let rewritten = |trained: &str, evaluated: &str| {
        let map = transferred_labels(Task::named(trained).unwrap(), Task::named(evaluated).unwrap());
        map.map(|map| map.to_string())
    };
    assert_eq!(rewritten("qqp", "mrpc").unwrap(), "not_duplicate=not_equivalent,duplicate=equivalent");
    assert_eq!(rewritten("mrpc", "qqp").unwrap(), "not_equivalent=not_duplicate,equivalent=duplicate");
    for (trained, evaluated) in [("qqp", "qqp"), ("mrpc", "mrpc"), ("qqp", "glue-rte"), ("rte", "glue-rte")] {
        assert_eq!(rewritten(trained, evaluated), None, "{trained} {evaluated}");
    }
}

#[test]
fn the_share_of_legal_labels_is_known_of_tasks_with_labels() {
    let predictions = ["True", "true", " False", "?"].map(str::to_owned);
    let share = |task: &str| {
        let labels = Task::named(task).unwrap().label_texts();
        labels.map(|labels| legal_share(&predictions, &labels))
    };
    assert_eq!(share("boolq"), Some(0.5));
    assert_eq!(share("record"), None);
}

#[test]
fn every_task_is_whole_and_has_a_name_of_its_own() {
    let mut names = std::collections::BTreeSet::new();
    for task in Task::all() {
        assert!(names.insert(task.name), "{task}");
        assert_eq!(Task::named(task.name).unwrap().name, task.name);
        assert!(!task.metrics.is_empty() && !task.title.is_empty(), "{task}");
        assert!(task.splits().any(|split| split == Split::Dev), "{task}");
        let free =
            matches!(task.family, Family::Squad | Family::Mrqa) || matches!(task.name, "record" | "wsc");
        assert_eq!(task.labels.is_empty(), free, "{task}");
        assert!(task.labels.is_empty() || task.init_words == task.labels, "{task}");
    }
    assert_eq!(names.len(), 29);
}
