//! Attention over examples laid end to end: each query row sees the key rows of its own example.
//!
//! Scores live in strips of a few rows, one head of one example at a time; nothing of size `T x T` is kept. What backward
//! needs of forward is the logarithm of each row's normaliser, from which the probabilities are computed again (Dao 2023).

pub(crate) mod absorbed;
mod backward;
mod bias;
mod forward;
mod head;

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::dropout::Dropout;
use crate::element::Element;
use crate::gemm::micro;
#[cfg(target_arch = "x86_64")]
use crate::gemm::{amx, x86};
use crate::gpu::{self, Gpu};
use crate::isa::{Isa, isa};
use crate::segments::Segments;
use crate::tensor::{View, dims2, expect_activation, expect_dims, tensor};
use crate::{Error, Result};

use bias::Trained;
pub use bias::{Buckets, PositionBias};

/// What attends to what.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Rows of the queries, by example.
    pub queries: &'a Segments,
    /// Rows of the keys and values, by example.
    pub keys: &'a Segments,
    /// Heads, which share a row's numbers evenly.
    pub heads: usize,
    /// Added to the scores; none means 0. Scores are not scaled.
    pub bias: Option<&'a PositionBias>,
    /// Whether a query sees only the keys up to its own place, and the prefix.
    pub causal: bool,
    /// Leading keys of every example that stand before the sequence, as in prefix tuning (Li and Liang 2021): every query sees
    /// them, they have no bias, and the others' places count from behind them.
    pub prefix: usize,
    /// Dropping of probabilities.
    pub dropout: Option<&'a Dropout>,
}

/// The result of [`attention`] and what its gradient needs.
pub struct Attended {
    /// `[Tq, heads * K]`, of the operands' type.
    pub output: Tensor,
    /// Logarithms of the normalisers, `[heads, Tq]` f32: on a GPU to the base 2.
    pub(crate) normalisers: Tensor,
}

/// `softmax(q k^T + bias) v`, head by head and example by example.
///
/// # Shapes
/// `q` `[Tq, heads * K]`, `k` and `v` `[Tk, heads * K]`, all of one type (bf16 or f32).
///
/// # Errors
/// If the shapes or types do not fit, or an example's bias is shorter than the example.
pub fn attention(spec: &Attention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
    if let Some(gpu) = Gpu::of(q)? {
        check("attention", spec, q, k, v)?;
        return gpu::attention::attention(&gpu, spec, q, k, v);
    }
    attention_on(isa(), spec, q, k, v)
}

pub(crate) fn attention_on(
    isa: Isa,
    spec: &Attention<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Attended> {
    let op = "attention";
    check(op, spec, q, k, v)?;
    let views = [View::new(op, q)?, View::new(op, k)?, View::new(op, v)?];
    let dims = [spec.queries.total(), q.dims()[1]];
    let width = dims[1];
    if q.dtype() == DType::F32 {
        let [q, k, v] = slices::<f32, _>(&views)?;
        let (out, normalisers) = forward_f32::<f32>(isa, spec, [q, k, v], width);
        return attended(out, dims, normalisers, spec.heads);
    }
    let (out, normalisers) = forward_bf16(isa, spec, slices(&views)?, width);
    attended(out, dims, normalisers, spec.heads)
}

fn attended<O: Element>(
    out: Vec<O>,
    dims: [usize; 2],
    normalisers: Vec<f32>,
    heads: usize,
) -> Result<Attended> {
    Ok(Attended { output: tensor(out, &dims)?, normalisers: tensor(normalisers, &[heads, dims[0]])? })
}

/// Operands in bf16, as they are where the path multiplies such.
fn forward_bf16(
    isa: Isa,
    spec: &Attention<'_>,
    operands: [&[bf16]; 3],
    width: usize,
) -> (Vec<bf16>, Vec<f32>) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::AmxBf16 => return forward::run::<amx::AmxBf16, bf16>(isa, spec, operands, width),
        Isa::Avx512Bf16 => return forward::run::<x86::Avx512Bf16, bf16>(isa, spec, operands, width),
        _ => {}
    }
    let wide = operands.map(widened);
    forward_f32(isa, spec, wide.each_ref().map(Vec::as_slice), width)
}

/// Operands in f32, on the path's f32 instructions.
fn forward_f32<O: Element>(
    isa: Isa,
    spec: &Attention<'_>,
    operands: [&[f32]; 3],
    width: usize,
) -> (Vec<O>, Vec<f32>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => {
            forward::run::<x86::Avx512, O>(isa, spec, operands, width)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => forward::run::<x86::Avx2, O>(isa, spec, operands, width),
        _ => forward::run::<micro::Portable, O>(isa, spec, operands, width),
    }
}

/// The gradients to `q`, `k` and `v` of [`attention`], given the gradient `dy` to its output.
///
/// # Shapes
/// As for [`attention`]; `dy` as the output.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn attention_gradient(
    spec: &Attention<'_>,
    [q, k, v]: [&Tensor; 3],
    attended: &Attended,
    dy: &Tensor,
) -> Result<[Tensor; 3]> {
    if let Some(gpu) = Gpu::of(q)? {
        check_gradient(spec, [q, k, v], attended, dy)?;
        return gpu::attention::attention_gradient(&gpu, spec, [q, k, v], attended, dy);
    }
    attention_gradient_on(isa(), spec, [q, k, v], attended, dy)
}

/// As [`attention_gradient`], and the gradient `[buckets, heads]` f32 to the table of which the position bias was made: the sum of
/// the gradients to all scores to which a number of the table was added.
///
/// # Errors
/// If the shapes or types do not fit, or there is no bias, or none of these buckets.
pub fn attention_gradient_with_bias(
    spec: &Attention<'_>,
    operands: [&Tensor; 3],
    attended: &Attended,
    dy: &Tensor,
    buckets: Buckets,
) -> Result<([Tensor; 3], Tensor)> {
    if let Some(gpu) = Gpu::of(operands[0])? {
        check_gradient(spec, operands, attended, dy)?;
        let bias = trained_bias(spec, buckets)?;
        return gpu::attention::attention_gradient_with_bias(&gpu, spec, operands, (attended, dy), bias);
    }
    attention_gradient_with_bias_on(isa(), spec, operands, (attended, dy), buckets)
}

pub(crate) fn attention_gradient_with_bias_on(
    isa: Isa,
    spec: &Attention<'_>,
    operands: [&Tensor; 3],
    (attended, dy): (&Attended, &Tensor),
    buckets: Buckets,
) -> Result<([Tensor; 3], Tensor)> {
    let bias = trained_bias(spec, buckets)?;
    let mut table = vec![0.0; buckets.count * spec.heads];
    let gradients = gradients_on(isa, spec, operands, (attended, dy), Some((bias, &mut table)))?;
    Ok((gradients, tensor(table, &[buckets.count, spec.heads])?))
}

/// The bias, which must be one of these buckets.
fn trained_bias<'a>(spec: &Attention<'a>, buckets: Buckets) -> Result<&'a PositionBias> {
    let op = "attention_gradient_with_bias";
    match spec.bias {
        None => Err(Error::Shape { op, what: "there is no position bias".to_owned() }),
        Some(bias) if bias.buckets != buckets => {
            let what = format!("a position bias of {:?}, where {buckets:?} are given", bias.buckets);
            Err(Error::Shape { op, what })
        }
        Some(bias) => Ok(bias),
    }
}

fn check_gradient(
    spec: &Attention<'_>,
    [q, k, v]: [&Tensor; 3],
    attended: &Attended,
    dy: &Tensor,
) -> Result<()> {
    let op = "attention_gradient";
    check(op, spec, q, k, v)?;
    for (name, t) in [("the gradient", dy), ("the output", &attended.output)] {
        expect_dims(op, name, t, q.dims())?;
        if t.dtype() != q.dtype() {
            let what = format!("{name} is {:?} and the queries {:?}", t.dtype(), q.dtype());
            return Err(Error::Shape { op, what });
        }
    }
    expect_dims(op, "the normalisers", &attended.normalisers, &[spec.heads, spec.queries.total()])
}

pub(crate) fn attention_gradient_on(
    isa: Isa,
    spec: &Attention<'_>,
    operands: [&Tensor; 3],
    attended: &Attended,
    dy: &Tensor,
) -> Result<[Tensor; 3]> {
    gradients_on(isa, spec, operands, (attended, dy), None)
}

fn gradients_on(
    isa: Isa,
    spec: &Attention<'_>,
    [q, k, v]: [&Tensor; 3],
    (attended, dy): (&Attended, &Tensor),
    trained: Option<Trained<'_>>,
) -> Result<[Tensor; 3]> {
    let op = "attention_gradient";
    check_gradient(spec, [q, k, v], attended, dy)?;
    let views = [View::new(op, q)?, View::new(op, k)?, View::new(op, v)?, View::new(op, dy)?];
    let lse = View::new(op, &attended.normalisers)?;
    let (lse, width) = (lse.slice::<f32>()?, q.dims()[1]);
    if q.dtype() == DType::F32 {
        let operands = slices::<f32, _>(&views)?;
        return tensors(gradient_f32::<f32>(isa, spec, (operands, width), lse, trained), [q, k, v]);
    }
    tensors(gradient_bf16(isa, spec, (slices(&views)?, width), lse, trained), [q, k, v])
}

fn gradient_bf16(
    isa: Isa,
    spec: &Attention<'_>,
    (operands, width): ([&[bf16]; 4], usize),
    normalisers: &[f32],
    trained: Option<Trained<'_>>,
) -> [Vec<bf16>; 3] {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::AmxBf16 => {
            return backward::run::<amx::AmxBf16, bf16>(isa, spec, (operands, width), normalisers, trained);
        }
        Isa::Avx512Bf16 => {
            return backward::run::<x86::Avx512Bf16, bf16>(
                isa,
                spec,
                (operands, width),
                normalisers,
                trained,
            );
        }
        _ => {}
    }
    let wide = operands.map(widened);
    gradient_f32(isa, spec, (wide.each_ref().map(Vec::as_slice), width), normalisers, trained)
}

fn gradient_f32<O: Element>(
    isa: Isa,
    spec: &Attention<'_>,
    operands: ([&[f32]; 4], usize),
    normalisers: &[f32],
    trained: Option<Trained<'_>>,
) -> [Vec<O>; 3] {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => {
            backward::run::<x86::Avx512, O>(isa, spec, operands, normalisers, trained)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => backward::run::<x86::Avx2, O>(isa, spec, operands, normalisers, trained),
        _ => backward::run::<micro::Portable, O>(isa, spec, operands, normalisers, trained),
    }
}

fn slices<'a, T: Element, const N: usize>(views: &'a [View<'_>; N]) -> Result<[&'a [T]; N]> {
    let slices = views.iter().map(View::slice::<T>).collect::<Result<Vec<_>>>()?;
    Ok(slices.try_into().unwrap_or_else(|_| unreachable!("as many slices as views")))
}

fn widened(values: &[bf16]) -> Vec<f32> {
    values.par_iter().with_min_len(1 << 14).map(|x| x.widen()).collect()
}

fn tensors<T: Element>(values: [Vec<T>; 3], like: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    let [q, k, v] = values;
    Ok([tensor(q, like[0].dims())?, tensor(k, like[1].dims())?, tensor(v, like[2].dims())?])
}

fn check(op: &'static str, spec: &Attention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    let (rows, width) = dims2(op, q)?;
    expect_activation(op, q.dtype())?;
    let refuse = |what: String| Err(Error::Shape { op, what });
    check_rows(op, (spec.queries, spec.keys), rows, (width, spec.heads))?;
    for (name, t) in [("the keys", k), ("the values", v)] {
        expect_dims(op, name, t, &[spec.keys.total(), width])?;
        if t.dtype() != q.dtype() {
            return refuse(format!("{name} are {:?} and the queries {:?}", t.dtype(), q.dtype()));
        }
    }
    if let Some(keys) = spec.dropout.map(Dropout::examples).filter(|keys| *keys != spec.queries.len()) {
        return refuse(format!("dropout for {keys} examples, where there are {}", spec.queries.len()));
    }
    let short = (0..spec.keys.len()).map(|e| (e, spec.keys.range(e).len())).find(|(_, n)| *n < spec.prefix);
    if let Some((example, keys)) = short {
        return refuse(format!("example {example} has {keys} keys, of which {} are a prefix", spec.prefix));
    }
    let longest = spec.queries.longest().max(spec.keys.longest().saturating_sub(spec.prefix));
    match spec.bias {
        Some(bias) if bias.longest < longest || bias.heads != spec.heads => refuse(format!(
            "a bias of {} heads for {} rows, where {longest} are needed",
            bias.heads, bias.longest
        )),
        _ => Ok(()),
    }
}

/// Checks that `rows` queries of `width` numbers are those of the examples, and the heads'.
fn check_rows(
    op: &'static str,
    (queries, keys): (&Segments, &Segments),
    rows: usize,
    (width, heads): (usize, usize),
) -> Result<()> {
    let refuse = |what: String| Err(Error::Shape { op, what });
    if rows != queries.total() || heads == 0 || !width.is_multiple_of(heads) {
        return refuse(format!("queries [{rows}, {width}] for {} rows and {heads} heads", queries.total()));
    }
    if queries.len() != keys.len() {
        return refuse(format!("queries of {} and keys of {} examples", queries.len(), keys.len()));
    }
    Ok(())
}
