//! NCCL and a GPU as far as the protocol sees them, for tests without either: ranks are threads, a tensor in main memory
//! stands for one on a GPU, and a thread of each lane does one after the other what is in its queue. It does what NCCL
//! does badly: it waits for ever for a rank that does not come or that does something else, gives a wrong sum if counts
//! differ, and may hang in an abort.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use half::bf16;

use super::lane::{Fault, Lane, Opener, Route, Step};
use crate::Reduce;
use crate::numbers;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the fakes of one test have in common.
#[derive(Debug, Default)]
pub(super) struct Net {
    hubs: Mutex<HashMap<Vec<u8>, Arc<Hub>>>,
    ids: AtomicUsize,
    /// An abort never returns.
    pub(super) abort_hangs: AtomicBool,
    /// Ranks that do not connect.
    pub(super) lost: Mutex<Vec<usize>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Post(Route),
    Run(Step),
}

#[derive(Debug)]
struct Call {
    kind: Kind,
    dtype: DType,
    bytes: Arc<Vec<u8>>,
}

/// One communicator, seen from above.
#[derive(Debug, Default)]
struct Hub {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What each rank has begun to do, in order.
    calls: Vec<Vec<Call>>,
    joined: Vec<bool>,
    aborted: Vec<bool>,
    dead: Vec<bool>,
}

impl Hub {
    /// What comes of the call number `n` of `rank`; nothing if it was aborted.
    fn meet(&self, rank: usize, n: usize) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        loop {
            if state.aborted[rank] || state.dead[rank] {
                return None;
            }
            let calls: Vec<_> = state.calls.iter().filter_map(|calls| calls.get(n)).collect();
            if calls.len() == state.calls.len()
                && let Some(result) = combine(&calls, rank)
            {
                return Some(result);
            }
            let waited = self.changed.wait_timeout(state, Duration::from_millis(50));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The result, unless the ranks do things that do not go together: then they hang.
fn combine(calls: &[&Call], rank: usize) -> Option<Vec<u8>> {
    let first = calls[rank];
    let len = |call: &&&Call| call.bytes.len();
    let alike = calls.iter().all(|call| call.kind == first.kind);
    let same = calls.iter().all(|call| call.bytes.len() == first.bytes.len());
    let whole = |root: usize| calls[root].bytes.to_vec();
    let gathered = || calls.iter().flat_map(|call| call.bytes.iter().copied()).collect();
    if !alike {
        return None;
    }
    match first.kind {
        Kind::Run(step @ (Step::Sum | Step::Max)) => {
            let shortest = calls.iter().map(|call| len(&call)).min()?;
            let parts: Vec<_> = calls.iter().rev().map(|call| &call.bytes[..shortest]).collect();
            let mut sum = match step {
                Step::Max if first.dtype != DType::I64 => largest(first.dtype, &parts),
                Step::Max => numbers::reduce(first.dtype, &parts, Reduce::Max),
                _ => sum_in_rings(first.dtype, parts),
            };
            sum.resize(first.bytes.len(), 0);
            Some(sum)
        }
        _ if !same => None,
        Kind::Post(Route::Gather) | Kind::Run(Step::Gather) => Some(gathered()),
        Kind::Post(Route::From(root)) | Kind::Run(Step::From(root)) => Some(whole(root)),
        Kind::Post(Route::Exchange) | Kind::Run(Step::Exchange) => {
            let len = first.bytes.len() / calls.len();
            Some(calls.iter().flat_map(|call| call.bytes[rank * len..(rank + 1) * len].to_vec()).collect())
        }
    }
}

/// In an order of NCCL's: which rank is the first depends on a number's place.
fn sum_in_rings(dtype: DType, mut parts: Vec<&[u8]>) -> Vec<u8> {
    let width = numbers::width(dtype);
    let sums: Vec<Vec<u8>> = (0..parts.len())
        .map(|_| {
            parts.rotate_left(1);
            numbers::reduce(dtype, &parts, Reduce::Sum)
        })
        .collect();
    let number = |(i, first): (usize, &[u8])| sums[i % sums.len()][i * width..][..first.len()].to_vec();
    sums[0].chunks(width).enumerate().flat_map(number).collect()
}

/// As NCCL does it: a NaN is passed over.
fn largest(dtype: DType, parts: &[&[u8]]) -> Vec<u8> {
    let read = |part: &[u8]| -> Vec<f32> {
        match dtype {
            DType::BF16 => part.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => part.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        }
    };
    let mut max = read(parts[0]);
    for part in &parts[1..] {
        max.iter_mut().zip(read(part)).for_each(|(max, x)| *max = max.max(x));
    }
    match dtype {
        DType::BF16 => max.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => max.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// What a lane's queue does.
type Job = Box<dyn FnOnce() + Send>;
/// What it does with what came of a call.
type Then = Box<dyn FnOnce(Option<Vec<u8>>) + Send>;

#[derive(Debug)]
pub(super) struct FakeLane {
    net: Arc<Net>,
    hub: Arc<Hub>,
    rank: usize,
    queue: Arc<Queue>,
    /// Tensors in main memory stand for tensors on its GPU.
    pub(super) stands: AtomicBool,
    /// Its GPU has not yet come to the operations that are in its queue.
    pub(super) behind: Arc<AtomicBool>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    changed: Condvar,
    /// How many are not done.
    left: AtomicUsize,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queue({:?})", self.left)
    }
}

#[derive(Debug)]
pub(super) struct FakeParcel {
    bytes: Arc<Mutex<Option<Vec<u8>>>>,
    len: usize,
}

#[derive(Debug)]
pub(super) struct FakeRun {
    step: Step,
    result: Tensor,
    over: Arc<AtomicBool>,
}

/// Writes into a tensor that others hold, as a GPU does.
struct Fill(Vec<u8>);

impl InplaceOp1 for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        fn each<T, const N: usize>(values: &mut [T], bytes: &[u8], read: fn([u8; N]) -> T) {
            values.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| *value = read(*bytes));
        }
        match storage {
            CpuStorage::F32(values) => each(values, &self.0, f32::from_le_bytes),
            CpuStorage::BF16(values) => each(values, &self.0, bf16::from_le_bytes),
            CpuStorage::I64(values) => each(values, &self.0, i64::from_le_bytes),
            CpuStorage::U8(values) => values.copy_from_slice(&self.0),
            _ => unreachable!("no such tensor is moved"),
        }
        Ok(())
    }
}

impl FakeLane {
    /// The process of this rank ends without a word.
    pub(super) fn die(&self) {
        lock(&self.hub.state).dead[self.rank] = true;
        self.hub.changed.notify_all();
    }

    fn push(&self, call: Call, then: Then) {
        let runs = matches!(call.kind, Kind::Run(_));
        let mut state = lock(&self.hub.state);
        let (hub, rank, n) = (self.hub.clone(), self.rank, state.calls[self.rank].len());
        state.calls[self.rank].push(call);
        drop(state);
        self.hub.changed.notify_all();
        self.queue.left.fetch_add(1, Ordering::SeqCst);
        let behind = self.behind.clone();
        lock(&self.queue.jobs).push_back(Box::new(move || {
            while runs && behind.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            then(hub.meet(rank, n));
        }));
        self.queue.changed.notify_all();
    }

    fn work(queue: &Queue) {
        loop {
            let mut jobs = lock(&queue.jobs);
            while jobs.is_empty() {
                jobs = queue.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
            let job = jobs.pop_front();
            drop(jobs);
            if let Some(job) = job {
                job();
            }
            queue.left.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Lane for FakeLane {
    type Parcel = FakeParcel;
    type Run = FakeRun;

    fn owns(&self, _: &Tensor) -> bool {
        self.stands.load(Ordering::SeqCst)
    }

    fn place(&self) -> String {
        "no device at all".to_owned()
    }

    fn post(&self, route: Route, mine: &[u8]) -> Result<FakeParcel, Fault> {
        let len = mine.len() * if route == Route::Gather { lock(&self.hub.state).calls.len() } else { 1 };
        let bytes = Arc::new(Mutex::new(None));
        let (kind, arrived) = (Kind::Post(route), bytes.clone());
        let job = move |result: Option<Vec<u8>>| {
            *lock(&arrived) = Some(result.unwrap_or_else(|| vec![0xab; len]));
        };
        self.push(Call { kind, dtype: DType::U8, bytes: Arc::new(mine.to_vec()) }, Box::new(job));
        Ok(FakeParcel { bytes, len })
    }

    fn run(&self, step: Step, x: &Tensor) -> Result<FakeRun, Fault> {
        let here = |e: candle_core::Error| Fault::Here(e.to_string());
        let len = x.elem_count() * numbers::width(x.dtype());
        let bytes = Arc::new(numbers::to_bytes(x, len).map_err(|e| Fault::Here(e.to_string()))?);
        let mut dims = x.dims().to_vec();
        if step == Step::Gather {
            dims[0] *= lock(&self.hub.state).calls.len();
        }
        let result = Tensor::zeros(dims, x.dtype(), &Device::Cpu).map_err(here)?;
        let over = Arc::new(AtomicBool::new(false));
        let (filled, done) = (result.clone(), over.clone());
        let job = move |bytes: Option<Vec<u8>>| {
            if let Some(bytes) = bytes {
                filled.inplace_op1(&Fill(bytes)).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        };
        self.push(Call { kind: Kind::Run(step), dtype: x.dtype(), bytes }, Box::new(job));
        Ok(FakeRun { step, result, over })
    }

    fn settled(&self) -> Result<bool, Fault> {
        let state = lock(&self.hub.state);
        match state.dead.iter().any(|dead| *dead) {
            true => Err(Fault::Peer("connection reset by peer".to_owned())),
            false => Ok(state.joined.iter().all(|joined| *joined)),
        }
    }

    fn seal(&self, _: &mut FakeParcel) -> Result<(), Fault> {
        Ok(())
    }

    fn seal_run(&self, run: &mut FakeRun) -> Result<Tensor, Fault> {
        // What candle does to a maximum, or to pieces, comes behind it on a GPU. Here it would come before.
        let start = Instant::now();
        while matches!(run.step, Step::Max | Step::Exchange)
            && !run.over.load(Ordering::SeqCst)
            && start.elapsed() < Duration::from_secs(5)
        {
            thread::sleep(Duration::from_micros(100));
        }
        Ok(run.result.clone())
    }

    fn has_arrived(&self, parcel: &FakeParcel) -> Result<bool, Fault> {
        Ok(lock(&parcel.bytes).is_some())
    }

    fn open(&self, parcel: FakeParcel) -> Vec<u8> {
        let bytes = lock(&parcel.bytes).take().unwrap();
        assert_eq!(bytes.len(), parcel.len);
        bytes
    }

    fn is_due(&self, _: &FakeRun) -> Result<bool, Fault> {
        Ok(!self.behind.load(Ordering::SeqCst))
    }

    fn is_over(&self, run: &FakeRun) -> Result<bool, Fault> {
        Ok(run.over.load(Ordering::SeqCst))
    }

    fn abort(&self) {
        while self.net.abort_hangs.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(10));
        }
        lock(&self.hub.state).aborted[self.rank] = true;
        self.hub.changed.notify_all();
    }

    fn finish(&self) -> Result<(), Fault> {
        while self.queue.left.load(Ordering::SeqCst) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The opener of rank `rank` of the world.
#[derive(Debug)]
pub(super) struct Fakes {
    pub(super) net: Arc<Net>,
    pub(super) rank: usize,
}

impl Opener for Fakes {
    type Lane = FakeLane;

    fn id(&self) -> Result<Vec<u8>, Fault> {
        Ok(self.net.ids.fetch_add(1, Ordering::SeqCst).to_string().into_bytes())
    }

    fn open(&self, id: &[u8], rank: usize, size: usize) -> Result<FakeLane, Fault> {
        let hub = lock(&self.net.hubs).entry(id.to_vec()).or_default().clone();
        let mut state = lock(&hub.state);
        state.calls.resize_with(size, Vec::new);
        state.joined.resize(size, false);
        state.aborted.resize(size, false);
        state.dead.resize(size, false);
        state.joined[rank] = !lock(&self.net.lost).contains(&self.rank);
        drop(state);
        let queue = Arc::new(Queue::default());
        let worker = queue.clone();
        thread::spawn(move || FakeLane::work(&worker));
        let (stands, behind) = Default::default();
        Ok(FakeLane { net: self.net.clone(), hub, rank, queue, stands, behind })
    }
}
