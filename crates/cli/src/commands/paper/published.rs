//! What the paper prints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A table or figure of the paper.
#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Published {
    /// What it shows, in words.
    pub(super) finding: Option<String>,
    #[serde(default)]
    pub(super) columns: Vec<String>,
    /// Each with its name before its cells.
    #[serde(default)]
    pub(super) rows: Vec<Vec<String>>,
}

impl Published {
    /// That of a suite; an empty one if the paper has none of its name.
    pub(super) fn of(suite: &str) -> Self {
        let all: Result<BTreeMap<String, Self>, _> = toml::from_str(include_str!("published.toml"));
        all.expect("published.toml is TOML").remove(suite).unwrap_or_default()
    }

    /// Whether its rows are these.
    pub(super) fn has_rows(&self, names: &[String]) -> bool {
        self.rows.len() == names.len() && self.rows.iter().all(|row| names.contains(&row[0]))
    }

    /// The printed text of a cell.
    pub(super) fn cell(&self, row: &str, column: &str) -> Option<&str> {
        let place = self.columns.iter().position(|name| name == column)?;
        let row = self.rows.iter().find(|cells| cells[0] == row)?;
        Some(row[place + 1].as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::Published;

    #[test]
    fn every_row_has_a_cell_for_each_column() {
        for suite in ["table-1", "table-2", "table-3", "table-4", "table-5"] {
            let published = Published::of(suite);
            assert!(!published.rows.is_empty(), "{suite}");
            for row in &published.rows {
                assert_eq!(row.len(), published.columns.len() + 1, "{suite}: {row:?}");
            }
        }
        assert_eq!(Published::of("table-3").cell("wic", "ensemble"), Some("77.4"));
        assert_eq!(Published::of("table-3").cell("wic", "worst"), None);
    }
}
