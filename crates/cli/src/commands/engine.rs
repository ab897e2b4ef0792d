//! `incipit engine`: what an agent starts. Nobody starts it by hand, so that `--help` does not name it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::exit::{Exit, bad_input};

/// Flags of `engine`.
#[derive(Args)]
pub(crate) struct EngineArgs {
    /// The agent's process: the engine ends with it
    #[arg(long, value_name = "PID")]
    parent: i32,
    /// Seconds that a pass through the backbone may take in any case
    #[arg(long, value_name = "SECONDS")]
    hang_after: Option<u64>,
}

/// Runs an engine.
///
/// # Errors
/// If the agent is gone, or there is no output to answer it on.
pub(crate) fn run(args: &EngineArgs) -> Result<Exit> {
    end_with(args.parent)?;
    // Launchers signal whole sessions. An engine has to be there still when its agent lets jobs be saved.
    ctrlc::set_handler(|| {})?;
    let frames = take_stdout().context("cannot take the standard output for the agent alone")?;
    incipit_worker::engine::run(std::io::stdin(), frames, args.hang_after.map(Duration::from_secs));
    Ok(Exit::Ok)
}

/// The standard output, for frames alone: whatever else is written to it, as NCCL's messages are, goes to the standard error, which the
/// agent keeps as the engine's log.
#[cfg(unix)]
fn take_stdout() -> std::io::Result<std::fs::File> {
    use std::os::fd::AsFd as _;

    let frames = std::io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    Ok(frames.into())
}

#[cfg(not(unix))]
fn take_stdout() -> std::io::Result<std::io::Stdout> {
    Ok(std::io::stdout())
}

/// Lets this process end with the agent, however that ends.
#[cfg(target_os = "linux")]
fn end_with(parent: i32) -> Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before that took hold.
    match getppid() {
        Some(found) if found.as_raw_nonzero().get() == parent => Ok(()),
        _ => bad_input(format!("process {parent} did not start this engine, or is gone")),
    }
}

/// Elsewhere the end of its input tells an engine that its agent is gone.
#[cfg(not(target_os = "linux"))]
fn end_with(_: i32) -> Result<()> {
    Ok(())
}
