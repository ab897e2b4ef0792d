//! A group's lane with what the protocol needs around it: waiting with a deadline, frames that are checked behind the
//! fact, and the reason why the group ended.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::disagreement::Disagreement;
use super::gate::{End, Gate, Stop};
use super::lane::{Fault, Lane, Route, Step};
use super::notes::{Absence, BEAT, Notes, SILENCE};
use super::patience::{HEALTH, LOOK, Patience};
use super::watchdog::Watchdog;
use crate::Mismatch;
use crate::reason::Reason;
use crate::transport::{Broken, Parts, Transport, Until};
use crate::wire::{self, FRAME, Header};

/// How many operations on tensors of the device may be unfinished; one more waits for the first of them.
pub(super) const SLOTS: usize = 64;
/// How long a rank that leaves waits for NCCL to bring its last bytes to the others.
const LEAVE: Duration = Duration::from_secs(2);

/// Where the rank of a line sits.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    /// Which of the three groups of a rank this is.
    pub(super) group: usize,
    /// The members' ranks in the world.
    pub(super) members: Vec<usize>,
    /// This rank's number among them.
    pub(super) rank: usize,
}

/// An operation on a tensor of the device that is not known to be done.
struct Pending<L: Lane> {
    sequence: u64,
    /// What all ranks said of it, until that is compared.
    frames: Option<L::Parcel>,
    run: L::Run,
    /// Since when nothing was unfinished before it.
    since: Instant,
}

pub(super) struct Line<L: Lane> {
    gate: Gate<L>,
    seat: Seat,
    deadline: Duration,
    /// The operation that was begun last.
    sequence: AtomicU64,
    pending: Mutex<VecDeque<Pending<L>>>,
    /// When this rank last looked into the store.
    looked: Mutex<Instant>,
    broken: Mutex<Option<Broken>>,
    /// Whether a thread waits here for other ranks.
    waits: AtomicBool,
    /// Whether this rank waits for others, as the watchdog saw it last.
    awaits: AtomicBool,
    reason: Reason,
    notes: Arc<Notes>,
    disagreement: Disagreement,
    /// It watches as long as a line is there.
    _watchdog: Arc<Watchdog>,
}

impl<L: Lane> std::fmt::Debug for Line<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Line({:?}, {:?})", self.seat, self.gate)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a line needs besides its lane.
pub(super) struct Outfit {
    pub(super) seat: Seat,
    pub(super) deadline: Duration,
    pub(super) reason: Reason,
    pub(super) notes: Arc<Notes>,
    pub(super) disagreement: Disagreement,
    pub(super) watchdog: Arc<Watchdog>,
}

impl<L: Lane> Line<L> {
    pub(super) fn new(lane: L, outfit: Outfit) -> Self {
        let Outfit { seat, deadline, reason, notes, disagreement, watchdog } = outfit;
        Self {
            gate: Gate::new(lane),
            seat,
            deadline,
            sequence: AtomicU64::new(0),
            pending: Mutex::default(),
            looked: Mutex::new(Instant::now()),
            broken: Mutex::default(),
            waits: AtomicBool::new(false),
            awaits: AtomicBool::new(false),
            reason,
            notes,
            disagreement,
            _watchdog: watchdog,
        }
    }

    pub(super) fn lane(&self) -> &L {
        self.gate.lane()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Whether NCCL has given back what it had, after `wait` at most.
    #[cfg(test)]
    pub(super) fn has_ended(&self, wait: Duration) -> bool {
        self.gate.has_ended(wait)
    }

    #[cfg(test)]
    pub(super) fn pending(&self) -> usize {
        lock(&self.pending).len()
    }

    /// Waits until NCCL has connected the ranks.
    pub(super) fn connect(&self, until: Until) -> Result<(), Broken> {
        self.wait(0, until, |lane| lane.settled())
    }

    fn size(&self) -> usize {
        self.seat.members.len()
    }

    /// Keeps the first reason why the group ends: nothing is waited for after it.
    fn remember(&self, broken: &Broken) {
        lock(&self.broken).get_or_insert_with(|| broken.clone());
    }

    /// Why the group has ended on this side.
    fn ended(&self) -> Broken {
        lock(&self.broken).clone().unwrap_or_else(|| Broken::Lost {
            rank: Some(self.seat.rank),
            what: "it has left the group".to_owned(),
        })
    }

    /// Waits until `done` says so, unless the group breaks before.
    fn wait(
        &self,
        sequence: u64,
        until: Until,
        done: impl Fn(&L) -> Result<bool, Fault>,
    ) -> Result<(), Broken> {
        self.waits.store(true, Ordering::Relaxed);
        let waited = self.waited(sequence, until, done);
        self.waits.store(false, Ordering::Relaxed);
        waited
    }

    fn waited(
        &self,
        sequence: u64,
        until: Until,
        done: impl Fn(&L) -> Result<bool, Fault>,
    ) -> Result<(), Broken> {
        let mut patience = Patience::new();
        loop {
            match self.gate.enter(&done) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(stop) => return Err(self.explain(stop, sequence)),
            }
            self.check()?;
            if Patience::is_due(&mut patience.health, HEALTH)
                && let Err(stop) = self.gate.enter(L::settled)
            {
                return Err(self.explain(stop, sequence));
            }
            if Patience::is_due(&mut patience.look, LOOK)
                && let Some(broken) = self.look(sequence)
            {
                return Err(broken);
            }
            if until.is_over() {
                return Err(self.late(sequence));
            }
            patience.rest();
        }
    }

    /// The first operation that is not known to be done, with `sequence` as the last.
    fn oldest(&self, sequence: u64) -> u64 {
        lock(&self.pending).front().map_or(sequence, |first| first.sequence.min(sequence))
    }

    /// Looks into the store for the reason why operation `sequence` does not end.
    fn look(&self, sequence: u64) -> Option<Broken> {
        self.notes.publish();
        *lock(&self.looked) = Instant::now();
        let sequence = self.oldest(sequence);
        self.disagreement.last_known().or_else(|| self.reason.last_known()).or_else(|| {
            let (rank, absence) = self.notes.absent(self.seat.group, sequence, &self.seat.members)?;
            let what = match absence {
                Absence::Left => "it has left the group".to_owned(),
                Absence::Silent => format!("it has given no sign of life for {} s", SILENCE.as_secs()),
            };
            Some(Broken::Lost { rank: Some(rank), what })
        })
    }

    fn has_not_looked_for(&self, time: Duration) -> bool {
        lock(&self.looked).elapsed() > time
    }

    /// Asks a group to which this rank comes after a while whether it still is: NCCL may bring the numbers of a rank that
    /// has given up since it sent them.
    fn knock(&self) -> Result<(), Broken> {
        if self.has_not_looked_for(LOOK / 2) {
            *lock(&self.looked) = Instant::now();
            if let Some(broken) = self.disagreement.last_known().or_else(|| self.reason.last_known()) {
                return Err(broken);
            }
        }
        Ok(())
    }

    fn late(&self, sequence: u64) -> Broken {
        let late = || self.notes.late(self.seat.group, self.oldest(sequence), &self.seat.members);
        self.look(sequence).unwrap_or_else(|| Broken::Deadline { ranks: late() })
    }

    /// Why a call failed. A rank that is gone is only seen as a broken connection at first.
    fn explain(&self, stop: Stop, sequence: u64) -> Broken {
        match stop {
            Stop::Closed => self.ended(),
            // NCCL itself may refuse what another rank has found not to match.
            Stop::Fault(Fault::Here(what)) => self.disagreement.find().unwrap_or(Broken::Device { what }),
            Stop::Fault(Fault::Peer(what)) => {
                let until = Until::after(SILENCE + 2 * BEAT);
                loop {
                    if let Some(broken) = self.look(sequence) {
                        return broken;
                    }
                    if self.is_closed() {
                        return self.ended();
                    }
                    if until.is_over() {
                        return Broken::Lost { rank: None, what };
                    }
                    thread::sleep(LOOK / 5);
                }
            }
        }
    }

    /// Puts one operation into the queue: `begin` tells NCCL, and `seal` what follows it.
    fn enqueue<D, R>(
        &self,
        sequence: u64,
        until: Until,
        begin: impl FnOnce(&L) -> Result<D, Fault>,
        seal: impl FnOnce(&L, &mut D) -> Result<R, Fault>,
    ) -> Result<(D, R), Broken> {
        let explain = |stop| self.explain(stop, sequence);
        // If this goes wrong, NCCL may write to its memory for as long as the process lives.
        let mut draft = ManuallyDrop::new(self.gate.enter(begin).map_err(explain)?);
        self.wait(sequence, until, L::settled)?;
        let sealed = self.gate.enter(|lane| seal(lane, &mut draft)).map_err(explain)?;
        Ok((ManuallyDrop::into_inner(draft), sealed))
    }

    fn send(&self, sequence: u64, until: Until, route: Route, mine: &[u8]) -> Result<L::Parcel, Broken> {
        let (parcel, ()) = self.enqueue(sequence, until, |lane| lane.post(route, mine), L::seal)?;
        Ok(parcel)
    }

    /// Sends bytes and waits for what comes.
    fn exchange(&self, route: Route, mine: &[u8], until: Until) -> Result<Vec<u8>, Broken> {
        self.exchanged(route, mine, until).inspect_err(|broken| self.remember(broken))
    }

    fn exchanged(&self, route: Route, mine: &[u8], until: Until) -> Result<Vec<u8>, Broken> {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.knock()?;
        let parcel = ManuallyDrop::new(self.send(sequence, until, route, mine)?);
        self.wait(sequence, until, |lane| lane.has_arrived(&parcel))?;
        // It came after all that was in the queue before, so that nothing is left unchecked.
        self.check()?;
        Ok(self.lane().open(ManuallyDrop::into_inner(parcel)))
    }

    /// Puts an operation on a tensor of the device into the queue, behind the frame that says what it is; what goes on with one has none.
    pub(super) fn run(
        &self,
        frame: Option<&[u8]>,
        until: Until,
        step: Step,
        x: &Tensor,
    ) -> Result<Tensor, Broken> {
        self.start(frame, until, step, x).inspect_err(|broken| self.remember(broken))
    }

    fn start(&self, frame: Option<&[u8]>, until: Until, step: Step, x: &Tensor) -> Result<Tensor, Broken> {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.knock()?;
        self.check()?;
        self.wait(sequence, until, |_| Ok(lock(&self.pending).len() < SLOTS))?;
        let send = |frame| self.send(sequence, until, Route::Gather, frame).map(ManuallyDrop::new);
        let frames = frame.map(send).transpose()?;
        let (run, result) = self.enqueue(sequence, until, |lane| lane.run(step, x), L::seal_run)?;
        let frames = frames.map(ManuallyDrop::into_inner);
        lock(&self.pending).push_back(Pending { sequence, frames, run, since: Instant::now() });
        Ok(result)
    }

    /// Compares the frames that have come, and forgets what is done.
    fn check(&self) -> Result<(), Broken> {
        let checked = self.compare();
        // Of a lane that is aborted, anything may seem to have come.
        if self.is_closed() {
            return Err(self.ended());
        }
        // Another thread may have compared the frames first.
        if let Some(broken) = lock(&self.broken).clone() {
            return Err(broken);
        }
        checked.map_err(|(sequence, found)| match found {
            Found::Fault(fault) => self.explain(Stop::Fault(fault), sequence),
            Found::Disagreement(kind, what) => Broken::Mismatch { kind, sequence, what },
        })
    }

    fn compare(&self) -> Result<(), (u64, Found)> {
        if self.is_closed() {
            return Ok(());
        }
        let mut pending = lock(&self.pending);
        for Pending { sequence, frames, .. } in &mut *pending {
            let has_arrived =
                |parcel| self.lane().has_arrived(parcel).map_err(|f| (*sequence, Found::Fault(f)));
            if !frames.as_ref().map_or(Ok(true), has_arrived)? {
                break;
            }
            let Some(parcel) = frames.take() else { continue };
            let bytes = self.lane().open(parcel);
            let headers: Vec<_> = bytes.chunks(FRAME).map(Header::read).collect();
            if let Some((kind, what)) = wire::disagreement(&headers, &self.seat.members) {
                // Before another thread can look: it would find no frames to compare.
                self.remember(&Broken::Mismatch { kind, sequence: *sequence, what: what.clone() });
                return Err((*sequence, Found::Disagreement(kind, what)));
            }
        }
        while let Some(first) = pending.front() {
            let is_over = || self.lane().is_over(&first.run).map_err(|f| (first.sequence, Found::Fault(f)));
            if first.frames.is_some() || !is_over()? {
                break;
            }
            pending.pop_front();
            if let Some(next) = pending.front_mut() {
                next.since = Instant::now();
            }
        }
        Ok(())
    }

    /// Whether this rank waits for others, as far as is known. Asks no device: a driver that loads a kernel answers nobody until what is in
    /// the queue is done.
    pub(super) fn awaits(&self) -> bool {
        self.awaits.load(Ordering::Relaxed)
    }

    /// Whether it is for others that the first operation on a tensor of the device is not over: this rank's device has come to it, or its
    /// frames, which wait for nothing but what comes before, have not. Where all are over, whether a thread waits.
    fn see_who_waits(&self) -> Result<(), (u64, Broken)> {
        let seen = match lock(&self.pending).front() {
            Some(Pending { frames: Some(_), .. }) => Ok(true),
            Some(Pending { run, sequence, .. }) => {
                self.lane().is_due(run).map_err(|fault| (*sequence, fault))
            }
            None => Ok(self.waits.load(Ordering::Relaxed)),
        };
        let waits =
            seen.map_err(|(sequence, fault)| (sequence, self.explain(Stop::Fault(fault), sequence)))?;
        self.awaits.store(waits, Ordering::Relaxed);
        Ok(())
    }

    /// What the watchdog does: finds out an operation on a tensor of the device that went wrong or does not end.
    pub(super) fn look_over(&self) -> Result<(), (u64, Broken)> {
        self.looked_over().inspect_err(|(_, broken)| self.remember(broken))
    }

    fn looked_over(&self) -> Result<(), (u64, Broken)> {
        let first = |line: &Self| lock(&line.pending).front().map(|first| (first.sequence, first.since));
        self.see_who_waits()?;
        let Some((sequence, _)) = first(self) else { return Ok(()) };
        self.check().map_err(|broken| (sequence, broken))?;
        let Some((sequence, since)) = first(self) else { return Ok(()) };
        let waited = since.elapsed();
        if waited > HEALTH
            && let Err(stop) = self.gate.enter(L::settled)
        {
            return Err((sequence, self.explain(stop, sequence)));
        }
        if waited > LOOK
            && self.has_not_looked_for(LOOK)
            && let Some(broken) = self.look(sequence)
        {
            return Err((sequence, broken));
        }
        if waited > self.deadline { Err((sequence, self.late(sequence))) } else { Ok(()) }
    }

    fn close(&self, end: End, broken: &Broken) {
        self.remember(broken);
        // Not while holding the lock: another thread may be about to give up.
        let pending = std::mem::take(&mut *lock(&self.pending));
        self.gate.close(end, pending);
    }
}

/// What is wrong with an operation of which the frames have come.
enum Found {
    Fault(Fault),
    Disagreement(Mismatch, String),
}

impl<L: Lane> Transport for Line<L> {
    fn begins(&self, sequence: u64) {
        self.sequence.store(sequence, Ordering::Relaxed);
        self.notes.begins(self.seat.group, sequence);
    }

    fn all_gather(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken> {
        Ok(Parts::of_one(self.exchange(Route::Gather, &mine, until)?, self.size()))
    }

    fn all_to_all(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken> {
        Ok(Parts::of_one(self.exchange(Route::Exchange, &mine, until)?, self.size()))
    }

    fn broadcast(&self, mine: Vec<u8>, root: usize, until: Until) -> Result<Arc<Vec<u8>>, Broken> {
        Ok(Arc::new(self.exchange(Route::From(root), &mine, until)?))
    }

    fn abort(&self, reason: &str) {
        self.close(End::Abort, &Broken::Aborted { rank: Some(self.seat.rank), reason: reason.to_owned() });
        self.reason.leave(reason);
    }

    fn disagreed(&self, kind: Mismatch, sequence: u64, what: &str) {
        // A rank that is still waiting for the frames may get an error of NCCL's in their place.
        self.disagreement.leave(kind, sequence, what);
        self.close(End::Abort, &Broken::Mismatch { kind, sequence, what: what.to_owned() });
    }

    fn leave(&self) {
        self.notes.leave();
        let gone = Broken::Lost { rank: Some(self.seat.rank), what: "it has left the group".to_owned() };
        let end = if lock(&self.broken).is_some() { End::Abort } else { End::Finish };
        self.close(end, &gone);
        if end == End::Finish {
            self.gate.has_ended(LEAVE);
        }
    }
}

impl<L: Lane> Drop for Line<L> {
    fn drop(&mut self) {
        // Also for what came into the queue while it was closed.
        let gone = Broken::Lost { rank: Some(self.seat.rank), what: "its group was dropped".to_owned() };
        self.close(End::Abort, &gone);
    }
}
