//! Going on after a break: what follows a stream asks again from where it was.

use std::time::{Duration, Instant};

use anyhow::Result;
use incipit_proto::Problem;
use incipit_proto::client::problem_of;
use tonic::{Code, Status};

use super::refusal;
use crate::progress::note;

/// How long a coordinator may be away before a watcher gives up.
const GIVE_UP: Duration = Duration::from_secs(300);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How a stream that broke is taken up again.
#[derive(Default)]
pub(crate) struct Patience {
    broken: Option<Instant>,
    tries: u32,
}

impl Patience {
    /// Something came: the connection works.
    pub(crate) fn fine(&mut self) {
        if self.broken.take().is_some() {
            note("the coordinator is back");
        }
        self.tries = 0;
    }

    /// A stream broke: waits a moment, and longer each time.
    ///
    /// # Errors
    /// If it did not break but was refused, or the coordinator is away for too long.
    pub(crate) async fn after(&mut self, status: &Status) -> Result<()> {
        self.after_problem(problem_of(status)).await
    }

    /// The same, of a problem.
    ///
    /// # Errors
    /// As [`Self::after`].
    pub(crate) async fn after_problem(&mut self, problem: Problem) -> Result<()> {
        let lasting = !passes(&problem);
        if lasting || self.broken.is_some_and(|since| since.elapsed() > GIVE_UP) {
            return Err(refusal(problem));
        }
        if self.broken.is_none() && self.tries > 0 {
            self.broken = Some(Instant::now());
            note(&format!("{}; trying again", problem.message));
        }
        tokio::time::sleep(pause(self.tries)).await;
        self.tries += 1;
        Ok(())
    }
}

/// Whether the same question may be answered a little later.
fn passes(problem: &Problem) -> bool {
    match problem.code {
        Code::Unavailable => true,
        Code::ResourceExhausted => problem.reason == "WATCHER_TOO_SLOW" || problem.is_for_now(),
        // How a connection that breaks within an answer looks.
        Code::Unknown | Code::Internal | Code::Cancelled => problem.reason == "UNKNOWN",
        _ => false,
    }
}

fn pause(tries: u32) -> Duration {
    (Duration::from_millis(100) * 2u32.pow(tries.min(10))).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_break_passes_and_a_refusal_lasts() {
        let unknown = |code| Problem::new(code, "UNKNOWN", "it broke");
        for code in [Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled] {
            assert!(passes(&unknown(code)), "{code:?}");
        }
        for reason in ["WATCHER_TOO_SLOW", "RATE_LIMIT", "OVERLOADED"] {
            assert!(passes(&Problem::new(Code::ResourceExhausted, reason, "slow")), "{reason}");
        }
        assert!(!passes(&Problem::new(Code::Internal, "DISK", "the disk is full")));
        assert!(!passes(&Problem::not_found("jobs/j")));
    }

    #[test]
    fn pauses_grow_to_a_limit() {
        assert_eq!(pause(0), Duration::from_millis(100));
        assert_eq!(pause(3), Duration::from_millis(800));
        assert_eq!(pause(99), LONGEST_PAUSE);
    }
}
