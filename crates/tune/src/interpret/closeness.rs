//! Whether a row's neighbours are a cluster.

use incipit_kernels::Frozen;
use serde::Serialize;

use super::neighbours::{Near, unit_row};
use super::vectors::{add, mean_of_pairs};
use super::{Neighbour, Row, SPACE};

/// Means over several rows, of those that have the number; `None` where none has.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Closeness {
    /// Of the cosine with the nearest neighbour.
    pub nearest: Option<f64>,
    /// Of [`Row::tightness`].
    pub tightness: Option<f64>,
    /// Of [`Row::same_word`].
    pub same_word: Option<f64>,
}

impl Closeness {
    pub(super) fn of(rows: &[Row]) -> Self {
        Self {
            nearest: mean(rows.iter().filter_map(|row| row.nearest.first().map(|n| f64::from(n.cosine)))),
            tightness: mean(rows.iter().filter_map(|row| row.tightness)),
            same_word: mean(rows.iter().filter_map(|row| row.same_word)),
        }
    }
}

/// The mean cosine over the pairs of these rows of the table, which have directions; `None` for fewer than two.
pub(super) fn tightness(table: &Frozen, rows: &[Near]) -> Option<f64> {
    let (mut sum, mut unit) = (vec![0.0; table.cols()], vec![0.0; table.cols()]);
    for row in rows {
        unit_row(table, row.id as usize, &mut unit);
        add(&mut sum, &unit, 1.0);
    }
    mean_of_pairs(&sum, rows.len())
}

/// The share of the pairs that are the same word, upper and lower case and the mark of a space aside; `None` for fewer than two.
pub(super) fn same_word(neighbours: &[Neighbour]) -> Option<f64> {
    let words = neighbours.iter().map(|n| n.piece.trim_start_matches(SPACE).to_lowercase());
    let words: Vec<String> = words.collect();
    let pairs = words.iter().enumerate().flat_map(|(i, a)| words[..i].iter().map(move |b| a == b));
    mean(pairs.map(|same| if same { 1.0 } else { 0.0 }))
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}
