//! What the rows of a trained prompt lie near to: their nearest rows of the frozen vocabulary, whether these belong together, whether the
//! labels of the task are among them, and how like prompts are to each other (Lester et al. 2021, section 7). Nothing here reads or
//! writes a file.

mod closeness;
mod labels;
mod neighbours;
mod norms;
mod repeats;
mod similarity;
#[cfg(test)]
mod tests;
mod vectors;
mod vocabulary;

use incipit_kernels::Frozen;
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::{Error, Result, prompt::Prompt};
pub use closeness::Closeness;
pub use labels::{LabelPiece, Labels, Persistence};
pub use norms::Norms;
pub use repeats::{Repeat, Repeats};
pub use similarity::{Matrix, Similarity, similarity};
pub use vocabulary::VocabularyRows;

/// SentencePiece's mark of a space before a piece.
const SPACE: char = '\u{2581}';

/// A frozen vocabulary.
#[derive(Clone, Copy)]
pub struct Vocabulary<'a> {
    /// The embeddings of its pieces, `[V, D]`, on the CPU.
    pub table: &'a Frozen,
    /// The texts of its pieces; a table may have more rows.
    pub tokenizer: &'a Tokenizer,
}

impl Vocabulary<'_> {
    /// The text of a row's piece.
    fn piece(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_else(|| "(unused)".to_owned())
    }
}

/// A row of a prompt, or another vector of its width.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Its place, from 0.
    pub row: usize,
    /// Its Euclidean norm.
    pub norm: f64,
    /// The mean cosine over the pairs of `nearest`; `None` where there are fewer than two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tightness: Option<f64>,
    /// The share of the pairs of `nearest` that are the same word, upper and lower case and the mark of a space aside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_word: Option<f64>,
    /// The rows of the vocabulary with the greatest cosine, the nearest first; of equally near ones the smaller id first. None for a
    /// row of zeros, whose cosine with anything is undefined.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nearest: Vec<Neighbour>,
}

/// A row of the vocabulary, and how near it lies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Neighbour {
    /// The piece's number.
    pub id: u32,
    /// Its text.
    pub piece: String,
    /// In -1..=1.
    pub cosine: f32,
}

/// What a prompt's rows have to do with the words of a vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Words {
    /// The vocabulary.
    pub vocabulary: VocabularyRows,
    /// Whether neighbours belong together.
    pub clusters: Clusters,
    /// Rows with the same nearest neighbour.
    pub repeats: Repeats,
    /// Labels among the neighbours; `None` where none were asked for.
    pub labels: Option<Vec<Persistence>>,
}

/// How near neighbours lie, and how near to each other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Clusters {
    /// Those of the prompt's rows.
    pub prompt: Closeness,
    /// Those of 64 random vectors, to compare with: their numbers are normal, with each column's mean and deviation in the vocabulary.
    /// They are the same for the same vocabulary.
    pub random: Closeness,
}

/// A prompt's rows by themselves, without neighbours.
#[must_use]
pub fn rows(prompt: &Prompt) -> Vec<Row> {
    bare(prompt.values(), prompt.width())
}

fn bare(vectors: &[f32], width: usize) -> Vec<Row> {
    let row = |(row, vector)| Row {
        row,
        norm: vectors::norm(vector),
        tightness: None,
        same_word: None,
        nearest: Vec::new(),
    };
    vectors.chunks_exact(width).enumerate().map(row).collect()
}

/// The rows of the prompt `[P, D]`, each with the `count` words that are nearest to it, and what follows from these. Besides the vocabulary's
/// table, which may be a mapped file, memory is needed for 1,024 of its rows.
///
/// # Errors
/// If the prompt's rows are not as wide as the table's, or the tokenizer fails at a label.
pub fn words(
    prompt: &Prompt,
    vocabulary: Vocabulary<'_>,
    count: usize,
    labels: Option<&Labels>,
) -> Result<(Vec<Row>, Words)> {
    let (width, table) = (prompt.width(), vocabulary.table);
    if width != table.cols() {
        let what = format!(
            "the prompt's rows have {width} columns and the vocabulary's have {}; give the model that it was \
             trained for",
            table.cols()
        );
        return Err(Error::Prompt { what });
    }
    let scan = vocabulary::Scan::of(table);
    // Both at once: the table is gone through once.
    let vectors = [prompt.values(), &scan.random_vectors()].concat();
    let mut rows = bare(&vectors, width);
    for (row, nearest) in rows.iter_mut().zip(neighbours::nearest(&vectors, table, count)?) {
        row.tightness = closeness::tightness(table, &nearest);
        let named = |near: neighbours::Near| Neighbour {
            id: near.id,
            piece: vocabulary.piece(near.id),
            cosine: near.cosine,
        };
        row.nearest = nearest.into_iter().map(named).collect();
        row.same_word = closeness::same_word(&row.nearest);
    }
    let random = rows.split_off(prompt.length());
    let labels = labels.map(|labels| labels.persistence(vocabulary.tokenizer, &rows)).transpose()?;
    let words = Words {
        vocabulary: scan.vocabulary(),
        clusters: Clusters { prompt: Closeness::of(&rows), random: Closeness::of(&random) },
        repeats: Repeats::of(&rows),
        labels,
    };
    Ok((rows, words))
}
