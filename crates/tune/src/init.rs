//! The prompt before the first step.

use crate::{Error, Result, prompt::Prompt, tokens};
use incipit_kernels::rng::Philox;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};
use tokenizers::Tokenizer;

/// How the rows of a prompt begin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PromptInit {
    /// A row for each label (in the order of the alphabet): the mean of its pieces' embeddings. The rest as
    /// [`Self::Vocab`].
    ClassLabel,
    /// Embeddings of pieces drawn, none twice, from the 5,000 most frequent.
    Vocab,
    /// Every element uniform in `[low, high)`. The paper's is [-0.5, 0.5), the released code's [0, 0.5).
    Uniform {
        /// The smallest value.
        low: f32,
        /// Above the largest value.
        high: f32,
    },
    /// Embeddings of a text's pieces, repeated or cut to the prompt's length.
    Text(String),
    /// An `.npy` file, a PEFT directory, a checkpoint or a training directory, of the same length and width.
    File(PathBuf),
}

const CHOICES: &str = "class-label, vocab, uniform, uniform:LOW,HIGH, text:TEXT, file:PATH";

impl FromStr for PromptInit {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let unknown =
            || Error::Choice { what: "prompt initialisation", given: s.to_owned(), choices: CHOICES };
        match s.split_once(':') {
            None => match s {
                "class-label" => Ok(Self::ClassLabel),
                "vocab" => Ok(Self::Vocab),
                "uniform" => Ok(Self::Uniform { low: -0.5, high: 0.5 }),
                _ => Err(unknown()),
            },
            Some(("text", text)) if !text.trim().is_empty() => Ok(Self::Text(text.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("uniform", range)) => {
                let (low, high) = range.split_once(',').ok_or_else(unknown)?;
                let parse =
                    |s: &str| s.trim().parse().ok().filter(|v: &f32| v.is_finite()).ok_or_else(unknown);
                let (low, high) = (parse(low)?, parse(high)?);
                if low < high { Ok(Self::Uniform { low, high }) } else { Err(unknown()) }
            }
            Some(_) => Err(unknown()),
        }
    }
}

impl fmt::Display for PromptInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClassLabel => f.write_str("class-label"),
            Self::Vocab => f.write_str("vocab"),
            Self::Uniform { low, high } => write!(f, "uniform:{low},{high}"),
            Self::Text(text) => write!(f, "text:{text}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl TryFrom<String> for PromptInit {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<PromptInit> for String {
    fn from(init: PromptInit) -> Self {
        init.to_string()
    }
}

/// The row of a piece in the model's embedding table `[D]`.
pub type EmbeddingRow<'a> = &'a dyn Fn(u32) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;

/// What initialising a prompt can draw on.
pub struct Sources<'a> {
    /// The model's embedding table.
    pub embedding: EmbeddingRow<'a>,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The task's label strings, in any order.
    pub labels: &'a [String],
    /// The job's seed.
    pub seed: u64,
}

/// A prompt before the first step.
#[derive(Clone, Debug)]
pub struct Initial {
    /// Its rows.
    pub prompt: Prompt,
    /// What a person should know about them: labels without a row, a text cut.
    pub warnings: Vec<String>,
}

/// Distinguishes these random numbers from the job's others.
const STREAM: u64 = u64::from_be_bytes(*b"prompt 0");
/// A SentencePiece vocabulary is sorted by frequency, after padding, end of sequence and unknown.
pub(crate) const MOST_FREQUENT: std::ops::Range<u32> = 3..5003;

/// The labels in the order of the rows that they initialise: that of the alphabet, each once.
#[must_use]
pub fn label_order(labels: &[String]) -> Vec<&str> {
    labels.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The prompt `[length, d_model]` with which a job begins: a function of its arguments alone. One of a file is as it is there, with rows
/// for each layer if it has them.
///
/// # Errors If a label is missing or has no pieces, the vocabulary is too small, or a file holds no prompt of
/// this length and width.
pub fn initial_prompt(
    init: &PromptInit,
    length: usize,
    d_model: usize,
    sources: &Sources<'_>,
) -> Result<Initial> {
    let draft = Draft { init, length, sources };
    let mut warnings = Vec::new();
    let values = match init {
        PromptInit::ClassLabel => draft.class_labels(d_model, &mut warnings)?,
        PromptInit::Vocab => draft.rows(&draft.vocab(length)?, d_model)?,
        PromptInit::Uniform { low, high } => {
            let mut random = Philox::new(sources.seed, &[STREAM]);
            // Rounding could give `high` itself.
            (0..length * d_model)
                .map(|_| (low + (high - low) * random.uniform()).min(high.next_down()))
                .collect()
        }
        PromptInit::Text(text) => draft.rows(&draft.text(text, &mut warnings)?, d_model)?,
        PromptInit::File(path) => {
            let prompt = Prompt::read(path)?;
            check_shape(&prompt, path, (length, 0), d_model)?;
            return Ok(Initial { prompt, warnings });
        }
    };
    Ok(Initial { prompt: Prompt::new(length, d_model, values)?, warnings })
}

/// The pieces with whose embeddings [`initial_prompt`] begins, where a prompt of so many rows consists of such: `vocab` and `text`.
/// With them, what a person should know.
///
/// # Errors
/// As [`initial_prompt`]; also if the rows are not pieces' embeddings.
pub fn initial_tokens(
    init: &PromptInit,
    length: usize,
    sources: &Sources<'_>,
) -> Result<(Vec<u32>, Vec<String>)> {
    let draft = Draft { init, length, sources };
    let mut warnings = Vec::new();
    let ids = match init {
        PromptInit::Vocab => draft.vocab(length)?,
        PromptInit::Text(text) => draft.text(text, &mut warnings)?,
        PromptInit::ClassLabel | PromptInit::Uniform { .. } | PromptInit::File(_) => {
            let what = "its rows are not embeddings of pieces, of which this prompt consists; give vocab or text:TEXT";
            return Err(draft.refuse(what.to_owned()));
        }
    };
    Ok((ids, warnings))
}

/// Checks that a prompt can begin so where these are the task's labels.
pub(crate) fn check_labels(init: &PromptInit, labels: &[String]) -> Result<()> {
    if *init != PromptInit::ClassLabel || !labels.is_empty() {
        return Ok(());
    }
    let what = "the task has no labels; give --labels, or --prompt-init vocab";
    Err(Error::Init { init: init.to_string(), what: what.to_owned() })
}

/// Checks that the prompt that was read from `path` can be one of `[length, d_model]`, which stands behind `shared` rows.
pub(crate) fn check_shape(
    prompt: &Prompt,
    path: &Path,
    (length, shared): (usize, usize),
    d_model: usize,
) -> Result<()> {
    prompt.check_width(d_model, path)?;
    if prompt.length() == length {
        return Ok(());
    }
    let found = prompt.length();
    let what = format!("it has {found} rows, not {length}; give --prompt-length {}", found + shared);
    Err(Error::Init { init: PromptInit::File(path.to_owned()).to_string(), what })
}

struct Draft<'a> {
    init: &'a PromptInit,
    length: usize,
    sources: &'a Sources<'a>,
}

impl Draft<'_> {
    fn refuse(&self, what: String) -> Error {
        Error::Init { init: self.init.to_string(), what }
    }

    fn class_labels(&self, d_model: usize, warnings: &mut Vec<String>) -> Result<Vec<f32>> {
        check_labels(self.init, self.sources.labels)?;
        let labels = label_order(self.sources.labels);
        if labels.len() > self.length {
            warnings.push(format!(
                "{} labels, but a prompt of {} rows: those after {:?} have no row of their own",
                labels.len(),
                self.length,
                labels.get(self.length - 1).unwrap_or(&"")
            ));
        }
        let mut values = Vec::with_capacity(self.length * d_model);
        for label in labels.into_iter().take(self.length) {
            values.extend(self.mean(&self.pieces(label)?, d_model)?);
        }
        values.extend(self.rows(&self.vocab(self.length - values.len() / d_model)?, d_model)?);
        Ok(values)
    }

    /// As many pieces as there are rows to fill, drawn from the most frequent.
    fn vocab(&self, rows: usize) -> Result<Vec<u32>> {
        let mut pieces = tokens::ordinary(self.sources.tokenizer);
        pieces.retain(|id| MOST_FREQUENT.contains(id));
        if pieces.len() < rows {
            let what = format!(
                "{rows} rows, but {} ordinary pieces; make the prompt shorter, or use uniform",
                pieces.len()
            );
            return Err(self.refuse(what));
        }
        let order = Philox::new(self.sources.seed, &[STREAM]).permutation(pieces.len());
        Ok(order.into_iter().take(rows).map(|i| pieces[i as usize]).collect())
    }

    /// The pieces of a text, repeated or cut to the length.
    fn text(&self, text: &str, warnings: &mut Vec<String>) -> Result<Vec<u32>> {
        let pieces = self.pieces(text)?;
        if pieces.len() > self.length {
            warnings.push(format!(
                "the text has {} pieces and the prompt {} rows: the text is cut",
                pieces.len(),
                self.length
            ));
        }
        Ok(pieces.into_iter().cycle().take(self.length).collect())
    }

    /// The pieces of a text, without the end of sequence; at least one.
    fn pieces(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = self.sources.tokenizer.encode(text, false);
        let ids = encoded
            .map_err(|e| self.refuse(format!("{text:?} cannot be tokenized ({e})")))?
            .get_ids()
            .to_vec();
        if ids.is_empty() {
            return Err(self.refuse(format!("{text:?} has no pieces; give another text, or use vocab")));
        }
        Ok(ids)
    }

    fn mean(&self, pieces: &[u32], d_model: usize) -> Result<Vec<f32>> {
        let mut sums = vec![0.0f64; d_model];
        for id in pieces {
            sums.iter_mut().zip(self.row(*id, d_model)?).for_each(|(sum, v)| *sum += f64::from(v));
        }
        Ok(sums.into_iter().map(|sum| (sum / pieces.len() as f64) as f32).collect())
    }

    fn rows(&self, pieces: &[u32], d_model: usize) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(pieces.len() * d_model);
        for id in pieces {
            values.extend(self.row(*id, d_model)?);
        }
        Ok(values)
    }

    fn row(&self, id: u32, d_model: usize) -> Result<Vec<f32>> {
        let row = (self.sources.embedding)(id).map_err(|source| Error::Embedding { id, source })?;
        if row.len() != d_model {
            let what = format!("the embedding of piece {id} has {} columns, not {d_model}", row.len());
            return Err(self.refuse(what));
        }
        Ok(row)
    }
}

#[cfg(test)]
mod tests;
