//! Tensors laid over those of another source.

use std::collections::BTreeMap;
use std::ops::Range;

use incipit_kernels::Frozen;

use crate::source::{Source, TensorInfo, matrix};
use crate::{Error, Result};

/// A source with tensors of its own before, and beside, those of another: what was trained, over what is frozen.
pub struct Overlay<'a> {
    below: &'a dyn Source,
    tensors: BTreeMap<String, (TensorInfo, Frozen)>,
}

impl<'a> Overlay<'a> {
    /// Nothing over `below` yet.
    #[must_use]
    pub fn new(below: &'a dyn Source) -> Self {
        Self { below, tensors: BTreeMap::new() }
    }

    /// Lays a whole tensor of the shape `shape` over that of its name, or beside the others.
    ///
    /// # Panics
    /// If `numbers` is not the matrix as which a tensor of this shape is kept.
    pub fn put(&mut self, name: &str, shape: &[usize], numbers: Frozen) {
        assert_eq!(matrix(shape), (numbers.rows(), numbers.cols()), "the matrix of {name}");
        let info = TensorInfo { name: name.to_owned(), shape: shape.to_vec(), dtype: numbers.dtype() };
        self.tensors.insert(name.to_owned(), (info, numbers));
    }

    fn own(&self, name: &str, shape: &[usize]) -> Option<Result<Frozen>> {
        let (info, numbers) = self.tensors.get(name)?;
        if info.shape == shape {
            return Some(Ok(numbers.clone()));
        }
        let place = "the trained weights".to_owned();
        let (name, expected, found) = (name.to_owned(), shape.to_vec(), info.shape.clone());
        Some(Err(Error::WrongShape { name, place, expected, found }))
    }
}

impl Source for Overlay<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let below = self.below.tensors().into_iter().filter(|info| !self.tensors.contains_key(&info.name));
        let own = self.tensors.values().map(|(info, _)| info.clone());
        let mut all: Vec<TensorInfo> = below.chain(own).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.below.contains(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        self.own(name, shape).unwrap_or_else(|| self.below.frozen(name, shape))
    }

    fn part(&self, name: &str, shape: &[usize], rows: Range<usize>, cols: Range<usize>) -> Result<Frozen> {
        match self.own(name, shape) {
            Some(own) => Ok(own?.part((rows.start, rows.len()), (cols.start, cols.len()))),
            None => self.below.part(name, shape, rows, cols),
        }
    }

    fn convertible(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        self.own(name, shape).unwrap_or_else(|| self.below.convertible(name, shape))
    }

    fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.below.side_files()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::{Random, RandomTensor};

    fn below() -> Random {
        let tensor = |name: &str, shape: &[usize]| RandomTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            mean: 0.0,
            deviation: 1.0,
        };
        Random::new(vec![tensor("a", &[2, 3]), tensor("b", &[4])], DType::F32, 1).unwrap()
    }

    #[test]
    fn what_is_laid_over_is_found_first_and_the_rest_is_that_below() {
        let below = below();
        let mut all = Overlay::new(&below);
        all.put("a", &[2, 3], Frozen::from_f32(vec![1., 2., 3., 4., 5., 6.], 2, 3));
        all.put("c", &[2], Frozen::from_f32(vec![7., 8.], 1, 2));
        assert_eq!(all.frozen("a", &[2, 3]).unwrap().to_f32(), [1., 2., 3., 4., 5., 6.]);
        assert_eq!(all.part("a", &[2, 3], 1..2, 1..3).unwrap().to_f32(), [5., 6.]);
        assert_eq!(all.frozen("b", &[4]).unwrap().to_f32(), below.frozen("b", &[4]).unwrap().to_f32());
        assert_eq!(all.convertible("c", &[2]).unwrap().to_f32(), [7., 8.]);
        assert_eq!(all.tensors().iter().map(|t| &*t.name).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert!(all.contains("c") && !all.contains("d"));
    }

    #[test]
    fn another_shape_than_the_one_laid_over_is_refused() {
        let below = below();
        let mut all = Overlay::new(&below);
        all.put("a", &[3, 2], Frozen::from_f32(vec![0.; 6], 3, 2));
        let error = all.frozen("a", &[2, 3]).unwrap_err().to_string();
        assert!(error.contains("[3, 2]") && error.contains("[2, 3]"), "{error}");
    }
}
