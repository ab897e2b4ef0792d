//! Generation: greedy, by beams, or sampled from the nucleus, with a cache of keys and values.

use std::collections::BTreeSet;

use candle_core::Tensor;
use incipit_kernels::rng::Philox;
use incipit_kernels::{Best, Segments, best};

use crate::batch::{Example, Microbatch};
use crate::beam::Beam;
use crate::decoder::{LayerCache, Step};
use crate::t5::{Encoded, T5};
use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens at most, `</s>` included.
    pub max_new_tokens: usize,
    /// Hypotheses kept an example; 1 is greedy.
    pub num_beams: usize,
    /// A finished hypothesis' score is its log-probability over its length to this power.
    pub length_penalty: f32,
    /// Draw from the smallest set of tokens that has this probability (Holtzman et al. 2020); none: take the best.
    pub top_p: Option<f32>,
    /// Logits are divided by it before drawing.
    pub temperature: f32,
    /// Of the drawing; with an example's key it decides what is drawn for that example.
    pub seed: u64,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 16, num_beams: 1, length_penalty: 1.0, top_p: None, temperature: 1.0, seed: 0 }
    }
}

/// What was generated for an example.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Token ids, without the start token and `</s>`.
    pub tokens: Vec<u32>,
    /// Sum of the tokens' log-probabilities, `</s>` included; with beams, over the length to the penalty's power.
    pub score: f32,
}

impl GenerateOptions {
    fn check(&self) -> Result<()> {
        let refuse = |what: &str| Err(Error::Options { what: what.to_owned() });
        if self.max_new_tokens == 0 || self.num_beams == 0 {
            return refuse("max_new_tokens and num_beams must be at least 1");
        }
        if self.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return refuse("top_p must be above 0 and at most 1");
        }
        if self.top_p.is_some() && self.num_beams > 1 {
            return refuse("top_p draws tokens and num_beams searches for the best: give one of them");
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return refuse("temperature must be above 0");
        }
        Ok(())
    }
}

impl T5 {
    /// Generates for every example; targets are not read.
    ///
    /// # Errors
    /// If the batch does not fit the model, or the options contradict each other.
    pub fn generate(&self, batch: &Microbatch<'_>, options: &GenerateOptions) -> Result<Vec<Generated>> {
        self.generate_after(&self.encoded(batch)?, batch, options)
    }

    /// As [`T5::generate`], for a batch that was encoded already.
    ///
    /// # Errors
    /// If the options contradict each other.
    pub fn generate_after(
        &self,
        encoded: &Encoded,
        batch: &Microbatch<'_>,
        options: &GenerateOptions,
    ) -> Result<Vec<Generated>> {
        options.check()?;
        if batch.examples.is_empty() {
            return Ok(Vec::new());
        }
        let start = [self.config().decoder_start_token_id];
        let spans = batch.decoder(&start).spans();
        let lengths: Vec<usize> = spans.iter().map(|span| span.map_or(0, |span| span.count)).collect();
        let mut generated = vec![None; lengths.len()];
        // A step reads rows of one place: those behind prompts of one length go together.
        for length in lengths.iter().copied().collect::<BTreeSet<_>>() {
            let group: Vec<usize> = (0..lengths.len()).filter(|e| lengths[*e] == length).collect();
            let examples: Vec<Example<'_>> = group.iter().map(|e| batch.examples[*e]).collect();
            let part = Microbatch { prompts: batch.prompts, examples: &examples };
            let written = self.generate_at(&encoded.of(&group)?, &part, length, options)?;
            group.into_iter().zip(written).for_each(|(e, written)| generated[e] = Some(written));
        }
        Ok(generated.into_iter().flatten().collect())
    }

    /// Generates for examples whose prompts in the decoder have `length` rows.
    fn generate_at(
        &self,
        encoded: &Encoded,
        batch: &Microbatch<'_>,
        length: usize,
        options: &GenerateOptions,
    ) -> Result<Vec<Generated>> {
        let mut decoding = Decoding::new(self, encoded, (batch, length), options)?;
        if length > 0 {
            decoding.read_prompts(batch, length)?;
        }
        for place in 0..options.max_new_tokens {
            decoding.step(place)?;
            if decoding.searches.are_done() {
                break;
            }
        }
        Ok(decoding.searches.finish())
    }
}

/// The state of a batch's decoding.
struct Decoding<'a> {
    model: &'a T5,
    options: &'a GenerateOptions,
    searches: Searches,
    caches: Vec<LayerCache>,
    memory: &'a Tensor,
    keys: &'a Segments,
    /// Rows before the start token.
    before: usize,
}

impl<'a> Decoding<'a> {
    fn new(
        model: &'a T5,
        encoded: &'a Encoded,
        (batch, length): (&Microbatch<'_>, usize),
        options: &'a GenerateOptions,
    ) -> Result<Self> {
        let eos = model.config().eos_token_id;
        let searches = if options.num_beams > 1 {
            Searches::Beams(batch.examples.iter().map(|_| Beam::new(eos, options)).collect())
        } else {
            Searches::Singles(batch.examples.iter().map(|e| Single::new(e.key, eos)).collect())
        };
        let absorbed = model.absorbs(length + options.max_new_tokens * options.num_beams);
        let caches = model.decoder.caches(&encoded.rows, absorbed)?;
        let (memory, keys) = (&encoded.rows, &encoded.segments);
        Ok(Self { model, options, searches, caches, memory, keys, before: 0 })
    }

    /// Reads what stands before the start token: each example's prompt of `length` rows.
    fn read_prompts(&mut self, batch: &Microbatch<'_>, length: usize) -> Result<()> {
        let x = self.model.prompts_in_decoder(batch)?;
        let queries = Segments::new(std::iter::repeat_n(length, batch.examples.len()));
        let dtype = self.model.dtype();
        let (memory, keys) = (self.memory, self.keys);
        let step = Step { queries: &queries, memory, keys, place: 0, count: length, dtype };
        self.model.decoder.step(self.model.config(), x, &mut self.caches, &step)?;
        self.before = length;
        Ok(())
    }

    /// Reads the newest token of every live hypothesis and chooses the next ones.
    fn step(&mut self, place: usize) -> Result<()> {
        let start = self.model.config().decoder_start_token_id;
        let newest = self.searches.newest(start);
        let x = self.model.embedded(&newest.concat())?;
        let queries = Segments::new(newest.iter().map(Vec::len));
        let (place_of_row, dtype) = (self.before + place, self.model.dtype());
        let (memory, keys) = (self.memory, self.keys);
        let step = Step { queries: &queries, memory, keys, place: place_of_row, count: 1, dtype };
        let rows = self.model.decoder.step(self.model.config(), x, &mut self.caches, &step)?;
        let logits = self.model.head(&rows)?;
        let parents = self.searches.choose(&logits, &queries, place, self.options)?;
        self.follow(&parents)
    }

    /// Makes hypothesis `i`'s cache the one of `parents[i]`.
    fn follow(&mut self, parents: &[u32]) -> Result<()> {
        let Some((k, _)) = self.caches.first().and_then(|cache| cache.own.as_ref()) else { return Ok(()) };
        let unchanged = parents.iter().enumerate().all(|(i, p)| i == *p as usize);
        // Where all have ended nothing is picked: CUDA launches no kernel without threads.
        if parents.is_empty() || unchanged && parents.len() == k.dims()[0] {
            return Ok(());
        }
        let index = Tensor::new(parents, k.device())?;
        for cache in &mut self.caches {
            if let Some((k, v)) = cache.own.take() {
                cache.own = Some((k.index_select(&index, 0)?, v.index_select(&index, 0)?));
            }
        }
        Ok(())
    }
}

/// The searches for all examples, one each.
enum Searches {
    Singles(Vec<Single>),
    Beams(Vec<Beam>),
}

impl Searches {
    fn are_done(&self) -> bool {
        match self {
            Self::Singles(all) => all.iter().all(|single| single.done),
            Self::Beams(all) => all.iter().all(Beam::is_done),
        }
    }

    /// The newest token of each live hypothesis, by example.
    fn newest(&self, start: u32) -> Vec<Vec<u32>> {
        match self {
            Self::Singles(all) => all.iter().map(|single| single.newest(start)).collect(),
            Self::Beams(all) => all.iter().map(|beam| beam.newest(start)).collect(),
        }
    }

    /// Chooses the next tokens by the `logits` `[n, V]` of the live hypotheses, which are `rows` by example; gives of each new hypothesis
    /// the row of its parent.
    fn choose(
        &mut self,
        logits: &Tensor,
        rows: &Segments,
        place: usize,
        options: &GenerateOptions,
    ) -> Result<Vec<u32>> {
        let mut parents = Vec::with_capacity(rows.total());
        match self {
            Self::Singles(all) => {
                let live: Vec<&mut Single> = all.iter_mut().filter(|single| !single.done).collect();
                let chosen = match options.top_p {
                    None => best(logits)?,
                    Some(top_p) => {
                        let logits = logits.to_vec2::<f32>()?;
                        let drawn = |(row, single): (&Vec<f32>, &&mut Single)| {
                            single.drawn(row, top_p, place, options)
                        };
                        logits.iter().zip(&live).map(drawn).collect()
                    }
                };
                for (row, (single, token)) in (0..).zip(live.into_iter().zip(chosen)) {
                    if single.goes_on_with(token) {
                        parents.push(row);
                    }
                }
            }
            Self::Beams(all) => {
                let logits = logits.to_vec2::<f32>()?;
                for (example, beam) in all.iter_mut().enumerate() {
                    let range = rows.range(example);
                    let chosen = beam.choose(&logits[range.clone()]);
                    parents.extend(chosen.into_iter().map(|parent| (range.start + parent) as u32));
                }
            }
        }
        Ok(parents)
    }

    fn finish(self) -> Vec<Generated> {
        match self {
            Self::Singles(all) => all.into_iter().map(Single::finish).collect(),
            Self::Beams(all) => all.into_iter().map(Beam::finish).collect(),
        }
    }
}

/// One hypothesis: the best token each time, or a drawn one.
struct Single {
    tokens: Vec<u32>,
    score: f32,
    done: bool,
    key: u64,
    eos: u32,
}

impl Single {
    fn new(key: u64, eos: u32) -> Self {
        Self { tokens: Vec::new(), score: 0.0, done: false, key, eos }
    }

    fn newest(&self, start: u32) -> Vec<u32> {
        if self.done { Vec::new() } else { vec![self.tokens.last().copied().unwrap_or(start)] }
    }

    fn drawn(&self, logits: &[f32], top_p: f32, place: usize, options: &GenerateOptions) -> Best {
        let mut random = Philox::new(options.seed, &[self.key, place as u64]);
        let token = draw(logits, top_p, options.temperature, random.uniform());
        Best { token: token as u32, log_probability: logits[token] - log_normaliser(logits) }
    }

    fn goes_on_with(&mut self, Best { token, log_probability }: Best) -> bool {
        self.score += log_probability;
        self.done = token == self.eos;
        if !self.done {
            self.tokens.push(token);
        }
        !self.done
    }

    fn finish(self) -> Generated {
        Generated { tokens: self.tokens, score: self.score }
    }
}

/// The token at which the cumulated probability of the nucleus, most probable first, passes `u` of it.
fn draw(logits: &[f32], top_p: f32, temperature: f32, u: f32) -> usize {
    let scaled: Vec<f32> = logits.iter().map(|x| x / temperature).collect();
    let shift = log_normaliser(&scaled);
    let mut order: Vec<(usize, f64)> =
        scaled.iter().map(|x| f64::from(x - shift).exp()).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut total = 0.0;
    let size = order.iter().position(|(_, p)| {
        total += p;
        total >= f64::from(top_p)
    });
    order.truncate(size.map_or(order.len(), |i| i + 1));
    let mut left = f64::from(u) * total;
    let found = order.iter().find(|(_, p)| {
        left -= p;
        left < 0.0
    });
    found.or(order.last()).map_or(0, |(token, _)| *token)
}

/// The logarithm of the sum of exponentials.
pub(crate) fn log_normaliser(logits: &[f32]) -> f32 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
    top + sum.ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nucleus_holds_the_fewest_tokens_that_reach_top_p() {
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
        let drawn = |top_p: f32| {
            (0..100).map(|i| draw(&logits, top_p, 1.0, (i as f32 + 0.5) / 100.0)).collect::<Vec<_>>()
        };
        assert!(drawn(0.4).iter().all(|t| *t == 0));
        assert_eq!(drawn(0.7).iter().max(), Some(&1));
        assert_eq!(drawn(1.0).iter().filter(|t| **t == 0).count(), 50);
    }

    #[test]
    fn a_low_temperature_draws_the_best() {
        let logits = [1.0, 1.1, 0.9];
        assert!((0..50).all(|i| draw(&logits, 1.0, 0.001, i as f32 / 50.0) == 1));
    }
}
