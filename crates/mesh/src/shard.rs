//! One of several equal parts.

use std::ops::Range;

use crate::{Error, Result};

/// Part `index` of `count` equal parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// Part `index` of `count`.
    ///
    /// # Errors
    /// If there is no such part.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if index >= count {
            return Err(Error::NoSuchPart { index, count });
        }
        Ok(Self { index, count })
    }

    /// A part that is known to be.
    pub(crate) fn of(index: usize, count: usize) -> Self {
        debug_assert!(index < count);
        Self { index, count }
    }

    /// Which part, from 0.
    #[must_use]
    pub fn index(self) -> usize {
        self.index
    }

    /// How many parts there are.
    #[must_use]
    pub fn count(self) -> usize {
        self.count
    }

    /// Whether this is the only part.
    #[must_use]
    pub fn is_whole(self) -> bool {
        self.count == 1
    }

    /// This part of `0..size`, where `what` is counted.
    ///
    /// # Errors
    /// If `size` cannot be cut into so many equal parts: the message says which degrees would do.
    pub fn range(self, what: &'static str, size: usize) -> Result<Range<usize>> {
        if !size.is_multiple_of(self.count) {
            return Err(Error::Uneven { what, size, count: self.count });
        }
        let part = size / self.count;
        Ok(self.index * part..(self.index + 1) * part)
    }

    /// This part of `0..size`, where parts may differ by one.
    #[must_use]
    pub fn portion(self, size: usize) -> Range<usize> {
        let start = |index: usize| size * index / self.count;
        start(self.index)..start(self.index + 1)
    }

    /// Whether element `i` of a list that is dealt out in turn is in this part. Such parts differ by one element at most.
    #[must_use]
    pub fn deals(self, i: usize) -> bool {
        i % self.count == self.index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn portions_tile_and_are_ranges_where_they_can_be(count in 1usize..20, size in 0usize..200) {
            let mut next = 0;
            for index in 0..count {
                let shard = Shard::new(index, count).unwrap();
                let portion = shard.portion(size);
                prop_assert_eq!(portion.start, next);
                prop_assert!(portion.len().abs_diff(size / count) <= 1);
                if let Ok(range) = shard.range("rows", size) {
                    prop_assert_eq!(range, portion.clone());
                }
                next = portion.end;
            }
            prop_assert_eq!(next, size);
        }

        #[test]
        fn ranges_tile(count in 1usize..20, part in 0usize..50) {
            let mut next = 0;
            for index in 0..count {
                let range = Shard::new(index, count).unwrap().range("rows", count * part).unwrap();
                prop_assert_eq!(range.start, next);
                prop_assert_eq!(range.len(), part);
                next = range.end;
            }
            prop_assert_eq!(next, count * part);
        }

        #[test]
        fn every_element_is_dealt_once(count in 1usize..20, i in 0usize..1000) {
            let owners = (0..count).filter(|index| Shard::new(*index, count).unwrap().deals(i)).count();
            prop_assert_eq!(owners, 1);
        }
    }

    #[test]
    fn a_size_that_cannot_be_cut_is_refused_with_the_degrees_that_would_do() {
        let error = Shard::new(1, 8).unwrap().range("attention heads", 12).unwrap_err().to_string();
        assert_eq!(
            error,
            "attention heads of size 12 cannot be cut into 8 equal parts; pass a --tp of 1, 2, 3, 4, 6 or 12"
        );
    }

    #[test]
    fn the_whole_is_everything() {
        assert_eq!(Shard::WHOLE.range("rows", 7).unwrap(), 0..7);
        assert!(Shard::WHOLE.is_whole() && Shard::WHOLE.deals(3));
        assert_eq!(Shard::new(0, 1).unwrap(), Shard::WHOLE);
    }

    #[test]
    fn parts_that_are_none_are_refused() {
        assert_eq!(Shard::new(2, 2).unwrap_err().to_string(), "part 2 of 2 is none; parts count from 0");
        assert!(Shard::new(0, 0).is_err());
    }
}
