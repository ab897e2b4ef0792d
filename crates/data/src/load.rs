//! Text examples out of a file's records.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::{BadRecord, Error, Problem, Result};
use crate::labels::LabelMap;
use crate::source::{Record, location, read_records};
use crate::template::Template;

/// How many of the skipped records' errors are kept.
const KEPT_ERRORS: usize = 5;

/// How a record becomes an input and a target. By default they are its fields `inputs` and `targets`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskFormat {
    /// The input text.
    pub inputs: Template,
    /// The target text, before the label map.
    pub targets: Template,
    /// If given, maps the whole target.
    pub labels: Option<LabelMap>,
}

impl Default for TaskFormat {
    fn default() -> Self {
        Self { inputs: Template::field("inputs"), targets: Template::field("targets"), labels: None }
    }
}

impl TaskFormat {
    /// A record's input and target.
    pub fn render(&self, record: &Record) -> Result<(String, String), Problem> {
        let inputs = self.inputs.render(record)?;
        let target = self.targets.render(record)?;
        let target = match &self.labels {
            None => target,
            Some(map) => match map.get(&target) {
                Some(text) => text.to_owned(),
                None => return Err(Problem::UnknownLabel { label: target, map: map.to_string() }),
            },
        };
        if target.trim().is_empty() {
            return Err(Problem::EmptyTarget);
        }
        Ok((inputs, target))
    }
}

/// An example as text, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextExample {
    /// The input.
    pub inputs: String,
    /// The target; empty where only inputs were asked for.
    pub targets: String,
    /// Which record of its file it is, from 0; skipped records count. Of a named task, whose records can make
    /// several examples, which example.
    pub index: usize,
    /// The line (of a Parquet table, the row) that it starts on, from 1.
    pub line: usize,
}

/// What to do about bad records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Count them and go on, instead of refusing the file.
    pub skip_bad_records: bool,
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Its good records, in order; never none.
    pub examples: Vec<TextExample>,
    /// How many bad records were skipped.
    pub skipped: usize,
    /// The errors of the first few of them.
    pub first_skipped: Vec<Error>,
}

/// Reads a file's examples.
///
/// # Errors
/// Everything that [`read_records`] refuses, a file without records, the first bad record, and with
/// `skip_bad_records` a file without a good one.
pub fn load_text(path: &Path, format: &TaskFormat, options: LoadOptions) -> Result<Loaded> {
    load(path, options, |record| format.render(record))
}

/// Reads a file's inputs alone, for generating without targets; the examples' targets are empty.
///
/// # Errors
/// As [`load_text`].
pub fn load_inputs(path: &Path, inputs: &Template, options: LoadOptions) -> Result<Loaded> {
    load(path, options, |record| Ok((inputs.render(record)?, String::new())))
}

fn load(
    path: &Path,
    options: LoadOptions,
    render: impl Fn(&Record) -> Result<(String, String), Problem>,
) -> Result<Loaded> {
    let examples = read_records(path)?.enumerate().map(|(index, record)| {
        let (line, record) = record?;
        match render(&record) {
            Ok((inputs, targets)) => Ok(TextExample { inputs, targets, index, line }),
            Err(problem) => {
                Err(Error::Record(Box::new(BadRecord { location: location(path, line), problem })))
            }
        }
    });
    let Gathered { good, skipped, first_skipped } = gather(path, examples, options)?;
    Ok(Loaded { examples: good, skipped, first_skipped })
}

/// Items read from a file, of which there is at least one.
pub(crate) struct Gathered<T> {
    pub(crate) good: Vec<T>,
    pub(crate) skipped: usize,
    pub(crate) first_skipped: Vec<Error>,
}

/// Collects items up to the first error that is not skipped.
pub(crate) fn gather<T>(
    path: &Path,
    items: impl Iterator<Item = Result<T>>,
    options: LoadOptions,
) -> Result<Gathered<T>> {
    let (mut good, mut skipped, mut first_skipped) = (Vec::new(), 0, Vec::new());
    for item in items {
        match item {
            Ok(item) => good.push(item),
            Err(error) if options.skip_bad_records && error.is_bad_record() => {
                skipped += 1;
                if first_skipped.len() < KEPT_ERRORS {
                    first_skipped.push(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    if good.is_empty() {
        let path = path.to_path_buf();
        return Err(match first_skipped.into_iter().next() {
            None => Error::NoRecords { path },
            Some(first) => Error::AllBad { path, count: skipped, first: Box::new(first) },
        });
    }
    Ok(Gathered { good, skipped, first_skipped })
}

/// The distinct targets, sorted, if there are at most `max` of them: the label set of a classification task.
/// `None` if there are more, as where targets are free text.
pub fn labels_of(examples: &[TextExample], max: usize) -> Option<Vec<String>> {
    let mut labels = BTreeSet::new();
    for example in examples {
        labels.insert(example.targets.as_str());
        if labels.len() > max {
            return None;
        }
    }
    Some(labels.into_iter().map(str::to_owned).collect())
}
