//! Embeddings: rows of the frozen table, and rows of prompts.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::frozen::Frozen;
use crate::tensor::{SharedMut, View, dims2, tensor};
use crate::{Error, Result};

/// A run of consecutive rows of an embedded input.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// The rows of these token ids.
    Tokens(&'a [u32]),
    /// All rows of the prompt with this index.
    Prompt(usize),
    /// So many rows of zeros: another rank's, in a sum over ranks.
    Zeros(usize),
}

/// Which part of a vocabulary a table's rows, or a head's columns, are: those from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// Id of the first one.
    pub first: usize,
    /// Ids in all.
    pub size: usize,
}

impl Vocabulary {
    /// All of a vocabulary of `size`.
    #[must_use]
    pub fn whole(size: usize) -> Self {
        Self { first: 0, size }
    }

    /// Where among `held` consecutive ones the token `id` is, if it is there.
    #[inline]
    #[must_use]
    pub fn place(self, id: u32, held: usize) -> Option<usize> {
        (id as usize).checked_sub(self.first).filter(|place| *place < held)
    }
}

/// The runs' rows, one after another, in f32. A token whose row is not in the table gets zeros.
///
/// # Shapes
/// `table` `[n, D]`, the vocabulary's rows from `vocabulary.first` on; each prompt `[P, D]` f32 with a `P` of its own; the
/// result is `[T, D]` f32.
///
/// # Errors
/// If a token id is outside of the vocabulary, a prompt's index is not among `prompts`, or a prompt has another `D`.
pub fn embed(
    table: &Frozen,
    vocabulary: Vocabulary,
    prompts: &[Tensor],
    runs: &[Rows<'_>],
) -> Result<Tensor> {
    let op = "embed";
    let d = table.cols();
    let mut views = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let (_, width) = dims2(op, prompt)?;
        if width != d {
            let what = format!("a prompt with rows of {width} numbers for a table with rows of {d}");
            return Err(Error::Shape { op, what });
        }
        views.push(View::new(op, prompt)?);
    }
    let mut sources = Vec::new();
    for run in runs {
        match run {
            Rows::Tokens(ids) => {
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary.size) {
                    let what = format!("token {id} is outside of a vocabulary of {}", vocabulary.size);
                    return Err(Error::Shape { op, what });
                }
                let place = |id: &u32| vocabulary.place(*id, table.rows());
                sources.extend(ids.iter().map(|id| place(id).map_or(Source::Zeros, Source::Token)));
            }
            Rows::Zeros(count) => sources.extend((0..*count).map(|_| Source::Zeros)),
            Rows::Prompt(index) => {
                let Some(view) = views.get(*index) else {
                    return Err(Error::Shape { op, what: format!("there is no prompt {index}") });
                };
                let values = view.slice::<f32>()?;
                let rows = prompts[*index].dims()[0];
                sources.extend((0..rows).map(|row| Source::Row(&values[row * d..(row + 1) * d])));
            }
        }
    }
    gather(table, &sources)
}

enum Source<'a> {
    Token(usize),
    Row(&'a [f32]),
    Zeros,
}

fn gather(table: &Frozen, sources: &[Source<'_>]) -> Result<Tensor> {
    let d = table.cols();
    let mut values = vec![0.0; sources.len() * d];
    let out = SharedMut::new(&mut values);
    sources.par_iter().enumerate().with_min_len(64).for_each(|(row, source)| {
        // SAFETY: each row of the result is written by one thread.
        let out = unsafe { out.range(row * d, d) };
        match source {
            Source::Token(id) => table.copy_row(*id, out),
            Source::Row(values) => out.copy_from_slice(values),
            Source::Zeros => {} // as they were made
        }
    });
    tensor(values, &[sources.len(), d])
}
