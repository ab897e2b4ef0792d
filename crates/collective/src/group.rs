//! The trait that every backend has.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;

use crate::Result;
use crate::alone::Alone;
use crate::unmet::Unmet;

/// How numbers of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduce {
    /// Their sum; `i64` wraps around, and is exact everywhere. Floating-point numbers are added by ascending rank, `bf16` in
    /// f32 and rounded once.
    Sum,
    /// The largest. NaN if one of them is NaN.
    Max,
}

/// A group of ranks, from the side of one of them. Every rank of the group makes the same calls in the same order; one
/// that does not is an error on all of them. After an error the group stays failed, with that error.
///
/// A result lies where the operand lies: every backend takes tensors on a GPU, too. Only over NCCL do they stay there; it
/// takes those of the device that it was connected with. A call with such a tensor returns when the operation is in the
/// GPU's queue, before what the device is given next; it waits for the other ranks only where NCCL has yet to connect
/// them or too many operations are unfinished. Whether all ranks agreed is found out later, so its result counts only when a later operation on a tensor in main memory, or a
/// [`barrier`](Self::barrier), of the same group has succeeded. If the group fails instead, the numbers are not to be used.
///
/// All other calls wait for the other ranks on the thread that makes them. None waits longer than the deadline with which
/// the group was made. Over Gloo, a call that fails looks besides for the reason in the store: half a second, or some seconds
/// if the store does not answer. Over NCCL it is the same, and some ten seconds where a rank has vanished without a word.
pub trait Collective: Send + Sync + Debug {
    /// This rank's number in the group.
    fn rank(&self) -> usize;

    /// How many ranks there are in the group.
    fn size(&self) -> usize;

    /// Every rank's `x` (f32, bf16 or i64, any shape, the same on all ranks) reduced number by number. All ranks get the
    /// same bits; those of one number depend neither on its place nor on the other numbers, nor on the backend.
    ///
    /// # Errors
    /// If `x` cannot be reduced, the ranks do not agree on what they do, or one of them is lost or late.
    fn all_reduce(&self, x: &Tensor, reduce: Reduce) -> Result<Tensor>;

    /// Every rank's `x` (f32, bf16, i64 or u8, of the same shape `[n, ...]`), one after the other by rank:
    /// `[size * n, ...]`.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    fn all_gather(&self, x: &Tensor) -> Result<Tensor>;

    /// `root`'s `x` (f32, bf16, i64 or u8). The other ranks give a tensor of the same shape and type.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce), and if there is no rank `root`.
    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If the ranks do not agree on what they do, or one of them is lost or late.
    fn barrier(&self) -> Result<()>;

    /// Makes every rank's present and later calls fail with `reason`. It waits for no rank.
    fn abort(&self, reason: &str);
}

/// A group of one.
#[must_use]
pub fn alone() -> Arc<dyn Collective> {
    Arc::new(Alone::default())
}

/// The place of `rank` in a group of `size` that has not met yet. Every exchange is refused.
#[must_use]
pub fn unmet(rank: usize, size: usize) -> Arc<dyn Collective> {
    Arc::new(Unmet { rank, size })
}
