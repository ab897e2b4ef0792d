//! Parts of a tensor, and their numbers.

use std::ops::Range;

use half::{bf16, f16};
use incipit_kernels::Frozen;
use rayon::prelude::*;

use crate::readers::Entry;
use crate::source::{matrix, round};

/// A part of the matrix as which a tensor is kept (see [`matrix`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl Slice {
    /// These rows and columns of a tensor of the shape `shape`.
    ///
    /// # Panics
    /// If it does not have them.
    pub(crate) fn new(shape: &[usize], rows: Range<usize>, cols: Range<usize>) -> Self {
        let (height, width) = matrix(shape);
        assert!(
            rows.start <= rows.end && rows.end <= height && cols.start <= cols.end && cols.end <= width,
            "rows {rows:?} and columns {cols:?} of a matrix of {height} x {width}"
        );
        Self { rows, cols }
    }

    /// All of a tensor of the shape `shape`.
    pub(crate) fn whole(shape: &[usize]) -> Self {
        let (height, width) = matrix(shape);
        Self { rows: 0..height, cols: 0..width }
    }

    pub(crate) fn num_elements(&self) -> usize {
        self.rows.len() * self.cols.len()
    }
}

/// Copies a part of a tensor, whose bytes are `bytes`, into row-major order.
pub(crate) fn gather(bytes: &[u8], entry: &Entry, slice: &Slice) -> Vec<u8> {
    let size = entry.dtype.size_in_bytes();
    let (row_stride, offsets) = offsets(entry, slice.cols.clone());
    let mut out = vec![0; slice.num_elements() * size];
    if out.is_empty() {
        return out;
    }
    let neighbours = offsets.windows(2).all(|pair| pair[1] == pair[0] + 1);
    let rows = out.par_chunks_exact_mut(offsets.len() * size).zip(slice.rows.clone());
    // Rows of a narrow part are too little work to be dealt out one by one.
    rows.with_min_len(64).for_each(|(out, row)| {
        let first = row * row_stride;
        if neighbours {
            let from = (first + offsets[0]) * size;
            out.copy_from_slice(&bytes[from..from + out.len()]);
            return;
        }
        for (to, offset) in out.chunks_exact_mut(size).zip(&offsets) {
            let from = (first + offset) * size;
            to.copy_from_slice(&bytes[from..from + size]);
        }
    });
    out
}

/// Numbers from one row of a tensor's matrix to the next, and from a row's start to each of its columns `cols`.
fn offsets(entry: &Entry, cols: Range<usize>) -> (usize, Vec<usize>) {
    let (_, width) = matrix(&entry.shape);
    let Some(strides) = &entry.strides else { return (width, cols.collect()) };
    // A vector is one row, so that its only dim runs along the columns.
    let leading = usize::from(entry.shape.len() > 1);
    let row_stride = if leading == 1 { strides[0] } else { 0 };
    let offset = |mut col: usize| {
        let mut offset = 0;
        for (&n, &stride) in entry.shape[leading..].iter().zip(&strides[leading..]).rev() {
            offset += col % n * stride;
            col /= n;
        }
        offset
    };
    (row_stride, cols.map(offset).collect())
}

/// Numbers that one task converts at a time.
const CHUNK: usize = 1 << 18;

/// A matrix of `rows x cols` f32 numbers, rounded to bf16.
pub(crate) fn bf16_from_f32(bytes: &[u8], rows: usize, cols: usize) -> Frozen {
    let mut out = vec![bf16::ZERO; rows * cols];
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(4 * CHUNK)).for_each(|(out, bytes)| {
        for (to, from) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *to = round(f32::from_le_bytes([from[0], from[1], from[2], from[3]]));
        }
    });
    Frozen::from_bf16(out, rows, cols)
}

pub(crate) fn f16_numbers(bytes: &[u8]) -> Vec<f16> {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()
}
