//! A sum of gradients that does not depend on the order of its terms.
//!
//! Floating-point addition is not associative, integer addition is. So the terms of one sum first agree on
//! the exponent of the largest value among all of them ([`max_exponent`], itself a maximum and so free of
//! order), each term is rounded to multiples of a fixed fraction of it and added as integers ([`quantize`]),
//! and the total becomes f32 again ([`dequantize`]). However the terms are grouped (microbatches, threads,
//! replicas), the bits are the same.
//!
//! With [`FRACTION_BITS`] = 44, values down to 2^-20 of the largest are added without any loss, and smaller ones
//! are rounded by at most 2^-44 of the largest.

use crate::{Error, Result};

/// The unit of the sum is this many bits below the power of two above the largest value.
pub const FRACTION_BITS: i32 = 44;

/// The most terms that a sum may have: so many largest values still fit in an `i64`.
pub const MAX_TERMS: u64 = 1 << (62 - FRACTION_BITS);

/// The exponent of a sum whose terms are all 0: that of the smallest positive f32.
pub const ZERO_EXPONENT: i32 = -149;

/// The exponent `e` of the largest value: `2^e <= max |value| < 2^(e + 1)`. The exponent of a sum is the
/// maximum over its terms.
///
/// # Errors
/// If a value is not finite: the message names its index.
pub fn max_exponent(values: &[f32]) -> Result<i32> {
    let largest = values.iter().fold(0u32, |largest, v| largest.max(v.abs().to_bits()));
    if largest >= f32::INFINITY.to_bits() {
        let index = values.iter().position(|v| !v.is_finite()).unwrap_or_default();
        let what = format!("element {index} is {}", values[index]);
        return Err(Error::Sum { what });
    }
    if largest == 0 {
        return Ok(ZERO_EXPONENT);
    }
    // Every f32 is a normal f64, subnormal ones too, so that f64's exponent field says it.
    let bits = f64::from(f32::from_bits(largest)).to_bits();
    Ok((bits >> 52) as i32 - 1023)
}

/// Adding this to an f64 below 2^51 rounds it to an integer, halves to the even one, and leaves that integer
/// in the last bits: as exact as a conversion, and the compiler makes vectors of it on any machine.
const ROUND: f64 = 1.5 * (1u64 << 52) as f64;

/// Adds `values`, in units of `2^(exponent + 1 - FRACTION_BITS)`, to `sum`. What lies between two units is
/// rounded to the nearest, halves to the even one.
///
/// # Errors If a value does not lie below `2^(exponent + 1)` (also when it is not finite), or more than
/// [`MAX_TERMS`] terms were added. Then `sum` is spoilt.
///
/// # Panics
/// If `sum` has another length than `values`.
pub fn quantize(values: &[f32], exponent: i32, sum: &mut [i64]) -> Result<()> {
    assert_eq!(values.len(), sum.len(), "a term has another length than its sum");
    let scale = 2f64.powi(FRACTION_BITS - 1 - exponent);
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
        let what = format!("more than {MAX_TERMS} terms were added; make the batch smaller");
        return Err(Error::Sum { what });
    }
    Ok(())
}

/// The sum as f32, rounded to the nearest. A sum too large for f32 is infinite.
#[must_use]
pub fn dequantize(sum: &[i64], exponent: i32) -> Vec<f32> {
    let unit = 2f64.powi(exponent + 1 - FRACTION_BITS);
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
    fn what_is_not_finite_is_refused_with_its_index() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = max_exponent(&[1.0, 2.0, bad]).unwrap_err().to_string();
            assert!(error.contains("element 2"), "{error}");
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
