//! Ranks as child processes: started together, watched, and ended together.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::exit::Exit;
use crate::progress;

/// How often the ranks are looked at.
const TICK: Duration = Duration::from_millis(20);
/// After one rank failed, the time in which others may end by themselves: the first to end need not be the cause. A rank that lost a
/// connection looks half a second for the reason.
const SETTLE: Duration = Duration::from_secs(1);
/// The time that ranks have to end when they are asked to, before they are killed.
const MERCY: Duration = Duration::from_secs(3);
/// What the last thing that a rank says begins with.
pub(crate) const LAST_WORDS: &str = "error: ";

/// How a rank ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) rank: usize,
    pub(crate) how: How,
    /// Whether the supervisor ended it because of another.
    put_down: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Code(i32),
    Signal(i32),
}

/// What became of the ranks.
pub(crate) struct Outcome {
    /// In the order in which they ended.
    pub(crate) ends: Vec<End>,
    /// Whether somebody asked them to stop.
    pub(crate) interrupted: bool,
    /// By rank, the error with which it ended, if it told one.
    pub(crate) last_words: Vec<String>,
}

impl From<ExitStatus> for How {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(i32::from(Exit::Failure as u8)),
        }
    }
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => write!(f, "killed by signal {number}{}", signal_name(*number)),
        }
    }
}

fn signal_name(number: i32) -> &'static str {
    match Signal::from_named_raw(number) {
        Some(Signal::KILL) => " (SIGKILL; the system does that when memory runs out)",
        Some(Signal::TERM) => " (SIGTERM)",
        Some(Signal::INT) => " (SIGINT)",
        Some(Signal::HUP) => " (SIGHUP)",
        Some(Signal::ABORT) => " (SIGABRT)",
        Some(Signal::SEGV) => " (SIGSEGV)",
        Some(Signal::BUS) => " (SIGBUS)",
        Some(Signal::ILL) => " (SIGILL)",
        Some(Signal::FPE) => " (SIGFPE)",
        _ => "",
    }
}

impl Outcome {
    /// The rank that failed first. One that ended because another had failed, or because it was told to, is not to blame while there
    /// is one that was not.
    pub(crate) fn blamed(&self) -> Option<&End> {
        let mut failed = self.ends.iter().filter(|end| self.failed(end));
        let echo = How::Code(i32::from(Exit::OtherRank as u8));
        failed.clone().find(|end| !end.put_down && end.how != echo).or_else(|| failed.next())
    }

    fn failed(&self, end: &End) -> bool {
        is_failure(end.how, self.interrupted)
    }
}

fn is_failure(how: How, interrupted: bool) -> bool {
    match how {
        How::Code(code) => code != 0 && code != i32::from(Exit::Interrupted as u8),
        How::Signal(signal) => !(interrupted && signal == Signal::INT.as_raw()),
    }
}

/// Starts the commands, rank by rank, and returns when all have ended. Every signal that is received is passed on to all of them. Once
/// one has failed, the others are ended within seconds.
///
/// # Errors
/// If a command cannot be started or watched; then none is left running.
pub(crate) fn supervise(commands: Vec<Command>, signals: &Receiver<()>) -> Result<Outcome> {
    let mut crew = Crew::start(commands)?;
    let mut phase = Phase::Running;
    while crew.is_at_work() {
        match signals.recv_timeout(TICK) {
            Ok(()) => {
                crew.interrupted = true;
                crew.signal(Signal::INT);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        crew.look(&phase)?;
        phase = phase.next(&crew);
    }
    Ok(crew.dismiss())
}

/// How far the end has come.
enum Phase {
    Running,
    /// One has failed; the others may still end by themselves.
    Settling(Instant),
    /// They were asked to end.
    Ending(Instant),
    Killed,
}

impl Phase {
    fn next(self, crew: &Crew) -> Self {
        let now = Instant::now();
        match self {
            Self::Running if crew.has_failed() => Self::Settling(now + SETTLE),
            Self::Settling(until) if now >= until => {
                crew.hush.store(true, Ordering::Relaxed);
                crew.signal(Signal::TERM);
                Self::Ending(now + MERCY)
            }
            Self::Ending(until) if now >= until => {
                crew.signal(Signal::KILL);
                Self::Killed
            }
            phase => phase,
        }
    }
}

/// The ranks. Whichever of them still run when this is dropped are killed.
struct Crew {
    members: Vec<Member>,
    ends: Vec<End>,
    interrupted: bool,
    /// Whether ranks are being ended, so that what they say of it tells nothing.
    hush: Arc<AtomicBool>,
}

struct Member {
    child: Child,
    /// Reads what it says; returns its last words.
    relay: JoinHandle<String>,
    ended: bool,
}

impl Crew {
    fn start(commands: Vec<Command>) -> Result<Self> {
        let hush = Arc::new(AtomicBool::new(false));
        let mut crew = Self { members: Vec::new(), ends: Vec::new(), interrupted: false, hush };
        for (rank, mut command) in commands.into_iter().enumerate() {
            // A group of its own: Ctrl-C in the terminal reaches the launcher alone, which passes it on once.
            let mut child = command
                .process_group(0)
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot start rank {rank}"))?;
            let stderr = child.stderr.take();
            let hush = crew.hush.clone();
            let relay =
                std::thread::spawn(move || stderr.map_or_else(String::new, |e| relay(rank, e, &hush)));
            crew.members.push(Member { child, relay, ended: false });
        }
        Ok(crew)
    }

    fn is_at_work(&self) -> bool {
        self.members.iter().any(|member| !member.ended)
    }

    fn has_failed(&self) -> bool {
        self.ends.iter().any(|end| is_failure(end.how, self.interrupted))
    }

    /// Notes who has ended.
    fn look(&mut self, phase: &Phase) -> Result<()> {
        let put_down = matches!(phase, Phase::Ending(_) | Phase::Killed);
        for (rank, member) in self.members.iter_mut().enumerate().filter(|(_, member)| !member.ended) {
            let status = member.child.try_wait().with_context(|| format!("cannot watch rank {rank}"))?;
            if let Some(status) = status {
                member.ended = true;
                self.ends.push(End { rank, how: status.into(), put_down });
            }
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        for member in self.members.iter().filter(|member| !member.ended) {
            // One that has just ended needs no signal.
            let _ = kill_process_group(Pid::from_child(&member.child), signal);
        }
    }

    fn dismiss(mut self) -> Outcome {
        let relays = std::mem::take(&mut self.members).into_iter().map(|member| member.relay);
        Outcome {
            last_words: relays.map(|relay| relay.join().unwrap_or_default()).collect(),
            ends: std::mem::take(&mut self.ends),
            interrupted: self.interrupted,
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        for member in self.members.iter_mut().filter(|member| !member.ended) {
            let _ = member.child.wait();
        }
    }
}

/// Passes on what a rank says, line by line, with the rank before the lines of all but rank 0. The error at its end is held back and
/// returned: what several ranks say alike is told once.
fn relay(rank: usize, from: impl Read, hush: &AtomicBool) -> String {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
        if line.starts_with(LAST_WORDS.as_bytes()) {
            let _ = from.read_to_end(&mut line);
            return String::from_utf8_lossy(&line).trim_end().to_owned();
        }
        if !hush.load(Ordering::Relaxed) {
            progress::relay(rank, String::from_utf8_lossy(&line).trim_end_matches('\n'));
        }
        line.clear();
    }
    String::new()
}

/// What marks the lines of a rank.
pub(crate) fn prefix(rank: usize) -> String {
    format!("[rank {rank}] ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(ends: &[(usize, How, bool)], interrupted: bool) -> Outcome {
        let end =
            |(rank, how, put_down): &(usize, How, bool)| End { rank: *rank, how: *how, put_down: *put_down };
        Outcome { ends: ends.iter().map(end).collect(), interrupted, last_words: Vec::new() }
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::null());
        command
    }

    #[test]
    fn an_echo_is_not_blamed_while_there_is_a_cause() {
        let (echo, killed) = (How::Code(4), How::Signal(9));
        let blamed = |ends: &[(usize, How, bool)]| outcome(ends, false).blamed().map(|end| end.rank);
        assert_eq!(blamed(&[(0, echo, false), (2, killed, false), (1, How::Code(1), false)]), Some(2));
        assert_eq!(blamed(&[(0, echo, false), (1, killed, true)]), Some(0));
        assert_eq!(blamed(&[(0, How::Code(0), false), (1, How::Code(130), false)]), None);
    }

    #[test]
    fn a_rank_that_ends_by_the_interruption_has_not_failed() {
        let ends = [(0, How::Signal(Signal::INT.as_raw()), false)];
        assert!(outcome(&ends, true).blamed().is_none());
        assert!(outcome(&ends, false).blamed().is_some());
    }

    #[test]
    fn one_failure_ends_the_others_and_their_last_words_are_kept() {
        let (_sender, signals) = std::sync::mpsc::channel();
        let start = Instant::now();
        let commands = vec![
            shell("sleep 100"),
            shell("trap '' TERM; echo working >&2; echo 'error: no luck' >&2; exit 7"),
        ];
        let outcome = supervise(commands, &signals).expect("an outcome");
        let blamed = outcome.blamed().expect("somebody");
        assert_eq!((blamed.rank, blamed.how), (1, How::Code(7)));
        assert_eq!(outcome.last_words, ["", "error: no luck"]);
        assert!(outcome.ends.iter().any(|end| end.rank == 0 && end.put_down), "{:?}", outcome.ends);
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }

    #[test]
    fn one_that_does_not_listen_is_killed() {
        let (_sender, signals) = std::sync::mpsc::channel();
        let deaf = shell("trap '' TERM; while true; do sleep 0.1; done");
        let outcome = supervise(vec![deaf, shell("sleep 0.5; exit 1")], &signals).expect("an outcome");
        let deaf = outcome.ends.iter().find(|end| end.rank == 0).expect("its end");
        assert_eq!(deaf.how, How::Signal(9));
    }

    #[test]
    fn signals_are_passed_on_to_all() {
        let (sender, signals) = std::sync::mpsc::channel();
        sender.send(()).expect("a receiver");
        // The shell may get the signal before its trap is set, and then ends by it.
        let polite = || shell("trap 'exit 130' INT; while true; do sleep 0.05; done");
        let outcome = supervise(vec![polite(), polite()], &signals).expect("an outcome");
        assert!(outcome.interrupted && outcome.blamed().is_none(), "{:?}", outcome.ends);
        assert_eq!(outcome.ends.len(), 2);
    }
}
