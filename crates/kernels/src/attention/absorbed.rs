//! Attention of few queries to rows of which no keys and values are made.
//!
//! With keys `k = x wk^T` and values `v = x wv^T` of rows `x`, a head's scores are `q k^T = (q wk) x^T` and its output is `p v = (p x) wv^T`:
//! queries as wide as the rows attend to the rows themselves, and all heads are queries of one head. For a row of `x` that is a product
//! with every query and head instead of one with both weights: less, as long as an example's queries are fewer than a head has numbers.
//! (DeepSeek-V2 absorbs weights like this to keep no keys and values, DeepSeek-AI 2024, 2.1.2.)

use std::sync::OnceLock;

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{Attention, attention_on, backward, check_rows, slices, widened};
use crate::element::Element;
use crate::frozen::Frozen;
use crate::gemm::micro;
use crate::gemm::pack::{Layout, Right};
use crate::gemm::{Block, Operand, Term};
#[cfg(target_arch = "x86_64")]
use crate::gemm::{amx, x86};
use crate::gpu::{self, Address, Gpu, Uploaded};
use crate::isa::{Isa, isa};
use crate::segments::{Segments, once};
use crate::tensor::{SharedMut, View, dims2, expect_activation, expect_dims, tensor};
use crate::{Error, Result};

/// Who reads which rows, head by head: made once for all layers of a pass.
pub struct Readers {
    queries: Segments,
    rows: Segments,
    heads: usize,
    /// Every head of every query.
    wide: Segments,
    places: OnceLock<Uploaded>,
}

impl Readers {
    /// Of each example its `queries` read its `rows` with so many heads.
    #[must_use]
    pub fn new(queries: &Segments, rows: &Segments, heads: usize) -> Self {
        let wide = Segments::new((0..queries.len()).map(|e| queries.range(e).len() * heads));
        Self { queries: queries.clone(), rows: rows.clone(), heads, wide, places: OnceLock::new() }
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads
    }

    pub(crate) fn wide(&self) -> &Segments {
        &self.wide
    }

    pub(crate) fn rows(&self) -> &Segments {
        &self.rows
    }

    /// Where on a GPU the scores of each example lie, and how many numbers those of all have. From query to query of an example it is the
    /// next multiple of 8.
    pub(crate) fn places_on(&self, gpu: &Gpu) -> Result<(Address, usize)> {
        let (mut places, mut total) = (Vec::with_capacity(self.rows.len()), 0);
        for e in 0..self.rows.len() {
            places.push(total as i64);
            total += self.wide.range(e).len() * self.rows.range(e).len().next_multiple_of(8);
        }
        let places = once(&self.places, || gpu.upload("absorbed_attention", &places))?;
        Ok((places.address, total))
    }

    fn one_head(&self) -> Attention<'_> {
        Attention {
            queries: &self.wide,
            keys: &self.rows,
            heads: 1,
            bias: None,
            causal: false,
            prefix: 0,
            dropout: None,
        }
    }
}

/// What attends to what, and the weights of which keys and values would be made.
#[derive(Clone, Copy)]
pub struct Absorbed<'a> {
    /// Queries and rows.
    pub readers: &'a Readers,
    /// `[heads * K, D]`.
    pub k: &'a Frozen,
    /// `[heads * K, D]`.
    pub v: &'a Frozen,
}

/// The result of [`absorbed_attention`] and what its gradient needs.
pub struct AbsorbedAttended {
    /// `[Tq, heads * K]`, of the operands' type.
    pub output: Tensor,
    /// `[Tq, heads * K]`: they are made wide once more, since wide they would be larger than short inputs' keys and values.
    pub(crate) queries: Tensor,
    /// On the CPU the logarithms of the normalisers, `[1, Tq * heads]` f32; on a GPU the probabilities of all examples.
    pub(crate) softmax: Tensor,
}

/// `softmax(q k^T) v`, head by head and example by example, for the keys and values that `x` has by the weights.
///
/// # Shapes
/// `q` `[Tq, heads * K]` and `x` `[T, D]`, of one type (bf16 or f32); on a GPU the weights are of that type, too.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn absorbed_attention(spec: &Absorbed<'_>, q: &Tensor, x: &Tensor) -> Result<AbsorbedAttended> {
    check("absorbed_attention", spec, q, x)?;
    if let Some(gpu) = Gpu::of(x)? {
        return gpu::absorbed::attention(&gpu, spec, q, x);
    }
    absorbed_attention_on(isa(), spec, q, x)
}

pub(crate) fn absorbed_attention_on(
    isa: Isa,
    spec: &Absorbed<'_>,
    q: &Tensor,
    x: &Tensor,
) -> Result<AbsorbedAttended> {
    let queries = widened_by_heads(isa, q, spec.k, spec.readers.heads)?;
    let attended = attention_on(isa, &spec.readers.one_head(), &queries, x, x)?;
    let output = narrowed_by_heads(isa, &attended.output, spec.v, spec.readers.heads)?;
    Ok(AbsorbedAttended { output, queries: q.clone(), softmax: attended.normalisers })
}

/// Layers whose parts of the gradient to rows wait for each other on a GPU.
const MOST_WAITING: usize = 6;

/// The gradient to rows that layers attend to by [`absorbed_attention`]: the sum of what each of them adds.
///
/// On a GPU a few layers' parts wait for each other, as long as they take no more than twice the sum's memory: their products are small
/// beside the sum, which is read and written once for all of them.
pub struct RowGradients<'a> {
    readers: &'a Readers,
    x: &'a Tensor,
    sum: Option<Tensor>,
    waiting: Vec<gpu::absorbed::Waiting>,
}

impl<'a> RowGradients<'a> {
    /// For the rows `x` `[T, D]`, to which nothing was added yet.
    #[must_use]
    pub fn new(readers: &'a Readers, x: &'a Tensor) -> Self {
        Self { readers, x, sum: None, waiting: Vec::new() }
    }

    /// Adds the part of a layer with the weights `k` and `v`, given the gradient `dy` to its output, and returns the gradient to its
    /// queries.
    ///
    /// # Shapes
    /// As for [`absorbed_attention`]; `dy` as the output.
    ///
    /// # Errors
    /// If the shapes or types do not fit.
    pub fn add(&mut self, [k, v]: [&Frozen; 2], attended: &AbsorbedAttended, dy: &Tensor) -> Result<Tensor> {
        let op = "absorbed_attention_gradient";
        let spec = Absorbed { readers: self.readers, k, v };
        check(op, &spec, dy, self.x)?;
        expect_dims(op, "the output", &attended.output, dy.dims())?;
        let Some(gpu) = Gpu::of(self.x)? else {
            let given = (self.x, dy);
            let (dq, dx) = absorbed_attention_gradient_on(isa(), &spec, attended, given, self.sum.as_ref())?;
            self.sum = Some(dx);
            return Ok(dq);
        };
        let (dq, waiting) = gpu::absorbed::gradient(&gpu, &spec, attended, (self.x, dy))?;
        let bytes = waiting.numbers() * self.x.dtype().size_in_bytes();
        self.waiting.push(waiting);
        let next = self.waiting.len() + 1;
        if next > MOST_WAITING || next * bytes > 2 * self.x.elem_count() * size_of::<f32>() {
            self.add_waiting(&gpu)?;
        }
        Ok(dq)
    }

    /// The sum `[T, D]` f32; none where no layer added anything.
    ///
    /// # Errors
    /// If the device is not what it was.
    pub fn finish(mut self) -> Result<Option<Tensor>> {
        if let Some(gpu) = Gpu::of(self.x)?.filter(|_| !self.waiting.is_empty()) {
            self.add_waiting(&gpu)?;
        }
        Ok(self.sum)
    }

    fn add_waiting(&mut self, gpu: &Gpu) -> Result<()> {
        let sum = self.sum.as_ref();
        self.sum = Some(gpu::absorbed::row_gradient(gpu, self.readers, self.x, &self.waiting, sum)?);
        self.waiting.clear();
        Ok(())
    }
}

/// The gradients to `q` and to `x`, the latter in f32 and added to `sum`.
pub(crate) fn absorbed_attention_gradient_on(
    isa: Isa,
    spec: &Absorbed<'_>,
    attended: &AbsorbedAttended,
    (x, dy): (&Tensor, &Tensor),
    sum: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let op = "absorbed_attention_gradient";
    let queries = widened_by_heads(isa, &attended.queries, spec.k, spec.readers.heads)?;
    let dy = widened_by_heads(isa, dy, spec.v, spec.readers.heads)?;
    let views = [View::new(op, &queries)?, View::new(op, x)?, View::new(op, &dy)?];
    let normalisers = View::new(op, &attended.softmax)?;
    let sum = sum.map(|sum| View::new(op, sum)).transpose()?;
    let sum = sum.as_ref().map(View::slice::<f32>).transpose()?;
    let one = (&spec.readers.one_head(), x.dims()[1], normalisers.slice::<f32>()?, sum);
    let (dq, dx) = match x.dtype() {
        DType::F32 => {
            let (dq, dx) = gradient_f32::<f32>(isa, one, slices::<f32, _>(&views)?);
            (tensor(dq, queries.dims())?, dx)
        }
        _ => {
            let (dq, dx) = gradient_bf16(isa, one, slices::<bf16, _>(&views)?);
            (tensor(dq, queries.dims())?, dx)
        }
    };
    Ok((narrowed_by_heads(isa, &dq, spec.k, spec.readers.heads)?, tensor(dx, x.dims())?))
}

/// One head's attention, the width of its rows, the logarithms of its normalisers, and what its gradient to the rows is added to.
type OneHead<'a> = (&'a Attention<'a>, usize, &'a [f32], Option<&'a [f32]>);

fn gradient_f32<O: Element>(isa: Isa, one: OneHead<'_>, operands: [&[f32]; 3]) -> (Vec<O>, Vec<f32>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => {
            backward::to_rows::<x86::Avx512, O>(isa, one, operands)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => backward::to_rows::<x86::Avx2, O>(isa, one, operands),
        _ => backward::to_rows::<micro::Portable, O>(isa, one, operands),
    }
}

fn gradient_bf16(isa: Isa, one: OneHead<'_>, operands: [&[bf16]; 3]) -> (Vec<bf16>, Vec<f32>) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::AmxBf16 => return backward::to_rows::<amx::AmxBf16, bf16>(isa, one, operands),
        Isa::Avx512Bf16 => return backward::to_rows::<x86::Avx512Bf16, bf16>(isa, one, operands),
        _ => {}
    }
    let wide = operands.map(widened);
    gradient_f32(isa, one, wide.each_ref().map(Vec::as_slice))
}

fn check(op: &'static str, spec: &Absorbed<'_>, q: &Tensor, x: &Tensor) -> Result<()> {
    let ((rows, width), (_, d)) = (dims2(op, q)?, dims2(op, x)?);
    expect_activation(op, x.dtype())?;
    let refuse = |what: String| Err(Error::Shape { op, what });
    if q.dtype() != x.dtype() {
        return refuse(format!("queries of {:?} for rows of {:?}", q.dtype(), x.dtype()));
    }
    for (name, w) in [("the keys", spec.k), ("the values", spec.v)] {
        if (w.rows(), w.cols()) != (width, d) {
            return refuse(format!("{w:?} for {name}, where {width} x {d} is expected"));
        }
    }
    expect_dims(op, "the rows", x, &[spec.readers.rows.total(), d])?;
    check_rows(op, (&spec.readers.queries, &spec.readers.rows), rows, (width, spec.readers.heads))
}

/// The numbers of head `h` times the weight's rows that are the head's: `[T, heads * K]` to `[T * heads, D]`.
fn widened_by_heads(isa: Isa, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 => widen::<bf16>(isa, x, w, heads),
        _ => widen::<f32>(isa, x, w, heads),
    }
}

/// Head `h`'s rows times the weight's rows that are the head's, transposed: `[T * heads, D]` to `[T, heads * K]`.
fn narrowed_by_heads(isa: Isa, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 => narrow::<bf16>(isa, x, w, heads),
        _ => narrow::<f32>(isa, x, w, heads),
    }
}

fn widen<T: Operand>(isa: Isa, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
    let (rows, d, k) = (x.dims()[0], w.cols(), w.rows() / heads);
    let by_head = by_heads::<T>(isa, (x, k), (w, heads), Layout::Rows, |row, head| (row * heads + head) * d)?;
    tensor(by_head, &[rows * heads, d])
}

fn narrow<T: Operand>(isa: Isa, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
    let (rows, d, k) = (x.dims()[0] / heads, w.cols(), w.rows() / heads);
    let place = |row, head| row * w.rows() + head * k;
    tensor(by_heads::<T>(isa, (x, d), (w, heads), Layout::ColumnsAsRows, place)?, &[rows, w.rows()])
}

/// Products head by head: of the `width` numbers that each head has of each row of `x`, with the head's rows of the weight. The result of
/// a row and a head begins at `place(row, head)`.
fn by_heads<T: Operand>(
    isa: Isa,
    (x, width): (&Tensor, usize),
    (w, heads): (&Frozen, usize),
    layout: Layout,
    place: impl Fn(usize, usize) -> usize + Sync,
) -> Result<Vec<T>> {
    let view = View::new("absorbed_attention", x)?;
    let x = view.slice::<T>()?;
    let rows = x.len() / (heads * width).max(1);
    let k = w.rows() / heads;
    let n = if layout == Layout::Rows { w.cols() } else { k };
    let mut values = vec![T::default(); rows * heads * n];
    let out = SharedMut::new(&mut values);
    for head in 0..heads {
        let own = |row: usize| &x[(row * heads + head) * width..][..width];
        let a: Vec<T> = (0..rows).into_par_iter().flat_map_iter(|row| own(row).iter().copied()).collect();
        let part = w.part((head * k, k), (0, w.cols()));
        let b = Right::of(&part, layout);
        T::product(isa, &[Term { a: &a, b }], rows, &|block: &Block<'_>| {
            isa.vectorize(
                #[inline(always)]
                || {
                    for (at, sums) in block.rows(n) {
                        // SAFETY: blocks cover a head's result once, and heads follow each other, so that nobody else writes these
                        // numbers; they lie within the result.
                        let out = unsafe { out.range(place(at / n, head) + at % n, sums.len()) };
                        out.iter_mut().zip(sums).for_each(|(o, s)| *o = T::narrow(*s));
                    }
                },
            );
        });
    }
    Ok(values)
}
