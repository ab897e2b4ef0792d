//! Whether there is room for what training all weights of a model takes. A process that runs out of memory is killed, and on a shared
//! backbone its neighbours with it.

use incipit_collective::Ranks;

use crate::{
    Error, Result, backbone::Backbone, microbatch::free_memory, optimizer::OptimizerKind, ranks,
    spec::Method, spec::TrainSpec,
};

/// Refuses a job that has no room. All ranks make this call together, and get the same answer.
///
/// # Errors
/// If the memory of a machine is less than what its ranks take together, or an exchange between them fails.
pub(crate) fn check_room(backbone: &Backbone, spec: &TrainSpec) -> Result<()> {
    if spec.method != Method::Model {
        return Ok(());
    }
    let group = backbone.engine.ranks();
    let model = backbone.engine.model();
    let numbers: usize = model.weights().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let each = bytes_each(model.dtype().size_in_bytes() as u64, &spec.optimizer_kind());
    let needed = numbers as u64 * each * ranks::on_this_machine(group)? as u64;
    // Where the system does not tell, nobody can know.
    agree_on_room(group, needed, free_memory().unwrap_or(u64::MAX))
}

/// Whether every rank's machine has as much free as is needed of it.
fn agree_on_room(group: &Ranks, needed: u64, free: u64) -> Result<()> {
    let short = i64::try_from(needed.saturating_sub(free)).unwrap_or(i64::MAX);
    match ranks::largest(group, &[short])?[0].unsigned_abs() {
        0 => Ok(()),
        short => Err(Error::Memory { needed, short }),
    }
}

/// Bytes a weight that a rank takes at most: the f32 number and its gradient; while a checkpoint is written, a copy of the number and of it
/// the bytes of the file; in the model's type what the model reads, before and after a step; and the optimizer's state, which is copied for
/// a checkpoint as the numbers are. Training 116 million weights was measured at 23 (f32) and 20 (bf16).
fn bytes_each(dtype: u64, optimizer: &OptimizerKind) -> u64 {
    let moments = match optimizer {
        // A row and a column of a matrix.
        OptimizerKind::Adafactor(_) => 0,
        OptimizerKind::Sgd(sgd) => u64::from(sgd.momentum > 0.0),
        OptimizerKind::AdamW(_) => 2,
    };
    4 * 4 + 2 * dtype + moments * 3 * 4
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
            let (needed, short) = ("about 3.0 GiB", "2.0 GiB more than are free");
            assert!(error.to_string().contains(needed) && error.to_string().contains(short), "{error}");
        }
    }

    #[test]
    fn a_weight_takes_what_its_type_and_its_optimizer_say() {
        assert_eq!(bytes_each(2, &OptimizerKind::adafactor(0.0, 0)), 20);
        assert_eq!(bytes_each(4, &OptimizerKind::adafactor(0.0, 0)), 24);
        assert_eq!(bytes_each(4, &OptimizerKind::adamw(0.0)), 48);
        assert_eq!(bytes_each(4, &OptimizerKind::sgd(0.0, 0.0)), 24);
        assert_eq!(bytes_each(4, &OptimizerKind::sgd(0.9, 0.0)), 36);
    }
}
