//! NumPy's `.npy`, the format in which google-research/prompt-tuning keeps prompts.

use crate::{Error, Result, atomic, prompt::Prompt};
use half::f16;
use std::path::Path;

/// What every file of this format begins with.
pub const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// Reads a prompt `[P, D]`, or `[L, P, D]` with rows for each of `L` layers, in format version 1, 2 or 3, C order, little-endian f4, f2 (exact in f32) or f8
/// (rounded to f32).
///
/// # Errors If the file cannot be read, is truncated, or holds anything else; the message says what, and how
/// to save it instead.
pub fn read(path: &Path) -> Result<Prompt> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode(&bytes).map_err(|what| Error::PromptFile { path: path.to_owned(), what })
}

/// Writes a prompt as `[P, D]` f4, or `[L, P, D]`, atomically. Where its rows stand is not told.
///
/// # Errors
/// If the system refuses.
pub fn write(path: &Path, prompt: &Prompt) -> Result<()> {
    atomic::write_file(path, &encode(prompt))
}

/// The bytes of the file, as numpy.save writes them.
fn encode(prompt: &Prompt) -> Vec<u8> {
    let shape: Vec<String> = prompt.shape().iter().map(usize::to_string).collect();
    let shape = shape.join(", ");
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}");
    let preamble = MAGIC.len() + 4;
    let padded = (preamble + header.len() + 1).next_multiple_of(64) - preamble;
    header.extend(std::iter::repeat_n(' ', padded - 1 - header.len()));
    header.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend((padded as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(prompt.values().iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

fn decode(bytes: &[u8]) -> Result<Prompt, String> {
    let (header, data) = split(bytes)?;
    if field(header, "fortran_order")?.starts_with("True") {
        return Err("it is in Fortran order; save it with numpy.ascontiguousarray(prompt)".to_owned());
    }
    let shape = shape(header)?;
    let descr = quoted(field(header, "descr")?).ok_or("its header names no plain element type")?;
    let (size, decode): (usize, fn(&[u8]) -> f32) = match descr {
        "<f4" => (4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        "<f2" => (2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
        "<f8" => (8, |b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32),
        other => {
            return Err(format!("its elements are {other:?}; save it with prompt.astype(numpy.float32)"));
        }
    };
    let numbers = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    let expected = numbers.and_then(|n| n.checked_mul(size)).ok_or("its shape is too large")?;
    if data.len() != expected {
        return Err(format!(
            "it should hold {expected} bytes of numbers ({} of {size} bytes) and holds {}; \
             it was not written or copied to the end",
            shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
            data.len()
        ));
    }
    let values = data.chunks_exact(size).map(decode).collect();
    Prompt::of_shape(&shape, values)
}

/// The header's text, and what comes after it.
fn split(bytes: &[u8]) -> Result<(&str, &[u8]), String> {
    let truncated = || "it ends within its header; it was not written or copied to the end".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is no .npy file: it does not begin with \\x93NUMPY")?;
    let (len, rest) = match rest {
        [1, _, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        [version, _, _, _, ..] => return Err(format!("its format version is {version}, not 1, 2 or 3")),
        _ => return Err(truncated()),
    };
    let (header, data) = rest.split_at_checked(len).ok_or_else(truncated)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is no text")?;
    Ok((header, data))
}

/// What follows `'name':` in the header, a Python dictionary.
fn field<'a>(header: &'a str, name: &str) -> Result<&'a str, String> {
    let missing = || format!("its header has no {name:?}");
    let after = [format!("'{name}'"), format!("\"{name}\"")]
        .iter()
        .find_map(|key| header.split_once(key.as_str()))
        .ok_or_else(missing)?
        .1;
    Ok(after.trim_start().strip_prefix(':').ok_or_else(missing)?.trim_start())
}

/// The text between the quotes with which `value` begins.
fn quoted(value: &str) -> Option<&str> {
    let quote = value.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    value[1..].split_once(quote).map(|(text, _)| text)
}

fn shape(header: &str) -> Result<Vec<usize>, String> {
    let value = field(header, "shape")?;
    let inside = value.strip_prefix('(').and_then(|v| v.split_once(')')).ok_or("its header has no shape")?.0;
    let dims: Vec<&str> = inside.split(',').map(str::trim).filter(|d| !d.is_empty()).collect();
    if !(2..=3).contains(&dims.len()) {
        let dims = "two dimensions, rows and d_model, or three, with layers before them";
        return Err(format!("its shape is ({inside}), and a prompt has {dims}"));
    }
    // Python 2 wrote its long integers with an L.
    let parse = |d: &&str| d.trim_end_matches('L').parse().map_err(|_| format!("its shape is ({inside})"));
    dims.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([version, 0]);
        match version {
            1 => bytes.extend((header.len() as u16).to_le_bytes()),
            _ => bytes.extend((header.len() as u32).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn prompt() -> Prompt {
        Prompt::new(2, 3, vec![1.0, -2.5, 3e-42, 0.0, -0.0, 1e30]).unwrap()
    }

    const F4: &str = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";

    #[test]
    fn what_is_written_is_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompt.npy");
        write(&path, &prompt()).unwrap();
        let bits = |p: &Prompt| p.values().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read(&path).unwrap()), bits(&prompt()));
        assert_eq!(std::fs::read(&path).unwrap().len(), 128 + 24);
    }

    /// Written by numpy 2.3: `numpy.save("a", numpy.array([[1, 2], [3, 4]], numpy.float32))`.
    #[test]
    fn the_bytes_are_numpys() {
        let ours = encode(&Prompt::new(2, 2, vec![1.0, 2.0, 3.0, 4.0]).unwrap());
        let mut numpys =
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }".to_vec();
        numpys.extend([b' '; 58]);
        numpys.extend(b"\n\x00\x00\x80?\x00\x00\x00@\x00\x00@@\x00\x00\x80@");
        assert_eq!(ours, numpys);
    }

    #[test]
    fn versions_1_2_and_3_are_read() {
        let data: Vec<u8> = prompt().values().iter().flat_map(|v| v.to_le_bytes()).collect();
        for version in [1, 2, 3] {
            assert_eq!(decode(&file(version, F4, &data)).unwrap(), prompt());
        }
        assert!(decode(&file(4, F4, &data)).unwrap_err().contains("version is 4"));
    }

    #[test]
    fn headers_of_other_writers_are_read() {
        let data = [0u8; 24];
        for header in [
            "{\"shape\":(2,3),\"fortran_order\":False,\"descr\":\"<f4\"}",
            "{ 'shape' : (2L, 3L,), 'descr' : '<f4', 'fortran_order' : False }   \n",
        ] {
            let read = decode(&file(1, header, &data)).unwrap();
            assert_eq!((read.length(), read.width()), (2, 3));
        }
    }

    #[test]
    fn f2_and_f8_are_converted() {
        let values = [1.5f64, -0.25];
        let f8: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f2: Vec<u8> = values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect();
        for (descr, data) in [("<f8", f8), ("<f2", f2)] {
            let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (1, 2), }}");
            assert_eq!(decode(&file(1, &header, &data)).unwrap().values(), [1.5, -0.25]);
        }
    }

    #[test]
    fn three_dimensions_are_rows_for_layers() {
        let values = (0..12).map(|i| i as f32).collect();
        let prompt = Prompt::of_layers(2, 3, 2, values).unwrap();
        assert!(encode(&prompt).windows(9).any(|part| part == b"(2, 3, 2)"));
        assert_eq!(decode(&encode(&prompt)).unwrap(), prompt);
    }

    #[test]
    fn what_cannot_be_a_prompt_is_refused_with_the_mend() {
        let with = |from: &str, to: &str| decode(&file(1, &F4.replace(from, to), &[0; 24])).unwrap_err();
        assert!(with("False", "True").contains("numpy.ascontiguousarray"));
        assert!(with("<f4", ">f4").contains("astype(numpy.float32)"));
        assert!(with("<f4", "|O").contains("\"|O\""));
        assert!(with("(2, 3)", "(6,)").contains("two dimensions"));
        assert!(with("(2, 3)", "(1, 1, 2, 3)").contains("two dimensions"));
        assert!(with("(2, 3)", "(2, x)").contains("(2, x)"));
        assert!(with("(2, 3)", "(18446744073709551615, 3)").contains("too large"));
        assert!(decode(&file(1, &F4.replace("2", "0"), &[])).unwrap_err().contains("no rows"));
        assert!(with("shape", "form").contains("\"shape\""));
        assert!(with("'descr': '<f4'", "'descr': [('a', '<f4')]").contains("element type"));
        assert!(decode(b"PK\x03\x04").unwrap_err().contains("no .npy file"));
        let nan: Vec<u8> = [f32::NAN; 6].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(decode(&file(1, F4, &nan)).unwrap_err().contains("row 0"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = encode(&prompt());
        for len in 0..whole.len() {
            let error = decode(&whole[..len]).unwrap_err();
            assert!(error.contains("to the end") || error.contains("no .npy"), "cut at {len}: {error}");
        }
        let mut longer = whole;
        longer.push(0);
        assert!(decode(&longer).is_err());
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        assert!(read(&path).unwrap_err().to_string().contains("x.npy"));
        std::fs::write(&path, "text").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("x.npy: it is no .npy file"));
    }
}
