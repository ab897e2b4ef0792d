//! Small f32 tensors in safetensors files.

use crate::optimizer::NamedTensor;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::HashMap;

/// The bytes of a file of f32 tensors, marked as PyTorch's loaders want it.
pub(crate) fn encode(tensors: &[(&str, &[usize], &[f32])]) -> Result<Vec<u8>, String> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(.., data)| data.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        TensorView::new(Dtype::F32, shape.to_vec(), bytes).map(|view| (*name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| e.to_string())
}

/// The tensors of a file, as f32 (f16 and bf16 are exact in it), in the order of their names.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    let file =
        SafeTensors::deserialize(bytes).map_err(|e| format!("it is no whole safetensors file ({e})"))?;
    let mut tensors = file.iter().map(|(name, view)| read(name, &view)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn read(name: &str, view: &TensorView<'_>) -> Result<NamedTensor, String> {
    let bytes = view.data();
    let pairs = || bytes.as_chunks::<2>().0.iter();
    let data = match view.dtype() {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(format!("its tensor {name:?} is {other:?}, not f32, f16 or bf16")),
    };
    Ok(NamedTensor { name: name.to_owned(), shape: view.shape().to_vec(), data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_read_back_bit_for_bit_and_the_bytes_are_always_the_same() {
        let b = [1.0, f32::MIN_POSITIVE, -0.0];
        let tensors: [(&str, &[usize], &[f32]); 2] = [("b", &[1, 3], &b), ("a", &[2], &[5.0, 6.0])];
        let bytes = encode(&tensors).unwrap();
        assert!((0..5).all(|_| encode(&tensors).unwrap() == bytes));
        let read = decode(&bytes).unwrap();
        assert_eq!(read.iter().map(|t| &*t.name).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(read[1].shape, [1, 3]);
        assert!(read[1].data.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()));
        assert!(decode(&encode(&[]).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn half_floats_are_widened_and_integers_refused() {
        let one_file = |dtype, bytes: &[u8]| {
            let view = TensorView::new(dtype, vec![bytes.len() * 8 / dtype.bitsize()], bytes).unwrap();
            decode(&safetensors::serialize([("x", view)], None).unwrap())
        };
        assert_eq!(one_file(Dtype::BF16, &bf16::from_f32(1.5).to_le_bytes()).unwrap()[0].data, [1.5]);
        assert_eq!(one_file(Dtype::F16, &f16::from_f32(1.5).to_le_bytes()).unwrap()[0].data, [1.5]);
        assert!(one_file(Dtype::I32, &[0; 4]).unwrap_err().contains("\"x\" is I32"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let bytes = encode(&[("a", &[2], &[5.0, 6.0])]).unwrap();
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).unwrap_err().contains("no whole safetensors file"), "cut at {len}");
        }
    }
}
