//! Several ranks: as threads of this process, and what they agree on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use candle_core::{Device, Tensor};
use incipit_collective::{Collective, Mesh, Options, Ranks, Reduce, gather_bytes, local};
use incipit_data::TokenizedExample;

use crate::{Error, Result, prompt::Prompt, trained::Trained};

/// How often ranks that wait for others ask whether these still work.
const BETWEEN: Duration = Duration::from_millis(20);

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
        let rank = ranks.rank();
        let named = move |_| format!("rank {rank}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(share).thread_name(named).build();
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

/// Checks that every rank has the same of each thing, given by its name ("another specification") and what stands for it: what
/// differs would spoil what the ranks compute together.
///
/// # Errors
/// [`Error::RanksDiffer`] with the first thing in which a rank differs from rank 0, the same on every rank.
pub fn agree<const N: usize>(
    ranks: &Ranks,
    things: impl FnOnce() -> [(&'static str, String); N],
) -> Result<()> {
    if ranks.mesh().world() == 1 {
        return Ok(());
    }
    let things = things();
    let hashes = things.iter().flat_map(|(_, value)| *blake3::hash(value.as_bytes()).as_bytes());
    let all = gather_bytes(&**ranks.world(), &hashes.collect::<Vec<u8>>())?;
    for (i, (what, _)) in things.iter().enumerate() {
        let of = |rank: &Vec<u8>| rank.chunks_exact(32).nth(i).map(<[u8]>::to_vec);
        if let Some(rank) = all.iter().position(|rank| of(rank) != of(&all[0])) {
            return Err(Error::RanksDiffer { rank, what });
        }
    }
    Ok(())
}

/// Does `work` on every rank, however long it takes on one: nobody runs into the deadline of an operation meanwhile. A rank whose work
/// fails leaves with its error at once, and the others lose it.
///
/// The work stays on the thread, and with its pool, on which it was called; others are told by another thread that it goes on.
pub(crate) fn while_others_wait<T>(ranks: &Ranks, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if ranks.mesh().world() == 1 {
        return work();
    }
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        let told = scope.spawn(move || tell_until_all_have_done(ranks, &receiver));
        let done = work();
        if done.is_ok() {
            let _ = sender.send(());
        }
        // What comes from a failure, or a panic, says no more.
        drop(sender);
        let told = told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let done = done?;
        told?;
        Ok(done)
    })
}

/// Tells the others, again and again, whether this rank still works, until nobody does, or it has failed. `done` hears when it has done.
fn tell_until_all_have_done(ranks: &Ranks, done: &Receiver<()>) -> Result<()> {
    let mut works = true;
    while any(ranks, works)? {
        if !works {
            std::thread::sleep(BETWEEN);
            continue;
        }
        match done.recv_timeout(BETWEEN) {
            Ok(()) => works = false,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}

/// What stands for these examples in [`agree`]: a hash of their tokens.
pub(crate) fn tokens_digest(examples: &[TokenizedExample]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in examples.iter().flat_map(|example| [&example.input, &example.target]) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(&part.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>());
    }
    hasher.finalize().to_hex().to_string()
}

/// What stands for a prompt in [`agree`]: a hash of its bits, its shape and its place.
pub(crate) fn prompt_digest(prompt: &Prompt) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?} {:?}", prompt.placement(), prompt.shape()).as_bytes());
    hasher.update(&prompt.values().iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    hasher.finalize().to_hex().to_string()
}

/// What stands for trained numbers in [`agree`]: a hash of their bits.
pub(crate) fn trained_digest(trained: &Trained) -> String {
    match trained {
        Trained::Prompt(prompt) => prompt_digest(prompt),
        Trained::Weights(weights) => {
            let mut hasher = blake3::Hasher::new();
            for value in weights.iter().flat_map(|weight| &weight.data) {
                hasher.update(&value.to_le_bytes());
            }
            hasher.finalize().to_hex().to_string()
        }
    }
}

/// How many ranks share this machine's memory, this one among them.
pub(crate) fn on_this_machine(ranks: &Ranks) -> Result<usize> {
    // Differs from machine to machine, and is the same for all processes of one.
    let machine = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let all = gather_bytes(&**ranks.world(), &machine)?;
    Ok(all.iter().filter(|other| **other == machine).count())
}

/// Whether anybody says so.
pub(crate) fn any(ranks: &Ranks, own: bool) -> Result<bool> {
    Ok(largest(ranks, &[i64::from(own)])?[0] == 1)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// What an exchange may wait.
    const DEADLINE: Duration = Duration::from_secs(1);

    /// Three ranks, of which each does `work` while the others wait; `left` is what it does where its work has failed.
    fn on_three(work: impl Fn(usize) -> Result<usize> + Sync, left: impl Fn() + Sync) -> Vec<Result<usize>> {
        let options = Options { deadline: DEADLINE, ..Options::default() };
        on_threads(Mesh::new(3, 1, 3).unwrap(), Some(3), &options, |ranks| {
            let done = while_others_wait(&ranks, || work(ranks.rank())).inspect_err(|error| {
                ranks.abort(&error.to_string());
                left();
            })?;
            // The next exchange is everybody's.
            assert_eq!(largest(&ranks, &[done as i64])?, [2]);
            Ok(done)
        })
    }

    #[test]
    fn a_rank_may_work_for_longer_than_the_deadline_while_others_wait() {
        let work = |rank| {
            // In the rank's own pool, and not in that of all threads of the process.
            assert_eq!(rayon::current_num_threads(), 1);
            assert_eq!(std::thread::current().name(), Some(&*format!("rank {rank}")));
            std::thread::sleep(if rank == 1 { DEADLINE * 2 } else { Duration::ZERO });
            Ok(rank)
        };
        let done: Result<Vec<_>> = on_three(work, || {}).into_iter().collect();
        assert_eq!(done.unwrap(), [0, 1, 2]);
    }

    #[test]
    fn a_rank_whose_work_fails_leaves_at_once_and_tells_the_others_why() {
        let has_left = AtomicBool::new(false);
        let work = |rank| {
            if rank == 1 {
                return Err(Error::Regroup { what: "its disk is gone".to_owned() });
            }
            // It works until rank 1 has left: that does not wait for the end of this.
            let looks = (0..6000).take_while(|_| {
                std::thread::sleep(Duration::from_millis(10));
                !has_left.load(Ordering::SeqCst)
            });
            assert!(looks.count() < 6000, "rank 1 waits for rank {rank}");
            Ok(rank)
        };
        for (rank, done) in on_three(work, || has_left.store(true, Ordering::SeqCst)).into_iter().enumerate()
        {
            let error = done.unwrap_err();
            assert!(error.to_string().contains("its disk is gone"), "rank {rank}: {error}");
            assert_eq!(error.is_echo(), rank != 1, "rank {rank}: {error}");
        }
    }
}
