//! How much of a segment is noise, and where.

use super::random::Random;

/// What a segment's mask consists of: as many spans that stay as spans of noise, in turn, one that stays first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Noise {
    /// Tokens that stay.
    pub(super) plain: usize,
    /// Tokens of noise.
    pub(super) noise: usize,
    /// Spans of each of the two.
    pub(super) spans: usize,
}

impl Noise {
    /// The noise of a segment of at least 2 tokens, as T5's `random_spans_noise_mask` counts it: in single precision, halves
    /// to the even number, and at least one token of each kind.
    pub(super) fn of(segment: usize, density: f64, mean_span: f64) -> Self {
        let noise = (segment as f32 * density as f32).round_ties_even() as usize;
        let noise = noise.clamp(1, segment - 1);
        let spans = (noise as f32 / mean_span as f32).round_ties_even() as usize;
        Self { plain: segment - noise, noise, spans: spans.max(1) }
    }

    /// Tokens of the input: what stays, a sentinel a span, `</s>`.
    pub(super) fn input_length(self) -> usize {
        self.plain + self.spans + 1
    }

    /// Tokens of the target: the noise, a sentinel a span, `</s>`.
    pub(super) fn target_length(self) -> usize {
        self.noise + self.spans + 1
    }

    /// A mask in which noise is true; all that there are of these numbers are equally likely. It needs no fewer tokens of each
    /// kind than spans.
    pub(super) fn mask(self, random: &mut Random) -> Vec<bool> {
        let noise = parts(self.noise, self.spans, random);
        let plain = parts(self.plain, self.spans, random);
        let spans = plain.into_iter().zip(noise);
        spans.flat_map(|(plain, noise)| (0..plain + noise).map(move |i| i >= plain)).collect()
    }
}

/// Lengths, each at least 1, of `parts` parts of `items` items.
fn parts(items: usize, parts: usize, random: &mut Random) -> Vec<usize> {
    let mut starts = vec![false; items - 1];
    starts[..parts - 1].fill(true);
    random.shuffle(&mut starts);
    let mut lengths = vec![1];
    for start in starts {
        match lengths.last_mut() {
            Some(last) if !start => *last += 1,
            _ => lengths.push(1),
        }
    }
    lengths
}

/// Tokens of text that fill an input of `input` tokens, at least 3, after corruption: T5's `random_spans_helper`. Where T5's
/// masks have other numbers than that counts with, which is in double precision and without a least one, and the
/// input would be too long, fewer.
pub(super) fn segment_length(input: usize, density: f64, mean_span: f64) -> usize {
    let encoded = |tokens: usize| {
        let noise = (tokens as f64 * density).round_ties_even();
        let spans = (noise / mean_span).round_ties_even() as usize;
        (tokens - noise as usize + spans + 1, noise as usize + spans + 1)
    };
    let mut tokens = input - 1;
    while encoded(tokens + 1).0 <= input {
        tokens += 1;
    }
    let (inputs, targets) = encoded(tokens);
    if density == 0.5 && targets > inputs {
        tokens -= 1; // T5 has it so, for targets no longer than inputs
    }
    while Noise::of(tokens, density, mean_span).input_length() > input {
        tokens -= 1;
    }
    tokens
}
