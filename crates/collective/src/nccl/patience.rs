//! How a rank waits: seldom long, and then without keeping a core busy.

use std::thread;
use std::time::{Duration, Instant};

/// How often a rank that waits looks into the store, and after how long it begins to.
pub(super) const LOOK: Duration = Duration::from_millis(250);
/// How often a rank that waits asks NCCL whether all is well.
pub(super) const HEALTH: Duration = Duration::from_millis(5);

/// How long a wait has taken, and what was done in it.
pub(super) struct Patience {
    start: Instant,
    pub(super) health: Instant,
    pub(super) look: Instant,
}

impl Patience {
    pub(super) fn new() -> Self {
        let start = Instant::now();
        Self { start, health: start + HEALTH, look: start + LOOK }
    }

    pub(super) fn is_due(moment: &mut Instant, every: Duration) -> bool {
        let now = Instant::now();
        let due = now >= *moment;
        if due {
            *moment = now + every;
        }
        due
    }

    /// Most waits are short, and long ones must not keep a core busy. A call of NCCL's ends within a few tenths of a millisecond, in which a
    /// thread that slept would wake late.
    pub(super) fn rest(&self) {
        match self.start.elapsed().as_micros() {
            0..50 => std::hint::spin_loop(),
            50..300 => thread::yield_now(),
            300..5000 => thread::sleep(Duration::from_micros(20)),
            _ => thread::sleep(Duration::from_micros(500)),
        }
    }
}
