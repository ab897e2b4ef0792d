//! Which examples a step trains on: a function of the seed, the step and the size of the data alone.

use incipit_kernels::rng::Philox;

use crate::{Error, Result, job::JobSpec};

/// Distinguish these random numbers from the job's others.
const ORDER_STREAM: u64 = u64::from_be_bytes(*b"order 00");
const DROPOUT_STREAM: u64 = u64::from_be_bytes(*b"dropout0");

/// The data's order. An epoch visits each example at most once, in an order of its own; the examples that do not fill a
/// last batch are left out of it.
#[derive(Clone, Debug)]
pub(crate) struct DataOrder {
    num_examples: usize,
    batch_size: usize,
    /// Of the permutations, if there are any; without, the order is the file's.
    seed: Option<u64>,
    /// The epoch that was looked at last, with its permutation.
    epoch: u64,
    permutation: Vec<u32>,
}

impl DataOrder {
    /// The order of a job's examples.
    ///
    /// # Errors
    /// If they are less than one batch.
    pub(crate) fn of(spec: &JobSpec, num_examples: usize) -> Result<Self> {
        let need = spec.batch_size;
        if num_examples < need {
            let what = format!(
                "is {need}, and there are {num_examples} training examples; pass at most {num_examples}"
            );
            return Err(Error::spec("batch-size", &what));
        }
        Ok(Self::new(num_examples, need, spec.shuffle.then_some(spec.seed)))
    }

    /// # Panics
    /// If there is less than one batch of examples.
    fn new(num_examples: usize, batch_size: usize, seed: Option<u64>) -> Self {
        assert!(
            (1..=num_examples).contains(&batch_size),
            "{num_examples} examples in batches of {batch_size}"
        );
        let mut order = Self { num_examples, batch_size, seed, epoch: 0, permutation: Vec::new() };
        order.permute();
        order
    }

    fn batches_per_epoch(&self) -> u64 {
        (self.num_examples / self.batch_size) as u64
    }

    /// The epoch, from 0, of a step, from 0.
    pub(crate) fn epoch(&self, step: u64) -> u64 {
        step / self.batches_per_epoch()
    }

    /// The place of a step's batch in its epoch, from 0.
    pub(crate) fn place(&self, step: u64) -> u64 {
        step % self.batches_per_epoch()
    }

    /// Goes to the epoch of `step`, so that [`Self::batch`] can be asked for it.
    pub(crate) fn seek(&mut self, step: u64) {
        let epoch = self.epoch(step);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.permute();
        }
    }

    fn permute(&mut self) {
        self.permutation = match self.seed {
            Some(seed) => Philox::new(seed, &[ORDER_STREAM, self.epoch]).permutation(self.num_examples),
            None => Vec::new(),
        };
    }

    /// The examples of `step`, which lies in the epoch of the last [`Self::seek`].
    pub(crate) fn batch(&self, step: u64) -> Vec<usize> {
        debug_assert_eq!(self.epoch(step), self.epoch, "seek comes first");
        let first = self.place(step) as usize * self.batch_size;
        let places = first..first + self.batch_size;
        match self.seed {
            Some(_) => self.permutation[places].iter().map(|example| *example as usize).collect(),
            None => places.collect(),
        }
    }
}

/// The name of the random numbers that dropout draws for one example at one step.
pub(crate) fn dropout_key(seed: u64, step: u64, example: usize) -> u64 {
    Philox::new(seed, &[DROPOUT_STREAM, step, example as u64]).next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &mut DataOrder, epoch: u64) -> Vec<usize> {
        let batches = order.batches_per_epoch();
        (epoch * batches..(epoch + 1) * batches)
            .flat_map(|step| {
                order.seek(step);
                order.batch(step)
            })
            .collect()
    }

    #[test]
    fn an_epoch_visits_no_example_twice_and_leaves_out_what_fills_no_batch() {
        let mut order = DataOrder::new(23, 5, Some(1));
        let mut first = epoch(&mut order, 0);
        let second = epoch(&mut order, 1);
        assert_ne!(first, second, "each epoch has an order of its own");
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 20);
    }

    #[test]
    fn a_step_has_its_batch_wherever_one_comes_from() {
        let mut forward = DataOrder::new(23, 5, Some(9));
        let mut jump = forward.clone();
        let steps: Vec<Vec<usize>> = (0..12)
            .map(|step| {
                forward.seek(step);
                forward.batch(step)
            })
            .collect();
        for step in [11, 0, 7, 3] {
            jump.seek(step);
            assert_eq!(jump.batch(step), steps[step as usize]);
        }
    }

    #[test]
    fn without_shuffling_each_epoch_is_the_file() {
        let mut order = DataOrder::new(7, 3, None);
        assert_eq!(epoch(&mut order, 0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(epoch(&mut order, 4), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn dropout_differs_from_seed_to_seed_step_to_step_and_example_to_example() {
        let key = dropout_key(1, 2, 3);
        assert_eq!(key, dropout_key(1, 2, 3));
        for other in [dropout_key(2, 2, 3), dropout_key(1, 3, 3), dropout_key(1, 2, 4), dropout_key(1, 3, 2)]
        {
            assert_ne!(key, other);
        }
    }
}
