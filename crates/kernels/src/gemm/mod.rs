//! Matrix products with a packed right operand: the one place where the floating-point work of a T5 is done.
//!
//! The result is cut into panels of columns and blocks of rows, which threads take in any order: no number of the result
//! depends on the cut (see [`micro`]). A panel is packed straight from the stored matrix when it is needed, so that a frozen
//! weight has no second copy.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod micro;
pub(crate) mod pack;
#[cfg(target_arch = "x86_64")]
mod turn;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use half::bf16;
use rayon::prelude::*;

use crate::element::Element;
use crate::isa::Isa;
use micro::{Micro, Rows, Tile};
use pack::Right;

/// Rows summed in one go: `ROW_BLOCK x WIDTH` f32 sums stay in a core's level-2 cache beside the panel.
const ROW_BLOCK: usize = 768;
/// Units of a panel that are used again for every row of a block before the next ones: 64 KiB for panels of 64 columns.
const DEPTH_BLOCK: usize = 256;
/// Tasks a thread at least, so that one that is late does not hold up the others.
const TASKS_PER_THREAD: usize = 4;

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

/// Buffers of a thread, used again from task to task.
struct Scratch<M: Micro> {
    panel: Vec<M::Unit>,
    sums: Vec<f32>,
}

fn run<M: Micro>(terms: &[Term<'_, M::Left>], rows: usize, store: &(dyn Fn(&Block<'_>) + Sync)) {
    let Some(n) = terms.first().map(|t| t.b.n) else { return };
    if rows == 0 || n == 0 {
        return;
    }
    let panels = n.div_ceil(M::WIDTH);
    let wanted = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(panels);
    let share = rows.div_ceil(wanted).next_multiple_of(M::ROWS).min(rows.next_multiple_of(M::ROWS));
    let shares = rows.div_ceil(share);
    (0..panels * shares).into_par_iter().for_each_init(
        || Scratch::<M> { panel: Vec::new(), sums: Vec::new() },
        |scratch, task| {
            let first = task % shares * share;
            let range = first..rows.min(first + share);
            panel_product(terms, range, task / shares * M::WIDTH, scratch, store);
        },
    );
}

/// Packs the panel of columns from `first_col` on and multiplies the rows of `range` with it.
fn panel_product<M: Micro>(
    terms: &[Term<'_, M::Left>],
    range: std::ops::Range<usize>,
    first_col: usize,
    scratch: &mut Scratch<M>,
    store: &(dyn Fn(&Block<'_>) + Sync),
) {
    let Scratch { panel, sums } = scratch;
    let units: usize = terms.iter().map(|t| M::units(t.b.k)).sum();
    panel.resize(units * M::WIDTH, M::Unit::default());
    let mut from = 0;
    for term in terms {
        let len = M::units(term.b.k) * M::WIDTH;
        M::pack(&term.b, first_col, &mut panel[from..from + len]);
        from += len;
    }
    let cols = M::WIDTH.min(terms[0].b.n - first_col);
    for first_row in range.clone().step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(range.end - first_row);
        sums.resize(sums.len().max(rows * M::WIDTH), 0.0);
        let sums = &mut sums[..rows * M::WIDTH];
        let (mut from, mut fresh) = (0, true);
        for term in terms {
            let k = term.b.k;
            let left = Left { values: &term.a[first_row * k..(first_row + rows) * k], k, rows };
            block_product::<M>(&left, &panel[from..], cols, fresh, sums);
            fresh &= k == 0;
            from += M::units(k) * M::WIDTH;
        }
        if fresh {
            sums.fill(0.0);
        }
        store(&Block { first_row, rows, first_col, cols, sums, stride: M::WIDTH });
    }
}

/// Rows of a left operand, `[rows, k]` without gaps.
struct Left<'a, T> {
    values: &'a [T],
    k: usize,
    rows: usize,
}

/// `sums += a panel`, or `sums = a panel` if they are fresh, for `cols` columns of the panel.
fn block_product<M: Micro>(
    a: &Left<'_, M::Left>,
    panel: &[M::Unit],
    cols: usize,
    fresh: bool,
    sums: &mut [f32],
) {
    let Left { values, k, rows } = *a;
    assert!(
        values.len() == rows * k && panel.len() >= M::units(k) * M::WIDTH && sums.len() == rows * M::WIDTH
    );
    let depth = DEPTH_BLOCK * M::DEPTH;
    for first in (0..k).step_by(depth) {
        let part = depth.min(k - first);
        let panel = panel[first / M::DEPTH * M::WIDTH..].as_ptr();
        for row in (0..rows).step_by(M::ROWS) {
            let a =
                Rows { data: values[row * k + first..].as_ptr(), stride: k, rows: M::ROWS.min(rows - row) };
            let data = sums[row * M::WIDTH..].as_mut_ptr();
            let c = Tile { data, stride: M::WIDTH, cols, fresh: fresh && first == 0 };
            // SAFETY: the assertion above bounds all three ranges; `run` is reached only for a path whose instructions the
            // machine has (`Isa::is_available`).
            unsafe { M::multiply_add(a, part, panel, c) };
        }
    }
}
