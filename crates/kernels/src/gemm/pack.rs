//! Panels: the right operand of a product, laid out in the order in which the kernels read it.

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use half::bf16;

use crate::element::to_bf16;
use crate::frozen::{Frozen, FrozenSlice};

/// A right operand `[k, n]`: `k` is contracted, `n` are the result's columns.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) values: FrozenSlice<'a>,
    pub(crate) layout: Layout,
    /// Numbers from row to row of the stored matrix.
    pub(crate) stride: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
}

impl<'a> Right<'a> {
    /// A frozen weight as the right operand of its forward product, or of its gradient's.
    pub(crate) fn of(w: &'a Frozen, layout: Layout) -> Self {
        let (k, n) = match layout {
            Layout::ColumnsAsRows => (w.cols(), w.rows()),
            Layout::Rows => (w.rows(), w.cols()),
        };
        Self { values: w.values(), layout, stride: w.stride(), k, n }
    }

    /// The contracted numbers `part` of it.
    pub(crate) fn part(&self, part: Range<usize>) -> Self {
        let from = match self.layout {
            Layout::ColumnsAsRows => part.start,
            Layout::Rows => part.start * self.stride,
        };
        let values = match self.values {
            FrozenSlice::F32(values) => FrozenSlice::F32(&values[from..]),
            FrozenSlice::Bf16(values) => FrozenSlice::Bf16(&values[from..]),
        };
        Self { values, k: part.len(), ..*self }
    }
}

/// How a right operand is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Row `n` holds the `k` numbers of column `n`: a weight `[out, in]` in its forward product.
    ColumnsAsRows,
    /// Row `k` holds the `n` numbers of row `k`: a weight `[out, in]` in the product of its gradient.
    Rows,
}

/// 32 bits that are moved and not computed with.
///
/// # Safety
/// The type must be 32 bits wide, and every bit pattern must be one of its values.
pub(crate) unsafe trait Word: Copy + Default + Send + Sync + 'static {
    /// Where a thread keeps the words of its panels, so that it need not ask the system for pages in each product.
    fn kept() -> &'static LocalKey<Cell<Vec<Self>>>;
}

thread_local! {
    static SINGLES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static PAIRS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

// SAFETY: 32 bits, each pattern a number.
unsafe impl Word for f32 {
    fn kept() -> &'static LocalKey<Cell<Vec<f32>>> {
        &SINGLES
    }
}
// SAFETY: 32 bits, each pattern a number.
unsafe impl Word for u32 {
    fn kept() -> &'static LocalKey<Cell<Vec<u32>>> {
        &PAIRS
    }
}

/// Transposes `rows x cols` words: `to[col * to_stride + row] = from[row * from_stride + col]`.
pub(crate) fn transpose<W: Word>(
    (from, from_stride): (&[W], usize),
    (rows, cols): (usize, usize),
    (to, to_stride): (&mut [W], usize),
) {
    for row in 0..rows {
        for (col, x) in from[row * from_stride..][..cols].iter().enumerate() {
            to[col * to_stride + row] = *x;
        }
    }
}

/// Packs numbers one by one, as f32.
#[inline(always)]
pub(crate) fn singles<const W: usize>(b: &Right<'_>, from: usize, panel: &mut [f32]) {
    match b.values {
        FrozenSlice::F32(v) => singles_of::<W, f32>(b, v, |x| x, from, panel),
        FrozenSlice::Bf16(v) => singles_of::<W, bf16>(b, v, widen, from, panel),
    }
}

/// Packs pairs of numbers as bf16, the earlier one in the lower half.
#[inline(always)]
pub(crate) fn pairs<const W: usize>(b: &Right<'_>, from: usize, panel: &mut [u32]) {
    match b.values {
        FrozenSlice::F32(v) => pairs_of::<W, f32>(
            b,
            v,
            #[inline(always)]
            |x| to_bf16(x).to_bits(),
            from,
            panel,
        ),
        FrozenSlice::Bf16(v) => pairs_of::<W, bf16>(b, v, bf16::to_bits, from, panel),
    }
}

#[inline(always)]
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rows of a block in which a matrix is turned: a cache line of f32.
const BLOCK: usize = 16;

#[inline(always)]
fn singles_of<const W: usize, T: Copy>(
    b: &Right<'_>,
    values: &[T],
    convert: impl Fn(T) -> f32,
    from: usize,
    panel: &mut [f32],
) {
    let width = W.min(b.n - from);
    let panel = &mut panel[..b.k * W];
    if width < W {
        panel.fill(0.0);
    }
    match b.layout {
        Layout::Rows => {
            for (row, out) in panel.chunks_exact_mut(W).enumerate() {
                let row = &values[row * b.stride + from..][..width];
                out.iter_mut().zip(row).for_each(|(o, x)| *o = convert(*x));
            }
        }
        Layout::ColumnsAsRows => {
            for (block, out) in panel.chunks_mut(BLOCK * W).enumerate() {
                let depth = out.len() / W;
                for j in 0..width {
                    let column = &values[(from + j) * b.stride + block * BLOCK..][..depth];
                    for (i, x) in column.iter().enumerate() {
                        out[i * W + j] = convert(*x);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn pairs_of<const W: usize, T: Copy>(
    b: &Right<'_>,
    values: &[T],
    bits: impl Fn(T) -> u16,
    from: usize,
    panel: &mut [u32],
) {
    let width = W.min(b.n - from);
    let panel = &mut panel[..b.k.div_ceil(2) * W];
    if width < W {
        panel.fill(0);
    }
    let pair = |low: T, high: T| u32::from(bits(high)) << 16 | u32::from(bits(low));
    match b.layout {
        Layout::Rows => {
            for (i, out) in panel.chunks_exact_mut(W).enumerate() {
                let low = &values[2 * i * b.stride + from..][..width];
                if 2 * i + 1 == b.k {
                    out.iter_mut().zip(low).for_each(|(o, l)| *o = u32::from(bits(*l)));
                    continue;
                }
                let high = &values[(2 * i + 1) * b.stride + from..][..width];
                out.iter_mut().zip(low.iter().zip(high)).for_each(|(o, (l, h))| *o = pair(*l, *h));
            }
        }
        Layout::ColumnsAsRows => {
            for (block, out) in panel.chunks_mut(BLOCK * W).enumerate() {
                let first = 2 * block * BLOCK;
                let depth = (b.k - first).min(2 * BLOCK);
                for j in 0..width {
                    let column = &values[(from + j) * b.stride + first..][..depth];
                    let whole = column.chunks_exact(2);
                    if let [last] = whole.remainder() {
                        out[depth / 2 * W + j] = u32::from(bits(*last));
                    }
                    for (i, p) in whole.enumerate() {
                        out[i * W + j] = pair(p[0], p[1]);
                    }
                }
            }
        }
    }
}
