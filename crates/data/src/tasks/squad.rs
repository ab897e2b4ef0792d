//! SQuAD 1.1: one JSON file of articles, each of paragraphs with questions.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{Draft, ExampleId, Reading, Task, fields, punctuation};
use crate::error::{Error, Problem, Result};
use crate::source::Record;

/// The questions of a file, each a record of `id`, `question`, `context` and `answers` (a list of texts).
pub(super) fn questions(task: &'static Task, path: &Path) -> Result<Vec<Result<Record, Problem>>> {
    let bytes = fs::read(path).map_err(|cause| Error::Open { path: path.to_path_buf(), cause })?;
    if bytes.is_empty() {
        return Err(Error::EmptyFile { path: path.to_path_buf() });
    }
    let file: Record = serde_json::from_slice(&bytes).map_err(|error| {
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default().to_owned();
        Error::MalformedFile { path: path.to_path_buf(), line: error.line(), column: error.column(), what }
    })?;
    let mut questions = Vec::new();
    match fields::objects(&file, "data", task) {
        Err(problem) => questions.push(Err(problem)),
        Ok(articles) => articles.into_iter().for_each(|article| push_article(task, article, &mut questions)),
    }
    Ok(questions)
}

/// Adds an article's questions, or what is wrong with it.
fn push_article(task: &Task, article: &Record, questions: &mut Vec<Result<Record, Problem>>) {
    let paragraphs = match fields::objects(article, "paragraphs", task) {
        Err(problem) => return questions.push(Err(problem)),
        Ok(paragraphs) => paragraphs,
    };
    for paragraph in paragraphs {
        let parts = fields::text(paragraph, "context", task)
            .and_then(|context| Ok((context, fields::objects(paragraph, "qas", task)?)));
        match parts {
            Err(problem) => questions.push(Err(problem)),
            Ok((context, asked)) => {
                questions.extend(asked.into_iter().map(|one| question(task, context, one)));
            }
        }
    }
}

fn question(task: &Task, context: &str, asked: &Record) -> Result<Record, Problem> {
    let answers = match asked.get("answers") {
        None => Vec::new(),
        Some(_) => fields::objects(asked, "answers", task)?,
    };
    let answers: Vec<Value> = answers
        .iter()
        .map(|answer| Ok(fields::text(answer, "text", task)?.into()))
        .collect::<Result<_, _>>()?;
    let mut record = Record::new();
    record.insert("id".into(), fields::text(asked, "id", task)?.into());
    record.insert("question".into(), fields::text(asked, "question", task)?.into());
    record.insert("context".into(), context.into());
    record.insert("answers".into(), answers.into());
    Ok(record)
}

/// The example of a question; its target is the first answer.
pub(super) fn draft(record: &Record, reading: Reading) -> Result<Draft, Problem> {
    let task = reading.task;
    let (question, context) =
        (fields::text(record, "question", task)?, fields::text(record, "context", task)?);
    let answers = fields::texts(record, "answers", task)?;
    if answers.is_empty() && !reading.may_lack_label {
        return Err(Problem::NoLabel { task: task.name, fields: "`answers`".to_owned() });
    }
    let target = answers.first().map(|answer| punctuation::apart(answer));
    let reference = (!answers.is_empty()).then(|| punctuation::reference(answers));
    let id = ExampleId::Key(fields::text(record, "id", task)?.to_owned());
    let inputs = punctuation::question_about(question, context);
    Ok(Draft { inputs, target, id, reference, referent: None })
}
