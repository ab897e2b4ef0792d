//! A group whose ranks have not met.

use candle_core::Tensor;

use crate::error::Place;
use crate::{Collective, Error, Reduce, Result};

/// A rank's place in a group that is still to meet: nothing can be exchanged.
#[derive(Debug)]
pub(crate) struct Unmet {
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

impl Unmet {
    fn refuse<T>(&self) -> Result<T> {
        let place = Place { job: String::new(), epoch: 0, group: "unmet", sequence: 0 };
        let what = format!("rank {} and the {} others have not met", self.rank, self.size - 1);
        Err(Error::Refused { place, what })
    }
}

impl Collective for Unmet {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, _: &Tensor, _: Reduce) -> Result<Tensor> {
        self.refuse()
    }

    fn all_gather(&self, _: &Tensor) -> Result<Tensor> {
        self.refuse()
    }

    fn broadcast(&self, _: &Tensor, _: usize) -> Result<Tensor> {
        self.refuse()
    }

    fn barrier(&self) -> Result<()> {
        self.refuse()
    }

    /// Whoever waits for this group waits for nothing.
    fn abort(&self, _: &str) {}
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::unmet;

    #[test]
    fn nothing_is_exchanged_before_the_ranks_have_met() {
        let group = unmet(1, 3);
        assert_eq!((group.rank(), group.size()), (1, 3));
        let x = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        let refusals = [
            group.all_reduce(&x, Reduce::Sum).map(drop),
            group.all_gather(&x).map(drop),
            group.broadcast(&x, 0).map(drop),
            group.barrier(),
        ];
        for refusal in refusals {
            let message = refusal.expect_err("there is nobody").to_string();
            assert!(message.contains("rank 1 and the 2 others have not met"), "{message}");
        }
    }
}
