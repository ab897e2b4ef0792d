//! Ranks: as threads of this process, or this process as one of several.

pub(crate) mod environment;
#[cfg(any(feature = "gloo", feature = "cuda"))]
mod processes;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use incipit_collective::{Mesh, Options, Ranks};
use incipit_tune::device::DeviceChoice;
use incipit_tune::ranks::{first_cause, on_threads};
use incipit_tune::spec::{Backend, PartialSpec};

use crate::exit::{bad_input, is_echo, sentence};
use environment::{LAUNCHER, variables};
#[cfg(any(feature = "gloo", feature = "cuda"))]
pub(crate) use processes::join;

/// How to come by a program with processes as ranks.
const BUILD_WITH_GLOO: &str = "build it with `cargo build --release --features gloo` (on Debian, gloo is libgloo-dev), or pass \
                               --collective local for threads of one process";

/// How to come by a program that uses GPUs.
const BUILD_WITH_CUDA: &str = "build it with `. scripts/cuda-toolkit.sh && cargo build --release --features cuda`, or pass local or gloo";

/// How the work is divided.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct RankArgs {
    /// Ranks that share one copy of the model's weights [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) tp: Option<usize>,
    /// Copies of the model, between which the examples are divided [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) dp: Option<usize>,
    /// What a rank is: a thread of this process (local), or a process that `incipit launch`, torchrun or srun started
    /// (gloo; with a GPU each, nccl) [default: local]
    #[arg(long, value_name = "local|gloo|nccl", value_parser = collective)]
    pub(crate) collective: Option<Backend>,
    /// Longest time that a rank waits for the others before it gives up
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) deadline: u64,
}

impl RankArgs {
    /// What the flags say of a run.
    pub(crate) fn spec(&self) -> PartialSpec {
        PartialSpec { tp: self.tp, dp: self.dp, collective: self.collective, ..PartialSpec::default() }
    }

    /// What the groups of ranks are told.
    pub(crate) fn options(&self) -> Options {
        let (deadline, default) = (Duration::from_secs(self.deadline), Options::default());
        Options { deadline, connect_deadline: deadline.max(default.connect_deadline), ..default }
    }
}

/// A value of `--collective`.
pub(crate) fn collective(name: &str) -> Result<Backend, String> {
    match name {
        "local" => Ok(Backend::Local),
        "gloo" if cfg!(feature = "gloo") => Ok(Backend::Gloo),
        "gloo" => Err(format!("this program was built without gloo: {BUILD_WITH_GLOO}")),
        "nccl" if cfg!(feature = "cuda") => Ok(Backend::Nccl),
        "nccl" => Err(format!("this program was built without nccl: {BUILD_WITH_CUDA}")),
        _ => Err("pass local, gloo or nccl".to_owned()),
    }
}

/// Refuses threads as ranks in a process that a launcher started as one of several: each would do the whole work, and write over
/// what the others wrote.
///
/// # Errors
/// If the environment says so.
pub(crate) fn refuse_several_processes() -> Result<()> {
    match environment::one_of_several(&variables) {
        Some(found) => bad_input(format!(
            "{found} say that this process is one of several, and without --collective gloo or nccl each would do the whole work and \
             overwrite the others; pass --collective gloo, or unset these variables"
        )),
        None => Ok(()),
    }
}

/// Does the work on every rank that the flags ask for, and returns what it came to: with threads on rank 0, in a process of its
/// own on this rank.
///
/// # Errors
/// If the ranks cannot meet, or the first error of the work that is no consequence of another rank's.
pub(crate) fn run<T: Send>(
    args: &RankArgs,
    device: DeviceChoice,
    threads: Option<u16>,
    work: impl Fn(&Arc<Ranks>) -> Result<T> + Sync,
) -> Result<T> {
    let (tp, dp) = (args.tp.unwrap_or(1), args.dp.unwrap_or(1));
    let on_rank = |ranks: Ranks| {
        let ranks = Arc::new(ranks);
        // On one of the threads that compute: handing them each operation from outside costs two wake-ups.
        rayon::scope(|_| telling(&ranks, work(&ranks)))
    };
    if let Some(backend @ (Backend::Gloo | Backend::Nccl)) = args.collective {
        return on_rank(join(backend, (tp, dp), device, &args.options())?);
    }
    refuse_several_processes()?;
    let mesh = local_mesh(tp, dp)?;
    if mesh.world() == 1 {
        return on_rank(Ranks::alone());
    }
    let results = on_threads(mesh, threads.map(usize::from), &args.options(), on_rank);
    let first = first_cause(results, is_echo)?.into_iter().next();
    first.ok_or_else(|| anyhow!("no rank had a result"))
}

/// Tells the other ranks why this one cannot go on, if it cannot: they wait for it.
fn telling<T>(ranks: &Ranks, done: Result<T>) -> Result<T> {
    if let Err(error) = &done
        && !is_echo(error)
    {
        ranks.abort(&sentence(error));
    }
    done
}

/// The mesh of threads.
///
/// # Errors
/// If a degree is 0.
pub(crate) fn local_mesh(tp: usize, dp: usize) -> Result<Mesh> {
    mesh(tp, dp, tp.saturating_mul(dp))
}

fn mesh(tp: usize, dp: usize, world: usize) -> Result<Mesh> {
    Ok(Mesh::new(tp, dp, world).map_err(incipit_collective::Error::from)?)
}

/// Without gloo and nccl, no process can be a rank.
///
/// # Errors
/// Always.
#[cfg(not(any(feature = "gloo", feature = "cuda")))]
pub(crate) fn join(_: Backend, _: (usize, usize), _: DeviceChoice, _: &Options) -> Result<Ranks> {
    bad_input(format!("--collective gloo: this program was built without gloo; {BUILD_WITH_GLOO}"))
}

/// What stands before a command that goes on with this one's work.
pub(crate) fn launch_prefix(ranks: usize) -> String {
    if launched() { format!("incipit launch --nproc {ranks} -- ") } else { "incipit ".to_owned() }
}

/// Whether `incipit launch` started this process. It marks this process's lines with their rank.
pub(crate) fn launched() -> bool {
    variables(LAUNCHER).is_some()
}

/// Lets this process end with the launcher that started it, however that ends.
///
/// # Errors
/// If the launcher is gone already, or the system refuses.
#[cfg(target_os = "linux")]
pub(crate) fn end_with_launcher() -> Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    let Some(launcher) = variables(LAUNCHER) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before that took hold.
    match getppid() {
        Some(parent) if parent.as_raw_nonzero().to_string() == launcher => Ok(()),
        _ => bad_input(format!(
            "{LAUNCHER}={launcher} is not the process that started this one: the launcher is gone, or the variable was inherited; \
             unset it"
        )),
    }
}

/// Only Linux tells a process of its parent's end.
#[cfg(not(target_os = "linux"))]
pub(crate) fn end_with_launcher() -> Result<()> {
    Ok(())
}

/// This process's rank, where the environment makes it one of several.
pub(crate) fn rank_of_process() -> Option<usize> {
    environment::one_of_several(&variables)?;
    environment::glance(&variables).map(|(rank, _)| rank)
}

/// A rank's share of the cores, where several run on this machine.
pub(crate) fn share_of_cores() -> Option<u16> {
    environment::one_of_several(&variables)?;
    let ranks = environment::on_this_machine(&variables)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mesh = local_mesh(1, ranks).ok()?;
    u16::try_from(mesh.share_of_threads(cores)).ok()
}
