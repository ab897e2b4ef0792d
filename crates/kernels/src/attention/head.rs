//! One head of one example: where its numbers lie, and products of its strips.

use std::ops::Range;

use crate::attention::Attention;
use crate::element::Element;
use crate::gemm::micro::{Micro, Rows, Tile};
use crate::gemm::pack::{Layout, Right};

/// Rows of a strip of scores: 48, or as many more as the path computes at once.
pub(crate) const fn strip<M: Micro>() -> usize {
    48usize.next_multiple_of(M::ROWS)
}

/// Every panel's width is a multiple of it.
pub(crate) const PADDING: usize = 16;

/// A head's part of a tensor `[T, heads * K]`: `rows` rows of `width` numbers.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a, T> {
    /// From the first number of the first row on.
    pub(crate) values: &'a [T],
    /// Numbers from row to row.
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

impl<'a, T: Element> Part<'a, T> {
    pub(crate) fn new(
        values: &'a [T],
        stride: usize,
        rows: &Range<usize>,
        head: usize,
        width: usize,
    ) -> Self {
        let values = if rows.is_empty() { &[] } else { &values[rows.start * stride + head * width..] };
        Self { values, stride, rows: rows.len(), width }
    }

    /// As a right operand with one column a row (`row . row` products).
    fn columns(&self) -> Right<'a> {
        let values = T::operand(self.values);
        Right { values, layout: Layout::ColumnsAsRows, stride: self.stride, k: self.width, n: self.rows }
    }

    /// As a right operand with the rows contracted.
    fn contracted(&self) -> Right<'a> {
        let values = T::operand(self.values);
        Right { values, layout: Layout::Rows, stride: self.stride, k: self.rows, n: self.width }
    }
}

/// A packed right operand.
pub(crate) struct Packed<M: Micro> {
    panels: Vec<M::Unit>,
    k: usize,
    n: usize,
}

impl<M: Micro> Packed<M> {
    pub(crate) fn empty() -> Self {
        Self { panels: Vec::new(), k: 0, n: 0 }
    }

    /// For products of rows with the rows of `part`.
    pub(crate) fn columns<T: Element>(&mut self, part: &Part<'_, T>) {
        self.pack(&part.columns());
    }

    /// For products that contract the rows of `part`.
    pub(crate) fn contracted<T: Element>(&mut self, part: &Part<'_, T>) {
        self.pack(&part.contracted());
    }

    fn pack(&mut self, right: &Right<'_>) {
        (self.k, self.n) = (right.k, right.n);
        let len = M::units(right.k) * M::WIDTH;
        self.panels.resize(right.n.div_ceil(M::WIDTH) * len, M::Unit::default());
        for (panel, units) in self.panels.chunks_exact_mut(len.max(1)).enumerate() {
            M::pack(right, panel * M::WIDTH, units);
        }
    }

    /// `sums = a packed`, for the rows `a` (row stride `stride`, `k` numbers each): rows of `width()` numbers, of which the
    /// first `n` are the result, and those up to `padded(n)` are numbers.
    pub(crate) fn multiply(&self, a: &[M::Left], stride: usize, rows: usize, sums: &mut Vec<f32>) {
        let len = rows * self.width();
        sums.resize(sums.len().max(len), 0.0);
        if self.k == 0 {
            sums[..len].fill(0.0);
        }
        self.multiply_into((a, stride, rows), true, &mut sums[..len]);
    }

    /// `sums += a packed`; see [`Packed::multiply`].
    pub(crate) fn multiply_add(&self, a: &[M::Left], stride: usize, rows: usize, sums: &mut [f32]) {
        self.multiply_into((a, stride, rows), false, sums);
    }

    fn multiply_into(&self, (a, stride, rows): (&[M::Left], usize, usize), fresh: bool, sums: &mut [f32]) {
        if rows == 0 || self.k == 0 {
            return;
        }
        let columns = self.width();
        assert!(a.len() >= (rows - 1) * stride + self.k, "{rows} rows of {} numbers", self.k);
        assert!(sums.len() == rows * columns, "{rows} rows of {columns} sums");
        for (panel, units) in self.panels.chunks_exact(M::units(self.k) * M::WIDTH).enumerate() {
            let cols = M::WIDTH.min(self.n - panel * M::WIDTH);
            for row in (0..rows).step_by(M::ROWS) {
                let a = Rows { data: a[row * stride..].as_ptr(), stride, rows: M::ROWS.min(rows - row) };
                let data = sums[row * columns + panel * M::WIDTH..].as_mut_ptr();
                let c = Tile { data, stride: columns, cols, fresh };
                // SAFETY: the assertions bound the rows of `a` and of the sums; the panel is whole; the caller chose a path
                // whose instructions the machine has.
                unsafe { M::multiply_add(a, self.k, units.as_ptr(), c) };
            }
        }
    }

    /// Columns of a row of sums: `n`, filled up to whole panels.
    pub(crate) fn width(&self) -> usize {
        self.n.next_multiple_of(M::WIDTH)
    }
}

/// The transpose of a part, as a left operand: one row for each of the part's columns.
pub(crate) struct Transposed<M: Micro> {
    packed: Packed<M>,
    units: Vec<M::Unit>,
    /// Units from row to row.
    stride: usize,
}

impl<M: Micro> Transposed<M> {
    pub(crate) fn empty() -> Self {
        Self { packed: Packed::empty(), units: Vec::new(), stride: 0 }
    }

    pub(crate) fn set<T: Element>(&mut self, part: &Part<'_, T>) {
        // A packed operand has the units in which a left one is read, but column by column.
        self.packed.contracted(part);
        let units = M::units(part.rows);
        self.stride = units.next_multiple_of(16);
        self.units.resize(part.width * self.stride, M::Unit::default());
        for (i, panel) in self.packed.panels.chunks_exact((units * M::WIDTH).max(1)).enumerate() {
            let (first, cols) = (i * M::WIDTH, M::WIDTH.min(part.width - i * M::WIDTH));
            M::transpose(
                (panel, M::WIDTH),
                (units, cols),
                (&mut self.units[first * self.stride..], self.stride),
            );
        }
    }

    /// The numbers from the part's row `first` (a multiple of the numbers in a unit) on, and those from row to row.
    pub(crate) fn from(&self, first: usize) -> (&[M::Left], usize) {
        (&M::left(&self.units)[first..], self.stride * M::DEPTH)
    }
}

/// How many keys a query sees: those at the front.
pub(crate) fn visible_keys(spec: &Attention<'_>, query: usize, keys: usize) -> usize {
    if spec.causal { keys.min(spec.prefix + query + 1) } else { keys }
}

/// The bias of `query` with the first `n` keys of its example, those of the prefix among them, of which `PADDING` may lie behind
/// the last one. It is put together in `row` where there is a prefix.
#[inline]
pub(crate) fn bias_row<'a>(
    spec: &Attention<'a>,
    (head, query): (usize, usize),
    n: usize,
    row: &'a mut Vec<f32>,
) -> Option<&'a [f32]> {
    let bias = spec.bias?;
    if spec.prefix == 0 {
        return Some(bias.keys(head, query, n));
    }
    row.clear();
    row.resize(spec.prefix, 0.0);
    row.extend_from_slice(bias.keys(head, query, n - spec.prefix));
    Some(row)
}

/// `n` filled up to whole vectors: numbers behind a row's end are computed too, and then overwritten, so that no loop has a
/// slow end. A row of a [`Packed`] product has room for them.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(PADDING)
}
