//! How long passes through the backbone take: what one may take at most is judged by those before it, so that a device that hangs is told
//! from one that is slow.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What goes through the backbone, as far as the time for a token depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Gradients to prompts.
    Gradients,
    /// Sums of gradients over examples and replicas.
    Sums,
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

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gradients => "gradients",
            Self::Sums => "sums of gradients",
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
    /// What such a pass has taken so far, at most; nothing if there was none. A pass of more tokens than any before is taken to need as
    /// many times as long.
    pub usual: Option<Duration>,
}

/// The passes of one rank.
#[derive(Debug, Default)]
pub struct Pace {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Pass>,
    begun: u64,
    /// The longest pass by what it was for and the binary logarithm of its tokens.
    longest: BTreeMap<(Work, u32), Duration>,
}

impl Pace {
    /// Makes a pass. How long it takes counts only if it succeeds.
    pub(crate) fn during<T, E>(
        &self,
        work: Work,
        num_tokens: usize,
        pass: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let start = Instant::now();
        let _guard = self.begin(work, num_tokens);
        let done = pass()?;
        self.lock().took(work, num_tokens, start.elapsed());
        Ok(done)
    }

    /// The pass that this rank makes now.
    #[must_use]
    pub fn current(&self) -> Option<Pass> {
        self.lock().current
    }

    fn begin(&self, work: Work, num_tokens: usize) -> Under<'_> {
        let mut state = self.lock();
        let usual = state.usual(work, num_tokens);
        state.current = Some(Pass { number: state.begun, work, num_tokens, usual });
        state.begun += 1;
        Under(self)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pass is under way for as long as this is there, also if it panics.
struct Under<'a>(&'a Pace);

impl Drop for Under<'_> {
    fn drop(&mut self) {
        self.0.lock().current = None;
    }
}

impl State {
    fn took(&mut self, work: Work, num_tokens: usize, time: Duration) {
        let longest = self.longest.entry((work, num_tokens.max(1).ilog2())).or_default();
        *longest = time.max(*longest);
    }

    /// The least that passes of any size allow: fewer tokens take no longer, and more in proportion.
    fn usual(&self, work: Work, num_tokens: usize) -> Option<Duration> {
        let sizes = self.longest.range((work, 0)..=(work, u32::MAX));
        let scaled = |((_, log), longest): (&(Work, u32), &Duration)| {
            longest.mul_f64((num_tokens as f64 / f64::from(*log).exp2()).max(1.0))
        };
        sizes.map(scaled).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_pass_is_measured_by_those_of_its_kind() {
        let mut state = State::default();
        assert_eq!(state.usual(Work::Gradients, 1024), None);
        state.took(Work::Gradients, 1024, SECOND);
        assert_eq!(state.usual(Work::Losses, 1024), None);
        let usual = |state: &State, num_tokens| state.usual(Work::Gradients, num_tokens).unwrap();
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
    fn a_pass_is_under_way_until_it_ends_and_counts_if_it_succeeds() {
        let pace = Pace::default();
        let failed: Result<(), &str> = pace.during(Work::Losses, 8, || {
            let pass = pace.current().unwrap();
            assert_eq!((pass.number, pass.work, pass.num_tokens, pass.usual), (0, Work::Losses, 8, None));
            Err("no")
        });
        assert_eq!((failed, pace.current()), (Err("no"), None));
        for number in 1..3 {
            let known = pace.during(Work::Losses, 8, || Ok::<_, ()>(pace.current().unwrap())).unwrap();
            assert_eq!((known.number, known.usual.is_some()), (number, number == 2));
        }
        assert!(
            std::panic::catch_unwind(|| pace.during(Work::Losses, 8, || -> Result<(), ()> { panic!() }))
                .is_err()
        );
        assert_eq!(pace.current(), None);
    }
}
