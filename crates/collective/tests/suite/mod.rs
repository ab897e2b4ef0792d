//! What must hold on every backend. Each check is run by all ranks of a mesh, in a thread or a process of its own, and
//! returns what all of them must see alike, whatever carries the numbers.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]
#![allow(clippy::needless_pass_by_value, reason = "a check is given its rank, to keep or to drop")]

mod failures;
mod values;

use std::time::Duration;

use incipit_collective::{Mesh, Options, Ranks, local};

/// One check.
pub(crate) struct Check {
    pub(crate) name: &'static str,
    /// On which meshes: tp, dp.
    pub(crate) meshes: &'static [(usize, usize)],
    /// How long an operation waits.
    pub(crate) deadline: Duration,
    pub(crate) body: fn(Ranks) -> String,
}

/// Far more than any check needs: whoever waits for it to pass has failed.
const LONG: Duration = Duration::from_secs(60);
/// For the check that lets it pass.
const SHORT: Duration = Duration::from_millis(2000);
/// What counts as at once on a busy machine.
const SOON: Duration = Duration::from_secs(20);

const LINES: &[(usize, usize)] = &[(1, 2), (1, 3), (4, 1)];

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "reductions",
        meshes: &[(1, 1), (1, 2), (3, 1), (1, 4)],
        deadline: LONG,
        body: values::reductions,
    },
    Check { name: "moves", meshes: &[(1, 1), (1, 2), (3, 1), (1, 4)], deadline: LONG, body: values::moves },
    Check { name: "bytes", meshes: &[(1, 1), (1, 3)], deadline: LONG, body: values::bytes },
    Check { name: "order of a sum", meshes: LINES, deadline: LONG, body: values::order_of_a_sum },
    Check { name: "groups", meshes: &[(2, 2), (3, 1)], deadline: LONG, body: values::groups },
    Check { name: "pairs", meshes: LINES, deadline: LONG, body: values::pairs },
    Check { name: "wrong order", meshes: LINES, deadline: LONG, body: failures::wrong_order },
    Check { name: "wrong reduction", meshes: LINES, deadline: LONG, body: failures::wrong_reduction },
    Check { name: "wrong shape", meshes: LINES, deadline: LONG, body: failures::wrong_shape },
    Check { name: "wrong dtype", meshes: LINES, deadline: LONG, body: failures::wrong_dtype },
    Check { name: "wrong root", meshes: LINES, deadline: LONG, body: failures::wrong_root },
    Check { name: "refusal", meshes: LINES, deadline: LONG, body: failures::refusal },
    Check { name: "dead peer", meshes: LINES, deadline: LONG, body: failures::dead_peer },
    Check { name: "death in between", meshes: LINES, deadline: LONG, body: failures::death_in_between },
    Check { name: "last call", meshes: LINES, deadline: LONG, body: failures::last_call },
    Check { name: "abort", meshes: LINES, deadline: LONG, body: failures::abort },
    Check { name: "abort elsewhere", meshes: &[(1, 3)], deadline: LONG, body: failures::abort_elsewhere },
    Check {
        name: "abort across groups",
        meshes: &[(2, 2)],
        deadline: LONG,
        body: failures::abort_across_groups,
    },
    Check { name: "abort from aside", meshes: LINES, deadline: LONG, body: failures::abort_from_aside },
    Check { name: "late rank", meshes: LINES, deadline: SHORT, body: failures::late_rank },
];

pub(crate) fn options(check: &Check) -> Options {
    Options { deadline: check.deadline, job: check.name.to_owned(), ..Options::default() }
}

/// Numbers that depend on nothing but their place: splitmix64 (Steele, Lea and Flood 2014).
pub(crate) fn random(seed: u64, i: usize) -> u64 {
    let mut x = (seed << 32).wrapping_add(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Runs `body` for all items at once.
pub(crate) fn at_once<T: Send, R: Send>(items: Vec<T>, body: impl Fn(T) -> R + Sync) -> Vec<R> {
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || body(item))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What the ranks see if nothing but memory is between them.
pub(crate) fn locally(check: &Check, mesh: Mesh) -> Vec<String> {
    at_once(local::ranks(mesh, &options(check)), check.body)
}

/// The environment variable that tells a process that it is a rank.
pub(crate) const RANK: &str = "INCIPIT_TEST_RANK";
/// What a process prints before the result of its check.
pub(crate) const MARK: &str = "@@";

/// Whether this rank is a process of its own.
pub(crate) fn is_process() -> bool {
    std::env::var_os(RANK).is_some()
}

/// The process dies without a word to the others.
pub(crate) fn vanish() {
    println!("\n{MARK}");
    std::process::abort();
}
