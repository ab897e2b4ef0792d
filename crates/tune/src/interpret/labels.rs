//! Whether the labels of a task are among the neighbours of a prompt's rows.

use std::collections::BTreeSet;

use serde::Serialize;
use tokenizers::Tokenizer;

use super::{Row, SPACE};
use crate::{Error, Result, init::label_order};

/// Labels to look for.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    /// Their texts, in any order.
    pub texts: Vec<String>,
    /// Whether the prompt's first rows began as them ([`PromptInit::ClassLabel`](crate::init::PromptInit::ClassLabel)).
    pub began_as_labels: bool,
}

/// A label, and the rows that lie near to it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Persistence {
    /// Its text.
    pub label: String,
    /// Its pieces, each once; a space alone is none.
    pub pieces: Vec<LabelPiece>,
    /// The rows among whose neighbours is one of the pieces.
    pub rows: Vec<usize>,
    /// The row that began as this label; `None` where none did, or it is not known.
    pub own_row: Option<usize>,
    /// Whether that row is among `rows`.
    pub in_own_row: Option<bool>,
}

/// A piece of a label's text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LabelPiece {
    /// Its number in the vocabulary.
    pub id: u32,
    /// Its text.
    pub piece: String,
    /// The rows among whose neighbours it is.
    pub rows: Vec<usize>,
}

impl Labels {
    /// Each label, in the order of the rows that labels begin in.
    pub(super) fn persistence(&self, tokenizer: &Tokenizer, rows: &[Row]) -> Result<Vec<Persistence>> {
        let one = |(place, label): (usize, &str)| {
            let pieces = pieces(label, tokenizer, rows)?;
            let near: BTreeSet<usize> = pieces.iter().flat_map(|piece| piece.rows.iter().copied()).collect();
            let own_row = (self.began_as_labels && place < rows.len()).then_some(place);
            Ok(Persistence {
                label: label.to_owned(),
                pieces,
                in_own_row: own_row.map(|row| near.contains(&row)),
                own_row,
                rows: near.into_iter().collect(),
            })
        };
        label_order(&self.texts).into_iter().enumerate().map(one).collect()
    }
}

fn pieces(label: &str, tokenizer: &Tokenizer, rows: &[Row]) -> Result<Vec<LabelPiece>> {
    let encoded = tokenizer.encode(label, false);
    let encoded = encoded.map_err(|cause| Error::Tokenizer { cause: cause.to_string() })?;
    let mut pieces: Vec<LabelPiece> = Vec::new();
    for (&id, piece) in encoded.get_ids().iter().zip(encoded.get_tokens()) {
        if piece.trim_matches(SPACE).is_empty() || pieces.iter().any(|known| known.id == id) {
            continue;
        }
        let near = |row: &&Row| row.nearest.iter().any(|neighbour| neighbour.id == id);
        let rows = rows.iter().filter(near).map(|row| row.row).collect();
        pieces.push(LabelPiece { id, piece: piece.clone(), rows });
    }
    Ok(pieces)
}
