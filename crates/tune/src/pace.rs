//! How long passes through the backbone take: what one may take at most is judged by those before it, so that a device that hangs is told
//! from one that is slow.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use incipit_collective::Ranks;

/// What goes through the backbone, as far as the time for a token depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Gradients to prompts.
    Gradients,
    /// Sums of losses and of gradients to prompts, over examples and replicas.
    Sums,
    /// Sums of gradients to weights, over replicas.
    SumsOfWeights,
    /// Gradients to weights.
    WeightGradients,
    /// Losses alone.
    Losses,
    /// Losses and predictions.
    Evaluation {
        /// Longest prediction that is written.
        new_tokens: usize,
        /// How many labels a prediction is chosen among.
        candidates: usize,
    },
}

impl Work {
    /// Whether replicas come together for it, of which one may have more to do before than another.
    #[must_use]
    pub fn is_of_all_replicas(self) -> bool {
        matches!(self, Self::Sums | Self::SumsOfWeights)
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gradients => "gradients",
            Self::Sums => "sums of gradients",
            Self::SumsOfWeights => "sums of gradients to weights",
            Self::WeightGradients => "gradients to weights",
            Self::Losses => "losses",
            Self::Evaluation { .. } => "evaluation",
        })
    }
}

/// A pass that has not ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// How many there were before it.
    pub number: u64,
    /// What it is for.
    pub work: Work,
    /// Its tokens.
    pub num_tokens: usize,
    /// What such passes have taken of late, at most, waiting for other ranks left out; nothing if there was none. A pass of more tokens than
    /// any of those is taken to need as many times as long.
    pub usual: Option<Duration>,
}

/// How many passes are looked back on, at least; at most twice as many. A slow one, as the first is that reads weights from a disk, does not
/// count for ever.
const LATE: u32 = 32;

/// The passes of one rank.
#[derive(Debug, Default)]
pub struct Pace {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Pass>,
    begun: u64,
    /// By what passes were for and the binary logarithm of their tokens.
    longest: BTreeMap<(Work, u32), Longest>,
}

/// The longest of the last passes.
#[derive(Debug, Default)]
struct Longest {
    now: Duration,
    before: Duration,
    num_now: u32,
}

impl Pace {
    /// Begins a pass.
    pub(crate) fn begin<'a>(&'a self, ranks: &'a Ranks, work: Work, num_tokens: usize) -> Under<'a> {
        let mut state = self.lock();
        let usual = state.usual(work, num_tokens);
        let pass = Pass { number: state.begun, work, num_tokens, usual };
        state.current = Some(pass);
        state.begun += 1;
        Under { pace: self, ranks, pass, start: Instant::now(), waited: ranks.seconds() }
    }

    /// The pass that this rank makes now.
    #[must_use]
    pub fn current(&self) -> Option<Pass> {
        self.lock().current
    }

    /// How many passes this rank has begun.
    #[must_use]
    pub fn num_passes(&self) -> u64 {
        self.lock().begun
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pass is under way for as long as this is there.
pub(crate) struct Under<'a> {
    pace: &'a Pace,
    ranks: &'a Ranks,
    pass: Pass,
    start: Instant,
    /// Seconds that the rank had waited for others before it.
    waited: f64,
}

impl Under<'_> {
    /// It has succeeded, and how long it took counts. It could have been `times` as long.
    pub(crate) fn succeeds(self, times: f64) {
        let waited = Duration::try_from_secs_f64(self.ranks.seconds() - self.waited).unwrap_or_default();
        let own = self.start.elapsed().saturating_sub(waited);
        self.pace.lock().took(self.pass.work, self.pass.num_tokens, own.mul_f64(times.max(1.0)));
    }
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        self.pace.lock().current = None;
    }
}

impl State {
    fn took(&mut self, work: Work, num_tokens: usize, time: Duration) {
        let longest = self.longest.entry((work, num_tokens.max(1).ilog2())).or_default();
        if longest.num_now == LATE {
            *longest = Longest { before: longest.now, ..Longest::default() };
        }
        longest.now = longest.now.max(time);
        longest.num_now += 1;
    }

    /// The least that passes of any size allow: fewer tokens take no longer, and more in proportion.
    fn usual(&self, work: Work, num_tokens: usize) -> Option<Duration> {
        let sizes = self.longest.range((work, 0)..=(work, u32::MAX));
        let scaled = |((_, log), longest): (&(Work, u32), &Longest)| {
            let times = (num_tokens as f64 / f64::from(*log).exp2()).max(1.0);
            longest.now.max(longest.before).mul_f64(times)
        };
        sizes.map(scaled).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn usual(state: &State, num_tokens: usize) -> Duration {
        state.usual(Work::Gradients, num_tokens).unwrap()
    }

    #[test]
    fn a_pass_is_measured_by_those_of_its_kind() {
        let mut state = State::default();
        assert_eq!(state.usual(Work::Gradients, 1024), None);
        state.took(Work::Gradients, 1024, SECOND);
        assert_eq!(state.usual(Work::Losses, 1024), None);
        assert_eq!(usual(&state, 1024), SECOND);
        assert_eq!(usual(&state, 10), SECOND, "fewer tokens may take as long");
        assert_eq!(usual(&state, 4096), 4 * SECOND);
        state.took(Work::Gradients, 4096, 2 * SECOND);
        assert_eq!(usual(&state, 4096), 2 * SECOND, "now it is known");
        state.took(Work::Gradients, 16, 3 * SECOND);
        assert_eq!(usual(&state, 16), SECOND, "a slow one of few tokens does not make more of them slow");
        let evaluation = |new_tokens| Work::Evaluation { new_tokens, candidates: 0 };
        state.took(evaluation(4), 100, SECOND);
        assert_eq!(state.usual(evaluation(512), 100), None, "longer predictions are another work");
    }

    #[test]
    fn a_slow_pass_does_not_count_for_ever() {
        let mut state = State::default();
        state.took(Work::Gradients, 8, 100 * SECOND);
        for _ in 0..LATE {
            state.took(Work::Gradients, 8, SECOND);
            assert_eq!(usual(&state, 8), 100 * SECOND);
        }
        for _ in 0..LATE {
            state.took(Work::Gradients, 8, SECOND);
        }
        assert_eq!(usual(&state, 8), SECOND);
    }

    #[test]
    fn a_pass_is_under_way_until_it_ends_and_counts_if_it_succeeds() {
        let (pace, ranks) = (Pace::default(), Ranks::alone());
        let failed = pace.begin(&ranks, Work::Losses, 8);
        let pass = pace.current().unwrap();
        assert_eq!((pass.number, pass.work, pass.num_tokens, pass.usual), (0, Work::Losses, 8, None));
        drop(failed);
        assert_eq!(pace.current(), None);
        let pass = pace.begin(&ranks, Work::Losses, 8);
        std::thread::sleep(Duration::from_millis(2));
        pass.succeeds(1000.0);
        let _pass = pace.begin(&ranks, Work::Losses, 8);
        let Pass { number, usual, .. } = pace.current().unwrap();
        assert_eq!(pace.num_passes(), 3);
        assert!(number == 2 && usual.is_some_and(|usual| usual >= 2 * SECOND), "{usual:?}");
    }
}
