//! Files that do not travel at the first try: which are tried again, for how long, and what is said of it.

use std::time::Duration;

use incipit_proto::Problem;
use incipit_proto::client::problem_of;
use incipit_proto::v1;
use tokio::time::Instant;
use tonic::Code;

use crate::agent::core::Refused;

/// The first pause before another try, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Tries, at most, of what comes damaged.
const TRIES: u32 = 5;
/// From one word about what does not travel to the next: the first pause, which doubles, and the longest.
const WORDS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));

/// Why a file did not travel.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// The connection broke, the coordinator cannot just now, or has too much to do: trying again may help.
    Broken(Problem),
    /// What came is not what was asked for. That it broke off looks like this too, so that a few more tries may help. What a job fails by if
    /// they do not.
    Damaged(Problem, v1::JobReason),
    /// It was refused.
    Refused(Problem),
    /// This machine's disk is the reason.
    Local(String),
}

impl From<&tonic::Status> for Stopped {
    fn from(status: &tonic::Status) -> Self {
        let problem = problem_of(status);
        let passing =
            [Code::Unavailable, Code::Cancelled, Code::DeadlineExceeded, Code::Unknown, Code::Aborted];
        match problem.code {
            Code::DataLoss => Self::Damaged(problem, v1::JobReason::BadData),
            code if passing.contains(&code) || problem.is_for_now() => Self::Broken(problem),
            // Whoever runs the coordinator makes room, once the warnings tell; no job is to lose what it has trained until then.
            _ if problem.reason == "NO_SPACE" => Self::Broken(problem),
            _ => Self::Refused(problem),
        }
    }
}

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Broken(problem) | Self::Damaged(problem, _) | Self::Refused(problem) => problem.fmt(f),
            Self::Local(what) => f.write_str(what),
        }
    }
}

impl Stopped {
    /// Says what to do about it if the coordinator has it damaged.
    pub(crate) fn mended_by(mut self, mend: &str) -> Self {
        if let Self::Damaged(problem, v1::JobReason::BadData) = &mut self {
            problem.message = format!("{}; {mend}", problem.message);
        }
        self
    }

    /// It was to be a file of the checkpoint of this step: if the coordinator has it damaged or not at all, the job can go on from another.
    pub(crate) fn of_checkpoint(self, step: u64) -> Self {
        match self {
            Self::Damaged(mut problem, v1::JobReason::BadData) | Self::Refused(mut problem)
                if matches!(problem.code, Code::DataLoss | Code::NotFound) =>
            {
                problem.message = format!("of its checkpoint of step {step}: {}", problem.message);
                Self::Damaged(problem, v1::JobReason::CheckpointDamaged)
            }
            other => other,
        }
    }
}

impl From<Stopped> for Refused {
    fn from(stopped: Stopped) -> Self {
        let reason = match &stopped {
            Stopped::Damaged(_, reason) => *reason,
            Stopped::Refused(problem) if problem.code == Code::NotFound => v1::JobReason::BadData,
            _ => v1::JobReason::Internal,
        };
        Self { reason, message: format!("its files cannot be had: {stopped}") }
    }
}

/// What is to be told of files on their way.
#[derive(Debug)]
pub(crate) enum Word {
    /// They have not travelled for so long, and are tried again: why.
    Fails(Duration, Problem),
    /// They do again, after so long.
    Works(Duration),
}

/// Tries until it works, or trying does not help. `tell` hears that it does not at once and at growing intervals, and that it does again.
pub(crate) async fn persist<T, F: Future<Output = Result<T, Stopped>>>(
    attempt: impl Fn() -> F,
    tell: impl Fn(Word),
) -> Result<T, Stopped> {
    let (mut pause, mut damaged, mut trouble) = (PAUSES.0, 0, Trouble::default());
    let mut began = None;
    loop {
        let outcome = attempt().await;
        let lasts = began.map(|began: Instant| began.elapsed()).unwrap_or_default();
        let problem = match outcome {
            Err(Stopped::Broken(problem)) => {
                damaged = 0;
                problem
            }
            Err(Stopped::Damaged(problem, _)) if damaged + 1 < TRIES => {
                damaged += 1;
                problem
            }
            done => {
                if done.is_ok() && trouble.words > 0 {
                    tell(Word::Works(lasts));
                }
                return done;
            }
        };
        began = began.or_else(|| Some(Instant::now()));
        let wanted = problem.pause_wanted();
        if trouble.is_to_be_told(lasts, &problem) {
            tell(Word::Fails(lasts, problem));
        }
        tokio::time::sleep(pause.max(wanted)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// What was said of something that does not work.
#[derive(Default)]
struct Trouble {
    words: u32,
    last: Duration,
}

impl Trouble {
    /// Whether it is time to say so, after it has not worked for so long.
    fn is_to_be_told(&mut self, lasts: Duration, problem: &Problem) -> bool {
        let pause = (WORDS.0 * (1 << self.words.saturating_sub(1).min(16))).min(WORDS.1);
        // To be turned away at first is nothing to speak of where many come at once.
        let is_first = self.words == 0 && !problem.is_for_now();
        let told = is_first || lasts >= self.last + pause;
        if told {
            (self.words, self.last) = (self.words + 1, lasts);
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    fn unavailable() -> Problem {
        Problem::new(Code::Unavailable, "BLOB_STORE", "the disk is gone")
    }

    fn stopped(code: Code, reason: &str) -> Stopped {
        Stopped::from(&Problem::new(code, reason, "no").into())
    }

    /// What comes of tries that end so, how many there were, and what was said.
    fn tried(outcome: impl Fn(u32) -> Result<(), Stopped>) -> (Result<(), Stopped>, u32, Vec<Word>) {
        let (tries, said) = (Cell::new(0), RefCell::new(Vec::new()));
        let once = || {
            tries.set(tries.get() + 1);
            std::future::ready(outcome(tries.get()))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let done = runtime.block_on(persist(once, |word| said.borrow_mut().push(word)));
        (done, tries.get(), said.into_inner())
    }

    #[test]
    fn what_fails_is_told_at_once_and_so_is_that_it_works_again() {
        let (done, tries, said) =
            tried(|tries| if tries < 4 { Err(Stopped::Broken(unavailable())) } else { Ok(()) });
        assert!(done.is_ok());
        assert_eq!((tries, said.len()), (4, 2), "{said:?}");
        assert!(matches!(&said[0], Word::Fails(_, problem) if *problem == unavailable()), "{said:?}");
        assert!(matches!(said[1], Word::Works(lasts) if lasts >= PAUSES.0), "{said:?}");
    }

    #[test]
    fn what_goes_on_failing_is_told_at_growing_intervals() {
        let told = |problem: &Problem| -> Vec<u64> {
            let mut trouble = Trouble::default();
            (0..4000).filter(|&at| trouble.is_to_be_told(Duration::from_secs(at), problem)).collect()
        };
        let whole = [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030, 3630];
        assert_eq!(told(&unavailable()), whole);
        assert_eq!(told(&Problem::later("RATE_LIMIT", "often", Duration::ZERO))[0], 10);
    }

    #[test]
    fn what_comes_damaged_is_tried_a_few_times_and_then_it_is_bad_data() {
        let (done, tries, _) = tried(|_| Err(stopped(Code::DataLoss, "BLOB_DAMAGED").mended_by("do that")));
        assert_eq!(tries, TRIES);
        let refused = Refused::from(done.unwrap_err());
        assert_eq!(refused.reason, v1::JobReason::BadData);
        assert!(refused.message.ends_with("no; do that"), "{}", refused.message);
    }

    #[test]
    fn a_checkpoint_that_is_damaged_or_gone_is_told_as_that() {
        for (code, reason) in [(Code::DataLoss, "BLOB_DAMAGED"), (Code::NotFound, "BLOB_MISSING")] {
            let (done, tries, _) = tried(|_| Err(stopped(code, reason).of_checkpoint(7)));
            assert_eq!(tries, TRIES);
            let refused = Refused::from(done.unwrap_err());
            assert_eq!(refused.reason, v1::JobReason::CheckpointDamaged);
            assert!(refused.message.contains("of its checkpoint of step 7: no"), "{}", refused.message);
        }
        // It says nothing of the checkpoint that it is refused, or that it breaks on its way to here.
        let broken = Problem::new(Code::DataLoss, "BLOB_DAMAGED", "other bytes came");
        for stopped in
            [stopped(Code::PermissionDenied, "SCOPE"), Stopped::Damaged(broken, v1::JobReason::Internal)]
        {
            assert_eq!(Refused::from(stopped.of_checkpoint(7)).reason, v1::JobReason::Internal);
        }
    }

    #[test]
    fn to_be_turned_away_for_now_is_no_refusal_nor_is_a_full_disk() {
        for reason in ["RATE_LIMIT", "OVERLOADED"] {
            let wait = Duration::from_millis(300);
            let began = std::time::Instant::now();
            let (done, tries, said) = tried(|tries| {
                let turned_away = Problem::later(reason, "not now", wait);
                if tries < 2 { Err(Stopped::from(&turned_away.into())) } else { Ok(()) }
            });
            assert!(done.is_ok() && tries == 2 && said.is_empty(), "{reason}: {said:?}");
            assert!(began.elapsed() >= wait, "{reason} came again before it was told to");
        }
        let full = |reason| stopped(Code::ResourceExhausted, reason);
        let (done, tries, said) = tried(|tries| if tries < 2 { Err(full("NO_SPACE")) } else { Ok(()) });
        assert!(
            done.is_ok() && tries == 2 && said.len() == 2,
            "a full disk is told, and waited for: {said:?}"
        );
        let (done, tries, _) = tried(|_| Err(full("BLOB_TOO_LARGE")));
        assert!(matches!(done, Err(Stopped::Refused(_))) && tries == 1);
    }
}
