//! RMSNorm as T5 has it: no mean is taken away and nothing is added (Zhang and Sennrich 2019).

use std::mem::MaybeUninit;

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::Result;
use crate::element::Element;
use crate::gpu::{self, Gpu};
use crate::isa::{Isa, isa};
use crate::math::sum;
use crate::tensor::{SharedMut, View, dims2, expect_activation, expect_dims, tensor};

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// `y = x / sqrt(mean(x^2) + epsilon) * weight`, row by row, computed in f32.
///
/// # Shapes
/// `x` `[T, D]` f32, `weight` `[D]` f32; the result is `[T, D]` of type `out` (bf16 or f32).
///
/// # Errors
/// If the shapes or types do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32, out: DType) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(x)? {
        expect_activation("rms_norm", out)?;
        return gpu::elementwise::rms_norm(&gpu, x, weight, epsilon, out);
    }
    rms_norm_on(isa(), x, weight, epsilon, out)
}

pub(crate) fn rms_norm_on(isa: Isa, x: &Tensor, weight: &Tensor, epsilon: f32, out: DType) -> Result<Tensor> {
    expect_activation("rms_norm", out)?;
    match out {
        DType::BF16 => forward::<bf16>(isa, x, weight, epsilon),
        _ => forward::<f32>(isa, x, weight, epsilon),
    }
}

fn forward<O: Element>(isa: Isa, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    let op = "rms_norm";
    let (rows, d) = dims2(op, x)?;
    expect_dims(op, "the weight", weight, &[d])?;
    let (x, weight) = (View::new(op, x)?, View::new(op, weight)?);
    let (x, weight) = (x.slice::<f32>()?, weight.slice::<f32>()?);
    let mut values: Vec<O> = Vec::with_capacity(rows * d);
    let out = SharedMut::uninit(&mut values);
    (0..rows).into_par_iter().step_by(ROWS).for_each(|first| {
        let range = first * d..rows.min(first + ROWS) * d;
        // SAFETY: each chunk of rows of the result is written by one thread.
        let out = unsafe { out.range(range.start, range.len()) };
        let x = &x[range];
        isa.vectorize(
            #[inline(always)]
            || {
                for (x, out) in x.chunks_exact(d.max(1)).zip(out.chunks_exact_mut(d.max(1))) {
                    let scale = inverse_rms(x, epsilon);
                    for (o, (x, w)) in out.iter_mut().zip(x.iter().zip(weight)) {
                        o.write(O::narrow(x * scale * w));
                    }
                }
            },
        );
    });
    // SAFETY: the chunks cover the result.
    unsafe { values.set_len(rows * d) };
    tensor(values, &[rows, d])
}

/// The gradient to `x` of [`rms_norm`], added to `residual`, the gradient that reaches `x` past the norm; and the same rounded to `out`,
/// as products read it.
///
/// With `r = 1 / sqrt(mean(x^2) + epsilon)` and `g = dy * weight`: `dx = r g - x r^3 mean(g x)`.
///
/// # Shapes
/// `dy`, `x` and `residual` `[T, D]` f32, `weight` `[D]` f32; the results are `[T, D]`, f32 and of type `out` (bf16, or f32 for the same
/// tensor).
///
/// # Errors
/// If the shapes or types do not fit.
pub fn rms_norm_gradient(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    residual: Option<&Tensor>,
    out: DType,
) -> Result<(Tensor, Tensor)> {
    if let Some(gpu) = Gpu::of(x)? {
        expect_activation("rms_norm_gradient", out)?;
        return gpu::elementwise::rms_norm_gradient(&gpu, [dy, x, weight], epsilon, residual, out);
    }
    rms_norm_gradient_on(isa(), [dy, x, weight], epsilon, residual, out)
}

pub(crate) fn rms_norm_gradient_on(
    isa: Isa,
    [dy, x, weight]: [&Tensor; 3],
    epsilon: f32,
    residual: Option<&Tensor>,
    out: DType,
) -> Result<(Tensor, Tensor)> {
    let op = "rms_norm_gradient";
    expect_activation(op, out)?;
    let (rows, d) = dims2(op, x)?;
    expect_dims(op, "the gradient", dy, &[rows, d])?;
    expect_dims(op, "the weight", weight, &[d])?;
    let residual = residual.map(|r| expect_dims(op, "the residual", r, &[rows, d]).and(View::new(op, r)));
    let residual = residual.transpose()?;
    let residual = residual.as_ref().map(View::slice::<f32>).transpose()?;
    let (dy, x, weight) = (View::new(op, dy)?, View::new(op, x)?, View::new(op, weight)?);
    let (dy, x, weight) = (dy.slice::<f32>()?, x.slice::<f32>()?, weight.slice::<f32>()?);
    let mut values: Vec<f32> = Vec::with_capacity(rows * d);
    // Of rows in f32 nothing is written a second time.
    let narrow = if out == DType::F32 { 0 } else { d };
    let mut narrowed: Vec<bf16> = Vec::with_capacity(rows * narrow);
    let (exact, rounded) = (SharedMut::uninit(&mut values), SharedMut::uninit(&mut narrowed));
    (0..rows).into_par_iter().step_by(ROWS).for_each(|first| {
        isa.vectorize(
            #[inline(always)]
            || {
                for row in first..rows.min(first + ROWS) {
                    // SAFETY: each row of the results is written by one thread.
                    let (out, rounded) =
                        unsafe { (exact.range(row * d, d), rounded.range(row * narrow, narrow)) };
                    let range = row * d..(row + 1) * d;
                    let (dy, x) = (&dy[range.clone()], &x[range.clone()]);
                    match residual {
                        Some(residual) => {
                            let residual = &residual[range];
                            gradient_row((dy, x, weight), epsilon, |i, g| g + residual[i], out);
                        }
                        None => gradient_row((dy, x, weight), epsilon, |_, g| g, out),
                    }
                    for (narrow, exact) in rounded.iter_mut().zip(out.iter()) {
                        // SAFETY: the row was written.
                        narrow.write(bf16::narrow(unsafe { exact.assume_init() }));
                    }
                }
            },
        );
    });
    // SAFETY: the rows cover the results.
    unsafe {
        values.set_len(rows * d);
        narrowed.set_len(rows * narrow);
    }
    let exact = tensor(values, &[rows, d])?;
    let rounded = if out == DType::F32 { exact.clone() } else { tensor(narrowed, &[rows, d])? };
    Ok((exact, rounded))
}

/// Columns of the weight that a thread takes at a time: some cache lines of each row.
const COLUMNS: usize = 64;

/// The gradient to the weight of [`rms_norm`]: the sum over the rows of `dy x r`, `r = 1 / sqrt(mean(x^2) + epsilon)`, where each
/// number is one chain of additions in the order of the rows (on a GPU, of some chains in an order of their own).
///
/// # Shapes
/// `dy` and `x` `[T, D]` f32; the result is `[D]` f32.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn rms_norm_weight_gradient(dy: &Tensor, x: &Tensor, epsilon: f32) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(x)? {
        return gpu::elementwise::rms_norm_weight_gradient(&gpu, dy, x, epsilon);
    }
    rms_norm_weight_gradient_on(isa(), dy, x, epsilon)
}

pub(crate) fn rms_norm_weight_gradient_on(isa: Isa, dy: &Tensor, x: &Tensor, epsilon: f32) -> Result<Tensor> {
    let op = "rms_norm_weight_gradient";
    let (rows, d) = dims2(op, x)?;
    expect_dims(op, "the gradient", dy, &[rows, d])?;
    let (dy, x) = (View::new(op, dy)?, View::new(op, x)?);
    let (dy, x) = (dy.slice::<f32>()?, x.slice::<f32>()?);
    let scale = |x: &[f32]| {
        isa.vectorize(
            #[inline(always)]
            || inverse_rms(x, epsilon),
        )
    };
    let scales: Vec<f32> = x.par_chunks_exact(d.max(1)).with_min_len(ROWS).map(scale).collect();
    let mut sums = vec![0.0; d];
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(block, sums)| {
        isa.vectorize(
            #[inline(always)]
            || {
                for (row, r) in scales.iter().enumerate() {
                    let range = row * d + block * COLUMNS..row * d + block * COLUMNS + sums.len();
                    for (sum, (dy, x)) in sums.iter_mut().zip(dy[range.clone()].iter().zip(&x[range])) {
                        *sum += dy * (x * r);
                    }
                }
            },
        );
    });
    tensor(sums, &[d])
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    let squares = sum([x], |[x]| x * x);
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// Writes `finish(i, gradient)` of one row.
#[inline(always)]
fn gradient_row(
    (dy, x, weight): (&[f32], &[f32], &[f32]),
    epsilon: f32,
    finish: impl Fn(usize, f32) -> f32,
    out: &mut [MaybeUninit<f32>],
) {
    let d = out.len();
    let (dy, x, weight) = (&dy[..d], &x[..d], &weight[..d]);
    let r = inverse_rms(x, epsilon);
    let inner = sum([dy, weight, x], |[dy, w, x]| dy * w * x);
    let c = r * r * r * (inner / d as f32);
    for (i, o) in out.iter_mut().enumerate() {
        o.write(finish(i, r * (dy[i] * weight[i]) - x[i] * c));
    }
}
