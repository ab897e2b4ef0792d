//! Whether there is room for what training all weights of a model takes. A process that runs out of memory is killed, and on a shared
//! backbone its neighbours with it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use incipit_collective::Ranks;

use crate::{
    Error, Result,
    backbone::Backbone,
    checkpoint::Checkpoint,
    microbatch::free_memory,
    optimizer::OptimizerKind,
    ranks,
    spec::{Method, TrainSpec},
};

/// Bytes of this machine's memory that jobs were promised and may not have taken yet.
#[derive(Clone, Default)]
pub(crate) struct Promises(Arc<AtomicU64>);

impl Promises {
    fn make(&self, bytes: u64) -> Room {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Room { promises: self.clone(), bytes }
    }

    /// What is left of `free` bytes for another job.
    fn left_of(&self, free: u64) -> u64 {
        free.saturating_sub(self.0.load(Ordering::Relaxed))
    }
}

/// Memory that is promised to a job, which takes it in its first steps. It is given back when this is dropped.
pub(crate) struct Room {
    promises: Promises,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.promises.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Finds room for a job that trains all weights, or goes on from `earlier`; others need none worth speaking of. All ranks make this call
/// together, and get the same answer.
///
/// # Errors
/// If the memory of a machine is less than what its ranks take together, or an exchange between them fails.
pub(crate) fn find_room(
    backbone: &Backbone,
    spec: &TrainSpec,
    earlier: Option<&Checkpoint>,
) -> Result<Option<Room>> {
    if spec.method != Method::Model {
        return Ok(None);
    }
    let (group, model) = (backbone.engine.ranks(), backbone.engine.model());
    let numbers: usize = model.weights().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let on_machine = ranks::on_this_machine(group)? as u64;
    let dtype = model.dtype().size_in_bytes() as u64;
    let each = bytes_each(dtype, &spec.optimizer_kind());
    let of_all = |bytes: u64| numbers as u64 * bytes * on_machine;
    // A tenth for the tokens on their way. The checkpoint goes when the weights are there.
    let held = earlier.map_or(0, Checkpoint::num_bytes) * on_machine;
    let needed = (of_all(each) + of_all(each) / 10).saturating_sub(held);
    let promises = &backbone.engine.promises;
    // Where the system does not tell, nobody can know.
    agree_on_room(group, needed, promises.left_of(free_memory().unwrap_or(u64::MAX)))?;
    // Its numbers, and what the model reads of them, are there at once.
    Ok(Some(promises.make(of_all(each - 4 - dtype))))
}

/// Whether every rank's machine has as much free as is needed of it.
fn agree_on_room(group: &Ranks, needed: u64, free: u64) -> Result<()> {
    let short = i64::try_from(needed.saturating_sub(free)).unwrap_or(i64::MAX);
    match ranks::largest(group, &[short])?[0].unsigned_abs() {
        0 => Ok(()),
        short => Err(Error::Memory { needed, short }),
    }
}

/// Bytes a weight that a rank takes at most, while it is in a backward pass and a checkpoint is being written: the f32 number; its
/// gradient, twice where it is summed; the checkpoint's copy of the number and the bytes of its file; what the model reads, in its type;
/// and the optimizer's state, which is copied for a checkpoint as the numbers are. Without steps beside the writing, training 116 million
/// weights with Adafactor was measured at 23 (f32) and 20 (bf16).
fn bytes_each(dtype: u64, optimizer: &OptimizerKind) -> u64 {
    let moments = match optimizer {
        // A row and a column of a matrix.
        OptimizerKind::Adafactor(_) => 0,
        OptimizerKind::Sgd(sgd) => u64::from(sgd.momentum > 0.0),
        OptimizerKind::AdamW(_) => 2,
    };
    5 * 4 + dtype + moments * 3 * 4
}

#[cfg(test)]
mod tests {
    use incipit_collective::{Options, local};
    use incipit_mesh::Mesh;

    use super::*;

    #[test]
    fn where_one_machine_has_no_room_all_ranks_refuse_the_job() {
        const GIB: u64 = 1 << 30;
        let told = |free: [u64; 2]| {
            let all = local::ranks(Mesh::new(1, 2, 2).unwrap(), &Options::default());
            std::thread::scope(|scope| {
                let one = |(ranks, free)| scope.spawn(move || agree_on_room(&ranks, 3 * GIB, free));
                let waiting: Vec<_> = all.into_iter().zip(free).map(one).collect();
                waiting.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
            })
        };
        assert!(told([3 * GIB, u64::MAX]).iter().all(Result::is_ok));
        for refused in told([4 * GIB, GIB]) {
            let error = refused.unwrap_err();
            assert!(error.is_out_of_memory() && !error.is_of_group(), "{error}");
            let (needed, short) = ("about 3.0 GiB", "2.0 GiB are wanting");
            assert!(error.to_string().contains(needed) && error.to_string().contains(short), "{error}");
        }
    }

    #[test]
    fn what_is_promised_to_a_job_is_not_promised_to_another_until_it_leaves() {
        let promises = Promises::default();
        let (first, second) = (promises.make(5), promises.make(3));
        assert_eq!((promises.left_of(10), promises.left_of(6)), (2, 0));
        drop(first);
        assert_eq!(promises.left_of(10), 7);
        drop(second);
        assert_eq!(promises.left_of(10), 10);
    }

    #[test]
    fn a_weight_takes_what_its_type_and_its_optimizer_say() {
        assert_eq!(bytes_each(2, &OptimizerKind::adafactor(0.0, 0)), 22);
        assert_eq!(bytes_each(4, &OptimizerKind::adafactor(0.0, 0)), 24);
        assert_eq!(bytes_each(4, &OptimizerKind::adamw(0.0)), 48);
        assert_eq!(bytes_each(4, &OptimizerKind::sgd(0.0, 0.0)), 24);
        assert_eq!(bytes_each(4, &OptimizerKind::sgd(0.9, 0.0)), 36);
    }
}
