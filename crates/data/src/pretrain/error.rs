//! Why a corpus or options of pretraining were refused.

use std::path::PathBuf;

use crate::source::KNOWN_EXTENSIONS;

/// Why a corpus, options of pretraining or a saved place were refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PretrainError {
    /// A file that is named as part of a corpus, and whose name tells no format.
    #[error(
        "the name of {} ends in no known format of a corpus; known are .txt and .txt.gz (one document a line), and with a \
         field `text` {KNOWN_EXTENSIONS}",
        path.display()
    )]
    NotACorpusFile {
        /// The file.
        path: PathBuf,
    },
    /// A corpus without a file of text, or whose files have none.
    #[error(
        "the corpus {paths} holds no text; name files of text, or directories with some: .txt, .jsonl, .parquet, and \
         others with a field `text`"
    )]
    EmptyCorpus {
        /// What was named, or the files.
        paths: String,
    },
    /// A corpus that its epochs end before one example is full.
    #[error(
        "the corpus has fewer tokens in all its epochs than the {segment} of one example; add text, read it more often, or \
         make inputs shorter"
    )]
    ShortCorpus {
        /// Tokens of text that an example takes.
        segment: usize,
    },
    /// A tokenizer without the marks of what is left out.
    #[error(
        "the tokenizer has no <extra_id_0>, the first of the marks that span corruption puts into a text; use the tokenizer of a \
         T5, or the objective prefix-lm, which needs none"
    )]
    NoSentinels,
    /// Span corruption with more spans than there can be.
    #[error(
        "of {segment} tokens span corruption takes out {spans} spans, and there are only {most} {of}; make inputs shorter, spans \
         longer or the noise density smaller"
    )]
    TooManySpans {
        /// Tokens of a segment.
        segment: usize,
        /// Its spans of noise.
        spans: usize,
        /// How many there can be.
        most: usize,
        /// What there are no more of.
        of: &'static str,
    },
    /// Targets of pretraining longer than they may be.
    #[error(
        "{objective} with inputs of up to {input} tokens makes targets of up to {needed} tokens, and the maximum target length is \
         {max}; raise it, or make inputs shorter"
    )]
    ShortTarget {
        /// The objective.
        objective: &'static str,
        /// The maximum input length.
        input: usize,
        /// Tokens of the longest target, with its `</s>`.
        needed: usize,
        /// The maximum target length.
        max: usize,
    },
    /// A setting of pretraining that is out of its range.
    #[error("a {what} of {value} is not possible; it must be from {least} to {most}")]
    OutOfRange {
        /// The setting.
        what: &'static str,
        /// The value given.
        value: f64,
        /// The smallest one.
        least: f64,
        /// The largest one.
        most: f64,
    },
    /// A place in another stream of examples.
    #[error(
        "the saved place in the corpus is of other files or other options; go on with the files and options that it was \
         saved with, or start anew"
    )]
    OtherStream,
}
