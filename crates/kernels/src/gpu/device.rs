//! GPUs as devices: which there are, what they have, and how much work they were given.

use candle_core::Device;

use crate::{Error, Frozen, Result};

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its number.
    pub ordinal: usize,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Its memory.
    pub memory: DeviceMemory,
}

/// The memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What can still be allocated.
    pub free: u64,
    /// All of it.
    pub total: u64,
    /// The most that this process's tensors have taken at once, where the driver tells.
    pub peak: Option<u64>,
}

/// What a kernel took.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// Its name; products have their sizes in it.
    pub name: String,
    /// How often it ran.
    pub launches: u64,
    /// In all.
    pub seconds: f64,
}

/// Whether GPUs can be used by this build.
pub const CUDA_IS_BUILT: bool = cfg!(feature = "cuda");

/// The GPU of this number, with a stream of its own.
///
/// # Errors
/// If this build cannot use GPUs, there is no such GPU, or its driver is missing or too old.
pub fn open_gpu(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return super::cuda::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    Err(Error::NoGpu {
        what: format!(
            "GPU {ordinal}: this program was built for the CPU alone; build it with `. scripts/cuda-toolkit.sh && cargo build \
             --release --features cuda`"
        ),
    })
}

/// All GPUs that this process may use.
///
/// # Errors
/// If this build cannot use GPUs, or there is no driver.
pub fn gpus() -> Result<Vec<GpuInfo>> {
    #[cfg(feature = "cuda")]
    return super::cuda::list();
    #[cfg(not(feature = "cuda"))]
    Err(Error::NoGpu { what: "this program was built for the CPU alone".to_owned() })
}

/// The names of all GPUs that this process may use. Makes no context on them, so that it costs none of their memory, and one that is full
/// is none the less told of.
///
/// # Errors
/// As [`gpus`].
pub fn gpu_names() -> Result<Vec<String>> {
    #[cfg(feature = "cuda")]
    return super::cuda::names();
    #[cfg(not(feature = "cuda"))]
    Err(Error::NoGpu { what: "this program was built for the CPU alone".to_owned() })
}

/// The memory of a device; none of the CPU, whose memory is the machine's.
///
/// # Errors
/// If the driver does not tell.
pub fn device_memory(device: &Device) -> Result<Option<DeviceMemory>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Some(super::cuda::Handle::of(device)?.memory()?)),
        _ => Ok(None),
    }
}

/// Whether a device works, as far as is known without waiting for it. One that failed (it is gone, or a kernel read what is not there)
/// answers this process with an error for ever.
///
/// # Errors
/// What the driver says of a device that has failed.
pub fn check_device(device: &Device) -> Result<()> {
    match super::Gpu::at(device)? {
        #[cfg(feature = "cuda")]
        Some(super::Gpu::Cuda(handle)) => handle.check(),
        #[cfg(feature = "emulator")]
        Some(super::Gpu::Emulated) => super::emulated::check(),
        None => Ok(()),
    }
}

/// What a GPU's library told the tensor library.
pub(crate) fn told(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Error {
    let what = error.to_string();
    #[cfg(feature = "cuda")]
    if super::cuda::is_out_of_memory(error) {
        return Error::GpuMemory { what };
    }
    Error::Gpu { op: "an operation of the tensor library".to_owned(), what }
}

/// How many kernels and products were started on a device so far; none of the CPU.
///
/// # Errors
/// If the device cannot be used.
pub fn launches(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Some(super::cuda::Handle::of(device)?.launches())),
        _ => Ok(None),
    }
}

/// Begins to take the time of every kernel of a device. It costs two events a launch.
///
/// # Errors
/// If the device is no GPU.
pub fn profile(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            super::cuda::Handle::of(device)?.profile();
            Ok(())
        }
        _ => Err(Error::NoGpu { what: "kernels are timed on GPUs alone".to_owned() }),
    }
}

/// Waits for the device and ends what [`profile`] began; the kernels by their time, longest first.
///
/// # Errors
/// If the device is no GPU, or a kernel failed.
pub fn profiled(device: &Device) -> Result<Vec<KernelTime>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::Handle::of(device)?.profiled(),
        _ => Err(Error::NoGpu { what: "kernels are timed on GPUs alone".to_owned() }),
    }
}

impl Frozen {
    /// The same weight on a device, in the type `dtype` (bf16 or f32); on the CPU it stays as it is and where it is. What is a part of
    /// a larger matrix is copied without the rest.
    ///
    /// # Errors
    /// If the device's memory does not suffice: the message says what was needed.
    pub fn to_device(&self, device: &Device, dtype: candle_core::DType) -> Result<Frozen> {
        Ok(Self::to_device_together(std::slice::from_ref(self), device, dtype)?.swap_remove(0))
    }

    /// The same of several weights with as many columns. On a GPU each lies below the one before, so that products with all of them are
    /// one: see [`linear_each`](crate::linear_each) and [`linear_gradient`](crate::linear_gradient).
    ///
    /// # Errors
    /// As [`Self::to_device`]; also if they have not as many columns.
    pub fn to_device_together(
        weights: &[Frozen],
        device: &Device,
        dtype: candle_core::DType,
    ) -> Result<Vec<Frozen>> {
        let Some(gpu) = super::Gpu::at(device)? else { return Ok(weights.to_vec()) };
        let Some(cols) = weights.first().map(Frozen::cols) else { return Ok(Vec::new()) };
        if let Some(other) = weights.iter().find(|weight| weight.cols() != cols) {
            let what = format!("{other:?} below weights of {cols} columns");
            return Err(Error::Shape { op: "to_device_together", what });
        }
        let whole: Frozen = match gpu {
            #[cfg(feature = "cuda")]
            super::Gpu::Cuda(handle) => super::upload::upload(&handle, weights, dtype)?,
            #[cfg(feature = "emulator")]
            super::Gpu::Emulated => {
                let values: Vec<f32> = weights.iter().flat_map(Frozen::to_f32).collect();
                let dims = (values.len() / cols.max(1), cols);
                Frozen::from_device(candle_core::Tensor::from_vec(values, dims, device)?.to_dtype(dtype)?)
            }
        };
        let mut first = 0;
        let part = |weight: &Frozen| {
            let part = whole.part((first, weight.rows()), (0, cols));
            first += weight.rows();
            part.for_rows(weight.usual_rows())
        };
        Ok(weights.iter().map(part).collect())
    }
}
