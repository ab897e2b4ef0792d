//! The way into a lane: one thread at a time, and none once it is closed.
//!
//! NCCL must not be aborted while another thread is inside it, and its abort may itself hang. So whoever closes the gate
//! only says so and leaves the rest to a thread of its own, which can be left behind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use super::lane::{Fault, Lane};
use crate::transport::Until;

/// How long an abort waits for a thread that is inside.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it looks.
const GLANCE: Duration = Duration::from_micros(100);

/// Why a call was not made, or not well.
#[derive(Debug)]
pub(super) enum Stop {
    /// The gate is closed.
    Closed,
    Fault(Fault),
}

/// How a lane is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Abort,
    Finish,
}

#[derive(Debug)]
struct Inside<L> {
    lane: L,
    /// Held by whoever is inside.
    turn: Mutex<()>,
    closed: AtomicBool,
    /// Whether the lane was closed and all that belongs to it was given back.
    ended: Mutex<bool>,
    changed: Condvar,
}

#[derive(Debug)]
pub(super) struct Gate<L>(Arc<Inside<L>>);

impl<L: Lane> Gate<L> {
    pub(super) fn new(lane: L) -> Self {
        let (turn, ended) = (Mutex::new(()), Mutex::new(false));
        Self(Arc::new(Inside { lane, turn, closed: AtomicBool::new(false), ended, changed: Condvar::new() }))
    }

    /// What asks nothing of the communicator may be called at any time.
    pub(super) fn lane(&self) -> &L {
        &self.0.lane
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// Makes a call inside.
    pub(super) fn enter<R>(&self, call: impl FnOnce(&L) -> Result<R, Fault>) -> Result<R, Stop> {
        loop {
            if self.is_closed() {
                return Err(Stop::Closed);
            }
            let turn = match self.0.turn.try_lock() {
                Ok(turn) => turn,
                Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
                // Not `lock`: whoever is inside may be an abort that hangs.
                Err(TryLockError::WouldBlock) => {
                    thread::sleep(GLANCE);
                    continue;
                }
            };
            if self.is_closed() {
                return Err(Stop::Closed);
            }
            let result = call(&self.0.lane).map_err(Stop::Fault);
            drop(turn);
            return result;
        }
    }

    /// Closes the gate and ends the lane, on another thread. `held` is what the lane still works on: it is dropped if the
    /// lane finishes, and otherwise kept for ever. Returns false if the gate was closed already; `held` is kept then, too.
    pub(super) fn close<H: Send + 'static>(&self, end: End, held: H) -> bool {
        if self.0.closed.swap(true, Ordering::SeqCst) {
            std::mem::forget(held);
            return false;
        }
        let inside = self.0.clone();
        let closing = thread::Builder::new().name("nccl end".to_owned());
        let spawned = closing.spawn(move || {
            let Some(_turn) = inside.wait_for_turn() else {
                // What the lane has is not given back either: the GPU may still write to it.
                std::mem::forget((held, inside));
                tracing::warn!(
                    "another thread is still inside NCCL after {} s: its communicator is left as it is; end this process to \
                     free the GPU",
                    PATIENCE.as_secs()
                );
                return;
            };
            match end {
                End::Finish => match inside.lane.finish() {
                    Ok(()) => drop(held),
                    Err(_) => {
                        inside.lane.abort();
                        std::mem::forget(held);
                    }
                },
                End::Abort => {
                    inside.lane.abort();
                    std::mem::forget(held);
                }
            }
            *inside.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
            inside.changed.notify_all();
        });
        if let Err(error) = spawned {
            std::mem::forget(self.0.clone());
            tracing::warn!(
                "no thread to end a communicator of NCCL with ({error}); end this process to free the GPU"
            );
        }
        true
    }

    /// Whether the lane has ended, after `wait` at most.
    pub(super) fn has_ended(&self, wait: Duration) -> bool {
        let ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.changed.wait_timeout_while(ended, wait, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl<L> Inside<L> {
    fn wait_for_turn(&self) -> Option<std::sync::MutexGuard<'_, ()>> {
        let until = Until::after(PATIENCE);
        loop {
            match self.turn.try_lock() {
                Ok(turn) => return Some(turn),
                Err(TryLockError::Poisoned(turn)) => return Some(turn.into_inner()),
                Err(TryLockError::WouldBlock) if until.is_over() => return None,
                Err(TryLockError::WouldBlock) => thread::sleep(GLANCE),
            }
        }
    }
}
