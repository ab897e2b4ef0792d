//! T5's relative position bias.

use std::sync::{Arc, OnceLock};

use super::head::PADDING;
use crate::frozen::Frozen;
use crate::gpu::attention::MOST_ROWS;
use crate::gpu::{Address, Gpu, Uploaded};
use crate::segments::once;
use crate::{Error, Result};

/// How relative positions are put into buckets (Raffel et al. 2020, section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// Buckets in all.
    pub count: usize,
    /// Distances from here on share the last bucket.
    pub max_distance: usize,
    /// Whether keys after the query have buckets of their own (encoder), or none at all (decoder).
    pub bidirectional: bool,
}

impl Buckets {
    /// The bucket of `key - query`.
    ///
    /// Half of the buckets are for one distance each; the others grow in logarithmic steps up to `max_distance`.
    #[must_use]
    pub fn index(&self, relative: isize) -> usize {
        let (count, first, distance) = if self.bidirectional {
            let half = self.count / 2;
            (half, if relative > 0 { half } else { 0 }, relative.unsigned_abs())
        } else {
            (self.count, 0, relative.min(0).unsigned_abs())
        };
        let exact = count / 2;
        if distance < exact {
            return first + distance;
        }
        // In f32, as the reference implementations compute it: the rounding decides where a bucket ends.
        let steps = (count - exact) as f32;
        let range = (self.max_distance as f64 / exact as f64).ln() as f32;
        let step = ((distance as f32 / exact as f32).ln() / range * steps) as usize;
        first + exact.saturating_add(step).min(count - 1)
    }
}

/// The bias of every head for every distance that occurs.
#[derive(Clone)]
pub struct PositionBias {
    /// `[heads, 2 * longest - 1 + PADDING]`, by `key - query + longest - 1`.
    pub(crate) by_key: Vec<f32>,
    pub(crate) longest: usize,
    pub(crate) heads: usize,
    pub(crate) buckets: Buckets,
    /// The bucket of each place of `by_key`, without the padding.
    pub(crate) bucket_of: Vec<u32>,
    /// What [`PositionBias::on`] has uploaded to the device on which a kernel first asked for it.
    gpu: Arc<OnceLock<Uploaded>>,
}

/// A bias whose table is trained, and zeros to which the gradient to the table is added, `[buckets, heads]`.
pub(super) type Trained<'a> = (&'a PositionBias, &'a mut [f32]);

impl PositionBias {
    /// From the table `[buckets, heads]`, for sequences of at most `longest` rows.
    ///
    /// # Errors
    /// If the table has not as many rows as there are buckets.
    pub fn new(table: &Frozen, buckets: Buckets, longest: usize) -> Result<Self> {
        Self::from_query(table, buckets, longest, 0)
    }

    /// As [`PositionBias::new`], where the first query row stands at place `first_query` of the sequence of keys: a step of
    /// generation has one query after the keys that are there already.
    ///
    /// # Errors
    /// If the table has not as many rows as there are buckets.
    pub fn from_query(table: &Frozen, buckets: Buckets, longest: usize, first_query: usize) -> Result<Self> {
        if table.rows() != buckets.count || buckets.count < 2 {
            let what = format!(
                "a table of {} rows for {} buckets (of which there are 2 at least)",
                table.rows(),
                buckets.count
            );
            return Err(Error::Shape { op: "position bias", what });
        }
        let (heads, longest) = (table.cols(), longest.max(1));
        let span = 2 * longest - 1;
        let stride = span + PADDING;
        let values = table.to_f32();
        let bucket = |place| buckets.index(place as isize - (longest + first_query) as isize + 1) as u32;
        let bucket_of: Vec<u32> = (0..span).map(bucket).collect();
        let mut by_key = vec![0.0; heads * stride];
        for (place, bucket) in bucket_of.iter().enumerate() {
            for head in 0..heads {
                by_key[head * stride + place] = values[*bucket as usize * heads + head];
            }
        }
        Ok(Self { by_key, longest, heads, buckets, bucket_of, gpu: Arc::default() })
    }

    /// Heads.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Numbers from head to head.
    pub(crate) fn stride(&self) -> usize {
        2 * self.longest - 1 + PADDING
    }

    /// All of it times log2(e), for kernels: `[heads, gpu_stride]` by `key - query + longest - 1`. Before and behind a head's numbers
    /// is room for the rows that a tile has beyond an example's end.
    pub(crate) fn on(&self, gpu: &Gpu) -> Result<Address> {
        let uploaded = once(&self.gpu, || gpu.upload("position bias", &self.for_gpu()))?;
        Ok(uploaded.address.plus(MOST_ROWS * size_of::<f32>()))
    }

    fn for_gpu(&self) -> Vec<f32> {
        let room = [0.0; MOST_ROWS];
        let scaled = |head: &[f32]| {
            head[..self.bucket_of.len()].iter().map(|b| b * std::f32::consts::LOG2_E).collect()
        };
        let heads = self.by_key.chunks_exact(self.stride());
        heads.flat_map(|head| [room.to_vec(), scaled(head), room.to_vec()].concat()).collect()
    }

    /// Numbers from head to head of what a GPU has.
    pub(crate) fn gpu_stride(&self) -> usize {
        self.bucket_of.len() + 2 * MOST_ROWS
    }

    /// The bias of `query` with keys `0 .. n`, of which `PADDING` may lie behind the longest example's end.
    pub(crate) fn keys(&self, head: usize, query: usize, n: usize) -> &[f32] {
        &self.by_key[head * self.stride() + self.longest - 1 - query..][..n]
    }

    /// Adds one head's sums by `key - query + queries - 1`, of an example with so many queries, to those of their buckets.
    pub(super) fn add_to_buckets(&self, by_distance: &[f32], queries: usize, sums: &mut [f32]) {
        for (x, bucket) in by_distance.iter().zip(&self.bucket_of[self.longest - queries..]) {
            sums[*bucket as usize] += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From `T5Attention._relative_position_bucket` of transformers, with 32 buckets and distance 128.
    #[test]
    fn buckets_are_those_of_the_reference() {
        let encoder = Buckets { count: 32, max_distance: 128, bidirectional: true };
        let decoder = Buckets { bidirectional: false, ..encoder };
        let at = [-200, -128, -127, -64, -32, -16, -8, -7, -1, 0, 1, 7, 8, 16, 32, 64, 91, 127, 200];
        let both: Vec<_> = at.iter().map(|r| encoder.index(*r)).collect();
        assert_eq!(both, [15, 15, 15, 14, 12, 10, 8, 7, 1, 0, 17, 23, 24, 26, 28, 30, 31, 31, 31]);
        let past: Vec<_> = at.iter().map(|r| decoder.index(*r)).collect();
        assert_eq!(past, [31, 31, 31, 26, 21, 16, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
