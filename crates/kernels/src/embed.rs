//! Embeddings: rows of the frozen table, and rows of prompts.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::frozen::Frozen;
use crate::tensor::{SharedMut, View, dims2, tensor};
use crate::{Error, Result};

/// A run of consecutive rows of an embedded input.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// The table's rows of these token ids.
    Tokens(&'a [u32]),
    /// All rows of the prompt with this index.
    Prompt(usize),
}

/// The runs' rows, one after another, in f32.
///
/// # Shapes
/// `table` `[V, D]`; each prompt `[P, D]` f32 with a `P` of its own; the result is `[T, D]` f32.
///
/// # Errors
/// If a token id is not below `V`, a prompt's index is not among `prompts`, or a prompt has another `D`.
pub fn embed(table: &Frozen, prompts: &[Tensor], runs: &[Rows<'_>]) -> Result<Tensor> {
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
            Rows::Tokens(ids) => sources.extend(ids.iter().map(|id| Source::Token(*id as usize))),
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
    let outside = sources.iter().find_map(|s| match s {
        Source::Token(id) if *id >= table.rows() => Some(*id),
        _ => None,
    });
    if let Some(id) = outside {
        let what = format!("token {id} is outside of a vocabulary of {}", table.rows());
        return Err(Error::Shape { op, what });
    }
    gather(table, &sources)
}

enum Source<'a> {
    Token(usize),
    Row(&'a [f32]),
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
        }
    });
    tensor(values, &[sources.len(), d])
}
