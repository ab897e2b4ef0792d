//! Conversions and sums of whole tensors.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::Result;
use crate::element::Element;
use crate::gpu::{self, Gpu};
use crate::isa::isa;
use crate::tensor::{SharedMut, View, dims2, expect_activation, expect_dims, tensor};

/// Numbers that a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// An f32 tensor `[T, D]` rounded to `out` (bf16 or f32); the same tensor if it is f32 already.
///
/// # Errors
/// If the shape or type does not fit.
pub fn rounded(x: &Tensor, out: DType) -> Result<Tensor> {
    let op = "rounded";
    expect_activation(op, out)?;
    if out == DType::F32 {
        return Ok(x.clone());
    }
    if let Some(gpu) = Gpu::of(x)? {
        return gpu::elementwise::rounded(&gpu, x);
    }
    let (rows, d) = dims2(op, x)?;
    let view = View::new(op, x)?;
    let x = view.slice::<f32>()?;
    tensor(elementwise(x, x, |x, _| bf16::narrow(x)), &[rows, d])
}

/// `a + b`, both f32 `[T, D]`.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = "add";
    let (rows, d) = dims2(op, a)?;
    expect_dims(op, "the second operand", b, &[rows, d])?;
    if let Some(gpu) = Gpu::of(a)? {
        return gpu::elementwise::add(&gpu, a, b);
    }
    let (a, b) = (View::new(op, a)?, View::new(op, b)?);
    let (a, b) = (a.slice::<f32>()?, b.slice::<f32>()?);
    tensor(elementwise(a, b, |a, b| a + b), &[rows, d])
}

/// `f(a[i], b[i])` for every `i`.
fn elementwise<T: Element>(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> T + Copy + Sync) -> Vec<T> {
    let n = a.len();
    let mut values: Vec<T> = Vec::with_capacity(n);
    let out = SharedMut::uninit(&mut values);
    let isa = isa();
    (0..n).into_par_iter().step_by(CHUNK).for_each(|from| {
        let range = from..n.min(from + CHUNK);
        // SAFETY: each chunk of the result is written by one thread.
        let out = unsafe { out.range(from, range.len()) };
        let (a, b) = (&a[range.clone()], &b[range]);
        isa.vectorize(
            #[inline(always)]
            || {
                for (o, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
                    o.write(f(*a, *b));
                }
            },
        );
    });
    // SAFETY: the chunks cover all `n` numbers.
    unsafe { values.set_len(n) };
    values
}
