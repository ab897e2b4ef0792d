//! Gradients against central differences of the operations written out in f64.

use candle_core::DType;

use super::reference::{self, dot, slopes};
use super::{
    assert_close, cross_entropy, frozen, generator, largest, matrix, normal, numbers, paths, vector, wide,
};
use crate::activation::{activate_gradient_on, gated_gradient_on};
use crate::linear::{linear_add_on, linear_gradient_on, linear_weight_gradient_on};
use crate::norm::{rms_norm_gradient_on, rms_norm_weight_gradient_on};
use crate::{Activation, Vocabulary, embed_gradient};

/// What an f32 gradient may differ by from the differences, as a share of its largest number: a hundred roundings.
const TOLERANCE: f64 = 6e-6;

fn assert_gradient(what: &str, found: &[f32], expected: &[f64]) {
    let bound = TOLERANCE * largest(expected);
    assert_close(what, found, expected, |_| bound);
}

#[test]
fn linear_gradient_is_the_slope_of_linear() {
    let mut g = generator(301);
    let (rows, n, k) = (3, 21, 35);
    let (x, dy, w) = (
        normal(&mut g, rows * k, DType::F32),
        normal(&mut g, rows * n, DType::F32),
        normal(&mut g, n * k, DType::F32),
    );
    let (wide_dy, wide_w) = (wide(&dy), wide(&w));
    let expected = slopes(&wide(&x), |x| {
        dot(&reference::product(x, (rows, k, n), |i, col| wide_w[col * k + i]).0, &wide_dy)
    });
    for isa in paths() {
        let w = frozen(&w, n, k, DType::F32);
        let dx = linear_gradient_on(isa, &[(&matrix(&dy, rows, n, DType::F32), &w)], DType::F32).unwrap();
        assert_gradient(&format!("{isa:?}"), &numbers(&dx), &expected);
    }
}

#[test]
fn a_residual_layer_has_the_sum_of_both_slopes() {
    let mut g = generator(302);
    // y = x + x w^T, so that dx = dy + dy w.
    let (rows, d) = (4, 18);
    let (x, dy, w) = (
        normal(&mut g, rows * d, DType::F32),
        normal(&mut g, rows * d, DType::F32),
        normal(&mut g, d * d, DType::F32),
    );
    let (wide_dy, wide_w) = (wide(&dy), wide(&w));
    let forward = |x: &[f64]| -> Vec<f64> {
        let product = reference::product(x, (rows, d, d), |i, col| wide_w[col * d + i]).0;
        x.iter().zip(product).map(|(x, p)| x + p).collect()
    };
    let (y, expected) = (forward(&wide(&x)), slopes(&wide(&x), |x| dot(&forward(x), &wide_dy)));
    for isa in paths() {
        let (w, x) = (frozen(&w, d, d, DType::F32), matrix(&x, rows, d, DType::F32));
        assert_gradient("forward", &numbers(&linear_add_on(isa, &x, &x, &w).unwrap()), &y);
        let dx = linear_gradient_on(isa, &[(&matrix(&dy, rows, d, DType::F32), &w)], DType::F32).unwrap();
        let sum: Vec<f32> = numbers(&dx).iter().zip(&dy).map(|(a, b)| a + b).collect();
        assert_gradient(&format!("{isa:?}"), &sum, &expected);
    }
}

#[test]
fn rms_norm_gradient_is_the_slope_of_rms_norm() {
    let mut g = generator(303);
    for (d, epsilon) in [(1, 0.1), (5, 1e-6), (37, 1e-2), (64, 1e-6)] {
        let rows = 3;
        let [x, dy, residual] = [0; 3].map(|_| normal(&mut g, rows * d, DType::F32));
        let weight = normal(&mut g, d, DType::F32);
        let (wide_dy, wide_weight) = (wide(&dy), wide(&weight));
        let mut expected = slopes(&wide(&x), |x| {
            dot(&reference::rms_norm(x, &wide_weight, f64::from(epsilon as f32)), &wide_dy)
        });
        let [x, dy, r] = [&x, &dy, &residual].map(|v| matrix(v, rows, d, DType::F32));
        let weight = vector(&weight);
        for isa in paths() {
            let dx =
                rms_norm_gradient_on(isa, [&dy, &x, &weight], epsilon as f32, None, DType::F32).unwrap().0;
            assert_gradient(&format!("{isa:?} {d}"), &numbers(&dx), &expected);
        }
        expected.iter_mut().zip(&residual).for_each(|(e, r)| *e += f64::from(*r));
        for isa in paths() {
            let dx = rms_norm_gradient_on(isa, [&dy, &x, &weight], epsilon as f32, Some(&r), DType::F32)
                .unwrap()
                .0;
            assert_gradient(&format!("{isa:?} {d} with a residual"), &numbers(&dx), &expected);
        }
    }
}

#[test]
fn weight_gradients_are_the_slopes_in_the_weights() {
    let mut g = generator(306);
    for (rows, n, k, epsilon) in [(1, 3, 1, 0.1), (6, 7, 37, 1e-6), (40, 4, 70, 1e-2)] {
        let (x, dy) = (normal(&mut g, rows * k, DType::F32), normal(&mut g, rows * n, DType::F32));
        let (w, of_norm) = (normal(&mut g, n * k, DType::F32), normal(&mut g, rows * k, DType::F32));
        let weight = normal(&mut g, k, DType::F32);
        let (wide_x, wide_dy, wide_of_norm) = (wide(&x), wide(&dy), wide(&of_norm));
        let of_linear = slopes(&wide(&w), |w| {
            dot(&reference::product(&wide_x, (rows, k, n), |i, col| w[col * k + i]).0, &wide_dy)
        });
        let of_weight = slopes(&wide(&weight), |weight| {
            dot(&reference::rms_norm(&wide_x, weight, f64::from(epsilon as f32)), &wide_of_norm)
        });
        let [x, of_norm] = [&x, &of_norm].map(|v| matrix(v, rows, k, DType::F32));
        let dy = matrix(&dy, rows, n, DType::F32);
        for isa in paths() {
            let dw = linear_weight_gradient_on(isa, &dy, &x).unwrap();
            assert_gradient(&format!("{isa:?} linear {rows} x {k}"), &numbers(&dw), &of_linear);
            let dw = rms_norm_weight_gradient_on(isa, &of_norm, &x, epsilon as f32).unwrap();
            assert_gradient(&format!("{isa:?} rms_norm {rows} x {k}"), &numbers(&dw), &of_weight);
        }
    }
}

#[test]
fn embed_gradient_is_the_slope_of_embed() {
    let mut g = generator(307);
    let (rows, d, vocabulary) = (5, 3, Vocabulary { first: 2, size: 9 });
    // Tokens of the table, of other parts of the vocabulary, one often, one never; and rows of no token.
    let ids = [Some(4), None, Some(2), Some(4), Some(8), Some(0), None, Some(6), Some(4), Some(3)];
    let dx = normal(&mut g, ids.len() * d, DType::F32);
    let expected = slopes(&wide(&normal(&mut g, rows * d, DType::F32)), |table| {
        let row = |id: &Option<u32>| id.and_then(|id| vocabulary.place(id, rows));
        let x: Vec<f64> =
            (0..ids.len() * d).map(|i| row(&ids[i / d]).map_or(0.0, |row| table[row * d + i % d])).collect();
        dot(&x, &wide(&dx))
    });
    let dx = matrix(&dx, ids.len(), d, DType::F32);
    let found = embed_gradient(&dx, &ids, vocabulary, rows).unwrap();
    assert_eq!(found.dims(), [rows, d]);
    assert_gradient("embed", &numbers(&found), &expected);
    let none = embed_gradient(&matrix(&[], 0, d, DType::F32), &[], vocabulary, rows).unwrap();
    assert_eq!(numbers(&none), vec![0.0; rows * d]);
}

#[test]
fn activation_gradients_are_the_slopes_of_the_activations() {
    let mut g = generator(304);
    let n = 203;
    for act in [Activation::Relu, Activation::GeluNew, Activation::Silu] {
        // Away from 0, where relu has no slope.
        let away = |x: f32| if x.abs() < 0.01 { 0.5 } else { 3.0 * x };
        let gate: Vec<f32> = normal(&mut g, n, DType::F32).into_iter().map(away).collect();
        let [up, dy] = [0; 2].map(|_| normal(&mut g, n, DType::F32));
        let (wide_up, wide_dy) = (wide(&up), wide(&dy));
        let plain = |gate: &[f64]| -> f64 {
            gate.iter().zip(&wide_dy).map(|(x, dy)| reference::activation(act, *x) * dy).sum()
        };
        let gated = |gate: &[f64], up: &[f64]| -> f64 {
            let y: Vec<f64> =
                gate.iter().zip(up).map(|(x, up)| reference::activation(act, *x) * up).collect();
            dot(&y, &wide_dy)
        };
        let expected = [
            slopes(&wide(&gate), plain),
            slopes(&wide(&gate), |gate| gated(gate, &wide_up)),
            slopes(&wide_up, |up| gated(&wide(&gate), up)),
        ];
        let [gate, up, dy] = [&gate, &up, &dy].map(|v| matrix(v, 7, n / 7, DType::F32));
        for isa in paths() {
            let dx = activate_gradient_on(isa, act, &dy, &gate).unwrap();
            let (dgate, dup) = gated_gradient_on(isa, act, &dy, &gate, &up).unwrap();
            for (found, expected) in [dx, dgate, dup].iter().zip(&expected) {
                assert_gradient(&format!("{isa:?} {act:?}"), &numbers(found), expected);
            }
        }
    }
}

#[test]
fn cross_entropy_gradient_is_the_slope_of_the_scaled_losses() {
    let mut g = generator(305);
    let rows = 3;
    for (v, z_loss) in [(1, 0.5), (2, 0.0), (40, 0.0), (40, 0.03), (67, 1e-4)] {
        let logits: Vec<f32> = normal(&mut g, rows * v, DType::F32).iter().map(|x| 3.0 * x).collect();
        let targets: Vec<u32> = (0..rows).map(|_| g.below(v as u64) as u32).collect();
        let scale = normal(&mut g, rows, DType::F32);
        let expected = slopes(&wide(&logits), |x| {
            dot(&reference::cross_entropy(x, &targets, f64::from(z_loss as f32)), &wide(&scale))
        });
        for isa in paths() {
            let x = matrix(&logits, rows, v, DType::F32);
            let (_, dx) = cross_entropy(isa, &x, (&targets, &scale), z_loss as f32, DType::F32);
            // The probabilities' own rounding stays where the slope is 0.
            let bound = TOLERANCE * largest(&expected).max(largest(&wide(&scale)));
            assert_close(&format!("{isa:?} {v}"), &numbers(&dx), &expected, |_| bound);
        }
    }
}
