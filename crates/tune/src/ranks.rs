//! Several ranks: as threads of this process, and what they agree on.

use candle_core::{Device, Tensor};
use incipit_collective::{Collective, Mesh, Options, Ranks, Reduce, local};

use crate::{Error, Result};

/// Does `work` on every rank of a mesh, each a thread with threads of its own to compute with (`threads` in all; the machine's
/// where none are given). Results are in the order of the ranks.
///
/// # Panics
/// If `work` does on a rank; the others are told that it has left.
pub fn on_threads<T: Send, E: Send + From<Error>>(
    mesh: Mesh,
    threads: Option<usize>,
    options: &Options,
    work: impl Fn(Ranks) -> Result<T, E> + Sync,
) -> Vec<Result<T, E>> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let share = mesh.share_of_threads(threads.unwrap_or_else(cores));
    let on_rank = |ranks: Ranks| {
        // A rank waits for others in the middle of its work. In a pool of its own it keeps nobody else from working.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(share).build();
        let pool = pool.map_err(|cause| Error::Threads { cause: cause.to_string() })?;
        pool.install(|| work(ranks))
    };
    std::thread::scope(|scope| {
        let running: Vec<_> =
            local::ranks(mesh, options).into_iter().map(|ranks| scope.spawn(|| on_rank(ranks))).collect();
        let ended: Vec<_> = running.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.into_iter().map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// All results; or, if a rank failed, the error that says why: not one that only tells of another rank's failure, where
/// there is another.
///
/// # Errors
/// That one.
pub fn first_cause<T, E>(results: Vec<Result<T, E>>, is_echo: impl Fn(&E) -> bool) -> Result<Vec<T>, E> {
    let mut values = Vec::with_capacity(results.len());
    let mut failure: Option<E> = None;
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) if failure.as_ref().is_none_or(|first| is_echo(first) && !is_echo(&error)) => {
                failure = Some(error);
            }
            Err(_) => {}
        }
    }
    failure.map_or(Ok(values), Err)
}

/// `values` added up, or their maxima, over a group.
pub(crate) fn reduced(group: &dyn Collective, values: Vec<i64>, reduce: Reduce) -> Result<Vec<i64>> {
    if group.size() == 1 || values.is_empty() {
        return Ok(values);
    }
    let count = values.len();
    let x = Tensor::from_vec(values, count, &Device::Cpu)?;
    Ok(group.all_reduce(&x, reduce)?.to_vec1()?)
}

/// The largest of everybody's values, one by one.
pub(crate) fn largest(ranks: &Ranks, values: &[i64]) -> Result<Vec<i64>> {
    reduced(&**ranks.world(), values.to_vec(), Reduce::Max)
}

/// Whether anybody says so.
pub(crate) fn any(ranks: &Ranks, own: bool) -> Result<bool> {
    Ok(largest(ranks, &[i64::from(own)])?[0] == 1)
}
