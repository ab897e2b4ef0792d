//! One JSON object a line.

use serde_json::Value;

use super::lines::{Lines, utf8};
use super::{Record, Source};
use crate::error::{Problem, Result};
use crate::template::kind;

pub(super) struct JsonLines(Lines);

impl JsonLines {
    pub(super) fn new(lines: Lines) -> Self {
        Self(lines)
    }
}

impl Source for JsonLines {
    fn next_record(&mut self) -> Result<Option<(usize, Record)>> {
        if !self.pass()? {
            return Ok(None);
        }
        let line = self.0.number();
        let record = parse(self.0.line()).map_err(|problem| self.0.bad_record(line, problem))?;
        Ok(Some((line, record)))
    }

    fn pass(&mut self) -> Result<bool> {
        self.0.advance_to_text()
    }
}

fn parse(line: &[u8]) -> Result<Record, Problem> {
    let text = utf8(line, "line")?;
    match serde_json::from_str(text) {
        Ok(Value::Object(record)) => Ok(record),
        Ok(other) => Err(Problem::NotAnObject { found: kind(&other) }),
        // An array over many lines, the other thing that is called `.json`.
        Err(error) if error.is_eof() && text.trim_start().starts_with('[') => {
            Err(Problem::NotAnObject { found: "an array" })
        }
        Err(error) => {
            // The parser's own text ends in a place within this one line, which we tell better.
            let what = error.to_string();
            let what = what.split(" at line ").next().unwrap_or_default().to_owned();
            Err(Problem::MalformedJson { column: error.column(), what })
        }
    }
}
