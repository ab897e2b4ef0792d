//! A CUDA device: memory, kernels, and its one stream.
//!
//! Everything of a device goes through one stream, so that operations follow each other as they were called and memory that is
//! freed may be used again at once. Memory comes from the driver's pool, which keeps what is freed.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::{CudaError, CudaStorage, CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, DType, Device};
use cudarc::driver::sys::{self, CUfunction_attribute_enum as FunctionAttribute};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DriverError, result,
};
use cudarc::nvrtc::Ptx;

use super::blas::Blas;
use super::device::{DeviceMemory, GpuInfo, KernelTime};
use super::profile::Profile;
use super::upload::Staging;
use super::{Address, Launch, Product};
use crate::{Error, Result};

/// All kernels, compiled.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// What a block may have without asking.
const SHARED_BYTES: u32 = 48 * 1024;

const OUT_OF_MEMORY: sys::CUresult = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;

/// Whether the tensor library found no room on a device.
pub(super) fn is_out_of_memory(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(CudaError::Cuda(DriverError(OUT_OF_MEMORY))))
}

/// What an open device has.
pub(crate) struct Handle {
    pub(super) stream: Arc<CudaStream>,
    device: CudaDevice,
    /// Whether the image that was loaded has the kernels for Hopper's instructions.
    pub(super) multiplies_by_groups: bool,
    module: Arc<CudaModule>,
    /// By name, with the shared memory that each was allowed.
    functions: Mutex<HashMap<String, (CudaFunction, u32)>>,
    blas: Blas,
    pub(super) staging: Mutex<Option<Staging>>,
    launches: AtomicU64,
    profile: Mutex<Option<Profile>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The driver's version from which on CUDA's libraries of the toolkit that this is built with work, as `cuDriverGetVersion` gives it:
/// a driver takes all versions of its own major one (NVIDIA, "CUDA Compatibility").
const LEAST_DRIVER: i32 = 13_000;

/// The driver's words, with what was being done.
pub(super) fn failed(op: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    let op = op.into();
    move |error| Error::Gpu { op, what: error.to_string() }
}

/// The GPU of this number; whoever asks again gets the same one, since all work on it must go through one stream.
pub(super) fn open(ordinal: usize) -> Result<Device> {
    static OPEN: Mutex<Vec<(usize, Device)>> = Mutex::new(Vec::new());
    let mut open = lock(&OPEN);
    if let Some((_, device)) = open.iter().find(|(number, _)| *number == ordinal) {
        return Ok(device.clone());
    }
    let device = open_anew(ordinal)?;
    open.push((ordinal, device.clone()));
    Ok(device)
}

fn open_anew(ordinal: usize) -> Result<Device> {
    let count = count()?;
    if ordinal >= count {
        let what = format!("GPU {ordinal}: this machine has {count}, numbered from 0 (see `incipit doctor`)");
        return Err(Error::NoGpu { what });
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: all work on the device goes through its one stream; uploads wait for it and are waited for.
    unsafe { cuda.disable_event_tracking() };
    keep_freed_memory(cuda).map_err(failed("keeping freed memory"))?;
    Handle::of(cuda)?;
    Ok(device)
}

fn count() -> Result<usize> {
    let no_driver = |error: DriverError| Error::NoGpu {
        what: format!("the driver of NVIDIA's GPUs does not answer: {error}; see whether `nvidia-smi` works"),
    };
    let count = CudaContext::device_count().map_err(no_driver)?;
    let mut version = 0;
    // SAFETY: the driver writes one number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(no_driver)?;
    if version < LEAST_DRIVER {
        let named = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        let what = format!(
            "the driver of NVIDIA's GPUs is one for CUDA {}, and this program was built with CUDA {}: install a newer driver",
            named(version),
            named(LEAST_DRIVER)
        );
        return Err(Error::NoGpu { what });
    }
    Ok(count as usize)
}

/// By default the pool gives back to the system what is free whenever the host waits, and every step would ask for it again.
fn keep_freed_memory(device: &CudaDevice) -> Result<(), DriverError> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    // SAFETY: the device's own pool lives as long as it, and the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut threshold).cast())
    }
}

/// Bytes that the pool has and nobody uses, and the most that were used at once. Nothing where there is no pool.
fn of_pool(context: &CudaContext) -> Result<Option<(u64, u64)>, DriverError> {
    use sys::CUmemPool_attribute as Attribute;
    if !context.has_async_alloc() {
        return Ok(None);
    }
    // SAFETY: the device's own pool lives as long as it, and all three attributes are u64.
    let ask = |attribute| unsafe {
        let mut bytes = 0u64;
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::get_attribute(pool, attribute, std::ptr::from_mut(&mut bytes).cast())?;
        Ok(bytes)
    };
    let kept: u64 = ask(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
    let used = ask(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    Ok(Some((kept.saturating_sub(used), ask(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?)))
}

/// The names of all GPUs.
pub(super) fn names() -> Result<Vec<String>> {
    let name = |ordinal: usize| result::device::get_name(result::device::get(ordinal as i32)?);
    (0..count()?).map(|ordinal| name(ordinal).map_err(failed(format!("looking at GPU {ordinal}")))).collect()
}

/// All GPUs.
pub(super) fn list() -> Result<Vec<GpuInfo>> {
    let about = |ordinal: usize| -> Result<GpuInfo, DriverError> {
        let context = CudaContext::new(ordinal)?;
        let (free, total) = context.mem_get_info()?;
        let memory = DeviceMemory { free: free as u64, total: total as u64, peak: None };
        Ok(GpuInfo { ordinal, name: context.name()?, capability: context.compute_capability()?, memory })
    };
    (0..count()?).map(|ordinal| about(ordinal).map_err(failed(format!("looking at GPU {ordinal}")))).collect()
}

impl Handle {
    /// What belongs to a device, made when it is first asked for.
    pub(super) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<(DeviceId, Arc<Handle>)>> = Mutex::new(Vec::new());
        let mut open = lock(&OPEN);
        if let Some((_, handle)) = open.iter().find(|(id, _)| *id == device.id()) {
            return Ok(handle.clone());
        }
        let handle = Arc::new(Self::new(device)?);
        open.push((device.id(), handle.clone()));
        Ok(handle)
    }

    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let module = stream.context().load_module(Ptx::from_binary(IMAGE.to_vec()));
        let module =
            module.map_err(failed("loading the kernels (they need compute capability 8.0 or more)"))?;
        Ok(Self {
            blas: Blas::new(stream.clone())?,
            // They are in the machine code for Hopper alone, and not in what the driver translates for others.
            multiplies_by_groups: module.load_function("group_attention").is_ok(),
            stream,
            device: device.clone(),
            module,
            functions: Mutex::default(),
            staging: Mutex::default(),
            launches: AtomicU64::new(0),
            profile: Mutex::default(),
        })
    }

    /// What the pool keeps of freed memory is free, though the driver counts it as used.
    pub(super) fn memory(&self) -> Result<DeviceMemory> {
        let failed = || failed("asking for the free memory");
        let (free, total) = self.stream.context().mem_get_info().map_err(failed())?;
        let pool = of_pool(self.stream.context()).map_err(failed())?;
        let (kept, peak) = pool.map_or((0, None), |(kept, peak)| (kept, Some(peak)));
        Ok(DeviceMemory { free: free as u64 + kept, total: total as u64, peak })
    }

    pub(super) fn check(&self) -> Result<()> {
        let op = "asking whether the device works";
        self.stream.context().bind_to_thread().map_err(failed(op))?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_NOT_READY => Ok(()),
            error => Err(failed(op)(DriverError(error))),
        }
    }

    pub(super) fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    pub(super) fn profile(&self) {
        *lock(&self.profile) = Some(Profile::default());
    }

    pub(super) fn profiled(&self) -> Result<Vec<KernelTime>> {
        self.stream.synchronize().map_err(failed("waiting for the device"))?;
        lock(&self.profile).take().unwrap_or_default().times().map_err(failed("reading the kernels' times"))
    }

    pub(super) fn address(&self, op: &'static str, storage: &CudaStorage) -> Result<Address> {
        fn of<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> Address {
            Address(slice.device_ptr(stream).0)
        }
        if !storage.device.same_device(&self.device) {
            return Err(Error::Device {
                op,
                device: format!("{:?}, another GPU", storage.device.location()),
            });
        }
        Ok(match &storage.slice {
            CudaStorageSlice::U8(slice) => of(slice, &self.stream),
            CudaStorageSlice::U32(slice) => of(slice, &self.stream),
            CudaStorageSlice::I64(slice) => of(slice, &self.stream),
            CudaStorageSlice::BF16(slice) => of(slice, &self.stream),
            CudaStorageSlice::F32(slice) => of(slice, &self.stream),
            _ => {
                let what = "an operand of a type that no kernel takes".to_owned();
                return Err(Error::Shape { op, what });
            }
        })
    }

    /// Room for `count` numbers.
    pub(super) fn room(&self, count: usize, dtype: DType) -> Result<CudaStorage> {
        // The driver does not give out no memory.
        let count = count.max(1);
        // SAFETY: whoever asks for room writes all of it before anybody reads it.
        let slice = unsafe {
            match dtype {
                DType::BF16 => self.stream.alloc(count).map(CudaStorageSlice::BF16),
                DType::I64 => self.stream.alloc(count).map(CudaStorageSlice::I64),
                DType::U8 => self.stream.alloc(count).map(CudaStorageSlice::U8),
                _ => self.stream.alloc(count).map(CudaStorageSlice::F32),
            }
        };
        let slice = slice.map_err(|error| self.no_room(count * dtype.size_in_bytes(), error))?;
        Ok(CudaStorage { slice, device: self.device.clone() })
    }

    fn no_room(&self, needed: usize, error: DriverError) -> Error {
        if error.0 != OUT_OF_MEMORY {
            return failed("allocating memory")(error);
        }
        let memory = self.memory().unwrap_or(DeviceMemory { free: 0, total: 0, peak: None });
        let DeviceMemory { free, total, .. } = memory;
        Error::GpuMemory { what: format!("{needed} bytes more were needed, and {free} of {total} are free") }
    }

    /// Bytes of the host on the device. They may be forgotten when this returns: the driver has its own copy.
    pub(super) fn copied(&self, bytes: &[u8]) -> Result<CudaStorage> {
        let mut storage = self.room(bytes.len(), DType::U8)?;
        if let CudaStorageSlice::U8(slice) = &mut storage.slice
            && !bytes.is_empty()
        {
            self.stream.memcpy_htod(bytes, slice).map_err(failed("copying to the device"))?;
        }
        Ok(storage)
    }

    fn function(&self, kernel: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let mut functions = lock(&self.functions);
        if let Some((function, allowed)) = functions.get(kernel)
            && *allowed >= shared_bytes
        {
            return Ok(function.clone());
        }
        let function = self.module.load_function(kernel).map_err(failed(kernel))?;
        if shared_bytes > SHARED_BYTES {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let asked = function.set_attribute(attribute, shared_bytes as i32);
            asked.map_err(failed(format!("{shared_bytes} bytes of shared memory for {kernel}")))?;
        }
        functions.insert(kernel.to_owned(), (function.clone(), shared_bytes.max(SHARED_BYTES)));
        Ok(function)
    }

    /// # Safety
    /// As for `Gpu::launch`.
    pub(super) unsafe fn launch(&self, kernel: &str, launch: Launch, params: *const c_void) -> Result<()> {
        let [x, y] = launch.grid;
        self.timed(
            || kernel.to_owned(),
            || {
                let function = self.function(kernel, launch.shared_bytes)?;
                // SAFETY: the caller's promise. The parameters are copied before this returns.
                let started = unsafe {
                    result::launch_kernel(
                        function.cu_function(),
                        (x, y, 1),
                        (launch.threads, 1, 1),
                        launch.shared_bytes,
                        self.stream.cu_stream(),
                        &mut [params.cast_mut()],
                    )
                };
                started.map_err(failed(kernel))
            },
        )
    }

    /// # Safety
    /// As for `Gpu::launch`.
    pub(super) unsafe fn multiply(&self, product: &Product) -> Result<()> {
        let name = || {
            let [rows, columns, contracted] = product.dims;
            let times =
                if product.count > 1 { format!(", {} at once", product.count) } else { String::new() };
            format!("product {rows} x {contracted} x {columns} {:?}{times}", product.dtype)
        };
        // SAFETY: the caller's promise.
        self.timed(name, || unsafe { self.blas.multiply(product) })
    }

    /// Starts something, between two events if kernels are timed.
    fn timed(&self, name: impl FnOnce() -> String, start: impl FnOnce() -> Result<()>) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(failed("using the device"))?;
        self.launches.fetch_add(1, Ordering::Relaxed);
        let mut profile = lock(&self.profile);
        let Some(profile) = &mut *profile else {
            drop(profile);
            return start();
        };
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let before = self.stream.record_event(timed).map_err(failed("timing"))?;
        start()?;
        let after = self.stream.record_event(timed).map_err(failed("timing"))?;
        profile.push(name(), before, after);
        Ok(())
    }
}
