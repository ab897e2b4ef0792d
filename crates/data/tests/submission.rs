//! SuperGLUE's and GLUE's files of predictions.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::golden;
use incipit_data::LoadOptions;
use incipit_data::tasks::{Split, Submission, Task, Use, submission};

/// The file of these predictions for a task's test split.
#[track_caller]
fn submit(task: &str, predictions: &[&str]) -> Submission {
    let task = Task::named(task).unwrap();
    let split =
        task.read(&golden("tasks/data"), Split::Test, Use::Evaluation, LoadOptions::default()).unwrap();
    let predictions: Vec<String> = predictions.iter().map(|&text| text.to_owned()).collect();
    submission(task, &split.examples, &predictions).unwrap()
}

#[test]
fn labels_are_the_sites_words() {
    for (task, prediction, file, line) in [
        ("boolq", "True", "BoolQ.jsonl", r#"{"idx":7,"label":"true"}"#),
        ("cb", "neutral", "CB.jsonl", r#"{"idx":7,"label":"neutral"}"#),
        ("copa", "choice2", "COPA.jsonl", r#"{"idx":7,"label":1}"#),
        ("rte", "not_entailment", "RTE.jsonl", r#"{"idx":7,"label":"not_entailment"}"#),
        ("wic", " False", "WiC.jsonl", r#"{"idx":7,"label":"false"}"#),
        ("wsc", "the dog", "WSC.jsonl", r#"{"idx":9,"label":"False"}"#),
        ("wsc", "Ann's big dog", "WSC.jsonl", r#"{"idx":9,"label":"True"}"#),
    ] {
        let expected = Submission { file_name: file.into(), text: format!("{line}\n"), illegal: 0 };
        assert_eq!(submit(task, &[prediction]), expected, "{task}");
    }
}

#[test]
fn a_prediction_that_is_no_label_is_counted_and_takes_the_first() {
    let found = submit("copa", &["choice3"]);
    assert_eq!((found.text.as_str(), found.illegal), ("{\"idx\":7,\"label\":0}\n", 1));
    assert_eq!(submit("wsc", &["the"]).illegal, 1);
}

#[test]
fn multircs_answers_are_grouped_by_passage_and_question() {
    let found = submit("multirc", &["True", "False", "True", "True"]);
    let first = r#"{"idx":30,"answers":[{"idx":300,"label":1},{"idx":301,"label":0},{"idx":302,"label":1}]}"#;
    let second = r#"{"idx":31,"answers":[{"idx":303,"label":1}]}"#;
    assert_eq!(found.file_name, "MultiRC.jsonl");
    assert_eq!(found.text, format!("{{\"idx\":3,\"passage\":{{\"questions\":[{first},{second}]}}}}\n"));
}

#[test]
fn records_labels_are_the_predicted_texts() {
    let found = submit("record", &["Émile", " Anna "]);
    assert_eq!(found.text, "{\"idx\":30,\"label\":\"Émile\"}\n{\"idx\":31,\"label\":\"Anna\"}\n");
}

#[test]
fn glues_files_are_tables_in_the_sites_words() {
    // File names, columns and label texts as GLUE's site describes them for a submission.
    for (task, predictions, file, rows) in [
        ("sst2", &["positive", " negative"][..], "SST-2.tsv", "0\t1\n1\t0\n"),
        ("mrpc", &["equivalent"], "MRPC.tsv", "0\t1\n"),
        ("qqp", &["not_duplicate"], "QQP.tsv", "0\t0\n"),
        ("glue-rte", &["not_entailment"], "RTE.tsv", "0\tnot_entailment\n"),
        ("mnli", &["contradiction"], "MNLI-m.tsv", "0\tcontradiction\n"),
        ("mnli-mismatched", &["neutral"], "MNLI-mm.tsv", "0\tneutral\n"),
    ] {
        let text = format!("index\tprediction\n{rows}");
        assert_eq!(
            submit(task, predictions),
            Submission { file_name: file.into(), text, illegal: 0 },
            "{task}"
        );
    }
    let illegal = submit("qqp", &["equivalent"]);
    assert_eq!((illegal.text.as_str(), illegal.illegal), ("index\tprediction\n0\t0\n", 1));
}

#[test]
fn other_tasks_have_no_submission() {
    let message = submission(Task::named("trec").unwrap(), &[], &[]).unwrap_err().to_string();
    assert_eq!(message, "the task trec has no submission file; only SuperGLUE's and GLUE's tasks have one");
}
