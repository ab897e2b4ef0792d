//! A model directory as a source of weights.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use half::f16;
use incipit_kernels::Frozen;
use rayon::prelude::*;

use crate::digests::{Cut, Digests};
use crate::error::{Error, Result, io};
use crate::fingerprint::{Fingerprint, SHARED, uses_shared};
use crate::layout::{self, Layout};
use crate::loading::Loading;
use crate::mapped::Mapped;
use crate::readers::{self, Entry};
use crate::reads::Reads;
use crate::slice::{Slice, bf16_from_f32, f16_numbers, gather};
use crate::source::{Source, TensorInfo, matrix, missing, round};
use crate::tokenizer;

/// The file with the model's configuration.
pub(crate) const CONFIG_FILE: &str = "config.json";

/// The weights in a directory: `model.safetensors`, `pytorch_model.bin`, or either one in shards with an index.
///
/// Opening reads the tables of contents alone. Numbers are read from the mapped files when they are used, so that a
/// checkpoint larger than memory can be open.
pub struct Checkpoint {
    dir: PathBuf,
    dtype: DType,
    files: Vec<(PathBuf, Mapped)>,
    entries: BTreeMap<String, Entry>,
    /// Bytes of the files' tables of contents.
    table_bytes: u64,
    reads: Reads,
    loading: Arc<Loading>,
}

impl Checkpoint {
    /// Opens the weights in `dir`.
    ///
    /// With `dtype` bf16, f32 tensors are converted as they are asked for, one at a time; with f32, tensors come as they
    /// are stored. bf16 tensors always stay bf16: computing with them in f32 is exact.
    ///
    /// # Errors
    /// If `dtype` is neither bf16 nor f32, the directory or its weights are missing, an index does not agree with its
    /// shards, or a file is cut short or broken.
    pub fn open(dir: &Path, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::BF16 | DType::F32) {
            return Err(Error::TargetDType(dtype));
        }
        let layout = layout::find(dir)?;
        let mut files = Vec::new();
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        let mut table_bytes = 0;
        for path in &layout.files {
            let file = Mapped::open(path)?;
            let contents = readers::contents(layout.format, path, file.bytes(), files.len())?;
            table_bytes += contents.num_bytes;
            for (name, entry) in contents.entries {
                if let Some(first) = entries.get(&name) {
                    let first = layout.files[first.file].clone();
                    return Err(Error::DuplicateTensor { name, first, second: path.clone() });
                }
                entries.insert(name, entry);
            }
            files.push((path.clone(), file));
        }
        check_index(&layout, &entries)?;
        let (reads, loading) = Default::default();
        Ok(Self { dir: dir.to_owned(), dtype, files, entries, table_bytes, reads, loading })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files that hold the weights.
    #[must_use]
    pub fn files(&self) -> Vec<&Path> {
        self.files.iter().map(|(path, _)| path.as_path()).collect()
    }

    /// The content of `config.json`.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn config_json(&self) -> Result<String> {
        let path = self.dir.join(CONFIG_FILE);
        if !path.exists() {
            return Err(Error::NoConfig(self.dir.clone()));
        }
        std::fs::read_to_string(&path).map_err(io("read", &path))
    }

    /// Numbers in the model. Copies of the shared embedding, which some files hold under further names, count once.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        let shared = self.entries.get("shared.weight");
        let is_copy = |name: &str, entry: &Entry| match shared {
            Some(shared) if name != "shared.weight" && shared.shape == entry.shape => {
                name.ends_with(".embed_tokens.weight")
                    || (shared.file == entry.file
                        && shared.bytes == entry.bytes
                        && shared.strides == entry.strides)
            }
            _ => false,
        };
        let own = self.entries.iter().filter(|(name, entry)| !is_copy(name, entry));
        own.map(|(_, entry)| entry.num_elements() as u64).sum()
    }

    /// Bytes of the files that were asked for so far: the tables of contents, the tensors and slices that were handed out,
    /// and what was hashed. A number that was asked for twice counts once.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.table_bytes + self.reads.bytes()
    }

    /// How far the model that is loaded from it has got.
    #[must_use]
    pub fn loading(&self) -> Arc<Loading> {
        self.loading.clone()
    }

    /// Says that `bytes` are to be loaded now, so that [`Self::loading`] can tell of how much: on to a device with a memory of its own, if
    /// `copied`; and hashed after that, if `hashed`.
    pub fn expect(&self, bytes: u64, copied: bool, hashed: bool) {
        let converts = |entry: &Entry| entry.dtype == DType::F32 && self.dtype == DType::BF16;
        self.loading.expect(bytes, copied || self.entries.values().any(converts), hashed);
    }

    /// Notes that a slice was handed out.
    fn hand_out(&self, name: &str, entry: &Entry, slice: &Slice) {
        self.reads.add(name, entry, slice);
        self.loading.hand_out((slice.num_elements() * entry.dtype.size_in_bytes()) as u64);
    }

    /// What identifies the weights and the architecture, whatever files they are in. `dim` names the dim along which the
    /// ranks of a replica share a tensor, if they do; it must be the same wherever fingerprints are compared.
    ///
    /// Reads every number once, so this takes as long as reading the files does.
    ///
    /// # Errors
    /// If `config.json` is missing or is not a JSON object.
    pub fn fingerprint(&self, dim: &dyn Fn(&str) -> Option<usize>) -> Result<Fingerprint> {
        self.fingerprint_of(&self.fingerprint_parts(dim, &|parts| 0..parts))
    }

    /// Hashes a share of the weights: of a tensor that is cut into n parts, the parts `share(n)`. A tensor is cut along its
    /// dim `dim(name)` into the largest power of two that divides it, 64 at most, and is one part without such a dim. With
    /// `|n| rank * n / ranks..(rank + 1) * n / ranks` at each of 1, 2, 4, ... ranks, a rank hashes its own slices.
    ///
    /// # Panics
    /// If `share` names parts that there are not.
    pub fn fingerprint_parts(
        &self,
        dim: &dyn Fn(&str) -> Option<usize>,
        share: &dyn Fn(usize) -> Range<usize>,
    ) -> Digests {
        let mut digests = Digests::default();
        let has_shared = self.contains(SHARED);
        for (name, entry) in &self.entries {
            // A copy of the embedding is cut as the embedding is, so that it is known as one.
            let role = if has_shared && uses_shared(name) { SHARED } else { name.as_str() };
            let cut = Cut::new(&entry.shape, dim(role));
            let range = share(cut.parts());
            if range.is_empty() {
                continue;
            }
            let slice = cut.slice(range.clone());
            self.reads.add(name, entry, &slice);
            // Of a tensor that is cut by columns, each task gathers the part that it hashes.
            let hash = |part: usize| {
                let bytes = self.numbers(entry, &cut.slice(part..part + 1));
                let digest = *blake3::Hasher::new().update_rayon(&bytes).finalize().as_bytes();
                self.loading.hash(bytes.len() as u64);
                digest
            };
            let all = || range.clone().into_par_iter().map(hash).collect::<Vec<_>>();
            let parts = self.reading(entry, &slice, all);
            digests.add(name, entry, (&cut, range.start), &parts);
        }
        digests
    }

    /// The fingerprint of the weights of which these are the digests: what [`Checkpoint::fingerprint`] gives.
    ///
    /// # Errors
    /// If a part's digest is missing or two differ, or `config.json` is missing or is not a JSON object.
    pub fn fingerprint_of(&self, digests: &Digests) -> Result<Fingerprint> {
        let config = self.config_json()?;
        Fingerprint::of(&config, &digests.of_tensors(self.entries.iter())?)
            .map_err(|detail| Error::Config { file: self.dir.join(CONFIG_FILE), detail })
    }

    fn path(&self, entry: &Entry) -> &Path {
        &self.files[entry.file].0
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<&Entry> {
        let Some(entry) = self.entries.get(name) else {
            let names = self.entries.keys().map(String::as_str);
            return Err(missing(name, self.dir.display().to_string(), names));
        };
        if entry.shape != shape {
            return Err(Error::WrongShape {
                name: name.to_owned(),
                place: self.path(entry).display().to_string(),
                expected: shape.to_vec(),
                found: entry.shape.clone(),
            });
        }
        Ok(entry)
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].1.bytes()[entry.bytes.clone()]
    }

    /// Runs `read`, which reads this slice, without its reading what lies around the slice.
    fn reading<T>(&self, entry: &Entry, slice: &Slice, read: impl FnOnce() -> T) -> T {
        /// The least that a system reads. With smaller gaps between the rows, it is all read in any case.
        const PAGE: usize = 4096;
        let count = slice.num_elements();
        if entry.strides.is_some() || count == 0 || count == entry.num_elements() {
            return read();
        }
        let ((_, width), size) = (matrix(&entry.shape), entry.dtype.size_in_bytes());
        let bytes = |row: usize, cols: &Range<usize>| {
            let row = entry.bytes.start + row * width * size;
            row + cols.start * size..row + cols.end * size
        };
        let (rows, file) = (slice.rows.clone(), &self.files[entry.file].1);
        let span = bytes(rows.start, &(0..width)).start..bytes(rows.end, &(0..0)).end;
        if (width - slice.cols.len()) * size < PAGE {
            file.reading(span.clone(), std::iter::once(span), read)
        } else {
            file.reading(span, rows.map(|row| bytes(row, &slice.cols)), read)
        }
    }

    /// The bytes of a slice in row-major order.
    fn numbers(&self, entry: &Entry, slice: &Slice) -> Cow<'_, [u8]> {
        let (bytes, (_, width)) = (self.bytes(entry), matrix(&entry.shape));
        if entry.strides.is_none() && slice.cols.len() == width {
            let row = width * entry.dtype.size_in_bytes();
            return Cow::Borrowed(&bytes[slice.rows.start * row..slice.rows.end * row]);
        }
        Cow::Owned(gather(bytes, entry, slice))
    }

    /// The slice as it is stored: a view of the file, unless its rows are not regular or not aligned there.
    fn as_stored(&self, entry: &Entry, slice: &Slice) -> Result<Frozen> {
        let ((_, width), size) = (matrix(&entry.shape), entry.dtype.size_in_bytes());
        let (rows, cols) = (slice.rows.len(), slice.cols.len());
        let aligned = self.bytes(entry).as_ptr().addr().is_multiple_of(size);
        if entry.strides.is_none() && aligned {
            let offset = entry.bytes.start + slice.rows.start * width * size;
            let owner = self.files[entry.file].1.owner();
            let rows_of_file = Frozen::mapped(owner, offset, entry.dtype, rows, width)?;
            return Ok(rows_of_file.part((0, rows), (slice.cols.start, cols)));
        }
        let own = self.reading(entry, slice, || Arc::new(self.numbers(entry, slice).into_owned()));
        Ok(Frozen::mapped(own, 0, entry.dtype, rows, cols)?)
    }

    fn unsupported(&self, name: &str, entry: &Entry) -> Error {
        let (name, file) = (name.to_owned(), self.path(entry).to_owned());
        match entry.dtype {
            DType::F16 => Error::Float16 { name, file },
            other => Error::UnsupportedDType { name, file, dtype: other.as_str().to_owned() },
        }
    }
}

impl Source for Checkpoint {
    fn tensors(&self) -> Vec<TensorInfo> {
        let infos = self.entries.iter().map(|(name, entry)| TensorInfo {
            name: name.clone(),
            shape: entry.shape.clone(),
            dtype: entry.dtype,
        });
        infos.collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let (rows, cols) = matrix(shape);
        self.part(name, shape, 0..rows, 0..cols)
    }

    fn part(&self, name: &str, shape: &[usize], rows: Range<usize>, cols: Range<usize>) -> Result<Frozen> {
        let entry = self.entry(name, shape)?;
        let slice = Slice::new(shape, rows, cols);
        match (entry.dtype, self.dtype) {
            (DType::BF16, _) | (DType::F32, DType::F32) => {
                self.hand_out(name, entry, &slice);
                self.as_stored(entry, &slice)
            }
            (DType::F32, _) => {
                self.hand_out(name, entry, &slice);
                let convert =
                    || bf16_from_f32(&self.numbers(entry, &slice), slice.rows.len(), slice.cols.len());
                Ok(self.reading(entry, &slice, convert))
            }
            _ => Err(self.unsupported(name, entry)),
        }
    }

    fn convertible(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let entry = self.entry(name, shape)?;
        if entry.dtype != DType::F16 {
            return self.frozen(name, shape);
        }
        let (rows, cols) = matrix(&entry.shape);
        let whole = Slice::whole(shape);
        self.hand_out(name, entry, &whole);
        let numbers = f16_numbers(&self.numbers(entry, &whole));
        Ok(match self.dtype {
            DType::BF16 => {
                Frozen::from_bf16(numbers.into_par_iter().map(|x| round(x.to_f32())).collect(), rows, cols)
            }
            _ => Frozen::from_f32(numbers.into_par_iter().map(f16::to_f32).collect(), rows, cols),
        })
    }

    fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        for name in [CONFIG_FILE, "generation_config.json"].iter().chain(tokenizer::FILES) {
            let path = self.dir.join(name);
            if path.is_file() {
                found.push(((*name).to_owned(), std::fs::read(&path).map_err(io("read", &path))?));
            }
        }
        Ok(found)
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint {} ({} tensors, {:?})", self.dir.display(), self.entries.len(), self.dtype)
    }
}

/// Each tensor of the index must be in the shard it names.
fn check_index(layout: &Layout, entries: &BTreeMap<String, Entry>) -> Result<()> {
    let Some((index, weight_map)) = &layout.index else { return Ok(()) };
    let dir = index.parent().unwrap_or(Path::new(""));
    for (name, shard) in weight_map {
        let held = entries.get(name).is_some_and(|entry| layout.files[entry.file] == dir.join(shard));
        if !held {
            return Err(Error::NotInShard { index: index.clone(), name: name.clone(), shard: shard.clone() });
        }
    }
    Ok(())
}
