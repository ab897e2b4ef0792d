//! MultiRC: is this answer to this question about this passage right? A record is a passage.

use super::{Draft, ExampleId, Reading, fields};
use crate::error::Problem;
use crate::metrics::Reference;
use crate::source::Record;

/// An example for each answer to each question, scored with those of its question.
pub(super) fn drafts(record: &Record, reading: Reading) -> Result<Vec<Draft>, Problem> {
    let task = reading.task;
    let number = fields::number(record, "idx", task)?;
    let passage = fields::object(record, "passage", task)?;
    let paragraph = fields::text(passage, "text", task)?;
    let mut drafts = Vec::new();
    for question in fields::objects(passage, "questions", task)? {
        let (asked, group) =
            (fields::text(question, "question", task)?, fields::number(question, "idx", task)?);
        for answer in fields::objects(question, "answers", task)? {
            let text = fields::text(answer, "text", task)?;
            let inputs = without_markup(&format!("question: {asked} answer: {text} paragraph: {paragraph}"));
            let label = fields::label(answer, &["label"], task.labels, reading)?;
            let id = ExampleId::Answer {
                passage: number,
                question: group,
                answer: fields::number(answer, "idx", task)?,
            };
            let target = label.map(|label| task.labels[label].to_owned());
            let grouped =
                |target: &String| Reference { group: Some((number, group)), ..Reference::of(target) };
            let reference = target.as_ref().map(grouped);
            drafts.push(Draft { inputs, target, id, reference, referent: None });
        }
    }
    Ok(drafts)
}

fn without_markup(text: &str) -> String {
    text.replace("<br>", " ").replace("<b>", "").replace("</b>", "")
}
