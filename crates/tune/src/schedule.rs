//! The learning rate at each step.

use crate::choice::choices;
use std::f64::consts::PI;

choices! {
    /// How the learning rate goes on after the warm-up.
    Schedule, "schedule" {
        /// It stays.
        Constant => "constant",
        /// It falls in a straight line, to reach 0 one step after the last.
        Linear => "linear",
        /// It falls along half a cosine, to reach 0 one step after the last.
        Cosine => "cosine",
    }
}

impl Schedule {
    /// The learning rate of step `step` (0 is the first) of `total_steps`, where `base` is the rate asked
    /// for.
    ///
    /// The first `warmup_steps` steps climb in a straight line from `base / warmup_steps` to `base`.
    /// (transformers starts its warm-up at 0, a step that does nothing.) From step `total_steps` on, a
    /// falling rate is 0.
    #[must_use]
    pub fn lr(self, base: f32, step: u64, total_steps: u64, warmup_steps: u64) -> f32 {
        if step < warmup_steps {
            return (f64::from(base) * ((step + 1) as f64 / warmup_steps as f64)) as f32;
        }
        let falling = total_steps.saturating_sub(warmup_steps).max(1);
        let done = ((step - warmup_steps) as f64 / falling as f64).min(1.0);
        let factor = match self {
            Self::Constant => return base,
            Self::Linear => 1.0 - done,
            Self::Cosine => 0.5 * (1.0 + (PI * done).cos()),
        };
        (f64::from(base) * factor) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_without_warm_up_is_the_rate_asked_for() {
        for step in [0, 1, 29_999, 50_000] {
            assert_eq!(Schedule::Constant.lr(0.3, step, 30_000, 0), 0.3);
        }
    }

    #[test]
    fn warm_up_climbs_to_the_rate_asked_for_and_its_first_step_is_not_0() {
        let lr: Vec<f32> = (0..5).map(|step| Schedule::Constant.lr(1.0, step, 100, 4)).collect();
        assert_eq!(lr, [0.25, 0.5, 0.75, 1.0, 1.0]);
    }

    #[test]
    fn linear_falls_by_equal_parts_to_0_after_the_last_step() {
        let lr: Vec<f32> = (0..6).map(|step| Schedule::Linear.lr(1.0, step, 6, 2)).collect();
        assert_eq!(lr, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(Schedule::Linear.lr(1.0, 6, 6, 2), 0.0);
        assert_eq!(Schedule::Linear.lr(1.0, 600, 6, 2), 0.0);
    }

    #[test]
    fn cosine_passes_the_half_in_the_middle() {
        assert_eq!(Schedule::Cosine.lr(0.3, 0, 10, 0), 0.3);
        assert!((Schedule::Cosine.lr(0.3, 5, 10, 0) - 0.15).abs() < 1e-7);
        assert!(Schedule::Cosine.lr(0.3, 10, 10, 0) < 1e-8);
    }

    #[test]
    fn a_warm_up_longer_than_the_run_only_climbs() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_eq!(schedule.lr(1.0, 9, 10, 20), 0.5);
        }
    }

    #[test]
    fn names_are_read_back_and_others_are_refused_with_the_choices() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_eq!(schedule.to_string().parse::<Schedule>().unwrap(), schedule);
        }
        let error = "step".parse::<Schedule>().unwrap_err().to_string();
        assert!(error.contains("choose one of constant, linear, cosine"), "{error}");
    }
}
