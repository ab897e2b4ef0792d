//! Packing with AVX-512: squares of 16 x 16 words are transposed in registers.

use std::arch::x86_64::*;

use half::bf16;

use super::pack::{self, Layout, Right, Word};
use crate::frozen::FrozenSlice;

/// Columns of a panel.
const WIDTH: usize = 64;

/// [`pack::singles`] for panels of 64 columns.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn singles(b: &Right<'_>, from: usize, panel: &mut [f32]) {
    let columns = WIDTH.min(b.n - from);
    match (b.layout, b.values) {
        (Layout::Rows, _) => pack::singles::<WIDTH>(b, from, panel),
        (Layout::ColumnsAsRows, FrozenSlice::F32(values)) => {
            let source = Source { values: &values[from * b.stride..], stride: b.stride, columns, k: b.k };
            // SAFETY: `turn` asks for numbers of the source only.
            turn::<f32, f32, 1>(
                &source,
                |p, n| unsafe { _mm512_maskz_loadu_epi32(first(n) as u16, p.cast()) },
                WIDTH,
                (panel, WIDTH),
            );
        }
        (Layout::ColumnsAsRows, FrozenSlice::Bf16(values)) => {
            let source = Source { values: &values[from * b.stride..], stride: b.stride, columns, k: b.k };
            let load = |p: *const bf16, n| {
                // SAFETY: `turn` asks for numbers of the source only.
                let x = unsafe { _mm256_maskz_loadu_epi16(first(n) as u16, p.cast()) };
                _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))
            };
            turn::<bf16, f32, 1>(&source, load, WIDTH, (panel, WIDTH));
        }
    }
}

/// [`pack::pairs`] for panels of 64 columns.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn pairs(b: &Right<'_>, from: usize, panel: &mut [u32]) {
    match (b.layout, b.values) {
        (Layout::ColumnsAsRows, FrozenSlice::Bf16(values)) => {
            let columns = WIDTH.min(b.n - from);
            let source = Source { values: &values[from * b.stride..], stride: b.stride, columns, k: b.k };
            // SAFETY: `turn` asks for numbers of the source only.
            turn::<bf16, u32, 2>(
                &source,
                |p, n| unsafe { _mm512_maskz_loadu_epi16(first(n), p.cast()) },
                WIDTH,
                (panel, WIDTH),
            );
        }
        _ => pack::pairs::<WIDTH>(b, from, panel),
    }
}

/// [`pack::transpose`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn transpose<W: Word>(
    (from, from_stride): (&[W], usize),
    (rows, cols): (usize, usize),
    (to, to_stride): (&mut [W], usize),
) {
    let source = Source { values: from, stride: from_stride, columns: rows, k: cols };
    // SAFETY: `turn` asks for numbers of the source only; a word is 32 bits wide.
    turn::<W, W, 1>(
        &source,
        |p, n| unsafe { _mm512_maskz_loadu_epi32(first(n) as u16, p.cast()) },
        rows.next_multiple_of(16),
        (to, to_stride),
    );
}

/// `columns` columns of `k` numbers each, stored one after another.
struct Source<'a, T> {
    values: &'a [T],
    stride: usize,
    columns: usize,
    k: usize,
}

/// A mask of the first `n` lanes, of at most 32.
fn first(n: usize) -> u32 {
    ((1u64 << n) - 1) as u32
}

/// Writes the columns' words, of `DEPTH` numbers each, to `out`: word `i` of column `j` goes to `out[i * stride + j]`.
/// Columns of zeros are added up to the number `filled`, a multiple of 16.
///
/// `load(p, n)` makes 16 words of `n <= 16 * DEPTH` numbers from `p` on, and zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn turn<T: Copy, W: Word, const DEPTH: usize>(
    source: &Source<'_, T>,
    load: impl Fn(*const T, usize) -> __m512i,
    filled: usize,
    (out, stride): (&mut [W], usize),
) {
    let Source { values, stride: column_stride, columns, k } = *source;
    let words = k.div_ceil(DEPTH);
    if words == 0 || columns == 0 {
        return;
    }
    assert!(columns <= filled && filled.is_multiple_of(16), "{columns} columns, filled up to {filled}");
    assert!(filled <= stride && (words - 1) * stride + filled <= out.len(), "words for {columns} columns");
    assert!((columns - 1) * column_stride + k <= values.len(), "{columns} columns of {k} numbers");
    for column in (0..filled).step_by(16) {
        let there = columns.saturating_sub(column).min(16);
        for word in (0..words).step_by(16) {
            let numbers = (16 * DEPTH).min(k - word * DEPTH);
            let square = transposed(std::array::from_fn(|j| {
                // Columns that are not there are read as no numbers of a column that is.
                let (place, numbers) = if j < there { (column + j, numbers) } else { (0, 0) };
                // SAFETY: column `place` exists and has these numbers, by the assertion above.
                load(unsafe { values.as_ptr().add(place * column_stride + word * DEPTH) }, numbers)
            }));
            for (i, x) in square.into_iter().enumerate() {
                if word + i < words {
                    // SAFETY: these 16 words of `out` exist, by the assertion above; a word is 32 bits wide.
                    unsafe {
                        let to = out.as_mut_ptr().add((word + i) * stride + column);
                        _mm512_storeu_si512(to.cast(), x);
                    };
                }
            }
        }
    }
}

/// The transpose of 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut quads = [_mm512_setzero_si512(); 16];
    for (quad, r) in quads.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let (a, b) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpacklo_epi32(r[2], r[3]));
        let (c, d) = (_mm512_unpackhi_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[2], r[3]));
        *quad = [
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ];
    }
    // Now lane `l` of `quads[4 q + c]` holds column `4 l + c` of rows `4 q .. 4 q + 4`.
    let mut out = quads;
    for c in 0..4 {
        let (q0, q1, q2, q3) = (quads[c], quads[4 + c], quads[8 + c], quads[12 + c]);
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(q0, q1), _mm512_shuffle_i32x4::<0xdd>(q0, q1));
        let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(q2, q3), _mm512_shuffle_i32x4::<0xdd>(q2, q3));
        out[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
    out
}
