//! Linear layers against sums in f64, at shapes that fill no tile, panel or block exactly.

use candle_core::DType;

use super::reference::product;
use super::{
    F32_ROUNDING, TYPES, assert_close, frozen, generator, held, matrix, normal, numbers, paths, rounding,
    wide,
};
use crate::linear::{linear_add_on, linear_gradient_on, linear_on, linear_weight_gradient_on};
use crate::{Frozen, Isa};

/// Rows, outputs and inputs.
const SHAPES: [(usize, usize, usize); 21] = [
    (1, 1, 1),
    (1, 64, 2),
    (2, 63, 3),
    (3, 65, 16),
    (4, 16, 31),
    (5, 17, 33),
    (6, 80, 64),
    (7, 100, 1),
    (8, 130, 515),
    (9, 33, 1030),
    (10, 48, 7),
    (11, 191, 40),
    (12, 5, 97),
    (13, 64, 128),
    (16, 32, 32),
    (17, 33, 64),
    (31, 70, 95),
    (32, 64, 544),
    (77, 130, 33),
    (197, 37, 1100),
    (800, 20, 9),
];

/// A weight of which only an inner part is used, so that its rows are not next to one another.
fn part_of_larger(g: &mut crate::rng::Philox, rows: usize, cols: usize, dtype: DType) -> Frozen {
    let (all_rows, all_cols) = (rows + 3, cols + 5);
    frozen(&normal(g, all_rows * all_cols, dtype), all_rows, all_cols, dtype).part((2, rows), (1, cols))
}

/// The numbers that a product reads: bf16 rows meet bf16 weights where the instructions take nothing else.
fn read_weight(isa: Isa, w: &Frozen, x: DType) -> Vec<f64> {
    let narrow = matches!(isa, Isa::AmxBf16 | Isa::Avx512Bf16) && x == DType::BF16;
    w.to_f32().iter().map(|w| f64::from(if narrow { held(*w, DType::BF16) } else { *w })).collect()
}

/// Adding up `k` products in f32 in any order errs by at most `k` roundings of the sum of their sizes; rounding the result
/// to `out` comes on top. (The smallest numbers of bf16 products are flushed to 0: hence the last term.)
fn bound(k: usize, size: f64, expected: f64, out: DType) -> f64 {
    (k + 2) as f64 * F32_ROUNDING * size + rounding(out) * expected.abs() + 1e-35
}

#[test]
fn linear_is_the_product_with_the_transposed_weight() {
    let mut g = generator(101);
    for (rows, n, k) in SHAPES {
        for (x_type, w_type, out) in choices(TYPES) {
            let x = normal(&mut g, rows * k, x_type);
            let w = part_of_larger(&mut g, n, k, w_type);
            for isa in paths() {
                let weight = read_weight(isa, &w, x_type);
                let (sums, sizes) = product(&wide(&x), (rows, k, n), |i, col| weight[col * k + i]);
                let y = linear_on(isa, &matrix(&x, rows, k, x_type), &w, out).unwrap();
                assert_eq!((y.dims(), y.dtype()), (&[rows, n][..], out));
                let what = format!("{isa:?} {x_type:?} {w_type:?} {out:?} {rows} x {n} x {k}");
                assert_close(&what, &numbers(&y), &sums, |i| bound(k, sizes[i], sums[i], out));
            }
        }
    }
}

#[test]
fn linear_gradient_is_the_sum_of_the_products_with_the_weights() {
    let mut g = generator(102);
    for (rows, n, k) in SHAPES {
        for (dy_type, w_type, out) in choices(TYPES) {
            // Outputs of the two layers are contracted; the number of them differs.
            let outputs = [n, n / 2 + 1];
            let dys = outputs.map(|n| normal(&mut g, rows * n, dy_type));
            let weights = outputs.map(|n| part_of_larger(&mut g, n, k, w_type));
            for isa in paths() {
                let mut expected = vec![(0.0, 0.0); rows * k];
                for ((dy, w), n) in dys.iter().zip(&weights).zip(outputs) {
                    let weight = read_weight(isa, w, dy_type);
                    let (sums, sizes) = product(&wide(dy), (rows, n, k), |i, col| weight[i * k + col]);
                    for (e, (sum, size)) in expected.iter_mut().zip(sums.iter().zip(sizes)) {
                        *e = (e.0 + sum, e.1 + size);
                    }
                }
                let (sums, sizes): (Vec<f64>, Vec<f64>) = expected.into_iter().unzip();
                let dys = [0, 1].map(|t| matrix(&dys[t], rows, outputs[t], dy_type));
                let terms = [(&dys[0], &weights[0]), (&dys[1], &weights[1])];
                let dx = linear_gradient_on(isa, &terms, out).unwrap();
                let what = format!("{isa:?} {dy_type:?} {w_type:?} {out:?} {rows} x {n} x {k}");
                let depth = outputs.iter().sum();
                assert_close(&what, &numbers(&dx), &sums, |i| bound(depth, sizes[i], sums[i], out));
            }
        }
    }
}

#[test]
fn linear_weight_gradient_is_the_product_of_the_transposed_gradient_and_the_input() {
    let mut g = generator(105);
    for (rows, n, k) in SHAPES {
        for dtype in TYPES {
            let (dy, x) = (normal(&mut g, rows * n, dtype), normal(&mut g, rows * k, dtype));
            let turned: Vec<f64> = (0..n * rows).map(|i| f64::from(dy[i % rows * n + i / rows])).collect();
            let (sums, sizes) = product(&turned, (n, rows, k), |i, col| f64::from(x[i * k + col]));
            let (dy, x) = (matrix(&dy, rows, n, dtype), matrix(&x, rows, k, dtype));
            for isa in paths() {
                let dw = linear_weight_gradient_on(isa, &dy, &x).unwrap();
                assert_eq!((dw.dims(), dw.dtype()), (&[n, k][..], DType::F32));
                let what = format!("{isa:?} {dtype:?} {rows} x {n} x {k}");
                assert_close(&what, &numbers(&dw), &sums, |i| bound(rows, sizes[i], sums[i], DType::F32));
            }
        }
    }
}

#[test]
fn linear_add_adds_the_residual_to_the_product() {
    let mut g = generator(103);
    for (rows, n, k) in SHAPES {
        for dtype in TYPES {
            let (x, residual) = (normal(&mut g, rows * k, dtype), normal(&mut g, rows * n, DType::F32));
            let w = part_of_larger(&mut g, n, k, dtype);
            for isa in paths() {
                let (x, residual) = (matrix(&x, rows, k, dtype), matrix(&residual, rows, n, DType::F32));
                let product = numbers(&linear_on(isa, &x, &w, DType::F32).unwrap());
                let sums: Vec<f32> = numbers(&residual).iter().zip(product).map(|(r, p)| r + p).collect();
                assert_eq!(numbers(&linear_add_on(isa, &residual, &x, &w).unwrap()), sums, "{isa:?}");
            }
        }
    }
}

#[test]
fn products_of_nothing_are_zero_or_empty() {
    for isa in paths() {
        for dtype in TYPES {
            for (rows, n, k) in [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)] {
                let w = frozen(&vec![1.0; n * k], n, k, dtype);
                let x = matrix(&vec![1.0; rows * k], rows, k, dtype);
                let y = linear_on(isa, &x, &w, dtype).unwrap();
                assert_eq!((y.dims(), numbers(&y)), (&[rows, n][..], vec![0.0; rows * n]));
                let dy = matrix(&vec![1.0; rows * n], rows, n, dtype);
                let dw = linear_weight_gradient_on(isa, &dy, &x).unwrap();
                assert_eq!((dw.dims(), numbers(&dw)), (&[n, k][..], vec![rows as f32; n * k]));
                let dx = linear_gradient_on(isa, &[(&dy, &w), (&dy, &w)], dtype).unwrap();
                let expected = if n == 0 { 0.0 } else { 2.0 * n as f32 };
                assert_eq!((dx.dims(), numbers(&dx)), (&[rows, k][..], vec![expected; rows * k]));
            }
        }
    }
}

#[test]
fn a_mapped_weight_gives_the_bits_of_an_owned_one() {
    let mut g = generator(104);
    let (n, k) = (70, 37);
    for dtype in TYPES {
        let values = normal(&mut g, n * k, dtype);
        let mut bytes = vec![0u8; 8];
        for x in &values {
            match dtype {
                DType::BF16 => bytes.extend(half::bf16::from_f32(*x).to_le_bytes()),
                _ => bytes.extend(x.to_le_bytes()),
            }
        }
        let x = matrix(&normal(&mut g, 3 * k, dtype), 3, k, dtype);
        let owned = linear_on(Isa::Portable, &x, &frozen(&values, n, k, dtype), dtype).unwrap();
        for shift in 0..3 {
            let mut moved = bytes.clone();
            moved.splice(0..0, vec![0; shift]);
            let mapped = Frozen::mapped(std::sync::Arc::new(moved), 8 + shift, dtype, n, k).unwrap();
            let y = linear_on(Isa::Portable, &x, &mapped, dtype).unwrap();
            assert_eq!(numbers(&y), numbers(&owned), "{dtype:?}, moved by {shift}");
        }
    }
}

/// Every choice of three types.
fn choices(types: [DType; 2]) -> impl Iterator<Item = (DType, DType, DType)> {
    (0..8).map(move |i| (types[i & 1], types[i >> 1 & 1], types[i >> 2]))
}
