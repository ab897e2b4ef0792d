//! Bytes of any length, by operations on tensors.

use candle_core::{DType, Device, Tensor};

use crate::{Collective, Result};

/// The bytes that `root` gives. What the others give is not looked at.
///
/// # Errors
/// As [`Collective::broadcast`].
pub fn broadcast_bytes(group: &dyn Collective, bytes: &[u8], root: usize) -> Result<Vec<u8>> {
    let length = Tensor::from_slice(&[bytes.len() as i64], 1, &Device::Cpu)?;
    let length = group.broadcast(&length, root)?.to_vec1::<i64>()?[0] as usize;
    if length == 0 {
        return Ok(Vec::new());
    }
    let mine = if group.rank() == root {
        Tensor::from_slice(bytes, length, &Device::Cpu)?
    } else {
        Tensor::zeros(length, DType::U8, &Device::Cpu)?
    };
    Ok(group.broadcast(&mine, root)?.to_vec1()?)
}

/// Everybody's bytes, by rank.
///
/// # Errors
/// As [`Collective::all_gather`].
pub fn gather_bytes(group: &dyn Collective, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let length = Tensor::from_slice(&[bytes.len() as i64], 1, &Device::Cpu)?;
    let lengths = group.all_gather(&length)?.to_vec1::<i64>()?;
    let longest = lengths.iter().copied().max().unwrap_or_default() as usize;
    if longest == 0 {
        return Ok(vec![Vec::new(); lengths.len()]);
    }
    let mut padded = bytes.to_vec();
    padded.resize(longest, 0);
    let all = group.all_gather(&Tensor::from_vec(padded, longest, &Device::Cpu)?)?.to_vec1::<u8>()?;
    Ok(all.chunks(longest).zip(lengths).map(|(part, length)| part[..length as usize].to_vec()).collect())
}
