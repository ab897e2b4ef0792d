//! The tokens that stand for what is left out of a text.

use tokenizers::Tokenizer;

use super::PretrainError;
use crate::error::Result;
use crate::tokenize::TokenizedExample;

/// A tokenizer's `<extra_id_0>`, `<extra_id_1>` and so on. In a T5's vocabulary they count down from its last piece.
pub(super) struct Sentinels(Vec<u32>);

impl Sentinels {
    pub(super) fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let ids: Vec<u32> = (0..).map_while(|n| tokenizer.token_to_id(&format!("<extra_id_{n}>"))).collect();
        if ids.is_empty() { Err(PretrainError::NoSentinels.into()) } else { Ok(Self(ids)) }
    }

    pub(super) fn ids(&self) -> &[u32] {
        &self.0
    }

    /// Puts the next sentinel in the place of each run of tokens whose mask is `hidden`. With `true` this is T5's
    /// `noise_span_to_unique_sentinel`, with `false` its `nonnoise_span_to_unique_sentinel`. There must be a sentinel
    /// for each run.
    pub(super) fn replace(&self, tokens: &[u32], mask: &[bool], hidden: bool) -> Vec<u32> {
        let mut sentinels = self.0.iter();
        let mut replaced = Vec::with_capacity(tokens.len());
        let mut within = false;
        for (&token, &masked) in tokens.iter().zip(mask) {
            let hide = masked == hidden;
            match (hide, within) {
                (false, _) => replaced.push(token),
                (true, false) => replaced.extend(sentinels.next()),
                (true, true) => {}
            }
            within = hide;
        }
        replaced
    }
}

/// Puts `<extra_id_0>` before each target of a downstream task, so that it looks to a model that was trained by span
/// corruption as the targets that it knows: the setting "span corruption + sentinel" of Lester et al. (2021, section
/// 3.2).
///
/// The targets become one token longer. A tokenizer that skips special tokens drops the sentinel from what the model
/// then generates.
///
/// # Errors
/// A tokenizer without `<extra_id_0>`.
pub fn add_sentinel(examples: &mut [TokenizedExample], tokenizer: &Tokenizer) -> Result<()> {
    let sentinels = Sentinels::of(tokenizer)?;
    for example in examples {
        example.target.splice(..0, sentinels.0.first().copied());
    }
    Ok(())
}
