//! From texts to token ids.

use tokenizers::{Encoding, Tokenizer};

use crate::error::{Error, Result};
use crate::load::TextExample;

/// The end of every T5 text.
const END_MARK: &str = "</s>";
/// A text needs room for a token and the end mark.
const LEAST: usize = 2;
/// Texts tokenized at once; bounds the memory of encodings, which is far more than that of ids.
const CHUNK: usize = 1024;

/// An example as token ids. Both texts end with `</s>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedExample {
    /// The input.
    pub input: Vec<u32>,
    /// The target.
    pub target: Vec<u32>,
}

/// Examples as token ids, and what had to be cut off.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenizedSet {
    /// The examples, in the order of the texts.
    pub examples: Vec<TokenizedExample>,
    /// Their texts.
    pub texts: Vec<TextExample>,
    /// How many inputs were longer than the limit, and are cut.
    pub truncated_inputs: usize,
    /// How many targets were.
    pub truncated_targets: usize,
    /// Tokens of the longest input before it was cut, with its `</s>`: the limit that would cut none.
    pub longest_input: usize,
    /// Tokens of the longest target, likewise.
    pub longest_target: usize,
}

/// Tokenizes examples, cutting inputs at `max_input` and targets at `max_target` tokens; both count the
/// `</s>`, which is kept.
///
/// A tokenizer's own truncation and padding are ignored.
///
/// # Errors
/// Limits below 2, a tokenizer without `</s>`, an id that is not below `vocab_size` (the tokenizer is not the
/// model's), a target of no tokens though it has a text.
pub fn tokenize(
    texts: &[TextExample],
    tokenizer: &Tokenizer,
    max_input: usize,
    max_target: usize,
    vocab_size: usize,
) -> Result<TokenizedSet> {
    for (side, max) in [("input", max_input), ("target", max_target)] {
        if max < LEAST {
            return Err(Error::LengthLimit { side, max, least: LEAST });
        }
    }
    let encoder = Encoder::new(tokenizer, vocab_size)?;
    let mut set = TokenizedSet { texts: texts.to_vec(), ..TokenizedSet::default() };
    for chunk in texts.chunks(CHUNK) {
        let inputs = encoder.encode(chunk.iter().map(|example| example.inputs.as_str()).collect())?;
        let targets = encoder.encode(chunk.iter().map(|example| example.targets.as_str()).collect())?;
        for ((mut input, mut target), text) in inputs.into_iter().zip(targets).zip(chunk) {
            if target.is_empty() && !text.targets.is_empty() {
                return Err(Error::NoTargetTokens { line: text.line, target: text.targets.clone() });
            }
            set.longest_input = set.longest_input.max(input.len() + 1);
            set.longest_target = set.longest_target.max(target.len() + 1);
            set.truncated_inputs += usize::from(encoder.finish(&mut input, max_input));
            set.truncated_targets += usize::from(encoder.finish(&mut target, max_target));
            set.examples.push(TokenizedExample { input, target });
        }
    }
    Ok(set)
}

/// A tokenizer that neither cuts nor pads, and checks its ids.
pub(crate) struct Encoder {
    tokenizer: Tokenizer,
    end_mark: u32,
    vocab_size: usize,
}

impl Encoder {
    pub(crate) fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self> {
        let mut tokenizer = tokenizer.clone();
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(failure)?;
        let end_mark = tokenizer.token_to_id(END_MARK).ok_or(Error::NoEndMark)?;
        let encoder = Self { tokenizer, end_mark, vocab_size };
        encoder.check(&[end_mark])?;
        Ok(encoder)
    }

    /// The id of `</s>`.
    pub(crate) fn end_mark(&self) -> u32 {
        self.end_mark
    }

    /// Ids of each text, without the end mark.
    pub(crate) fn encode(&self, texts: Vec<&str>) -> Result<Vec<Vec<u32>>> {
        let encodings: Vec<Encoding> = self.tokenizer.encode_batch_fast(texts, false).map_err(failure)?;
        let ids: Vec<Vec<u32>> = encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect();
        ids.iter().try_for_each(|ids| self.check(ids))?;
        Ok(ids)
    }

    /// Refuses ids that the model does not have.
    pub(crate) fn check(&self, ids: &[u32]) -> Result<()> {
        let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) else { return Ok(()) };
        let text = self.tokenizer.id_to_token(id).unwrap_or_default();
        Err(Error::TokenizerMismatch { text: format!("{text:?}"), id, vocab_size: self.vocab_size })
    }

    /// Cuts ids to the limit and ends them; true if any were cut off.
    fn finish(&self, ids: &mut Vec<u32>, max: usize) -> bool {
        let cut = ids.len() + 1 > max;
        ids.truncate(max - 1);
        ids.push(self.end_mark);
        cut
    }
}

fn failure(cause: tokenizers::Error) -> Error {
    Error::Tokenizer { cause }
}
