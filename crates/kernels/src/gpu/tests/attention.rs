//! Attention.

use candle_core::{DType, Device, Tensor};

use super::{bound, by_groups_and_by_warps, compare, frozen, matrix, on, places};
use crate::tests::{TYPES, generator, numbers};
use crate::{
    Attention, Buckets, Dropout, Frozen, PositionBias, Segments, attention, attention_gradient,
    attention_gradient_with_bias,
};

/// A kind of attention.
#[derive(Clone, Copy)]
struct Case {
    lengths: &'static [(usize, usize)],
    heads: usize,
    width: usize,
    causal: bool,
    prefix: usize,
    bias: bool,
    dropout: f32,
}

const CASES: [Case; 17] = [
    // One row, no rows, whole tiles, and one row more.
    Case {
        lengths: &[(5, 5), (0, 0), (1, 1), (70, 70)],
        heads: 3,
        width: 8,
        causal: false,
        prefix: 0,
        bias: true,
        dropout: 0.0,
    },
    Case {
        lengths: &[(64, 64), (32, 32), (65, 65)],
        heads: 1,
        width: 64,
        causal: false,
        prefix: 0,
        bias: true,
        dropout: 0.0,
    },
    Case {
        lengths: &[(7, 7), (100, 100), (1, 1)],
        heads: 2,
        width: 16,
        causal: true,
        prefix: 0,
        bias: true,
        dropout: 0.0,
    },
    // Over other rows, over none, and none over some.
    Case {
        lengths: &[(3, 130), (50, 2), (0, 4), (2, 0)],
        heads: 2,
        width: 5,
        causal: false,
        prefix: 0,
        bias: false,
        dropout: 0.0,
    },
    Case {
        lengths: &[(20, 20), (75, 75)],
        heads: 2,
        width: 24,
        causal: false,
        prefix: 0,
        bias: true,
        dropout: 0.3,
    },
    Case { lengths: &[(66, 66)], heads: 1, width: 100, causal: true, prefix: 0, bias: true, dropout: 0.1 },
    Case { lengths: &[(9, 33)], heads: 2, width: 256, causal: false, prefix: 0, bias: false, dropout: 0.5 },
    // Trained keys before the sequence, fewer and more than a tile has; of one example there are no others.
    Case {
        lengths: &[(5, 8), (0, 3), (9, 12)],
        heads: 2,
        width: 8,
        causal: false,
        prefix: 3,
        bias: true,
        dropout: 0.3,
    },
    Case {
        lengths: &[(66, 137), (1, 72)],
        heads: 1,
        width: 8,
        causal: true,
        prefix: 71,
        bias: true,
        dropout: 0.0,
    },
    // Rows that can be copied 16 bytes at a time, in so many tiles that each stage is filled again, by heads of every tile's width.
    Case { lengths: &[(130, 140)], heads: 1, width: 64, causal: false, prefix: 0, bias: false, dropout: 0.0 },
    Case { lengths: &[(66, 70)], heads: 1, width: 128, causal: false, prefix: 0, bias: false, dropout: 0.0 },
    Case { lengths: &[(66, 70)], heads: 1, width: 256, causal: false, prefix: 0, bias: false, dropout: 0.0 },
    // The same with dropout, and rows that see nothing.
    Case { lengths: &[(130, 140)], heads: 1, width: 64, causal: false, prefix: 0, bias: false, dropout: 0.3 },
    Case {
        lengths: &[(2, 0), (66, 9)],
        heads: 2,
        width: 8,
        causal: false,
        prefix: 0,
        bias: false,
        dropout: 0.0,
    },
    // Dropout where tiles of queries begin between multiples of 8, where a prefix is longer than a tile, and with one stage of tiles.
    Case {
        lengths: &[(130, 133), (1, 4)],
        heads: 2,
        width: 64,
        causal: true,
        prefix: 3,
        bias: true,
        dropout: 0.3,
    },
    Case {
        lengths: &[(66, 137), (1, 72)],
        heads: 2,
        width: 5,
        causal: true,
        prefix: 71,
        bias: true,
        dropout: 0.1,
    },
    Case { lengths: &[(66, 70)], heads: 1, width: 128, causal: false, prefix: 0, bias: true, dropout: 0.3 },
];

impl Case {
    /// Holds all results, that for the table of a bias among them, against the CPU's.
    fn check(&self, seed: u64, dtype: DType) {
        self.with(seed, dtype, |run| Self::compare(dtype, |device, dtype| run(device, dtype, self.bias)));
    }

    /// Calls `f` with a function that attends on a device: the output, and the gradients, that to the bias too if it is asked for.
    fn with(&self, seed: u64, dtype: DType, f: impl FnOnce(&dyn Fn(&Device, DType, bool) -> Vec<Tensor>)) {
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
        f(&|device, dtype, of_bias| {
            // What is cached with them is each device's own.
            let (queries, keys) = (queries.fresh(), keys.fresh());
            let longest = queries.longest().max(keys.longest() - self.prefix);
            let bias = self.bias.then(|| PositionBias::new(&table, buckets, longest).unwrap());
            let spec = Attention {
                queries: &queries,
                keys: &keys,
                heads: self.heads,
                bias: bias.as_ref(),
                causal: self.causal,
                prefix: self.prefix,
                dropout: (self.dropout > 0.0).then_some(&masks),
            };
            let [q, k, v, dy] = on(device, [&q, &k, &v, &dy]).map(|t| t.to_dtype(dtype).unwrap());
            let attended = attention(&spec, &q, &k, &v).unwrap();
            let operands = [&q, &k, &v];
            if !of_bias {
                let [dq, dk, dv] = attention_gradient(&spec, operands, &attended, &dy).unwrap();
                return vec![attended.output, dq, dk, dv];
            }
            let ([dq, dk, dv], table) =
                attention_gradient_with_bias(&spec, operands, &attended, &dy, buckets).unwrap();
            vec![attended.output, dq, dk, dv, table]
        });
    }

    /// Holds what `run` gives against the CPU's.
    fn compare(dtype: DType, run: impl Fn(&Device, DType) -> Vec<Tensor>) {
        if dtype == DType::F32 {
            return compare("attention", bound(dtype), |device| run(device, dtype));
        }
        // Kernels round probabilities and score gradients to bf16, which CPUs without bf16 products do not: half a unit in the last
        // place more, by the size of the result. And they make delta of the rounded output, as FlashAttention-2 does, where the CPU sums
        // unrounded numbers: that is in the gradients to queries, keys and the bias's table, which can be small beside it.
        let more = |result: usize| [1.0 / 512.0, 1.0 / 64.0, 1.0 / 64.0, 1.0 / 512.0, 1.0 / 256.0][result];
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
                let size = distance(exact, &vec![0.0; exact.len()]);
                println!(
                    "result {i}: root mean square distance from f32 {cpu:.2e} on the CPU, {gpu:.2e} here, of {size:.2e}"
                );
                assert!(
                    gpu <= 2.0 * cpu + size * more(i),
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
    by_groups_and_by_warps(|| CASES.iter().zip(40..).for_each(|(case, seed)| case.check(seed, DType::BF16)));
}

/// They take the same steps in the same order.
#[test]
fn attention_by_groups_has_the_bits_of_attention_by_warps() {
    let places = places();
    for (case, place) in CASES.iter().flat_map(|case| [(case, places.first()), (case, places.last())]) {
        let Some(place) = place else { continue };
        case.with(62, DType::BF16, |run| {
            let mut results: Vec<Vec<Vec<f32>>> = Vec::new();
            by_groups_and_by_warps(|| {
                results.push(
                    place.run(|device| run(device, DType::BF16, case.bias).iter().map(numbers).collect()),
                );
            });
            assert!(results[0] == results[1], "{:?}, {} numbers a head", case.lengths, case.width);
        });
    }
}

/// For heads of every tile's width.
#[test]
fn the_gradient_to_the_bias_leaves_the_others_to_the_bit() {
    by_groups_and_by_warps(check_gradients_beside_that_to_the_bias);
}

fn check_gradients_beside_that_to_the_bias() {
    let cases = [8, 10, 11, 14].map(|i| Case { bias: true, ..CASES[i] });
    cases.iter().for_each(|case| case.check(60, DType::F32));
    for (case, dtype) in cases.iter().flat_map(|case| TYPES.map(|dtype| (case, dtype))) {
        case.with(60, dtype, |run| {
            let mut tables = Vec::new();
            for place in places() {
                let [with, without] = [true, false].map(|of_bias| {
                    place.run(|device| run(device, dtype, of_bias).iter().map(numbers).collect::<Vec<_>>())
                });
                assert!(with[..4] == without, "{dtype:?}");
                tables.extend(place.is_emulated().then(|| with[4].clone()));
            }
            assert!(tables.windows(2).all(|two| two[0] == two[1]), "{dtype:?}: the order of threads matters");
        });
    }
}

/// A bias whose exponential is beyond f32, and examples that end within a tile: rows that are not there must not come in.
#[test]
fn the_gradient_to_a_large_bias_is_finite() {
    // A score near 100 is rounded by up to 4e-6, times log2(e) by 8e-6 more.
    check_large_bias(DType::F32, 3e-5);
    by_groups_and_by_warps(|| check_large_bias(DType::BF16, bound(DType::BF16)));
}

fn check_large_bias(dtype: DType, bound: f64) {
    let mut g = generator(61);
    let (heads, width) = (2, 8);
    let segments = Segments::new([70, 5, 33]);
    let [q, k, v, dy] = [(); 4].map(|()| matrix(&mut g, segments.total(), heads * width, dtype));
    let buckets = Buckets { count: 8, max_distance: 20, bidirectional: true };
    let table =
        Frozen::from_f32((0..8 * heads).map(|i| if i % 3 == 0 { 100.0 } else { 0.0 }).collect(), 8, heads);
    compare("attention with a large bias", bound, |device| {
        let segments = segments.fresh();
        let bias = PositionBias::new(&table, buckets, segments.longest()).unwrap();
        let spec = Attention {
            queries: &segments,
            keys: &segments,
            heads,
            bias: Some(&bias),
            causal: false,
            prefix: 0,
            dropout: None,
        };
        let [q, k, v, dy] = on(device, [&q, &k, &v, &dy]);
        let attended = attention(&spec, &q, &k, &v).unwrap();
        let ([dq, dk, dv], table) =
            attention_gradient_with_bias(&spec, [&q, &k, &v], &attended, &dy, buckets).unwrap();
        assert!(numbers(&table).iter().all(|x| x.is_finite()));
        vec![attended.output, dq, dk, dv, table]
    });
}

#[test]
fn an_example_that_is_not_finite_leaves_its_neighbours_to_the_bit() {
    by_groups_and_by_warps(check_neighbours_of_what_is_not_finite);
}

fn check_neighbours_of_what_is_not_finite() {
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
                    prefix: 0,
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
