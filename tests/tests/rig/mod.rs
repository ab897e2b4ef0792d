//! What tests of whole clusters have in common: programs that run beside them, waiting, and saying loudly what was left out.

// Not every test file uses all of it.
#![allow(dead_code)]

pub(crate) mod network;

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// Says that something was not tested, and why; with INCIPIT_REQUIRE_ALL=1 that is a failure.
pub(crate) fn skipped<T>(why: &str) -> Result<Option<T>> {
    ensure!(
        std::env::var("INCIPIT_REQUIRE_ALL").as_deref() != Ok("1"),
        "not tested: {why} (INCIPIT_REQUIRE_ALL=1)"
    );
    eprintln!("\n*** SKIPPED: {why}\n");
    Ok(None)
}

/// The programs of a Python environment that scripts/setup.sh has made, of which `one` is one.
pub(crate) fn tools(one: &str) -> Result<Option<PathBuf>> {
    let bin = std::env::var_os("INCIPIT_CLUSTER_TOOLS").map(|tools| PathBuf::from(tools).join("bin"));
    match bin.filter(|bin| bin.join(one).exists()) {
        Some(bin) => Ok(Some(bin)),
        None => {
            skipped(&format!("INCIPIT_CLUSTER_TOOLS names no folder with {one}; scripts/test.sh makes it"))
        }
    }
}

/// A process that ends with the test.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn()?))
    }

    /// Asks it to end, and returns its code.
    pub(crate) fn terminate(&mut self, within: Duration) -> Result<i32> {
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        let end = Instant::now() + within;
        while Instant::now() < end {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.code().unwrap_or(-1));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("it has not ended after {within:?}")
    }
}

/// Waits until something holds.
pub(crate) fn until(what: &str, seconds: u64, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !holds()? {
        ensure!(Instant::now() < end, "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// A port of this machine that nobody has.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
