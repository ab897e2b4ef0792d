//! The conjugate pairs of tensor parallelism (Shoeybi et al. 2019, "Megatron-LM", section 3: their `f` and `g`).
//!
//! A region of a model between the two has its weights cut over the ranks of a group. What comes in is the same on
//! every rank; what each rank computes is one term of what goes out. An all-reduce in one direction is the identity in
//! the other. To forget one of them gives numbers that look right and are wrong, so they are named here in pairs.

use candle_core::Tensor;

use crate::{Collective, Reduce, Result};

/// Into the region: every rank has `x` already, and goes on with it.
#[must_use]
pub fn copy_to_region(x: &Tensor) -> Tensor {
    x.clone()
}

/// The gradient of [`copy_to_region`] to `x`: every rank's use of `x` adds to it, so `dy` is summed over the group.
///
/// # Errors
/// As [`Collective::all_reduce`].
pub fn copy_to_region_gradient(group: &dyn Collective, dy: &Tensor) -> Result<Tensor> {
    group.all_reduce(dy, Reduce::Sum)
}

/// Out of the region: the ranks' `x` are terms of a sum, which every rank gets.
///
/// # Errors
/// As [`Collective::all_reduce`].
pub fn reduce_from_region(group: &dyn Collective, x: &Tensor) -> Result<Tensor> {
    group.all_reduce(x, Reduce::Sum)
}

/// The gradient of [`reduce_from_region`] to `x`: what follows the region is computed alike on every rank and counts
/// once, so `dy` is each term's gradient as it is.
#[must_use]
pub fn reduce_from_region_gradient(dy: &Tensor) -> Tensor {
    dy.clone()
}
