//! Weights on their way from the file to the device: through two pinned buffers, one of which is filled from the mapped file while
//! the other is being copied.

use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{DType, Storage, Tensor};
use cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice, result};
use half::bf16;
use rayon::prelude::*;

use super::Gpu;
use super::cuda::{Handle, failed, lock};
use crate::element::Element;
use crate::{Error, Frozen, FrozenSlice, Result};

/// Bytes of a buffer: large enough for the bus, small enough to be found anywhere.
const BUFFER: usize = 16 << 20;

/// Two buffers and the stream that empties them.
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    buffers: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

impl Staging {
    fn new(handle: &Handle) -> Result<Self> {
        let context = handle.stream.context();
        let stream = context.new_stream().map_err(failed("a stream for weights"))?;
        let buffer = || -> Result<_, _> {
            // SAFETY: a buffer is written before it is read.
            let memory = unsafe { context.alloc_pinned(BUFFER)? };
            Ok((memory, context.new_event(None)?))
        };
        let buffers =
            [buffer().map_err(failed("pinned memory"))?, buffer().map_err(failed("pinned memory"))?];
        Ok(Self { stream, buffers, next: 0 })
    }

    /// Copies what `fill` writes, at most a buffer, to `to`.
    fn copy(&mut self, to: u64, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let (memory, copied) = &mut self.buffers[self.next];
        self.next = 1 - self.next;
        copied.synchronize().map_err(failed("waiting for a copy of weights"))?;
        let memory = &mut memory.as_mut_slice().map_err(failed("pinned memory"))?[..bytes];
        fill(memory);
        // SAFETY: the caller has the memory at `to`; the buffer is not written again before the event has passed.
        let started = unsafe { result::memcpy_htod_async(to, memory, self.stream.cu_stream()) };
        started.and_then(|()| copied.record(&self.stream)).map_err(failed("copying weights"))
    }
}

/// The weights on the device, in the type `dtype`: rows of as many numbers, one after the other without gaps.
pub(super) fn upload(handle: &Arc<Handle>, weights: &[Frozen], dtype: DType) -> Result<Frozen> {
    let rows: usize = weights.iter().map(Frozen::rows).sum();
    let columns = weights.first().map_or(0, Frozen::cols);
    let row_bytes = columns * dtype.size_in_bytes();
    if row_bytes > BUFFER {
        let what = format!("a weight with rows of {columns} numbers: rows have {BUFFER} bytes at most");
        return Err(Error::Shape { op: "upload", what });
    }
    let storage = Storage::Cuda(handle.room(rows * columns, dtype)?);
    let mut to = Gpu::Cuda(handle.clone()).address("upload", &storage)?;
    let mut staging = lock(&handle.staging);
    let staging = match &mut *staging {
        Some(staging) => staging,
        none => none.insert(Staging::new(handle)?),
    };
    // The memory may have been another tensor's, which kernels still read.
    staging.stream.join(&handle.stream).map_err(failed("ordering streams"))?;
    let at_once = (BUFFER / row_bytes.max(1)).max(1);
    for weight in weights {
        for first in (0..weight.rows()).step_by(at_once) {
            let count = at_once.min(weight.rows() - first);
            let (part, bytes) = (weight.part((first, count), (0, columns)), count * row_bytes);
            let copied = staging.copy(to.0, bytes, |bytes| fill(&part, dtype, bytes));
            copied.inspect_err(|_| {
                // The memory is given back: whatever is on its way into it comes before.
                let _ = staging.stream.synchronize();
            })?;
            to = to.plus(bytes);
        }
    }
    handle.stream.join(&staging.stream).map_err(failed("ordering streams"))?;
    Ok(Frozen::from_device(Tensor::from_storage(storage, (rows, columns), BackpropOp::none(), false)))
}

/// The numbers of a weight as little-endian bytes of a type, row after row.
fn fill(weight: &Frozen, dtype: DType, bytes: &mut [u8]) {
    match (weight.values(), dtype) {
        (FrozenSlice::Bf16(values), DType::BF16) => rows(weight, values, bytes, |x: bf16| x.to_le_bytes()),
        (FrozenSlice::F32(values), DType::BF16) => {
            rows(weight, values, bytes, |x: f32| bf16::narrow(x).to_le_bytes());
        }
        (FrozenSlice::Bf16(values), _) => rows(weight, values, bytes, |x: bf16| x.widen().to_le_bytes()),
        (FrozenSlice::F32(values), _) => rows(weight, values, bytes, |x: f32| x.to_le_bytes()),
    }
}

fn rows<T: Copy + Sync, const N: usize>(
    weight: &Frozen,
    values: &[T],
    bytes: &mut [u8],
    convert: impl Fn(T) -> [u8; N] + Sync,
) {
    let columns = weight.cols();
    bytes.par_chunks_mut((columns * N).max(1)).enumerate().for_each(|(row, bytes)| {
        let values = &values[row * weight.stride()..][..columns];
        for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *to = convert(*value);
        }
    });
}
