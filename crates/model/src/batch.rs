//! Microbatches: what goes through the backbone at once.

use std::ops::Range;

use candle_core::Tensor;
use incipit_kernels::{Rows, Segments};

use crate::config::Config;
use crate::prompt::{Placement, SoftPrompt};
use crate::{Error, Result};

/// One example.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    /// Which of the microbatch's prompts stands by its input; none for the bare model.
    pub prompt: Option<usize>,
    /// Token ids of the input, `</s>` included.
    pub input: &'a [u32],
    /// Token ids of the target, `</s>` included; not read when generating.
    pub target: &'a [u32],
    /// Key of the example's random numbers; read only where something is random.
    pub key: u64,
}

/// Examples of one or many prompts, laid end to end: nothing is padded.
#[derive(Clone, Copy, Debug)]
pub struct Microbatch<'a> {
    /// Each with a `P` and a place of its own.
    pub prompts: &'a [SoftPrompt],
    /// In any order.
    pub examples: &'a [Example<'a>],
}

/// The rows of an example's prompt in a stack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Which of the microbatch's prompts.
    pub(crate) prompt: usize,
    /// The first row, among those of all examples.
    pub(crate) first: usize,
    /// `P`.
    pub(crate) count: usize,
}

impl Span {
    pub(crate) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.count
    }
}

/// A run of rows.
#[derive(Clone, Copy)]
enum Part<'a> {
    Prompt { index: usize, length: usize },
    Tokens(&'a [u32]),
}

impl Part<'_> {
    fn len(self) -> usize {
        match self {
            Part::Prompt { length, .. } => length,
            Part::Tokens(ids) => ids.len(),
        }
    }
}

/// What a stack reads: the runs of each example, which lie end to end.
pub(crate) struct Layout<'a> {
    examples: Vec<Vec<Part<'a>>>,
}

impl<'a> Layout<'a> {
    /// The rows by example.
    pub(crate) fn rows(&self) -> Segments {
        Segments::new(self.examples.iter().map(|parts| parts.iter().map(|part| part.len()).sum()))
    }

    /// All runs. Of ranks whose embeddings are added up, one has `with_prompts`.
    pub(crate) fn runs(&self, with_prompts: bool) -> Vec<Rows<'a>> {
        let run = |part: &Part<'a>| match *part {
            Part::Prompt { index, .. } if with_prompts => Rows::Prompt(index),
            Part::Prompt { length, .. } => Rows::Zeros(length),
            Part::Tokens(ids) => Rows::Tokens(ids),
        };
        self.examples.iter().flatten().map(run).collect()
    }

    /// The token of each row; a prompt's row has none.
    pub(crate) fn tokens(&self) -> Vec<Option<u32>> {
        let tokens = |part: &Part<'a>| match *part {
            Part::Prompt { length, .. } => vec![None; length],
            Part::Tokens(ids) => ids.iter().copied().map(Some).collect(),
        };
        self.examples.iter().flatten().flat_map(tokens).collect()
    }

    /// Where each example's prompt is, if it has one here.
    pub(crate) fn spans(&self) -> Vec<Option<Span>> {
        let mut next = 0;
        let span = |parts: &Vec<Part<'a>>| {
            let mut span = None;
            for part in parts {
                if let Part::Prompt { index, length } = *part {
                    span = Some(Span { prompt: index, first: next, count: length });
                }
                next += part.len();
            }
            span
        };
        self.examples.iter().map(span).collect()
    }

    /// The rows of each example that are no prompt's, where they follow each other: in the decoder.
    pub(crate) fn token_ranges(&self) -> Vec<Range<usize>> {
        let rows = self.rows();
        let range = |(e, span): (usize, Option<Span>)| {
            let all = rows.range(e);
            all.start + span.map_or(0, |span| span.count)..all.end
        };
        self.spans().into_iter().enumerate().map(range).collect()
    }
}

impl<'a> Microbatch<'a> {
    pub(crate) fn check(&self, config: &Config, with_targets: bool) -> Result<()> {
        self.check_prompts(config)?;
        for (example, e) in self.examples.iter().enumerate() {
            let refuse = |what: String| Err(Error::Example { example, what });
            if e.prompt.is_some_and(|p| p >= self.prompts.len()) {
                return refuse(format!("there is no prompt {:?} among {}", e.prompt, self.prompts.len()));
            }
            let in_decoder = self.prompt_of(e).is_some_and(|p| p.placement == Placement::Decoder);
            if e.input.is_empty() && (in_decoder || self.prompt_of(e).map_or(0, SoftPrompt::length) == 0) {
                return refuse("the input is empty".into());
            }
            if with_targets && e.target.is_empty() {
                return refuse("the target is empty".into());
            }
            let outside = e.input.iter().chain(e.target).find(|id| **id as usize >= config.vocab_size);
            if let Some(id) = outside {
                let size = config.vocab_size;
                return refuse(format!("token {id} is outside of the model's vocabulary of {size}"));
            }
        }
        Ok(())
    }

    /// Rows for layers must be for all of the encoder's.
    fn check_prompts(&self, config: &Config) -> Result<()> {
        let refuse = |what: String| Err(Error::Options { what });
        for prompt in self.prompts.iter().filter(|prompt| prompt.num_layers != 1) {
            let (layers, all) = (prompt.num_layers, config.num_layers);
            let rows = prompt.rows.dims().first().copied().unwrap_or(0);
            if prompt.placement == Placement::Decoder {
                return refuse("a prompt in the decoder has rows for its first layer alone".into());
            }
            if layers != all || rows % layers != 0 {
                return refuse(format!(
                    "a prompt of {rows} rows for {layers} layers does not fit an encoder of {all} layers"
                ));
            }
        }
        Ok(())
    }

    fn prompt_of(&self, e: &Example<'_>) -> Option<&'a SoftPrompt> {
        e.prompt.map(|prompt| &self.prompts[prompt])
    }

    /// The rows `[P, D]` of each prompt that are embedded.
    pub(crate) fn embedded_prompts(&self) -> Result<Vec<Tensor>> {
        self.prompts.iter().map(|prompt| prompt.of_layer(0)).collect()
    }

    /// The run of the example's prompt, if that is its place.
    fn prompt_at(&self, e: &Example<'_>, place: Placement) -> Part<'a> {
        match (e.prompt, self.prompt_of(e)) {
            (Some(index), Some(prompt)) if prompt.placement == place => {
                Part::Prompt { index, length: prompt.length() }
            }
            _ => Part::Tokens(&[]),
        }
    }

    /// What the encoder reads.
    pub(crate) fn encoder(&self) -> Layout<'a> {
        let parts = |e: &Example<'a>| {
            let (text, end) = e.input.split_at(e.input.len().saturating_sub(1));
            let [before, after] = [Placement::Before, Placement::After].map(|place| self.prompt_at(e, place));
            vec![before, Part::Tokens(text), after, Part::Tokens(end)]
        };
        Layout { examples: self.examples.iter().map(parts).collect() }
    }

    /// What the decoder reads: `start`, the start token, then the target but for its last token.
    pub(crate) fn decoder(&self, start: &'a [u32; 1]) -> Layout<'a> {
        let parts = |e: &Example<'a>| {
            let shifted = &e.target[..e.target.len().saturating_sub(1)];
            vec![self.prompt_at(e, Placement::Decoder), Part::Tokens(start), Part::Tokens(shifted)]
        };
        Layout { examples: self.examples.iter().map(parts).collect() }
    }

    /// The rows of targets by example.
    pub(crate) fn target_rows(&self) -> Segments {
        Segments::new(self.examples.iter().map(|e| e.target.len()))
    }

    /// All targets, one after another.
    pub(crate) fn targets(&self) -> Vec<u32> {
        self.examples.iter().flat_map(|e| e.target).copied().collect()
    }

    pub(crate) fn keys(&self) -> Vec<u64> {
        self.examples.iter().map(|e| e.key).collect()
    }
}
