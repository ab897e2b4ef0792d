//! From tensors to slices and back.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Storage, StorageRef, Tensor, WithDType};

use crate::element::Element;
use crate::{Error, Result};

/// The numbers of a contiguous tensor in main memory, for as long as this lives.
pub(crate) struct View<'a> {
    op: &'static str,
    storage: StorageRef<'a>,
    range: std::ops::Range<usize>,
    device: String,
}

impl<'a> View<'a> {
    pub(crate) fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((from, to)) = layout.contiguous_offsets() else {
            let what = format!("an operand of shape {:?} is not contiguous", tensor.dims());
            return Err(Error::Shape { op, what });
        };
        Ok(Self { op, storage, range: from..to, device: format!("{:?}", tensor.device().location()) })
    }

    pub(crate) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<T>()?[self.range.clone()]),
            _ => Err(Error::Device { op: self.op, device: self.device.clone() }),
        }
    }
}

/// Rows and columns of a matrix.
pub(crate) fn dims2(op: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
    tensor.dims2().map_err(|_| Error::Shape { op, what: format!("{:?} is no matrix", tensor.dims()) })
}

/// Refuses a tensor that has not this shape.
pub(crate) fn expect_dims(op: &'static str, name: &str, tensor: &Tensor, dims: &[usize]) -> Result<()> {
    if tensor.dims() == dims {
        return Ok(());
    }
    Err(Error::Shape { op, what: format!("{name} has shape {:?} where {dims:?} is expected", tensor.dims()) })
}

/// A tensor in main memory.
pub(crate) fn tensor<T: Element>(values: Vec<T>, dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

/// Refuses a type that activations cannot have.
pub(crate) fn expect_activation(op: &'static str, dtype: DType) -> Result<()> {
    match dtype {
        DType::BF16 | DType::F32 => Ok(()),
        other => Err(Error::Shape { op, what: format!("activations are bf16 or f32, not {other:?}") }),
    }
}

/// A pointer that several threads write through, each to its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: whoever writes through it promises that no two threads touch the same numbers (see `SharedMut::range`).
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// For the spare capacity of `values`, to which nothing was written yet.
    pub(crate) fn uninit(values: &mut Vec<T>) -> SharedMut<MaybeUninit<T>> {
        SharedMut(values.spare_capacity_mut().as_mut_ptr())
    }

    /// # Safety
    /// The range must lie within the slice that this was made of, and nobody else may use any of it meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, from: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}
