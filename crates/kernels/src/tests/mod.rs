//! Tests of all operations on every path that the machine has, against plain f64 code.

mod absorbed;
mod attention;
mod elementwise;
mod gradients;
mod invariance;
mod products;
mod reference;
mod refusals;

use candle_core::{DType, Device, Tensor};
use half::bf16;

use crate::loss::cross_entropy_gradient_on;
use crate::rng::Philox;
use crate::{Frozen, Isa, LossSlope, Softmax, Targets, Vocabulary};

pub(crate) const TYPES: [DType; 2] = [DType::BF16, DType::F32];

/// Half a unit in the last place of 1: the largest relative error of rounding once.
const F32_ROUNDING: f64 = 1.0 / 16_777_216.0;
const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// The paths that this machine has.
fn paths() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// The token losses over a whole vocabulary, and the gradient of their scaled sum to the logits.
fn cross_entropy(
    isa: Isa,
    logits: &Tensor,
    (ids, scale): (&[u32], &[f32]),
    z_loss: f32,
    out: DType,
) -> (Vec<f32>, Tensor) {
    let targets = Targets { ids, vocabulary: Vocabulary::whole(logits.dims()[1]) };
    let softmax = Softmax::new_on(isa, logits, targets).unwrap();
    let slope = LossSlope { normalisers: &softmax.normalisers().unwrap(), scale, z_loss };
    (
        numbers(&softmax.losses(z_loss).unwrap()),
        cross_entropy_gradient_on(isa, logits, targets, slope, out).unwrap(),
    )
}

/// A generator of a test's numbers; says its seed, so that a failure can be repeated.
pub(crate) fn generator(seed: u64) -> Philox {
    println!("seed {seed}");
    Philox::new(seed, &[])
}

/// Normal numbers that the type can hold.
pub(crate) fn normal(g: &mut Philox, n: usize, dtype: DType) -> Vec<f32> {
    (0..n).map(|_| held(g.normal(), dtype)).collect()
}

/// The nearest number of the type.
fn held(x: f32, dtype: DType) -> f32 {
    if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x }
}

fn rounding(dtype: DType) -> f64 {
    if dtype == DType::BF16 { BF16_ROUNDING } else { F32_ROUNDING }
}

pub(crate) fn matrix(values: &[f32], rows: usize, cols: usize, dtype: DType) -> Tensor {
    Tensor::from_slice(values, (rows, cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

pub(crate) fn frozen(values: &[f32], rows: usize, cols: usize, dtype: DType) -> Frozen {
    if dtype == DType::BF16 {
        return Frozen::from_bf16(values.iter().map(|x| bf16::from_f32(*x)).collect(), rows, cols);
    }
    Frozen::from_f32(values.to_vec(), rows, cols)
}

/// All numbers, exactly.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// All numbers as bits: NaN equals itself, and 0 is not -0.
fn bits(tensor: &Tensor) -> Vec<u32> {
    numbers(tensor).into_iter().map(f32::to_bits).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// Holds each number against its own bound.
fn assert_close(what: &str, found: &[f32], expected: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= bound(i),
            "{what}: number {i} is {found}, not {expected}; the bound is {:e}",
            bound(i)
        );
    }
}

/// The largest number without its sign, at least the smallest normal one.
fn largest(values: &[f64]) -> f64 {
    values.iter().fold(1e-37, |a, x| a.max(x.abs()))
}
