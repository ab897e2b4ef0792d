//! The files of predictions that SuperGLUE's and GLUE's sites take.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{ExampleId, Family, Form, Task, TaskExample};
use crate::error::{Error, Result};
use crate::metrics::names_referent;

/// A task's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submission {
    /// Its name on the site, such as `BoolQ.jsonl` or `SST-2.tsv`.
    pub file_name: String,
    /// What it holds: of SuperGLUE a JSON object a line, of GLUE a table of the columns `index` and `prediction`.
    pub text: String,
    /// How many predictions are no label. The site has no word for that, so the file has the task's first label
    /// instead.
    pub illegal: usize,
}

/// The file of a task's predictions for examples, which need no labels.
///
/// # Errors
/// A task that is neither of SuperGLUE nor of GLUE.
///
/// # Panics
/// If there are not as many predictions as examples.
pub fn submission(task: &Task, examples: &[TaskExample], predictions: &[String]) -> Result<Submission> {
    assert_eq!(examples.len(), predictions.len(), "one prediction an example");
    if !matches!(task.family, Family::SuperGlue | Family::Glue) {
        return Err(Error::NoSubmission { task: task.name });
    }
    let mut illegal = 0;
    let mut labels = Vec::with_capacity(examples.len());
    for (example, prediction) in examples.iter().zip(predictions) {
        let found = label(task, example, prediction);
        illegal += usize::from(found.is_none());
        labels.push(found.unwrap_or_else(|| official(task, 0)));
    }
    let pairs = examples.iter().map(|example| &example.id).zip(labels);
    let (file_name, text) = match task.family {
        Family::Glue => (format!("{}.tsv", glue_name(task)), table(pairs)),
        _ => (format!("{}.jsonl", task.folder), json_lines(task, pairs)),
    };
    Ok(Submission { file_name, text, illegal })
}

/// SuperGLUE's file.
fn json_lines<'a>(task: &Task, pairs: impl Iterator<Item = (&'a ExampleId, Value)>) -> String {
    let records = match task.form {
        Form::MultiRc => passages(pairs),
        _ => pairs.map(|(id, label)| json!({"idx": number(id), "label": label})).collect(),
    };
    records.iter().map(|record| format!("{record}\n")).collect()
}

/// GLUE's file.
fn table<'a>(pairs: impl Iterator<Item = (&'a ExampleId, Value)>) -> String {
    let mut text = "index\tprediction\n".to_owned();
    for (id, label) in pairs {
        let label = label.as_str().map_or_else(|| label.to_string(), str::to_owned);
        text.push_str(&format!("{}\t{label}\n", number(id)));
    }
    text
}

/// What GLUE's site calls a task: its folder, but for the two test sets of MNLI.
fn glue_name(task: &Task) -> &str {
    match task.name {
        "mnli" => "MNLI-m",
        "mnli-mismatched" => "MNLI-mm",
        _ => task.folder,
    }
}

/// The label for a prediction; none if it is not one.
fn label(task: &Task, example: &TaskExample, prediction: &str) -> Option<Value> {
    match task.form {
        Form::ReCoRd => Some(prediction.trim().into()),
        Form::Wsc => {
            let referent = example.referent.as_deref().unwrap_or_default();
            let named = names_referent(prediction, referent)?;
            Some(if named { "True" } else { "False" }.into())
        }
        _ => {
            let index = task.labels.iter().position(|&label| label == prediction.trim())?;
            Some(official(task, index))
        }
    }
}

/// The site's word for a label: numbers for COPA, MultiRC, SST-2, MRPC and QQP, lower case for truth values but WSC's.
fn official(task: &Task, index: usize) -> Value {
    match (&task.form, task.labels) {
        (Form::Wsc, _) => "False".into(),
        (Form::MultiRc, _) | (_, ["choice1", "choice2"]) => index.into(),
        _ if matches!(task.name, "sst2" | "mrpc" | "qqp") => index.into(),
        (_, ["False", "True"]) => ["false", "true"][index].into(),
        (_, labels) => labels.get(index).copied().unwrap_or_default().into(),
    }
}

fn number(id: &ExampleId) -> Value {
    match id {
        ExampleId::Number(number) => (*number).into(),
        ExampleId::Answer { answer, .. } => (*answer).into(),
        ExampleId::Query { query, .. } => (*query).into(),
        ExampleId::Key(key) => key.as_str().into(),
    }
}

/// MultiRC's records: a passage's questions with their answers, in the order of their numbers.
fn passages<'a>(pairs: impl Iterator<Item = (&'a ExampleId, Value)>) -> Vec<Value> {
    let mut passages: BTreeMap<u64, BTreeMap<u64, Vec<Value>>> = BTreeMap::new();
    for (id, label) in pairs {
        if let ExampleId::Answer { passage, question, answer } = id {
            let answers = passages.entry(*passage).or_default().entry(*question).or_default();
            answers.push(json!({"idx": answer, "label": label}));
        }
    }
    let question = |(idx, answers): (u64, Vec<Value>)| json!({"idx": idx, "answers": answers});
    let passage = |(idx, questions): (u64, BTreeMap<u64, Vec<Value>>)| {
        let questions: Vec<Value> = questions.into_iter().map(question).collect();
        json!({"idx": idx, "passage": {"questions": questions}})
    };
    passages.into_iter().map(passage).collect()
}
