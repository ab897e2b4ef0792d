//! The border to NCCL and to the CUDA driver: the only place of this backend with `unsafe`.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::sync::Arc;

use candle_core::{CudaDevice, DType, Storage, Tensor};
use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DriverError, result, sys as cuda};
use cudarc::nccl::sys::{self as nccl, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use half::bf16;

use super::lane::Fault;

/// What NCCL expects at the beginning of a configuration (`nccl.h`: `NCCL_API_MAGIC`).
const MAGIC: c_uint = 0xcafe_beef;
/// As whose the configuration is read: that of the oldest NCCL that is used, so that newer fields get their defaults.
const CONFIG_VERSION: c_uint = 21_800;
/// `nccl.h`: `NCCL_CONFIG_UNDEF_INT`.
const UNSET: c_int = c_int::MIN;
/// Bytes of what ranks find each other by.
pub(super) const ID: usize = 128;

fn driver(doing: &str) -> impl Fn(DriverError) -> Fault {
    move |error| Fault::Here(format!("the CUDA driver failed to {doing}: {error}"))
}

/// NCCL's version, as its own number.
pub(super) fn version() -> Result<u32, Fault> {
    let mut version = 0;
    // SAFETY: NCCL writes a number to where it is told.
    match unsafe { nccl::ncclGetVersion(&raw mut version) } {
        ncclResult_t::ncclSuccess => Ok(version.unsigned_abs()),
        other => Err(fault(other, "tell its version", std::ptr::null_mut())),
    }
}

/// A name by which the ranks of a group find each other.
pub(super) fn unique_id() -> Result<[u8; ID], Fault> {
    let mut id = nccl::ncclUniqueId { internal: [0; ID] };
    // SAFETY: NCCL writes an id to where it is told.
    match unsafe { nccl::ncclGetUniqueId(&raw mut id) } {
        ncclResult_t::ncclSuccess => Ok(id.internal.map(|byte| byte.cast_unsigned())),
        other => Err(fault(other, "make an id", std::ptr::null_mut())),
    }
}

/// NCCL's words for what went wrong.
fn fault(result: ncclResult_t, doing: &str, comm: nccl::ncclComm_t) -> Fault {
    let text = |pointer: *const std::ffi::c_char| {
        // SAFETY: NCCL returns null or a text that ends in a zero and that stays.
        (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned())
    };
    // SAFETY: any result has a text.
    let name = text(unsafe { nccl::ncclGetErrorString(result) }).unwrap_or_default();
    // SAFETY: NCCL takes null, and a communicator that it made.
    let last = text(unsafe { nccl::ncclGetLastError(comm) }).filter(|last| !last.is_empty());
    let last = last.map_or_else(String::new, |last| format!(": {last}"));
    let what =
        format!("NCCL failed to {doing}: {name} ({}){last}; NCCL_DEBUG=INFO tells more", result as u32);
    match result {
        ncclResult_t::ncclRemoteError | ncclResult_t::ncclSystemError => Fault::Peer(what),
        _ => Fault::Here(what),
    }
}

/// A queue of the device's, of this program's own, and the context that it belongs to.
#[derive(Debug)]
pub(super) struct Queue {
    context: Arc<CudaContext>,
    stream: cuda::CUstream,
}

// SAFETY: CUDA locks its streams; any thread may use one that has made the context its own, which every method does.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Queue {
    /// Made without candle's knowledge: were there several streams that it knows, it would note every use of every tensor.
    pub(super) fn new(context: Arc<CudaContext>) -> Result<Self, Fault> {
        context.bind_to_thread().map_err(driver("use the GPU"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(driver("make a stream"))?;
        Ok(Self { context, stream })
    }

    pub(super) fn bind(&self) -> Result<(), Fault> {
        self.context.bind_to_thread().map_err(driver("use the GPU"))
    }

    /// An event behind everything that is in this queue now.
    pub(super) fn mark(self: &Arc<Self>) -> Result<Event, Fault> {
        let event = Event::new(self.clone())?;
        // SAFETY: both live.
        unsafe { result::event::record(event.event, self.stream) }.map_err(driver("record an event"))?;
        Ok(event)
    }

    /// What is put into this queue from now on waits for what `other` has to do now, behind which the event is. On the thread that
    /// calls, for a candle device may work in the stream of each thread.
    pub(super) fn wait_for(self: &Arc<Self>, other: &CudaStream) -> Result<Event, Fault> {
        let event = Event::new(self.clone())?;
        // SAFETY: all live.
        unsafe {
            result::event::record(event.event, other.cu_stream()).map_err(driver("record an event"))?;
            result::stream::wait_event(
                self.stream,
                event.event,
                cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
            )
            .map_err(driver("wait for an event"))?;
        }
        Ok(event)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: nobody uses it any more; CUDA gives it back when its work is done.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}

/// A place in a queue.
#[derive(Debug)]
pub(super) struct Event {
    queue: Arc<Queue>,
    event: cuda::CUevent,
}

// SAFETY: as for `Queue`.
unsafe impl Send for Event {}
// SAFETY: as for `Queue`.
unsafe impl Sync for Event {}

impl Event {
    fn new(queue: Arc<Queue>) -> Result<Self, Fault> {
        queue.bind()?;
        let event = result::event::create(cuda::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(driver("make an event"))?;
        Ok(Self { queue, event })
    }

    /// Whether everything before it is done.
    pub(super) fn is_past(&self) -> Result<bool, Fault> {
        self.queue.bind()?;
        // SAFETY: it lives.
        match unsafe { result::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(DriverError(cuda::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(driver("finish what it was given")(error)),
        }
    }

    /// What is put into `other` from now on waits for it.
    pub(super) fn hold(&self, other: &CudaStream) -> Result<(), Fault> {
        let flags = cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(other.cu_stream(), self.event, flags) }
            .map_err(driver("wait for an event"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.queue.bind().is_ok() {
            // SAFETY: it is not used any more; who waits for it already goes on to.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// Bytes in main memory that the GPU reads and writes by itself, and as many on the GPU.
#[derive(Debug)]
pub(super) struct Staging {
    queue: Arc<Queue>,
    host: *mut u8,
    device: cuda::CUdeviceptr,
    len: usize,
}

// SAFETY: it owns what it points to.
unsafe impl Send for Staging {}

impl Staging {
    pub(super) fn new(queue: &Arc<Queue>, len: usize) -> Result<Self, Fault> {
        queue.bind()?;
        // SAFETY: nothing is read from it before it is written.
        let host = unsafe { result::malloc_host(len, 0) }.map_err(driver("lock memory"))?.cast();
        let mut staging = Self { queue: queue.clone(), host, device: 0, len };
        // SAFETY: as above.
        let device = unsafe { result::malloc_async(queue.stream, len) };
        staging.device = device.map_err(driver("give memory"))?;
        Ok(staging)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Sends `bytes` to the GPU's memory, at its beginning.
    pub(super) fn upload(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        assert!(bytes.len() <= self.len);
        self.queue.bind()?;
        // SAFETY: so many bytes are there, of which nobody else knows; they stay until whoever holds this has seen an
        // event behind the copy.
        unsafe {
            let host = std::slice::from_raw_parts_mut(self.host, bytes.len());
            host.copy_from_slice(bytes);
            result::memcpy_htod_async(self.device, host, self.queue.stream)
        }
        .map_err(driver("copy to the GPU"))
    }

    /// Lets `len` bytes at `at` come back to main memory, to where the same place is there.
    pub(super) fn download(&mut self, at: usize, len: usize) -> Result<(), Fault> {
        assert!(at + len <= self.len);
        self.queue.bind()?;
        // SAFETY: as above.
        unsafe {
            let host = std::slice::from_raw_parts_mut(self.host.add(at), len);
            result::memcpy_dtoh_async(host, self.device + at as u64, self.queue.stream)
        }
        .map_err(driver("copy from the GPU"))
    }

    /// What has come back: an event behind [`download`](Self::download) has passed.
    pub(super) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len);
        // SAFETY: so many bytes are there, and nobody writes to them any more.
        unsafe { std::slice::from_raw_parts(self.host.add(at), len) }.to_vec()
    }

    /// The place on the GPU.
    pub(super) fn span(&self, at: usize, len: usize) -> Span {
        assert!(at + len <= self.len);
        Span { pointer: self.device + at as u64, len }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.queue.bind().is_ok() {
            // SAFETY: whoever drops it has seen that the GPU is done with it.
            unsafe {
                if self.device != 0 {
                    let _ = result::free_async(self.device, self.queue.stream);
                }
                let _ = result::free_host(self.host.cast());
            }
        }
    }
}

/// Bytes on the GPU. Whoever uses one keeps alive what it was made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pointer: cuda::CUdeviceptr,
    len: usize,
}

impl Span {
    /// Those of a tensor that lies in one piece.
    pub(super) fn of(x: &Tensor, stream: &CudaStream) -> Result<Self, Fault> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Fault::Here("a tensor that should be on a GPU is not".to_owned()));
        };
        let pointer = match x.dtype() {
            DType::F32 => storage.as_cuda_slice::<f32>().map(|slice| slice.device_ptr(stream).0),
            DType::BF16 => storage.as_cuda_slice::<bf16>().map(|slice| slice.device_ptr(stream).0),
            DType::I64 => storage.as_cuda_slice::<i64>().map(|slice| slice.device_ptr(stream).0),
            _ => storage.as_cuda_slice::<u8>().map(|slice| slice.device_ptr(stream).0),
        };
        let width = x.dtype().size_in_bytes();
        let pointer =
            pointer.map_err(|e| Fault::Here(e.to_string()))? + (layout.start_offset() * width) as u64;
        Ok(Self { pointer, len: x.elem_count() * width })
    }
}

/// A tensor on the GPU into which something is to be written.
pub(super) fn unwritten(dims: &[usize], dtype: DType, device: &CudaDevice) -> Result<Tensor, Fault> {
    let device = candle_core::Device::Cuda(device.clone());
    // SAFETY: whoever asks for it has every byte of it written before what the device does with it.
    unsafe { Tensor::empty(dims, dtype, &device) }.map_err(|e| Fault::Here(e.to_string()))
}

/// One rank's end of a group's connections.
#[derive(Debug)]
pub(super) struct Communicator {
    queue: Arc<Queue>,
    /// NCCL writes here while it connects, from a thread of its own. Leaked, for nobody knows when it is done.
    comm: &'static Slot,
}

#[derive(Debug)]
struct Slot(UnsafeCell<nccl::ncclComm_t>);

// SAFETY: this program only reads it, and only when NCCL has written it.
unsafe impl Sync for Slot {}
// SAFETY: NCCL allows one thread at a time, whichever it is; the gate before a lane sees to that.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Begins to connect.
    pub(super) fn begin(queue: Arc<Queue>, id: [u8; ID], rank: usize, size: usize) -> Result<Self, Fault> {
        queue.bind()?;
        let comm: &'static Slot = Box::leak(Box::new(Slot(UnsafeCell::new(std::ptr::null_mut()))));
        let id = nccl::ncclUniqueId { internal: id.map(|byte| byte.cast_signed()) };
        let mut config = nccl::ncclConfig_t {
            size: size_of::<nccl::ncclConfig_t>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            // No call waits for other ranks: all are asked about later.
            blocking: 0,
            cgaClusterSize: UNSET,
            minCTAs: UNSET,
            maxCTAs: UNSET,
            netName: std::ptr::null(),
            splitShare: UNSET,
            trafficClass: UNSET,
            commName: std::ptr::null(),
            collnetEnable: UNSET,
            CTAPolicy: UNSET,
            shrinkShare: UNSET,
            nvlsCTAs: UNSET,
            nChannelsPerNetPeer: UNSET,
            nvlinkCentricSched: UNSET,
            graphUsageMode: UNSET,
            numRmaCtx: UNSET,
            maxP2pPeers: UNSET,
        };
        // SAFETY: the slot stays for ever; the rest is read before the call returns.
        let result = unsafe {
            nccl::ncclCommInitRankConfig(comm.0.get(), size as c_int, id, rank as c_int, &raw mut config)
        };
        let communicator = Self { queue, comm };
        communicator.begun(result, "connect")?;
        Ok(communicator)
    }

    fn comm(&self) -> nccl::ncclComm_t {
        // SAFETY: NCCL writes the slot as a whole, at the beginning and at the end of connecting.
        unsafe { self.comm.0.get().read_volatile() }
    }

    /// A call may be under way when it returns.
    fn begun(&self, result: ncclResult_t, doing: &str) -> Result<(), Fault> {
        match result {
            ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
            other => Err(fault(other, doing, self.comm())),
        }
    }

    /// Whether what was begun is done, as far as the host is concerned.
    pub(super) fn is_settled(&self) -> Result<bool, Fault> {
        let comm = self.comm();
        if comm.is_null() {
            return Ok(false);
        }
        self.queue.bind()?;
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is NCCL's own and has not been given back.
        let result = unsafe { nccl::ncclCommGetAsyncError(comm, &raw mut state) };
        self.begun(result, "tell its state")?;
        self.begun(state, "go on")?;
        Ok(state == ncclResult_t::ncclSuccess)
    }

    /// Everybody's `mine`, by rank.
    pub(super) fn all_gather(&self, mine: Span, all: Span) -> Result<(), Fault> {
        self.queue.bind()?;
        let (from, to) = (mine.pointer as *const c_void, all.pointer as *mut c_void);
        // SAFETY: `Span` says that the bytes are there; who made them keeps them until an event behind this has passed.
        let result = unsafe {
            nccl::ncclAllGather(from, to, mine.len, ncclDataType_t::ncclUint8, self.comm(), self.stream())
        };
        self.begun(result, "gather")
    }

    /// The piece of each rank's `mine` that is this rank's.
    pub(super) fn exchange(&self, mine: Span, all: Span, size: usize) -> Result<(), Fault> {
        self.queue.bind()?;
        let (len, kind, comm, stream) =
            (mine.len / size, ncclDataType_t::ncclUint8, self.comm(), self.stream());
        // SAFETY: as above; the group is opened and closed on this thread.
        unsafe {
            self.begun(nccl::ncclGroupStart(), "begin an exchange")?;
            let mut result = Ok(());
            for peer in 0..size {
                let at = (peer * len) as u64;
                let (from, to) = ((mine.pointer + at) as *const c_void, (all.pointer + at) as *mut c_void);
                let sent = nccl::ncclSend(from, len, kind, peer as c_int, comm, stream);
                let received = nccl::ncclRecv(to, len, kind, peer as c_int, comm, stream);
                result = result.and(self.begun(sent, "send")).and(self.begun(received, "receive"));
            }
            let ended = self.begun(nccl::ncclGroupEnd(), "exchange");
            result.and(ended)
        }
    }

    /// The root's `mine`.
    pub(super) fn broadcast(&self, mine: Span, theirs: Span, root: usize) -> Result<(), Fault> {
        self.queue.bind()?;
        let (from, to, kind) =
            (mine.pointer as *const c_void, theirs.pointer as *mut c_void, ncclDataType_t::ncclUint8);
        // SAFETY: as above.
        let result = unsafe {
            nccl::ncclBroadcast(from, to, mine.len, kind, root as c_int, self.comm(), self.stream())
        };
        self.begun(result, "broadcast")
    }

    /// Everybody's numbers, added, or the largest.
    pub(super) fn all_reduce(&self, mine: Span, all: Span, dtype: DType, is_sum: bool) -> Result<(), Fault> {
        self.queue.bind()?;
        let kind = match dtype {
            DType::BF16 => ncclDataType_t::ncclBfloat16,
            DType::I64 => ncclDataType_t::ncclInt64,
            _ => ncclDataType_t::ncclFloat32,
        };
        let op = if is_sum { ncclRedOp_t::ncclSum } else { ncclRedOp_t::ncclMax };
        let count = mine.len / dtype.size_in_bytes();
        let (from, to) = (mine.pointer as *const c_void, all.pointer as *mut c_void);
        // SAFETY: as above.
        let result = unsafe { nccl::ncclAllReduce(from, to, count, kind, op, self.comm(), self.stream()) };
        self.begun(result, "reduce")
    }

    fn stream(&self) -> nccl::cudaStream_t {
        self.queue.stream.cast()
    }

    /// Ends what the ranks do together; [`is_settled`](Self::is_settled) tells when that is done.
    pub(super) fn finalize(&self) -> Result<(), Fault> {
        self.queue.bind()?;
        // SAFETY: the communicator is NCCL's own and has not been given back.
        let result = unsafe { nccl::ncclCommFinalize(self.comm()) };
        self.begun(result, "finish")
    }

    /// Gives back what NCCL has of it, after [`finalize`](Self::finalize). The last call.
    pub(super) fn destroy(&self) -> Result<(), Fault> {
        self.queue.bind()?;
        // SAFETY: as above, and no call comes after this one.
        let result = unsafe { nccl::ncclCommDestroy(self.comm()) };
        // Not `begun`: it is no more there to be asked.
        match result {
            ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
            other => Err(fault(other, "give back a communicator", std::ptr::null_mut())),
        }
    }

    /// Ends everything. The last call; it may never return.
    pub(super) fn abort(&self) {
        let comm = self.comm();
        // It may tell of an error of before.
        let _ = self.queue.bind();
        if !comm.is_null() {
            // SAFETY: as above; nobody else is inside, and nobody will be.
            let _ = unsafe { nccl::ncclCommAbort(comm) };
        }
    }
}
