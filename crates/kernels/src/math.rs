//! Elementary functions and sums, written so that loops over them become vector code.
//!
//! None of them uses fused multiply-add, so that each gives the same bits on every path.

/// Lanes of a sum over a row. The lanes are added up in a fixed order, so that a sum does not depend on the path either.
const LANES: usize = 32;

/// The sum of `term([xs[0][i], xs[1][i], ...])` over all `i`; the slices are of one length.
#[inline(always)]
pub(crate) fn sum<T: Copy, const N: usize>(xs: [&[T]; N], term: impl Fn([T; N]) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let n = xs[0].len();
    let whole = n / LANES * LANES;
    let xs = xs.map(|x| &x[..n]);
    for from in (0..whole).step_by(LANES) {
        let parts = xs.map(|x| &x[from..from + LANES]);
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += term(parts.map(|part| part[l]));
        }
    }
    for i in whole..n {
        lanes[i - whole] += term(xs.map(|x| x[i]));
    }
    fold(lanes, |a, b| a + b)
}

/// The largest number; NaN is passed over, and an empty slice gives minus infinity.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    for x in chunks.remainder() {
        lanes[0] = larger(lanes[0], *x);
    }
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *x);
        }
    }
    fold(lanes, larger)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `e^x` to about 1e-7 relative: `x = n ln 2 + r`, then a polynomial in `r` (Cephes' `expf`).
///
/// Below -87.3 the result is 0 in effect (about 1e-38); above 88.73 it is infinite; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // NaN fails both comparisons, and so goes through.
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let e = p * r * r + r + 1.0;
    // 2^n in two factors, because 2^128 is no f32. Of NaN they are anything, and the product is NaN all the same.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    e * power(half) * power(n.wrapping_sub(half))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent, to about 1e-7 absolute.
#[inline(always)]
#[must_use]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 * sigmoid(-2.0 * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        let worst = (-8730..8872)
            .map(|i| i as f32 * 0.01 + 0.003)
            .map(|x| (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs())
            .fold(0.0, f64::max);
        println!("largest relative error of exp: {worst:e}");
        assert!(worst < 2.5e-7, "{worst}");
        for x in [88.73, 89.0, 100.0, f32::MAX, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 2e-38 && exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_right_to_a_unit_of_one() {
        let worst = (-4000..4000)
            .map(|i| i as f32 * 0.005 + 0.001)
            .map(|x| (f64::from(tanh(x)) - f64::from(x).tanh()).abs())
            .fold(0.0, f64::max);
        println!("largest error of tanh: {worst:e}");
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(0.0)), (1.0, -1.0, 0.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn sum_and_max_cover_every_number() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| (i * 7 % 13) as f32).collect();
            assert_eq!(sum([&x[..]], |[x]| x), x.iter().sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
