//! Attention to rows of which no keys and values are made.

use candle_core::DType;

use super::{bound, compare, frozen, matrix, on, places};
use crate::tests::{TYPES, generator, numbers};
use crate::{Absorbed, Readers, Segments, absorbed_attention, absorbed_attention_gradient};

/// Queries and rows of each example, heads, numbers of a head, and width of the rows.
type Shape = (&'static [(usize, usize)], usize, usize, usize);
/// No rows, no queries, whole tiles and one row more; widths that are no multiples of anything; three tiles of everything.
const SHAPES: [Shape; 4] = [
    (&[(4, 90), (1, 3), (0, 5), (3, 0), (2, 128)], 3, 8, 40),
    (&[(4, 65), (11, 64)], 6, 64, 128),
    (&[(1, 1), (30, 7)], 2, 5, 21),
    (&[(33, 130)], 4, 8, 136),
];
/// T5-XL's heads and width, which only a GPU takes in a moment.
const LARGE: Shape = (&[(4, 612), (2, 130)], 32, 64, 2048);

#[test]
fn absorbed_attention_and_its_gradients_equal_the_cpus() {
    for dtype in TYPES {
        let large = cfg!(feature = "cuda") && dtype == DType::BF16;
        for (lengths, heads, k, d) in SHAPES.into_iter().chain(large.then_some(LARGE)) {
            let mut g = generator(23);
            let queries = Segments::new(lengths.iter().map(|l| l.0));
            let rows = Segments::new(lengths.iter().map(|l| l.1));
            let weights = [(); 2].map(|()| frozen(&mut g, heads * k, d, dtype));
            let [q, dy] = [(); 2].map(|()| matrix(&mut g, queries.total(), heads * k, dtype));
            // Scores of a size that a trained model has.
            let q = (q * (1.0 / (4.0 * ((k * d) as f64).sqrt()))).unwrap();
            let (x, sum) =
                (matrix(&mut g, rows.total(), d, dtype), matrix(&mut g, rows.total(), d, DType::F32));
            for summed in [false, true] {
                compare("absorbed attention", 2.0 * bound(dtype), |device| {
                    let [q, dy, x, sum] = on(device, [&q, &dy, &x, &sum]);
                    let [wk, wv] = weights.each_ref().map(|w| w.to_device(device, dtype).unwrap());
                    let readers = Readers::new(&queries.fresh(), &rows.fresh(), heads);
                    let spec = Absorbed { readers: &readers, k: &wk, v: &wv };
                    let attended = absorbed_attention(&spec, &q, &x).unwrap();
                    let sum = summed.then_some(&sum);
                    let (dq, dx) = absorbed_attention_gradient(&spec, &attended, &x, &dy, sum).unwrap();
                    vec![attended.output, dq, dx]
                });
            }
        }
    }
}

/// On CUDA this is what the choice of algorithms aims at.
#[test]
fn an_examples_numbers_do_not_depend_on_those_beside_it() {
    let (heads, k, d) = (4, 16, 64);
    for dtype in TYPES {
        let mut g = generator(24);
        let lengths = [(3, 40), (16, 70), (1, 9)];
        let weights = [(); 2].map(|()| frozen(&mut g, heads * k, d, dtype));
        let [q, dy] = [(); 2].map(|()| (matrix(&mut g, 20, heads * k, dtype) * 0.02).unwrap());
        let x = matrix(&mut g, 119, d, dtype);
        for place in places() {
            place.run(|device| {
                let [q, dy, x] = on(device, [&q, &dy, &x]);
                let [wk, wv] = weights.each_ref().map(|w| w.to_device(device, dtype).unwrap());
                // Results of the examples from `first` on, and where theirs begin among the queries and the rows.
                let run = |first: usize| {
                    let before =
                        |of: fn(&(usize, usize)) -> usize| lengths[..first].iter().map(of).sum::<usize>();
                    let (query, row) = (before(|l| l.0), before(|l| l.1));
                    let [queries, rows] = [|l: &(usize, usize)| l.0, |l: &(usize, usize)| l.1]
                        .map(|of| Segments::new(lengths[first..].iter().map(of)));
                    let readers = Readers::new(&queries, &rows, heads);
                    let spec = Absorbed { readers: &readers, k: &wk, v: &wv };
                    let [q, dy] = [&q, &dy].map(|t| t.narrow(0, query, 20 - query).unwrap());
                    let x = x.narrow(0, row, 119 - row).unwrap();
                    let attended = absorbed_attention(&spec, &q, &x).unwrap();
                    let (dq, dx) = absorbed_attention_gradient(&spec, &attended, &x, &dy, None).unwrap();
                    [attended.output, dq, dx]
                };
                let all = run(0);
                for (first, places) in [(1, [3, 3, 40]), (2, [19, 19, 110])] {
                    for ((alone, all), place) in run(first).iter().zip(&all).zip(places) {
                        let beside = all.narrow(0, place, all.dims()[0] - place).unwrap();
                        let [alone, beside] = [alone, &beside].map(numbers);
                        assert!(
                            alone.iter().zip(&beside).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{dtype:?}"
                        );
                    }
                }
            });
        }
    }
}
