//! Beam search for one example, with transformers' rules (`early_stopping=False`): hypotheses that end are set aside with
//! their length-normalised score, and the search is over when no running one can beat the worst of them.

use crate::generate::{GenerateOptions, Generated, log_normaliser};

/// The hypotheses of one example.
pub(crate) struct Beam {
    eos: u32,
    width: usize,
    length_penalty: f32,
    max_new_tokens: usize,
    running: Vec<Hypothesis>,
    /// Best first.
    finished: Vec<Hypothesis>,
    done: bool,
}

#[derive(Clone)]
struct Hypothesis {
    tokens: Vec<u32>,
    /// Sum of log-probabilities; of a finished one, over its length to the penalty's power.
    score: f32,
}

struct Candidate {
    parent: usize,
    token: u32,
    score: f32,
}

impl Beam {
    pub(crate) fn new(eos: u32, options: &GenerateOptions) -> Self {
        Self {
            eos,
            width: options.num_beams,
            length_penalty: options.length_penalty,
            max_new_tokens: options.max_new_tokens,
            running: vec![Hypothesis { tokens: Vec::new(), score: 0.0 }],
            finished: Vec::new(),
            done: false,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    pub(crate) fn newest(&self, start: u32) -> Vec<u32> {
        if self.done {
            return Vec::new();
        }
        self.running.iter().map(|h| h.tokens.last().copied().unwrap_or(start)).collect()
    }

    /// Takes the logits of each running hypothesis; returns the parents of the new ones.
    pub(crate) fn choose(&mut self, logits: &[Vec<f32>]) -> Vec<usize> {
        if self.done {
            return Vec::new();
        }
        let length = self.running[0].tokens.len() + 1;
        let divisor = (length as f32).powf(self.length_penalty);
        let mut next = Vec::with_capacity(self.width);
        let mut parents = Vec::with_capacity(self.width);
        for (rank, candidate) in self.candidates(logits).into_iter().enumerate() {
            let ends = candidate.token == self.eos;
            let mut tokens = self.running[candidate.parent].tokens.clone();
            if !ends {
                tokens.push(candidate.token);
            }
            if ends || length == self.max_new_tokens {
                // Candidates beyond the beam's width are there only to go on with.
                if rank < self.width {
                    self.finished.push(Hypothesis { tokens, score: candidate.score / divisor });
                }
            } else if next.len() < self.width {
                next.push(Hypothesis { tokens, score: candidate.score });
                parents.push(candidate.parent);
            }
        }
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(self.width);
        let worst = self.finished.get(self.width - 1).map_or(f32::NEG_INFINITY, |h| h.score);
        self.done = next.first().is_none_or(|best| best.score / divisor <= worst);
        self.running = next;
        if self.done { Vec::new() } else { parents }
    }

    /// The best `2 * width` continuations, best first.
    fn candidates(&self, logits: &[Vec<f32>]) -> Vec<Candidate> {
        let mut all = Vec::new();
        for (parent, (row, hypothesis)) in logits.iter().zip(&self.running).enumerate() {
            let shift = log_normaliser(row);
            let score = |x: f32| hypothesis.score + (x - shift);
            all.extend(row.iter().enumerate().map(|(t, x)| Candidate {
                parent,
                token: t as u32,
                score: score(*x),
            }));
        }
        let better = |a: &Candidate, b: &Candidate| {
            b.score.total_cmp(&a.score).then(a.parent.cmp(&b.parent)).then(a.token.cmp(&b.token))
        };
        let count = (2 * self.width).min(all.len());
        if count < all.len() {
            all.select_nth_unstable_by(count, better);
            all.truncate(count);
        }
        all.sort_by(better);
        all
    }

    pub(crate) fn finish(self) -> Generated {
        let best = self.finished.into_iter().chain(self.running).next();
        best.map_or(Generated { tokens: Vec::new(), score: 0.0 }, |h| Generated {
            tokens: h.tokens,
            score: h.score,
        })
    }
}
