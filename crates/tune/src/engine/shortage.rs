//! Where the memory of one of several GPUs that share a model does not suffice.
//!
//! The other ranks stand in an exchange of the same pass, and the one without room cannot take part in it: the group of ranks ends. Its part
//! notes what there was no room for, and the next group, whose ranks agree on the smallest of what each of them can take, goes through less
//! at once. What has no room even alone is refused there before anybody begins with it, by all ranks alike.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;
use incipit_collective::Ranks;

use super::{Engine, Gathered, JobBatch, Refusal, Row, cost};
use crate::{
    Error, Result,
    microbatch::{LEAST_TOKENS, Taste},
    ranks,
};

/// What a rank can take at once, with nothing left open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Limits {
    /// Tokens of a microbatch.
    pub(crate) budget: usize,
    /// Whether layers are computed again.
    pub(crate) recompute: bool,
    /// An example of as many tokens has no room even alone.
    pub(crate) too_long: usize,
}

/// A microbatch for which there was no room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lacked {
    num_tokens: usize,
    num_examples: usize,
    /// Tokens of its longest example.
    longest: usize,
}

impl Lacked {
    pub(super) fn of(jobs: &[JobBatch<'_>], rows: &[Row]) -> Self {
        let costs = || rows.iter().map(|row| cost(&jobs[row.job], row.example));
        Self {
            num_tokens: costs().sum(),
            num_examples: rows.len(),
            longest: costs().max().unwrap_or_default(),
        }
    }
}

/// What an engine had no room for: its part reads that when the next group is met.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shortage(Arc<Mutex<Option<Lacked>>>);

impl Shortage {
    /// What a rank can take in its next group that could take `limits` in the last one, as far as it knew.
    pub(crate) fn lower(&self, limits: Limits, device: &Device) -> Limits {
        let Some(lacked) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return limits;
        };
        let lower = limits.after(lacked, Taste::of(device));
        tracing::warn!(?lacked, now = ?lower, "this rank's GPU had not the memory that was planned for it");
        lower
    }

    fn note(&self, lacked: Lacked) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(lacked);
    }
}

impl Limits {
    /// Where nothing was short yet.
    pub(super) fn planned(budget: usize, recompute: bool) -> Self {
        Self { budget, recompute, too_long: usize::MAX }
    }

    /// After there was no room for something: half of it at once; with layers computed again before products get too small to run at full
    /// speed; and in the end, without what it was.
    fn after(self, lacked: Lacked, taste: Taste) -> Self {
        let Lacked { num_tokens, num_examples, longest } = lacked;
        let half = num_tokens.min(self.budget) / 2;
        let can_be_cut = num_examples > 1 && num_tokens > LEAST_TOKENS;
        if can_be_cut && (self.recompute || half >= taste.comfortable) {
            return Self { budget: half.max(LEAST_TOKENS), ..self };
        }
        if !self.recompute {
            return Self { recompute: true, ..self };
        }
        Self { too_long: self.too_long.min(longest), ..self }
    }

    /// Ranks that share a model go through it in step, so that they must cut alike, and the smallest decides.
    pub(super) fn agreed(self, ranks: &Ranks) -> Result<Self> {
        let least = |tokens: usize| -i64::try_from(tokens).unwrap_or(i64::MAX);
        let own = [least(self.budget), i64::from(self.recompute), least(self.too_long)];
        let all = ranks::largest(ranks, &own)?;
        let tokens = |least: i64| if least == -i64::MAX { usize::MAX } else { least.unsigned_abs() as usize };
        Ok(Self { budget: tokens(all[0]), recompute: all[1] == 1, too_long: tokens(all[2]) })
    }
}

impl Engine {
    /// What the ranks have agreed on, and what this one may find out until its group has come to its end.
    pub(crate) fn limits(&self) -> (Limits, Shortage) {
        (self.limits, self.shortage.clone())
    }

    /// Whether memory that runs out on one rank is the end of its group: others stand in an exchange of the same pass.
    #[must_use]
    pub fn shares_model(&self) -> bool {
        self.ranks.tensor().size() > 1
    }

    /// The end of the group of ranks, of which this one has run out of GPU memory while it had a share in something: `what` says in what,
    /// and how to mend it. The next group goes through half as much at once.
    #[must_use]
    pub fn ends_for_memory(&self, what: String) -> Error {
        self.shortage.note(Lacked {
            num_tokens: self.limits.budget,
            num_examples: usize::MAX,
            longest: usize::MAX,
        });
        Error::RankMemory { rank: self.ranks.rank(), what }
    }

    pub(super) fn lacks(&self, error: &Error, lacked: Lacked) -> Error {
        self.shortage.note(lacked);
        Error::RankMemory { rank: self.ranks.rank(), what: with_the_mend(error) }
    }

    /// These rows without those of jobs of which one is known to have no room: such jobs are refused, by all ranks alike.
    pub(super) fn fitting<T>(
        &self,
        jobs: &[JobBatch<'_>],
        rows: &[Row],
        gathered: &mut [Gathered<T>],
    ) -> Vec<Row> {
        let too_long = self.limits.too_long;
        for row in rows {
            let num_tokens = cost(&jobs[row.job], row.example);
            if num_tokens >= too_long {
                gathered[row.job] = Err(no_room(row.example, num_tokens, too_long));
            }
        }
        rows.iter().filter(|row| gathered[row.job].is_ok()).copied().collect()
    }
}

/// What says that memory ran out, and what helps: also where it ran out for what ranks exchange.
fn with_the_mend(error: &Error) -> String {
    let what = error.to_string();
    match error {
        Error::Collective(_) | Error::Model(incipit_model::Error::Collective(_)) => {
            incipit_kernels::Error::GpuMemory { what }.to_string()
        }
        _ => what,
    }
}

fn no_room(example: usize, num_tokens: usize, too_long: usize) -> Refusal {
    let what = format!(
        "example {example} of the batch has {num_tokens} tokens with its prompt and its target, and for one of {too_long} the memory of a GPU \
         did not suffice, though it was alone and layers were computed again; pass a smaller --max-input-length, or share the model \
         between more GPUs with --tp"
    );
    Refusal { what, out_of_memory: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_had_no_room_is_halved_then_computed_again_then_halved_and_then_refused() {
        let planned = Limits::planned(20_000, false);
        let after = |limits: Limits, num_tokens, num_examples, longest| {
            limits.after(Lacked { num_tokens, num_examples, longest }, Taste::GPU)
        };
        // Half of what there was no room for, which may be less than what was planned.
        let halved = after(planned, 18_000, 40, 700);
        assert_eq!(halved, Limits { budget: 9000, ..planned });
        let again = after(after(halved, 9000, 20, 700), 4500, 10, 700);
        assert_eq!(again, Limits { budget: 4500, recompute: true, ..planned });
        let least =
            [4500, 2250, 1125, 562, 281].iter().fold(again, |limits, tokens| after(limits, *tokens, 3, 700));
        assert_eq!(least, Limits { budget: LEAST_TOKENS, recompute: true, ..planned });
        // Two small examples, and one that is alone.
        assert_eq!(after(least, 200, 2, 120), Limits { too_long: 120, ..least });
        assert_eq!(after(least, 700, 1, 700), Limits { too_long: 700, ..least });
        assert_eq!(after(planned, 30_000, 1, 30_000), Limits { recompute: true, ..planned });
    }

    #[test]
    fn memory_that_runs_out_for_what_ranks_exchange_is_told_with_what_helps() {
        let told = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let collective = incipit_collective::Error::from(candle_core::Error::Msg(told.to_owned()));
        let error = Error::from(incipit_model::Error::from(collective));
        assert!(error.is_of_gpu_memory() && error.is_of_group());
        let what = with_the_mend(&error);
        for part in ["CUDA_ERROR_OUT_OF_MEMORY", "--microbatch-tokens", "--tp"] {
            assert!(what.contains(part), "{what}");
        }
        let other = incipit_collective::Error::from(candle_core::Error::Msg("a broken cable".to_owned()));
        assert!(!Error::from(incipit_model::Error::from(other)).is_of_gpu_memory());
    }

    #[test]
    fn where_nobody_knows_what_had_no_room_the_budget_is_halved_down_to_a_floor() {
        let unknown = |budget| Lacked { num_tokens: budget, num_examples: usize::MAX, longest: usize::MAX };
        let mut limits = Limits { budget: 20_000, recompute: true, too_long: usize::MAX };
        for budget in [10_000, 5000, 2500, 1250, 625, 312, 256, 256] {
            limits = limits.after(unknown(limits.budget), Taste::GPU);
            assert_eq!(limits, Limits { budget, recompute: true, too_long: usize::MAX });
        }
    }
}
