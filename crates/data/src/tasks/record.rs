//! ReCoRD: which of a passage's entities does `@placeholder` in a query stand for? A record is a passage.

use std::collections::{BTreeSet, HashSet};

use super::{Draft, ExampleId, Reading, Use, fields};
use crate::error::Problem;
use crate::metrics::Reference;
use crate::source::Record;

/// What stands between a news text and each of its highlights.
const HIGHLIGHT: &str = "\n@highlight\n";

/// For training, an example for each answer to each query; for evaluation, one for each query.
pub(super) fn drafts(record: &Record, reading: Reading) -> Result<Vec<Draft>, Problem> {
    let task = reading.task;
    let number = fields::number(record, "idx", task)?;
    let passage = fields::object(record, "passage", task)?;
    let text = fields::text(passage, "text", task)?;
    let entities = entities(text, passage, reading)?;
    let entities: Vec<&str> = entities.iter().map(String::as_str).collect();
    let (entities, text) = (entities.join(", "), with_highlights(text));
    let mut drafts = Vec::new();
    let mut seen = HashSet::new();
    for query in fields::objects(record, "qas", task)? {
        let id = fields::number(query, "idx", task)?;
        let inputs =
            format!("query: {} entities: {entities} passage: {text}", fields::text(query, "query", task)?);
        let id = ExampleId::Query { passage: number, query: id };
        let answers = answers(query, reading)?;
        let draft = |target: Option<&String>| Draft {
            inputs: inputs.clone(),
            target: target.cloned(),
            id: id.clone(),
            reference: target.map(|_| Reference { answers: answers.clone(), group: None, holds: true }),
            referent: None,
        };
        match (reading.purpose, answers.as_slice()) {
            (_, []) => drafts.push(draft(None)),
            (Use::Evaluation, _) if !seen.insert(id.clone()) => {}
            (Use::Evaluation, all) => drafts.push(draft(all.first())),
            (Use::Training, all) => drafts.extend(all.iter().map(|answer| draft(Some(answer)))),
        }
    }
    Ok(drafts)
}

/// The distinct answers to a query, sorted; none only if the split may lack them.
fn answers(query: &Record, reading: Reading) -> Result<Vec<String>, Problem> {
    let listed = match query.get("answers") {
        None if reading.may_lack_label => Vec::new(),
        _ => fields::objects(query, "answers", reading.task)?,
    };
    let texts: BTreeSet<&str> =
        listed.iter().map(|answer| fields::text(answer, "text", reading.task)).collect::<Result<_, _>>()?;
    if texts.is_empty() && !reading.may_lack_label {
        let fields = "`answers`".to_owned();
        return Err(Problem::NoLabel { task: reading.task.name, fields });
    }
    Ok(texts.into_iter().map(str::to_owned).collect())
}

/// The distinct texts of the entities, sorted. Their places count characters, and the last is the entity's own.
fn entities(text: &str, passage: &Record, reading: Reading) -> Result<BTreeSet<String>, Problem> {
    let task = reading.task;
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let length = starts.len() - 1;
    let mut entities = BTreeSet::new();
    for entity in fields::objects(passage, "entities", task)? {
        let (start, end) = (fields::number(entity, "start", task)?, fields::number(entity, "end", task)?);
        let (first, last) = (start as usize, (end as usize).min(length.saturating_sub(1)));
        if first > last || first >= length {
            let what = format!("an entity lies at {start} to {end}, and the passage has {length} characters");
            return Err(Problem::Inconsistent { what });
        }
        entities.insert(text[starts[first]..starts[last + 1]].to_owned());
    }
    Ok(entities)
}

/// The passage with its highlights as sentences.
fn with_highlights(text: &str) -> String {
    let mut joined = String::with_capacity(text.len());
    for (i, part) in text.split(HIGHLIGHT).enumerate() {
        if i > 0 {
            let ended = joined.ends_with(['.', '?', '!', '"', '\'']);
            joined.push_str(if ended { " " } else { ". " });
        }
        joined.push_str(part);
    }
    joined
}
