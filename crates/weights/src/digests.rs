//! The digests of a checkpoint's parts, which ranks that share the hashing send one another.

use std::collections::BTreeMap;
use std::ops::Range;

use prost::Message;

use crate::error::{Error, Result};
use crate::fingerprint::field;
use crate::readers::Entry;
use crate::slice::Slice;
use crate::source::matrix;

/// The parts that a tensor is cut into for hashing: as many as the largest power of two that divides the dim along which
/// ranks share it, up to [`MAX_PARTS`]; one if they do not share it.
///
/// So the ranks of a replica hash what they read anyway, and the result does not depend on how many they are.
#[derive(Clone, Debug)]
pub(crate) struct Cut<'a> {
    shape: &'a [usize],
    parts: usize,
    by_rows: bool,
}

/// More ranks than this would no longer have whole parts.
const MAX_PARTS: usize = 64;

impl<'a> Cut<'a> {
    /// A tensor of this shape, shared along `dim`. Nothing is shared along a dim that the tensor does not have, or one
    /// beyond the second.
    pub(crate) fn new(shape: &'a [usize], dim: Option<usize>) -> Self {
        let (size, by_rows) = match (dim, shape) {
            (Some(0), [n]) => (*n, false), // a vector is one row
            (Some(0), [n, ..]) => (*n, true),
            (Some(1), [_, n, ..]) => (*n, false),
            _ => (1, true),
        };
        let parts = 1 << size.trailing_zeros().min(MAX_PARTS.trailing_zeros());
        Self { shape, parts, by_rows }
    }

    pub(crate) fn parts(&self) -> usize {
        self.parts
    }

    /// What the parts `range` are together.
    pub(crate) fn slice(&self, range: Range<usize>) -> Slice {
        let (height, width) = matrix(self.shape);
        let scaled = |size: usize| range.start * (size / self.parts)..range.end * (size / self.parts);
        if self.by_rows {
            Slice::new(self.shape, scaled(height), 0..width)
        } else {
            Slice::new(self.shape, 0..height, scaled(width))
        }
    }
}

/// Digests of parts of a checkpoint's tensors. Those of all parts, by whomever they were made, are what a
/// [`Fingerprint`](crate::Fingerprint) is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Digests {
    records: Vec<Record>,
}

/// Parts of one tensor that follow one another.
#[derive(Clone, PartialEq, Message)]
struct Record {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    dtype: String,
    #[prost(uint64, repeated, tag = "3")]
    shape: Vec<u64>,
    /// Parts of the tensor in all.
    #[prost(uint32, tag = "4")]
    parts: u32,
    /// The first of those that are here.
    #[prost(uint32, tag = "5")]
    first: u32,
    /// Their digests, in order.
    #[prost(bytes = "vec", repeated, tag = "6")]
    digests: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Records {
    #[prost(message, repeated, tag = "1")]
    records: Vec<Record>,
}

impl Digests {
    /// As bytes that can be sent to another rank.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        Records { records: self.records.clone() }.encode_to_vec()
    }

    /// What [`Digests::to_bytes`] made.
    ///
    /// # Errors
    /// If the bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let Records { records } =
            Records::decode(bytes).map_err(|e| Error::Digests(format!("they cannot be read ({e})")))?;
        let whole = |record: &Record| {
            (1..=MAX_PARTS).contains(&(record.parts as usize))
                && record.first as usize + record.digests.len() <= record.parts as usize
                && record.digests.iter().all(|digest| digest.len() == 32)
        };
        match records.iter().find(|record| !whole(record)) {
            Some(record) => {
                Err(Error::Digests(format!("what they say of {:?} cannot be right", record.name)))
            }
            None => Ok(Self { records }),
        }
    }

    /// Adds what another rank hashed.
    pub fn merge(&mut self, other: Self) {
        self.records.extend(other.records);
    }

    /// Adds the digests of parts that follow one another.
    pub(crate) fn add(
        &mut self,
        name: &str,
        entry: &Entry,
        (cut, first): (&Cut<'_>, usize),
        digests: &[[u8; 32]],
    ) {
        self.records.push(Record {
            name: name.to_owned(),
            dtype: entry.dtype.as_str().to_owned(),
            shape: entry.shape.iter().map(|&n| n as u64).collect(),
            parts: cut.parts as u32,
            first: first as u32,
            digests: digests.iter().map(|digest| digest.to_vec()).collect(),
        });
    }

    /// One digest for each of `tensors`, in their order.
    pub(crate) fn of_tensors<'a>(
        &self,
        tensors: impl Iterator<Item = (&'a String, &'a Entry)>,
    ) -> Result<Vec<(&'a str, [u8; 32])>> {
        let mut by_name: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
        for record in &self.records {
            by_name.entry(&record.name).or_default().push(record);
        }
        let mut found = Vec::new();
        for (name, entry) in tensors {
            let records = by_name.remove(name.as_str()).unwrap_or_default();
            found.push((name.as_str(), of_tensor(name, entry, &records)?));
        }
        match by_name.keys().next() {
            None => Ok(found),
            Some(name) => {
                Err(Error::Digests(format!("a rank hashed {name}, which these weights do not have")))
            }
        }
    }
}

/// The digest of a tensor: of its type, its shape, and the digests of its parts.
fn of_tensor(name: &str, entry: &Entry, records: &[&Record]) -> Result<[u8; 32]> {
    let parts = records.first().map_or(0, |record| record.parts);
    let mut slots: Vec<Option<&Vec<u8>>> = vec![None; parts as usize];
    for record in records {
        let same_shape = record.shape.iter().copied().eq(entry.shape.iter().map(|&n| n as u64));
        if !same_shape || record.dtype != entry.dtype.as_str() || record.parts != parts {
            return Err(Error::Digests(format!(
                "{name} is {} of {:?} in {parts} parts at one rank and {} of {:?} in {} parts at another",
                entry.dtype.as_str(),
                entry.shape,
                record.dtype,
                record.shape,
                record.parts
            )));
        }
        let first = record.first as usize;
        for (part, digest) in (first..).zip(&record.digests) {
            if slots[part].replace(digest).is_some_and(|other| other != digest) {
                return Err(Error::Digests(format!("two ranks read part {part} of {name} differently")));
            }
        }
    }
    let mut hasher = blake3::Hasher::new();
    field(&mut hasher, entry.dtype.as_str().as_bytes());
    for n in [entry.shape.len()].iter().chain(&entry.shape) {
        hasher.update(&(*n as u64).to_le_bytes());
    }
    hasher.update(&u64::from(parts).to_le_bytes());
    for (part, digest) in slots.iter().enumerate() {
        let missing = || Error::Digests(format!("part {part} of the {parts} of {name} is missing"));
        hasher.update(digest.ok_or_else(missing)?);
    }
    if parts == 0 {
        return Err(Error::Digests(format!("no rank hashed {name}")));
    }
    Ok(*hasher.finalize().as_bytes())
}
