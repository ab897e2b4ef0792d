//! Tensors as bytes, and the reductions.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use half::bf16;

use crate::{Reduce, Result};

/// What can be moved.
pub(crate) const MOVED: [DType; 4] = [DType::F32, DType::BF16, DType::I64, DType::U8];
/// What can be reduced.
pub(crate) const REDUCED: [DType; 3] = [DType::F32, DType::BF16, DType::I64];
/// The most dims of a tensor: so many fit in a frame.
pub(crate) const MAX_DIMS: usize = 6;

/// Numbers of a block that are reduced together, so that the sums stay in the nearest cache.
const BLOCK: usize = 1024;

/// Why `x` is no operand, if it is none: its type must be one of `dtypes`.
pub(crate) fn refuse(x: &Tensor, dtypes: &[DType]) -> Option<String> {
    if x.rank() > MAX_DIMS {
        return Some(format!("the tensor has {} dims; reshape it to {MAX_DIMS} at most", x.rank()));
    }
    if !dtypes.contains(&x.dtype()) {
        let names: Vec<_> = dtypes.iter().map(|d| d.as_str()).collect();
        return Some(format!(
            "the tensor is of {}; convert it to one of {}",
            x.dtype().as_str(),
            names.join(", ")
        ));
    }
    None
}

/// Why `x` cannot be gathered, if it cannot.
pub(crate) fn refuse_gather(x: &Tensor) -> Option<String> {
    if x.rank() == 0 {
        return Some("a single number has no dim along which to gather; reshape it to [1]".to_owned());
    }
    refuse(x, &MOVED)
}

/// Why `x` cannot be sent from `root` to the `size` ranks of a group, if it cannot.
pub(crate) fn refuse_broadcast(x: &Tensor, root: usize, size: usize) -> Option<String> {
    if root >= size {
        return Some(format!("there is no root {root} among {size} ranks; ranks count from 0"));
    }
    refuse(x, &MOVED)
}

/// Bytes of one number. Only for types of [`MOVED`].
pub(crate) fn width(dtype: DType) -> usize {
    dtype.size_in_bytes()
}

/// A number on its way.
trait Number: WithDType + Copy {
    /// What sums of it are kept in.
    type Sum: Copy + Default;
    /// As many bytes as it has: an array, so that loops over them become vector code.
    type Bytes;
    fn split(bytes: &[u8]) -> &[Self::Bytes];
    fn split_mut(bytes: &mut [u8]) -> &mut [Self::Bytes];
    fn read(bytes: &Self::Bytes) -> Self;
    fn write(self) -> Self::Bytes;
    fn widen(self) -> Self::Sum;
    fn narrow(sum: Self::Sum) -> Self;
    fn add(a: Self::Sum, b: Self::Sum) -> Self::Sum;
    fn larger(a: Self::Sum, b: Self::Sum) -> Self::Sum;
}

macro_rules! moved {
    ($type:ty) => {
        type Bytes = [u8; size_of::<$type>()];
        fn split(bytes: &[u8]) -> &[Self::Bytes] {
            bytes.as_chunks().0
        }
        fn split_mut(bytes: &mut [u8]) -> &mut [Self::Bytes] {
            bytes.as_chunks_mut().0
        }
        #[inline(always)]
        fn read(bytes: &Self::Bytes) -> Self {
            Self::from_le_bytes(*bytes)
        }
        #[inline(always)]
        fn write(self) -> Self::Bytes {
            self.to_le_bytes()
        }
    };
}

/// NaN if either is NaN.
#[inline(always)]
fn larger_float(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}

impl Number for f32 {
    type Sum = f32;
    moved!(f32);
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(sum: f32) -> Self {
        sum
    }
    #[inline(always)]
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn larger(a: f32, b: f32) -> f32 {
        larger_float(a, b)
    }
}

impl Number for bf16 {
    type Sum = f32;
    moved!(bf16);
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// The nearest, ties to even; without branches, so that loops over it become vector code.
    #[inline(always)]
    fn narrow(sum: f32) -> Self {
        let bits = sum.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x0040_0000;
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        Self::from_bits(((if is_nan { quiet } else { rounded }) >> 16) as u16)
    }
    #[inline(always)]
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn larger(a: f32, b: f32) -> f32 {
        larger_float(a, b)
    }
}

impl Number for i64 {
    type Sum = i64;
    moved!(i64);
    #[inline(always)]
    fn widen(self) -> i64 {
        self
    }
    #[inline(always)]
    fn narrow(sum: i64) -> Self {
        sum
    }
    #[inline(always)]
    fn add(a: i64, b: i64) -> i64 {
        a.wrapping_add(b)
    }
    #[inline(always)]
    fn larger(a: i64, b: i64) -> i64 {
        a.max(b)
    }
}

fn write_all<T: Number>(values: &[T], bytes: &mut [u8]) {
    for (value, bytes) in values.iter().zip(T::split_mut(bytes)) {
        *bytes = value.write();
    }
}

/// The numbers of `x` by row, followed by zeros up to `len` bytes.
///
/// # Errors
/// If `x` cannot be brought to main memory, or is not of one of the types of [`MOVED`].
pub(crate) fn to_bytes(x: &Tensor, len: usize) -> Result<Vec<u8>> {
    let x = x.contiguous()?.to_device(&Device::Cpu)?;
    let (storage, layout) = x.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + x.elem_count();
    let mut bytes = vec![0; len];
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => write_all(&values[range], &mut bytes),
        Storage::Cpu(CpuStorage::BF16(values)) => write_all(&values[range], &mut bytes),
        Storage::Cpu(CpuStorage::I64(values)) => write_all(&values[range], &mut bytes),
        Storage::Cpu(CpuStorage::U8(values)) => bytes[..x.elem_count()].copy_from_slice(&values[range]),
        _ => {
            let what = format!("{} on {:?} cannot be moved", x.dtype().as_str(), x.device().location());
            return Err(candle_core::Error::Msg(what).into());
        }
    }
    Ok(bytes)
}

fn read_all<'a, T: Number>(
    parts: impl Iterator<Item = &'a [u8]>,
    dims: &[usize],
    device: &Device,
) -> Result<Tensor> {
    let count = dims.iter().product();
    let mut values: Vec<T> = Vec::with_capacity(count);
    for part in parts {
        let wanted = count - values.len();
        values.extend(T::split(part).iter().take(wanted).map(T::read));
    }
    Ok(Tensor::from_vec(values, dims, device)?)
}

/// The tensor on `device` whose numbers lie one after the other in `parts`; what is left over after them is not read.
///
/// # Errors
/// If there are too few numbers, or the device cannot take them.
pub(crate) fn from_bytes<'a>(
    dtype: DType,
    dims: &[usize],
    device: &Device,
    parts: impl Iterator<Item = &'a [u8]>,
) -> Result<Tensor> {
    match dtype {
        DType::F32 => read_all::<f32>(parts, dims, device),
        DType::BF16 => read_all::<bf16>(parts, dims, device),
        DType::I64 => read_all::<i64>(parts, dims, device),
        _ => {
            let count = dims.iter().product();
            let mut values: Vec<u8> = Vec::with_capacity(count);
            for part in parts {
                values.extend(&part[..part.len().min(count - values.len())]);
            }
            Ok(Tensor::from_vec(values, dims, device)?)
        }
    }
}

fn reduce_all<T: Number>(parts: &[&[u8]], combine: impl Fn(T::Sum, T::Sum) -> T::Sum) -> Vec<u8> {
    let Some((first, rest)) = parts.split_first() else { return Vec::new() };
    let (first, mut out) = (T::split(first), vec![0; first.len()]);
    let rest: Vec<_> = rest.iter().map(|part| T::split(part)).collect();
    let mut sums = [T::Sum::default(); BLOCK];
    for (b, out) in T::split_mut(&mut out).chunks_mut(BLOCK).enumerate() {
        let range = b * BLOCK..b * BLOCK + out.len();
        let sums = &mut sums[..out.len()];
        for (sum, x) in sums.iter_mut().zip(&first[range.clone()]) {
            *sum = T::read(x).widen();
        }
        for part in &rest {
            for (sum, x) in sums.iter_mut().zip(&part[range.clone()]) {
                *sum = combine(*sum, T::read(x).widen());
            }
        }
        for (sum, out) in sums.iter().zip(out) {
            *out = T::narrow(*sum).write();
        }
    }
    out
}

/// The numbers of `parts`, which are of one length, reduced in the order of the parts: each by a chain of its own.
pub(crate) fn reduce(dtype: DType, parts: &[&[u8]], reduce: Reduce) -> Vec<u8> {
    match (dtype, reduce) {
        (DType::BF16, Reduce::Sum) => reduce_all::<bf16>(parts, bf16::add),
        (DType::BF16, Reduce::Max) => reduce_all::<bf16>(parts, bf16::larger),
        (DType::I64, Reduce::Sum) => reduce_all::<i64>(parts, <i64 as Number>::add),
        (DType::I64, Reduce::Max) => reduce_all::<i64>(parts, i64::larger),
        (_, Reduce::Sum) => reduce_all::<f32>(parts, <f32 as Number>::add),
        (_, Reduce::Max) => reduce_all::<f32>(parts, f32::larger),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bf16_is_rounded_as_half_rounds_it(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            prop_assert_eq!(<bf16 as Number>::narrow(x).to_bits(), bf16::from_f32(x).to_bits(), "{}", x);
        }

        #[test]
        fn a_sum_does_not_depend_on_place_or_neighbours(
            numbers in prop::collection::vec(any::<[u32; 3]>(), 1..3000), shift in 0usize..40,
        ) {
            // NaN has many patterns, and adding them is free to choose.
            let finite = |bits: u32| f32::from_bits(bits & 0xfeff_ffff);
            let part = |rank: usize, shift: usize| -> Vec<u8> {
                let zeros = std::iter::repeat_n(0f32, shift);
                zeros.chain(numbers.iter().map(|n| finite(n[rank]))).flat_map(f32::to_le_bytes).collect()
            };
            let sum = |shift: usize| {
                let parts = [0, 1, 2].map(|rank| part(rank, shift));
                reduce(DType::F32, &parts.each_ref().map(|p| &p[..]), Reduce::Sum)[4 * shift..].to_vec()
            };
            prop_assert_eq!(sum(shift), sum(0));
        }
    }
}
