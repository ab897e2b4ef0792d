//! Files as memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use incipit_kernels::ByteOwner;
use memmap2::{Advice, Mmap};

use crate::error::{Result, io};

/// The bytes of a file, mapped: read when touched, dropped by the system when memory is short.
pub(crate) struct Mapped(Arc<Mmap>);

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io("open", path))?;
        // SAFETY: the mapping is read-only and private to this process. Weights are published by rename (by us and by the
        // Hub's cache) and not written afterwards; whoever cuts a file short while a model runs on it ends the process with
        // SIGBUS, as with any reader that maps its weights.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
        Ok(Self(Arc::new(map)))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// What keeps the bytes where they are.
    pub(crate) fn owner(&self) -> ByteOwner {
        self.0.clone()
    }

    /// Runs `read`, which reads the bytes `runs` of `span`: the system fetches their pages beforehand, all at once, and no
    /// others of `span`. Left to itself it would fetch what lies around each page that is touched.
    pub(crate) fn reading<T>(
        &self,
        span: Range<usize>,
        runs: impl Iterator<Item = Range<usize>>,
        read: impl FnOnce() -> T,
    ) -> T {
        /// Linux fetches no more for one advice than its read-ahead, of which this is the default.
        const MOST: usize = 128 << 10;
        self.advise(Advice::Random, span.clone());
        for run in runs {
            let fetch = |from| self.advise(Advice::WillNeed, from..run.end.min(from + MOST));
            run.clone().step_by(MOST).for_each(fetch);
        }
        let result = read();
        // Pages that were dropped meanwhile come back one by one under the first advice, several times slower.
        self.advise(Advice::Normal, span);
        result
    }

    fn advise(&self, advice: Advice, range: Range<usize>) {
        // A system that does not take the advice reads more than it must, or more slowly, and nothing else.
        let _ = self.0.advise_range(advice, range.start, range.len());
    }
}
