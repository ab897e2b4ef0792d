//! Documents packed into segments of one length.

use std::collections::VecDeque;

use super::PretrainError;
use super::corpus::{Documents, Place};
use crate::error::Result;
use crate::tokenize::Encoder;

/// A document that has tokens.
struct Document {
    place: Place,
    /// Its tokens and `</s>`.
    ids: Vec<u32>,
}

/// The tokens of all documents end to end, cut every `length` tokens: T5's `reduce_concat_tokens` and `split_tokens`, but
/// that T5 puts no `</s>` behind a document, and begins anew every 128 documents.
pub(super) struct Segments {
    documents: Documents,
    encoder: Encoder,
    length: usize,
    ready: VecDeque<Document>,
    /// How many tokens of the first document that is ready are taken; never all.
    taken: usize,
}

impl Segments {
    pub(super) fn new(documents: Documents, encoder: Encoder, length: usize) -> Self {
        Self { documents, encoder, length, ready: VecDeque::new(), taken: 0 }
    }

    /// Where the next segment begins; none after the last epoch. It is the place of a token that is there, so that it does
    /// not depend on how far documents are read ahead.
    pub(super) fn place(&mut self) -> Result<Option<Place>> {
        if self.ready.is_empty() {
            self.read_on()?;
        }
        Ok(self.ready.front().map(|document| Place { token: self.taken, ..document.place }))
    }

    /// The next segment; none if fewer tokens are left, after the last epoch.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u32>>> {
        let mut segment = Vec::with_capacity(self.length);
        while segment.len() < self.length {
            if self.ready.is_empty() {
                self.read_on()?;
            }
            let Some(document) = self.ready.front() else { return Ok(None) };
            let rest = &document.ids[self.taken..];
            let part = &rest[..rest.len().min(self.length - segment.len())];
            segment.extend_from_slice(part);
            self.taken += part.len();
            if self.taken == document.ids.len() {
                self.ready.pop_front();
                self.taken = 0;
            }
        }
        Ok(Some(segment))
    }

    /// Goes to a place that [`Self::place`] gave.
    pub(super) fn seek(&mut self, place: Place) -> Result<()> {
        self.documents.seek(place)?;
        self.ready.clear();
        self.taken = 0;
        if place.token > 0 {
            self.read_on()?;
            let is_there = |document: &Document| {
                document.place == Place { token: 0, ..place } && place.token < document.ids.len()
            };
            if !self.ready.front().is_some_and(is_there) {
                return Err(PretrainError::OtherStream.into());
            }
            self.taken = place.token;
        }
        Ok(())
    }

    /// Makes documents ready: some, unless the last epoch is over.
    fn read_on(&mut self) -> Result<()> {
        let next_epoch = self.documents.epoch() + 1;
        while self.ready.is_empty() {
            let chunk = self.documents.read()?;
            if chunk.is_empty() {
                return Ok(());
            }
            let texts = chunk.iter().map(|(_, text)| text.as_str()).collect();
            for ((place, _), mut ids) in chunk.iter().zip(self.encoder.encode(texts)?) {
                if !ids.is_empty() {
                    ids.push(self.encoder.end_mark());
                    self.ready.push_back(Document { place: *place, ids });
                }
            }
            // By now a whole epoch has been read without a token.
            if self.ready.is_empty() && self.documents.epoch() > next_epoch {
                return Err(self.documents.empty());
            }
        }
        Ok(())
    }
}
