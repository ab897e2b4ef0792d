//! Prompts of tokens: their rows are the tokens' embeddings, so that they are prompts like any other and can be read as well.

use std::path::Path;

use incipit_model::T5;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::{Error, Result, atomic, prompt::Prompt};

/// The name of the file that holds a prompt's tokens.
pub const TOKENS: &str = "tokens.json";

/// A prompt of tokens: the model, given its rows, does what it does if the tokens stand before the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPrompt {
    ids: Vec<u32>,
}

/// What the file says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    ids: Vec<u32>,
    text: String,
}

impl TokenPrompt {
    /// A prompt of these tokens of a vocabulary of `vocab_size`.
    ///
    /// # Errors
    /// If there are none, or one is outside of the vocabulary.
    pub fn new(ids: Vec<u32>, vocab_size: usize) -> Result<Self> {
        if ids.is_empty() {
            return Err(Error::Prompt { what: "a prompt of no tokens has no rows".to_owned() });
        }
        if let Some(place) = ids.iter().position(|id| *id as usize >= vocab_size) {
            let what = format!(
                "token {} at place {place} of the prompt is outside of the model's vocabulary of {vocab_size}",
                ids[place]
            );
            return Err(Error::Prompt { what });
        }
        Ok(Self { ids })
    }

    /// The tokens, none of them `</s>` unless it was given.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Puts another token, of the same vocabulary, in the place of one.
    pub(crate) fn replace(&mut self, place: usize, id: u32) {
        self.ids[place] = id;
    }

    /// The tokens as text, special ones included. The tokenizer may cut this text into other tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot write it.
    pub fn text(&self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.ids, false);
        text.map_err(|cause| Error::Tokenizer { cause: cause.to_string() })
    }

    /// The tokens' embeddings: `[P, D]`, a row a token. Where the model is cut into parts, all ranks make this call together.
    ///
    /// # Errors
    /// If a token is outside of the model's vocabulary, or an embedding is not finite.
    pub fn rows(&self, model: &T5) -> Result<Prompt> {
        Prompt::new(self.ids.len(), model.config().d_model, model.embedding_rows(&self.ids)?)
    }

    /// Writes the tokens and their text to `path`, as JSON.
    ///
    /// # Errors
    /// If the tokenizer cannot write the text, or the system refuses.
    pub fn write(&self, path: &Path, tokenizer: &Tokenizer) -> Result<()> {
        let json = serde_json::json!(Tokens { ids: self.ids.clone(), text: self.text(tokenizer)? });
        atomic::write_file(path, format!("{json}\n").as_bytes())
    }

    /// Reads what [`Self::write`] wrote.
    ///
    /// # Errors
    /// If it cannot be read, holds no tokens, or those of another model or tokenizer.
    pub fn read(path: &Path, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self> {
        let refuse = |what: String| Error::PromptFile { path: path.to_owned(), what };
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let Tokens { ids, text } = serde_json::from_slice(&bytes).map_err(|e| {
            refuse(format!("it does not hold the tokens of a prompt as `ids` and `text` ({e})"))
        })?;
        let prompt = Self::new(ids, vocab_size).map_err(|e| refuse(e.to_string()))?;
        let read = prompt.text(tokenizer)?;
        if read != text {
            let what = format!(
                "it says that its tokens are {text:?}, and the model's tokenizer reads them as {read:?}; give the model \
                 that they were made for with --model"
            );
            return Err(refuse(what));
        }
        Ok(prompt)
    }
}

/// The pieces of which texts consist, by their numbers: all that the tokenizer knows but padding, end of sequence, unknown and what
/// was added, such as `<extra_id_0>`.
#[must_use]
pub fn ordinary(tokenizer: &Tokenizer) -> Vec<u32> {
    let added = tokenizer.get_added_tokens_decoder();
    let special = ["<pad>", "</s>", "<unk>"].map(|token| tokenizer.token_to_id(token));
    let size = u32::try_from(tokenizer.get_vocab_size(true)).unwrap_or(u32::MAX);
    (0..size).filter(|id| !added.contains_key(id) && !special.contains(&Some(*id))).collect()
}

/// The tokens of a text, without `</s>`.
///
/// # Errors
/// If the tokenizer fails.
pub fn pieces(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoded = tokenizer.encode(text, false);
    Ok(encoded.map_err(|cause| Error::Tokenizer { cause: cause.to_string() })?.get_ids().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        incipit_weights::load_tokenizer(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model"))
            .unwrap()
    }

    #[test]
    fn a_file_gives_back_the_tokens_and_is_read_by_people() {
        let dir = tempfile::tempdir().unwrap();
        let (path, tokenizer) = (dir.path().join(TOKENS), tokenizer());
        let ids = pieces(&tokenizer, "a letter about a tent ;").unwrap();
        let prompt = TokenPrompt::new([&ids[..], &[1, 1019]].concat(), 1024).unwrap();
        prompt.write(&path, &tokenizer).unwrap();
        assert_eq!(TokenPrompt::read(&path, &tokenizer, 1024).unwrap(), prompt);
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["ids"], serde_json::json!(prompt.ids()));
        assert!(json["text"].as_str().unwrap().starts_with("a letter about a tent ;"), "{json}");
    }

    #[test]
    fn a_file_that_holds_no_prompt_of_this_model_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (path, tokenizer) = (dir.path().join(TOKENS), tokenizer());
        for (json, expected) in [
            ("", "does not hold the tokens"),
            (r#"{"ids": [5]}"#, "missing field `text`"),
            (r#"{"ids": [-5], "text": ""}"#, "invalid value"),
            (r#"{"ids": [5], "text": "", "rows": 1}"#, "unknown field `rows`"),
            (r#"{"ids": [], "text": ""}"#, "no tokens"),
            (r#"{"ids": [5, 1024], "text": ""}"#, "token 1024 at place 1 of the prompt is outside"),
            (r#"{"ids": [5], "text": "another"}"#, "its tokens are \"another\""),
        ] {
            std::fs::write(&path, json).unwrap();
            let error = TokenPrompt::read(&path, &tokenizer, 1024).unwrap_err().to_string();
            assert!(error.contains(TOKENS) && error.contains(expected), "{json}: {error}");
        }
        let error = TokenPrompt::read(&dir.path().join("absent"), &tokenizer, 1024).unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
    }

    #[test]
    fn ordinary_pieces_are_those_that_texts_consist_of() {
        let tokenizer = tokenizer();
        let ordinary = ordinary(&tokenizer);
        for text in ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_19>"] {
            assert!(!ordinary.contains(&tokenizer.token_to_id(text).unwrap_or(0)), "{text}");
        }
        let text = "My letter is about a striped guitar that I chose on Tuesday.";
        assert!(pieces(&tokenizer, text).unwrap().iter().all(|id| ordinary.contains(id)));
        assert!(ordinary.iter().all(|id| tokenizer.id_to_token(*id).is_some()));
    }
}
