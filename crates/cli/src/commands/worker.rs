//! `incipit worker`: the agent of a machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use incipit_proto::client::ClientConfig;
use incipit_worker::agent::{self, AgentConfig};
use tokio::sync::mpsc;

use crate::cluster::ConnectArgs;
use crate::exit::{Exit, bad_input};
use crate::progress::note;
use crate::telemetry::worker_span;

/// Flags of `worker`.
#[derive(Args)]
#[command(
    after_help = "It connects to the coordinator, and to nobody else comes a connection but from other ranks of a backbone. It runs one \
                  process for each rank that it is given, and none outlives it. SIGTERM or Ctrl-C lets it save all jobs at the end of \
                  their step first, which takes seconds; Ctrl-C once more ends it at once, and jobs go on from their last checkpoints."
)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(flatten)]
    machine: MachineArgs,
    /// Name of the worker: small letters, digits and hyphens [default: made of the host's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Directory for data and for checkpoints on their way [default: ~/.local/state/incipit/worker-NAME]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// What this machine gives.
#[derive(Args, Clone)]
pub(crate) struct MachineArgs {
    /// Ranks that this machine can hold [default: its GPUs, or where it has none its cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    slots: Option<u32>,
    /// Address by which other machines reach this one, for ranks that are processes [default: that of the connection to the
    /// coordinator]
    #[arg(long, value_name = "ADDRESS")]
    address: Option<std::net::IpAddr>,
    /// After how long an engine is started again of which a pass through the backbone does not end. Where such passes take
    /// longer than an eighth of it, eight times the longest of late count, and ten minutes for the first of a kind in a group [default: 10 on
    /// a GPU, 60 on a CPU]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    hang_after: Option<u64>,
    /// How long jobs have at most to end their step and save when the worker is to end: less than whatever kills it after that
    /// waits
    #[arg(long, value_name = "SECONDS", default_value_t = 25, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    drain_within: u64,
}

/// Runs the agent.
///
/// # Errors
/// If the flags or the directory cannot be used.
pub(crate) fn run(args: WorkerArgs) -> Result<Exit> {
    let name = args.name.map_or_else(default_name, Ok)?;
    let state_dir = match args.state_dir {
        Some(dir) => dir,
        None => state_home()?.join(format!("worker-{name}")),
    };
    let config = agent_config(args.connect.client_config()?, name, &state_dir, &args.machine)?;
    let _span = worker_span(&config.worker_id).entered();
    note(&format!("worker {} works in {}", config.worker_id, config.state_dir.display()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { agent::run(config, signals()?).await.context("the worker ends") })?;
    Ok(Exit::Ok)
}

/// What an agent of this program is told.
///
/// # Errors
/// If the program's own file is not known, the directory is none, or a GPU of the machine cannot be used.
pub(crate) fn agent_config(
    coordinator: ClientConfig,
    worker_id: String,
    state_dir: &Path,
    machine: &MachineArgs,
) -> Result<AgentConfig> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let gpus = agent::gpus()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let default = if gpus.is_empty() { cores } else { gpus.len() } as u32;
    let mut engine = vec!["engine".to_owned()];
    engine.extend(machine.hang_after.map(|seconds| format!("--hang-after={seconds}")));
    Ok(AgentConfig {
        coordinator,
        worker_id,
        slots: machine.slots.unwrap_or(default),
        gpus,
        state_dir: std::path::absolute(state_dir)?,
        address: machine.address.map(|address| address.to_string()),
        drain: Duration::from_secs(machine.drain_within),
        engine: (program, engine),
    })
}

/// SIGTERM and Ctrl-C, as they come.
///
/// # Errors
/// If the system refuses to hand over its signals.
pub(crate) fn signals() -> Result<mpsc::Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let (sender, receiver) = mpsc::channel(4);
    // Platforms may send SIGTERM more than once, and mean the same.
    for (kind, times) in [(SignalKind::terminate(), 1), (SignalKind::interrupt(), usize::MAX)] {
        let mut signal = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            for _ in 0..times {
                if signal.recv().await.is_none() || sender.send(()).await.is_err() {
                    return;
                }
            }
            // Received, a signal that nobody listens to is let go.
            while signal.recv().await.is_some() {}
        });
    }
    Ok(receiver)
}

/// Where programs keep what has to be there tomorrow, and what nobody looks into.
///
/// # Errors
/// If the environment does not say.
pub(crate) fn state_home() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = variable("XDG_STATE_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/state")));
    match home {
        Some(home) => Ok(home.join("incipit")),
        None => bad_input("HOME is not set: say where to keep things, with --data or --state-dir"),
    }
}

/// A name made of the host's.
///
/// # Errors
/// If nothing of the host's name can be part of one.
pub(crate) fn default_name() -> Result<String> {
    let host = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
    name_of(&host)
        .map_or_else(|| bad_input(format!("the host's name {host:?} gives no name: pass --name")), Ok)
}

/// A name made of this text, if there is one.
pub(crate) fn name_of(text: &str) -> Option<String> {
    let known = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = text.chars().map(known).collect();
    let name = name.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    let name: String = name.chars().take(63).collect();
    Some(name.trim_end_matches('-').to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::name_of;

    #[test]
    fn hosts_and_directories_give_names() {
        assert_eq!(name_of("Node-17.cluster").unwrap(), "node-17-cluster");
        assert_eq!(name_of("t5_v1_1-xxl/").unwrap(), "t5-v1-1-xxl");
        assert_eq!(name_of("10.0.0.1"), None);
        assert_eq!(name_of(&"a".repeat(99)).unwrap().len(), 63);
    }
}
