//! The documents of a corpus, one after another.

use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PretrainError;
use super::random::{Draw, Random};
use crate::error::{BadRecord, Error, Problem, Result};
use crate::source::{Format, Record, Records, TEXT_FIELD, location, open_records};
use crate::template::{field_list, kind};

/// Documents are read together up to this many bytes of text, so that they can be tokenized in parallel.
const CHUNK_BYTES: usize = 1 << 18;

/// Where a token stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Of the passes over the corpus, from 0.
    pub(super) epoch: u64,
    /// In the order of the epoch's files.
    pub(super) file: usize,
    /// Of the file's documents.
    pub(super) record: u64,
    /// Of the document's tokens.
    pub(super) token: usize,
}

/// A file of a corpus.
pub(super) struct CorpusFile {
    path: PathBuf,
    format: Format,
    gzip: bool,
    pub(super) bytes: u64,
}

/// The files of a corpus, those of a directory in the order of their names. What a directory holds besides is passed
/// over; what is named itself must be a file of text.
pub(super) fn files(paths: &[PathBuf]) -> Result<Vec<CorpusFile>> {
    let mut found = Vec::new();
    for path in paths {
        walk(path, true, &mut found)?;
    }
    if found.is_empty() { Err(empty(paths.iter())) } else { Ok(found) }
}

fn walk(path: &Path, named: bool, found: &mut Vec<CorpusFile>) -> Result<()> {
    let cannot_open = |cause| Error::Open { path: path.to_path_buf(), cause };
    let metadata = fs::metadata(path).map_err(cannot_open)?;
    if metadata.is_dir() {
        let entries = fs::read_dir(path).map_err(cannot_open)?;
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(cannot_open)?;
        names.retain(|name| !name.as_encoded_bytes().starts_with(b"."));
        names.sort();
        return names.into_iter().try_for_each(|name| walk(&path.join(name), false, found));
    }
    match format(path) {
        Some(_) if metadata.len() == 0 => Err(Error::EmptyFile { path: path.to_path_buf() }),
        Some((format, gzip)) => {
            found.push(CorpusFile { path: path.to_path_buf(), format, gzip, bytes: metadata.len() });
            Ok(())
        }
        None if named => Err(PretrainError::NotACorpusFile { path: path.to_path_buf() }.into()),
        None => Ok(()),
    }
}

/// As [`Format::of`], and `.txt` for a text a line.
fn format(path: &Path) -> Option<(Format, bool)> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    match name.strip_suffix(".gz").unwrap_or(&name).ends_with(".txt") {
        true => Some((Format::Text, name.ends_with(".gz"))),
        false => Format::of(path),
    }
}

fn empty<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Error {
    const MOST: usize = 3;
    let names: Vec<String> = paths.map(|path| path.display().to_string()).collect();
    let mut shown = names[..names.len().min(MOST)].join(", ");
    if names.len() > MOST {
        shown.push_str(&format!(" and {} more", names.len() - MOST));
    }
    PretrainError::EmptyCorpus { paths: shown }.into()
}

/// Reads a corpus over and over.
pub(super) struct Documents {
    files: Vec<CorpusFile>,
    /// If files are shuffled, by what.
    seed: Option<u64>,
    epochs: Option<NonZeroU64>,
    /// The epoch's order of files.
    order: Vec<usize>,
    /// Where the next document is; its file may have none left.
    next: Place,
    records: Option<Records>,
}

impl Documents {
    pub(super) fn new(files: Vec<CorpusFile>, seed: Option<u64>, epochs: Option<NonZeroU64>) -> Self {
        let mut documents =
            Self { files, seed, epochs, order: Vec::new(), next: Place::default(), records: None };
        documents.start_epoch(0);
        documents
    }

    /// The epoch that is being read.
    pub(super) fn epoch(&self) -> u64 {
        self.next.epoch
    }

    /// The error for a corpus without text.
    pub(super) fn empty(&self) -> Error {
        empty(self.files.iter().map(|file| &file.path))
    }

    /// Goes to a document.
    pub(super) fn seek(&mut self, place: Place) -> Result<()> {
        if place.file >= self.files.len() {
            return Err(PretrainError::OtherStream.into());
        }
        self.start_epoch(place.epoch);
        self.next = Place { token: 0, ..place };
        let records = self.records.insert(self.files[self.order[place.file]].open()?);
        for _ in 0..place.record {
            if !records.pass()? {
                return Err(PretrainError::OtherStream.into());
            }
        }
        Ok(())
    }

    /// The next few documents, of one epoch but for the last of them; none after the last epoch.
    pub(super) fn read(&mut self) -> Result<Vec<(Place, String)>> {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        let epoch = self.epoch();
        while bytes < CHUNK_BYTES && self.epoch() == epoch {
            let Some((place, text)) = self.next()? else { break };
            bytes += text.len();
            chunk.push((place, text));
        }
        Ok(chunk)
    }

    fn next(&mut self) -> Result<Option<(Place, String)>> {
        let mut without_text = 0;
        loop {
            if self.next.file == self.files.len() {
                self.start_epoch(self.next.epoch + 1);
            }
            if self.epochs.is_some_and(|epochs| self.next.epoch >= epochs.get()) {
                return Ok(None);
            }
            let file = &self.files[self.order[self.next.file]];
            let records = match &mut self.records {
                Some(records) => records,
                None => self.records.insert(file.open()?),
            };
            if let Some(record) = records.next() {
                let place = self.next;
                self.next.record += 1;
                let (number, record) = record?;
                return Ok(Some((place, file.text(number, record)?)));
            }
            self.records = None;
            self.next = Place { file: self.next.file + 1, record: 0, ..self.next };
            without_text += 1;
            if without_text > self.files.len() {
                return Err(self.empty());
            }
        }
    }

    fn start_epoch(&mut self, epoch: u64) {
        self.next = Place { epoch, ..Place::default() };
        self.records = None;
        self.order = (0..self.files.len()).collect();
        if let Some(seed) = self.seed {
            Random::new(seed, Draw::Files, epoch).shuffle(&mut self.order);
        }
    }
}

impl CorpusFile {
    fn open(&self) -> Result<Records> {
        open_records(&self.path, self.format, self.gzip)
    }

    /// A record's text.
    fn text(&self, number: usize, mut record: Record) -> Result<String> {
        let found = match record.remove(TEXT_FIELD) {
            Some(Value::String(text)) => return Ok(text),
            Some(other) => format!("{} in the field `{TEXT_FIELD}`", kind(&other)),
            None => format!("only {}", field_list(&record)),
        };
        let location = location(&self.path, number);
        Err(Error::Record(Box::new(BadRecord { location, problem: Problem::NotADocument { found } })))
    }
}
