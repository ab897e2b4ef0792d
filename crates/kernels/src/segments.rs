//! Which rows of a microbatch belong to which example.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::Result;
use crate::gpu::{Address, Gpu, Uploaded};

/// Examples laid end to end: example `e` has the rows `range(e)`.
#[derive(Clone)]
pub struct Segments {
    offsets: Vec<usize>,
    gpu: Arc<OnGpu>,
}

/// What kernels know of examples' rows, as soon as one of them asked for it. A pass runs on one device.
#[derive(Default)]
struct OnGpu {
    offsets: OnceLock<Uploaded>,
    /// By rows of a tile: 32 and 64.
    tiles: [OnceLock<(Uploaded, usize)>; 2],
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.offsets == other.offsets
    }
}

impl Eq for Segments {}

impl std::fmt::Debug for Segments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Segments").field(&self.offsets).finish()
    }
}

impl Segments {
    /// Examples of these lengths.
    #[must_use]
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut offsets = vec![0];
        for length in lengths {
            offsets.push(offsets[offsets.len() - 1] + length);
        }
        Self { offsets, gpu: Arc::default() }
    }

    /// Number of examples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no example.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of all examples together.
    #[must_use]
    pub fn total(&self) -> usize {
        self.offsets[self.len()]
    }

    /// The rows of example `e`.
    ///
    /// # Panics
    /// If there is no example `e`.
    #[must_use]
    pub fn range(&self, e: usize) -> Range<usize> {
        self.offsets[e]..self.offsets[e + 1]
    }

    /// First rows of the examples, and the end of the last one, for kernels.
    pub(crate) fn offsets_on(&self, gpu: &Gpu) -> Result<Address> {
        let upload = || {
            let offsets: Vec<i32> = self.offsets.iter().map(|offset| *offset as i32).collect();
            gpu.upload("segments", &offsets)
        };
        Ok(once(&self.gpu.offsets, upload)?.address)
    }

    /// Examples and first rows of all tiles of `rows` rows (32 or 64), and how many tiles there are.
    pub(crate) fn tiles_on(&self, gpu: &Gpu, rows: usize) -> Result<(Address, usize)> {
        let upload = || {
            let of =
                |e: usize| (0..self.range(e).len()).step_by(rows).map(move |first| [e as i32, first as i32]);
            let tiles: Vec<[i32; 2]> = (0..self.len()).flat_map(of).collect();
            Ok((gpu.upload("segments", &tiles)?, tiles.len()))
        };
        let (tiles, count) = once(&self.gpu.tiles[rows / 64], upload)?;
        Ok((tiles.address, *count))
    }

    /// Rows of the longest example.
    #[must_use]
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|e| self.range(e).len()).max().unwrap_or(0)
    }
}

/// What `make` gives, made once.
pub(crate) fn once<T>(cell: &OnceLock<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(made) = cell.get() {
        return Ok(made);
    }
    let made = make()?;
    Ok(cell.get_or_init(|| made))
}

#[cfg(all(test, any(feature = "cuda", feature = "emulator")))]
impl Segments {
    /// The same examples, and nothing of them on a device.
    pub(crate) fn fresh(&self) -> Self {
        Self { offsets: self.offsets.clone(), gpu: Arc::default() }
    }
}
