//! Every operation on a GPU against the same operation on the CPU, on the same numbers.
//!
//! Each test runs on the emulator, with a kernel's threads in several orders, where the feature `emulator` is on, and on the first
//! CUDA device where there is one. On the emulator results must not depend on the order, to the bit.

mod absorbed;
mod attention;
mod columns;
#[cfg(feature = "emulator")]
mod orders;

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};

use crate::rng::Philox;
use crate::sums::{FRACTION_BITS, Sums, dequantized, max_exponents};
use crate::tests::{self, TYPES, generator, normal, numbers};
use crate::{
    Activation, Dropout, Frozen, LossSlope, Rows, Segments, Softmax, Targets, Vocabulary, activate,
    activate_gradient, add, best, cross_entropy_gradient, dropout, embed, embed_gradient, gated,
    gated_gradient, linear, linear_add, linear_gradient, linear_gradient_add, linear_weight_gradient,
    rms_norm, rms_norm_gradient, rms_norm_weight_gradient, rounded,
};

thread_local! {
    static IS_OLDER: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's GPU is to be taken for one without Hopper's instructions.
pub(super) fn is_older() -> bool {
    IS_OLDER.get()
}

/// Runs `f` with the GPU as it is, and taken for one without Hopper's instructions.
fn by_groups_and_by_warps(mut f: impl FnMut()) {
    for is_older in [false, true] {
        IS_OLDER.set(is_older);
        f();
    }
    IS_OLDER.set(false);
}

/// Where GPU code runs.
enum Place {
    #[cfg(feature = "emulator")]
    Emulated(u64),
    #[cfg(feature = "cuda")]
    Cuda(Device),
}

/// All places there are; says which.
fn places() -> Vec<Place> {
    #[allow(unused_mut)]
    let mut places = Vec::new();
    #[cfg(feature = "emulator")]
    places.extend([0, 1, 2, 3, 5].map(Place::Emulated));
    #[cfg(feature = "cuda")]
    match crate::open_gpu(0) {
        Ok(device) => places.push(Place::Cuda(device)),
        Err(error) => println!("skipped on CUDA: {error}"),
    }
    if places.is_empty() {
        println!("skipped: neither the emulator nor a GPU is here");
    }
    places
}

impl Place {
    fn run<R>(&self, f: impl FnOnce(&Device) -> R) -> R {
        match self {
            #[cfg(feature = "emulator")]
            Self::Emulated(order) => super::emulated::on(*order, || f(&Device::Cpu)),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => f(device),
        }
    }

    fn is_emulated(&self) -> bool {
        match self {
            #[cfg(feature = "emulator")]
            Self::Emulated(_) => true,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => false,
        }
    }
}

/// Runs `f` on the CPU and everywhere else: all numbers must be near, within `bound` of the largest one of each result.
fn compare(what: &str, bound: f64, f: impl Fn(&Device) -> Vec<Tensor>) {
    compare_at_least(0.0, what, bound, f);
}

/// As [`compare`], of results that are made of numbers of a `size` and may be smaller themselves.
fn compare_at_least(size: f32, what: &str, bound: f64, f: impl Fn(&Device) -> Vec<Tensor>) {
    let expected: Vec<Vec<f32>> = f(&Device::Cpu).iter().map(numbers).collect();
    let mut first: Option<Vec<Vec<u32>>> = None;
    for place in places() {
        let found: Vec<Vec<f32>> = place.run(|device| f(device).iter().map(numbers).collect());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            close(&format!("{what}, result {i}"), found, expected, (bound, size));
        }
        if place.is_emulated() {
            let bits: Vec<Vec<u32>> = found.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect();
            assert!(first.get_or_insert(bits.clone()) == &bits, "{what} depends on the order of threads");
        }
    }
}

fn close(what: &str, found: &[f32], expected: &[f32], (bound, size): (f64, f32)) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().filter(|x| x.is_finite()).fold(size.max(1e-30), |a, x| a.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        let error = f64::from((found - expected).abs());
        assert!(
            same || error <= bound * f64::from(largest),
            "{what}: number {i} is {found}, not {expected} ({bound:e} of {largest})"
        );
    }
}

fn bound(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 1.0 / 64.0 } else { 3e-6 }
}

fn matrix(g: &mut Philox, rows: usize, cols: usize, dtype: DType) -> Tensor {
    tests::matrix(&normal(g, rows * cols, dtype), rows, cols, dtype)
}

fn frozen(g: &mut Philox, rows: usize, cols: usize, dtype: DType) -> Frozen {
    tests::frozen(&normal(g, rows * cols, dtype), rows, cols, dtype)
}

/// Copies of tensors on a device.
fn on<const N: usize>(device: &Device, tensors: [&Tensor; N]) -> [Tensor; N] {
    tensors.map(|tensor| tensor.to_device(device).unwrap())
}

#[test]
fn products_equal_the_cpus_with_parts_of_weights_too() {
    let mut g = generator(1);
    for dtype in TYPES {
        for (rows, inner, out) in [(1, 8, 3), (5, 24, 16), (70, 40, 33)] {
            let (x, dy) = (matrix(&mut g, rows, inner, dtype), matrix(&mut g, rows, out, dtype));
            let whole = frozen(&mut g, out + 3, inner + 5, dtype);
            let (w, other) = (whole.part((2, out), (4, inner)), frozen(&mut g, out, inner, dtype));
            let (residual, sum) =
                (matrix(&mut g, rows, out, DType::F32), matrix(&mut g, rows, inner, DType::F32));
            compare("a product", bound(dtype), |device| {
                let [x, dy, residual, sum] = on(device, [&x, &dy, &residual, &sum]);
                let [w, other] = [&w, &other].map(|w| w.to_device(device, dtype).unwrap());
                vec![
                    linear(&x, &w, DType::F32).unwrap(),
                    linear_add(&residual, &x, &w).unwrap(),
                    linear_gradient(&[(&dy, &w)], DType::F32).unwrap(),
                    linear_gradient(&[(&dy, &w), (&dy, &other)], DType::F32).unwrap(),
                    linear_gradient_add(&sum, &[(&dy, &w), (&dy, &other)]).unwrap(),
                    linear_weight_gradient(&dy, &x).unwrap(),
                    linear_weight_gradient(&dy.narrow(0, 0, 0).unwrap(), &x.narrow(0, 0, 0).unwrap())
                        .unwrap(),
                ]
            });
            compare("a rounded product", bound(DType::BF16), |device| {
                let [x, dy] = on(device, [&x, &dy]);
                let [w, other] = [&w, &other].map(|w| w.to_device(device, dtype).unwrap());
                vec![
                    linear(&x, &w, DType::BF16).unwrap(),
                    linear_gradient(&[(&dy, &w), (&dy, &other)], DType::BF16).unwrap(),
                ]
            });
        }
    }
}

#[test]
fn what_is_added_to_a_product_has_to_be_f32() {
    let mut g = generator(12);
    let (x, w) = (matrix(&mut g, 4, 16, DType::BF16), frozen(&mut g, 8, 16, DType::BF16));
    let residual = matrix(&mut g, 4, 8, DType::BF16);
    assert!(linear_add(&residual, &x, &w).is_err());
    for place in places() {
        place.run(|device| {
            let [x, residual] = on(device, [&x, &residual]);
            let error = linear_add(&residual, &x, &w.to_device(device, DType::BF16).unwrap()).unwrap_err();
            assert!(error.to_string().contains("has to be f32"), "{error}");
        });
    }
}

/// This is what the choice of algorithms aims at. (The emulator makes each row by itself.)
#[cfg(feature = "cuda")]
#[test]
fn a_row_of_a_product_does_not_depend_on_the_rows_beside_it() {
    /// More than a product's algorithm is chosen for.
    const ROWS: usize = 17_000;
    let mut g = generator(11);
    for dtype in TYPES {
        let (x, w) = (matrix(&mut g, ROWS, 1024, dtype), frozen(&mut g, 256, 1024, dtype));
        for place in places().into_iter().filter(|place| !place.is_emulated()) {
            place.run(|device| {
                let (x, w) = (x.to_device(device).unwrap(), w.to_device(device, dtype).unwrap());
                let all = numbers(&linear(&x, &w, dtype).unwrap());
                for (first, count) in [(0, 1), (7, 40), (256, 300), (1000, 4000)] {
                    let some = numbers(&linear(&x.narrow(0, first, count).unwrap(), &w, dtype).unwrap());
                    let same = some.iter().zip(&all[256 * first..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(
                        same,
                        "{count} rows of {dtype:?} from row {first}: other bits alone than among {ROWS}"
                    );
                }
            });
        }
    }
}

#[test]
fn parts_of_a_weight_on_the_device_are_weights_too() {
    let mut g = generator(2);
    let (x, w) = (matrix(&mut g, 4, 16, DType::F32), frozen(&mut g, 24, 32, DType::F32));
    compare("a product", bound(DType::F32), |device| {
        let part = w.to_device(device, DType::F32).unwrap().part((8, 16), (16, 16));
        vec![linear(&x.to_device(device).unwrap(), &part, DType::F32).unwrap()]
    });
}

/// What the rounding of `exact` is away from `narrow`: nothing.
fn differences(narrow: &Tensor, exact: &Tensor) -> Tensor {
    assert_eq!(narrow.dtype(), DType::BF16);
    let pairs = numbers(&rounded(exact, DType::BF16).unwrap()).into_iter().zip(numbers(narrow));
    let differences: Vec<f32> = pairs.map(|(a, b)| a - b).collect();
    Tensor::from_vec(differences, narrow.dims(), &Device::Cpu).unwrap()
}

#[test]
fn norms_equal_the_cpus() {
    let mut g = generator(3);
    for (rows, width) in [(1, 4), (3, 7), (9, 300), (2, 1024), (40, 33)] {
        let [x, dy, residual] = [(); 3].map(|()| matrix(&mut g, rows, width, DType::F32));
        let weight = matrix(&mut g, 1, width, DType::F32).flatten_all().unwrap();
        compare("rms_norm", bound(DType::BF16), |device| {
            let [x, weight] = on(device, [&x, &weight]);
            vec![rms_norm(&x, &weight, 1e-6, DType::BF16).unwrap()]
        });
        compare("the rounding of a norm's gradient", 0.0, |device| {
            let [x, dy, weight, residual] = on(device, [&x, &dy, &weight, &residual]);
            let both = [None, Some(&residual)]
                .map(|r| rms_norm_gradient(&dy, &x, &weight, 1e-6, r, DType::BF16).unwrap());
            both.iter().map(|(exact, narrow)| differences(narrow, exact)).collect()
        });
        compare("rms_norm", bound(DType::F32), |device| {
            let [x, dy, weight, residual] = on(device, [&x, &dy, &weight, &residual]);
            vec![
                rms_norm(&x, &weight, 1e-6, DType::F32).unwrap(),
                rms_norm_gradient(&dy, &x, &weight, 1e-6, None, DType::F32).unwrap().0,
                rms_norm_gradient(&dy, &x, &weight, 1e-6, Some(&residual), DType::F32).unwrap().0,
                rms_norm_weight_gradient(&dy, &x, 1e-6).unwrap(),
            ]
        });
    }
}

#[test]
fn activations_and_sums_equal_the_cpus() {
    let mut g = generator(4);
    for dtype in TYPES {
        for (rows, width) in [(1, 1), (3, 7), (11, 640)] {
            let [x, up, dy] = [(); 3].map(|()| matrix(&mut g, rows, width, dtype));
            let [a, b] = [(); 2].map(|()| matrix(&mut g, rows, width, DType::F32));
            for act in [Activation::Relu, Activation::GeluNew, Activation::Silu] {
                // A slope is a difference of numbers near 1, and where it is small it has their errors: a GPU contracts
                // multiplications and sums, a CPU does not. The single number has no larger one beside it, and is where
                // GELU's slope crosses 0: x is -0.754, and the slope -5.6e-4 of terms near 0.2.
                compare_at_least(1.0, &format!("{act:?}"), bound(dtype), |device| {
                    let [x, up, dy] = on(device, [&x, &up, &dy]);
                    let (d_gate, d_up) = gated_gradient(act, &dy, &x, &up).unwrap();
                    vec![
                        activate(act, &x).unwrap(),
                        activate_gradient(act, &dy, &x).unwrap(),
                        gated(act, &x, &up).unwrap(),
                        d_gate,
                        d_up,
                    ]
                });
            }
            compare("sums and rounding", 0.0, |device| {
                let [a, b] = on(device, [&a, &b]);
                vec![
                    add(&a, &b).unwrap(),
                    rounded(&a, DType::BF16).unwrap(),
                    rounded(&a, DType::F32).unwrap(),
                ]
            });
        }
    }
}

#[test]
fn a_view_that_begins_anywhere_is_read_from_there() {
    let mut g = generator(5);
    let (x, up) = (matrix(&mut g, 9, 5, DType::BF16), matrix(&mut g, 9, 5, DType::BF16));
    compare("gated", bound(DType::BF16), |device| {
        let [x, up] = on(device, [&x, &up]).map(|t| t.narrow(0, 3, 4).unwrap());
        vec![gated(Activation::Silu, &x, &up).unwrap()]
    });
}

#[test]
fn embeddings_equal_the_cpus_to_the_bit() {
    let mut g = generator(6);
    for dtype in TYPES {
        let table = frozen(&mut g, 10, 12, dtype);
        let prompts = [matrix(&mut g, 3, 12, DType::F32), matrix(&mut g, 1, 12, DType::F32)];
        let vocabulary = Vocabulary { first: 5, size: 20 };
        let runs = [
            Rows::Prompt(1),
            Rows::Tokens(&[5, 14, 19, 0]),
            Rows::Zeros(2),
            Rows::Prompt(0),
            Rows::Tokens(&[7]),
            Rows::Prompt(1),
        ];
        compare("embed", 0.0, |device| {
            let table = table.to_device(device, dtype).unwrap();
            vec![
                embed(&table, vocabulary, &prompts, &runs).unwrap(),
                embed(&table, vocabulary, &[], &runs[1..3]).unwrap(),
                embed(&table, vocabulary, &prompts, &runs[4..]).unwrap(),
            ]
        });
    }
}

#[test]
fn gradients_of_embeddings_equal_the_cpus_to_the_bit() {
    let mut g = generator(10);
    for width in [5, 300] {
        let ids: Vec<Option<u32>> = (0..70).map(|_| Some(g.below(25) as u32).filter(|id| *id != 3)).collect();
        let dx = matrix(&mut g, ids.len(), width, DType::F32);
        compare("embed_gradient", 0.0, |device| {
            let dx = dx.to_device(device).unwrap();
            let none = dx.narrow(0, 0, 0).unwrap();
            [(0, 25), (4, 12)]
                .into_iter()
                .flat_map(|(first, rows)| {
                    let vocabulary = Vocabulary { first, size: 25 };
                    [(&dx, &ids[..]), (&none, &[])]
                        .map(|(dx, ids)| embed_gradient(dx, ids, vocabulary, rows).unwrap())
                })
                .collect()
        });
    }
}

#[test]
fn dropout_drops_the_same_numbers_as_on_the_cpu() {
    let mut g = generator(7);
    for dtype in TYPES {
        let segments = Segments::new([3, 0, 1, 40]);
        let x = matrix(&mut g, 44, 21, dtype);
        for part in [None, Some((0, 30)), Some((5, 64))] {
            let masks = Dropout::new(0.3, vec![1, 2, 3, 1 << 40]).unwrap().at(9);
            let masks = part.map_or(masks.clone(), |(first, total)| masks.of_columns(first, total));
            compare("dropout", 0.0, |device| {
                // What a device knows of segments stays with them, and no other device could read it.
                vec![dropout(&x.to_device(device).unwrap(), &segments.fresh(), &masks).unwrap()]
            });
        }
    }
}

#[test]
fn losses_and_their_gradients_equal_the_cpus() {
    let mut g = generator(8);
    for columns in [1, 40, 1300] {
        let logits = matrix(&mut g, 5, columns, DType::F32);
        let ids: Vec<u32> = (0..5).map(|i| (i * 7 % (columns + 2)) as u32).collect();
        let targets = Targets { ids: &ids, vocabulary: Vocabulary { first: 1, size: columns + 2 } };
        let scale = [1.0, 0.5, 0.0, -1.0, 2.0];
        for out in TYPES {
            compare("cross-entropy", bound(out), |device| {
                let logits = logits.to_device(device).unwrap();
                let softmax = Softmax::new(&logits, targets).unwrap();
                let normalisers = softmax.normalisers().unwrap();
                let slope = LossSlope { normalisers: &normalisers, scale: &scale, z_loss: 0.01 };
                vec![
                    softmax.losses(0.01).unwrap(),
                    cross_entropy_gradient(&logits, targets, slope, out).unwrap(),
                    normalisers,
                ]
            });
        }
    }
}

#[test]
fn the_best_token_is_the_cpus_and_the_first_of_equals() {
    let mut g = generator(13);
    for columns in [1, 40, 1300] {
        let mut values = numbers(&matrix(&mut g, 6, columns, DType::F32));
        let equals = [columns / 3, columns / 2, columns - 1];
        equals.iter().for_each(|place| values[place + columns] = 50.0);
        values[5 * columns..].fill(f32::NEG_INFINITY);
        let run =
            |device: &Device| best(&Tensor::from_slice(&values, (6, columns), device).unwrap()).unwrap();
        let expected = run(&Device::Cpu);
        assert_eq!(expected[1].token as usize, columns / 3);
        for place in places() {
            for (found, expected) in place.run(run)[..5].iter().zip(&expected) {
                assert_eq!(found.token, expected.token);
                assert!(
                    (found.log_probability - expected.log_probability).abs() < 1e-5,
                    "{found:?} {expected:?}"
                );
            }
        }
    }
}

#[test]
fn exact_sums_have_the_bits_of_the_cpu() {
    let mut g = generator(9);
    let mut terms: Vec<Tensor> = (0..5).map(|_| matrix(&mut g, 7, 33, DType::F32)).collect();
    terms.push((matrix(&mut g, 7, 33, DType::F32) * 1e-30).unwrap());
    terms.push(Tensor::zeros((7, 33), DType::F32, &Device::Cpu).unwrap());
    let bad = Tensor::new(&[[1f32, f32::NAN], [f32::INFINITY, 0.0]], &Device::Cpu).unwrap();
    let run = |device: &Device| {
        let terms: Vec<Tensor> = terms.iter().map(|t| t.to_device(device).unwrap()).collect();
        let mut all: Vec<&Tensor> = terms.iter().collect();
        let bad = bad.to_device(device).unwrap();
        all.push(&bad);
        let exponents = max_exponents(&all).unwrap();
        let exponent = exponents.iter().flatten().copied().max().unwrap();
        let mut sums = Sums::zeros(3 + 7 * 33, device).unwrap();
        terms.iter().for_each(|term| sums.add(3, term, exponent).unwrap());
        let sums = sums.into_tensor().unwrap();
        let values = dequantized(&sums, 3..3 + 7 * 33, exponent).unwrap();
        let integers: Vec<i64> = sums.to_device(&Device::Cpu).unwrap().to_vec1().unwrap();
        (exponents, integers, values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let expected = run(&Device::Cpu);
    assert_eq!(expected.0.last(), Some(&None));
    assert!(expected.1[3..].iter().any(|x| x.unsigned_abs() > 1 << (FRACTION_BITS - 2)));
    for place in places() {
        assert!(place.run(run) == expected, "the sums differ");
    }
}
