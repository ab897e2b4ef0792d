//! How the cluster's resources look: tables that fit a terminal, ages, states in small letters, or JSON.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use pbjson_types::Timestamp;
use serde::Serialize;

use crate::args::Global;
use crate::output;

/// Columns of the narrowest terminal that tables are made for.
const WIDTH: usize = 80;
/// What a column is not made narrower than.
const NARROW: usize = 6;
/// Spaces that a table puts around each cell.
const PADDING: usize = 3;
/// What stands for a value that there is not.
pub(crate) const NONE: &str = "-";

/// Prints a result: its text, or with `--json` one JSON value, as protocol buffers write it.
///
/// # Errors
/// If standard output is closed or cannot be written.
pub(crate) fn print(value: &impl Serialize, text: impl FnOnce() -> String, global: &Global) -> Result<()> {
    output::line(&if global.json { serde_json::to_string_pretty(value)? } else { text() })
}

/// Prints a value as one line of JSON.
///
/// # Errors
/// If standard output is closed or cannot be written.
pub(crate) fn json_line(value: &impl Serialize) -> Result<()> {
    output::line(&serde_json::to_string(value)?)
}

/// A table that fits the terminal: the columns in `soft` give way, in their order, and cells that are too long end in `…`.
/// `nothing` stands in the place of a table without rows.
pub(crate) fn table(header: &[&str], mut rows: Vec<Vec<String>>, soft: &[usize], nothing: &str) -> String {
    if rows.is_empty() {
        return nothing.to_owned();
    }
    let width = |rows: &[Vec<String>], column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(header[column].chars().count())
    };
    for &column in soft {
        let total: usize = (0..header.len()).map(|column| width(&rows, column) + PADDING).sum();
        let Some(excess) = total.checked_sub(WIDTH + 1) else { break };
        let least = header[column].chars().count().max(NARROW);
        let most = width(&rows, column).saturating_sub(excess + 1).max(least);
        for row in &mut rows {
            row[column] = cut(&row[column], most);
        }
    }
    let table = output::table(header, &rows, false);
    table.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// The text, or as much of it as fits, with `…` behind.
pub(crate) fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// `JOB_STATE_QUEUED` as `queued`.
pub(crate) fn word(name: &str, prefix: &str) -> String {
    let short = name.strip_prefix(prefix).unwrap_or(name);
    if short == "UNSPECIFIED" { NONE.to_owned() } else { short.to_ascii_lowercase().replace('_', " ") }
}

/// How long ago that was: `5s`, `3m`, `2h`, `4d`.
pub(crate) fn age(time: Option<&Timestamp>) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    time.map_or_else(|| NONE.to_owned(), |time| span(now - time.seconds))
}

/// Seconds as an age.
pub(crate) fn span(seconds: i64) -> String {
    match seconds.max(0) {
        s if s < 60 => format!("{s}s"),
        s if s < 3600 => format!("{}m", s / 60),
        s if s < 48 * 3600 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

/// A time and how long ago that was: `2026-01-02T03:04:05Z (3m ago)`.
pub(crate) fn time(time: Option<&Timestamp>) -> String {
    let Some(at) = time else { return NONE.to_owned() };
    let whole = Timestamp { nanos: 0, ..*at };
    let text = serde_json::to_value(whole).ok().and_then(|value| value.as_str().map(str::to_owned));
    let text = text.unwrap_or_else(|| at.seconds.to_string());
    format!("{} ({} ago)", text.replace("+00:00", "Z"), age(time))
}

/// `key=value key=value`.
pub(crate) fn labels(labels: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    or_none(pairs.join(" "))
}

/// The text, or a sign that there is none.
pub(crate) fn or_none(text: String) -> String {
    if text.is_empty() { NONE.to_owned() } else { text }
}

/// A loss: `0.3127`.
pub(crate) fn loss(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.4}"))
}

/// A score, a share of 1: `0.913`.
pub(crate) fn score(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        for (seconds, text) in [(-3, "0s"), (59, "59s"), (185, "3m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(span(seconds), text);
        }
        assert_eq!(age(None), NONE);
        let then = Timestamp { seconds: 0, nanos: 5 };
        assert!(time(Some(&then)).starts_with("1970-01-01T00:00:00Z ("), "{}", time(Some(&then)));
    }

    #[test]
    fn states_and_reasons_are_words() {
        assert_eq!(word("JOB_STATE_QUEUED", "JOB_STATE_"), "queued");
        assert_eq!(word("JOB_REASON_WAITING_FOR_PLACE", "JOB_REASON_"), "waiting for place");
        assert_eq!(word("JOB_REASON_UNSPECIFIED", "JOB_REASON_"), NONE);
    }

    #[test]
    fn a_table_fits_eighty_columns_and_keeps_names_whole() {
        let row = |n: usize| {
            vec!["a-name-of-some-length".to_owned(), "x".repeat(n), "y".repeat(n), "running".to_owned()]
        };
        let text = table(&["NAME", "MODEL", "MESSAGE", "STATE"], vec![row(10), row(90)], &[2, 1], "none");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.contains("a-name-of-some-length") && text.contains('…'), "{text}");
        let short = table(&["NAME", "MODEL", "MESSAGE", "STATE"], vec![row(10)], &[2, 1], "none");
        assert!(!short.contains('…'), "{short}");
        assert_eq!(table(&["NAME"], Vec::new(), &[], "no jobs"), "no jobs");
    }
}
