//! Which rows of a microbatch belong to which example.

use std::ops::Range;

/// Examples laid end to end: example `e` has the rows `range(e)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    offsets: Vec<usize>,
}

impl Segments {
    /// Examples of these lengths.
    #[must_use]
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut offsets = vec![0];
        for length in lengths {
            offsets.push(offsets[offsets.len() - 1] + length);
        }
        Self { offsets }
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

    /// Rows of the longest example.
    #[must_use]
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|e| self.range(e).len()).max().unwrap_or(0)
    }
}
