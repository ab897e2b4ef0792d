//! The named tasks: benchmarks that are read from the files which their owners publish.
//!
//! [`Task::named`] finds one, [`Task::examples`] reads a split of it, [`Task::scores`] scores predictions as the
//! benchmark does, and [`submission`] writes what SuperGLUE's and GLUE's sites take. Inputs and targets are those of T5's own
//! preprocessing (the package t5 0.9.4 over TFDS's records), with the task's name taken off the front of the input,
//! as prompt tuning has it.
//!
//! `catalogue` lists the tasks. Each kind of record has its file: `labelled` reads all that have a label and some
//! text fields, and `multirc`, `record`, `wsc`, `squad` and `mrqa` what their names say.

mod catalogue;
mod examples;
mod fields;
mod folder;
mod labelled;
mod mrpc;
mod mrqa;
mod multirc;
mod punctuation;
mod record;
mod score;
mod squad;
mod submission;
mod transfer;
mod wsc;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Problem, Result};
use crate::metrics::{Metric, Reference};
use crate::source::Record;
use crate::{LoadOptions, TextExample};

pub use examples::{Examples, TaskSplit};
pub use score::super_glue_average;
pub use submission::{Submission, submission};
pub use transfer::transferred_labels;

/// What a task belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// The eight tasks of SuperGLUE.
    SuperGlue,
    /// Tasks of GLUE.
    Glue,
    /// SQuAD 1.1.
    Squad,
    /// The data sets of MRQA 2019 in SQuAD's manner.
    Mrqa,
    /// Files of one JSON object a line whose `label` is the label's text.
    Labelled,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::SuperGlue => "SuperGLUE",
            Self::Glue => "GLUE",
            Self::Squad => "SQuAD",
            Self::Mrqa => "MRQA",
            Self::Labelled => "labelled",
        })
    }
}

/// A part of a task's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// What is learnt from.
    Train,
    /// What a checkpoint is chosen by.
    Dev,
    /// What is predicted last; its labels are often not published.
    Test,
}

impl Split {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Train, Self::Dev, Self::Test];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Dev => "dev",
            Self::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What examples are read for. Only ReCoRD and WSC differ: for training, ReCoRD has an example for each answer and
/// WSC only those whose referent is right; for evaluation, ReCoRD has one for each query and WSC has all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Use {
    /// To learn from them.
    Training,
    /// To score predictions, or to predict.
    Evaluation,
}

impl Use {
    /// What a split is read for, where nothing else is said.
    pub fn of(split: Split) -> Self {
        if split == Split::Train { Self::Training } else { Self::Evaluation }
    }
}

/// Which score chooses the best checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Selection {
    /// The mean of all that is measured.
    #[default]
    Mean,
    /// One of them.
    One(Metric),
}

/// A benchmark.
#[derive(Debug, PartialEq, Eq)]
pub struct Task {
    /// Its name on the command line.
    pub name: &'static str,
    /// What is asked, in a few words.
    pub title: &'static str,
    /// What it belongs to.
    pub family: Family,
    /// The usual name of its folder.
    pub folder: &'static str,
    /// The texts of its labels, in T5's order, of two the positive one last; none if targets are free text.
    pub labels: &'static [&'static str],
    /// Its metrics.
    pub metrics: &'static [Metric],
    /// Which of them chooses a checkpoint.
    pub selection: Selection,
    /// The words that class-label initialisation of a prompt uses; none if it has neither labels nor such words.
    pub init_words: &'static [&'static str],
    /// The names of each split's file, in the order of [`Split::ALL`]; the first that is there is read. A task
    /// need not have all splits.
    pub files: [&'static [&'static str]; 3],
    form: Form,
}

/// How a task's records become examples.
#[derive(Debug, PartialEq, Eq)]
enum Form {
    Labelled(labelled::Fields),
    MultiRc,
    ReCoRd,
    Wsc,
    Squad,
    Mrqa,
}

/// A task's example: its texts, and what scoring and submissions need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskExample {
    /// Its texts. The target is empty where the file has no label; `index` counts examples, of which a record can
    /// make several.
    pub text: TextExample,
    /// The benchmark's own name of it.
    pub id: ExampleId,
    /// What a prediction is scored against; none where the file has no label.
    pub reference: Option<Reference>,
    /// Of WSC, the noun which the label is about, also without a label.
    pub referent: Option<String>,
}

impl TaskExample {
    /// Whether its target is right: WSC asks about wrong referents too.
    pub fn holds(&self) -> bool {
        self.reference.as_ref().is_none_or(|reference| reference.holds)
    }
}

/// What a benchmark calls an example. In JSON it is a number, a text, or an object of the numbers' names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(untagged)]
pub enum ExampleId {
    /// The record's `idx`, or its place in the file from 0.
    Number(u64),
    /// An answer to one of MultiRC's questions.
    Answer {
        /// The passage's number.
        passage: u64,
        /// The question's.
        question: u64,
        /// The answer's.
        answer: u64,
    },
    /// One of ReCoRD's queries.
    Query {
        /// The passage's number.
        passage: u64,
        /// The query's.
        query: u64,
    },
    /// A question's key in SQuAD and MRQA.
    Key(String),
}

/// An example before it has a place.
struct Draft {
    inputs: String,
    target: Option<String>,
    id: ExampleId,
    reference: Option<Reference>,
    referent: Option<String>,
}

/// What a record is read as.
#[derive(Clone, Copy)]
struct Reading {
    task: &'static Task,
    purpose: Use,
    /// Whether a record may lack its label.
    may_lack_label: bool,
    /// The place of the record in its file, from 0.
    index: usize,
}

impl Task {
    /// All there are.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        catalogue::TASKS.iter()
    }

    /// The task of a name.
    ///
    /// # Errors
    /// No task has it; the error lists those there are.
    pub fn named(name: &str) -> Result<&'static Self> {
        let known = || Self::all().map(|task| task.name).collect::<Vec<_>>().join(", ");
        Self::all()
            .find(|task| task.name == name.trim())
            .ok_or_else(|| Error::UnknownTask { name: name.to_owned(), known: known() })
    }

    /// The splits that it has.
    pub fn splits(&self) -> impl Iterator<Item = Split> {
        Split::ALL.into_iter().zip(self.files).filter(|(_, files)| !files.is_empty()).map(|(split, _)| split)
    }

    /// The file of a split in `dir`, which is the task's folder or the one that holds it.
    ///
    /// # Errors
    /// A split that the task does not have or whose file is missing, a directory that cannot be read.
    pub fn file(&self, dir: &Path, split: Split) -> Result<PathBuf> {
        folder::file(self, dir, split)
    }

    /// Opens a split in `dir`, which is the task's folder or the one that holds it. Examples are read one record
    /// at a time, but for SQuAD's file, which is one JSON object.
    ///
    /// # Errors
    /// A split that the task does not have or whose file is missing, a file that cannot be opened. Errors in
    /// records come with the examples.
    pub fn examples(&'static self, dir: &Path, split: Split, purpose: Use) -> Result<Examples> {
        self.open(&self.file(dir, split)?, split, purpose)
    }

    /// Opens the file of a split, as [`Self::examples`] does.
    ///
    /// # Errors
    /// A file that cannot be opened. Errors in records come with the examples.
    pub fn open(&'static self, file: &Path, split: Split, purpose: Use) -> Result<Examples> {
        Examples::open(self, file, split, purpose)
    }

    /// Reads a whole split.
    ///
    /// # Errors
    /// As [`Self::examples`], then the first bad record, and with `skip_bad_records` a file without a good one.
    pub fn read(
        &'static self,
        dir: &Path,
        split: Split,
        purpose: Use,
        options: LoadOptions,
    ) -> Result<TaskSplit> {
        self.examples(dir, split, purpose)?.read(options)
    }

    /// A record's examples.
    fn drafts(&self, record: &Record, reading: Reading) -> Result<Vec<Draft>, Problem> {
        match &self.form {
            Form::Labelled(fields) => labelled::draft(record, fields, reading).map(|draft| vec![draft]),
            Form::MultiRc => multirc::drafts(record, reading),
            Form::ReCoRd => record::drafts(record, reading),
            Form::Wsc => wsc::draft(record, reading).map(|draft| draft.into_iter().collect()),
            Form::Squad => squad::draft(record, reading).map(|draft| vec![draft]),
            Form::Mrqa => mrqa::drafts(record, reading),
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

impl FromStr for &'static Task {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Task::named(name)
    }
}

impl serde::Serialize for Task {
    /// Its name.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}
