//! The files of predictions that SuperGLUE's site takes.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{ExampleId, Family, Form, Task, TaskExample};
use crate::error::{Error, Result};
use crate::metrics::names_referent;

/// A task's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submission {
    /// Its name on the site, such as `BoolQ.jsonl`.
    pub file_name: String,
    /// What it holds: a JSON object a line.
    pub text: String,
    /// How many predictions are no label. The site has no word for that, so the file has the task's first label
    /// instead.
    pub illegal: usize,
}

/// The file of a task's predictions for examples, which need no labels.
///
/// # Errors
/// A task that is not of SuperGLUE.
///
/// # Panics
/// If there are not as many predictions as examples.
pub fn submission(task: &Task, examples: &[TaskExample], predictions: &[String]) -> Result<Submission> {
    assert_eq!(examples.len(), predictions.len(), "one prediction an example");
    if task.family != Family::SuperGlue {
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
    let records = match task.form {
        Form::MultiRc => passages(pairs),
        _ => pairs.map(|(id, label)| json!({"idx": number(id), "label": label})).collect(),
    };
    let text = records.iter().map(|record| format!("{record}\n")).collect();
    Ok(Submission { file_name: format!("{}.jsonl", task.folder), text, illegal })
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

/// The site's word for a label: numbers for COPA and MultiRC, lower case for truth values but WSC's.
fn official(task: &Task, index: usize) -> Value {
    match (&task.form, task.labels) {
        (Form::Wsc, _) => "False".into(),
        (Form::MultiRc, _) | (_, ["choice1", "choice2"]) => index.into(),
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
