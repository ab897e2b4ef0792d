//! Rank classification: the prediction is the label that the model finds likeliest, and not what it writes (Brown et al. 2020,
//! section 2.4, without their division by the length: the whole label is scored, as T0 does, Sanh et al. 2022).

use std::{collections::BTreeMap, sync::Arc};

use incipit_data::{TextExample, pretrain::add_sentinel, tokenize};
use tokenizers::Tokenizer;

use crate::{Error, Result, choice::choices};

choices! {
    /// How predictions are made.
    Predict, "way of predicting" {
        /// By greedy decoding: what the model writes.
        Decode => "decode",
        /// By ranking the labels: the one with the highest likelihood.
        Rank => "rank",
    }
}

impl Predict {
    /// What predictions are chosen among, if they are chosen; with `<extra_id_0>` before each, if the model expects a `sentinel`.
    ///
    /// # Errors
    /// If labels are to be ranked and there are none, or one cannot be tokenized.
    pub fn candidates(
        self,
        labels: Option<&[String]>,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        sentinel: bool,
    ) -> Result<Option<Arc<Candidates>>> {
        self.check(labels)?;
        match self {
            Self::Decode => Ok(None),
            Self::Rank => {
                let labels = labels.unwrap_or_default();
                Ok(Some(Arc::new(Candidates::new(labels, tokenizer, vocab_size, sentinel)?)))
            }
        }
    }

    /// Checks that predictions can be made so where these are the labels.
    pub(crate) fn check(self, labels: Option<&[String]>) -> Result<()> {
        if self == Self::Rank && labels.is_none_or(<[String]>::is_empty) {
            let what = "rank chooses among labels, and this task has none; give them with --labels, or pass --predict decode";
            return Err(Error::spec("predict", &what));
        }
        Ok(())
    }

    /// Whether it is what holds where nothing is said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::Decode
    }
}

/// A task's labels, as the model scores them.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidates {
    /// At least one.
    texts: Vec<String>,
    /// Token ids of each, `</s>` included.
    tokens: Vec<Vec<u32>>,
}

impl Candidates {
    /// `labels`, one at least, as targets are tokenized, but never cut.
    fn new(labels: &[String], tokenizer: &Tokenizer, vocab_size: usize, sentinel: bool) -> Result<Self> {
        let text = |(index, label): (usize, &String)| TextExample {
            inputs: String::new(),
            targets: label.clone(),
            index,
            line: index + 1,
        };
        let texts: Vec<TextExample> = labels.iter().enumerate().map(text).collect();
        let mut set = tokenize(&texts, tokenizer, usize::MAX, usize::MAX, vocab_size)?;
        if sentinel {
            add_sentinel(&mut set.examples, tokenizer)?;
        }
        let tokens = set.examples.into_iter().map(|example| example.target).collect();
        Ok(Self { texts: labels.to_vec(), tokens })
    }

    /// Token ids of each label, `</s>` included.
    #[must_use]
    pub fn tokens(&self) -> &[Vec<u32>] {
        &self.tokens
    }

    /// Tokens of all labels together.
    pub(crate) fn num_tokens(&self) -> usize {
        self.tokens.iter().map(Vec::len).sum()
    }

    /// The label with the highest score; of equals the first.
    pub(crate) fn best(&self, scores: &[f32]) -> &str {
        let higher = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
        &self.texts[(0..scores.len()).fold(0, higher)]
    }

    /// The scores under the labels' texts.
    pub(crate) fn named(&self, scores: &[f32]) -> BTreeMap<String, f64> {
        self.texts.iter().cloned().zip(scores.iter().map(|score| f64::from(*score))).collect()
    }
}
