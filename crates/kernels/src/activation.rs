//! The inside of T5's feed-forward layers: plain (`act(x)`) and gated (`act(gate) * up`; Shazeer 2020).

use std::mem::MaybeUninit;

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::Result;
use crate::element::Element;
use crate::gpu::{self, Gpu};
use crate::isa::{Isa, isa};
use crate::math::sigmoid;
use crate::tensor::{SharedMut, View, dims2, expect_activation, expect_dims, tensor};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// GELU by tanh (Hendrycks and Gimpel 2016): `x sigmoid(2 z)` with `z = sqrt(2 / pi) (x + 0.044715 x^3)`.
    GeluNew,
    /// `x sigmoid(x)`.
    Silu,
}

/// `2 sqrt(2 / pi)`.
const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

#[inline(always)]
fn relu(x: f32) -> (f32, f32) {
    // NaN is not below 0 and goes through.
    if x <= 0.0 { (0.0, 0.0) } else { (x, 1.0) }
}

#[inline(always)]
fn gelu_new(x: f32) -> (f32, f32) {
    let s = sigmoid(TWICE_SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    (x * s, s + x * s * (1.0 - s) * (TWICE_SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)))
}

#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s + x * s * (1.0 - s))
}

/// `act(x)`, element by element.
///
/// # Shapes
/// `x` and the result `[T, F]`, both of one type (bf16 or f32).
///
/// # Errors
/// If the shape or type does not fit.
pub fn activate(act: Activation, x: &Tensor) -> Result<Tensor> {
    if let Some(gpu) = on_gpu("activate", x)? {
        let [y] = gpu::elementwise::activation(&gpu, ("activate", act), &[x])?;
        return Ok(y);
    }
    activate_on(isa(), act, x)
}

/// The GPU on which an operand of a right type lies.
fn on_gpu(op: &'static str, x: &Tensor) -> Result<Option<Gpu>> {
    expect_activation(op, x.dtype())?;
    Gpu::of(x)
}

pub(crate) fn activate_on(isa: Isa, act: Activation, x: &Tensor) -> Result<Tensor> {
    let value = |(f, _): (f32, f32), _: [f32; 2]| [f];
    let [y] = by_function((isa, "activate", act), [x, x, x], value)?;
    Ok(y)
}

/// The gradient to `x` of [`activate`]: `dy act'(x)`.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn activate_gradient(act: Activation, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    if let Some(gpu) = on_gpu("activate_gradient", x)? {
        let [dx] = gpu::elementwise::activation(&gpu, ("activate_gradient", act), &[x, dy])?;
        return Ok(dx);
    }
    activate_gradient_on(isa(), act, dy, x)
}

pub(crate) fn activate_gradient_on(isa: Isa, act: Activation, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    let slope = |(_, df): (f32, f32), [_, dy]: [f32; 2]| [dy * df];
    let [dx] = by_function((isa, "activate_gradient", act), [x, x, dy], slope)?;
    Ok(dx)
}

/// `act(gate) * up`, element by element.
///
/// # Shapes
/// `gate`, `up` and the result `[T, F]`, all of one type (bf16 or f32).
///
/// # Errors
/// If the shapes or types do not fit.
pub fn gated(act: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if let Some(gpu) = on_gpu("gated", gate)? {
        let [y] = gpu::elementwise::activation(&gpu, ("gated", act), &[gate, up])?;
        return Ok(y);
    }
    gated_on(isa(), act, gate, up)
}

pub(crate) fn gated_on(isa: Isa, act: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let product = |(f, _): (f32, f32), [up, _]: [f32; 2]| [f * up];
    let [y] = by_function((isa, "gated", act), [gate, up, up], product)?;
    Ok(y)
}

/// The gradients to `gate` and `up` of [`gated`]: `(dy up act'(gate), dy act(gate))`.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn gated_gradient(act: Activation, dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    if let Some(gpu) = on_gpu("gated_gradient", gate)? {
        let [d_gate, d_up] = gpu::elementwise::activation(&gpu, ("gated_gradient", act), &[gate, up, dy])?;
        return Ok((d_gate, d_up));
    }
    gated_gradient_on(isa(), act, dy, gate, up)
}

pub(crate) fn gated_gradient_on(
    isa: Isa,
    act: Activation,
    dy: &Tensor,
    gate: &Tensor,
    up: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let slopes = |(f, df): (f32, f32), [up, dy]: [f32; 2]| [dy * up * df, dy * f];
    let [dgate, dup] = by_function((isa, "gated_gradient", act), [gate, up, dy], slopes)?;
    Ok((dgate, dup))
}

/// Picks the function once, so that the loops have no branch in them.
fn by_function<const N: usize>(
    (isa, op, act): (Isa, &'static str, Activation),
    operands: [&Tensor; 3],
    combine: impl Fn((f32, f32), [f32; 2]) -> [f32; N] + Copy + Sync,
) -> Result<[Tensor; N]> {
    match act {
        Activation::Relu => by_type(
            isa,
            op,
            operands,
            #[inline(always)]
            |x, o| combine(relu(x), o),
        ),
        Activation::GeluNew => by_type(
            isa,
            op,
            operands,
            #[inline(always)]
            |x, o| combine(gelu_new(x), o),
        ),
        Activation::Silu => by_type(
            isa,
            op,
            operands,
            #[inline(always)]
            |x, o| combine(silu(x), o),
        ),
    }
}

fn by_type<const N: usize>(
    isa: Isa,
    op: &'static str,
    operands: [&Tensor; 3],
    f: impl Fn(f32, [f32; 2]) -> [f32; N] + Copy + Sync,
) -> Result<[Tensor; N]> {
    expect_activation(op, operands[0].dtype())?;
    match operands[0].dtype() {
        DType::BF16 => elementwise::<bf16, N>(isa, op, operands, f),
        _ => elementwise::<f32, N>(isa, op, operands, f),
    }
}

fn elementwise<T: Element, const N: usize>(
    isa: Isa,
    op: &'static str,
    operands: [&Tensor; 3],
    f: impl Fn(f32, [f32; 2]) -> [f32; N] + Copy + Sync,
) -> Result<[Tensor; N]> {
    /// Numbers that a thread takes at a time.
    const CHUNK: usize = 1 << 13;
    let (rows, cols) = dims2(op, operands[0])?;
    for other in &operands[1..] {
        expect_dims(op, "an operand", other, &[rows, cols])?;
    }
    let [x, a, b] = operands.map(|t| View::new(op, t));
    let (x, a, b) = (x?, a?, b?);
    let (x, a, b) = (x.slice::<T>()?, a.slice::<T>()?, b.slice::<T>()?);
    let n = rows * cols;
    let mut values: [Vec<T>; N] = std::array::from_fn(|_| Vec::with_capacity(n));
    let outs = values.each_mut().map(SharedMut::uninit);
    (0..n).into_par_iter().step_by(CHUNK).for_each(|from| {
        let len = CHUNK.min(n - from);
        // SAFETY: each chunk of the results is written by one thread.
        let outs = outs.each_ref().map(|o| unsafe { o.range(from, len) });
        let (x, a, b) = (&x[from..from + len], &a[from..from + len], &b[from..from + len]);
        isa.vectorize(
            #[inline(always)]
            || map(f, [x, a, b], outs),
        );
    });
    let mut tensors = Vec::with_capacity(N);
    for mut v in values {
        // SAFETY: the chunks cover all `n` numbers.
        unsafe { v.set_len(n) };
        tensors.push(tensor(v, &[rows, cols])?);
    }
    Ok(tensors.try_into().unwrap_or_else(|_| unreachable!("{N} tensors were made")))
}

/// Numbers that are computed in one go: they fit into registers.
const PIECE: usize = 32;

/// `outs = f(x, [a, b])`, number by number.
#[inline(always)]
fn map<T: Element, const N: usize>(
    f: impl Fn(f32, [f32; 2]) -> [f32; N],
    operands: [&[T]; 3],
    mut outs: [&mut [MaybeUninit<T>]; N],
) {
    let n = operands[0].len();
    for from in (0..n).step_by(PIECE) {
        let len = PIECE.min(n - from);
        let mut padded = [[T::default(); PIECE]; 3];
        if len < PIECE {
            padded.iter_mut().zip(operands).for_each(|(p, x)| p[..len].copy_from_slice(&x[from..]));
        } else {
            padded.iter_mut().zip(operands).for_each(|(p, x)| p.copy_from_slice(&x[from..from + PIECE]));
        }
        let [x, a, b] = &padded;
        let mut values = [[T::default(); PIECE]; N];
        for i in 0..PIECE {
            let y = f(x[i].widen(), [a[i].widen(), b[i].widen()]);
            for (values, y) in values.iter_mut().zip(y) {
                values[i] = T::narrow(y);
            }
        }
        for (out, values) in outs.iter_mut().zip(&values) {
            out[from..from + len].write_copy_of_slice(&values[..len]);
        }
    }
}
