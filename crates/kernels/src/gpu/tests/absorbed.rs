//! Attention to rows of which no keys and values are made.

use candle_core::DType;

use super::{bound, compare, frozen, matrix, on, places};
use crate::tests::{TYPES, generator, numbers};
use crate::{Absorbed, Readers, RowGradients, Segments, absorbed_attention};

/// Queries and rows of each example, heads, numbers of a head, and width of the rows.
type Shape = (&'static [(usize, usize)], usize, usize, usize);
/// No rows, no queries, whole tiles and one row more; widths that are no multiples of anything; three tiles of everything; and so few
/// queries that six layers wait for each other.
const SHAPES: [Shape; 5] = [
    (&[(4, 90), (1, 3), (0, 5), (3, 0), (2, 128)], 3, 8, 40),
    (&[(4, 65), (11, 64)], 6, 64, 128),
    (&[(1, 1), (30, 7)], 2, 5, 21),
    (&[(33, 130)], 4, 8, 136),
    (&[(1, 70), (1, 100)], 2, 8, 40),
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
            let q = matrix(&mut g, queries.total(), heads * k, dtype);
            // Scores of a size that a trained model has.
            let q = (q * (1.0 / (4.0 * ((k * d) as f64).sqrt()))).unwrap();
            let x = matrix(&mut g, rows.total(), d, dtype);
            for layers in [1, 8] {
                let dys: Vec<_> =
                    (0..layers).map(|_| matrix(&mut g, queries.total(), heads * k, dtype)).collect();
                compare("absorbed attention", 2.0 * bound(dtype), |device| {
                    let [q, x] = on(device, [&q, &x]);
                    let [wk, wv] = weights.each_ref().map(|w| w.to_device(device, dtype).unwrap());
                    let readers = Readers::new(&queries.fresh(), &rows.fresh(), heads);
                    let spec = Absorbed { readers: &readers, k: &wk, v: &wv };
                    let attended = absorbed_attention(&spec, &q, &x).unwrap();
                    let mut sum = RowGradients::new(&readers, &x);
                    let mut all: Vec<_> = dys
                        .iter()
                        .map(|dy| sum.add([&wk, &wv], &attended, &dy.to_device(device).unwrap()).unwrap())
                        .collect();
                    all.extend([attended.output, sum.finish().unwrap().unwrap()]);
                    all
                });
            }
        }
    }
}

/// On CUDA this is what the choice of algorithms aims at. How many layers' parts wait for each other depends on the examples.
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
                    let mut sum = RowGradients::new(&readers, &x);
                    let [dq, ..] = [(); 4].map(|()| sum.add([&wk, &wv], &attended, &dy).unwrap());
                    [attended.output, dq, sum.finish().unwrap().unwrap()]
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
