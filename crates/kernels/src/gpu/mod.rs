//! The operations on a GPU: what kernels get, how they are launched, and where products are made.
//!
//! Whether an operation runs here is decided by its operand ([`Gpu::of`]). A [`Gpu`] is a CUDA device, or the emulator, which
//! runs the same kernels on the CPU, on tensors in main memory. A build with neither has no value of the type, and none of this is
//! ever reached.

// A build with neither has no value of `Gpu`, so that nothing here can be called; it is compiled all the same, to stay right.
#![cfg_attr(
    not(any(feature = "cuda", feature = "emulator")),
    allow(dead_code, unreachable_code, unused_variables, reason = "there is no GPU in this build")
)]

pub(crate) mod absorbed;
pub(crate) mod attention;
#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
mod cuda;
pub(crate) mod device;
pub(crate) mod elementwise;
#[cfg(feature = "emulator")]
pub(crate) mod emulated;
pub(crate) mod linear;
pub(crate) mod loss;
#[cfg(feature = "cuda")]
mod profile;
pub(crate) mod rows;
#[cfg(test)]
#[cfg(any(feature = "cuda", feature = "emulator"))]
mod tests;
#[cfg(feature = "cuda")]
mod upload;

#[cfg(feature = "cuda")]
use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Storage, StorageRef, Tensor};

use crate::gemm::pack::Layout;
use crate::tensor::dims2;
use crate::{Error, Result};

/// A place in the device's memory, as kernels get it; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Address(pub(crate) u64);

impl Address {
    pub(crate) const NONE: Address = Address(0);

    pub(crate) fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// The parameters of a kernel: the same struct in C++.
///
/// # Safety
/// The type must be `repr(C)`, with the fields of the kernel's parameter struct in the same order, and nothing but numbers and
/// [`Address`]es in them.
pub(crate) unsafe trait Params: Copy {}

/// Numbers that may be copied to the device byte by byte.
///
/// # Safety
/// The type must be without padding, and every bit pattern must be one of its values.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: a number.
unsafe impl Plain for i32 {}
// SAFETY: a number.
unsafe impl Plain for u32 {}
// SAFETY: a number.
unsafe impl Plain for i64 {}
// SAFETY: a number.
unsafe impl Plain for f32 {}
// SAFETY: numbers alone, all of one size.
unsafe impl Plain for [i32; 2] {}
// SAFETY: numbers alone, all of one size.
unsafe impl Plain for [u32; 4] {}

/// How many blocks of how many threads run a kernel, with how much shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 2],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

impl Launch {
    /// So many blocks without shared memory.
    pub(crate) fn blocks(blocks: usize, threads: u32) -> Self {
        Self { grid: [blocks as u32, 1], threads, shared_bytes: 0 }
    }
}

/// `out = a w^T`, `w` stored `[n, k]` ([`Layout::ColumnsAsRows`]), or `out = a w`, `w` stored `[k, n]` ([`Layout::Rows`]), plus
/// `added`, all row-major; summed in f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) a: Address,
    /// Numbers from row to row of `a`.
    pub(crate) a_stride: usize,
    pub(crate) w: Address,
    /// Numbers from row to row of `w`.
    pub(crate) w_stride: usize,
    pub(crate) layout: Layout,
    /// Of `a` and `w`: bf16 or f32.
    pub(crate) dtype: DType,
    pub(crate) out: Address,
    /// Numbers from row to row of `out`.
    pub(crate) out_stride: usize,
    pub(crate) out_dtype: DType,
    /// Laid out as `out`, and perhaps at its place; none for nothing.
    pub(crate) added: Address,
    /// How many products of these sizes are made, and the numbers from one to the next of `a`, `w` and `out`.
    pub(crate) count: usize,
    pub(crate) steps: [usize; 3],
    /// Rows of `a`, columns of the result, and numbers that are contracted.
    pub(crate) dims: [usize; 3],
    /// The number of rows for which the way to make it is chosen. (The emulator has one way.)
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) usual_rows: usize,
}

/// Where an operation runs.
#[derive(Clone)]
pub(crate) enum Gpu {
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Handle>),
    #[cfg(feature = "emulator")]
    Emulated,
}

/// A contiguous tensor on the device, which lives as long as this.
pub(crate) struct Operand<'a> {
    _storage: StorageRef<'a>,
    pub(crate) address: Address,
}

/// A matrix on the device, which lives as long as this. Its rows may lie apart, as those of some columns of a wider one do.
pub(crate) struct Matrix<'a> {
    storage: StorageRef<'a>,
    pub(crate) address: Address,
    /// Of the first number among those of the storage.
    offset: usize,
    /// Numbers from the start of one row to the start of the next.
    pub(crate) stride: usize,
    rows: usize,
    pub(crate) cols: usize,
}

impl Matrix<'_> {
    /// Whether `next` has the columns behind this one's in the same matrix.
    pub(crate) fn is_beside(&self, next: &Self) -> bool {
        let same = std::ptr::eq(&raw const *self.storage, &raw const *next.storage);
        let [own, other] =
            [self, next].map(|matrix| (matrix.rows, matrix.stride, matrix.offset / matrix.stride.max(1)));
        let ends_in_row = next.offset % next.stride.max(1) + next.cols <= next.stride;
        same && own == other && self.offset + self.cols == next.offset && ends_in_row
    }

    pub(crate) fn rows(&self) -> Rows {
        Rows { first: self.address, stride: self.stride as i64 }
    }
}

/// `Rows` of `common.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Rows {
    pub(crate) first: Address,
    /// Numbers from row to row.
    pub(crate) stride: i64,
}

impl Rows {
    pub(crate) const NONE: Rows = Rows { first: Address::NONE, stride: 0 };
}

/// A tensor that is being written.
pub(crate) struct Output {
    storage: Storage,
    dims: Vec<usize>,
    pub(crate) address: Address,
}

impl Output {
    pub(crate) fn tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.dims, BackpropOp::none(), false)
    }
}

/// Numbers of the host, copied to the device for as long as this lives.
pub(crate) struct Uploaded {
    _storage: Storage,
    pub(crate) address: Address,
}

impl Gpu {
    /// The GPU on which `tensor` lies; none where it lies in main memory.
    pub(crate) fn of(tensor: &Tensor) -> Result<Option<Self>> {
        Self::at(tensor.device())
    }

    /// The GPU that a device is.
    pub(crate) fn at(device: &Device) -> Result<Option<Self>> {
        match device {
            #[cfg(feature = "emulator")]
            Device::Cpu if emulated::is_on() => Ok(Some(Self::Emulated)),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Some(Self::Cuda(cuda::Handle::of(device)?))),
            _ => Ok(None),
        }
    }

    /// Whether it has Hopper's instructions, by which four warps multiply as a group. No other generation has them.
    pub(crate) fn multiplies_by_groups(&self) -> bool {
        #[cfg(all(test, any(feature = "cuda", feature = "emulator")))]
        if tests::is_older() {
            return false;
        }
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref handle) => handle.multiplies_by_groups,
            #[cfg(feature = "emulator")]
            Self::Emulated => true,
        }
    }

    /// A tensor's numbers.
    pub(crate) fn operand<'a>(&self, op: &'static str, tensor: &'a Tensor) -> Result<Operand<'a>> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((from, _)) = layout.contiguous_offsets() else {
            let what = format!("an operand of shape {:?} is not contiguous", tensor.dims());
            return Err(Error::Shape { op, what });
        };
        let address = self.address(op, &storage)?.plus(from * tensor.dtype().size_in_bytes());
        Ok(Operand { _storage: storage, address })
    }

    /// A matrix's numbers, row by row.
    pub(crate) fn matrix<'a>(&self, op: &'static str, tensor: &'a Tensor) -> Result<Matrix<'a>> {
        let (rows, cols) = dims2(op, tensor)?;
        let (storage, layout) = tensor.storage_and_layout();
        // Where there is one row or one column, what is said of the way to the next one means nothing.
        let stride = match *layout.stride() {
            [stride, next] if (next == 1 || cols < 2) && stride >= cols => stride,
            [_, next] if (next == 1 || cols < 2) && rows < 2 => cols,
            _ => {
                let what = format!("an operand of shape {:?} is not contiguous by rows", tensor.dims());
                return Err(Error::Shape { op, what });
            }
        };
        let offset = layout.start_offset();
        let address = self.address(op, &storage)?.plus(offset * tensor.dtype().size_in_bytes());
        Ok(Matrix { storage, address, offset, stride, rows, cols })
    }

    /// Room for matrices of the shapes of `like`, beside each other where those are.
    pub(crate) fn matrices_like(
        &self,
        op: &'static str,
        like: &[&Tensor],
        dtype: DType,
    ) -> Result<Vec<Tensor>> {
        let matrices = like.iter().map(|tensor| self.matrix(op, tensor)).collect::<Result<Vec<_>>>()?;
        let mut outputs = Vec::with_capacity(like.len());
        for run in matrices.chunk_by(Matrix::is_beside) {
            let rows = like[outputs.len()].dims()[0];
            let cols = run.iter().map(|matrix| matrix.cols).sum();
            let whole = self.output(op, &[rows, cols], dtype)?.tensor();
            let mut first = 0;
            for matrix in run {
                outputs.push(whole.narrow(1, first, matrix.cols)?);
                first += matrix.cols;
            }
        }
        Ok(outputs)
    }

    /// The same if there is a tensor, of f32 numbers.
    pub(crate) fn optional<'a>(
        &self,
        op: &'static str,
        tensor: Option<&'a Tensor>,
    ) -> Result<(Option<Operand<'a>>, Address)> {
        if let Some(tensor) = tensor
            && tensor.dtype() != DType::F32
        {
            let what = format!("an operand of {:?} that has to be f32", tensor.dtype());
            return Err(Error::Shape { op, what });
        }
        let operand = tensor.map(|tensor| self.operand(op, tensor)).transpose()?;
        let address = operand.as_ref().map_or(Address::NONE, |operand| operand.address);
        Ok((operand, address))
    }

    fn address(&self, op: &'static str, storage: &Storage) -> Result<Address> {
        match (self, storage) {
            #[cfg(feature = "cuda")]
            (Self::Cuda(handle), Storage::Cuda(storage)) => handle.address(op, storage),
            #[cfg(feature = "emulator")]
            (Self::Emulated, Storage::Cpu(storage)) => emulated::address(op, storage),
            (_, storage) => Err(Error::Device { op, device: format!("{:?}", storage.device().location()) }),
        }
    }

    /// Room for a tensor of f32, bf16 or i64 numbers; what is in it is anything.
    pub(crate) fn output(&self, op: &'static str, dims: &[usize], dtype: DType) -> Result<Output> {
        let count: usize = dims.iter().product();
        let storage: Storage = match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref handle) => Storage::Cuda(handle.room(count, dtype)?),
            #[cfg(feature = "emulator")]
            Self::Emulated => Storage::Cpu(emulated::room(count, dtype)?),
        };
        let address = self.address(op, &storage)?;
        Ok(Output { storage, dims: dims.to_vec(), address })
    }

    /// Copies numbers of the host to the device.
    pub(crate) fn upload<T: Plain>(&self, op: &'static str, values: &[T]) -> Result<Uploaded> {
        // SAFETY: plain numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        let storage: Storage = match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref handle) => Storage::Cuda(handle.copied(bytes)?),
            #[cfg(feature = "emulator")]
            Self::Emulated => Storage::Cpu(emulated::copied(bytes)),
        };
        let address = self.address(op, &storage)?;
        Ok(Uploaded { _storage: storage, address })
    }

    /// Runs a kernel; it has not ended when this returns.
    ///
    /// # Safety
    /// The parameters must be the kernel's, and what they point to must be as large as the kernel takes it to be, and live until
    /// the memory is freed in the order of the stream.
    pub(crate) unsafe fn launch<P: Params>(&self, kernel: &str, launch: Launch, params: &P) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        match *self {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            Self::Cuda(ref handle) => unsafe {
                handle.launch(kernel, launch, std::ptr::from_ref(params).cast())
            },
            #[cfg(feature = "emulator")]
            // SAFETY: the caller's promise.
            Self::Emulated => unsafe { emulated::launch(kernel, launch, std::ptr::from_ref(params).cast()) },
        }
    }

    /// Makes a product; it has not ended when this returns.
    ///
    /// # Safety
    /// As for [`Gpu::launch`].
    pub(crate) unsafe fn multiply(&self, product: &Product) -> Result<()> {
        if product.dims.contains(&0) {
            return Ok(());
        }
        match *self {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            Self::Cuda(ref handle) => unsafe { handle.multiply(product) },
            #[cfg(feature = "emulator")]
            Self::Emulated => {
                // SAFETY: the caller's promise.
                unsafe { emulated::multiply(product) };
                Ok(())
            }
        }
    }
}

/// The name of a type in those of kernels.
pub(crate) fn suffix(dtype: DType) -> &'static str {
    if dtype == DType::BF16 { "bf16" } else { "f32" }
}
