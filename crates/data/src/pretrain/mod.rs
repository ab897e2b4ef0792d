//! Examples for pretraining, or for adapting a pretrained model, out of a corpus of plain text.
//!
//! [`Pretraining::open`] takes text files and gives [`TokenizedExample`]s without end, or for some epochs:
//!
//! 1. `corpus` reads documents. In `.txt` files each line is one; of records (`.jsonl`, `.parquet` and the others that
//!    [`read_records`](crate::read_records) knows) the field `text` is. A directory stands for the files in it.
//! 2. `segments` tokenizes them, ends each with `</s>`, lays all end to end and cuts the row every so many tokens, so that every
//!    example is full. [`PretrainOptions::lengths`] says how many.
//! 3. `objective` makes of each segment an input and a target, each ended by `</s>`. Which tokens are noise is drawn from
//!    the seed and the number of the segment alone (`random`).
//!
//! # Order, and how to go on from a place
//!
//! A stream is a function of the files and the options. A [`Cursor`] is a place in it, of a few numbers, and from it the stream
//! goes on with the same bytes. Shuffling respects that: the order of the files is drawn anew for each epoch, and segments are
//! shuffled within windows of 1,024 that follow each other and end with the epoch. A cursor is where its window begins and
//! how many of its examples are taken, so that to go on there costs reading and tokenizing one window. A reservoir, whose
//! content depends on all that went before it, would have to be kept whole. The price is that examples of one file are mixed
//! only with their neighbours: a corpus whose documents are sorted is better cut into many files, or shuffled beforehand.
//!
//! Memory holds a window, some 256 KiB of text that is read ahead, and at most one more document, however large the corpus
//! is. To go on from a cursor, the documents before it in its file are passed over without being tokenized.
//!
//! # A downstream task for a model that knows only span corruption
//!
//! [`add_sentinel`] changes examples of such a task, not of a corpus.

mod corpus;
mod error;
mod noise;
mod objective;
mod random;
mod segments;
mod sentinels;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::error::Result;
use crate::tokenize::{Encoder, TokenizedExample};
use corpus::{Documents, Place};
use objective::Rule;
use random::{Draw, Random, hash};
use segments::Segments;

pub use error::PretrainError;
pub use objective::{Lengths, Objective};
pub use sentinels::add_sentinel;

/// Segments that are shuffled together. Of T5's 568 tokens each they are some 2 MB.
const WINDOW: usize = 1024;

/// What examples are made, and in what order. The defaults are T5's: inputs of 512 tokens, of which 15 % are noise in spans
/// of 3 on average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PretrainOptions {
    /// What is to be learnt.
    pub objective: Objective,
    /// The most tokens of an input, with its `</s>`. Segments are as long as this lets them be.
    pub input_length: usize,
    /// The most tokens of a target, with its `</s>`. How many they are follows from all else ([`Lengths::target`]);
    /// if it is more, the options are refused.
    pub target_length: usize,
    /// The share of a segment's tokens that span corruption takes out, 0.001 to 0.9.
    pub noise_density: f64,
    /// How many of them lie together on average, 1 to 1,000.
    pub mean_span_length: f64,
    /// What order and noise are drawn from.
    pub seed: u64,
    /// Whether files, and segments within a window, come in a random order.
    pub shuffle: bool,
    /// How often the corpus is read; without end if none. What is then left of a segment is dropped.
    pub epochs: Option<NonZeroU64>,
}

impl Default for PretrainOptions {
    fn default() -> Self {
        Self {
            objective: Objective::SpanCorruption,
            input_length: 512,
            target_length: 114,
            noise_density: 0.15,
            mean_span_length: 3.0,
            seed: 0,
            shuffle: true,
            epochs: None,
        }
    }
}

/// A place in a stream of examples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// A hash of what the stream is a function of.
    stream: String,
    /// Where the window begins that examples are being taken from.
    window: Place,
    /// The number of its first segment in the stream.
    first: u64,
    /// How many of its examples are taken.
    taken: usize,
}

impl Cursor {
    /// How many examples come before it.
    pub fn examples(&self) -> u64 {
        self.first + self.taken as u64
    }

    /// The epoch of its window, from 0.
    pub fn epoch(&self) -> u64 {
        self.window.epoch
    }
}

/// A corpus as examples. All ranks of a run see the same ones.
pub struct Pretraining {
    seed: u64,
    /// Segments in a window.
    window_length: usize,
    lengths: Lengths,
    rule: Rule,
    end_mark: u32,
    segments: Segments,
    /// Segments that are still to come of the window, with their numbers in the stream.
    window: VecDeque<(u64, Vec<u32>)>,
    cursor: Cursor,
}

impl std::fmt::Debug for Pretraining {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pretraining")
            .field("lengths", &self.lengths)
            .field("cursor", &self.cursor)
            .finish_non_exhaustive()
    }
}

impl Pretraining {
    /// Opens a corpus: files, and directories with all files of text in them, in the order of their names. Hidden files and
    /// those whose names tell no format are passed over there. `vocab_size` is the number of rows of the model's embedding
    /// table.
    ///
    /// # Errors
    /// Those of [`PretrainOptions::lengths`]; a path that cannot be opened, is empty or tells no format, and a corpus
    /// without a file; a tokenizer without `</s>`, or for span corruption with too few `<extra_id_0>` and so on, or with an id
    /// that is not below `vocab_size`. Errors in files come with the examples.
    pub fn open(
        paths: &[PathBuf],
        tokenizer: &Tokenizer,
        vocab_size: usize,
        options: &PretrainOptions,
    ) -> Result<Self> {
        let lengths = options.lengths()?;
        let rule = Rule::new(options, lengths.segment, tokenizer)?;
        let encoder = Encoder::new(tokenizer, vocab_size)?;
        encoder.check(rule.sentinel_ids())?;
        let files = corpus::files(paths)?;
        let stream = name_of(options, files.iter().map(|file| file.bytes));
        let documents = Documents::new(files, options.shuffle.then_some(options.seed), options.epochs);
        Ok(Self {
            seed: options.seed,
            window_length: if options.shuffle { WINDOW } else { 1 },
            lengths,
            rule,
            end_mark: encoder.end_mark(),
            segments: Segments::new(documents, encoder, lengths.segment),
            window: VecDeque::new(),
            cursor: Cursor { stream, window: Place::default(), first: 0, taken: 0 },
        })
    }

    /// How long examples are.
    pub fn lengths(&self) -> Lengths {
        self.lengths
    }

    /// The next `size` examples; fewer, and then none, at the end of the last epoch.
    ///
    /// # Errors
    /// A file that cannot be read on, a record without a text, bytes that are no UTF-8, a corpus without text, or with epochs
    /// one of fewer tokens than a segment; an id that is not below the vocabulary's size. To go on after an error, [`Self::seek`].
    pub fn next_batch(&mut self, size: usize) -> Result<Vec<TokenizedExample>> {
        let mut batch = Vec::new();
        while batch.len() < size {
            let Some(example) = self.next_example()? else { break };
            batch.push(example);
        }
        Ok(batch)
    }

    /// Where the next example is.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// Goes to a place, from which examples are the same bytes as they were when the cursor was there.
    ///
    /// # Errors
    /// A cursor of other files (told by their sizes) or other options but `epochs`, and the errors of
    /// [`Self::next_batch`].
    pub fn seek(&mut self, cursor: &Cursor) -> Result<()> {
        if cursor.stream != self.cursor.stream {
            return Err(PretrainError::OtherStream.into());
        }
        self.segments.seek(cursor.window)?;
        self.window.clear();
        self.cursor = Cursor { taken: 0, ..cursor.clone() };
        if cursor.taken > 0 {
            self.next_window()?;
            if cursor.taken > self.window.len() {
                return Err(PretrainError::OtherStream.into());
            }
            self.window.drain(..cursor.taken);
            self.cursor.taken = cursor.taken;
        }
        Ok(())
    }

    fn next_example(&mut self) -> Result<Option<TokenizedExample>> {
        if self.window.is_empty() {
            self.next_window()?;
        }
        let Some((number, segment)) = self.window.pop_front() else { return Ok(None) };
        self.cursor.taken += 1;
        let mut random = Random::new(self.seed, Draw::Example, number);
        let (mut input, mut target) = self.rule.apply(&segment, &mut random);
        input.push(self.end_mark);
        target.push(self.end_mark);
        Ok(Some(TokenizedExample { input, target }))
    }

    /// Reads the window after the one whose segments are all taken; leaves it empty at the end of the last epoch.
    fn next_window(&mut self) -> Result<()> {
        let first = self.cursor.examples();
        let Some(start) = self.segments.place()? else { return self.end(first) };
        while self.window.len() < self.window_length
            && self.segments.place()?.is_some_and(|place| place.epoch == start.epoch)
        {
            let Some(segment) = self.segments.next()? else { break };
            self.window.push_back((first + self.window.len() as u64, segment));
        }
        if self.window.is_empty() {
            return self.end(first);
        }
        Random::new(self.seed, Draw::Window, first).shuffle(self.window.make_contiguous());
        self.cursor = Cursor { window: start, first, taken: 0, ..self.cursor.clone() };
        Ok(())
    }

    /// The end after so many examples, which must not be none.
    fn end(&self, examples: u64) -> Result<()> {
        match examples {
            0 => Err(PretrainError::ShortCorpus { segment: self.lengths.segment }.into()),
            _ => Ok(()),
        }
    }
}

/// A hash of the options, but for the number of epochs, and of the files' sizes.
fn name_of(options: &PretrainOptions, sizes: impl Iterator<Item = u64>) -> String {
    let words = [
        options.objective as u64,
        options.input_length as u64,
        options.target_length as u64,
        options.noise_density.to_bits(),
        options.mean_span_length.to_bits(),
        options.seed,
        u64::from(options.shuffle),
    ];
    hash(words.into_iter().chain(sizes)).finalize().to_hex().to_string()
}
