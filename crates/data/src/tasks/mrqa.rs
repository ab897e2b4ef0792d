//! The data sets of MRQA 2019: one JSON object a line, a passage with questions, after a line that tells the data set.

use super::{Draft, ExampleId, Reading, fields, punctuation};
use crate::error::Problem;
use crate::metrics::{Reference, is_space};
use crate::source::Record;

/// The field that only a file's first line has.
const HEADER: &str = "header";

/// An example for each question. The target is the first answer that was found in the passage, and every listed
/// answer is accepted.
pub(super) fn drafts(record: &Record, reading: Reading) -> Result<Vec<Draft>, Problem> {
    let task = reading.task;
    if reading.index == 0 && record.contains_key(HEADER) {
        return Ok(Vec::new());
    }
    let context = single_spaced(fields::text(record, "context", task)?);
    let mut drafts = Vec::new();
    for asked in fields::objects(record, "qas", task)? {
        let question = single_spaced(fields::text(asked, "question", task)?);
        let id = ExampleId::Key(fields::text(asked, "qid", task)?.to_owned());
        let inputs = punctuation::question_about(&question, &context);
        let (target, reference) = answers(asked, reading)?.unzip();
        drafts.push(Draft { inputs, target, id, reference, referent: None });
    }
    Ok(drafts)
}

/// A question's target and what is accepted.
fn answers(asked: &Record, reading: Reading) -> Result<Option<(String, Reference)>, Problem> {
    let task = reading.task;
    if reading.may_lack_label && !asked.contains_key("answers") {
        return Ok(None);
    }
    let found = fields::objects(asked, "detected_answers", task)?;
    let accepted = fields::texts(asked, "answers", task)?;
    let target = match found.first() {
        Some(first) => fields::text(first, "text", task)?,
        None => return Err(Problem::NoLabel { task: task.name, fields: "`detected_answers`".to_owned() }),
    };
    if accepted.is_empty() {
        return Err(Problem::NoLabel { task: task.name, fields: "`answers`".to_owned() });
    }
    let accepted: Vec<String> = accepted.into_iter().map(single_spaced).collect();
    let reference = punctuation::reference(accepted.iter().map(String::as_str));
    Ok(Some((punctuation::apart(&single_spaced(target)), reference)))
}

/// Each run of white space, in Python's sense, as one space.
fn single_spaced(text: &str) -> String {
    let mut single = String::with_capacity(text.len());
    for c in text.chars() {
        match is_space(c) {
            true if single.ends_with(' ') => {}
            true => single.push(' '),
            false => single.push(c),
        }
    }
    single
}
