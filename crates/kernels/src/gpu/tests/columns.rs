//! Operands that are columns of one matrix, as the results of weights that lie below each other are.

use candle_core::{DType, Device, Tensor};

use super::{bound, compare, frozen, matrix, places};
use crate::gemm::pack::Layout;
use crate::gpu::{Gpu, linear::factors};
use crate::tests::{TYPES, generator, numbers};
use crate::{
    Activation, Attention, Frozen, Segments, attention, attention_gradient, gated, gated_gradient,
    linear_each, linear_gradient, linear_gradient_add,
};

/// The same numbers as columns of one matrix.
fn beside<const N: usize>(tensors: &[Tensor; N]) -> [Tensor; N] {
    let whole = Tensor::cat(tensors, 1).unwrap();
    let mut first = 0;
    tensors.each_ref().map(|tensor| {
        let cols = tensor.dims()[1];
        first += cols;
        whole.narrow(1, first - cols, cols).unwrap()
    })
}

fn bits(tensors: &[Tensor]) -> Vec<Vec<u32>> {
    tensors.iter().map(|t| numbers(t).into_iter().map(f32::to_bits).collect()).collect()
}

/// On every device, `f` gives the same bits for the tensors as they are as for columns of one matrix; its first `beside` results lie
/// beside each other then.
fn same_for_columns<const N: usize>(
    tensors: &[Tensor; N],
    count: usize,
    f: impl Fn(&Device, &[Tensor; N]) -> Vec<Tensor>,
) {
    for place in places() {
        place.run(|device| {
            let tensors = tensors.each_ref().map(|t| t.to_device(device).unwrap());
            let (apart, columns) = (f(device, &tensors), f(device, &beside(&tensors)));
            assert!(bits(&apart) == bits(&columns), "columns have other bits");
            let gpu = Gpu::at(device).unwrap().unwrap();
            let columns: Vec<_> = columns[..count].iter().map(|t| gpu.matrix("test", t).unwrap()).collect();
            assert!(columns.windows(2).all(|pair| pair[0].is_beside(&pair[1])), "results lie apart");
        });
    }
}

#[test]
fn weights_below_each_other_are_one_product_and_so_are_gradients_beside_each_other() {
    let mut g = generator(20);
    for dtype in TYPES {
        for rows in [1, 5, 33] {
            let (x, sum) = (matrix(&mut g, rows, 24, dtype), matrix(&mut g, rows, 24, DType::F32));
            let weights = [8, 3, 16].map(|out| frozen(&mut g, out, 24, dtype));
            let dys = [8, 3, 16].map(|out| matrix(&mut g, rows, out, dtype));
            compare("products of weights below each other", bound(dtype), |device| {
                let [x, sum] = super::on(device, [&x, &sum]);
                let weights = Frozen::to_device_together(&weights, device, dtype).unwrap();
                let each = linear_each(&x, [&weights[0], &weights[1], &weights[2]], dtype).unwrap();
                let dys = dys.each_ref().map(|dy| dy.to_device(device).unwrap());
                let gpu = Gpu::at(device).unwrap();
                let dys = if gpu.is_some() { beside(&dys) } else { dys };
                let terms: Vec<_> = dys.iter().zip(&weights).collect();
                if let Some(gpu) = gpu {
                    assert_eq!(factors(&gpu, "test", &terms, Layout::Rows).unwrap().len(), 1);
                    let [first, second] = [0, 1].map(|i| gpu.matrix("test", &each[i]).unwrap());
                    assert!(first.is_beside(&second) && !second.is_beside(&first));
                }
                let mut results = each.to_vec();
                results.push(linear_gradient(&terms, dtype).unwrap());
                results.push(linear_gradient_add(&sum, &terms).unwrap());
                // In another order they are no columns beside each other, and still the same sum.
                let turned: Vec<_> = terms.iter().rev().copied().collect();
                results.push(linear_gradient(&turned, DType::F32).unwrap());
                results
            });
        }
    }
}

#[test]
fn rows_behind_each_other_are_not_beside_each_other() {
    for place in places() {
        place.run(|device| {
            let gpu = Gpu::at(device).unwrap().unwrap();
            let whole = Tensor::zeros((4, 8), DType::F32, device).unwrap();
            let rows = |first: usize| whole.narrow(0, first, 2).unwrap();
            let columns = |first: usize, count: usize| whole.narrow(1, first, count).unwrap();
            let other = Tensor::zeros((4, 8), DType::F32, device).unwrap().narrow(1, 4, 4).unwrap();
            for (left, right, expected) in [
                (columns(0, 4), columns(4, 4), true),
                (columns(0, 3), columns(3, 1), true),
                (columns(0, 3), columns(4, 4), false),
                (columns(4, 4), columns(0, 4), false),
                (columns(0, 4), other, false),
                (rows(0), rows(1), false),
                (columns(0, 4), columns(4, 4).narrow(0, 0, 3).unwrap(), false),
                (columns(4, 4), columns(0, 4).narrow(0, 1, 3).unwrap(), false),
            ] {
                let [left, right] = [&left, &right].map(|t| gpu.matrix("test", t).unwrap());
                assert_eq!(left.is_beside(&right), expected);
            }
        });
    }
}

#[test]
fn attention_of_columns_is_attention() {
    let mut g = generator(21);
    for dtype in TYPES {
        for (heads, width) in [(2, 64), (3, 8), (2, 5)] {
            let rows = Segments::new([70, 1, 33]);
            let [q, k, v, dy] = [(); 4].map(|()| matrix(&mut g, 104, heads * width, dtype));
            same_for_columns(&[q, k, v], 3, |device, [q, k, v]| {
                let rows = rows.fresh();
                let spec = Attention {
                    queries: &rows,
                    keys: &rows,
                    heads,
                    bias: None,
                    causal: true,
                    prefix: 0,
                    dropout: None,
                };
                let attended = attention(&spec, q, k, v).unwrap();
                let dy = dy.to_device(device).unwrap();
                let mut results = attention_gradient(&spec, [q, k, v], &attended, &dy).unwrap().to_vec();
                results.push(attended.output);
                results
            });
        }
    }
}

#[test]
fn gates_of_columns_are_gates() {
    let mut g = generator(22);
    for dtype in TYPES {
        for (rows, columns) in [(1, 40), (7, 24), (300, 96), (5, 13)] {
            let [gate, up, dy] = [(); 3].map(|()| matrix(&mut g, rows, columns, dtype));
            same_for_columns(&[gate, up], 2, |device, [gate, up]| {
                let dy = dy.to_device(device).unwrap();
                let (d_gate, d_up) = gated_gradient(Activation::GeluNew, &dy, gate, up).unwrap();
                vec![d_gate, d_up, gated(Activation::GeluNew, gate, up).unwrap()]
            });
        }
    }
}
