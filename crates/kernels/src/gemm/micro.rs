//! The innermost products: a few rows of the left operand times one packed panel of the right one.
//!
//! Every number of a result is one chain of additions along the contracted dimension, in ascending order, whatever rows or
//! columns are computed beside it. So the result for a row does not depend on its neighbours, bit for bit.

use super::pack;
use crate::element::Element;

/// One path's way to multiply.
///
/// A panel holds `WIDTH` columns of the right operand: `units(k)` rows of `WIDTH` packed units, where a unit is one number
/// or a pair of numbers that follow one another along the contracted dimension.
pub(crate) trait Micro: 'static {
    /// Type of the left operand.
    type Left: Element;
    /// What a panel is made of.
    type Unit: pack::Word;
    /// Columns of a panel.
    const WIDTH: usize;
    /// Rows that one call computes at most.
    const ROWS: usize;
    /// Contracted numbers in a unit.
    const DEPTH: usize;
    /// Units of a panel's columns that all rows of a block are multiplied with before the next ones.
    const DEPTH_BLOCK: usize = 256;

    /// Units in a column of `k` numbers, those among them that are zeros behind the last one.
    fn units(k: usize) -> usize {
        k.div_ceil(Self::DEPTH)
    }

    /// Packs columns `from .. from + WIDTH` of `b` (beyond the last one: zeros) into `panel`, of `units(b.k) * WIDTH`.
    fn pack(b: &pack::Right<'_>, from: usize, panel: &mut [Self::Unit]);

    /// Units as the numbers of a left operand.
    fn left(units: &[Self::Unit]) -> &[Self::Left];

    /// Transposes `rows x cols` words: `to[col * to_stride + row] = from[row * from_stride + col]`. Up to 15 words behind
    /// those of a row of `to` may be overwritten; `to_stride` must have room for them.
    fn transpose<W: pack::Word>(
        (from, from_stride): (&[W], usize),
        (rows, cols): (usize, usize),
        (to, to_stride): (&mut [W], usize),
    ) {
        pack::transpose((from, from_stride), (rows, cols), (to, to_stride));
    }

    /// Adds the product of `1 ..= ROWS` rows of `a` (of `k` numbers each) and `units(k)` rows of the panel to `c`.
    ///
    /// # Safety
    /// The pointers must be valid for these ranges, and the machine must have the path's instructions.
    unsafe fn multiply_add(a: Rows<Self::Left>, k: usize, panel: *const Self::Unit, c: Tile);
}

/// Rows of a left operand.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    /// First number of the first row.
    pub(crate) data: *const T,
    /// Numbers from row to row.
    pub(crate) stride: usize,
    /// How many.
    pub(crate) rows: usize,
}

/// Where sums go: rows of `WIDTH` numbers.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// First number of the first row.
    pub(crate) data: *mut f32,
    /// Numbers from row to row.
    pub(crate) stride: usize,
    /// Columns that are wanted, at least 1; what the others become is not said.
    pub(crate) cols: usize,
    /// Whether the sums begin at 0, and not at what lies there.
    pub(crate) fresh: bool,
}

/// Plain code; the compiler uses what vectors every machine of the target has.
pub(crate) struct Portable;

impl Micro for Portable {
    type Left = f32;
    type Unit = f32;
    const WIDTH: usize = 16;
    const ROWS: usize = 2;
    const DEPTH: usize = 1;

    fn pack(b: &pack::Right<'_>, from: usize, panel: &mut [f32]) {
        pack::singles::<16>(b, from, panel);
    }

    fn left(units: &[f32]) -> &[f32] {
        units
    }

    unsafe fn multiply_add(a: Rows<f32>, k: usize, panel: *const f32, tile: Tile) {
        for r in 0..a.rows {
            // SAFETY: the caller's promise on the ranges of `a`, `panel` and the tile.
            unsafe {
                let c = &mut *tile.data.add(r * tile.stride).cast::<[f32; 16]>();
                let mut sums = if tile.fresh { [0.0; 16] } else { *c };
                for i in 0..k {
                    let x = *a.data.add(r * a.stride + i);
                    let b = &*panel.add(i * 16).cast::<[f32; 16]>();
                    for (s, b) in sums.iter_mut().zip(b) {
                        *s += x * b;
                    }
                }
                *c = sums;
            }
        }
    }
}
