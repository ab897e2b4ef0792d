//! The innermost products in the instructions of x86-64.

use std::arch::x86_64::*;

use half::bf16;

use super::micro::{Micro, Rows, Tile};
use super::{pack, turn};
use crate::isa::Isa;

/// Calls `$f::<R, $vectors>` for the `R` that `$rows` is.
macro_rules! by_rows {
    ($rows:expr, $vectors:literal, $f:ident, $args:tt) => {
        match $rows {
            1 => call!($f, 1, $vectors, $args),
            2 => call!($f, 2, $vectors, $args),
            3 => call!($f, 3, $vectors, $args),
            4 => call!($f, 4, $vectors, $args),
            5 => call!($f, 5, $vectors, $args),
            6 => call!($f, 6, $vectors, $args),
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

macro_rules! call {
    ($f:ident, $rows:literal, $vectors:literal, ($($arg:expr),*)) => { $f::<$rows, $vectors>($($arg),*) };
}

/// Calls `$f::<R, V>` for the `R` that `$rows` is and as many vectors of 16 columns as are wanted.
macro_rules! by_tile {
    ($rows:expr, $cols:expr, $f:ident, $args:tt) => {
        match $cols {
            ..=16 => by_rows!($rows, 1, $f, $args),
            17..=32 => by_rows!($rows, 2, $f, $args),
            33..=48 => by_rows!($rows, 3, $f, $args),
            _ => by_rows!($rows, 4, $f, $args),
        }
    };
}

/// 6 x 16 in f32.
pub(crate) struct Avx2;

impl Micro for Avx2 {
    type Left = f32;
    type Unit = f32;
    const WIDTH: usize = 16;
    const ROWS: usize = 6;
    const DEPTH: usize = 1;

    fn pack(b: &pack::Right<'_>, from: usize, panel: &mut [f32]) {
        Isa::Avx2.vectorize(
            #[inline(always)]
            || pack::singles::<16>(b, from, panel),
        );
    }

    fn left(units: &[f32]) -> &[f32] {
        units
    }

    unsafe fn multiply_add(a: Rows<f32>, k: usize, panel: *const f32, c: Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_rows!(a.rows, 2, avx2, (a, k, panel, c)) }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const R: usize, const V: usize>(a: Rows<f32>, k: usize, panel: *const f32, c: Tile) {
    // SAFETY: the caller of `multiply_add` promises the ranges that are read and written here.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); V]; R];
        if !c.fresh {
            for (r, row) in sums.iter_mut().enumerate() {
                for (j, s) in row.iter_mut().enumerate() {
                    *s = _mm256_loadu_ps(c.data.add(r * c.stride + j * 8));
                }
            }
        }
        for i in 0..k {
            let b: [__m256; V] = std::array::from_fn(|j| _mm256_loadu_ps(panel.add(i * 16 + j * 8)));
            for (r, row) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*a.data.add(r * a.stride + i));
                for (s, b) in row.iter_mut().zip(b) {
                    *s = _mm256_fmadd_ps(x, b, *s);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (j, s) in row.iter().enumerate() {
                _mm256_storeu_ps(c.data.add(r * c.stride + j * 8), *s);
            }
        }
    }
}

/// 6 x 64 in f32.
pub(crate) struct Avx512;

impl Micro for Avx512 {
    type Left = f32;
    type Unit = f32;
    const WIDTH: usize = 64;
    const ROWS: usize = 6;
    const DEPTH: usize = 1;

    fn pack(b: &pack::Right<'_>, from: usize, panel: &mut [f32]) {
        // SAFETY: this path is used only where the machine has its instructions.
        unsafe { turn::singles(b, from, panel) }
    }

    fn left(units: &[f32]) -> &[f32] {
        units
    }

    fn transpose<W: pack::Word>(from: (&[W], usize), dims: (usize, usize), to: (&mut [W], usize)) {
        // SAFETY: this path is used only where the machine has its instructions.
        unsafe { turn::transpose(from, dims, to) }
    }

    unsafe fn multiply_add(a: Rows<f32>, k: usize, panel: *const f32, c: Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_tile!(a.rows, c.cols, avx512, (a, k, panel, c)) }
    }
}

/// The sums so far.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load<const R: usize, const V: usize>(c: Tile) -> [[__m512; V]; R] {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    if !c.fresh {
        for (r, row) in sums.iter_mut().enumerate() {
            for (j, s) in row.iter_mut().enumerate() {
                // SAFETY: the caller of `multiply_add` promises R rows of 64 numbers.
                *s = unsafe { _mm512_loadu_ps(c.data.add(r * c.stride + j * 16)) };
            }
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const R: usize, const V: usize>(c: Tile, sums: &[[__m512; V]; R]) {
    for (r, row) in sums.iter().enumerate() {
        for (j, s) in row.iter().enumerate() {
            // SAFETY: the caller of `multiply_add` promises R rows of 64 numbers.
            unsafe { _mm512_storeu_ps(c.data.add(r * c.stride + j * 16), *s) };
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn avx512<const R: usize, const V: usize>(a: Rows<f32>, k: usize, panel: *const f32, c: Tile) {
    // SAFETY: the caller of `multiply_add` promises the ranges that are read and written here.
    unsafe {
        let mut sums = load::<R, V>(c);
        for i in 0..k {
            let p = panel.add(i * 64);
            let b: [__m512; V] = std::array::from_fn(|j| _mm512_loadu_ps(p.add(j * 16)));
            for (r, row) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.data.add(r * a.stride + i));
                for (s, b) in row.iter_mut().zip(b) {
                    *s = _mm512_fmadd_ps(x, b, *s);
                }
            }
        }
        store(c, &sums);
    }
}

/// 6 x 64 with pairs of bf16 numbers, summed in f32.
pub(crate) struct Avx512Bf16;

impl Micro for Avx512Bf16 {
    type Left = bf16;
    type Unit = u32;
    const WIDTH: usize = 64;
    const ROWS: usize = 6;
    const DEPTH: usize = 2;

    fn pack(b: &pack::Right<'_>, from: usize, panel: &mut [u32]) {
        // SAFETY: this path is used only where the machine has its instructions.
        unsafe { turn::pairs(b, from, panel) }
    }

    fn left(units: &[u32]) -> &[bf16] {
        // SAFETY: a unit is two bf16 numbers, the earlier one in the lower half, and x86-64 is little-endian.
        unsafe { std::slice::from_raw_parts(units.as_ptr().cast(), 2 * units.len()) }
    }

    fn transpose<W: pack::Word>(from: (&[W], usize), dims: (usize, usize), to: (&mut [W], usize)) {
        // SAFETY: this path is used only where the machine has its instructions.
        unsafe { turn::transpose(from, dims, to) }
    }

    unsafe fn multiply_add(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_tile!(a.rows, c.cols, avx512_bf16, (a, k, panel, c)) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn step<const R: usize, const V: usize>(sums: &mut [[__m512; V]; R], pairs: [u32; R], p: *const u32) {
    // SAFETY: the caller gives a row of the panel: 64 units. The casts are between vectors of 512 bits.
    unsafe {
        let b: [__m512bh; V] =
            std::array::from_fn(|j| std::mem::transmute(_mm512_loadu_si512(p.add(j * 16).cast())));
        for (row, pair) in sums.iter_mut().zip(pairs) {
            let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair as i32));
            for (s, b) in row.iter_mut().zip(b) {
                *s = _mm512_dpbf16_ps(*s, x, b);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16<const R: usize, const V: usize>(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
    // SAFETY: the caller of `multiply_add` promises the ranges that are read and written here; a pair is read only
    // where the row has both its numbers.
    unsafe {
        let mut sums = load::<R, V>(c);
        for i in 0..k / 2 {
            let pairs =
                std::array::from_fn(|r| a.data.add(r * a.stride + 2 * i).cast::<u32>().read_unaligned());
            step(&mut sums, pairs, panel.add(i * 64));
        }
        if !k.is_multiple_of(2) {
            let last = std::array::from_fn(|r| u32::from((*a.data.add(r * a.stride + k - 1)).to_bits()));
            step(&mut sums, last, panel.add(k / 2 * 64));
        }
        store(c, &sums);
    }
}
