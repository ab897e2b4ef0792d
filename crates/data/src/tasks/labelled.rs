//! Tasks whose input is some text fields, each after its name, and whose target is a label.

use super::{Draft, ExampleId, Reading, fields};
use crate::error::Problem;
use crate::metrics::Reference;
use crate::source::Record;

/// The fields of such a task's records.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fields {
    /// The text fields in the order of the input (T5 sorts them by name): the name that the input gives each, and
    /// the names that files give it.
    pub(super) texts: &'static [(&'static str, &'static [&'static str])],
    /// The names that files give the label.
    pub(super) label: &'static [&'static str],
}

pub(super) fn draft(record: &Record, names: &Fields, reading: Reading) -> Result<Draft, Problem> {
    let task = reading.task;
    let mut inputs = String::new();
    for (key, columns) in names.texts {
        let space = if inputs.is_empty() { "" } else { " " };
        inputs.push_str(&format!("{space}{key}: {}", fields::text_of(record, columns, task)?));
    }
    let label = fields::label(record, names.label, task.labels, reading)?;
    let id = record.get("idx").and_then(serde_json::Value::as_u64).unwrap_or(reading.index as u64);
    let target = label.map(|label| task.labels[label].to_owned());
    let reference = target.as_deref().map(Reference::of);
    Ok(Draft { inputs, target, id: ExampleId::Number(id), reference, referent: None })
}
