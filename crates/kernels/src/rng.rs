//! Counter-based random numbers: the n-th number of a stream is a function of (seed, stream, n) and of nothing else, so
//! that results do not depend on who draws first.

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    counter: u64,
    stream: u64,
    block: [u32; 4],
    used: usize,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// `N` blocks of four random words: word `w` of block `n` is `result[w][n]`. Written so that it becomes vector code.
#[inline(always)]
fn blocks<const N: usize>(counters: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    let [mut a, mut b, mut c, mut d] = counters;
    for _ in 0..10 {
        for (((a, b), c), d) in a.iter_mut().zip(&mut b).zip(&mut c).zip(&mut d) {
            let p0 = u64::from(MULTIPLIERS[0]) * u64::from(*a);
            let p1 = u64::from(MULTIPLIERS[1]) * u64::from(*c);
            (*a, *b) = ((p1 >> 32) as u32 ^ *b ^ key[0], p1 as u32);
            (*c, *d) = ((p0 >> 32) as u32 ^ *d ^ key[1], p0 as u32);
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    [a, b, c, d]
}

/// One block of four random words.
#[inline(always)]
fn block(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    blocks(counter.map(|word| [word]), key).map(|[word]| word)
}

/// The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection that spreads every bit.
#[inline(always)]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl Philox {
    /// The stream named by `stream` (step, example, site, ...) of the generator seeded by `seed`, at its beginning.
    #[must_use]
    pub fn new(seed: u64, stream: &[u64]) -> Self {
        let stream = stream
            .iter()
            .fold(0x9E37_79B9_7F4A_7C15, |h, s| mix(h ^ mix(s.wrapping_add(0x9E37_79B9_7F4A_7C15))));
        Self { key: [seed as u32, (seed >> 32) as u32], counter: 0, stream, block: [0; 4], used: 4 }
    }

    /// Key and stream, as kernels on a GPU get them.
    pub(crate) fn words(&self) -> [u32; 4] {
        [self.key[0], self.key[1], self.stream as u32, (self.stream >> 32) as u32]
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = self.block_at(self.counter);
            self.counter += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// The `n`-th block of four words of the stream, wherever the stream stands.
    #[inline(always)]
    #[must_use]
    pub fn block_at(&self, n: u64) -> [u32; 4] {
        block([n as u32, (n >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32], self.key)
    }

    /// `N` blocks from the `first`-th on: word `w` of block `first + n` is `result[w][n]`.
    #[inline(always)]
    pub(crate) fn blocks_at<const N: usize>(&self, first: u64) -> [[u32; N]; 4] {
        let counter = |n: usize| first + n as u64;
        let low = std::array::from_fn(|n| counter(n) as u32);
        let high = std::array::from_fn(|n| (counter(n) >> 32) as u32);
        blocks([low, high, [self.stream as u32; N], [(self.stream >> 32) as u32; N]], self.key)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `0 .. n`, without bias (Lemire 2019).
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a number below 0 was asked for");
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box and Muller 1958), computed in f64 so that its tails are right.
    pub fn normal(&mut self) -> f32 {
        let u = (f64::from(self.next_u32()) + 1.0) / 4_294_967_297.0;
        let v = f64::from(self.next_u32()) / 4_294_967_296.0;
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    /// A random order of `0 .. n` (Fisher and Yates).
    ///
    /// # Panics
    /// If `n` does not fit in a `u32`.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..u32::try_from(n).expect("fewer than 2^32 things")).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the authors' Random123 library, file `kat_vectors`.
    #[test]
    fn philox_gives_the_published_blocks() {
        assert_eq!(block([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(block([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn blocks_made_together_are_those_made_alone() {
        let g = Philox::new(3, &[5]);
        let first = u64::from(u32::MAX) - 2; // across the carry into the upper word
        let together = g.blocks_at::<5>(first);
        for n in 0..5 {
            assert_eq!(together.map(|word| word[n]), g.block_at(first + n as u64));
        }
    }

    #[test]
    fn streams_differ_and_repeat() {
        let draw = |stream: &[u64]| {
            let mut g = Philox::new(7, stream);
            (0..8).map(|_| g.next_u32()).collect::<Vec<_>>()
        };
        assert_eq!(draw(&[1, 2]), draw(&[1, 2]));
        assert_ne!(draw(&[1, 2]), draw(&[2, 1]));
        assert_ne!(draw(&[1]), draw(&[1, 0]));
    }

    #[test]
    fn a_permutation_holds_each_number_once() {
        let mut order = Philox::new(0, &[3]).permutation(1000);
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, x)| i == *x as usize));
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let mut g = Philox::new(1, &[]);
        let x: Vec<f64> = (0..100_000).map(|_| f64::from(g.normal())).collect();
        let mean = x.iter().sum::<f64>() / 1e5;
        let variance = x.iter().map(|v| v * v).sum::<f64>() / 1e5 - mean * mean;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
