//! Made-up weights: for benchmarks of shapes that nobody wants to download, and for tests.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::DType;
use half::bf16;
use half::vec::HalfBitsVecExt as _;
use incipit_kernels::Frozen;
use rayon::prelude::*;

use crate::loading::Loading;
use crate::slice::Slice;
use crate::source::{Source, TensorInfo, matrix, missing, round};
use crate::{Error, Result};

/// A tensor to be made up: uniform numbers of the given mean and standard deviation.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The mean of its numbers (1 for a norm's scale, else 0).
    pub mean: f32,
    /// Their standard deviation; 0 makes them all equal to the mean.
    pub deviation: f32,
}

/// Random weights of given shapes. A number is a function of the seed, the tensor's name and its place in it; the bf16
/// weights of a seed are its f32 weights, rounded.
#[derive(Clone, Debug)]
pub struct Random {
    tensors: BTreeMap<String, RandomTensor>,
    dtype: DType,
    seed: u64,
    side_files: Vec<(String, Vec<u8>)>,
    loading: Arc<Loading>,
}

impl Random {
    /// Weights of these shapes, as `dtype` (bf16 or f32). They are made when they are asked for.
    ///
    /// # Errors
    /// If `dtype` is neither bf16 nor f32.
    pub fn new(tensors: Vec<RandomTensor>, dtype: DType, seed: u64) -> Result<Self> {
        if !matches!(dtype, DType::BF16 | DType::F32) {
            return Err(Error::TargetDType(dtype));
        }
        let tensors = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        Ok(Self { tensors, dtype, seed, side_files: Vec::new(), loading: Arc::default() })
    }

    /// How far those have got that are made; copies share it.
    #[must_use]
    pub fn loading(&self) -> Arc<Loading> {
        self.loading.clone()
    }

    /// Says that `bytes` of them are to be made now, so that [`Self::loading`] can tell of how much.
    pub fn expect(&self, bytes: u64) {
        self.loading.expect(bytes, true, false);
    }

    /// The same weights, with small files that belong to them (`config.json`) for when they are written down.
    #[must_use]
    pub fn with_side_files(mut self, files: Vec<(String, Vec<u8>)>) -> Self {
        self.side_files = files;
        self
    }
}

/// Numbers that one task makes at a time: a multiple of [`BATCH`], so that no draw is made twice.
const SLICE: usize = 1 << 18;

/// The finaliser of splitmix64 over a Weyl sequence: any element of the stream, at once.
#[inline(always)]
fn draw(key: u64, n: u64) -> u64 {
    let mut x = key.wrapping_add(n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn key(seed: u64, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    let digest = *hasher.finalize().as_bytes();
    digest[..8].iter().fold(0, |key, &byte| key << 8 | u64::from(byte))
}

/// Numbers that are drawn before any is turned into a weight: two loops that vectorise, where one would not.
const BATCH: usize = 256;

/// Makes the numbers of a stream from the `first`-th on, each through `finish`.
#[inline(always)]
fn fill<T>(out: &mut [T], key: u64, first: usize, finish: impl Fn(f32) -> T) {
    let (mut out, mut at) = (out, first);
    while !out.is_empty() {
        // Four numbers come of one draw; the first wanted may be any of them.
        let (next, skipped) = ((at / 4) as u64, at % 4);
        let mut halves = [0u16; BATCH];
        let wanted = (skipped + out.len()).next_multiple_of(4).min(BATCH);
        for (four, n) in halves[..wanted].chunks_exact_mut(4).zip(next..) {
            let bits = draw(key, n);
            let words = [bits as u16, (bits >> 16) as u16, (bits >> 32) as u16, (bits >> 48) as u16];
            four.copy_from_slice(&words);
        }
        let (batch, rest) = out.split_at_mut(out.len().min(BATCH - skipped));
        for (to, half) in batch.iter_mut().zip(&halves[skipped..]) {
            *to = finish(f32::from(*half as i16) + 0.5);
        }
        at += batch.len();
        out = rest;
    }
}

/// The numbers of a part of the tensor, each through `finish`, in the place of those of `out`.
fn generate<T: Send>(
    key: u64,
    tensor: &RandomTensor,
    slice: &Slice,
    mut out: Vec<T>,
    finish: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    // A uniform number of variance 1 lies within the square root of 3 of 0.
    let (mean, step) = (tensor.mean, tensor.deviation * 3f32.sqrt() / 32768.0);
    let (_, width) = matrix(&tensor.shape);
    let start = slice.rows.start * width + slice.cols.start;
    // Rows in their full width are one run of the stream, and are cut where it is cheap.
    let (run, pitch) = if slice.cols.len() == width { (SLICE, SLICE) } else { (slice.cols.len(), width) };
    out.par_chunks_mut(run.max(1)).enumerate().for_each(|(n, out)| {
        fill(out, key, start + n * pitch, |centred| finish(mean + step * centred));
    });
    out
}

impl Source for Random {
    fn tensors(&self) -> Vec<TensorInfo> {
        let infos = self.tensors.values().map(|tensor| TensorInfo {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            dtype: self.dtype,
        });
        infos.collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let (rows, cols) = matrix(shape);
        self.part(name, shape, 0..rows, 0..cols)
    }

    fn part(&self, name: &str, shape: &[usize], rows: Range<usize>, cols: Range<usize>) -> Result<Frozen> {
        let place = "the random weights";
        let Some(tensor) = self.tensors.get(name) else {
            return Err(missing(name, place.to_owned(), self.tensors.keys().map(String::as_str)));
        };
        if tensor.shape != shape {
            return Err(Error::WrongShape {
                name: name.to_owned(),
                place: place.to_owned(),
                expected: shape.to_vec(),
                found: tensor.shape.clone(),
            });
        }
        let slice = Slice::new(shape, rows, cols);
        let (rows, cols) = (slice.rows.len(), slice.cols.len());
        let key = key(self.seed, name);
        let count = slice.num_elements();
        let made = match self.dtype {
            DType::BF16 => {
                // The system has zeros ready for integers alone: others would be written here, by one thread.
                let zeros: Vec<bf16> = vec![0u16; count].reinterpret_into();
                Frozen::from_bf16(generate(key, tensor, &slice, zeros, round), rows, cols)
            }
            _ => Frozen::from_f32(generate(key, tensor, &slice, vec![0.0; count], |x| x), rows, cols),
        };
        self.loading.hand_out((count * self.dtype.size_in_bytes()) as u64);
        Ok(made)
    }

    fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(self.side_files.clone())
    }
}
