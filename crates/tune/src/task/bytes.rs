//! A task as bytes, so that one rank reads the files and the others need not see them.
//!
//! The BLAKE3 hash of the rest (32 bytes), the version, and the fields in order. A number is a little-endian u64; a list or a text is its
//! length and its parts, tokens are u32; what may be missing is a list of none or one.

use std::sync::Arc;

use incipit_data::{TextExample, TokenizedExample, TokenizedSet, metrics::Reference};

use super::Task;
use crate::{Error, Result, prompt::Prompt};

/// The version of the bytes written here.
const FORMAT: u64 = 4;

impl Task {
    /// All of it as bytes, to be sent to another rank.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer(vec![0; blake3::OUT_LEN]);
        out.number(FORMAT as usize);
        out.set(&self.train);
        out.list(self.eval.as_slice(), |out, set| out.set(set));
        out.list(self.references.as_slice(), |out, references| out.list(references, Writer::reference));
        out.list(self.labels.as_slice(), |out, labels| out.list(labels, |out, label| out.text(label)));
        out.number(self.max_new_tokens);
        out.text(&self.train_hash);
        out.list(self.eval_hash.as_slice(), |out, hash| out.text(hash));
        out.list(self.initial.as_slice(), |out, prompt| {
            out.list(&prompt.shape(), |out, dim| out.number(*dim));
            out.words(prompt.values().iter().map(|value| value.to_bits()));
        });
        out.list(self.initial_backbone.as_slice(), |out, fingerprint| out.text(fingerprint));
        out.list(&self.warnings, |out, warning| out.text(warning));
        let Writer(mut bytes) = out;
        let hash = blake3::hash(&bytes[blake3::OUT_LEN..]);
        bytes[..blake3::OUT_LEN].copy_from_slice(hash.as_bytes());
        bytes
    }

    /// What [`Self::to_bytes`] made.
    ///
    /// # Errors
    /// [`Error::Received`] if the bytes are cut short, changed, or of another version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |what: &str| Error::Received { thing: "task", what: what.to_owned() };
        let (hash, rest) = bytes.split_first_chunk().ok_or_else(|| refuse("it is cut short"))?;
        if blake3::hash(rest) != blake3::Hash::from_bytes(*hash) {
            return Err(refuse("its hash is not the one that was sent with it"));
        }
        let mut reader = Reader(rest);
        if reader.number() != Some(FORMAT as usize) {
            return Err(refuse("it is of another version"));
        }
        let task = reader.task().filter(|_| reader.0.is_empty());
        task.ok_or_else(|| refuse("its parts are not as long as they say"))
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: usize) {
        self.0.extend((number as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len());
        self.0.extend(text.as_bytes());
    }

    fn words(&mut self, words: impl ExactSizeIterator<Item = u32>) {
        self.number(words.len());
        self.0.extend(words.flat_map(u32::to_le_bytes));
    }

    fn list<T>(&mut self, items: &[T], write: impl Fn(&mut Self, &T)) {
        self.number(items.len());
        items.iter().for_each(|item| write(self, item));
    }

    fn reference(&mut self, reference: &Reference) {
        self.list(&reference.answers, |out, answer| out.text(answer));
        self.list(reference.group.as_slice(), |out, (one, two)| {
            out.number(*one as usize);
            out.number(*two as usize);
        });
        self.number(usize::from(reference.holds));
    }

    fn set(&mut self, set: &TokenizedSet) {
        self.list(&set.examples, |out, example| {
            out.words(example.input.iter().copied());
            out.words(example.target.iter().copied());
        });
        self.list(&set.texts, |out, text| {
            out.text(&text.inputs);
            out.text(&text.targets);
            out.number(text.index);
            out.number(text.line);
        });
        for number in [set.truncated_inputs, set.truncated_targets, set.longest_input, set.longest_target] {
            self.number(number);
        }
    }
}

/// What has not been read yet. Every method gives nothing where the bytes end too early or mean nothing.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn task(&mut self) -> Option<Task> {
        Some(Task {
            train: Arc::new(self.set()?),
            eval: self.option(|reader| reader.set().map(Arc::new))?,
            references: self.option(|reader| reader.list(Self::reference).map(Arc::new))?,
            labels: self.option(|reader| reader.list(Self::text))?,
            max_new_tokens: self.number()?,
            train_hash: self.text()?,
            eval_hash: self.option(Self::text)?,
            initial: self.option(Self::prompt)?,
            initial_backbone: self.option(Self::text)?,
            warnings: self.list(Self::text)?,
        })
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number(&mut self) -> Option<usize> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        usize::try_from(u64::from_le_bytes(*number)).ok()
    }

    fn text(&mut self) -> Option<String> {
        let count = self.number()?;
        String::from_utf8(self.bytes(count)?.to_vec()).ok()
    }

    fn words(&mut self) -> Option<Vec<u32>> {
        let count = self.number()?.checked_mul(4)?;
        Some(self.bytes(count)?.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// No memory is set aside for what is only said to come.
    fn list<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.number()?;
        (0..count).map(|_| read(self)).collect()
    }

    fn option<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Option<T>> {
        let mut list = self.list(read)?;
        (list.len() < 2).then(|| list.pop())
    }

    fn prompt(&mut self) -> Option<Prompt> {
        let shape = self.list(Self::number)?;
        Prompt::of_shape(&shape, self.words()?.into_iter().map(f32::from_bits).collect()).ok()
    }

    fn reference(&mut self) -> Option<Reference> {
        Some(Reference {
            answers: self.list(Self::text)?,
            group: self.option(|reader| Some((reader.number()? as u64, reader.number()? as u64)))?,
            holds: self.number()? != 0,
        })
    }

    fn set(&mut self) -> Option<TokenizedSet> {
        let examples =
            self.list(|reader| Some(TokenizedExample { input: reader.words()?, target: reader.words()? }))?;
        let texts = self.list(|reader| {
            Some(TextExample {
                inputs: reader.text()?,
                targets: reader.text()?,
                index: reader.number()?,
                line: reader.number()?,
            })
        })?;
        let set = TokenizedSet {
            examples,
            texts,
            truncated_inputs: self.number()?,
            truncated_targets: self.number()?,
            longest_input: self.number()?,
            longest_target: self.number()?,
        };
        (set.examples.len() == set.texts.len()).then_some(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> Task {
        let example = |n: usize| TokenizedExample { input: vec![n as u32, 7, 1], target: vec![9, 1] };
        let text = |n: usize| TextExample {
            inputs: format!("Größe {n}"),
            targets: String::new(),
            index: n,
            line: 2 * n + 1,
        };
        let set = |count: usize| TokenizedSet {
            examples: (0..count).map(example).collect(),
            texts: (0..count).map(text).collect(),
            truncated_inputs: 1,
            truncated_targets: 2,
            longest_input: 3,
            longest_target: 4,
        };
        Task {
            train: Arc::new(set(5)),
            eval: Some(Arc::new(set(2))),
            references: Some(Arc::new(vec![
                Reference { group: Some((1, 70)), ..Reference::of("yes") },
                Reference { answers: vec![String::new(), "ß".to_owned()], group: None, holds: false },
            ])),
            labels: Some(vec!["yes".to_owned(), "nein".to_owned()]),
            max_new_tokens: 6,
            train_hash: "ab".repeat(32),
            eval_hash: Some("cd".repeat(32)),
            initial: Some(Prompt::new(2, 3, vec![0.5, -0.0, 1e-40, 3.0, 4.0, f32::MAX]).unwrap()),
            initial_backbone: Some("ab".repeat(32)),
            warnings: vec!["3 inputs were cut".to_owned()],
        }
    }

    #[test]
    fn a_task_is_read_back_as_it_was() {
        let whole = task();
        let bare = Task {
            eval: None,
            references: None,
            labels: None,
            eval_hash: None,
            initial: None,
            initial_backbone: None,
            warnings: Vec::new(),
            ..task()
        };
        let empty = Task { labels: Some(Vec::new()), train: Arc::default(), ..task() };
        for task in [whole, bare, empty] {
            assert_eq!(Task::from_bytes(&task.to_bytes()).unwrap(), task);
        }
    }

    #[test]
    fn bytes_cut_or_changed_anywhere_are_refused() {
        let bytes = task().to_bytes();
        for len in 0..bytes.len() {
            let error = Task::from_bytes(&bytes[..len]).unwrap_err().to_string();
            assert!(
                error.contains("of the task") && (error.contains("cut short") || error.contains("hash")),
                "{error}"
            );
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(Task::from_bytes(&flipped).is_err(), "byte {at}");
        }
        assert!(Task::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
    }

    /// As above, by somebody who makes the hash fit: nothing is believed of a length, and nothing panics.
    #[test]
    fn wrong_lengths_are_refused_even_where_the_hash_is_right() {
        let bytes = task().to_bytes();
        let hashed = |rest: &[u8]| [blake3::hash(rest).as_bytes(), rest].concat();
        let rest = &bytes[blake3::OUT_LEN..];
        for len in 0..rest.len() {
            assert!(Task::from_bytes(&hashed(&rest[..len])).is_err(), "cut at {len}");
        }
        assert!(Task::from_bytes(&hashed(&[rest, &[0]].concat())).is_err());
        for at in 0..rest.len() {
            let mut flipped = rest.to_vec();
            flipped[at] ^= 0x80;
            // A token or a letter of a text may be another one; what matters is that this returns.
            let _ = Task::from_bytes(&hashed(&flipped));
        }
    }
}
