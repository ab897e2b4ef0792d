//! Random numbers that are a function of what they are for.
//!
//! They are the bytes of BLAKE3's output, whose definition no update of a library changes; `kernels::rng`, which the
//! rest of the program uses, is not for `data` to know.

/// What is drawn; two draws for different things have nothing in common.
#[derive(Debug, Clone, Copy)]
pub(super) enum Draw {
    /// The order of files in an epoch.
    Files,
    /// The order of segments in a window, by its first.
    Window,
    /// An example, by its segment.
    Example,
}

/// A stream of random numbers.
pub(super) struct Random(blake3::OutputReader);

/// A hash that has taken in some numbers.
pub(super) fn hash(words: impl IntoIterator<Item = u64>) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    for word in words {
        hasher.update(&word.to_le_bytes());
    }
    hasher
}

impl Random {
    /// The stream of the `number`-th thing of its kind.
    pub(super) fn new(seed: u64, draw: Draw, number: u64) -> Self {
        Self(hash([seed, draw as u64, number]).finalize_xof())
    }

    /// Uniform in `0 .. n`, without bias (Lemire 2019); `n` is not 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        let threshold = n.wrapping_neg() % n;
        loop {
            let mut bytes = [0; 8];
            self.0.fill(&mut bytes);
            let product = u128::from(u64::from_le_bytes(bytes)) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as usize;
            }
        }
    }

    /// Puts items into a random order (Fisher and Yates).
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
