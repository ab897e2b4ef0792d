//! Linear layers: forward, the gradient to the input, and that to the weight where it is trained.

use std::mem::MaybeUninit;

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::element::Element;
use crate::frozen::Frozen;
use crate::gemm::pack::{Layout, Right};
use crate::gemm::{Block, Operand, Term};
use crate::gpu::{self, Gpu};
use crate::isa::{Isa, isa};
use crate::tensor::{SharedMut, View, dims2, expect_activation, expect_dims, tensor};
use crate::{Error, Result};

/// `x w^T`: `x` `[T, in]` (bf16 or f32), `w` `[out, in]`, result `[T, out]` of type `out` (bf16 or f32), summed in f32.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn linear(x: &Tensor, w: &Frozen, out: DType) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(x)? {
        let op = "linear";
        expect_activation(op, out)?;
        check_input(op, x, w.cols(), "in")?;
        return gpu::linear::product(&gpu, op, &[(x, w)], Layout::ColumnsAsRows, None, out);
    }
    linear_on(isa(), x, w, out)
}

/// [`linear`] for each of several weights. On a GPU those that lie below each other ([`Frozen::to_device_together`]) are one product, and
/// their results columns of one matrix.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn linear_each<const N: usize>(x: &Tensor, weights: [&Frozen; N], out: DType) -> Result<[Tensor; N]> {
    let op = "linear_each";
    expect_activation(op, out)?;
    for w in weights {
        check_input(op, x, w.cols(), "in")?;
    }
    if let Some(gpu) = Gpu::of(x)? {
        return gpu::linear::each(&gpu, op, x, weights, out);
    }
    let results = weights.iter().map(|w| linear_on(isa(), x, w, out)).collect::<Result<Vec<_>>>()?;
    Ok(results.try_into().unwrap_or_else(|_| unreachable!("each weight has a result")))
}

pub(crate) fn linear_on(isa: Isa, x: &Tensor, w: &Frozen, out: DType) -> Result<Tensor> {
    let op = "linear";
    expect_activation(op, out)?;
    let rows = check_input(op, x, w.cols(), "in")?;
    stored(isa, op, &[(x, w)], Layout::ColumnsAsRows, (rows, w.rows()), out)
}

/// `residual + x w^T`: as [`linear`], with the f32 `residual` `[T, out]` added to the finished sums.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn linear_add(residual: &Tensor, x: &Tensor, w: &Frozen) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(x)? {
        let op = "linear_add";
        let rows = check_input(op, x, w.cols(), "in")?;
        expect_dims(op, "the residual", residual, &[rows, w.rows()])?;
        let residual = Some(residual);
        return gpu::linear::product(&gpu, op, &[(x, w)], Layout::ColumnsAsRows, residual, DType::F32);
    }
    linear_add_on(isa(), residual, x, w)
}

pub(crate) fn linear_add_on(isa: Isa, residual: &Tensor, x: &Tensor, w: &Frozen) -> Result<Tensor> {
    let op = "linear_add";
    let rows = check_input(op, x, w.cols(), "in")?;
    expect_dims(op, "the residual", residual, &[rows, w.rows()])?;
    let view = View::new(op, residual)?;
    let residual = view.slice::<f32>()?;
    let dims = (rows, w.rows());
    let add = |place: usize, sums: &[f32], out: &mut [MaybeUninit<f32>]| {
        let residual = &residual[place..place + sums.len()];
        for (o, (r, s)) in out.iter_mut().zip(residual.iter().zip(sums)) {
            o.write(r + s);
        }
    };
    match x.dtype() {
        DType::BF16 => computed::<bf16, f32>(isa, op, &[(x, w)], Layout::ColumnsAsRows, dims, add),
        _ => computed::<f32, f32>(isa, op, &[(x, w)], Layout::ColumnsAsRows, dims, add),
    }
}

/// The gradient to the common input of several linear layers: the sum of `dy w` over the pairs `(dy, w)`, `dy` `[T, out]`,
/// `w` `[out, in]`; the result is `[T, in]` of type `out` (bf16 or f32), summed in f32. On a GPU pairs of gradients that lie beside each
/// other, to results of [`linear_each`], are one product.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn linear_gradient(terms: &[(&Tensor, &Frozen)], out: DType) -> Result<Tensor> {
    if let Some((first, _)) = terms.first()
        && let Some(gpu) = Gpu::of(first)?
    {
        check_terms(terms, out)?;
        return gpu::linear::product(&gpu, "linear_gradient", terms, Layout::Rows, None, out);
    }
    linear_gradient_on(isa(), terms, out)
}

/// `sum + dy w + ...`: as [`linear_gradient`], with the f32 `sum` `[T, in]` added to the finished sums.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn linear_gradient_add(sum: &Tensor, terms: &[(&Tensor, &Frozen)]) -> Result<Tensor> {
    let op = "linear_gradient_add";
    let (rows, cols) = check_terms(terms, DType::F32)?;
    expect_dims(op, "the sum", sum, &[rows, cols])?;
    match Gpu::of(sum)? {
        Some(gpu) => gpu::linear::product(&gpu, op, terms, Layout::Rows, Some(sum), DType::F32),
        None => crate::add(sum, &linear_gradient_on(isa(), terms, DType::F32)?),
    }
}

pub(crate) fn linear_gradient_on(isa: Isa, terms: &[(&Tensor, &Frozen)], out: DType) -> Result<Tensor> {
    let (rows, cols) = check_terms(terms, out)?;
    stored(isa, "linear_gradient", terms, Layout::Rows, (rows, cols), out)
}

/// The result's rows and columns.
fn check_terms(terms: &[(&Tensor, &Frozen)], out: DType) -> Result<(usize, usize)> {
    let op = "linear_gradient";
    expect_activation(op, out)?;
    let Some((first, w)) = terms.first() else {
        return Err(Error::Shape { op, what: "there is no term".into() });
    };
    let (rows, cols) = (dims2(op, first)?.0, w.cols());
    for (dy, w) in terms {
        let same = check_input(op, dy, w.rows(), "out")?;
        if same != rows || w.cols() != cols || dy.dtype() != first.dtype() {
            return Err(Error::Shape { op, what: "the terms differ in rows, inputs or type".into() });
        }
    }
    Ok((rows, cols))
}

/// The gradient to the weight of a linear layer: `dy^T x`, summed in f32 in the order of the rows.
///
/// # Shapes
/// `dy` `[T, out]` and `x` `[T, in]`, both of one type (bf16 or f32); the result is `[out, in]` f32, zeros if `T` is 0.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn linear_weight_gradient(dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(x)? {
        let (rows, dims) = check_weight_gradient(dy, x)?;
        if rows == 0 {
            return Ok(Tensor::zeros(dims, DType::F32, x.device())?);
        }
        let (turned, x) = (dy.t()?.contiguous()?, Frozen::from_device(x.clone()));
        let terms = [(&turned, &x)];
        return gpu::linear::product(&gpu, "linear_weight_gradient", &terms, Layout::Rows, None, DType::F32);
    }
    linear_weight_gradient_on(isa(), dy, x)
}

pub(crate) fn linear_weight_gradient_on(isa: Isa, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    check_weight_gradient(dy, x)?;
    match x.dtype() {
        DType::BF16 => weight_gradient::<bf16>(isa, dy, x),
        _ => weight_gradient::<f32>(isa, dy, x),
    }
}

/// The number of rows, and the result's shape.
fn check_weight_gradient(dy: &Tensor, x: &Tensor) -> Result<(usize, (usize, usize))> {
    let op = "linear_weight_gradient";
    let ((rows, out), (same, cols)) = (dims2(op, dy)?, dims2(op, x)?);
    expect_activation(op, x.dtype())?;
    if rows == same && dy.dtype() == x.dtype() {
        return Ok((rows, (out, cols)));
    }
    let (gradient, input) = (dy.dtype(), x.dtype());
    let what = format!("a gradient of {rows} rows of {gradient:?} for an input of {same} rows of {input:?}");
    Err(Error::Shape { op, what })
}

fn weight_gradient<T: Operand>(isa: Isa, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    let op = "linear_weight_gradient";
    let ((rows, out), (_, cols)) = (dims2(op, dy)?, dims2(op, x)?);
    let (dy, x) = (View::new(op, dy)?, View::new(op, x)?);
    let turned = transposed(dy.slice::<T>()?, rows, out);
    let values = T::operand(x.slice::<T>()?);
    let b = Right { values, layout: Layout::Rows, stride: cols, k: rows, n: cols };
    summed(isa, &[Term { a: &turned, b }], (out, cols), narrow::<f32>)
}

/// `[cols, rows]` of `[rows, cols]`, square by square, so that whole cache lines are read and written.
fn transposed<T: Element>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    const SIDE: usize = 32;
    let mut turned = vec![T::default(); values.len()];
    turned.par_chunks_mut((SIDE * rows).max(1)).enumerate().for_each(|(block, turned)| {
        for first in (0..rows).step_by(SIDE) {
            let square = first..rows.min(first + SIDE);
            for (col, turned) in turned.chunks_exact_mut(rows).enumerate() {
                for (row, to) in square.clone().zip(&mut turned[square.clone()]) {
                    *to = values[row * cols + block * SIDE + col];
                }
            }
        }
    });
    turned
}

/// The rows of `x`, which must have `width` columns.
fn check_input(op: &'static str, x: &Tensor, width: usize, name: &str) -> Result<usize> {
    let (rows, cols) = dims2(op, x)?;
    expect_activation(op, x.dtype())?;
    if cols == width {
        return Ok(rows);
    }
    Err(Error::Shape { op, what: format!("rows of {cols} numbers for a weight whose {name} is {width}") })
}

/// The sum of products, rounded to `out`.
fn stored(
    isa: Isa,
    op: &'static str,
    terms: &[(&Tensor, &Frozen)],
    layout: Layout,
    dims: (usize, usize),
    out: DType,
) -> Result<Tensor> {
    match (terms[0].0.dtype(), out) {
        (DType::BF16, DType::BF16) => computed::<bf16, bf16>(isa, op, terms, layout, dims, narrow),
        (DType::BF16, _) => computed::<bf16, f32>(isa, op, terms, layout, dims, narrow),
        (_, DType::BF16) => computed::<f32, bf16>(isa, op, terms, layout, dims, narrow),
        _ => computed::<f32, f32>(isa, op, terms, layout, dims, narrow),
    }
}

fn narrow<O: Element>(_place: usize, sums: &[f32], out: &mut [MaybeUninit<O>]) {
    for (o, s) in out.iter_mut().zip(sums) {
        o.write(O::narrow(*s));
    }
}

/// The sum of products with frozen weights; see [`summed`].
fn computed<A: Operand, O: Element>(
    isa: Isa,
    op: &'static str,
    terms: &[(&Tensor, &Frozen)],
    layout: Layout,
    dims: (usize, usize),
    finish: impl Fn(usize, &[f32], &mut [MaybeUninit<O>]) + Sync,
) -> Result<Tensor> {
    let views = terms.iter().map(|(x, _)| View::new(op, x)).collect::<Result<Vec<_>>>()?;
    let mut products = Vec::with_capacity(terms.len());
    for (view, (_, w)) in views.iter().zip(terms) {
        products.push(Term { a: view.slice::<A>()?, b: Right::of(w, layout) });
    }
    summed(isa, &products, dims, finish)
}

/// The sum of products, each row of a block put through `finish(place of its first number, sums, out)`.
fn summed<A: Operand, O: Element>(
    isa: Isa,
    products: &[Term<'_, A>],
    (rows, cols): (usize, usize),
    finish: impl Fn(usize, &[f32], &mut [MaybeUninit<O>]) + Sync,
) -> Result<Tensor> {
    let mut values: Vec<O> = Vec::with_capacity(rows * cols);
    let out = SharedMut::uninit(&mut values);
    A::product(isa, products, rows, &|block: &Block<'_>| {
        isa.vectorize(
            #[inline(always)]
            || {
                for (place, sums) in block.rows(cols) {
                    // SAFETY: blocks cover the result once, so that nobody else writes these numbers; they lie within the
                    // capacity.
                    finish(place, sums, unsafe { out.range(place, sums.len()) });
                }
            },
        );
    });
    // SAFETY: the blocks cover all `rows * cols` numbers.
    unsafe { values.set_len(rows * cols) };
    tensor(values, &[rows, cols])
}
