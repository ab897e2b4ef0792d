//! How much of a checkpoint has been read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::readers::Entry;
use crate::slice::Slice;
use crate::source::matrix;

/// What somebody asked for of a checkpoint's tensors.
#[derive(Default)]
pub(crate) struct Reads {
    /// The parts. What is asked for twice counts once.
    parts: Mutex<BTreeMap<String, Touched>>,
}

/// What was asked for of one tensor.
#[derive(Default)]
struct Touched {
    /// Rows in their full width, and columns in their full height.
    rows: Ranges,
    cols: Ranges,
    /// Bytes of the first two together, and of parts that are neither.
    bytes: u64,
    other_bytes: u64,
}

impl Reads {
    pub(crate) fn add(&self, name: &str, entry: &Entry, slice: &Slice) {
        if slice.num_elements() == 0 {
            return;
        }
        let ((height, width), size) = (matrix(&entry.shape), entry.dtype.size_in_bytes());
        let mut tensors = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let touched = tensors.entry(name.to_owned()).or_default();
        if slice.cols.len() == width {
            touched.rows.add(slice.rows.clone());
        } else if slice.rows.len() == height {
            touched.cols.add(slice.cols.clone());
        } else {
            touched.other_bytes += (slice.num_elements() * size) as u64;
        }
        let untouched = (height - touched.rows.len()) * (width - touched.cols.len());
        touched.bytes = ((height * width - untouched) * size) as u64;
    }

    pub(crate) fn bytes(&self) -> u64 {
        let tensors = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        tensors.values().map(|touched| touched.bytes + touched.other_bytes).sum()
    }
}

/// A set of numbers, as ranges that neither overlap nor touch.
#[derive(Default)]
struct Ranges(Vec<Range<usize>>);

impl Ranges {
    fn add(&mut self, new: Range<usize>) {
        let mut merged = new;
        self.0.retain(|old| {
            let apart = old.end < merged.start || merged.end < old.start;
            if !apart {
                merged = old.start.min(merged.start)..old.end.max(merged.end);
            }
            apart
        });
        self.0.push(merged);
    }

    fn len(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_in_the_set_once_however_often_it_is_added() {
        let mut ranges = Ranges::default();
        for (range, len) in
            [(4..6, 2), (8..10, 4), (5..6, 4), (0..1, 5), (6..8, 7), (0..20, 20), (3..9, 20), (21..22, 21)]
        {
            ranges.add(range.clone());
            assert_eq!(ranges.len(), len, "{range:?} into {:?}", ranges.0);
        }
    }
}
