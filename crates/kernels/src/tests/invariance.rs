//! The bits of an example depend on nothing but the example: not on what lies beside it, where it lies, or the threads.

use candle_core::{DType, Tensor};

use super::{TYPES, bits, cross_entropy, frozen, generator, matrix, normal, paths, vector};
use crate::activation::{gated_gradient_on, gated_on};
use crate::attention::{attention_gradient_on, attention_gradient_with_bias_on, attention_on};
use crate::dropout::dropout_on;
use crate::linear::{linear_add_on, linear_gradient_on, linear_on, linear_weight_gradient_on};
use crate::norm::{rms_norm_gradient_on, rms_norm_on, rms_norm_weight_gradient_on};
use crate::{
    Activation, Attention, Buckets, Dropout, Isa, PositionBias, Segments, Vocabulary, embed_gradient,
};

/// Rows of each example: none, one, and more than strips, tiles and blocks hold.
const LENGTHS: [usize; 5] = [13, 1, 0, 110, 50];
const WIDTH: usize = 3 * 22;

/// Operands `[T, WIDTH]` of some examples.
struct Batch<'a> {
    examples: &'a [usize],
    segments: Segments,
    source: &'a [Vec<f32>; LENGTHS.len()],
}

impl Batch<'_> {
    /// The `i`-th operand.
    fn operand(&self, i: usize, dtype: DType) -> Tensor {
        let part = |e: &usize| {
            let n = LENGTHS[*e] * WIDTH;
            &self.source[*e][i * n..(i + 1) * n]
        };
        let values = self.examples.iter().map(part).collect::<Vec<_>>().concat();
        matrix(&values, self.segments.total(), WIDTH, dtype)
    }

    /// Results with a row for each of the batch's, as bits of each example.
    fn split(&self, results: &[Tensor]) -> Vec<Vec<u32>> {
        let split = |e: usize| {
            let of = |t: &Tensor| {
                bits(&t.narrow(0, self.segments.range(e).start, self.segments.range(e).len()).unwrap())
            };
            results.iter().flat_map(of).collect()
        };
        (0..self.examples.len()).map(split).collect()
    }
}

type Operation<'a> = (&'a str, &'a (dyn Fn(Isa, &Batch<'_>, DType) -> Vec<Tensor> + Sync));

/// Every operation on every path: the examples together, in other orders, alone, on one and two threads, and beside NaN.
fn check(operations: &[Operation<'_>]) {
    let mut g = generator(501);
    let source = LENGTHS.map(|rows| normal(&mut g, 4 * rows * WIDTH, DType::BF16));
    let mut poisoned = source.clone();
    poisoned[0].iter_mut().for_each(|x| *x = f32::NAN);
    poisoned[4].iter_mut().step_by(7).for_each(|x| *x = f32::INFINITY);
    let pools = [1, 2].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for ((name, operation), dtype) in operations.iter().flat_map(|o| TYPES.map(|t| (o, t))) {
        for isa in paths() {
            let run = |examples: &[usize], source: &[Vec<f32>; 5], threads: usize| {
                let segments = Segments::new(examples.iter().map(|e| LENGTHS[*e]));
                let batch = Batch { examples, segments, source };
                pools[threads - 1].install(|| batch.split(&operation(isa, &batch, dtype)))
            };
            let expected = run(&[0, 1, 2, 3, 4], &source, 1);
            assert!(expected.iter().zip(LENGTHS).all(|(bits, rows)| bits.is_empty() == (rows == 0)));
            let orders: [&[usize]; 8] = [
                &[0, 1, 2, 3, 4],
                &[4, 2, 0, 3, 1],
                &[0],
                &[1],
                &[3, 3],
                &[4, 1],
                &[2, 3],
                &[1, 1, 1, 1, 1, 1, 1, 4],
            ];
            for (order, threads) in orders.into_iter().flat_map(|o| [(o, 1), (o, 2)]) {
                for (bits, e) in run(order, &source, threads).iter().zip(order) {
                    assert!(
                        *bits == expected[*e],
                        "{name} {isa:?} {dtype:?}: example {e} among {order:?}, {threads} threads"
                    );
                }
            }
            let beside_nan = run(&[0, 1, 2, 3, 4], &poisoned, 2);
            for e in 1..4 {
                assert!(beside_nan[e] == expected[e], "{name} {isa:?} {dtype:?}: example {e} beside NaN");
            }
        }
    }
}

#[test]
fn linear_rows_do_not_depend_on_their_neighbours() {
    let mut g = generator(502);
    let (out, wide) = (131, normal(&mut g, 2 * 131 * WIDTH, DType::F32));
    let weight = |dtype| frozen(&wide[..out * WIDTH], out, WIDTH, dtype);
    let square = |dtype| frozen(&wide[..WIDTH * WIDTH], WIDTH, WIDTH, dtype);
    check(&[
        ("linear", &|isa, batch, dtype| {
            vec![linear_on(isa, &batch.operand(0, dtype), &weight(dtype), dtype).unwrap()]
        }),
        ("linear_add", &|isa, batch, dtype| {
            let (x, residual) = (batch.operand(0, dtype), batch.operand(1, DType::F32));
            vec![linear_add_on(isa, &residual, &x, &square(dtype)).unwrap()]
        }),
        ("linear_gradient", &|isa, batch, dtype| {
            let (a, b, w) = (batch.operand(0, dtype), batch.operand(1, dtype), square(dtype));
            vec![linear_gradient_on(isa, &[(&a, &w), (&b, &w)], dtype).unwrap()]
        }),
    ]);
}

#[test]
fn elementwise_rows_do_not_depend_on_their_neighbours() {
    let mut g = generator(503);
    let weight = vector(&normal(&mut g, WIDTH, DType::F32));
    check(&[
        ("rms_norm", &|isa, batch, dtype| {
            let [x, dy, residual] = [0, 1, 2].map(|i| batch.operand(i, DType::F32));
            let y = rms_norm_on(isa, &x, &weight, 1e-6, dtype).unwrap();
            let (dx, rounded) =
                rms_norm_gradient_on(isa, [&dy, &x, &weight], 1e-6, Some(&residual), dtype).unwrap();
            vec![y, dx, rounded]
        }),
        ("gated", &|isa, batch, dtype| {
            let [gate, up, dy] = [0, 1, 2].map(|i| batch.operand(i, dtype));
            let (dgate, dup) = gated_gradient_on(isa, Activation::GeluNew, &dy, &gate, &up).unwrap();
            vec![gated_on(isa, Activation::GeluNew, &gate, &up).unwrap(), dgate, dup]
        }),
        ("cross_entropy", &|isa, batch, dtype| {
            let logits = batch.operand(0, DType::F32);
            let rows = batch.segments.total();
            let (targets, scale) = (vec![7; rows], vec![0.5; rows]);
            let (loss, dx) = cross_entropy(isa, &logits, (&targets, &scale), 0.1, dtype);
            vec![vector(&loss), dx]
        }),
        ("dropout", &|isa, batch, dtype| {
            let masks = Dropout::new(0.2, batch.examples.iter().map(|e| *e as u64).collect()).unwrap();
            vec![dropout_on(isa, &batch.operand(0, dtype), &batch.segments, &masks).unwrap()]
        }),
    ]);
}

/// Attention of a batch with itself, and its gradients.
fn attend(isa: Isa, batch: &Batch<'_>, dtype: DType, spec: &Attention<'_>) -> Vec<Tensor> {
    let [q, k, v, dy] = [0, 1, 2, 3].map(|i| batch.operand(i, dtype));
    let q = (q * 0.2).unwrap();
    let attended = attention_on(isa, spec, &q, &k, &v).unwrap();
    let [dq, dk, dv] = attention_gradient_on(isa, spec, [&q, &k, &v], &attended, &dy).unwrap();
    vec![attended.output, dq, dk, dv]
}

#[test]
fn examples_attend_to_themselves_alone() {
    let mut g = generator(504);
    let buckets = Buckets { count: 8, max_distance: 30, bidirectional: true };
    let table = frozen(&normal(&mut g, 8 * 3, DType::F32), 8, 3, DType::F32);
    check(&[
        ("attention", &|isa, batch, dtype| {
            // The bias reaches as far as the longest example of the batch: another length for other neighbours.
            let bias = PositionBias::new(&table, buckets, batch.segments.longest()).unwrap();
            let masks = Dropout::new(0.2, batch.examples.iter().map(|e| *e as u64).collect()).unwrap();
            let (queries, keys) = (&batch.segments, &batch.segments);
            let spec = Attention {
                queries,
                keys,
                heads: 3,
                bias: Some(&bias),
                causal: false,
                prefix: 0,
                dropout: Some(&masks),
            };
            attend(isa, batch, dtype, &spec)
        }),
        ("causal attention", &|isa, batch, dtype| {
            let (queries, keys) = (&batch.segments, &batch.segments);
            let spec =
                Attention { queries, keys, heads: 3, bias: None, causal: true, prefix: 0, dropout: None };
            attend(isa, batch, dtype, &spec)
        }),
    ]);
}

#[test]
fn products_have_the_same_bits_with_any_number_of_threads() {
    // With one thread a task has several panels, and with many a panel has several tasks.
    let mut g = generator(507);
    let (rows, out, width) = (401, 600, 1100);
    let x = normal(&mut g, rows * width, DType::BF16);
    let w = normal(&mut g, out * width, DType::BF16);
    for (isa, dtype) in paths().flat_map(|isa| TYPES.map(|dtype| (isa, dtype))) {
        let (x, w) = (matrix(&x, rows, width, dtype), frozen(&w, out, width, dtype));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let y = linear_on(isa, &x, &w, dtype).unwrap();
                let dx = linear_gradient_on(isa, &[(&y, &w), (&y, &w)], dtype).unwrap();
                [bits(&y), bits(&dx)]
            })
        };
        let expected = run(1);
        for threads in [2, 3, 16] {
            assert!(run(threads) == expected, "{isa:?} {dtype:?}: {threads} threads");
        }
    }
}

/// Sums over all rows have as many terms as there are rows, and none of them may depend on who adds what.
#[test]
fn gradients_to_weights_have_the_same_bits_with_any_number_of_threads() {
    let mut g = generator(505);
    let (rows, width) = (301, 200);
    let ids: Vec<Option<u32>> = (0..rows).map(|_| Some(g.below(40) as u32).filter(|id| *id < 30)).collect();
    let values = [0, 1].map(|_| normal(&mut g, rows * width, DType::BF16));
    let segments = Segments::new([80, 1, 0, 120, 100]);
    let buckets = Buckets { count: 8, max_distance: 30, bidirectional: true };
    let table = frozen(&normal(&mut g, 8 * 5, DType::F32), 8, 5, DType::F32);
    let bias = PositionBias::new(&table, buckets, 120).unwrap();
    let (queries, keys, bias) = (&segments, &segments, Some(&bias));
    let spec = Attention { queries, keys, heads: 5, bias, causal: false, prefix: 0, dropout: None };
    for (isa, dtype) in paths().flat_map(|isa| TYPES.map(|dtype| (isa, dtype))) {
        let [dy, x] = values.each_ref().map(|v| matrix(v, rows, width, dtype));
        let [wide_dy, wide_x] = [&dy, &x].map(|t| t.to_dtype(DType::F32).unwrap());
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let attended = attention_on(isa, &spec, &dy, &x, &x).unwrap();
                let (operands, given) = ([&dy, &x, &x], (&attended, &dy));
                let of_bias = attention_gradient_with_bias_on(isa, &spec, operands, given, buckets);
                let gradients = [
                    of_bias.map(|(_, table)| table),
                    linear_weight_gradient_on(isa, &dy, &x),
                    rms_norm_weight_gradient_on(isa, &wide_dy, &wide_x, 1e-6),
                    embed_gradient(&wide_dy, &ids, Vocabulary::whole(40), 40),
                ];
                gradients.map(|gradient| bits(&gradient.unwrap()))
            })
        };
        let expected = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == expected, "{isa:?} {dtype:?}: {threads} threads");
        }
    }
}
