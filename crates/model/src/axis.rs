//! The tensor axis: the ranks that hold one backbone between them, and what they exchange in a pass.
//!
//! Sub-layers are cut as Megatron cuts them (Shoeybi et al. 2019): the first weight by its outputs, the last by its inputs, so
//! that a pass adds up once forward, behind the last product, and once backward, behind the first one's gradient.

use std::sync::Arc;

use candle_core::Tensor;
use incipit_collective::{Collective, Ranks, Reduce, alone, pairs, unmet};
use incipit_kernels::{Softmax, Vocabulary};
use incipit_mesh::{Axis, Shard};

use crate::Result;

/// This rank's place on the tensor axis, and the group that it exchanges with.
#[derive(Clone, Debug)]
pub struct TensorAxis {
    shard: Shard,
    group: Arc<dyn Collective>,
}

impl TensorAxis {
    /// One rank that has everything.
    #[must_use]
    pub fn whole() -> Self {
        Self { shard: Shard::WHOLE, group: alone() }
    }

    /// Part `shard` of a model, whose other parts the other ranks of `group` have, each the part of its number.
    #[must_use]
    pub fn new(shard: Shard, group: Arc<dyn Collective>) -> Self {
        debug_assert_eq!((shard.index(), shard.count()), (group.rank(), group.size()));
        Self { shard, group }
    }

    /// Part `shard` of a model, whose other parts are with nobody yet: it can be loaded, and computes once it has a group.
    #[must_use]
    pub fn unmet(shard: Shard) -> Self {
        Self { shard, group: unmet(shard.index(), shard.count()) }
    }

    /// The tensor axis of a mesh.
    #[must_use]
    pub fn of(ranks: &Ranks) -> Self {
        Self { shard: ranks.shard(Axis::Tensor), group: ranks.tensor().clone() }
    }

    /// Which part of the model is here.
    #[must_use]
    pub fn shard(&self) -> Shard {
        self.shard
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.shard.is_whole()
    }

    /// Forward, behind what was cut by its inputs: the sum of everybody's `partial` result, the same bits on every rank.
    pub(crate) fn reduce(&self, partial: &Tensor) -> Result<Tensor> {
        Ok(pairs::reduce_from_region(&*self.group, partial)?)
    }

    /// Backward, before what was cut by its outputs: the sum of everybody's `partial` gradient to the common input.
    pub(crate) fn reduce_gradient(&self, partial: &Tensor) -> Result<Tensor> {
        Ok(pairs::copy_to_region_gradient(&*self.group, partial)?)
    }

    /// First of this rank's share of `size` things, which can be divided: the model was checked when it was loaded.
    pub(crate) fn first(&self, size: usize) -> usize {
        self.shard.range("parts of a layer", size).map_or(0, |range| range.start)
    }

    /// This rank's part of a vocabulary.
    pub(crate) fn vocabulary(&self, size: usize) -> Vocabulary {
        Vocabulary { first: self.first(size), size }
    }

    /// The softmax over all columns, from everybody's.
    pub(crate) fn softmax(&self, own: Softmax) -> Result<Softmax> {
        if self.is_whole() {
            return Ok(own);
        }
        let rows = own.top.dims1()?;
        let top = self.group.all_reduce(&own.top, Reduce::Max)?;
        let Softmax { top, total, target } = own.relative_to(top)?;
        // A target's logit is 0 on all ranks but one, so that both can be sums, and one message.
        let both = self.group.all_reduce(&Tensor::cat(&[total, target], 0)?, Reduce::Sum)?;
        Ok(Softmax { top, total: both.narrow(0, 0, rows)?, target: both.narrow(0, rows, rows)? })
    }

    /// All rows, from everybody's part of them: `[r, c]` to `[R, c]`.
    pub(crate) fn gather_rows(&self, part: Tensor) -> Result<Tensor> {
        if self.is_whole() { Ok(part) } else { Ok(self.group.all_gather(&part)?) }
    }

    /// Rows of all columns, from everybody's part of the columns: `[n, c]` to `[n, C]`.
    pub(crate) fn gather_columns(&self, part: Tensor) -> Result<Tensor> {
        if self.is_whole() {
            return Ok(part);
        }
        let (rows, cols) = part.dims2()?;
        let parts = self.group.all_gather(&part)?;
        let by_row = parts.reshape((self.group.size(), rows, cols))?.transpose(0, 1)?;
        Ok(by_row.reshape((rows, self.group.size() * cols))?)
    }
}
