//! Attention against f64: outputs, and gradients against central differences.

use candle_core::{DType, Tensor};

use super::reference::{self, dot, slope, slopes};
use super::{TYPES, assert_close, bits, frozen, generator, largest, matrix, normal, numbers, paths, wide};
use crate::attention::{attention_gradient_on, attention_gradient_with_bias_on, attention_on};
use crate::rng::Philox;
use crate::{Attention, Buckets, Dropout, Isa, PositionBias, Segments};

/// A kind of attention, and the sizes it is tried at.
struct Case {
    lengths: &'static [(usize, usize)],
    heads: usize,
    width: usize,
    causal: bool,
    prefix: usize,
    bias: bool,
    dropout: f32,
}

const CASES: [Case; 11] = [
    // Encoder: one row, no rows, and rows that fill more than one strip.
    Case {
        lengths: &[(5, 5), (0, 0), (1, 1), (70, 70)],
        heads: 3,
        width: 5,
        causal: false,
        prefix: 0,
        bias: true,
        dropout: 0.0,
    },
    Case { lengths: &[(131, 131)], heads: 1, width: 64, causal: false, prefix: 0, bias: true, dropout: 0.0 },
    Case {
        lengths: &[(49, 49), (48, 48)],
        heads: 2,
        width: 65,
        causal: false,
        prefix: 0,
        bias: false,
        dropout: 0.0,
    },
    // Decoder.
    Case {
        lengths: &[(7, 7), (100, 100), (1, 1)],
        heads: 2,
        width: 16,
        causal: true,
        prefix: 0,
        bias: true,
        dropout: 0.0,
    },
    // Cross-attention, also over no keys and with no queries.
    Case {
        lengths: &[(3, 60), (50, 2), (0, 4), (2, 0)],
        heads: 2,
        width: 7,
        causal: false,
        prefix: 0,
        bias: false,
        dropout: 0.0,
    },
    Case {
        lengths: &[(20, 20), (55, 55)],
        heads: 2,
        width: 8,
        causal: false,
        prefix: 0,
        bias: true,
        dropout: 0.3,
    },
    Case { lengths: &[(60, 60)], heads: 1, width: 33, causal: true, prefix: 0, bias: true, dropout: 0.1 },
    Case { lengths: &[(9, 130)], heads: 4, width: 1, causal: false, prefix: 0, bias: false, dropout: 0.5 },
    // Trained keys before the sequence: of an encoder, of a decoder, and over other rows; of one example there are no others.
    Case {
        lengths: &[(5, 8), (0, 3), (70, 73), (1, 4)],
        heads: 2,
        width: 9,
        causal: false,
        prefix: 3,
        bias: true,
        dropout: 0.2,
    },
    Case {
        lengths: &[(7, 27), (60, 80), (0, 20), (1, 21)],
        heads: 2,
        width: 16,
        causal: true,
        prefix: 20,
        bias: true,
        dropout: 0.0,
    },
    Case {
        lengths: &[(60, 110), (3, 53)],
        heads: 1,
        width: 33,
        causal: true,
        prefix: 50,
        bias: false,
        dropout: 0.1,
    },
];

/// A case's operands.
struct Data {
    queries: Segments,
    keys: Segments,
    bias: Option<PositionBias>,
    table: Vec<f32>,
    dropout: Option<Dropout>,
    /// q, k, v and the gradient to the output.
    operands: [Vec<f32>; 4],
}

const BUCKETS: Buckets = Buckets { count: 8, max_distance: 20, bidirectional: true };

impl Case {
    fn data(&self, g: &mut Philox, dtype: DType) -> Data {
        let queries = Segments::new(self.lengths.iter().map(|l| l.0));
        let keys = Segments::new(self.lengths.iter().map(|l| l.1));
        let row = self.heads * self.width;
        let table = normal(g, BUCKETS.count * self.heads, DType::F32);
        let longest = queries.longest().max(keys.longest() - self.prefix);
        let bias =
            PositionBias::new(&frozen(&table, BUCKETS.count, self.heads, DType::F32), BUCKETS, longest);
        let operands = [queries.total(), keys.total(), keys.total(), queries.total()]
            .map(|rows| normal(g, rows * row, dtype).iter().map(|x| super::held(0.7 * x, dtype)).collect());
        let dropout = Dropout::new(self.dropout, (0..self.lengths.len() as u64).collect()).unwrap().at(3);
        Data {
            queries,
            keys,
            bias: self.bias.then(|| bias.unwrap()),
            table,
            dropout: (self.dropout > 0.0).then_some(dropout),
            operands,
        }
    }

    fn spec<'a>(&self, data: &'a Data) -> Attention<'a> {
        Attention {
            queries: &data.queries,
            keys: &data.keys,
            heads: self.heads,
            bias: data.bias.as_ref(),
            causal: self.causal,
            prefix: self.prefix,
            dropout: data.dropout.as_ref(),
        }
    }

    fn tensors(&self, data: &Data, dtype: DType) -> [Tensor; 4] {
        let row = self.heads * self.width;
        data.operands.each_ref().map(|v| matrix(v, v.len() / row, row, dtype))
    }

    /// Calls `f` with the same attention in f64.
    fn with_reference<R>(&self, data: &Data, f: impl FnOnce(&reference::Attention<'_>) -> R) -> R {
        self.with_table(data, &wide(&data.table), f)
    }

    /// The same with another table of biases.
    fn with_table<R>(&self, data: &Data, table: &[f64], f: impl FnOnce(&reference::Attention<'_>) -> R) -> R {
        let bias = |head: usize, relative: isize| match &data.bias {
            Some(_) => table[BUCKETS.index(relative) * self.heads + head],
            None => 0.0,
        };
        let masks: Vec<Vec<f32>> = (0..self.lengths.len() * self.heads).map(|i| self.mask(data, i)).collect();
        let factor = |(example, head): (usize, usize), query: usize, key: usize| {
            let mask = &masks[example * self.heads + head];
            mask.get(query * self.lengths[example].1 + key).map_or(1.0, |f| f64::from(*f))
        };
        f(&reference::Attention {
            lengths: self.lengths,
            heads: self.heads,
            width: self.width,
            causal: self.causal,
            prefix: self.prefix,
            bias: &bias,
            factor: &factor,
        })
    }

    /// Dropout's factors of a head of an example, `[queries, keys]`.
    fn mask(&self, data: &Data, place: usize) -> Vec<f32> {
        let (example, head) = (place / self.heads, place % self.heads);
        let (queries, keys) = self.lengths[example];
        let Some(dropout) = &data.dropout else { return Vec::new() };
        let masks = dropout.head_masks(example, head);
        let mut factors = vec![0.0; queries * keys];
        factors.chunks_exact_mut(keys).enumerate().for_each(|(row, out)| masks.row(row, out));
        factors
    }
}

#[test]
fn attention_is_that_of_f64() {
    let mut g = generator(401);
    for (i, case) in CASES.iter().enumerate() {
        for dtype in TYPES {
            let data = case.data(&mut g, dtype);
            let [q, k, v, _] = data.operands.each_ref().map(|x| wide(x));
            let expected = case.with_reference(&data, |r| r.output(&q, &k, &v));
            let [q, k, v, _] = case.tensors(&data, dtype);
            // In bf16, probabilities and results are rounded to 2^-9 of their size each; the former meet all values.
            let share = if dtype == DType::BF16 { 0.012 } else { 4e-6 };
            let bound = share * largest(&expected);
            for isa in paths() {
                let attended = attention_on(isa, &case.spec(&data), &q, &k, &v).unwrap();
                assert_close(
                    &format!("case {i} {isa:?} {dtype:?}"),
                    &numbers(&attended.output),
                    &expected,
                    |_| bound,
                );
            }
        }
    }
}

#[test]
fn attention_gradients_are_the_slopes_of_attention() {
    let mut g = generator(402);
    for (c, case) in CASES.iter().enumerate() {
        for dtype in TYPES {
            let data = case.data(&mut g, dtype);
            let operands = data.operands.each_ref().map(|x| wide(x));
            let dy = &operands[3];
            // Slopes in some numbers of each operand: the same for all paths.
            let mut chosen = Vec::new();
            for which in 0..3 {
                let n = operands[which].len();
                let places: Vec<usize> = g.permutation(n).into_iter().take(25).map(|i| i as usize).collect();
                let slopes = case.with_reference(&data, |r| {
                    let objective = |x: &[f64]| {
                        let mut all = [&operands[0][..], &operands[1], &operands[2]];
                        all[which] = x;
                        dot(&r.output(all[0], all[1], all[2]), dy)
                    };
                    places.iter().map(|i| slope(&operands[which], *i, objective)).collect::<Vec<_>>()
                });
                chosen.push((places, slopes));
            }
            let [q, k, v, dy] = case.tensors(&data, dtype);
            let share = if dtype == DType::BF16 { 0.04 } else { 1e-5 };
            for isa in paths() {
                let spec = case.spec(&data);
                let attended = attention_on(isa, &spec, &q, &k, &v).unwrap();
                let gradients = attention_gradient_on(isa, &spec, [&q, &k, &v], &attended, &dy).unwrap();
                for ((gradient, (places, slopes)), name) in gradients.iter().zip(&chosen).zip(["q", "k", "v"])
                {
                    let all = numbers(gradient);
                    let found: Vec<f32> = places.iter().map(|i| all[*i]).collect();
                    let bound = share * largest(&wide(&all));
                    assert_close(&format!("case {c} {isa:?} {dtype:?} d{name}"), &found, slopes, |_| bound);
                }
            }
        }
    }
}

#[test]
fn the_gradient_to_the_bias_is_the_slope_in_its_table() {
    let mut g = generator(404);
    for (c, case) in CASES.iter().enumerate().filter(|(_, case)| case.bias) {
        for dtype in TYPES {
            let data = case.data(&mut g, dtype);
            let [q, k, v, dy] = data.operands.each_ref().map(|x| wide(x));
            let expected = slopes(&wide(&data.table), |table| {
                case.with_table(&data, table, |r| dot(&r.output(&q, &k, &v), &dy))
            });
            let [q, k, v, dy] = case.tensors(&data, dtype);
            let share = if dtype == DType::BF16 { 0.02 } else { 1e-5 };
            for isa in paths() {
                let what = format!("case {c} {isa:?} {dtype:?}");
                let (spec, operands) = (case.spec(&data), [&q, &k, &v]);
                let attended = attention_on(isa, &spec, &q, &k, &v).unwrap();
                let given = (&attended, &dy);
                let (gradients, table) =
                    attention_gradient_with_bias_on(isa, &spec, operands, given, BUCKETS).unwrap();
                assert_eq!(table.dims(), [BUCKETS.count, case.heads]);
                let bound = share * largest(&expected);
                assert_close(&what, &numbers(&table), &expected, |_| bound);
                let without = attention_gradient_on(isa, &spec, operands, &attended, &dy).unwrap();
                assert_eq!(gradients.each_ref().map(bits), without.each_ref().map(bits), "{what}");
            }
        }
    }
}

/// With equal scores and an identity for the values, the output shows the factors themselves.
#[test]
fn attention_drops_probabilities_at_its_rate() {
    let n = 64;
    let zeros = matrix(&vec![0.0; n * n], n, n, DType::F32);
    let identity: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
    let identity = matrix(&identity, n, n, DType::F32);
    let segments = Segments::new([n]);
    let output = |dropout: &Dropout| {
        let dropout = Some(dropout);
        let spec = Attention {
            queries: &segments,
            keys: &segments,
            heads: 1,
            bias: None,
            causal: false,
            prefix: 0,
            dropout,
        };
        numbers(&attention_on(Isa::Portable, &spec, &zeros, &zeros, &identity).unwrap().output)
    };
    let masks = Dropout::new(0.25, vec![5]).unwrap();
    let y = output(&masks);
    let dropped = y.iter().filter(|y| **y == 0.0).count() as f64 / y.len() as f64;
    assert!((dropped - 0.25).abs() < 5.0 * (0.25 * 0.75 / y.len() as f64).sqrt(), "{dropped}");
    assert!(y.iter().all(|y| *y == 0.0 || (y * n as f32 - 4.0 / 3.0).abs() < 1e-5));
    assert_eq!(y, output(&masks));
    assert_ne!(y, output(&masks.at(1)), "another site has another mask");
}

#[test]
fn without_dropped_numbers_dropout_changes_nothing() {
    let mut g = generator(403);
    let case = &CASES[0];
    let mut data = case.data(&mut g, DType::F32);
    let [q, k, v, dy] = case.tensors(&data, DType::F32);
    let run = |data: &Data| {
        let spec = case.spec(data);
        let attended = attention_on(Isa::Portable, &spec, &q, &k, &v).unwrap();
        let [dq, dk, dv] = attention_gradient_on(Isa::Portable, &spec, [&q, &k, &v], &attended, &dy).unwrap();
        [&attended.output, &dq, &dk, &dv].map(bits)
    };
    let without = run(&data);
    data.dropout = Some(Dropout::new(0.0, vec![0; case.lengths.len()]).unwrap());
    assert_eq!(without, run(&data));
}
