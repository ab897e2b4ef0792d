//! Standard output: results, as a table for people or as JSON for programs. Nothing else is ever written there.

use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

use crate::exit::OutputClosed;

static SILENT: AtomicBool = AtomicBool::new(false);

/// Prints nothing from now on: rank 0 prints what all ranks found.
pub(crate) fn be_silent() {
    SILENT.store(true, Ordering::Relaxed);
}

/// What can be printed either way.
pub(crate) trait Printed: serde::Serialize {
    /// The text for people, without a final line break.
    fn text(&self) -> String;
}

/// Prints a result: its text, or with `--json` one JSON value.
///
/// # Errors
/// If standard output is closed or cannot be written.
pub(crate) fn print(result: &impl Printed, json: bool) -> Result<()> {
    let text = if json { serde_json::to_string_pretty(result)? } else { result.text() };
    line(&text)
}

/// Prints one line, or several that were put together already.
///
/// # Errors
/// If standard output is closed or cannot be written.
pub(crate) fn line(text: &str) -> Result<()> {
    if SILENT.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut out = BufWriter::new(io::stdout().lock());
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => OutputClosed.into(),
        _ => anyhow::Error::new(error).context("cannot write to standard output"),
    })
}

/// Values as they are written to a file: a line of JSON for each.
///
/// # Errors
/// If one cannot be written as JSON.
pub(crate) fn json_lines<T: serde::Serialize>(values: &[T]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for value in values {
        serde_json::to_writer(&mut bytes, value)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// A table with a header. Columns after the first are numbers and stand to the right where `numbers` says so.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>], numbers: bool) -> String {
    let mut table = bare(rows);
    table.set_header(header.iter().copied());
    if numbers {
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

/// Names and values, one pair a line.
pub(crate) fn facts<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let pairs: Vec<_> = pairs.into_iter().collect();
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:width$}  {value}");
    pairs.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn bare(rows: &[Vec<String>]) -> Table {
    let mut table = Table::new();
    let rule = LineStyle::none().fill('─').junction('─');
    table
        .load_style(TableStyle::new().header_separator(rule))
        .set_content_arrangement(ContentArrangement::Disabled);
    for row in rows {
        table.add_row(row.iter().map(String::as_str));
    }
    table
}

/// A file of results, or standard output.
pub(crate) struct Lines {
    to: Box<dyn Write>,
    name: String,
}

impl Lines {
    /// Standard output; of several ranks, that of the one which leads.
    pub(crate) fn stdout(leads: bool) -> Self {
        let to: Box<dyn Write> =
            if leads { Box::new(BufWriter::new(io::stdout())) } else { Box::new(io::sink()) };
        Self { to, name: "standard output".to_owned() }
    }

    /// Writes one value as a line of JSON.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn json(&mut self, value: &impl serde::Serialize) -> Result<()> {
        self.text(&serde_json::to_string(value)?)
    }

    /// Writes one line and passes it on at once.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn text(&mut self, line: &str) -> Result<()> {
        let written = writeln!(self.to, "{line}").and_then(|()| self.to.flush());
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
            other => other.with_context(|| format!("cannot write to {}", self.name)),
        }
    }
}
