//! Norms, activations, losses, embeddings and dropout: right against f64, and the same bits on every path.

use candle_core::{DType, Tensor};

use super::{
    F32_ROUNDING, TYPES, assert_close, bits, cross_entropy, frozen, generator, matrix, normal, numbers,
    paths, reference, rounding, vector, wide,
};
use crate::activation::{activate_gradient_on, activate_on, gated_gradient_on, gated_on};
use crate::dropout::dropout_on;
use crate::loss::{Best, LossSlope, Softmax, Targets, best, cross_entropy_gradient_on};
use crate::norm::{rms_norm_gradient_on, rms_norm_on, rms_norm_weight_gradient_on};
use crate::{Activation, Dropout, Isa, Rows, Segments, Vocabulary, add, embed, rounded};

const ACTIVATIONS: [Activation; 3] = [Activation::Relu, Activation::GeluNew, Activation::Silu];

/// Widths that fill no lane exactly, and some that do.
const WIDTHS: [usize; 6] = [1, 3, 31, 32, 33, 130];

/// Runs `f` on every path and holds the bits against the portable path's.
fn same_on_every_path(what: &str, f: impl Fn(Isa) -> Vec<Tensor>) {
    let expected: Vec<_> = f(Isa::Portable).iter().map(bits).collect();
    for isa in paths() {
        let found: Vec<_> = f(isa).iter().map(bits).collect();
        assert_eq!(found, expected, "{what}: {isa:?} and the portable path differ");
    }
}

#[test]
fn elementwise_operations_give_the_same_bits_on_every_path() {
    let mut g = generator(201);
    for (d, dtype) in WIDTHS.into_iter().flat_map(|d| TYPES.map(|t| (d, t))) {
        let rows = 19;
        let [x, dy, residual] =
            [0; 3].map(|_| matrix(&normal(&mut g, rows * d, DType::F32), rows, d, DType::F32));
        let weight = vector(&normal(&mut g, d, DType::F32));
        same_on_every_path("rms_norm", |isa| vec![rms_norm_on(isa, &x, &weight, 1e-6, dtype).unwrap()]);
        same_on_every_path("rms_norm_gradient", |isa| {
            let both = [None, Some(&residual)]
                .map(|r| rms_norm_gradient_on(isa, [&dy, &x, &weight], 1e-6, r, dtype).unwrap());
            for (exact, narrow) in &both {
                assert_eq!(numbers(narrow), numbers(&rounded(exact, dtype).unwrap()));
            }
            both.into_iter().flat_map(|(exact, narrow)| [exact, narrow]).collect()
        });
        same_on_every_path("rms_norm_weight_gradient", |isa| {
            vec![rms_norm_weight_gradient_on(isa, &dy, &x, 1e-6).unwrap()]
        });
        let targets: Vec<u32> = (0..rows).map(|_| g.below(d as u64) as u32).collect();
        let scale = normal(&mut g, rows, DType::F32);
        same_on_every_path("cross_entropy", |isa| {
            let (loss, dx) = cross_entropy(isa, &x, (&targets, &scale), 1e-4, dtype);
            vec![vector(&loss), dx]
        });
        let [gate, up, dy] = [0; 3].map(|_| matrix(&normal(&mut g, rows * d, dtype), rows, d, dtype));
        for act in ACTIVATIONS {
            same_on_every_path("activations", |isa| {
                let (dgate, dup) = gated_gradient_on(isa, act, &dy, &gate, &up).unwrap();
                let plain = activate_gradient_on(isa, act, &dy, &gate).unwrap();
                vec![
                    activate_on(isa, act, &gate).unwrap(),
                    plain,
                    gated_on(isa, act, &gate, &up).unwrap(),
                    dgate,
                    dup,
                ]
            });
        }
        let (segments, masks) = (Segments::new([4, 0, 15]), Dropout::new(0.3, vec![1, 2, 3]).unwrap());
        same_on_every_path("dropout", |isa| vec![dropout_on(isa, &gate, &segments, &masks).unwrap()]);
    }
}

#[test]
fn rms_norm_is_that_of_f64() {
    let mut g = generator(202);
    for (d, dtype) in WIDTHS.into_iter().flat_map(|d| TYPES.map(|t| (d, t))) {
        let (x, weight) = (normal(&mut g, 5 * d, DType::F32), normal(&mut g, d, DType::F32));
        let expected = reference::rms_norm(&wide(&x), &wide(&weight), 1e-6);
        let y =
            rms_norm_on(Isa::Portable, &matrix(&x, 5, d, DType::F32), &vector(&weight), 1e-6, dtype).unwrap();
        // The sum of d squares errs by d roundings at most, and a handful of operations follow.
        let share = (d as f64 + 8.0) * F32_ROUNDING + rounding(dtype);
        assert_close("rms_norm", &numbers(&y), &expected, |i| share * expected[i].abs());
    }
}

#[test]
fn activations_are_those_of_f64() {
    let x: Vec<f32> = (-1200..=1200).map(|i| i as f32 / 100.0).collect();
    for act in ACTIVATIONS {
        let expected: Vec<f64> = x.iter().map(|x| reference::activation(act, f64::from(*x))).collect();
        let y = activate_on(Isa::Portable, act, &matrix(&x, 1, x.len(), DType::F32)).unwrap();
        // 3e-7 is what exp errs by (see its test); far out on the left it stands for a number that is nearly 0.
        assert_close("activation", &numbers(&y), &expected, |i| {
            4e-6 * expected[i].abs() + 1e-7 * f64::from(x[i].abs())
        });
    }
    let odd = matrix(&[f32::NAN, f32::NEG_INFINITY, f32::INFINITY], 1, 3, DType::F32);
    let y = numbers(&activate_on(Isa::Portable, Activation::Relu, &odd).unwrap());
    assert!(y[0].is_nan() && y[1] == 0.0 && y[2] == f32::INFINITY, "{y:?}");
}

#[test]
fn the_best_token_is_the_first_of_the_largest_with_its_log_probability() {
    let logits = [2.0, 0.5, 2.0, -1.0, 0.0, 0.0, 0.0, 7.0];
    let found = best(&matrix(&logits, 2, 4, DType::F32)).unwrap();
    assert_eq!(found.iter().map(|best| best.token).collect::<Vec<_>>(), [0, 3]);
    for (Best { token, log_probability }, row) in found.into_iter().zip(logits.chunks(4)) {
        let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let expected = f64::from(row[token as usize]) - total.ln();
        assert!((f64::from(log_probability) - expected).abs() < 1e-6, "{log_probability} {expected}");
    }
    assert!(best(&matrix(&[], 2, 0, DType::F32)).is_err(), "no token is the best of none");
}

#[test]
fn cross_entropy_is_that_of_f64_and_survives_large_logits() {
    let mut g = generator(203);
    for v in [1, 2, 33, 300] {
        let logits: Vec<f32> = normal(&mut g, 4 * v, DType::F32).iter().map(|x| 10.0 * x).collect();
        let targets: Vec<u32> = (0..4).map(|_| g.below(v as u64) as u32).collect();
        let expected = reference::cross_entropy(&wide(&logits), &targets, 0.01);
        let x = matrix(&logits, 4, v, DType::F32);
        let (found, _) = cross_entropy(Isa::Portable, &x, (&targets, &[1.0; 4]), 0.01, DType::F32);
        assert_close("cross_entropy", &found, &expected, |i| 1e-6 * (40.0 + expected[i].abs()));
    }
    let large = matrix(&[3e4, -3e4, 0.0], 1, 3, DType::F32);
    assert_eq!(cross_entropy(Isa::Portable, &large, (&[1], &[1.0]), 0.0, DType::F32).0, [6e4]);
    let (losses, dx) =
        cross_entropy(Isa::Portable, &matrix(&[], 0, 0, DType::F32), (&[], &[]), 0.0, DType::F32);
    assert!(losses.is_empty());
    assert_eq!(dx.dims(), [0, 0]);
}

#[test]
fn parts_of_a_vocabulary_make_the_same_loss_and_the_same_gradient() {
    let (rows, v) = (6, 48);
    let mut g = generator(206);
    let logits: Vec<f32> = normal(&mut g, rows * v, DType::F32).iter().map(|x| 8.0 * x).collect();
    let targets: Vec<u32> = (0..rows).map(|_| g.below(v as u64) as u32).collect();
    let scale = normal(&mut g, rows, DType::F32);
    for isa in paths() {
        let whole = matrix(&logits, rows, v, DType::F32);
        let (losses, dx) = cross_entropy(isa, &whole, (&targets, &scale), 0.02, DType::F32);
        for parts in [1, 2, 4, 3] {
            let n = v / parts;
            let logits: Vec<Tensor> =
                (0..parts).map(|i| whole.narrow(1, i * n, n).unwrap().contiguous().unwrap()).collect();
            let target = |i| Targets { ids: &targets, vocabulary: Vocabulary { first: i * n, size: v } };
            let own: Vec<Softmax> =
                logits.iter().enumerate().map(|(i, x)| Softmax::new_on(isa, x, target(i)).unwrap()).collect();
            let top = own.iter().skip(1).fold(own[0].top.clone(), |top, s| top.maximum(&s.top).unwrap());
            let none = top.zeros_like().unwrap();
            let mut all = Softmax { top: top.clone(), total: none.clone(), target: none };
            for part in own {
                let part = part.relative_to(top.clone()).unwrap();
                all.total = (all.total + part.total).unwrap();
                all.target = (all.target + part.target).unwrap();
            }
            let expected = wide(&losses);
            assert_close("losses of parts", &numbers(&all.losses(0.02).unwrap()), &expected, |i| {
                1e-6 * (40.0 + expected[i].abs())
            });
            let normalisers = all.normalisers().unwrap();
            let slope = LossSlope { normalisers: &normalisers, scale: &scale, z_loss: 0.02 };
            let parts: Vec<Tensor> = logits
                .iter()
                .enumerate()
                .map(|(i, x)| cross_entropy_gradient_on(isa, x, target(i), slope, DType::F32).unwrap())
                .collect();
            let found = numbers(&Tensor::cat(&parts, 1).unwrap());
            assert_close("gradient of parts", &found, &wide(&numbers(&dx)), |_| 1e-5);
        }
    }
}

#[test]
fn parts_of_an_embedding_add_up_to_the_whole() {
    let mut g = generator(207);
    let (v, d) = (12, 5);
    let table = normal(&mut g, v * d, DType::F32);
    let ids = [0, 11, 3, 6, 5, 3];
    let whole = embed(&frozen(&table, v, d, DType::F32), Vocabulary::whole(v), &[], &[Rows::Tokens(&ids)]);
    for parts in [2, 3, 4] {
        let n = v / parts;
        let mut sum = vec![0.0; ids.len() * d];
        for i in 0..parts {
            let table = frozen(&table[i * n * d..(i + 1) * n * d], n, d, DType::F32);
            let vocabulary = Vocabulary { first: i * n, size: v };
            let part = embed(&table, vocabulary, &[], &[Rows::Tokens(&ids), Rows::Zeros(0)]).unwrap();
            sum.iter_mut().zip(numbers(&part)).for_each(|(sum, x)| *sum += x);
        }
        assert_eq!(sum, numbers(whole.as_ref().unwrap()));
    }
}

#[test]
fn parts_of_a_layer_drop_what_the_whole_drops_there() {
    let (rows, d) = (5, 44);
    let whole = matrix(&vec![1.0; rows * d], rows, d, DType::F32);
    let segments = Segments::new([2, 3]);
    let masks = Dropout::new(0.4, vec![9, 4]).unwrap().at(3);
    for isa in paths() {
        let all = dropout_on(isa, &whole, &segments, &masks).unwrap();
        for (first, n) in [(0, 22), (22, 22), (11, 11), (33, 11), (8, 16)] {
            let part = whole.narrow(1, first, n).unwrap().contiguous().unwrap();
            let found = dropout_on(isa, &part, &segments, &masks.clone().of_columns(first, d)).unwrap();
            assert_eq!(numbers(&found), numbers(&all.narrow(1, first, n).unwrap().contiguous().unwrap()));
        }
    }
}

#[test]
fn embedded_rows_are_copies() {
    let mut g = generator(204);
    let (v, d) = (11, 7);
    for dtype in TYPES {
        let table = normal(&mut g, v * d, dtype);
        let prompts = [2, 0, 3].map(|rows| normal(&mut g, rows * d, DType::F32));
        let tensors = prompts.each_ref().map(|p| matrix(p, p.len() / d, d, DType::F32));
        let runs =
            [Rows::Prompt(2), Rows::Tokens(&[3, 10, 3]), Rows::Tokens(&[]), Rows::Prompt(1), Rows::Prompt(0)];
        let x = embed(&frozen(&table, v, d, dtype), Vocabulary::whole(v), &tensors, &runs).unwrap();
        let rows = [3, 10, 3].map(|id| table[id * d..(id + 1) * d].to_vec()).concat();
        assert_eq!(numbers(&x), [&prompts[2][..], &rows, &prompts[0]].concat());
    }
    let (empty, none) = (frozen(&[], 5, 0, DType::F32), matrix(&[], 2, 0, DType::F32));
    let empty = embed(&empty, Vocabulary::whole(5), &[none], &[Rows::Prompt(0)]).unwrap();
    assert_eq!(empty.dims(), [2, 0]);
}

#[test]
fn rounding_and_adding_are_exact() {
    let mut g = generator(205);
    let (a, b) = (normal(&mut g, 100, DType::F32), normal(&mut g, 100, DType::F32));
    let (x, y) = (matrix(&a, 4, 25, DType::F32), matrix(&b, 4, 25, DType::F32));
    let sums: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    assert_eq!(numbers(&add(&x, &y).unwrap()), sums);
    let narrow: Vec<f32> = a.iter().map(|x| super::held(*x, DType::BF16)).collect();
    assert_eq!(numbers(&rounded(&x, DType::BF16).unwrap()), narrow);
    assert_eq!(numbers(&rounded(&x, DType::F32).unwrap()), a);
}

#[test]
fn dropout_drops_at_its_rate_and_keeps_the_expectation() {
    let (rows, d) = (200, 501);
    let x = matrix(&vec![1.0; rows * d], rows, d, DType::F32);
    let segments = Segments::new([rows]);
    for rate in [0.0, 0.1, 0.5, 0.9] {
        let y = numbers(
            &dropout_on(Isa::Portable, &x, &segments, &Dropout::new(rate, vec![9]).unwrap()).unwrap(),
        );
        let n = y.len() as f64;
        let dropped = y.iter().filter(|y| **y == 0.0).count() as f64 / n;
        let mean = y.iter().map(|y| f64::from(*y)).sum::<f64>() / n;
        // Five standard deviations of a share of n draws, and of the mean of what is kept.
        let r = f64::from(rate);
        let wide = 5.0 * (r * (1.0 - r) / n).sqrt() + 1e-5;
        assert!((dropped - r).abs() <= wide, "rate {rate}: {dropped} were dropped");
        assert!((mean - 1.0).abs() <= wide / (1.0 - r), "rate {rate}: the mean is {mean}");
    }
}

#[test]
fn dropout_follows_from_its_key_and_site_alone() {
    let (rows, d) = (6, 40);
    let x = matrix(&vec![1.0; rows * d], rows, d, DType::F32);
    let run = |keys: Vec<u64>, site: u64, lengths: &[usize]| {
        let masks = Dropout::new(0.5, keys).unwrap().at(site);
        let y = dropout_on(Isa::Portable, &x, &Segments::new(lengths.iter().copied()), &masks).unwrap();
        numbers(&y)
    };
    let first = run(vec![1, 2], 0, &[2, 4]);
    assert_eq!(first, run(vec![1, 2], 0, &[2, 4]));
    assert_eq!(
        first[2 * d..],
        run(vec![2, 1], 0, &[4, 2])[..4 * d],
        "the example moved, and its mask with it"
    );
    assert_ne!(first[2 * d..], run(vec![1, 3], 0, &[2, 4])[2 * d..], "another key");
    assert_ne!(first, run(vec![1, 2], 1, &[2, 4]), "another site");
    let rows: Vec<_> = first[2 * d..].chunks(d).collect();
    assert!((1..4).all(|r| rows[r] != rows[0]), "rows have masks of their own");
}
