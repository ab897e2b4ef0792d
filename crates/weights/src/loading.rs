//! How far the loading of a model has got.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what is loaded of a model, for those who wait for it. A view of a mapped file is there at once, and takes its time when it is
/// hashed; what is converted, made up or copied to a device takes it when it is asked for. So a byte counts in as many parts as it is gone
/// through.
#[derive(Debug, Default)]
pub struct Loading {
    plan: OnceLock<Plan>,
    reads: AtomicU64,
    /// Bytes that were gone through.
    done: AtomicU64,
}

/// What is to be loaded.
#[derive(Debug)]
struct Plan {
    bytes: u64,
    /// Whether it takes time to hand them out.
    copied: bool,
    /// How often all of them are gone through.
    passes: u64,
}

impl Loading {
    /// From now on so many bytes are loaded: `copied` where handing them out takes time, `hashed` where they are hashed after that.
    pub(crate) fn expect(&self, bytes: u64, copied: bool, hashed: bool) {
        let passes = u64::from(copied) + u64::from(hashed);
        // What is loaded again, over what is there, is not waited for.
        let _ = self.plan.set(Plan { bytes, copied, passes });
    }

    /// So many bytes were asked for, and are handed out.
    pub(crate) fn hand_out(&self, bytes: u64) {
        self.get_on();
        if self.plan.get().is_some_and(|plan| plan.copied) {
            self.done.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// So many bytes were hashed.
    pub(crate) fn hash(&self, bytes: u64) {
        self.get_on();
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Loading gets on, with what is no number of the model.
    pub fn get_on(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    /// All is handed out that the model wants; the files may have more.
    pub fn end_of_copies(&self) {
        if let Some(plan) = self.plan.get().filter(|plan| plan.copied) {
            self.done.fetch_max(plan.bytes, Ordering::Relaxed);
        }
    }

    /// How often something was asked for or hashed so far: it grows for as long as loading gets on.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Bytes that are loaded, and those of all that is. Nothing before it is known, or where no time is taken.
    #[must_use]
    pub fn bytes(&self) -> Option<(u64, u64)> {
        let Plan { bytes, passes, .. } = self.plan.get()?;
        let done = self.done.load(Ordering::Relaxed).checked_div(*passes)?;
        Some((done.min(*bytes), *bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_counts_in_as_many_parts_as_it_is_gone_through() {
        let loading = Loading::default();
        assert_eq!(loading.bytes(), None);
        loading.expect(100, true, true);
        loading.hand_out(60);
        assert_eq!(loading.bytes(), Some((30, 100)));
        loading.end_of_copies();
        assert_eq!(loading.bytes(), Some((50, 100)));
        loading.hash(90);
        assert_eq!(loading.bytes(), Some((95, 100)));
        loading.hash(30);
        assert_eq!(loading.bytes(), Some((100, 100)), "never more than there is");
        assert_eq!(loading.reads(), 3);
    }

    #[test]
    fn what_is_there_at_once_counts_when_it_is_hashed() {
        let loading = Loading::default();
        loading.expect(100, false, true);
        loading.hand_out(100);
        loading.end_of_copies();
        assert_eq!(loading.bytes(), Some((0, 100)));
        loading.hash(40);
        assert_eq!(loading.bytes(), Some((40, 100)));
        let at_once = Loading::default();
        at_once.expect(100, false, false);
        assert_eq!(at_once.bytes(), None, "nobody waits for it");
    }
}
