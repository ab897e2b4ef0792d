//! Forward: strips of query rows against all keys of their example.

use rayon::prelude::*;

use super::Attention;
use super::head::{Packed, Part, bias_row, padded, strip, visible_keys};
use crate::element::Element;
use crate::gemm::micro::Micro;
use crate::isa::Isa;
use crate::math::{exp, max, sum};
use crate::tensor::SharedMut;

/// Buffers of a thread.
struct Scratch<M: Micro> {
    keys: Packed<M>,
    values: Packed<M>,
    scores: Vec<f32>,
    /// The bias of a row with a prefix.
    bias: Vec<f32>,
    /// Dropout's factors for a row.
    factors: Vec<f32>,
    probabilities: Vec<M::Left>,
    /// The logarithms of a strip's.
    normalisers: Vec<f32>,
    sums: Vec<f32>,
}

/// The outputs `[Tq, heads * K]` and the logarithms of the normalisers `[heads, Tq]`; rows of all operands have `width` numbers.
pub(super) fn run<M: Micro, O: Element>(
    isa: Isa,
    spec: &Attention<'_>,
    operands: [&[M::Left]; 3],
    width: usize,
) -> (Vec<O>, Vec<f32>) {
    let total = spec.queries.total();
    let mut output: Vec<O> = Vec::with_capacity(total * width);
    let mut normalisers = vec![0.0; spec.heads * total];
    let (out, lse) = (SharedMut::uninit(&mut output), SharedMut::new(&mut normalisers));
    let tasks = spec.queries.len() * spec.heads;
    let scratch = || Scratch::<M> {
        keys: Packed::empty(),
        values: Packed::empty(),
        scores: Vec::new(),
        bias: Vec::new(),
        factors: Vec::new(),
        probabilities: Vec::new(),
        normalisers: Vec::new(),
        sums: Vec::new(),
    };
    (0..tasks).into_par_iter().for_each_init(scratch, |scratch, task| {
        let (example, head) = (task / spec.heads, task % spec.heads);
        let (queries, keys) = (spec.queries.range(example), spec.keys.range(example));
        let k = width / spec.heads;
        let part = |i: usize, rows| Part::new(operands[i], width, rows, head, k);
        let parts = [part(0, &queries), part(1, &keys), part(2, &keys)];
        // SAFETY: a task alone writes its head's normalisers of its example.
        let lse = unsafe { lse.range(head * total + queries.start, queries.len()) };
        one_head(isa, spec, (example, head), parts, scratch, |row, sums, normaliser| {
            lse[row] = normaliser;
            // SAFETY: a task alone writes its head's part of its example's rows.
            let out = unsafe { out.range((queries.start + row) * width + head * k, k) };
            isa.vectorize(
                #[inline(always)]
                || out.iter_mut().zip(sums).for_each(|(o, s)| _ = o.write(O::narrow(*s))),
            );
        });
    });
    // SAFETY: the heads' parts of the examples' rows are all of them.
    unsafe { output.set_len(total * width) };
    (output, normalisers)
}

/// Calls `store(row, output row, logarithm of its normaliser)` for each query row of the head; `q`, `k` and `v` are its parts.
fn one_head<M: Micro>(
    isa: Isa,
    spec: &Attention<'_>,
    (example, head): (usize, usize),
    [q, k, v]: [Part<'_, M::Left>; 3],
    scratch: &mut Scratch<M>,
    mut store: impl FnMut(usize, &[f32], f32),
) {
    let Scratch { keys, values, scores, bias, factors, probabilities, normalisers, sums } = scratch;
    keys.columns(&k);
    values.contracted(&v);
    let masks = spec.dropout.map(|dropout| dropout.head_masks(example, head));
    let n = k.rows;
    factors.clear();
    factors.resize(padded(n), 1.0);
    for first in (0..q.rows).step_by(strip::<M>()) {
        let rows = strip::<M>().min(q.rows - first);
        keys.multiply(&q.values[first * q.stride..], q.stride, rows, scores);
        let columns = keys.width();
        probabilities.resize(probabilities.len().max(rows * columns), M::Left::default());
        normalisers.clear();
        for row in 0..rows {
            let seen = visible_keys(spec, first + row, n);
            let scores = &mut scores[row * columns..][..padded(seen)];
            let (out, unseen) = probabilities[row * columns..][..columns].split_at_mut(scores.len());
            unseen.fill(M::Left::default());
            let bias = bias_row(spec, (head, first + row), scores.len(), bias);
            isa.vectorize(
                #[inline(always)]
                || {
                    let factors = match &masks {
                        Some(masks) => {
                            masks.row(first + row, &mut factors[..n]);
                            Some(&factors[..scores.len()])
                        }
                        None => None,
                    };
                    normalisers.push(softmax((scores, seen), bias, factors, out));
                },
            );
        }
        values.multiply(probabilities, columns, rows, sums);
        for row in 0..rows {
            store(first + row, &sums[row * values.width()..][..v.width], normalisers[row]);
        }
    }
}

/// The probabilities of the first `seen` of `scores + bias`, times dropout's factors, into `out`, the rest of which becomes 0.
/// The scores are used up.
///
/// Returns the logarithm of the normaliser.
#[inline(always)]
fn softmax<T: Element>(
    (scores, seen): (&mut [f32], usize),
    bias: Option<&[f32]>,
    factors: Option<&[f32]>,
    out: &mut [T],
) -> f32 {
    if let Some(bias) = bias {
        scores.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
    }
    scores[seen..].fill(f32::NEG_INFINITY);
    let top = max(scores);
    for s in scores.iter_mut() {
        *s = exp(*s - top);
    }
    scores[seen..].fill(0.0);
    let total = sum([&*scores], |[s]| s);
    let scale = 1.0 / total;
    match factors {
        Some(factors) => {
            for (o, (s, f)) in out.iter_mut().zip(scores.iter().zip(factors)) {
                *o = T::narrow(s * scale * f);
            }
        }
        None => out.iter_mut().zip(scores.iter()).for_each(|(o, s)| *o = T::narrow(s * scale)),
    }
    top + total.ln()
}
