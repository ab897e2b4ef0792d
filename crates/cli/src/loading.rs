//! How far the loading of a model has got, for whoever waits for it: a bar on a terminal, elsewhere a line now and then.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use incipit_weights::Loading;

use crate::args::Global;
use crate::progress::{Bar, LINE_EVERY, bytes_bar, note};
use crate::units;

/// How often somebody looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Shows bytes that grow; what it shows goes away with it.
pub(crate) struct Gauge {
    what: String,
    global: Global,
    bar: Option<Bar>,
    /// When it began, or the last line was written.
    told: Instant,
}

impl Gauge {
    /// Of `what`, of which nothing is known yet.
    pub(crate) fn new(what: &str, global: &Global) -> Self {
        Self { what: what.to_owned(), global: global.clone(), bar: None, told: Instant::now() }
    }

    /// So many bytes of so many are there.
    pub(crate) fn show(&mut self, (done, all): (u64, u64)) {
        let bar = self.bar.get_or_insert_with(|| bytes_bar(&self.what, all, &self.global));
        // More may come to be known of.
        bar.set_length(all);
        bar.set_position(done);
        if bar.is_hidden() && self.told.elapsed() >= LINE_EVERY {
            self.told = Instant::now();
            note(&format!("{}: {}", self.what, share((done, all))));
        }
    }
}

/// So many bytes of so many, in words.
pub(crate) fn share((done, all): (u64, u64)) -> String {
    let share = units::percent(done as f64 / all.max(1) as f64);
    format!("{} of {} ({share})", units::bytes(done), units::bytes(all))
}

/// Shows how far loading has got, until it is dropped.
pub(crate) struct Shown {
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Shows how far `loading` has got, as soon as that is known.
pub(crate) fn show(loading: Arc<Loading>, global: &Global) -> Shown {
    let (over, is_over) = mpsc::channel::<()>();
    let mut gauge = Gauge::new("loading the model", global);
    // A system that gives no thread shows nothing.
    let thread = std::thread::Builder::new().spawn(move || {
        while is_over.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            if let Some(bytes) = loading.bytes() {
                gauge.show(bytes);
            }
        }
    });
    Shown { over: Some(over), thread: thread.ok() }
}

impl Drop for Shown {
    fn drop(&mut self) {
        drop(self.over.take());
        // What is told next stands where the bar was.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_with_their_share() {
        assert_eq!(share((1 << 30, 4 << 30)), "1.0 GiB of 4.0 GiB (25.0 %)");
        assert_eq!(share((0, 0)), "0 B of 0 B (0.0 %)");
    }
}
