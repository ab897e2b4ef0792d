//! Every operation on a GPU against the same operation on the CPU, on the same numbers.
//!
//! Each test runs on the emulator, with a kernel's threads in several orders, where the feature `emulator` is on, and on the first
//! CUDA device where there is one. On the emulator results must not depend on the order, to the bit.

use candle_core::{DType, Device, Tensor};

use crate::rng::Philox;
use crate::sums::{FRACTION_BITS, Sums, dequantized, max_exponents};
use crate::tests::{self, TYPES, generator, normal, numbers};
use crate::{
    Activation, Attention, Buckets, Dropout, Frozen, LossSlope, PositionBias, Rows, Segments, Softmax,
    Targets, Vocabulary, activate, activate_gradient, add, attention, attention_gradient,
    cross_entropy_gradient, dropout, embed, gated, gated_gradient, linear, linear_add, linear_gradient,
    rms_norm, rms_norm_gradient, rounded,
};

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
    places.extend([0, 1, 5].map(Place::Emulated));
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
    let expected: Vec<Vec<f32>> = f(&Device::Cpu).iter().map(numbers).collect();
    let mut first: Option<Vec<Vec<u32>>> = None;
    for place in places() {
        let found: Vec<Vec<f32>> = place.run(|device| f(device).iter().map(numbers).collect());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            close(&format!("{what}, result {i}"), found, expected, bound);
        }
        if place.is_emulated() {
            let bits: Vec<Vec<u32>> = found.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect();
            assert!(first.get_or_insert(bits.clone()) == &bits, "{what} depends on the order of threads");
        }
    }
}

fn close(what: &str, found: &[f32], expected: &[f32], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().filter(|x| x.is_finite()).fold(1e-30f32, |a, x| a.max(x.abs()));
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
            let residual = matrix(&mut g, rows, out, DType::F32);
            compare("a product", bound(dtype), |device| {
                let [x, dy, residual] = on(device, [&x, &dy, &residual]);
                let [w, other] = [&w, &other].map(|w| w.to_device(device, dtype).unwrap());
                vec![
                    linear(&x, &w, DType::F32).unwrap(),
                    linear(&x, &w, DType::BF16).unwrap(),
                    linear_add(&residual, &x, &w).unwrap(),
                    linear_gradient(&[(&dy, &w)], DType::F32).unwrap(),
                    linear_gradient(&[(&dy, &w), (&dy, &other)], DType::F32).unwrap(),
                    linear_gradient(&[(&dy, &w), (&dy, &other)], DType::BF16).unwrap(),
                ]
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

#[test]
fn norms_equal_the_cpus() {
    let mut g = generator(3);
    for (rows, width) in [(1, 4), (3, 7), (9, 300), (2, 1024)] {
        let [x, dy, residual] = [(); 3].map(|()| matrix(&mut g, rows, width, DType::F32));
        let weight = matrix(&mut g, 1, width, DType::F32).flatten_all().unwrap();
        compare("rms_norm", bound(DType::BF16), |device| {
            let [x, weight] = on(device, [&x, &weight]);
            vec![rms_norm(&x, &weight, 1e-6, DType::BF16).unwrap()]
        });
        compare("rms_norm", bound(DType::F32), |device| {
            let [x, dy, weight, residual] = on(device, [&x, &dy, &weight, &residual]);
            vec![
                rms_norm(&x, &weight, 1e-6, DType::F32).unwrap(),
                rms_norm_gradient(&dy, &x, &weight, 1e-6, None).unwrap(),
                rms_norm_gradient(&dy, &x, &weight, 1e-6, Some(&residual)).unwrap(),
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
                compare(&format!("{act:?}"), bound(dtype), |device| {
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
            ]
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
                vec![dropout(&x.to_device(device).unwrap(), &segments, &masks).unwrap()]
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

/// A kind of attention.
struct Case {
    lengths: &'static [(usize, usize)],
    heads: usize,
    width: usize,
    causal: bool,
    bias: bool,
    dropout: f32,
}

const CASES: [Case; 7] = [
    // One row, no rows, whole tiles, and one row more.
    Case {
        lengths: &[(5, 5), (0, 0), (1, 1), (70, 70)],
        heads: 3,
        width: 8,
        causal: false,
        bias: true,
        dropout: 0.0,
    },
    Case {
        lengths: &[(64, 64), (32, 32), (65, 65)],
        heads: 1,
        width: 64,
        causal: false,
        bias: true,
        dropout: 0.0,
    },
    Case {
        lengths: &[(7, 7), (100, 100), (1, 1)],
        heads: 2,
        width: 16,
        causal: true,
        bias: true,
        dropout: 0.0,
    },
    // Over other rows, over none, and none over some.
    Case {
        lengths: &[(3, 130), (50, 2), (0, 4), (2, 0)],
        heads: 2,
        width: 5,
        causal: false,
        bias: false,
        dropout: 0.0,
    },
    Case { lengths: &[(20, 20), (75, 75)], heads: 2, width: 24, causal: false, bias: true, dropout: 0.3 },
    Case { lengths: &[(66, 66)], heads: 1, width: 100, causal: true, bias: true, dropout: 0.1 },
    Case { lengths: &[(9, 33)], heads: 2, width: 256, causal: false, bias: false, dropout: 0.5 },
];

impl Case {
    fn check(&self, seed: u64, dtype: DType) {
        let mut g = generator(seed);
        let queries = Segments::new(self.lengths.iter().map(|l| l.0));
        let keys = Segments::new(self.lengths.iter().map(|l| l.1));
        let row = self.heads * self.width;
        let [q, dy] = [(); 2].map(|()| matrix(&mut g, queries.total(), row, dtype));
        let [k, v] = [(); 2].map(|()| matrix(&mut g, keys.total(), row, dtype));
        // Scores of a size that a trained model has.
        let q =
            (q.to_dtype(DType::F32).unwrap() / (self.width as f64).sqrt()).unwrap().to_dtype(dtype).unwrap();
        let buckets = Buckets { count: 8, max_distance: 20, bidirectional: !self.causal };
        let table = frozen(&mut g, 8, self.heads, DType::F32);
        let masks =
            Dropout::new(self.dropout, (0..self.lengths.len() as u64).collect()).unwrap().at(3).of_heads(1);
        let run = |device: &Device, dtype: DType| {
            // What is cached with them is each device's own.
            let (queries, keys) = (queries.fresh(), keys.fresh());
            let longest = queries.longest().max(keys.longest());
            let bias = self.bias.then(|| PositionBias::new(&table, buckets, longest).unwrap());
            let spec = Attention {
                queries: &queries,
                keys: &keys,
                heads: self.heads,
                bias: bias.as_ref(),
                causal: self.causal,
                dropout: (self.dropout > 0.0).then_some(&masks),
            };
            let [q, k, v, dy] = on(device, [&q, &k, &v, &dy]).map(|t| t.to_dtype(dtype).unwrap());
            let attended = attention(&spec, &q, &k, &v).unwrap();
            let [dq, dk, dv] = attention_gradient(&spec, [&q, &k, &v], &attended, &dy).unwrap();
            vec![attended.output, dq, dk, dv]
        };
        if dtype == DType::F32 {
            return compare("attention", bound(dtype), |device| run(device, dtype));
        }
        // Kernels round probabilities and score gradients to bf16, which CPUs without bf16 products do not: half a unit in the last
        // place more, by the size of the result.
        let exact: Vec<Vec<f32>> = run(&Device::Cpu, DType::F32).iter().map(numbers).collect();
        let distance = |found: &[f32], exact: &[f32]| {
            let squares = found.iter().zip(exact).map(|(x, exact)| f64::from(x - exact).powi(2)).sum::<f64>();
            (squares / exact.len().max(1) as f64).sqrt()
        };
        let rounded = run(&Device::Cpu, dtype);
        compare("attention", 0.1, |device| run(device, dtype));
        for place in places() {
            let found = place.run(|device| run(device, dtype));
            for (i, exact) in exact.iter().enumerate() {
                let [cpu, gpu] = [&rounded[i], &found[i]].map(|result| distance(&numbers(result), exact));
                println!(
                    "result {i}: root mean square distance from f32 {cpu:.2e} on the CPU, {gpu:.2e} here"
                );
                let size = distance(exact, &vec![0.0; exact.len()]);
                assert!(
                    gpu <= 2.0 * cpu + size / 512.0,
                    "result {i}: {gpu:e} from f32, where the CPU is {cpu:e} from it"
                );
            }
        }
    }
}

#[test]
fn attention_and_its_gradient_equal_the_cpus_in_f32() {
    CASES.iter().zip(20..).for_each(|(case, seed)| case.check(seed, DType::F32));
}

#[test]
fn attention_and_its_gradient_equal_the_cpus_in_bf16() {
    CASES.iter().zip(40..).for_each(|(case, seed)| case.check(seed, DType::BF16));
}

#[test]
fn an_example_that_is_not_finite_leaves_its_neighbours_to_the_bit() {
    let mut g = generator(60);
    let (lengths, row) = ([70, 40, 5], 2 * 16);
    let x = matrix(&mut g, 115, row, DType::BF16);
    let mut spoilt = numbers(&x);
    spoilt[75 * row + 3] = f32::NAN;
    let spoilt = Tensor::from_vec(spoilt, (115, row), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    for place in places() {
        let run = |x: &Tensor| {
            place.run(|device| {
                let segments = Segments::new(lengths);
                let spec = Attention {
                    queries: &segments,
                    keys: &segments,
                    heads: 2,
                    bias: None,
                    causal: false,
                    dropout: None,
                };
                let x = x.to_device(device).unwrap();
                let attended = attention(&spec, &x, &x, &x).unwrap();
                let gradients = attention_gradient(&spec, [&x, &x, &x], &attended, &x).unwrap();
                let mut all = vec![numbers(&attended.output)];
                all.extend(gradients.iter().map(numbers));
                all
            })
        };
        for (clean, spoilt) in run(&x).into_iter().zip(run(&spoilt)) {
            let own = 70 * row..110 * row;
            assert!(spoilt[own.clone()].iter().any(|x| x.is_nan()));
            for i in (0..clean.len()).filter(|i| !own.contains(i)) {
                assert_eq!(clean[i].to_bits(), spoilt[i].to_bits(), "number {i}");
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
