//! The examples of a split, read from its file.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::{Draft, Family, Form, Reading, Split, Task, TaskExample, Use, mrpc, squad};
use crate::error::{BadRecord, Error, Location, Problem, Result, Unit};
use crate::load::{Gathered, gather};
use crate::metrics::Reference;
use crate::source::{Format, Record, open_records};
use crate::{LoadOptions, TextExample};

/// A record and its line, or the question's number; or why it cannot be read.
type Source = Box<dyn Iterator<Item = Result<(usize, Record)>>>;

/// The examples of a split, in the order of its file. After an error for which [`Error::is_bad_record`] holds, the
/// next can be read.
pub struct Examples {
    path: PathBuf,
    source: Source,
    unit: Unit,
    reading: Reading,
    part: Option<mrpc::Part>,
    pending: VecDeque<TaskExample>,
    num_records: usize,
    num_examples: usize,
    dropped: usize,
}

impl std::fmt::Debug for Examples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Examples").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A split, read whole.
#[derive(Debug)]
pub struct TaskSplit {
    /// Its file.
    pub path: PathBuf,
    /// Its examples, in order; never none.
    pub examples: Vec<TaskExample>,
    /// How many bad records were skipped because that was asked for.
    pub skipped: usize,
    /// The errors of the first few of them.
    pub first_skipped: Vec<Error>,
    /// How many incomplete rows of a GLUE table were left out, as TFDS leaves them out.
    pub dropped: usize,
}

impl TaskSplit {
    /// The texts of the examples.
    pub fn texts(&self) -> Vec<TextExample> {
        self.examples.iter().map(|example| example.text.clone()).collect()
    }

    /// What is to be said of incomplete rows, if some were left out.
    pub fn left_out(&self) -> Option<String> {
        let (count, path) = (self.dropped, self.path.display());
        let said = || format!("{count} rows of {path} end before their label and are left out, as TFDS does");
        (count > 0).then(said)
    }

    /// Whether every example has a label.
    pub fn is_labelled(&self) -> bool {
        self.examples.iter().all(|example| example.reference.is_some())
    }

    /// What predictions are scored against; none if any example has no label.
    pub fn references(&self) -> Option<Vec<Reference>> {
        self.examples.iter().map(|example| example.reference.clone()).collect()
    }
}

impl Examples {
    pub(super) fn open(task: &'static Task, path: &Path, split: Split, purpose: Use) -> Result<Self> {
        let (source, unit) = source(task, path)?;
        let may_lack_label = split == Split::Test;
        Ok(Self {
            path: path.to_path_buf(),
            source,
            unit,
            reading: Reading { task, purpose, may_lack_label, index: 0 },
            part: mrpc::Part::of(task, path, split)?,
            pending: VecDeque::new(),
            num_records: 0,
            num_examples: 0,
            dropped: 0,
        })
    }

    /// The file that is read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all examples.
    ///
    /// # Errors
    /// The first bad record, and with `skip_bad_records` a file without a good one; a file without examples.
    pub fn read(mut self, options: LoadOptions) -> Result<TaskSplit> {
        let path = self.path.clone();
        let Gathered { good, skipped, first_skipped } = gather(&path, &mut self, options)?;
        Ok(TaskSplit { path, examples: good, skipped, first_skipped, dropped: self.dropped })
    }

    /// Makes a record's examples pending.
    fn push(&mut self, line: usize, record: &Record) -> Result<(), Problem> {
        let reading = Reading { index: self.num_records - 1, ..self.reading };
        if self.part.as_ref().is_some_and(|part| !part.has(record)) {
            return Ok(());
        }
        let drafts = reading.task.drafts(record, reading)?;
        if drafts.iter().any(|draft| draft.target.as_ref().is_some_and(|target| target.trim().is_empty())) {
            return Err(Problem::EmptyTarget);
        }
        for Draft { inputs, target, id, reference, referent } in drafts {
            let index = self.num_examples;
            self.num_examples += 1;
            let text = TextExample { inputs, targets: target.unwrap_or_default(), index, line };
            self.pending.push_back(TaskExample { text, id, reference, referent });
        }
        Ok(())
    }

    /// True if TFDS leaves out a GLUE table's row for this: QQP's has some that end before their label.
    fn is_dropped(&self, problem: &Problem) -> bool {
        let incomplete = match problem {
            Problem::Width { expected, found, .. } => found < expected,
            Problem::NotALabel { label, .. } => label == "\"\"",
            _ => false,
        };
        self.reading.task.family == Family::Glue && incomplete
    }

    fn bad_record(&self, number: usize, problem: Problem) -> Error {
        let location = Location { path: self.path.clone(), number, unit: self.unit };
        Error::Record(Box::new(BadRecord { location, problem }))
    }
}

impl Iterator for Examples {
    type Item = Result<TaskExample>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(example) = self.pending.pop_front() {
                return Some(Ok(example));
            }
            let next = self.source.next()?;
            self.num_records += 1;
            let pushed = next.and_then(|(line, record)| {
                self.push(line, &record).map_err(|problem| self.bad_record(line, problem))
            });
            match pushed {
                Ok(()) => {}
                Err(Error::Record(bad)) if self.is_dropped(&bad.problem) => self.dropped += 1,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The records of a file, and what they are counted in.
fn source(task: &'static Task, path: &Path) -> Result<(Source, Unit)> {
    if task.form == Form::Squad {
        let path = path.to_path_buf();
        let questions = squad::questions(task, &path)?.into_iter().enumerate().map(move |(i, question)| {
            let location = Location { path: path.clone(), number: i + 1, unit: Unit::Question };
            let record =
                question.map_err(|problem| Error::Record(Box::new(BadRecord { location, problem })))?;
            Ok((i + 1, record))
        });
        return Ok((Box::new(questions), Unit::Question));
    }
    // Microsoft's files of MRPC are tables though their names end in .txt.
    let (format, gzip) = Format::of(path).unwrap_or((Format::Tsv, false));
    Ok((Box::new(open_records(path, format, gzip)?), Unit::Line))
}
