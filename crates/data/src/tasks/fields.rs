//! A record's fields, each checked to be what the task needs.

use serde_json::Value;

use super::{Reading, Task};
use crate::error::Problem;
use crate::source::Record;
use crate::template::{field_list, kind};

/// The first of these fields that a record has; they are one thing's names in different files.
pub(super) fn any<'a>(record: &'a Record, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
    names.iter().find_map(|&name| Some((name, record.get(name)?)))
}

/// A text, under one of its names.
pub(super) fn text_of<'a>(
    record: &'a Record,
    names: &[&'static str],
    task: &Task,
) -> Result<&'a str, Problem> {
    match any(record, names) {
        Some((_, Value::String(text))) => Ok(text),
        Some((name, other)) => Err(wrong(task, name, other, "a text")),
        None => Err(missing(task, &names.join("` or `"), record)),
    }
}

pub(super) fn text<'a>(record: &'a Record, name: &'static str, task: &Task) -> Result<&'a str, Problem> {
    text_of(record, &[name], task)
}

/// A number from 0.
pub(super) fn number(record: &Record, name: &'static str, task: &Task) -> Result<u64, Problem> {
    let value = value(record, name, task)?;
    value.as_u64().ok_or_else(|| wrong(task, name, value, "a number from 0"))
}

pub(super) fn object<'a>(record: &'a Record, name: &'static str, task: &Task) -> Result<&'a Record, Problem> {
    let value = value(record, name, task)?;
    value.as_object().ok_or_else(|| wrong(task, name, value, "an object"))
}

/// The objects of a list.
pub(super) fn objects<'a>(
    record: &'a Record,
    name: &'static str,
    task: &Task,
) -> Result<Vec<&'a Record>, Problem> {
    list(record, name, task, ("a list of objects", Value::as_object))
}

/// The texts of a list.
pub(super) fn texts<'a>(
    record: &'a Record,
    name: &'static str,
    task: &Task,
) -> Result<Vec<&'a str>, Problem> {
    list(record, name, task, ("a list of texts", Value::as_str))
}

/// A list that is `needed`, of which `item` takes each part.
fn list<'a, T: ?Sized>(
    record: &'a Record,
    name: &'static str,
    task: &Task,
    (needed, item): (&'static str, fn(&'a Value) -> Option<&'a T>),
) -> Result<Vec<&'a T>, Problem> {
    let whole = value(record, name, task)?;
    let refuse = |found| wrong(task, name, found, needed);
    let items = whole.as_array().ok_or_else(|| refuse(whole))?;
    items.iter().map(|each| item(each).ok_or_else(|| refuse(each))).collect()
}

/// Which of `labels` a record has under one of these names: false and true or their numbers, or its text. None if
/// the split may lack labels and this record does.
pub(super) fn label(
    record: &Record,
    names: &[&'static str],
    labels: &[&'static str],
    reading: Reading,
) -> Result<Option<usize>, Problem> {
    let task = reading.task;
    let found = any(record, names).filter(|(_, value)| !value.is_null());
    let Some((_, value)) = found else {
        let fields = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ");
        return match reading.may_lack_label {
            true => Ok(None),
            false => Err(Problem::NoLabel { task: task.name, fields }),
        };
    };
    let index = match value {
        Value::Bool(value) => Some(usize::from(*value)),
        Value::Number(number) => number.as_u64().map(|number| number as usize),
        Value::String(text) => labels.iter().position(|label| label == text).or_else(|| text.parse().ok()),
        _ => None,
    };
    // TFDS's own mark of a record without a label, which some copies of the files have taken over.
    let unlabelled = value.as_i64() == Some(-1) || value.as_str() == Some("-1");
    match index.filter(|&index| index < labels.len()) {
        Some(index) => Ok(Some(index)),
        None if unlabelled && reading.may_lack_label => Ok(None),
        None => {
            Err(Problem::NotALabel { task: task.name, label: value.to_string(), labels: labels.join(", ") })
        }
    }
}

fn value<'a>(record: &'a Record, name: &'static str, task: &Task) -> Result<&'a Value, Problem> {
    record.get(name).ok_or_else(|| missing(task, name, record))
}

fn missing(task: &Task, name: &str, record: &Record) -> Problem {
    Problem::NotTheTasksRecord { task: task.name, field: name.to_owned(), available: field_list(record) }
}

fn wrong(task: &Task, name: &str, found: &Value, needed: &'static str) -> Problem {
    Problem::WrongValue { task: task.name, field: name.to_owned(), found: kind(found), needed }
}
