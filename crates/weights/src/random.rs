//! Made-up weights: for benchmarks of shapes that nobody wants to download, and for tests.

use std::collections::BTreeMap;

use candle_core::DType;
use half::bf16;
use incipit_kernels::Frozen;
use rayon::prelude::*;

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
        Ok(Self { tensors, dtype, seed, side_files: Vec::new() })
    }

    /// The same weights, with small files that belong to them (`config.json`) for when they are written down.
    #[must_use]
    pub fn with_side_files(mut self, files: Vec<(String, Vec<u8>)>) -> Self {
        self.side_files = files;
        self
    }
}

/// Numbers that one task makes at a time: a multiple of [`BATCH`], and so of the four that come of one draw.
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

/// The tensor's numbers, each through `finish`.
fn generate<T: Copy + Send>(
    key: u64,
    tensor: &RandomTensor,
    zero: T,
    finish: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let count: usize = tensor.shape.iter().product();
    // A uniform number of variance 1 lies within the square root of 3 of 0.
    let (mean, step) = (tensor.mean, tensor.deviation * 3f32.sqrt() / 32768.0);
    let mut out = vec![zero; count];
    out.par_chunks_mut(SLICE).enumerate().for_each(|(slice, out)| {
        let mut next = (slice * SLICE / 4) as u64;
        for batch in out.chunks_mut(BATCH) {
            let mut halves = [0u16; BATCH];
            for four in halves.chunks_exact_mut(4) {
                let bits = draw(key, next);
                four.copy_from_slice(&[
                    bits as u16,
                    (bits >> 16) as u16,
                    (bits >> 32) as u16,
                    (bits >> 48) as u16,
                ]);
                next += 1;
            }
            for (to, half) in batch.iter_mut().zip(halves) {
                let centred = f32::from(half as i16) + 0.5;
                *to = finish(mean + step * centred);
            }
        }
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
        let (rows, cols) = matrix(shape);
        let key = key(self.seed, name);
        Ok(match self.dtype {
            DType::BF16 => Frozen::from_bf16(generate(key, tensor, bf16::ZERO, round), rows, cols),
            _ => Frozen::from_f32(generate(key, tensor, 0.0, |x| x), rows, cols),
        })
    }

    fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(self.side_files.clone())
    }
}
