//! Microbatches: what goes through the backbone at once.

use candle_core::Tensor;
use incipit_kernels::{Rows, Segments};

use crate::config::Config;
use crate::{Error, Result};

/// One example.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    /// Which of the microbatch's prompts goes before the input; none for the bare model.
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
    /// Each `[P, D]` f32, with a `P` of its own.
    pub prompts: &'a [Tensor],
    /// In any order.
    pub examples: &'a [Example<'a>],
}

impl<'a> Microbatch<'a> {
    pub(crate) fn check(&self, config: &Config, with_targets: bool) -> Result<()> {
        for (example, e) in self.examples.iter().enumerate() {
            let refuse = |what: String| Err(Error::Example { example, what });
            if e.prompt.is_some_and(|p| p >= self.prompts.len()) {
                return refuse(format!("there is no prompt {:?} among {}", e.prompt, self.prompts.len()));
            }
            if e.input.is_empty() && self.prompt_length(e) == 0 {
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

    fn prompt_length(&self, e: &Example<'_>) -> usize {
        e.prompt.map_or(0, |p| self.prompts[p].dims().first().copied().unwrap_or(0))
    }

    /// The encoder's rows.
    pub(crate) fn encoder_rows(&self) -> Segments {
        Segments::new(self.examples.iter().map(|e| self.prompt_length(e) + e.input.len()))
    }

    /// What the encoder reads. Of ranks whose embeddings are added up, one has `with_prompts`.
    pub(crate) fn encoder_runs(&self, with_prompts: bool) -> Vec<Rows<'a>> {
        let prompt = |e: &Example<'a>| match e.prompt {
            Some(prompt) if with_prompts => Rows::Prompt(prompt),
            _ => Rows::Zeros(self.prompt_length(e)),
        };
        self.examples.iter().flat_map(|e| [prompt(e), Rows::Tokens(e.input)]).collect()
    }

    /// The token of each of the encoder's rows; a prompt's row has none.
    pub(crate) fn encoder_tokens(&self) -> Vec<Option<u32>> {
        let tokens = |e: &'a Example<'a>| {
            std::iter::repeat_n(None, self.prompt_length(e)).chain(e.input.iter().copied().map(Some))
        };
        self.examples.iter().flat_map(tokens).collect()
    }

    /// Place and number of the prompt's rows of each example among the encoder's rows.
    pub(crate) fn prompt_rows(&self, rows: &Segments) -> Vec<(usize, usize)> {
        let place = |(i, e)| (rows.range(i).start, self.prompt_length(e));
        self.examples.iter().enumerate().map(place).collect()
    }

    /// The decoder's rows.
    pub(crate) fn decoder_rows(&self) -> Segments {
        Segments::new(self.examples.iter().map(|e| e.target.len()))
    }

    /// What the decoder reads: the start token, then the target but for its last token.
    pub(crate) fn decoder_inputs(&self, start: u32) -> Vec<u32> {
        let shifted = |e: &Example<'a>| {
            std::iter::once(start).chain(e.target[..e.target.len() - 1].iter().copied()).collect::<Vec<_>>()
        };
        self.examples.iter().flat_map(shifted).collect()
    }

    /// All targets, one after another.
    pub(crate) fn targets(&self) -> Vec<u32> {
        self.examples.iter().flat_map(|e| e.target).copied().collect()
    }

    pub(crate) fn keys(&self) -> Vec<u64> {
        self.examples.iter().map(|e| e.key).collect()
    }
}
