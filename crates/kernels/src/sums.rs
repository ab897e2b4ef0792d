//! Sums of gradients that do not depend on the order of their terms.
//!
//! Floating-point addition is not associative, integer addition is. So the terms of one sum first agree on
//! the exponent of the largest value among all of them ([`max_exponents`], itself a maximum and so free of
//! order), each term is rounded to multiples of a fixed fraction of it and added as integers ([`Sums`]),
//! and the total becomes f32 again ([`dequantized`]). However the terms are grouped (microbatches, threads,
//! replicas), and on whichever device they lie, the bits are the same.
//!
//! With [`FRACTION_BITS`] = 44, values down to 2^-20 of the largest are added without any loss, and smaller ones
//! are rounded by at most 2^-44 of the largest.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::gpu::{self, Gpu};
use crate::tensor::View;
use crate::{Error, Result};

/// The unit of the sum is this many bits below the power of two above the largest value.
pub const FRACTION_BITS: i32 = 44;

/// The most terms that a sum may have: so many largest values still fit in an `i64`.
pub const MAX_TERMS: u64 = 1 << (62 - FRACTION_BITS);

/// The exponent of a sum whose terms are all 0: that of the smallest positive f32.
pub const ZERO_EXPONENT: i32 = -149;

/// The exponent `e` of each term's largest value: `2^e <= max |value| < 2^(e + 1)`; none for a term with a value that is not
/// finite. The exponent of a sum is the maximum over its terms. Waits for the device.
///
/// # Errors
/// If a term is not f32, or they lie on different devices.
pub fn max_exponents(terms: &[&Tensor]) -> Result<Vec<Option<i32>>> {
    let op = "max_exponents";
    if let Some(first) = terms.first()
        && let Some(gpu) = Gpu::of(first)?
    {
        terms.iter().try_for_each(|term| expect_f32(op, term))?;
        return Ok(gpu::rows::largest_bits(&gpu, terms)?.into_iter().map(exponent).collect());
    }
    terms.iter().map(|term| Ok(max_exponent(View::new(op, term)?.slice()?))).collect()
}

fn expect_f32(op: &'static str, term: &Tensor) -> Result<()> {
    match term.dtype() {
        DType::F32 => Ok(()),
        other => Err(Error::Shape { op, what: format!("a term is {other:?} where f32 is expected") }),
    }
}

fn max_exponent(values: &[f32]) -> Option<i32> {
    exponent(values.iter().fold(0u32, |largest, v| largest.max(v.abs().to_bits())))
}

/// The exponent of an absolute value, given by its bits; none if it is not finite.
fn exponent(bits: u32) -> Option<i32> {
    if bits >= f32::INFINITY.to_bits() {
        return None;
    }
    if bits == 0 {
        return Some(ZERO_EXPONENT);
    }
    // Every f32 is a normal f64, subnormal ones too, so that f64's exponent field says it.
    let bits = f64::from(f32::from_bits(bits)).to_bits();
    Some((bits >> 52) as i32 - 1023)
}

/// Sums of terms, one after another, where the terms lie.
pub struct Sums {
    place: Place,
    /// Of the sum that has most of them.
    terms: u64,
}

enum Place {
    Host(Vec<i64>),
    Gpu(Gpu, Tensor),
}

impl Sums {
    /// `len` numbers in all, each 0.
    ///
    /// # Errors
    /// If the device has no room for them.
    pub fn zeros(len: usize, device: &Device) -> Result<Self> {
        let place = match Gpu::at(device)? {
            Some(gpu) => Place::Gpu(gpu, Tensor::zeros(len, DType::I64, device)?),
            None => Place::Host(vec![0; len]),
        };
        Ok(Self { place, terms: 0 })
    }

    /// Adds `term`, in units of `2^(exponent + 1 - FRACTION_BITS)`, to the numbers from `first` on. What lies between two units is
    /// rounded to the nearest, halves to the even one.
    ///
    /// # Errors
    /// If a value does not lie below `2^(exponent + 1)` (on a GPU that is not looked at), more than [`MAX_TERMS`] terms were added, or
    /// the term is not f32 or lies elsewhere. Then the sums are spoilt.
    pub fn add(&mut self, first: usize, term: &Tensor, exponent: i32) -> Result<()> {
        let op = "sums";
        self.terms += 1;
        match &mut self.place {
            Place::Host(sums) => {
                quantize(View::new(op, term)?.slice()?, exponent, &mut sums[first..][..term.elem_count()])
            }
            Place::Gpu(gpu, sums) => {
                expect_f32(op, term)?;
                if self.terms > MAX_TERMS {
                    return Err(too_many_terms());
                }
                gpu::rows::quantize_add(gpu, sums, first, term, scale(exponent))
            }
        }
    }

    /// The sums as a tensor of i64 numbers, where the terms lie.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn into_tensor(self) -> Result<Tensor> {
        match self.place {
            Place::Host(sums) => {
                let len = sums.len();
                Ok(Tensor::from_vec(sums, len, &Device::Cpu)?)
            }
            Place::Gpu(_, sums) => Ok(sums),
        }
    }
}

/// Part of the sums as f32, rounded to the nearest. A sum too large for f32 is infinite. Waits for the device.
///
/// # Errors
/// If the range is not within the sums, or the device fails.
pub fn dequantized(sums: &Tensor, range: Range<usize>, exponent: i32) -> Result<Vec<f32>> {
    if let Some(gpu) = Gpu::of(sums)? {
        let values = gpu::rows::dequantize(&gpu, sums, (range.start, range.len()), unit(exponent))?;
        return Ok(values.to_vec1()?);
    }
    let view = View::new("dequantized", sums)?;
    Ok(dequantize(&view.slice::<i64>()?[range], exponent))
}

/// Units in 1.
fn scale(exponent: i32) -> f64 {
    2f64.powi(FRACTION_BITS - 1 - exponent)
}

/// The unit of a sum.
fn unit(exponent: i32) -> f64 {
    2f64.powi(exponent + 1 - FRACTION_BITS)
}

fn too_many_terms() -> Error {
    Error::Sum { what: format!("more than {MAX_TERMS} terms were added; make the batch smaller") }
}

/// Adding this to an f64 below 2^51 rounds it to an integer, halves to the even one, and leaves that integer
/// in the last bits: as exact as a conversion, and the compiler makes vectors of it on any machine.
const ROUND: f64 = 1.5 * (1u64 << 52) as f64;

/// As [`Sums::add`], of one term and its sum.
fn quantize(values: &[f32], exponent: i32, sum: &mut [i64]) -> Result<()> {
    let scale = scale(exponent);
    let limit = 2f64.powi(FRACTION_BITS);
    let (mut fits, mut overflow) = (true, 0);
    for (value, sum) in values.iter().zip(sum.iter_mut()) {
        let scaled = f64::from(*value) * scale;
        fits &= scaled.abs() < limit;
        let units = ((scaled + ROUND).to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
        let total = sum.wrapping_add(units);
        // The sign bit is set where the total has another sign than both of what was added.
        overflow |= (*sum ^ total) & (units ^ total);
        *sum = total;
    }
    if !fits {
        let bad = |v: &f32| !v.is_finite() || (f64::from(*v) * scale).abs() >= limit;
        let index = values.iter().position(bad).unwrap_or_default();
        let what = format!("element {index} is {}, not below 2^{}", values[index], exponent + 1);
        return Err(Error::Sum { what });
    }
    if overflow < 0 {
        return Err(too_many_terms());
    }
    Ok(())
}

fn dequantize(sum: &[i64], exponent: i32) -> Vec<f32> {
    let unit = unit(exponent);
    sum.iter().map(|s| (*s as f64 * unit) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn total(groups: &[Vec<Vec<f32>>], exponent: i32) -> Vec<u32> {
        let len = groups[0][0].len();
        let mut whole = vec![0i64; len];
        for group in groups {
            let mut part = vec![0i64; len];
            for term in group {
                quantize(term, exponent, &mut part).unwrap();
            }
            whole.iter_mut().zip(part).for_each(|(w, p)| *w += p);
        }
        dequantize(&whole, exponent).into_iter().map(f32::to_bits).collect()
    }

    fn exponent_of(terms: &[Vec<f32>]) -> i32 {
        terms.iter().map(|t| max_exponent(t).unwrap()).max().unwrap()
    }

    /// Any finite f32, subnormal and huge ones too.
    fn finite() -> impl Strategy<Value = f32> {
        any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |v| v.is_finite())
    }

    proptest! {
        #[test]
        fn any_order_and_grouping_gives_the_same_bits(
            terms in prop::collection::vec(prop::collection::vec(finite(), 5), 1..12),
            order in prop::collection::vec(any::<u64>(), 12),
            cut in 1usize..12,
        ) {
            let exponent = exponent_of(&terms);
            let straight = total(std::slice::from_ref(&terms), exponent);
            let mut keyed: Vec<_> = terms.iter().cloned().zip(order).collect();
            keyed.sort_by_key(|(_, key)| *key);
            let shuffled: Vec<_> = keyed.into_iter().map(|(term, _)| term).collect();
            let groups: Vec<_> = shuffled.chunks(cut).map(<[_]>::to_vec).collect();
            prop_assert_eq!(exponent_of(&shuffled), exponent);
            prop_assert_eq!(total(&groups, exponent), straight);
        }

        #[test]
        fn the_sum_is_as_near_as_the_unit_allows(
            terms in prop::collection::vec(prop::collection::vec(-1e3f32..1e3, 3), 1..40),
        ) {
            let exponent = exponent_of(&terms);
            let sum = total(std::slice::from_ref(&terms), exponent);
            for (i, bits) in sum.into_iter().enumerate() {
                let exact: f64 = terms.iter().map(|t| f64::from(t[i])).sum();
                let half_unit = 2f64.powi(exponent - FRACTION_BITS);
                let slack = terms.len() as f64 * half_unit + exact.abs() * 2f64.powi(-24);
                prop_assert!((f64::from(f32::from_bits(bits)) - exact).abs() <= slack);
            }
        }

        #[test]
        fn one_term_near_the_largest_comes_back_unchanged(term in prop::collection::vec(1e-3f32..1e3, 1..8)) {
            let exponent = max_exponent(&term).unwrap();
            let back = total(&[vec![term.clone()]], exponent);
            prop_assert_eq!(back, term.into_iter().map(f32::to_bits).collect::<Vec<_>>());
        }
    }

    #[test]
    fn exponents_are_those_of_the_powers_of_two_below() {
        for (value, exponent) in [(1.0, 0), (1.999, 0), (2.0, 1), (-0.75, -1), (f32::MAX, 127), (1e-45, -149)]
        {
            assert_eq!(max_exponent(&[0.0, value]).unwrap(), exponent, "of {value}");
        }
        assert_eq!(max_exponent(&[0.0, -0.0]).unwrap(), ZERO_EXPONENT);
        assert_eq!(max_exponent(&[]).unwrap(), ZERO_EXPONENT);
        assert_eq!(max_exponent(&[f32::MIN_POSITIVE / 2.0]).unwrap(), -127);
    }

    #[test]
    fn the_extremes_of_f32_are_summed() {
        for value in [f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            let exponent = max_exponent(&[value]).unwrap();
            assert_eq!(total(&[vec![vec![value]]], exponent), [value.to_bits()]);
        }
        let exponent = max_exponent(&[f32::MAX]).unwrap();
        let sum = total(&[vec![vec![f32::MAX], vec![f32::MAX], vec![-f32::MAX]]], exponent);
        assert_eq!(sum, [f32::MAX.to_bits()], "the partial sum is beyond f32, the total is not");
    }

    #[test]
    fn halves_of_a_unit_are_rounded_to_the_even_one() {
        // With the exponent 43 the unit is 1.
        let values = [0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, -2.500_000_2, 8_388_609.0];
        let mut sum = [0; 8];
        quantize(&values, FRACTION_BITS - 1, &mut sum).unwrap();
        assert_eq!(sum, [0, 2, 2, 0, -2, 0, -3, 8_388_609]);
        let largest = [f32::from_bits((2f32.powi(44)).to_bits() - 1)];
        let mut sum = [0];
        quantize(&largest, FRACTION_BITS - 1, &mut sum).unwrap();
        assert_eq!(sum, [(1 << 44) - (1 << 20)]);
    }

    #[test]
    fn what_is_not_finite_has_no_exponent_and_is_refused_with_its_index() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(max_exponent(&[1.0, 2.0, bad]), None);
            let error = quantize(&[1.0, 2.0, bad], 5, &mut [0; 3]).unwrap_err().to_string();
            assert!(error.contains("element 2"), "{error}");
        }
    }

    #[test]
    fn a_value_above_the_agreed_exponent_is_refused() {
        let error = quantize(&[0.5, 4.0], 1, &mut [0; 2]).unwrap_err().to_string();
        assert_eq!(error, "sum of gradients: element 1 is 4, not below 2^2");
    }

    #[test]
    fn a_sum_that_leaves_the_integers_is_refused() {
        let mut sum = [i64::MAX - 10];
        let error = quantize(&[1.5], 0, &mut sum).unwrap_err().to_string();
        assert!(error.contains("more than 262144 terms"), "{error}");
        let largest = 2f64.powi(FRACTION_BITS);
        assert!(MAX_TERMS as f64 * largest < i64::MAX as f64);
    }
}
