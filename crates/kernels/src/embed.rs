//! Embeddings: rows of the table, and rows of prompts; and the gradient to the table where it is trained.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::frozen::Frozen;
use crate::gpu::{self, Gpu};
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

    /// Refuses a token that is none.
    fn expect(self, op: &'static str, mut ids: impl Iterator<Item = u32>) -> Result<()> {
        let Some(id) = ids.find(|id| *id as usize >= self.size) else { return Ok(()) };
        Err(Error::Shape { op, what: format!("token {id} is outside of a vocabulary of {}", self.size) })
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
    let sources = sources(table, vocabulary, prompts, runs)?;
    let gpu = match table.on_device() {
        Some(table) => Gpu::of(table)?,
        None => None,
    };
    match gpu {
        Some(gpu) => gather_on(&gpu, table, prompts, &sources),
        None => gather(table, prompts, &sources),
    }
}

/// Where a row comes from.
#[derive(Clone, Copy)]
enum Source {
    Token(usize),
    /// A prompt and its row.
    Row(usize, usize),
    Zeros,
}

fn sources(
    table: &Frozen,
    vocabulary: Vocabulary,
    prompts: &[Tensor],
    runs: &[Rows<'_>],
) -> Result<Vec<Source>> {
    let op = "embed";
    let d = table.cols();
    for prompt in prompts {
        let (_, width) = dims2(op, prompt)?;
        if width != d {
            let what = format!("a prompt with rows of {width} numbers for a table with rows of {d}");
            return Err(Error::Shape { op, what });
        }
    }
    let mut sources = Vec::new();
    for run in runs {
        match run {
            Rows::Tokens(ids) => {
                vocabulary.expect(op, ids.iter().copied())?;
                let place = |id: &u32| vocabulary.place(*id, table.rows());
                sources.extend(ids.iter().map(|id| place(id).map_or(Source::Zeros, Source::Token)));
            }
            Rows::Zeros(count) => sources.extend((0..*count).map(|_| Source::Zeros)),
            Rows::Prompt(index) => {
                let Some(prompt) = prompts.get(*index) else {
                    return Err(Error::Shape { op, what: format!("there is no prompt {index}") });
                };
                sources.extend((0..prompt.dims()[0]).map(|row| Source::Row(*index, row)));
            }
        }
    }
    Ok(sources)
}

/// On a GPU, where those prompts are brought that are read, if they are not there.
fn gather_on(gpu: &Gpu, table: &Frozen, prompts: &[Tensor], sources: &[Source]) -> Result<Tensor> {
    let (mut first_rows, mut read, mut rows) = (vec![None; prompts.len()], Vec::new(), 0);
    for source in sources {
        if let Source::Row(prompt, _) = *source
            && first_rows[prompt].is_none()
        {
            first_rows[prompt] = Some(rows);
            rows += prompts[prompt].dims()[0];
            read.push(&prompts[prompt]);
        }
    }
    let code = |source: &Source| match *source {
        Source::Token(id) => id as i32,
        Source::Row(prompt, row) => -1 - (first_rows[prompt].unwrap_or_default() + row) as i32,
        Source::Zeros => gpu::rows::NO_ROW,
    };
    let codes: Vec<i32> = sources.iter().map(code).collect();
    let device = table.on_device().map_or(&Device::Cpu, Tensor::device);
    let prompts = if read.is_empty() {
        None
    } else {
        Some(Tensor::cat(&read, 0)?.to_dtype(DType::F32)?.to_device(device)?)
    };
    gpu::rows::embed(gpu, table, prompts.as_ref(), &codes)
}

fn gather(table: &Frozen, prompts: &[Tensor], sources: &[Source]) -> Result<Tensor> {
    let d = table.cols();
    let views = prompts.iter().map(|prompt| View::new("embed", prompt)).collect::<Result<Vec<_>>>()?;
    let prompts = views.iter().map(View::slice::<f32>).collect::<Result<Vec<_>>>()?;
    let mut values = vec![0.0; sources.len() * d];
    let out = SharedMut::new(&mut values);
    sources.par_iter().enumerate().with_min_len(64).for_each(|(row, source)| {
        // SAFETY: each row of the result is written by one thread.
        let out = unsafe { out.range(row * d, d) };
        match source {
            Source::Token(id) => table.copy_row(*id, out),
            Source::Row(prompt, row) => out.copy_from_slice(&prompts[*prompt][row * d..(row + 1) * d]),
            Source::Zeros => {} // as they were made
        }
    });
    tensor(values, &[sources.len(), d])
}

/// The gradient to an embedding's table, given the gradient `dx` to what [`embed`] gave: each row's is the sum of the rows of `dx`
/// that have its token, in their order.
///
/// # Shapes
/// `dx` `[T, D]` f32; `ids` `T` tokens, none for a row that is no token's; the result is `[rows, D]` f32, for the vocabulary's
/// rows from `vocabulary.first` on. A token of another row is passed over.
///
/// # Errors
/// If the shapes or types do not fit, or a token id is outside of the vocabulary.
pub fn embed_gradient(
    dx: &Tensor,
    ids: &[Option<u32>],
    vocabulary: Vocabulary,
    rows: usize,
) -> Result<Tensor> {
    let op = "embed_gradient";
    let (count, d) = dims2(op, dx)?;
    let refuse = |what: String| Err(Error::Shape { op, what });
    if count != ids.len() {
        return refuse(format!("{count} rows of gradients for {} tokens", ids.len()));
    }
    if vocabulary.first + rows > vocabulary.size {
        let Vocabulary { first, size } = vocabulary;
        return refuse(format!("{rows} rows from {first} on of a vocabulary of {size}"));
    }
    vocabulary.expect(op, ids.iter().copied().flatten())?;
    let (ends, order) = by_place(ids, vocabulary, rows);
    if let Some(gpu) = Gpu::of(dx)? {
        return gpu::rows::embed_gradient(&gpu, dx, (&ends, &order));
    }
    let view = View::new(op, dx)?;
    let dx = view.slice::<f32>()?;
    let mut values = vec![0.0; rows * d];
    values.par_chunks_exact_mut(d.max(1)).enumerate().with_min_len(64).for_each(|(row, out)| {
        for from in &order[ends[row] as usize..ends[row + 1] as usize] {
            let from = &dx[*from as usize * d..][..d];
            out.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
    });
    tensor(values, &[rows, d])
}

/// Which of `ids` are those of the table's row `r`: `order[ends[r] .. ends[r + 1]]`, ascending.
fn by_place(ids: &[Option<u32>], vocabulary: Vocabulary, rows: usize) -> (Vec<u32>, Vec<u32>) {
    let place = |id: &Option<u32>| id.and_then(|id| vocabulary.place(id, rows));
    let mut ends = vec![0; rows + 1];
    ids.iter().filter_map(place).for_each(|place| ends[place + 1] += 1);
    for row in 0..rows {
        ends[row + 1] += ends[row];
    }
    let (mut next, mut order) = (ends.clone(), vec![0; ends[rows] as usize]);
    for (i, id) in ids.iter().enumerate() {
        if let Some(place) = place(id) {
            order[next[place] as usize] = i as u32;
            next[place] += 1;
        }
    }
    (ends, order)
}
