//! CSV and TSV.
//!
//! Our own reader of RFC 4180 and not the `csv` crate's, which cannot tell the line of a record that follows
//! blank lines and takes a quote that is never closed for the end of a field; both would make messages that
//! mislead. The tests hold it against that crate.

use std::collections::HashSet;

use serde_json::Value;

use super::lines::{Lines, utf8};
use super::{Record, Source};
use crate::error::{Error, Problem, Result};

/// The rows of a table with a header.
pub(super) struct Delimited {
    lines: Lines,
    separator: u8,
    quotes: bool,
    columns: Vec<String>,
}

impl Delimited {
    pub(super) fn csv(lines: Lines) -> Result<Self> {
        Self { lines, separator: b',', quotes: true, columns: Vec::new() }.with_header()
    }

    pub(super) fn tsv(lines: Lines) -> Result<Self> {
        Self { lines, separator: b'\t', quotes: false, columns: Vec::new() }.with_header()
    }

    fn with_header(mut self) -> Result<Self> {
        let Some((line, fields)) = self.next_fields()? else {
            return Err(Error::NoRecords { path: self.lines.path().to_path_buf() });
        };
        let refuse = |what| Error::Header { path: self.lines.path().to_path_buf(), line, what };
        let mut seen = HashSet::new();
        let mut columns = Vec::with_capacity(fields.len());
        for field in &fields {
            let name = utf8(field, "field").map_err(|problem| refuse(format!("is not text: {problem}")))?;
            // A column of row numbers often has no name; templates cannot name it, so that it may stay.
            if !name.is_empty() && !seen.insert(name) {
                return Err(refuse(format!("has the column {name:?} twice")));
            }
            columns.push(name.to_owned());
        }
        if seen.is_empty() {
            return Err(refuse("names no column".to_owned()));
        }
        self.columns = columns;
        Ok(self)
    }

    /// The next record's fields, and the line it starts on.
    fn next_fields(&mut self) -> Result<Option<(usize, Vec<Vec<u8>>)>> {
        let mut row = Row::new(self.separator, self.quotes);
        let mut start = 0;
        while self.lines.advance()? {
            if start == 0 {
                if self.lines.line().iter().all(|&byte| byte == b' ') {
                    continue;
                }
                start = self.lines.number();
            }
            if row.push_line(self.lines.line()) {
                return Ok(Some((start, row.fields)));
            }
        }
        match start {
            0 => Ok(None),
            line => Err(Error::UnclosedQuote { path: self.lines.path().to_path_buf(), line }),
        }
    }

    fn record(&self, fields: &[Vec<u8>]) -> Result<Record, Problem> {
        let (expected, found) = (self.columns.len(), fields.len());
        if expected != found {
            let mend = match self.quotes {
                true => "put a field that holds a comma in quotes",
                false => "a field cannot hold a tab",
            };
            return Err(Problem::Width { expected, found, mend });
        }
        let named = self.columns.iter().zip(fields).filter(|(name, _)| !name.is_empty());
        named
            .map(|(name, field)| Ok((name.clone(), Value::String(utf8(field, "field")?.to_owned()))))
            .collect()
    }
}

impl Source for Delimited {
    fn next_record(&mut self) -> Result<Option<(usize, Record)>> {
        let Some((line, fields)) = self.next_fields()? else {
            return Ok(None);
        };
        let record = self.record(&fields).map_err(|problem| self.lines.bad_record(line, problem))?;
        Ok(Some((line, record)))
    }
}

#[derive(PartialEq)]
enum Within {
    /// Nothing of the field has been read.
    Start,
    /// A field without quotes, or what follows the closing one.
    Plain,
    Quoted,
    /// A quote within a quoted field: the closing one, or the first of a doubled one.
    Quote,
}

/// A record being put together from lines.
struct Row {
    separator: u8,
    quotes: bool,
    fields: Vec<Vec<u8>>,
    field: Vec<u8>,
    within: Within,
}

impl Row {
    fn new(separator: u8, quotes: bool) -> Self {
        Self { separator, quotes, fields: Vec::new(), field: Vec::new(), within: Within::Start }
    }

    /// Adds a line; true if the record ends with it. A line's end within quotes becomes one `\n`.
    fn push_line(&mut self, line: &[u8]) -> bool {
        for &byte in line {
            self.push(byte);
        }
        if self.within == Within::Quoted {
            self.field.push(b'\n');
            return false;
        }
        self.end_field();
        true
    }

    fn push(&mut self, byte: u8) {
        let quote = self.quotes && byte == b'"';
        match self.within {
            Within::Start if quote => self.within = Within::Quoted,
            Within::Quoted if quote => self.within = Within::Quote,
            Within::Quote if quote => {
                self.field.push(byte);
                self.within = Within::Quoted;
            }
            Within::Quoted => self.field.push(byte),
            _ if byte == self.separator => self.end_field(),
            // A stray quote, as in `5" disk`, is text.
            Within::Start | Within::Plain | Within::Quote => {
                self.field.push(byte);
                self.within = Within::Plain;
            }
        }
    }

    fn end_field(&mut self) {
        self.fields.push(std::mem::take(&mut self.field));
        self.within = Within::Start;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The records of a text that is not blank, up to a quote that is never closed.
    fn rows(text: &str) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        let mut row = Row::new(b',', true);
        for line in text.strip_suffix('\n').unwrap_or(text).split('\n') {
            if row.push_line(line.as_bytes()) {
                let fields = std::mem::take(&mut row.fields).into_iter();
                rows.push(fields.map(|field| String::from_utf8(field).unwrap()).collect());
            }
        }
        rows
    }

    proptest! {
        #[test]
        fn what_the_csv_crate_writes_is_read_back(
            written in prop::collection::vec(prop::collection::vec("[a,\"\n é]{0,6}", 2), 1..5)
        ) {
            let mut writer = csv::Writer::from_writer(Vec::new());
            for row in &written {
                writer.write_record(row).unwrap();
            }
            let text = String::from_utf8(writer.into_inner().unwrap()).unwrap();
            prop_assert_eq!(rows(&text), written);
        }

        #[test]
        fn stray_quotes_are_read_as_the_csv_crate_reads_them(text in "[ab,\"]{1,12}") {
            let mut reader =
                csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
            let expected: Vec<Vec<String>> =
                reader.records().map(|row| row.unwrap().iter().map(str::to_owned).collect()).collect();
            let read = rows(&text);
            // The crate takes the end of the text for a closing quote, and we do not.
            prop_assert!(read.is_empty() || read == expected, "{read:?} {expected:?}");
        }
    }
}
