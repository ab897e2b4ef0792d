//! A model directory as a source of weights.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use half::{bf16, f16};
use incipit_kernels::{ByteOwner, Frozen};
use rayon::prelude::*;

use crate::error::{Error, Result, io};
use crate::fingerprint::{Fingerprint, Tensor};
use crate::layout::{self, Layout};
use crate::readers::{self, Entry};
use crate::source::{Source, TensorInfo, matrix, missing, round};
use crate::{mapped, tokenizer};

/// The file with the model's configuration.
pub(crate) const CONFIG_FILE: &str = "config.json";

/// The weights in a directory: `model.safetensors`, `pytorch_model.bin`, or either one in shards with an index.
///
/// Opening reads the tables of contents alone. Numbers are read from the mapped files when they are used, so that a
/// checkpoint larger than memory can be open.
pub struct Checkpoint {
    dir: PathBuf,
    dtype: DType,
    files: Vec<(PathBuf, ByteOwner)>,
    entries: BTreeMap<String, Entry>,
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
        for path in &layout.files {
            let content = mapped::map(path)?;
            for (name, entry) in readers::entries(layout.format, path, (*content).as_ref(), files.len())? {
                if let Some(first) = entries.get(&name) {
                    let first = layout.files[first.file].clone();
                    return Err(Error::DuplicateTensor { name, first, second: path.clone() });
                }
                entries.insert(name, entry);
            }
            files.push((path.clone(), content));
        }
        check_index(&layout, &entries)?;
        Ok(Self { dir: dir.to_owned(), dtype, files, entries })
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

    /// What identifies the weights and the architecture, whatever files they are in.
    ///
    /// Reads every number once, so this takes as long as reading the files does.
    ///
    /// # Errors
    /// If `config.json` is missing or is not a JSON object.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let config = self.config_json()?;
        let tensors = self.entries.iter().map(|(name, entry)| Tensor {
            name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: self.contiguous(entry),
        });
        Fingerprint::of(&config, tensors)
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

    /// The bytes of a tensor in row-major order.
    fn contiguous(&self, entry: &Entry) -> Cow<'_, [u8]> {
        let bytes = &(*self.files[entry.file].1).as_ref()[entry.bytes.clone()];
        match &entry.strides {
            None => Cow::Borrowed(bytes),
            Some(strides) => Cow::Owned(gather(bytes, entry.dtype.size_in_bytes(), &entry.shape, strides)),
        }
    }

    /// The tensor as it is stored, without a copy where its numbers follow one another.
    fn as_stored(&self, entry: &Entry) -> Result<Frozen> {
        let (rows, cols) = matrix(&entry.shape);
        let (owner, offset) = match self.contiguous(entry) {
            Cow::Borrowed(_) => (self.files[entry.file].1.clone(), entry.bytes.start),
            Cow::Owned(bytes) => (Arc::new(bytes) as ByteOwner, 0),
        };
        Ok(Frozen::mapped(owner, offset, entry.dtype, rows, cols)?)
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
        let entry = self.entry(name, shape)?;
        match (entry.dtype, self.dtype) {
            (DType::BF16, _) | (DType::F32, DType::F32) => self.as_stored(entry),
            (DType::F32, _) => Ok(bf16_from_f32(&self.contiguous(entry), &entry.shape)),
            _ => Err(self.unsupported(name, entry)),
        }
    }

    fn convertible(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let entry = self.entry(name, shape)?;
        if entry.dtype != DType::F16 {
            return self.frozen(name, shape);
        }
        let (rows, cols) = matrix(&entry.shape);
        let numbers = f16_numbers(&self.contiguous(entry));
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

/// Copies a strided tensor into row-major order.
fn gather(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut out = Vec::with_capacity(count * size);
    let mut at = vec![0usize; shape.len()];
    for _ in 0..count {
        let from = size * at.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>();
        out.extend_from_slice(&bytes[from..from + size]);
        for dim in (0..shape.len()).rev() {
            at[dim] += 1;
            if at[dim] < shape[dim] {
                break;
            }
            at[dim] = 0;
        }
    }
    out
}

/// Numbers that one task converts at a time.
const SLICE: usize = 1 << 18;

fn bf16_from_f32(bytes: &[u8], shape: &[usize]) -> Frozen {
    let (rows, cols) = matrix(shape);
    let mut out = vec![bf16::ZERO; rows * cols];
    out.par_chunks_mut(SLICE).zip(bytes.par_chunks(4 * SLICE)).for_each(|(out, bytes)| {
        for (to, from) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *to = round(f32::from_le_bytes([from[0], from[1], from[2], from[3]]));
        }
    });
    Frozen::from_bf16(out, rows, cols)
}

fn f16_numbers(bytes: &[u8]) -> Vec<f16> {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()
}
