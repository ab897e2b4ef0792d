//! What is wrong with a data file, where, and how to mend it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::pretrain::PretrainError;
use crate::source::KNOWN_EXTENSIONS;
use crate::{LabelMapError, TemplateError};

/// The result of an operation on data.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a data file, a template, a label map or a tokenizer was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened.
    #[error("cannot open {}: {cause}; check the name and that you may read it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A directory was given where a file is needed.
    #[error("{} is a directory; name one data file in it", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// A file name that tells no known format.
    #[error("the name of {} ends in no known data format; known are {KNOWN_EXTENSIONS}", path.display())]
    UnknownExtension {
        /// The file.
        path: PathBuf,
    },
    /// A file of no bytes.
    #[error("{} is empty; it needs one record a line", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// A file with blank lines, a header or a schema, and nothing else.
    #[error("{} holds no records; add at least one", path.display())]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// Reading stopped in the middle of a file.
    #[error("{}, line {line}: cannot read on: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The line that could not be read.
        line: usize,
        /// What the system said.
        cause: io::Error,
    },
    /// A compressed file that is cut short or damaged.
    #[error(
        "{}, line {line}: cannot decompress: {cause}; the gzip file is cut short, damaged or no gzip file: \
         fetch or write it again (`gzip -t` checks it)",
        path.display()
    )]
    Gzip {
        /// The file.
        path: PathBuf,
        /// The line of the decompressed text that could not be read.
        line: usize,
        /// What the decoder said.
        cause: io::Error,
    },
    /// A Parquet file that is cut short, damaged, or uses what is not supported.
    #[error(
        "{}, row {row}: cannot read Parquet: {cause}; if the file is cut short or damaged, fetch or \
         write it again, else save it as JSONL",
        path.display()
    )]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The row that could not be read, from 1.
        row: usize,
        /// What the reader said.
        cause: String,
    },
    /// A first line that names no columns.
    #[error("{}, line {line}: the header {what}; the first line must name each column once", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A quoted CSV field that goes on to the end of the file.
    #[error(
        "{}, line {line}: a quoted field is not closed before the end of the file; close it with \", \
         or write a quote within it as \"\"",
        path.display()
    )]
    UnclosedQuote {
        /// The file.
        path: PathBuf,
        /// The line on which the record starts.
        line: usize,
    },
    /// One record does not fit.
    #[error("{0}")]
    Record(Box<BadRecord>),
    /// Bad records are skipped, and there are no others.
    #[error("{}: all {count} records are bad, and nothing is left; the first is {first}", path.display())]
    AllBad {
        /// The file.
        path: PathBuf,
        /// How many records it has.
        count: usize,
        /// The first one's error.
        first: Box<Error>,
    },
    /// A template that is not one.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A label map that is not one.
    #[error(transparent)]
    LabelMap(#[from] LabelMapError),
    /// A corpus or options of pretraining that cannot be used.
    #[error(transparent)]
    Pretrain(#[from] PretrainError),
    /// A length limit with no room for a token and the end mark.
    #[error("a maximum {side} length of {max} leaves no room; it counts </s>, and must be at least {least}")]
    LengthLimit {
        /// `input` or `target`.
        side: &'static str,
        /// The limit given.
        max: usize,
        /// The least there is room in.
        least: usize,
    },
    /// A tokenizer without the end mark of a T5.
    #[error(
        "the tokenizer has no </s>, with which every T5 text ends; use the tokenizer that came with the model"
    )]
    NoEndMark,
    /// A tokenizer that makes ids which the model has no row for.
    #[error(
        "the tokenizer does not match the model: {text} has the id {id}, and the model's vocabulary ends \
         at {}; use the tokenizer that came with the model",
        vocab_size.saturating_sub(1)
    )]
    TokenizerMismatch {
        /// The piece of text.
        text: String,
        /// Its id.
        id: u32,
        /// Rows of the model's embedding table.
        vocab_size: usize,
    },
    /// A target of which the tokenizer leaves nothing.
    #[error(
        "line {line}: the tokenizer makes no token of the target {target:?}; give the example another target"
    )]
    NoTargetTokens {
        /// The example's line.
        line: usize,
        /// The target.
        target: String,
    },
    /// No named task has this name.
    #[error("there is no task {name:?}; known are {known}")]
    UnknownTask {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A task's directory that is not there.
    #[error(
        "cannot read the directory {} of the task {task}: {cause}; give --data-dir the folder {folder} or the \
         folder that holds it",
        path.display()
    )]
    DataDirectory {
        /// The task's name.
        task: &'static str,
        /// The directory given.
        path: PathBuf,
        /// The folder's usual name.
        folder: &'static str,
        /// What the system said.
        cause: io::Error,
    },
    /// A task's directory without the file of a split.
    #[error(
        "{} has no {split} split of the task {task}: neither it nor {folder}/ in it has {wanted}; \
         fetch the file, or give --data-dir the folder {folder} or the folder that holds it",
        path.display()
    )]
    MissingSplit {
        /// The task's name.
        task: &'static str,
        /// The split.
        split: &'static str,
        /// The directory given.
        path: PathBuf,
        /// The folder's usual name.
        folder: &'static str,
        /// The file names looked for.
        wanted: String,
    },
    /// A split that the task's owners never published.
    #[error("the task {task} has no {split} split; use {others}")]
    NoSuchSplit {
        /// The task's name.
        task: &'static str,
        /// The split.
        split: &'static str,
        /// Those it has.
        others: String,
    },
    /// A JSON file that is one whole, as SQuAD's, and does not parse.
    #[error(
        "{}, line {line}, column {column}: malformed JSON: {what}; the file is cut short or damaged: fetch it again",
        path.display()
    )]
    MalformedFile {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What the parser said.
        what: String,
    },
    /// A task that no site takes predictions of.
    #[error("the task {task} has no submission file; only SuperGLUE's and GLUE's tasks have one")]
    NoSubmission {
        /// The task's name.
        task: &'static str,
    },
    /// The tokenizer failed.
    #[error("the tokenizer failed: {cause}; use the tokenizer that came with the model")]
    Tokenizer {
        /// What it said.
        cause: tokenizers::Error,
    },
}

impl Error {
    /// True if only one record is bad, and those after it can still be read.
    pub fn is_bad_record(&self) -> bool {
        matches!(self, Self::Record(_))
    }
}

/// What a file's records are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Lines of a text file; a record is named by its first one.
    Line,
    /// Rows of a table.
    Row,
    /// Questions of a file that is one JSON object, as SQuAD's.
    Question,
}

/// A record's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: PathBuf,
    /// The line, row or question, from 1.
    pub number: usize,
    /// Which of these.
    pub unit: Unit,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::Line => "line",
            Unit::Row => "row",
            Unit::Question => "question",
        };
        write!(f, "{}, {unit} {}", self.path.display(), self.number)
    }
}

/// A record that does not fit, and its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{location}: {problem}")]
pub struct BadRecord {
    /// Where it is.
    pub location: Location,
    /// What is wrong with it.
    pub problem: Problem,
}

impl BadRecord {
    pub(crate) fn at_line(path: &Path, number: usize, problem: Problem) -> Error {
        let location = Location { path: path.to_path_buf(), number, unit: Unit::Line };
        Error::Record(Box::new(Self { location, problem }))
    }
}

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Bytes that are no UTF-8.
    #[error("byte {column} of the {within} is not UTF-8; {mend}")]
    NotUtf8 {
        /// Place of the first such byte, from 1.
        column: usize,
        /// `line` or `field`, in which it is counted.
        within: &'static str,
        /// What to do.
        mend: &'static str,
    },
    /// A line that is not JSON.
    #[error(
        "malformed JSON at column {column}: {what}; each line must be one whole JSON object, \
         as in {{\"inputs\": \"…\", \"targets\": \"…\"}}"
    )]
    MalformedJson {
        /// The column, in bytes from 1.
        column: usize,
        /// What the parser said.
        what: String,
    },
    /// A line that is JSON, but no object.
    #[error(
        "the record is {found} and not a JSON object; write one object a line \
         (`jq -c '.[]'` unpacks an array)"
    )]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// A row with more or fewer fields than the header.
    #[error("the row has {found} fields and the header {expected}; {mend}")]
    Width {
        /// Fields of the header.
        expected: usize,
        /// Fields of this row.
        found: usize,
        /// What to do.
        mend: &'static str,
    },
    /// A template names what the record does not have.
    #[error("the template {template:?} asks for the field `{field}`, and the record has only {available}")]
    MissingField {
        /// The template.
        template: String,
        /// The field.
        field: String,
        /// The record's fields.
        available: String,
    },
    /// A value that is no text.
    #[error(
        "the field `{field}` is {found}, and the template {template:?} needs a text, a number, true or \
         false; give the record a value"
    )]
    NotText {
        /// The template.
        template: String,
        /// The field.
        field: String,
        /// What the value is.
        found: &'static str,
    },
    /// A label that the map does not have.
    #[error("the label {label:?} is not in the label map {map}; add it to --labels or mend the record")]
    UnknownLabel {
        /// The target text before the map.
        label: String,
        /// The map, as it is written.
        map: String,
    },
    /// A named task's record without one of its fields.
    #[error(
        "the record has no `{field}`, only {available}; {task} needs it: check that --data-dir is that \
         task's folder and the file its owners' own"
    )]
    NotTheTasksRecord {
        /// The task's name.
        task: &'static str,
        /// The field.
        field: String,
        /// The record's fields.
        available: String,
    },
    /// A field of a named task's record that holds something else.
    #[error(
        "the field `{field}` is {found}, and {task} needs {needed} there; mend the record or fetch the file again"
    )]
    WrongValue {
        /// The task's name.
        task: &'static str,
        /// The field.
        field: String,
        /// What the value is.
        found: &'static str,
        /// What it should be.
        needed: &'static str,
    },
    /// A label that the task does not have.
    #[error(
        "the label {label} is none of {task}'s, which are {labels}; mend the record or check the task's name"
    )]
    NotALabel {
        /// The task's name.
        task: &'static str,
        /// The label, as the file has it.
        label: String,
        /// The task's labels.
        labels: String,
    },
    /// A record without a label in a split that is learnt from or scored.
    #[error(
        "the record has no label ({fields}), which only the test split may lack; use another file for {task}"
    )]
    NoLabel {
        /// The task's name.
        task: &'static str,
        /// The fields where it is looked for.
        fields: String,
    },
    /// Parts of a record that contradict each other.
    #[error("{what}; mend the record or fetch the file again")]
    Inconsistent {
        /// What does not fit.
        what: String,
    },
    /// A record of a corpus without a text.
    #[error(
        "the record has {found}, and a corpus has a text in `text`; rename the field that holds it, or give the record one"
    )]
    NotADocument {
        /// What it has instead.
        found: String,
    },
    /// Nothing to learn.
    #[error("the target is empty; give the record a target text")]
    EmptyTarget,
}
