//! The nearest rows of a table, by cosine.

use candle_core::{DType, Device, Tensor};
use incipit_kernels::{Frozen, linear};
use rayon::prelude::*;

use super::vectors::unit;
use crate::Result;

/// Rows of the table that are multiplied at once: 16 MiB of them where a row has 4,096 numbers.
pub(super) const BLOCK: usize = 1024;

/// A row of the table, and how near it lies.
#[derive(Clone, Copy)]
pub(super) struct Near {
    pub(super) id: u32,
    pub(super) cosine: f32,
}

/// For each of the `vectors`, which lie end to end, the `count` nearest rows of `table`, the nearest first; none for a vector without a
/// direction.
pub(super) fn nearest(vectors: &[f32], table: &Frozen, count: usize) -> Result<Vec<Vec<Near>>> {
    let width = table.cols();
    let mut units = vec![0.0; vectors.len()];
    let pairs = units.chunks_exact_mut(width).zip(vectors.chunks_exact(width));
    let directed: Vec<bool> = pairs.map(|(out, vector)| unit(vector, out)).collect();
    let units = Tensor::from_vec(units, (directed.len(), width), &Device::Cpu)?;
    let mut found = vec![Vec::new(); directed.len()];
    for first in (0..table.rows()).step_by(BLOCK) {
        let size = BLOCK.min(table.rows() - first);
        let mut block = vec![0.0; size * width];
        let rows = block.par_chunks_exact_mut(width).enumerate();
        let has_direction: Vec<bool> = rows.map(|(i, out)| unit_row(table, first + i, out)).collect();
        let cosines = linear(&units, &Frozen::from_f32(block, size, width), DType::F32)?;
        let cosines = cosines.flatten_all()?.to_vec1::<f32>()?;
        let lists = found.iter_mut().zip(cosines.chunks_exact(size)).zip(&directed);
        for ((list, cosines), _) in lists.filter(|(_, directed)| **directed) {
            for (i, cosine) in cosines.iter().enumerate().filter(|(i, _)| has_direction[*i]) {
                // Rounding could lead beyond 1.
                offer(list, count, Near { id: (first + i) as u32, cosine: cosine.clamp(-1.0, 1.0) });
            }
        }
    }
    Ok(found)
}

/// Takes a row into a list of the `count` nearest, whose ids are all smaller.
fn offer(list: &mut Vec<Near>, count: usize, new: Near) {
    if list.len() == count && list.last().is_none_or(|last| new.cosine <= last.cosine) {
        return;
    }
    list.insert(list.partition_point(|old| old.cosine >= new.cosine), new);
    list.truncate(count);
}

/// The direction of a row of the table; `false`, and zeros, where it has none.
pub(super) fn unit_row(table: &Frozen, id: usize, out: &mut [f32]) -> bool {
    let mut row = vec![0.0; out.len()];
    table.copy_row(id, &mut row);
    unit(&row, out)
}
