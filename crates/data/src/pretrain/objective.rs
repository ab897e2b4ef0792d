//! What is to be learnt from a segment of text.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::noise::{Noise, segment_length};
use super::random::Random;
use super::sentinels::Sentinels;
use super::{PretrainError, PretrainOptions};
use crate::error::{Error, Result};

/// Shorter inputs have no room for two tokens of text, a sentinel and `</s>`.
const LEAST_INPUT: usize = 3;
const DENSITIES: RangeInclusive<f64> = 0.001..=0.9;
const SPANS: RangeInclusive<f64> = 1.0..=1000.0;

/// How a segment of text becomes an input and a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// T5's own (Raffel et al. 2020, section 3.3.4): spans are taken out, a sentinel in the place of each; the target is the
    /// spans, each after its sentinel.
    #[default]
    SpanCorruption,
    /// Raffel et al.'s prefix language model, to which Lester et al. (2021) adapt a T5 before prompt tuning: the segment is
    /// cut in two at a random place, every one equally likely; the first part is the input, the rest the target.
    PrefixLm,
}

impl Objective {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::SpanCorruption, Self::PrefixLm];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::SpanCorruption => "span-corruption",
            Self::PrefixLm => "prefix-lm",
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Numbers of tokens that follow from the options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Text that makes up an example.
    pub segment: usize,
    /// The input with its `</s>`: of span corruption the same for every example, of the prefix objective the longest.
    pub input: usize,
    /// The target with its `</s>`, likewise.
    pub target: usize,
}

impl PretrainOptions {
    /// The longest segments whose inputs fit.
    ///
    /// # Errors
    /// A length, a noise density or a mean span length that is out of its range, and targets longer than
    /// `target_length`.
    pub fn lengths(&self) -> Result<Lengths> {
        let input = self.input_length;
        if input < LEAST_INPUT {
            return Err(Error::LengthLimit { side: "input", max: input, least: LEAST_INPUT });
        }
        let lengths = match self.objective {
            Objective::SpanCorruption => {
                in_range("noise density", self.noise_density, DENSITIES)?;
                in_range("mean span length", self.mean_span_length, SPANS)?;
                let segment = segment_length(input, self.noise_density, self.mean_span_length);
                let noise = self.noise(segment);
                Lengths { segment, input: noise.input_length(), target: noise.target_length() }
            }
            // As T5's split_tokens_to_inputs_length; either part has at least one token.
            Objective::PrefixLm => Lengths { segment: input - 1, input: input - 1, target: input - 1 },
        };
        if lengths.target > self.target_length {
            let (objective, needed, max) = (self.objective.name(), lengths.target, self.target_length);
            return Err(PretrainError::ShortTarget { objective, input, needed, max }.into());
        }
        Ok(lengths)
    }

    fn noise(&self, segment: usize) -> Noise {
        Noise::of(segment, self.noise_density, self.mean_span_length)
    }
}

fn in_range(what: &'static str, value: f64, range: RangeInclusive<f64>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(PretrainError::OutOfRange { what, value, least: *range.start(), most: *range.end() }.into())
}

/// An objective, ready for segments of one length.
pub(super) enum Rule {
    Spans { noise: Noise, sentinels: Sentinels },
    Prefix { segment: usize },
}

impl Rule {
    pub(super) fn new(options: &PretrainOptions, segment: usize, tokenizer: &Tokenizer) -> Result<Self> {
        if options.objective == Objective::PrefixLm {
            return Ok(Self::Prefix { segment });
        }
        let (noise, sentinels) = (options.noise(segment), Sentinels::of(tokenizer)?);
        for (most, of) in [(sentinels.ids().len(), "sentinels"), (noise.plain, "tokens between them")] {
            if noise.spans > most {
                return Err(PretrainError::TooManySpans { segment, spans: noise.spans, most, of }.into());
            }
        }
        Ok(Self::Spans { noise, sentinels })
    }

    /// The ids that it puts in besides those of the text.
    pub(super) fn sentinel_ids(&self) -> &[u32] {
        match self {
            Self::Spans { noise, sentinels } => &sentinels.ids()[..noise.spans],
            Self::Prefix { .. } => &[],
        }
    }

    /// A segment's input and target, without `</s>`.
    pub(super) fn apply(&self, segment: &[u32], random: &mut Random) -> (Vec<u32>, Vec<u32>) {
        match self {
            Self::Spans { noise, sentinels } => {
                let mask = noise.mask(random);
                (sentinels.replace(segment, &mask, true), sentinels.replace(segment, &mask, false))
            }
            Self::Prefix { segment: length } => {
                let (prefix, rest) = segment.split_at(1 + random.below(length - 1));
                (prefix.to_vec(), rest.to_vec())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;
    use tokenizers::models::wordlevel::WordLevel;

    use super::super::random::Draw;
    use super::*;

    /// What T5's preprocessors make, by `scripts/goldens/tasks/pretrain.py`.
    fn goldens(key: &str) -> Vec<Value> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/pretrain.json");
        let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        all[key].as_array().unwrap().clone()
    }

    fn ids<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn number(value: &Value) -> usize {
        value.as_u64().unwrap() as usize
    }

    /// A tokenizer of the goldens' vocabulary: 1,000 ids, the last 100 of them sentinels.
    fn tokenizer() -> Tokenizer {
        let sentinels = (0..100).map(|n| (format!("<extra_id_{n}>"), 999 - n));
        let words = (3..900).map(|id| (format!("w{id}"), id));
        let special = [("<pad>", 0), ("</s>", 1), ("<unk>", 2)].map(|(word, id)| (word.to_owned(), id));
        let vocabulary = sentinels.chain(words).chain(special).collect();
        let model = WordLevel::builder().vocab(vocabulary).unk_token("<unk>".into()).build();
        Tokenizer::new(model.unwrap())
    }

    fn options(objective: Objective, input: usize, density: f64, mean: f64) -> PretrainOptions {
        PretrainOptions {
            objective,
            input_length: input,
            target_length: usize::MAX,
            noise_density: density,
            mean_span_length: mean,
            ..PretrainOptions::default()
        }
    }

    #[test]
    fn segments_and_targets_are_as_long_as_t5s() {
        let goldens = goldens("lengths");
        assert!(goldens.len() > 100, "{}", goldens.len());
        for case in goldens {
            let (density, mean) = (case["density"].as_f64().unwrap(), case["mean"].as_f64().unwrap());
            let options = options(Objective::SpanCorruption, number(&case["inputs"]), density, mean);
            let lengths = options.lengths().unwrap();
            assert_eq!(
                (lengths.segment, lengths.target),
                (number(&case["tokens"]), number(&case["targets"])),
                "{case}"
            );
        }
    }

    #[test]
    fn no_input_is_too_long_whatever_the_options() {
        for density in [0.001, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9] {
            for mean in [1.0, 1.5, 3.0, 3.3, 8.0, 32.0, 1000.0] {
                for input in 3..300 {
                    let lengths = options(Objective::SpanCorruption, input, density, mean).lengths().unwrap();
                    assert!(
                        lengths.segment >= 2 && lengths.input <= input,
                        "{density} {mean} {input}: {lengths:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn masks_have_as_many_tokens_and_spans_of_noise_as_t5s() {
        let count = |mask: &[bool]| mask.iter().filter(|&&noise| noise).count();
        let spans = |mask: &[bool]| mask.windows(2).filter(|pair| !pair[0] && pair[1]).count();
        for case in goldens("noise") {
            let (density, mean) = (case["density"].as_f64().unwrap(), case["mean"].as_f64().unwrap());
            let columns = ["lengths", "noise", "spans"].map(|key| ids::<usize>(&case[key]));
            for (i, &length) in columns[0].iter().enumerate() {
                let mask =
                    Noise::of(length, density, mean).mask(&mut Random::new(5, Draw::Example, i as u64));
                assert_eq!(mask.len(), length);
                assert_eq!(
                    (count(&mask), spans(&mask)),
                    (columns[1][i], columns[2][i]),
                    "{density} {mean} {length}"
                );
                assert!(!mask[0] && mask[length - 1], "a mask begins with what stays and ends with noise");
            }
        }
    }

    #[test]
    fn given_a_mask_inputs_and_targets_equal_t5s() {
        let sentinels = Sentinels::of(&tokenizer()).unwrap();
        let goldens = goldens("examples");
        assert!(goldens.iter().any(|case| case["mask"].as_str().unwrap().starts_with('1')));
        for case in goldens {
            let tokens: Vec<u32> = ids(&case["tokens"]);
            let mask: Vec<bool> = case["mask"].as_str().unwrap().chars().map(|c| c == '1').collect();
            assert_eq!(sentinels.replace(&tokens, &mask, true), ids::<u32>(&case["inputs"]), "{case}");
            assert_eq!(sentinels.replace(&tokens, &mask, false), ids::<u32>(&case["targets"]), "{case}");
        }
    }

    #[test]
    fn a_prefix_and_its_rest_are_one_of_t5s_and_each_comes_up() {
        let rule = Rule::Prefix { segment: 5 };
        let mut expected: Vec<(Vec<u32>, Vec<u32>)> =
            goldens("prefixes").iter().map(|case| (ids(&case["inputs"]), ids(&case["targets"]))).collect();
        let draw = |n| rule.apply(&[12, 1, 15, 3, 9], &mut Random::new(1, Draw::Example, n));
        let mut drawn: Vec<(Vec<u32>, Vec<u32>)> = (0..100).map(draw).collect();
        drawn.sort();
        drawn.dedup();
        expected.sort();
        assert_eq!(drawn, expected);
        for case in goldens("ranges") {
            let length = number(&case["length"]);
            assert_eq!((number(&case["shortest"]), number(&case["longest"])), (1, length - 1), "{case}");
        }
    }

    #[test]
    fn every_mask_is_as_likely_as_the_others() {
        // Of 7 tokens, 3 of noise in 2 spans: 2 ways to part the noise, 3 to part the rest.
        let noise = Noise { plain: 4, noise: 3, spans: 2 };
        let mut counts = std::collections::BTreeMap::new();
        for n in 0..6000 {
            *counts.entry(noise.mask(&mut Random::new(3, Draw::Example, n))).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // Five standard deviations of a count are 144.
        assert!(counts.values().all(|count| (856..=1144).contains(count)), "{counts:?}");
    }

    #[test]
    fn an_example_is_a_function_of_seed_and_segment() {
        let noise = Noise::of(100, 0.15, 3.0);
        let mask = |seed, number| noise.mask(&mut Random::new(seed, Draw::Example, number));
        assert_eq!(mask(1, 2), mask(1, 2));
        assert_ne!(mask(1, 2), mask(1, 3));
        assert_ne!(mask(1, 2), mask(2, 2));
    }

    #[test]
    fn more_spans_than_sentinels_or_tokens_between_them_are_refused() {
        let refusal = |input, density, mean| {
            let options = options(Objective::SpanCorruption, input, density, mean);
            let segment = options.lengths().unwrap().segment;
            Rule::new(&options, segment, &tokenizer()).err().map(|error| error.to_string())
        };
        assert_eq!(refusal(512, 0.15, 3.0), None);
        let many = refusal(4096, 0.15, 3.0).unwrap();
        assert!(many.contains("227 spans") && many.contains("100 sentinels"), "{many}");
        let dense = refusal(40, 0.9, 1.0).unwrap();
        assert!(dense.contains("tokens between them"), "{dense}");
    }

    #[test]
    fn options_out_of_range_are_refused_with_the_range() {
        for (options, words) in [
            (options(Objective::SpanCorruption, 2, 0.15, 3.0), "at least 3"),
            (options(Objective::PrefixLm, 0, 0.15, 3.0), "at least 3"),
            (options(Objective::SpanCorruption, 64, 0.0, 3.0), "noise density of 0 is not"),
            (options(Objective::SpanCorruption, 64, f64::NAN, 3.0), "noise density of NaN is not"),
            (options(Objective::SpanCorruption, 64, 1.0, 3.0), "0.001 to 0.9"),
            (options(Objective::SpanCorruption, 64, 0.15, 0.5), "mean span length of 0.5 is not"),
            (PretrainOptions { target_length: 113, ..PretrainOptions::default() }, "114 tokens"),
            (PretrainOptions { objective: Objective::PrefixLm, ..PretrainOptions::default() }, "511 tokens"),
        ] {
            let message = options.lengths().unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
