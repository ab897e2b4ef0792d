//! NCCL on a GPU.
//!
//! All groups of a rank work in one queue (a stream) of the rank's own, in the order in which they are called: NCCL's
//! kernels of several communicators could otherwise wait for each other. It is not the stream in which candle works.
//! NCCL puts its kernels into a stream from a thread of its own when it is told not to block, and candle's stream may be
//! that of each thread: there the kernel would come into the wrong one. So the two streams wait for each other by events.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use candle_core::{CudaDevice, Device, Tensor};

use super::ffi::{self, Communicator, Event, Queue, Span, Staging};
use super::lane::{Fault, Lane, Opener, Route, Step};
use super::line::SLOTS;
use crate::wire::FRAME;

/// Staging of at most so many bytes is kept for the next time.
const KEPT: usize = 1 << 24;

/// A rank's GPU.
#[derive(Debug)]
pub(super) struct Gpu {
    device: CudaDevice,
    queue: Arc<Queue>,
}

impl Gpu {
    pub(super) fn new(device: &Device) -> Result<Self, Fault> {
        let Device::Cuda(device) = device else {
            let what = "NCCL moves numbers between GPUs, and this rank has none; choose another collective";
            return Err(Fault::Here(what.to_owned()));
        };
        let queue = Arc::new(Queue::new(device.cuda_stream().context().clone())?);
        Ok(Self { device: device.clone(), queue })
    }
}

impl Opener for Gpu {
    type Lane = GpuLane;

    fn id(&self) -> Result<Vec<u8>, Fault> {
        ffi::unique_id().map(|id| id.to_vec())
    }

    fn open(&self, id: &[u8], rank: usize, size: usize) -> Result<GpuLane, Fault> {
        let id = id.try_into().map_err(|_| {
            let (found, wanted) = (id.len(), ffi::ID);
            Fault::Here(format!(
                "the id in the store has {found} bytes, not {wanted}; start all ranks with one build"
            ))
        })?;
        let (device, queue) = (self.device.clone(), self.queue.clone());
        // While a kernel waits for another rank, locking memory may wait for the kernel: what every operation needs is
        // there before the first.
        let frames = (0..=SLOTS).map(|_| Staging::new(&queue, FRAME * (size + 1)));
        let kept = Mutex::new(frames.collect::<Result<_, _>>()?);
        let communicator = Communicator::begin(queue.clone(), id, rank, size)?;
        Ok(GpuLane { device, queue, communicator, size, kept })
    }
}

/// A group's communicator.
#[derive(Debug)]
pub(super) struct GpuLane {
    device: CudaDevice,
    queue: Arc<Queue>,
    communicator: Communicator,
    size: usize,
    kept: Mutex<Vec<Staging>>,
}

/// Bytes on their way: what is sent lies at the beginning of the staging, what comes behind it.
#[derive(Debug)]
pub(super) struct GpuParcel {
    staging: Staging,
    sent: usize,
    received: usize,
    arrived: Option<Event>,
}

#[derive(Debug)]
pub(super) struct GpuRun {
    /// What is read and what is written, until candle's stream waits for that. Then they are let go, on the thread that
    /// works in that stream: the watchdog would free them in a stream of its own.
    tensors: Option<[Tensor; 2]>,
    /// Behind what candle's stream had to do before it.
    due: Event,
    over: Option<Event>,
}

impl GpuLane {
    fn staging(&self, len: usize) -> Result<Staging, Fault> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |staging: &Staging| staging.len() >= len && staging.len() / 4 <= len.max(FRAME);
        if let Some(place) = kept.iter().position(fits) {
            return Ok(kept.swap_remove(place));
        }
        drop(kept);
        Staging::new(&self.queue, len.next_power_of_two())
    }

    fn keep(&self, staging: Staging) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if staging.len() <= KEPT && kept.len() < 2 * SLOTS {
            kept.push(staging);
        }
    }
}

impl Lane for GpuLane {
    type Parcel = GpuParcel;
    type Run = GpuRun;

    fn owns(&self, x: &Tensor) -> bool {
        x.device().same_device(&Device::Cuda(self.device.clone()))
    }

    fn place(&self) -> String {
        let location = Device::Cuda(self.device.clone()).location();
        format!("{location:?} through the device that it was connected with")
    }

    fn post(&self, route: Route, mine: &[u8]) -> Result<GpuParcel, Fault> {
        let sent = mine.len();
        let received = if route == Route::Gather { sent * self.size } else { sent };
        let mut staging = self.staging(sent + received)?;
        staging.upload(mine)?;
        let (from, to) = (staging.span(0, sent), staging.span(sent, received));
        match route {
            Route::Gather => self.communicator.all_gather(from, to),
            Route::Exchange => self.communicator.exchange(from, to, self.size),
            Route::From(root) => self.communicator.broadcast(from, to, root),
        }?;
        Ok(GpuParcel { staging, sent, received, arrived: None })
    }

    fn run(&self, step: Step, x: &Tensor) -> Result<GpuRun, Fault> {
        let mut dims = x.dims().to_vec();
        if step == Step::Gather {
            dims[0] *= self.size;
        }
        let stream = self.device.cuda_stream();
        let result = ffi::unwritten(&dims, x.dtype(), &self.device)?;
        let (from, to) = (Span::of(x, &stream)?, Span::of(&result, &stream)?);
        let due = self.queue.wait_for(&stream)?;
        match step {
            Step::Sum => self.communicator.all_reduce(from, to, x.dtype(), true),
            Step::Max => self.communicator.all_reduce(from, to, x.dtype(), false),
            Step::Exchange => self.communicator.exchange(from, to, self.size),
            Step::Gather => self.communicator.all_gather(from, to),
            Step::From(root) => self.communicator.broadcast(from, to, root),
        }?;
        Ok(GpuRun { tensors: Some([x.clone(), result]), due, over: None })
    }

    fn settled(&self) -> Result<bool, Fault> {
        self.communicator.is_settled()
    }

    fn seal(&self, parcel: &mut GpuParcel) -> Result<(), Fault> {
        parcel.staging.download(parcel.sent, parcel.received)?;
        parcel.arrived = Some(self.queue.mark()?);
        Ok(())
    }

    fn seal_run(&self, run: &mut GpuRun) -> Result<Tensor, Fault> {
        let over = self.queue.mark()?;
        over.hold(&self.device.cuda_stream())?;
        run.over = Some(over);
        let tensors = run.tensors.take();
        tensors
            .map(|[_, result]| result)
            .ok_or_else(|| Fault::Here("an operation was sealed twice".to_owned()))
    }

    fn has_arrived(&self, parcel: &GpuParcel) -> Result<bool, Fault> {
        parcel.arrived.as_ref().map_or(Ok(false), Event::is_past)
    }

    fn open(&self, parcel: GpuParcel) -> Vec<u8> {
        let bytes = parcel.staging.read(parcel.sent, parcel.received);
        self.keep(parcel.staging);
        bytes
    }

    fn is_due(&self, run: &GpuRun) -> Result<bool, Fault> {
        run.due.is_past()
    }

    fn is_over(&self, run: &GpuRun) -> Result<bool, Fault> {
        run.over.as_ref().map_or(Ok(false), Event::is_past)
    }

    fn abort(&self) {
        self.communicator.abort();
    }

    fn finish(&self) -> Result<(), Fault> {
        self.communicator.finalize()?;
        while !self.communicator.is_settled()? {
            thread::sleep(Duration::from_millis(1));
        }
        self.communicator.destroy()
    }
}
