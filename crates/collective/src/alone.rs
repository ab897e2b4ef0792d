//! A group of one: what every rank has is what this one has.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Tensor};

use crate::error::Place;
use crate::{Collective, Error, Reduce, Result, numbers};

/// It refuses what a larger group would refuse, so that a mistake is found on one rank already.
#[derive(Debug, Default)]
pub(crate) struct Alone {
    failed: Mutex<Option<Error>>,
}

impl Alone {
    fn check(&self, refusal: Option<String>) -> Result<()> {
        if let Some(error) = &*self.failed.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(error.clone());
        }
        refusal.map_or(Ok(()), |what| {
            let place = Place { job: String::new(), epoch: 0, group: "single", sequence: 0 };
            Err(Error::Refused { place, what })
        })
    }
}

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, x: &Tensor, _: Reduce) -> Result<Tensor> {
        self.check(numbers::refuse(x, &[DType::F32, DType::BF16, DType::I64]))?;
        Ok(x.contiguous()?)
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        self.check(numbers::refuse_gather(x))?;
        Ok(x.contiguous()?)
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        self.check(numbers::refuse_broadcast(x, root, 1))?;
        Ok(x.contiguous()?)
    }

    fn barrier(&self) -> Result<()> {
        self.check(None)
    }

    fn abort(&self, reason: &str) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get_or_insert_with(|| Error::Aborted { rank: Some(0), reason: reason.to_owned() });
    }
}
