//! How a run is told to stop.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// A switch between a run and whoever watches it. Clones are the same switch.
#[derive(Clone, Debug, Default)]
pub struct Control {
    stop: Arc<AtomicBool>,
}

impl Control {
    /// A switch that nobody has touched.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the run to save a checkpoint and to leave after the step that it is in. Safe in a signal handler.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether someone asked.
    #[must_use]
    pub fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
