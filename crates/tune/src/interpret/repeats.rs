//! Rows that lie nearest to the same word.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::{Neighbour, Row};

/// How often rows share their nearest neighbour.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Repeats {
    /// Rows whose nearest neighbour is that of another row too.
    pub sharing: usize,
    /// Different nearest neighbours of all rows.
    pub distinct: usize,
    /// The neighbours of several rows: that of most rows first, and of those with equally many the smaller id.
    pub repeated: Vec<Repeat>,
}

/// A row of the vocabulary that is nearest to several rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Repeat {
    /// The piece's number.
    pub id: u32,
    /// Its text.
    pub piece: String,
    /// The rows, in their order.
    pub rows: Vec<usize>,
}

impl Repeats {
    /// Rows without a neighbour are left out.
    pub(super) fn of(rows: &[Row]) -> Self {
        let mut by_id: BTreeMap<u32, (&Neighbour, Vec<usize>)> = BTreeMap::new();
        for (row, nearest) in rows.iter().filter_map(|row| Some((row.row, row.nearest.first()?))) {
            by_id.entry(nearest.id).or_insert((nearest, Vec::new())).1.push(row);
        }
        let distinct = by_id.len();
        let repeat = |(id, (nearest, rows)): (u32, (&Neighbour, Vec<usize>))| Repeat {
            id,
            piece: nearest.piece.clone(),
            rows,
        };
        let mut repeated: Vec<Repeat> = by_id.into_iter().map(repeat).filter(|r| r.rows.len() > 1).collect();
        repeated.sort_by_key(|repeat| Reverse(repeat.rows.len()));
        Self { sharing: repeated.iter().map(|repeat| repeat.rows.len()).sum(), distinct, repeated }
    }
}
