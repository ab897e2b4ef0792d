//! Matrix products with a packed right operand: the one place where the floating-point work of a T5 is done.
//!
//! The result is cut into groups of panels of columns, and blocks of rows, which threads take in any order: no number of the
//! result depends on the cut (see [`micro`]). A thread packs the panels of a group straight from the stored matrix, so that a
//! frozen weight has no second copy, and multiplies block after block of rows with them. What it works on stays in the core's own
//! caches: the products are several times faster than what lies behind those.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod micro;
pub(crate) mod pack;
#[cfg(target_arch = "x86_64")]
mod turn;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use half::bf16;
use rayon::prelude::*;

use crate::element::Element;
use crate::isa::Isa;
use micro::{Micro, Rows, Tile};
use pack::{Right, Word};

/// Rows that are summed in one go; a multiple of every path's [`Micro::ROWS`].
const ROW_BLOCK: usize = 192;
/// Bytes of a row that all panels of a group are multiplied with before the next ones: of a block's rows, 384 KiB.
const ROW_BYTES: usize = 2048;
/// Panels of a group at most, which share what is read of the rows. If they have 64 columns, the sums of a block are 384 KiB.
const GROUP: usize = 8;
/// Bytes of a group's panels at most, unless a single panel has more.
const GROUP_BYTES: usize = 4 << 20;
/// Rows of a stored matrix that are packed into all panels of a group before the next ones.
const PACKED_ROWS: usize = 32;
/// Tasks a thread at least, so that one that is late does not hold up the others.
const TASKS_PER_THREAD: usize = 2;

/// One product `a b` of a sum of products.
pub(crate) struct Term<'a, T> {
    /// `[rows, b.k]`, row-major without gaps.
    pub(crate) a: &'a [T],
    pub(crate) b: Right<'a>,
}

/// A finished block of sums, to be stored.
pub(crate) struct Block<'a> {
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    pub(crate) first_col: usize,
    pub(crate) cols: usize,
    pub(crate) sums: &'a [f32],
    /// Numbers from row to row of `sums`.
    pub(crate) stride: usize,
}

impl Block<'_> {
    /// The sums row by row, each with the place of its first number in a matrix of `total` columns.
    pub(crate) fn rows(&self, total: usize) -> impl Iterator<Item = (usize, &[f32])> {
        (0..self.rows).map(move |r| {
            let place = (self.first_row + r) * total + self.first_col;
            (place, &self.sums[r * self.stride..][..self.cols])
        })
    }
}

/// Types that a left operand may have.
pub(crate) trait Operand: Element {
    /// Computes the sum of the terms' products and gives it to `store` block by block; the blocks cover the result once.
    fn product(isa: Isa, terms: &[Term<'_, Self>], rows: usize, store: &(dyn Fn(&Block<'_>) + Sync));
}

impl Operand for f32 {
    fn product(isa: Isa, terms: &[Term<'_, f32>], rows: usize, store: &(dyn Fn(&Block<'_>) + Sync)) {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => run::<x86::Avx512>(terms, rows, store),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run::<x86::Avx2>(terms, rows, store),
            _ => run::<micro::Portable>(terms, rows, store),
        }
    }
}

impl Operand for bf16 {
    fn product(isa: Isa, terms: &[Term<'_, bf16>], rows: usize, store: &(dyn Fn(&Block<'_>) + Sync)) {
        #[cfg(target_arch = "x86_64")]
        match isa {
            Isa::AmxBf16 => return run::<amx::AmxBf16>(terms, rows, store),
            Isa::Avx512Bf16 => return run::<x86::Avx512Bf16>(terms, rows, store),
            _ => {}
        }
        let wide: Vec<Vec<f32>> =
            terms.iter().map(|t| t.a.par_iter().with_min_len(1 << 14).map(|x| x.widen()).collect()).collect();
        let terms: Vec<_> = terms.iter().zip(&wide).map(|(t, a)| Term { a, b: t.b }).collect();
        f32::product(isa, &terms, rows, store);
    }
}

fn run<M: Micro>(terms: &[Term<'_, M::Left>], rows: usize, store: &(dyn Fn(&Block<'_>) + Sync)) {
    let Some(n) = terms.first().map(|t| t.b.n) else { return };
    if rows == 0 || n == 0 {
        return;
    }
    let wanted = TASKS_PER_THREAD * rayon::current_num_threads();
    let panels = n.div_ceil(M::WIDTH);
    let most = GROUP_BYTES / (panel_units::<M>(terms) * size_of::<M::Unit>()).max(1);
    let width = panels.div_ceil(wanted).min(GROUP).min(most).max(1) * M::WIDTH;
    let groups = n.div_ceil(width);
    let share = rows.div_ceil(wanted.div_ceil(groups)).next_multiple_of(M::ROWS);
    let shares = rows.div_ceil(share);
    (0..groups * shares).into_par_iter().for_each(|task| {
        let (first_row, first_col) = (task % shares * share, task / shares * width);
        let columns = first_col..n.min(first_col + width);
        group_product::<M>(terms, first_row..rows.min(first_row + share), columns, store);
    });
}

/// Units of a panel of all terms, one behind the other.
fn panel_units<M: Micro>(terms: &[Term<'_, M::Left>]) -> usize {
    terms.iter().map(|t| M::units(t.b.k) * M::WIDTH).sum()
}

thread_local! {
    static SUMS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lends words that this thread keeps from product to product; they may be anything.
fn with_kept<W: Word>(kept: &'static LocalKey<Cell<Vec<W>>>, len: usize, work: impl FnOnce(&mut [W])) {
    let mut words = kept.take();
    if words.len() < len {
        words.resize(len, W::default());
    }
    work(&mut words[..len]);
    kept.set(words);
}

/// Packs the panels of `columns`, and multiplies the rows of `range` with them.
fn group_product<M: Micro>(
    terms: &[Term<'_, M::Left>],
    range: Range<usize>,
    columns: Range<usize>,
    store: &(dyn Fn(&Block<'_>) + Sync),
) {
    let panels = columns.len().div_ceil(M::WIDTH);
    let units = panel_units::<M>(terms);
    with_kept(M::Unit::kept(), panels * units, |packed| {
        pack_panels::<M>(terms, columns.clone(), units, packed);
        let group = Group::<M> { terms, columns, packed, units };
        for first_row in range.clone().step_by(ROW_BLOCK) {
            let rows = first_row..range.end.min(first_row + ROW_BLOCK);
            with_kept(&SUMS, panels * rows.len() * M::WIDTH, |sums| {
                group.sum(rows.clone(), sums);
                group.store(rows, sums, store);
            });
        }
    });
}

fn pack_panels<M: Micro>(
    terms: &[Term<'_, M::Left>],
    columns: Range<usize>,
    units: usize,
    packed: &mut [M::Unit],
) {
    let mut from = 0;
    for Term { b, .. } in terms {
        let len = M::units(b.k) * M::WIDTH;
        let depth = if b.layout == pack::Layout::Rows { PACKED_ROWS } else { b.k.max(1) };
        for first in (0..b.k).step_by(depth) {
            let part = first..(first + depth).min(b.k);
            let own = from + part.start / M::DEPTH * M::WIDTH..from + M::units(part.end) * M::WIDTH;
            let b = b.part(part);
            for (panel, first_col) in packed.chunks_exact_mut(units).zip(columns.clone().step_by(M::WIDTH)) {
                M::pack(&b, first_col, &mut panel[own.clone()]);
            }
        }
        from += len;
    }
}

/// Panels that are packed.
struct Group<'a, M: Micro> {
    terms: &'a [Term<'a, M::Left>],
    columns: Range<usize>,
    /// A panel of `units` units behind the other.
    packed: &'a [M::Unit],
    units: usize,
}

impl<M: Micro> Group<'_, M> {
    /// The first column and the number of columns of panel `i`.
    fn panel(&self, i: usize) -> (usize, usize) {
        let first = self.columns.start + i * M::WIDTH;
        (first, M::WIDTH.min(self.columns.end - first))
    }

    /// The sums of `rows`: for each panel `rows x WIDTH`.
    fn sum(&self, rows: Range<usize>, sums: &mut [f32]) {
        let depth = ROW_BYTES / size_of::<M::Left>();
        let (mut from, mut fresh) = (0, true);
        for Term { a, b: Right { k, .. } } in self.terms {
            let left = Left { values: &a[rows.start * k..rows.end * k], k: *k, rows: rows.len() };
            for first in (0..*k).step_by(depth) {
                let part = first..(first + depth).min(*k);
                for (i, sums) in sums.chunks_exact_mut(rows.len() * M::WIDTH).enumerate() {
                    let panel = &self.packed[i * self.units + from..];
                    block_product::<M>(&left, part.clone(), (panel, self.panel(i).1), fresh, sums);
                }
                fresh = false;
            }
            from += M::units(*k) * M::WIDTH;
        }
        if fresh {
            sums.fill(0.0);
        }
    }

    fn store(&self, rows: Range<usize>, sums: &[f32], store: &(dyn Fn(&Block<'_>) + Sync)) {
        for (i, sums) in sums.chunks_exact(rows.len() * M::WIDTH).enumerate() {
            let (first_col, cols) = self.panel(i);
            store(&Block {
                first_row: rows.start,
                rows: rows.len(),
                first_col,
                cols,
                sums,
                stride: M::WIDTH,
            });
        }
    }
}

/// Rows of a left operand, `[rows, k]` without gaps.
struct Left<'a, T> {
    values: &'a [T],
    k: usize,
    rows: usize,
}

/// `sums += a panel`, or `sums = a panel` if they are fresh, for the numbers `part` of the rows and `cols` columns of the panel.
fn block_product<M: Micro>(
    a: &Left<'_, M::Left>,
    part: Range<usize>,
    (panel, cols): (&[M::Unit], usize),
    fresh: bool,
    sums: &mut [f32],
) {
    let Left { values, k, rows } = *a;
    assert!(values.len() == rows * k && part.end <= k && part.start.is_multiple_of(M::DEPTH));
    assert!(panel.len() >= M::units(part.end) * M::WIDTH && sums.len() == rows * M::WIDTH);
    let depth = M::DEPTH_BLOCK * M::DEPTH;
    for first in part.clone().step_by(depth) {
        let numbers = depth.min(part.end - first);
        let panel = panel[first / M::DEPTH * M::WIDTH..].as_ptr();
        for row in (0..rows).step_by(M::ROWS) {
            let a =
                Rows { data: values[row * k + first..].as_ptr(), stride: k, rows: M::ROWS.min(rows - row) };
            let data = sums[row * M::WIDTH..].as_mut_ptr();
            let c = Tile { data, stride: M::WIDTH, cols, fresh: fresh && first == part.start };
            // SAFETY: the assertions above bound all three ranges; `run` is reached only for a path whose instructions the
            // machine has (`Isa::is_available`).
            unsafe { M::multiply_add(a, numbers, panel, c) };
        }
    }
}
