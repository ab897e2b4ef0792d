//! The lines of a text file, plain or compressed.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::error::{BadRecord, Error, Problem, Result};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const GZIP_MAGIC: &[u8] = b"\x1f\x8b";

/// Reads a file line by line, counting.
pub(super) struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    gzip: bool,
    number: usize,
    line: Vec<u8>,
}

impl Lines {
    pub(super) fn new(path: &Path, file: File, gzip: bool) -> Self {
        let reader: Box<dyn BufRead + Send> = match gzip {
            true => Box::new(BufReader::new(MultiGzDecoder::new(BufReader::new(file)))),
            false => Box::new(BufReader::new(file)),
        };
        Self { path: path.to_path_buf(), reader, gzip, number: 0, line: Vec::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The number of the line read last, from 1.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// The line read last, without its end and the file's byte-order mark.
    pub(super) fn line(&self) -> &[u8] {
        &self.line
    }

    /// Reads the next line; false at the end of the file.
    pub(super) fn advance(&mut self) -> Result<bool> {
        self.line.clear();
        let read = self.reader.read_until(b'\n', &mut self.line);
        if read.map_err(|cause| self.failure(cause))? == 0 {
            return Ok(false);
        }
        self.number += 1;
        if self.line.last() == Some(&b'\n') {
            self.line.pop();
        }
        if self.line.last() == Some(&b'\r') {
            self.line.pop();
        }
        if self.number == 1 && self.line.starts_with(BYTE_ORDER_MARK) {
            self.line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(true)
    }

    /// Reads on to the next line that is not blank; false at the end of the file.
    pub(super) fn advance_to_text(&mut self) -> Result<bool> {
        while self.advance()? {
            if !self.line.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn failure(&self, cause: std::io::Error) -> Error {
        let (path, line) = (self.path.clone(), self.number + 1);
        match self.gzip {
            true => Error::Gzip { path, line, cause },
            false => Error::Read { path, line, cause },
        }
    }

    /// The error of the record that starts at a line.
    pub(super) fn bad_record(&self, line: usize, problem: Problem) -> Error {
        BadRecord::at_line(&self.path, line, problem)
    }
}

/// The bytes of a `line` or `field` as text, or what is wrong with them.
pub(super) fn utf8<'a>(bytes: &'a [u8], within: &'static str) -> Result<&'a str, Problem> {
    std::str::from_utf8(bytes).map_err(|error| {
        let mend = match bytes.starts_with(GZIP_MAGIC) {
            true => "the file looks compressed: give it a name that ends in .gz",
            false => "save the file as UTF-8",
        };
        Problem::NotUtf8 { column: error.valid_up_to() + 1, within, mend }
    })
}
