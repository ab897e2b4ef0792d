//! Carries a plan out: a process for every run that is not done yet, one after another.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use incipit_tune::atomic;
use incipit_tune::ensemble;
use incipit_tune::spec::RUN_FILE;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::plan::{Plan, Run};
use crate::exit::{Exit, bad_input};
use crate::progress::{note, warn};
use crate::ranks::environment::LAUNCHER;
use crate::units;

/// How often a run is looked at.
const TURN: Duration = Duration::from_millis(50);

/// A run that has ended well.
#[derive(Serialize, Deserialize)]
pub(super) struct Done {
    command: Vec<String>,
    pub(super) seconds: f64,
    pub(super) work: Option<f64>,
    /// What it printed.
    pub(super) summary: Value,
}

/// What has become of a plan's runs.
pub(super) struct Progress {
    /// Run by run; none of those that are not done.
    pub(super) done: Vec<Option<Done>>,
    pub(super) failed: BTreeSet<usize>,
    pub(super) interrupted: bool,
}

/// The runs that are done already.
///
/// # Errors
/// If one of them was another run of the same name, or its record is damaged.
pub(super) fn done(plan: &Plan<'_>) -> Result<Progress> {
    let done = plan.runs.iter().map(|run| read(&record(plan, run), run)).collect::<Result<Vec<_>>>()?;
    Ok(Progress { done, failed: BTreeSet::new(), interrupted: false })
}

fn record(plan: &Plan<'_>, run: &Run) -> PathBuf {
    beside(plan, run, ".json")
}

/// What a run says while it works.
fn log(plan: &Plan<'_>, run: &Run) -> PathBuf {
    beside(plan, run, ".log")
}

fn beside(plan: &Plan<'_>, run: &Run, extension: &str) -> PathBuf {
    // A name may have dots in it.
    let mut path = plan.dir(&run.name).into_os_string();
    path.push(extension);
    path.into()
}

fn read(path: &Path, run: &Run) -> Result<Option<Done>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let done: Done = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is damaged: remove it, and the run is done again", path.display()))?;
    if done.command != run.command {
        return bad_input(format!(
            "{} was made with other settings (incipit {}; now: incipit {}): choose another --out",
            path.display(),
            done.command.join(" "),
            run.command.join(" ")
        ));
    }
    Ok(Some(done))
}

/// Does what is not done yet. A run that fails costs what needs it, and nothing else.
///
/// # Errors
/// If a process cannot be started, or a record not written.
pub(super) fn carry_out(plan: &Plan<'_>, progress: &mut Progress, signals: &Receiver<()>) -> Result<()> {
    for (i, run) in plan.runs.iter().enumerate() {
        if progress.done[i].is_some() {
            continue;
        }
        if let Some(&lost) = run.after.iter().find(|&&needed| progress.failed.contains(&needed)) {
            warn(&format!("{} is left out, since {} failed", run.name, plan.runs[lost].name));
            progress.failed.insert(i);
            continue;
        }
        let left = super::estimate::left(plan, progress).map_or_else(String::new, |time| {
            format!(" (about {} for all that is left)", units::duration(time))
        });
        note(&format!("[{}/{}] {}{left}", i + 1, plan.runs.len(), run.name));
        let start = Instant::now();
        match process(plan, run, signals)? {
            Ended::Well { summary, asked } => {
                let seconds = start.elapsed().as_secs_f64();
                let done = Done { command: run.command.clone(), seconds, work: run.work, summary };
                let path = record(plan, run);
                make_parent(&path)?;
                atomic::write_file(&path, &serde_json::to_vec_pretty(&done)?)?;
                progress.done[i] = Some(done);
                // Someone asked for the end while the run came to its own.
                if asked {
                    progress.interrupted = true;
                    return Ok(());
                }
            }
            Ended::Badly => {
                let log = log(plan, run);
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let last = said.trim_end().lines().next_back().unwrap_or("it said nothing");
                warn(&format!("{} failed: {last} (all that it said is in {})", run.name, log.display()));
                progress.failed.insert(i);
            }
            Ended::Interrupted => {
                progress.interrupted = true;
                return Ok(());
            }
        }
    }
    Ok(())
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new(""));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))
}

enum Ended {
    Well { summary: Value, asked: bool },
    Badly,
    Interrupted,
}

/// Runs a command to its end. The first signal is passed on to it, which saves and leaves; the second ends it.
fn process(plan: &Plan<'_>, run: &Run, signals: &Receiver<()>) -> Result<Ended> {
    let dir = plan.dir(&run.name);
    let begun = has_begun(&dir);
    if dir.exists() && !begun {
        // All that one leaves that died before its first checkpoint is in the way of the next.
        std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    make_parent(&dir)?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(&program);
    command.args(plan.command(run));
    command.args(["--json", "--quiet"]).args(begun.then_some("--resume"));
    let log = log(plan, run);
    let stderr = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    // If this process is killed, its run ends too, and does not stand in the way of the next.
    command.env(LAUNCHER, std::process::id().to_string());
    // A group of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.map(|mut stdout| stdout.read_to_string(&mut text)).transpose().map(|_| text)
    });
    let mut asked = false;
    let status = loop {
        if signals.recv_timeout(TURN).is_ok() {
            let signal = if asked { Signal::KILL } else { Signal::INT };
            // One that has just ended needs no signal.
            let _ = kill_process_group(Pid::from_child(&child), signal);
            asked = true;
        }
        if let Some(status) = child.try_wait().context("cannot watch a run")? {
            break status;
        }
    };
    let text = reader.join().unwrap_or(Ok(String::new())).context("cannot read what a run prints")?;
    match status.code() {
        Some(code) if code == Exit::Ok as i32 => {
            let summary =
                serde_json::from_str(&text).with_context(|| format!("what {} printed", run.name))?;
            Ok(Ended::Well { summary, asked })
        }
        _ if asked => Ok(Ended::Interrupted),
        _ => Ok(Ended::Badly),
    }
}

/// Whether a run in this directory has got far enough to go on.
fn has_begun(dir: &Path) -> bool {
    dir.join(RUN_FILE).is_file() || dir.join(ensemble::FILE).is_file()
}
