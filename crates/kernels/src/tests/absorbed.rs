//! Attention to rows of which no keys and values are made, against attention to those that are.

use candle_core::DType;

use super::{assert_close, frozen, generator, matrix, normal, numbers, paths};
use crate::attention::absorbed::{absorbed_attention_gradient_on, absorbed_attention_on};
use crate::attention::{attention_gradient_on, attention_on};
use crate::linear::{linear_gradient_on, linear_on};
use crate::{Absorbed, Attention, Readers, Segments, add};

/// Queries and rows of each example, heads, numbers of a head, and width of the rows.
type Shape = (&'static [(usize, usize)], usize, usize, usize);
const SHAPES: [Shape; 3] = [
    (&[(4, 90), (1, 3), (0, 5), (2, 130)], 3, 8, 40),
    (&[(4, 20), (7, 64)], 12, 64, 96),
    (&[(1, 1), (30, 7)], 2, 5, 21),
];

#[test]
fn it_is_the_attention_to_keys_and_values_and_so_are_its_gradients() {
    for isa in paths() {
        for (lengths, heads, k, d) in SHAPES {
            let mut g = generator(70);
            let queries = Segments::new(lengths.iter().map(|l| l.0));
            let rows = Segments::new(lengths.iter().map(|l| l.1));
            let inner = heads * k;
            let weights = [(); 2].map(|()| {
                let values: Vec<f32> =
                    normal(&mut g, inner * d, DType::F32).iter().map(|x| 0.2 * x).collect();
                frozen(&values, inner, d, DType::F32)
            });
            let [wk, wv] = &weights;
            let mut random = |rows: usize, cols: usize| {
                matrix(&normal(&mut g, rows * cols, DType::F32), rows, cols, DType::F32)
            };
            let (q, dy) = (random(queries.total(), inner), random(queries.total(), inner));
            let (x, sum) = (random(rows.total(), d), random(rows.total(), d));
            let spec = Attention {
                queries: &queries,
                keys: &rows,
                heads,
                bias: None,
                causal: false,
                prefix: 0,
                dropout: None,
            };
            let [keys, values] = [wk, wv].map(|w| linear_on(isa, &x, w, DType::F32).unwrap());
            let expected = attention_on(isa, &spec, &q, &keys, &values).unwrap();
            let [dq, dk, dv] =
                attention_gradient_on(isa, &spec, [&q, &keys, &values], &expected, &dy).unwrap();
            let dx = linear_gradient_on(isa, &[(&dk, wk), (&dv, wv)], DType::F32).unwrap();

            let readers = Readers::new(&queries, &rows, heads);
            let absorbed = Absorbed { readers: &readers, k: wk, v: wv };
            let found = absorbed_attention_on(isa, &absorbed, &q, &x).unwrap();
            for sum in [None, Some(&sum)] {
                let gradients =
                    absorbed_attention_gradient_on(isa, &absorbed, &found, (&x, &dy), sum).unwrap();
                let dx = sum.map_or_else(|| dx.clone(), |sum| add(sum, &dx).unwrap());
                for (name, found, expected) in [
                    ("output", &found.output, &expected.output),
                    ("gradient to queries", &gradients.0, &dq),
                    ("gradient to rows", &gradients.1, &dx),
                ] {
                    let expected: Vec<f64> = numbers(expected).iter().map(|x| f64::from(*x)).collect();
                    let largest = expected.iter().fold(1e-3f64, |a, x| a.max(x.abs()));
                    assert_close(name, &numbers(found), &expected, |_| 2e-5 * largest);
                }
            }
        }
    }
}
