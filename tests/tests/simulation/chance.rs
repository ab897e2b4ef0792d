//! Chance that is the same every time, and numbers that stand for what is computed.

/// Numbers by splitmix64 (Steele, Lea and Flood, 2014).
#[derive(Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed, 0x0005_1517))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        scramble(self.0)
    }

    /// From 0 to `bound`, without it.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// From `low` to `high`, without that.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of some.
    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let index = self.below(of.len() as u64) as usize;
        of.get(index).copied()
    }
}

fn scramble(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Both numbers, stirred.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    scramble(scramble(a.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ b.wrapping_mul(0xd6e8_feb8_6659_fd93))
}

/// What a job's prompt is before its first step.
pub(crate) fn first_prompt(seed: u64) -> u64 {
    mix(seed, u64::MAX)
}

/// What a step, counted from 0, makes of a prompt.
pub(crate) fn next_prompt(prompt: u64, seed: u64, step: u64) -> u64 {
    mix(prompt, mix(seed, step))
}

/// The loss that is measured where a step has led.
pub(crate) fn loss(prompt: u64) -> f64 {
    (prompt % 1_000_000) as f64
}

/// The name of the blob that holds a prompt.
pub(crate) fn digest(prompt: u64) -> String {
    (0..4).map(|part| format!("{:016x}", mix(prompt, part))).collect()
}
