//! One text a line.

use serde_json::Value;

use super::lines::{Lines, utf8};
use super::{Record, Source};
use crate::error::Result;

/// What the text is called.
pub(crate) const TEXT_FIELD: &str = "text";

pub(super) struct TextLines(Lines);

impl TextLines {
    pub(super) fn new(lines: Lines) -> Self {
        Self(lines)
    }
}

impl Source for TextLines {
    fn next_record(&mut self) -> Result<Option<(usize, Record)>> {
        if !self.pass()? {
            return Ok(None);
        }
        let line = self.0.number();
        let text = utf8(self.0.line(), "line").map_err(|problem| self.0.bad_record(line, problem))?;
        let text = Value::String(text.to_owned());
        Ok(Some((line, Record::from_iter([(TEXT_FIELD.to_owned(), text)]))))
    }

    fn pass(&mut self) -> Result<bool> {
        self.0.advance_to_text()
    }
}
