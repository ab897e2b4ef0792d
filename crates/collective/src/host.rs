//! The protocol for ranks whose numbers pass through main memory, whatever moves the bytes. A tensor that lies elsewhere
//! is fetched, and its result is put where it was.
//!
//! Before every operation all ranks exchange frames that say what each is about to do. They all see the same frames and
//! so all come to the same verdict: go on, or the same error. What follows has sizes that all agree on. A payload of at
//! most [`wire::INLINE`] bytes travels within the frame, so that a small operation is one exchange.
//!
//! A large all-reduce is an exchange of parts, in which each rank gets everybody's numbers for its own part and reduces
//! them in the order of the ranks, and an all-gather of the results. So every rank moves twice the tensor's bytes,
//! whatever the number of ranks, and no number's result depends on its place, as it would in a ring.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use crate::error::Place;
use crate::numbers::{self, REDUCED};
use crate::ranks::Member;
use crate::transport::{Broken, Parts, Transport, Until};
use crate::wire::{self, HEADER, Header, INLINE, Operation};
use crate::{Collective, Error, Options, Reduce, Result};

/// Which group this is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) job: String,
    pub(crate) epoch: u64,
    /// "tensor", "data" or "world".
    pub(crate) group: &'static str,
    /// The members' ranks in the world, in the order of the group.
    pub(crate) members: Vec<usize>,
    /// This rank's number in the group.
    pub(crate) rank: usize,
}

impl Identity {
    pub(crate) fn new(options: &Options, group: &'static str, members: Vec<usize>, rank: usize) -> Self {
        Self { job: options.job.clone(), epoch: options.epoch, group, members, rank }
    }

    fn name(&self, rank: Option<usize>) -> Option<usize> {
        self.members.get(rank?).copied()
    }
}

/// A group over a transport.
#[derive(Debug)]
pub(crate) struct HostGroup<T> {
    identity: Identity,
    deadline: Duration,
    transport: T,
    /// The number of the next operation. Held during an operation: they are made one after the other.
    sequence: Mutex<u64>,
    failed: Mutex<Option<Error>>,
    /// What operations have taken so far.
    nanoseconds: AtomicU64,
    /// Whether one is at the transport's, where it waits for the other ranks.
    waits: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One operation on its way.
pub(crate) struct Turn<'a, T> {
    group: &'a HostGroup<T>,
    pub(crate) sequence: u64,
    pub(crate) until: Until,
}

impl<T: Transport> Turn<'_, T> {
    pub(crate) fn header(&self, operation: Operation, root: usize, operand: Option<&Tensor>) -> Header {
        Header {
            job: wire::hash(&self.group.identity.job),
            epoch: self.group.identity.epoch,
            sequence: self.sequence,
            operation,
            root: root as u32,
            on_device: false,
            dtype: operand.map_or(DType::U8, Tensor::dtype),
            dims: operand.map_or_else(Vec::new, |x| x.dims().to_vec()),
        }
    }

    /// Tells everybody what this rank is about to do; returns when all agree, with what came along.
    fn agree(&self, header: &Header, payload: &[u8]) -> Result<Parts> {
        let group = self.group;
        let frames = self.moved(|to| to.all_gather(header.frame(payload), self.until))?;
        let headers: Vec<_> = frames.iter().map(Header::read).collect();
        match wire::disagreement(&headers, &group.identity.members) {
            Some((kind, what)) => Err(Error::Mismatch { place: group.place(self.sequence), kind, what }),
            None => Ok(frames),
        }
    }

    /// What the transport brings, or the error with its place.
    pub(crate) fn moved<R>(&self, bring: impl FnOnce(&T) -> Result<R, Broken>) -> Result<R> {
        let group = self.group;
        group.waits.store(true, Ordering::Relaxed);
        let brought = bring(&group.transport);
        group.waits.store(false, Ordering::Relaxed);
        brought.map_err(|broken| self.broken(broken))
    }

    pub(crate) fn broken(&self, broken: Broken) -> Error {
        let identity = &self.group.identity;
        let place = self.group.place(self.sequence);
        match broken {
            Broken::Lost { rank, what } => Error::Lost { place, rank: identity.name(rank), what },
            Broken::Deadline { ranks } => Error::Deadline {
                place,
                ranks: ranks.into_iter().filter_map(|rank| identity.name(Some(rank))).collect(),
                seconds: self.until.after.as_secs_f64(),
            },
            Broken::Aborted { rank, reason } => Error::Aborted { rank: identity.name(rank), reason },
            #[cfg(any(feature = "nccl", test))]
            Broken::Mismatch { kind, sequence, what } => {
                Error::Mismatch { place: self.group.place(sequence), kind, what }
            }
            #[cfg(any(feature = "nccl", test))]
            Broken::Device { what } => Error::Device { place, what },
        }
    }

    pub(crate) fn refuse(&self, refusal: Option<String>) -> Result<()> {
        refusal.map_or(Ok(()), |what| Err(Error::Refused { place: self.group.place(self.sequence), what }))
    }

    /// The payload that goes with the frame: all of `x`, if it is small.
    fn inline(x: &Tensor) -> Result<Vec<u8>> {
        let len = x.elem_count() * numbers::width(x.dtype());
        if len > INLINE { Ok(Vec::new()) } else { numbers::to_bytes(x, len) }
    }
}

impl<T: Transport> HostGroup<T> {
    pub(crate) fn new(identity: Identity, deadline: Duration, transport: T) -> Self {
        let (sequence, failed) = (Mutex::new(1), Mutex::new(None));
        let (nanoseconds, waits) = Default::default();
        Self { identity, deadline, transport, sequence, failed, nanoseconds, waits }
    }

    #[cfg(any(feature = "nccl", test))]
    pub(crate) fn transport(&self) -> &T {
        &self.transport
    }

    /// The error of an operation of this group that is found from aside.
    #[cfg(any(feature = "nccl", test))]
    pub(crate) fn fail_aside(&self, sequence: u64, broken: Broken) -> Error {
        let turn = Turn { group: self, sequence, until: Until::after(self.deadline) };
        self.fail(turn.broken(broken))
    }

    #[cfg(any(feature = "nccl", test))]
    pub(crate) fn has_failed(&self) -> bool {
        lock(&self.failed).is_some()
    }

    fn place(&self, sequence: u64) -> Place {
        let Identity { job, epoch, group, .. } = &self.identity;
        Place { job: job.clone(), epoch: *epoch, group, sequence }
    }

    /// Runs one operation. If it fails, so do all later ones.
    pub(crate) fn operate<R>(&self, body: impl FnOnce(&Turn<'_, T>) -> Result<R>) -> Result<R> {
        let mut sequence = lock(&self.sequence);
        if let Some(error) = &*lock(&self.failed) {
            return Err(error.clone());
        }
        let turn = Turn { group: self, sequence: *sequence, until: Until::after(self.deadline) };
        *sequence += 1;
        self.transport.begins(turn.sequence);
        let start = Instant::now();
        let result = body(&turn).map_err(|error| self.fail(error));
        self.nanoseconds.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Remembers the error, and tells the others unless they know: a disagreement is seen by every rank itself, and
    /// whoever aborted has told everybody.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let first = lock(&self.failed).get_or_insert(error).clone();
        match &first {
            Error::Mismatch { place, kind, what } => self.transport.disagreed(*kind, place.sequence, what),
            // Others may wait for this rank, and not for the one that aborted.
            Error::Aborted { .. } => self.transport.leave(),
            error => self.transport.abort(&error.to_string()),
        }
        first
    }

    /// The first exchange: are these the same groups?
    #[cfg(any(feature = "gloo", feature = "nccl", test))]
    pub(crate) fn meet(&self, until: Until) -> Result<()> {
        let turn = Turn { group: self, sequence: 0, until };
        self.transport.begins(0);
        let met = turn.agree(&turn.header(Operation::Meet, 0, None), &[]);
        met.map(drop).map_err(|error| self.fail(error))
    }
}

impl<T: Transport> Collective for HostGroup<T> {
    fn rank(&self) -> usize {
        self.identity.rank
    }

    fn size(&self) -> usize {
        self.identity.members.len()
    }

    fn all_reduce(&self, x: &Tensor, reduce: Reduce) -> Result<Tensor> {
        self.operate(|turn| {
            turn.refuse(numbers::refuse(x, &REDUCED))?;
            let (dtype, count) = (x.dtype(), x.elem_count());
            let header = turn.header(Operation::of(reduce), 0, Some(x));
            let frames = turn.agree(&header, &Turn::<T>::inline(x)?)?;
            let len = count * numbers::width(dtype);
            if len <= INLINE {
                let parts: Vec<_> = frames.iter().map(|frame| &frame[HEADER..HEADER + len]).collect();
                let sum = numbers::reduce(dtype, &parts, reduce);
                return numbers::from_bytes(dtype, x.dims(), x.device(), std::iter::once(&sum[..]));
            }
            let padded = count.next_multiple_of(self.size()) * numbers::width(dtype);
            let mine = numbers::to_bytes(x, padded)?;
            let parts = turn.moved(|to| to.all_to_all(mine, turn.until))?;
            let sum = numbers::reduce(dtype, &parts.iter().collect::<Vec<_>>(), reduce);
            drop(parts);
            let sums = turn.moved(|to| to.all_gather(sum, turn.until))?;
            numbers::from_bytes(dtype, x.dims(), x.device(), sums.iter())
        })
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        self.operate(|turn| {
            turn.refuse(numbers::refuse_gather(x))?;
            let frames =
                turn.agree(&turn.header(Operation::AllGather, 0, Some(x)), &Turn::<T>::inline(x)?)?;
            let len = x.elem_count() * numbers::width(x.dtype());
            let mut dims = x.dims().to_vec();
            dims[0] *= self.size();
            if len <= INLINE {
                let parts = frames.iter().map(|frame| &frame[HEADER..HEADER + len]);
                return numbers::from_bytes(x.dtype(), &dims, x.device(), parts);
            }
            let mine = numbers::to_bytes(x, len)?;
            let parts = turn.moved(|to| to.all_gather(mine, turn.until))?;
            numbers::from_bytes(x.dtype(), &dims, x.device(), parts.iter())
        })
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        self.operate(|turn| {
            turn.refuse(numbers::refuse_broadcast(x, root, self.size()))?;
            let header = turn.header(Operation::Broadcast, root, Some(x));
            let frames = turn.agree(&header, &Turn::<T>::inline(x)?)?;
            let len = x.elem_count() * numbers::width(x.dtype());
            if len <= INLINE {
                let part = frames.iter().nth(root).map(|frame| &frame[HEADER..HEADER + len]);
                return numbers::from_bytes(x.dtype(), x.dims(), x.device(), part.into_iter());
            }
            let mine = if self.rank() == root { numbers::to_bytes(x, len)? } else { vec![0; len] };
            let bytes = turn.moved(|to| to.broadcast(mine, root, turn.until))?;
            numbers::from_bytes(x.dtype(), x.dims(), x.device(), std::iter::once(&bytes[..]))
        })
    }

    fn barrier(&self) -> Result<()> {
        self.operate(|turn| turn.agree(&turn.header(Operation::Barrier, 0, None), &[]).map(drop))
    }

    fn abort(&self, reason: &str) {
        let rank = self.identity.name(Some(self.identity.rank));
        lock(&self.failed).get_or_insert_with(|| Error::Aborted { rank, reason: reason.to_owned() });
        self.transport.abort(reason);
    }
}

impl<T: Transport> Member for HostGroup<T> {
    fn leave(&self) {
        self.transport.leave();
    }

    fn seconds(&self) -> f64 {
        self.nanoseconds.load(Ordering::Relaxed) as f64 * 1e-9
    }

    fn waits(&self) -> bool {
        self.waits.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;

    use super::*;
    use crate::Mismatch;
    use crate::local::{Board, Local};

    /// Two ranks at one board, with what the second is changed to.
    fn two(change: impl Fn(&mut Identity)) -> [HostGroup<Local>; 2] {
        let board = Arc::new(Board::new(2));
        [0, 1].map(|rank| {
            let mut identity = Identity::new(&Options::default(), "data", vec![3, 5], rank);
            if rank == 1 {
                change(&mut identity);
            }
            HostGroup::new(identity, Duration::from_secs(60), Local { board: board.clone(), rank })
        })
    }

    fn both<R: Send>(groups: &[HostGroup<Local>; 2], call: impl Fn(&HostGroup<Local>) -> R + Sync) -> [R; 2] {
        std::thread::scope(|scope| {
            let second = scope.spawn(|| call(&groups[1]));
            let first = call(&groups[0]);
            [first, second.join().unwrap()]
        })
    }

    /// Both ranks refuse to go on, for this reason.
    fn expect(change: impl Fn(&mut Identity), expected: Mismatch, words: &str) {
        let groups = two(change);
        let x = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        for result in both(&groups, |group| group.all_reduce(&x, Reduce::Sum)) {
            match result.unwrap_err() {
                Error::Mismatch { kind, what, .. } => {
                    assert_eq!(kind, expected);
                    assert!(what.contains(words), "{what}");
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn an_operation_of_another_epoch_or_job_is_refused_on_both_sides() {
        expect(|i| i.epoch = 9, Mismatch::Epoch, "rank 3 is of epoch 0 and rank 5 of epoch 9");
        expect(|i| i.job.push('x'), Mismatch::Job, "ranks 3 and 5 belong to different jobs");
    }

    #[test]
    fn the_place_of_an_error_names_job_epoch_group_and_operation() {
        let groups = two(|_| ());
        both(&groups, |group| group.barrier().unwrap());
        groups[1].leave();
        let error = groups[0].barrier().unwrap_err().to_string();
        assert_eq!(
            error,
            "job \"incipit\", epoch 0, operation 2 of the data group: rank 5 is lost: it has left the group; look for \
             the cause in the messages of that rank"
        );
    }

    #[test]
    fn a_rank_waits_for_others_while_it_is_alone_in_an_operation() {
        let groups = two(|_| ());
        assert!(!groups[0].waits());
        std::thread::scope(|scope| {
            let first = scope.spawn(|| groups[0].barrier());
            while !groups[0].waits() {
                std::thread::yield_now();
            }
            assert!(!groups[1].waits());
            groups[1].barrier().unwrap();
            first.join().unwrap().unwrap();
        });
        assert!(!groups[0].waits() && !groups[1].waits());
    }

    #[test]
    fn a_payload_at_the_border_of_the_frame_is_whole_on_either_side() {
        let groups = two(|_| ());
        for n in [INLINE / 4 - 1, INLINE / 4, INLINE / 4 + 1] {
            let x = Tensor::ones(n, DType::F32, &Device::Cpu).unwrap();
            for sum in both(&groups, |group| group.all_reduce(&x, Reduce::Sum).unwrap()) {
                assert_eq!(sum.to_vec1::<f32>().unwrap(), vec![2.0; n]);
            }
        }
    }
}
