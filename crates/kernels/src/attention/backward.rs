//! Backward: strips of query rows, whose probabilities are computed again from the normalisers. A strip gives its own rows of
//! the gradient to the queries, and is added to the gradients to all keys and values. Each number is one chain of additions
//! in a fixed order.
//!
//! The gradient to the position bias is that to the scores. It is summed by distances within a head of an example, then by
//! buckets, and then over the examples in their order.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::Attention;
use super::bias::Trained;
use super::head::{self, Packed, Part, Transposed, bias_row, padded, visible_keys};
use crate::dropout::Masks;
use crate::element::Element;
use crate::gemm::micro::Micro;
use crate::isa::Isa;
use crate::math::{exp, sum};
use crate::tensor::SharedMut;

/// Buffers of a thread.
struct Scratch<M: Micro> {
    /// For products of query rows with the keys, and of gradients with the values.
    keys: Packed<M>,
    values: Packed<M>,
    /// The keys again, contracted.
    k: Packed<M>,
    q: Transposed<M>,
    dy: Transposed<M>,
    strip: Strip<M>,
    /// The transposed gradients to the keys and values, `[K, keys]`.
    dk: Vec<f32>,
    dv: Vec<f32>,
    sums: Vec<f32>,
}

/// A strip of `rows` query rows with all keys.
struct Strip<M: Micro> {
    /// Scores, then probabilities; and the gradients to the latter.
    p: Vec<f32>,
    dp: Vec<f32>,
    /// The bias of a row with a prefix.
    bias: Vec<f32>,
    /// Dropout's factors for a row.
    factors: Vec<f32>,
    /// Probabilities times factors, and gradients to the scores, as operands.
    dropped: Vec<M::Left>,
    ds: Vec<M::Left>,
    packed: Packed<M>,
    /// Sums of the gradients to the scores by `key - query + queries - 1`, keys counted from behind the prefix; empty if they are
    /// not asked for.
    by_distance: Vec<f32>,
}

/// One head of one example.
struct Head<'a, T> {
    spec: &'a Attention<'a>,
    head: usize,
    masks: Option<Masks>,
    q: Part<'a, T>,
    k: Part<'a, T>,
    v: Part<'a, T>,
    dy: Part<'a, T>,
    normalisers: &'a [f32],
}

/// The gradients to q, k and v, and to the table of a bias that is trained; `operands` are q, k, v and the gradient to the
/// output, with rows of `width` numbers.
pub(super) fn run<M: Micro, O: Element>(
    isa: Isa,
    spec: &Attention<'_>,
    (operands, width): ([&[M::Left]; 4], usize),
    normalisers: &[f32],
    trained: Option<Trained<'_>>,
) -> [Vec<O>; 3] {
    let total = spec.queries.total();
    let bias = trained.as_ref().map(|(bias, _)| *bias);
    let count = bias.map_or(0, |bias| bias.buckets.count);
    let mut by_bucket = vec![0.0; spec.queries.len() * spec.heads * count];
    let buckets = SharedMut::new(&mut by_bucket);
    let mut gradients: [Vec<O>; 3] = [0, 1, 2].map(|i| Vec::with_capacity(operands[i].len()));
    let [dq, dk, dv] = gradients.each_mut().map(SharedMut::uninit);
    let k = width / spec.heads;
    (0..spec.queries.len() * spec.heads).into_par_iter().for_each_init(Scratch::<M>::new, |scratch, task| {
        let (example, head) = (task / spec.heads, task % spec.heads);
        let (queries, keys) = (spec.queries.range(example), spec.keys.range(example));
        let part = |i: usize, rows| Part::new(operands[i], width, rows, head, k);
        let one = Head {
            spec,
            head,
            masks: spec.dropout.map(|dropout| dropout.head_masks(example, head)),
            q: part(0, &queries),
            k: part(1, &keys),
            v: part(2, &keys),
            dy: part(3, &queries),
            normalisers: &normalisers[head * total + queries.start..][..queries.len()],
        };
        let store = |out: SharedMut<MaybeUninit<O>>, row: usize, sums: &[f32]| {
            // SAFETY: a task alone writes its head's part of its example's rows.
            let out = unsafe { out.range(row * width + head * k, k) };
            isa.vectorize(
                #[inline(always)]
                || out.iter_mut().zip(sums).for_each(|(o, s)| _ = o.write(O::narrow(*s))),
            );
        };
        scratch.strip.by_distance.clear();
        if bias.is_some() {
            let distances = (queries.len() + keys.len() - spec.prefix).saturating_sub(1);
            scratch.strip.by_distance.resize(distances, 0.0);
        }
        one.run(isa, scratch, |row, sums| store(dq, queries.start + row, sums));
        if let Some(bias) = bias {
            // SAFETY: a task alone writes its sums.
            let sums = unsafe { buckets.range(task * count, count) };
            bias.add_to_buckets(&scratch.strip.by_distance, queries.len(), sums);
        }
        for (transposed, out) in [(&scratch.dk, dk), (&scratch.dv, dv)] {
            let (n, stride) = (keys.len(), k.next_multiple_of(16));
            scratch.sums.resize(scratch.sums.len().max(n * stride), 0.0);
            M::transpose((transposed, scratch.keys.width()), (k, n), (&mut scratch.sums, stride));
            for row in 0..n {
                store(out, keys.start + row, &scratch.sums[row * stride..][..k]);
            }
        }
    });
    for (gradient, operand) in gradients.iter_mut().zip(operands) {
        // SAFETY: the heads' parts of the examples' rows are all of them.
        unsafe { gradient.set_len(operand.len()) };
    }
    if let Some((_, table)) = trained {
        for example in by_bucket.chunks_exact((count * spec.heads).max(1)) {
            for (i, x) in example.iter().enumerate() {
                table[i % count * spec.heads + i / count] += x;
            }
        }
    }
    gradients
}

/// The gradients to wide queries, and to the rows that are keys and values both, of one head; the latter in f32 and added to `sum`. The
/// operands are the queries, the rows and the gradient to the output, with rows of `width` numbers.
pub(super) fn to_rows<M: Micro, O: Element>(
    isa: Isa,
    (spec, width, normalisers, sum): (&Attention<'_>, usize, &[f32], Option<&[f32]>),
    operands: [&[M::Left]; 3],
) -> (Vec<O>, Vec<f32>) {
    let (mut dq, mut dx) = (vec![O::default(); operands[0].len()], vec![0.0; operands[1].len()]);
    let (to_queries, to_rows) = (SharedMut::new(&mut dq), SharedMut::new(&mut dx));
    (0..spec.queries.len()).into_par_iter().for_each_init(Scratch::<M>::new, |scratch, example| {
        let (queries, keys) = (spec.queries.range(example), spec.keys.range(example));
        let part = |i: usize, rows| Part::new(operands[i], width, rows, 0, width);
        let (q, k, v, dy) = (part(0, &queries), part(1, &keys), part(1, &keys), part(2, &queries));
        let normalisers = &normalisers[queries.clone()];
        let one = Head { spec, head: 0, masks: None, q, k, v, dy, normalisers };
        one.run(isa, scratch, |row, sums| {
            // SAFETY: a task alone writes its example's rows.
            let out = unsafe { to_queries.range((queries.start + row) * width, width) };
            isa.vectorize(
                #[inline(always)]
                || out.iter_mut().zip(sums).for_each(|(o, s)| *o = O::narrow(*s)),
            );
        });
        let Scratch { keys: packed, dk, dv, sums, .. } = scratch;
        let (n, stride) = (keys.len(), width.next_multiple_of(16));
        sums.resize(sums.len().max(n * stride), 0.0);
        isa.vectorize(
            #[inline(always)]
            || dk.iter_mut().zip(&*dv).for_each(|(k, v)| *k += v),
        );
        M::transpose((dk, packed.width()), (width, n), (sums, stride));
        for row in 0..n {
            let place = (keys.start + row) * width;
            // SAFETY: as above.
            let out = unsafe { to_rows.range(place, width) };
            let own = &sums[row * stride..][..width];
            isa.vectorize(
                #[inline(always)]
                || match sum {
                    Some(sum) => {
                        let sum = &sum[place..place + width];
                        out.iter_mut().zip(own.iter().zip(sum)).for_each(|(o, (x, s))| *o = s + x);
                    }
                    None => out.copy_from_slice(own),
                },
            );
        }
    });
    (dq, dx)
}

impl<M: Micro> Scratch<M> {
    fn new() -> Self {
        let strip = Strip {
            p: Vec::new(),
            dp: Vec::new(),
            bias: Vec::new(),
            factors: Vec::new(),
            dropped: Vec::new(),
            ds: Vec::new(),
            packed: Packed::empty(),
            by_distance: Vec::new(),
        };
        Self {
            keys: Packed::empty(),
            values: Packed::empty(),
            k: Packed::empty(),
            q: Transposed::empty(),
            dy: Transposed::empty(),
            strip,
            dk: Vec::new(),
            dv: Vec::new(),
            sums: Vec::new(),
        }
    }
}

impl<T: Element> Head<'_, T> {
    /// Calls `store` for the rows of the gradient to the queries, and leaves the other two in the buffers.
    ///
    /// With the probabilities `p`, dropout's factors `f` and `dp = (dy v^T) f`: `ds = p (dp - delta)`, where `delta` is the row
    /// sum of `p dp`; and so `dq = ds k`, `dk = ds^T q`, `dv = (p f)^T dy`.
    fn run<M: Micro<Left = T>>(
        &self,
        isa: Isa,
        scratch: &mut Scratch<M>,
        mut store: impl FnMut(usize, &[f32]),
    ) {
        let Scratch { keys, values, k, q, dy, strip, dk, dv, sums } = scratch;
        keys.columns(&self.k);
        values.columns(&self.v);
        k.contracted(&self.k);
        q.set(&self.q);
        dy.set(&self.dy);
        let (n, columns, strip_rows) = (self.k.rows, keys.width(), head::strip::<M>());
        for gradient in [&mut *dk, &mut *dv] {
            gradient.clear();
            gradient.resize(self.k.width * columns, 0.0);
        }
        for first in (0..self.q.rows).step_by(strip_rows) {
            let rows = strip_rows.min(self.q.rows - first);
            keys.multiply(&self.q.values[first * self.q.stride..], self.q.stride, rows, &mut strip.p);
            values.multiply(&self.dy.values[first * self.dy.stride..], self.dy.stride, rows, &mut strip.dp);
            self.score_gradients(isa, strip, columns, first..first + rows);
            k.multiply(&strip.ds, columns, rows, sums);
            for row in 0..rows {
                store(first + row, &sums[row * k.width()..][..self.q.width]);
            }
            for (right, left, gradient) in [(&strip.ds, &*q, &mut *dk), (&strip.dropped, &*dy, &mut *dv)] {
                strip.packed.contracted(&Part { values: right, stride: columns, rows, width: n });
                let (left, stride) = left.from(first);
                strip.packed.multiply_add(left, stride, self.k.width, gradient);
            }
        }
    }

    /// Makes `dropped` and `ds` of a strip from its scores and the products of `dy` and `v`, which have rows of `columns` numbers.
    fn score_gradients<M: Micro<Left = T>>(
        &self,
        isa: Isa,
        strip: &mut Strip<M>,
        columns: usize,
        queries: std::ops::Range<usize>,
    ) {
        let Strip { p, dp, bias, factors, dropped, ds, by_distance, .. } = strip;
        let n = self.k.rows;
        let len = queries.len() * columns;
        factors.clear();
        factors.resize(padded(n), 1.0);
        dropped.resize(dropped.len().max(len), T::default());
        ds.resize(ds.len().max(len), T::default());
        for (row, query) in queries.enumerate() {
            let seen = visible_keys(self.spec, query, n);
            let range = row * columns..row * columns + padded(seen);
            let bias = bias_row(self.spec, (self.head, query), range.len(), bias);
            let (p, dp) = (&mut p[range.clone()], &mut dp[range.clone()]);
            isa.vectorize(
                #[inline(always)]
                || {
                    self.probabilities(query, bias, p);
                    if let Some(masks) = &self.masks {
                        masks.row(query, &mut factors[..n]);
                        dp.iter_mut().zip(&*factors).for_each(|(dp, f)| *dp *= f);
                        for (d, (p, f)) in dropped[range.clone()].iter_mut().zip(p.iter().zip(&*factors)) {
                            *d = T::narrow(p * f);
                        }
                    } else {
                        dropped[range.clone()].iter_mut().zip(&*p).for_each(|(d, p)| *d = T::narrow(*p));
                    }
                    // It is the row sum of `dy y`, too, but y was rounded, and with it the probabilities of which it was made.
                    let delta = sum([&p[..seen], &dp[..seen]], |[p, dp]| p * dp);
                    for (ds, (p, dp)) in ds[range.clone()].iter_mut().zip(p.iter().zip(&*dp)) {
                        *ds = T::narrow(p * (dp - delta));
                    }
                    if !by_distance.is_empty() {
                        let scores = p[..seen].iter().zip(&dp[..seen]).skip(self.spec.prefix);
                        let sums = &mut by_distance[self.q.rows - 1 - query..];
                        sums.iter_mut().zip(scores).for_each(|(sum, (p, dp))| *sum += p * (dp - delta));
                    }
                },
            );
            for operand in [&mut *dropped, &mut *ds] {
                operand[row * columns..][seen..n].fill(T::default());
            }
        }
    }

    /// Turns the scores of `query` into probabilities.
    #[inline(always)]
    fn probabilities(&self, query: usize, bias: Option<&[f32]>, scores: &mut [f32]) {
        let shift = self.normalisers[query];
        match bias {
            Some(bias) => scores.iter_mut().zip(bias).for_each(|(s, b)| *s = exp(*s + b - shift)),
            None => scores.iter_mut().for_each(|s| *s = exp(*s - shift)),
        }
    }
}
