//! Records out of data files.

mod delimited;
mod json_lines;
mod lines;
mod parquet;
mod text_lines;

use std::fs;
use std::path::Path;

use crate::error::{Error, Location, Result, Unit};
use lines::Lines;

pub(crate) use text_lines::TEXT_FIELD;

/// A record: the names of its fields, in the file's order, and their values.
pub type Record = serde_json::Map<String, serde_json::Value>;

/// What an error lists where a file's name tells nothing.
pub(crate) const KNOWN_EXTENSIONS: &str = ".jsonl, .ndjson and .json (one JSON object a line), \
     .csv and .tsv (with a header), each of these also with .gz, and .parquet";

/// How a data file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    JsonLines,
    /// Comma-separated values as RFC 4180 has them, with a header.
    Csv,
    /// Tab-separated values with a header. As in the text/tab-separated-values type, and in the GLUE files, a
    /// quote is a character like any other, and no field holds a tab or a line break.
    Tsv,
    /// A Parquet table.
    Parquet,
    /// One text a line; a record's only field is `text`. No name tells it, since some tables are called `.txt`.
    Text,
}

impl Format {
    /// The format that a file's name tells by its ending, and whether it is compressed with gzip. Case does
    /// not matter.
    pub fn of(path: &Path) -> Option<(Self, bool)> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let (stem, gzip) = name.strip_suffix(".gz").map_or((name.as_str(), false), |stem| (stem, true));
        let format = match stem.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" | "json" => Self::JsonLines,
            "csv" => Self::Csv,
            "tsv" => Self::Tsv,
            "parquet" if !gzip => Self::Parquet,
            _ => return None,
        };
        Some((format, gzip))
    }
}

/// Where records come from. After an error for which [`Error::is_bad_record`] holds, the next record can be
/// read.
trait Source {
    /// The next record and its line or row, from 1; none at the end.
    fn next_record(&mut self) -> Result<Option<(usize, Record)>>;

    /// Passes over the next record, where that is possible without looking into it; false at the end.
    fn pass(&mut self) -> Result<bool> {
        Ok(self.next_record()?.is_some())
    }
}

/// The records of a file, each with its line or row, from 1. Ends after the first error that is not of one
/// record alone.
pub struct Records {
    source: Box<dyn Source + Send>,
    ended: bool,
}

impl Records {
    /// Passes over the next record; false at the end.
    pub(crate) fn pass(&mut self) -> Result<bool> {
        self.source.pass()
    }
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Iterator for Records {
    type Item = Result<(usize, Record)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.source.next_record().transpose();
        self.ended = match &next {
            None => true,
            Some(Ok(_)) => false,
            Some(Err(error)) => !error.is_bad_record(),
        };
        next
    }
}

/// Opens a data file, in the format that its name tells: JSON lines, CSV, TSV (these also with gzip) or
/// Parquet.
///
/// Texts are UTF-8, with or without a byte-order mark; blank lines are passed over. An integer of JSON beyond
/// 64 bits becomes the nearest double.
///
/// # Errors
/// A file that cannot be opened, has no bytes, or whose name tells no format; a table without a header or
/// schema. Errors in records come with the records.
pub fn read_records(path: &Path) -> Result<Records> {
    let (format, gzip) =
        Format::of(path).ok_or_else(|| Error::UnknownExtension { path: path.to_path_buf() })?;
    open_records(path, format, gzip)
}

/// Opens a data file of a known format, whatever its name.
pub(crate) fn open_records(path: &Path, format: Format, gzip: bool) -> Result<Records> {
    let cannot_open = |cause| Error::Open { path: path.to_path_buf(), cause };
    let metadata = fs::metadata(path).map_err(cannot_open)?;
    if metadata.is_dir() {
        return Err(Error::Directory { path: path.to_path_buf() });
    }
    if metadata.is_file() && metadata.len() == 0 {
        return Err(Error::EmptyFile { path: path.to_path_buf() });
    }
    let file = fs::File::open(path).map_err(cannot_open)?;
    let source: Box<dyn Source + Send> = match format {
        Format::JsonLines => Box::new(json_lines::JsonLines::new(Lines::new(path, file, gzip))),
        Format::Csv => Box::new(delimited::Delimited::csv(Lines::new(path, file, gzip))?),
        Format::Tsv => Box::new(delimited::Delimited::tsv(Lines::new(path, file, gzip))?),
        Format::Parquet => Box::new(parquet::ParquetRows::new(path, file)?),
        Format::Text => Box::new(text_lines::TextLines::new(Lines::new(path, file, gzip))),
    };
    Ok(Records { source, ended: false })
}

/// The place of a record in a file.
pub(crate) fn location(path: &Path, number: usize) -> Location {
    let unit = match Format::of(path) {
        Some((Format::Parquet, _)) => Unit::Row,
        _ => Unit::Line,
    };
    Location { path: path.to_path_buf(), number, unit }
}
