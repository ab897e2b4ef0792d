//! Two threads of each rank: one writes that the rank lives, the other looks after operations that no thread waits for. The latter asks the
//! device, and a driver that loads a kernel answers nobody until what is in the queue is done, which may take as long as another rank likes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::notes::Notes;

/// How often operations are looked at.
const NAP: Duration = Duration::from_millis(20);
/// How often the rank looks whether it is time to write that it lives.
const PULSE: Duration = Duration::from_millis(100);

/// Something to be looked after. Called over and over; does not wait for other ranks.
pub(super) trait Watched: Send + Sync {
    fn watch(&self);
}

/// Ends its threads when it is dropped.
#[derive(Debug)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
}

struct Shared {
    watched: Mutex<Vec<Weak<dyn Watched>>>,
    stopped: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({:?})", self.stopped)
    }
}

impl Watchdog {
    /// Starts one.
    pub(super) fn start(notes: Arc<Notes>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { watched: Mutex::default(), stopped: AtomicBool::new(false) });
        let watchdog = Self { shared: shared.clone() };
        let beating = shared.clone();
        thread::Builder::new().name("nccl heartbeat".to_owned()).spawn(move || beating.beat(&notes))?;
        thread::Builder::new().name("nccl watchdog".to_owned()).spawn(move || shared.watch())?;
        Ok(watchdog)
    }

    pub(super) fn add(&self, watched: Weak<dyn Watched>) {
        self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn beat(&self, notes: &Notes) {
        while !self.stopped.load(Ordering::Relaxed) {
            notes.beat();
            thread::sleep(PULSE);
        }
    }

    fn watch(&self) {
        while !self.stopped.load(Ordering::Relaxed) {
            let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
            watched.iter().filter_map(Weak::upgrade).for_each(|watched| watched.watch());
            thread::sleep(NAP);
        }
    }
}
