//! The two containers of weights: safetensors, and PyTorch's zip of a pickle and raw storages. Of either only the table of
//! contents is read; the numbers stay where they are.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, pickle};
use safetensors::{SafeTensorError, SafeTensors};

use crate::layout::Format;
use crate::{Error, Result};

/// Where a tensor lies in a file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Which of the checkpoint's files.
    pub(crate) file: usize,
    /// The bytes from its first number to its last.
    pub(crate) bytes: Range<usize>,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Numbers between neighbours along each dim, where they do not simply follow one another (a saved transpose).
    pub(crate) strides: Option<Vec<usize>>,
}

impl Entry {
    pub(crate) fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a file's table of contents says.
pub(crate) struct Contents {
    /// The tensors in the file.
    pub(crate) entries: Vec<(String, Entry)>,
    /// Bytes of the table.
    pub(crate) num_bytes: u64,
}

/// The tensors in the file at `path`, whose bytes are `content` and which is the `file`-th of its checkpoint.
pub(crate) fn contents(format: Format, path: &Path, content: &[u8], file: usize) -> Result<Contents> {
    let found = match format {
        Format::Safetensors => safetensors_contents(path, content, file)?,
        Format::Pickle => pickle_contents(path, content, file)?,
    };
    if found.entries.is_empty() {
        return Err(unreadable(path, "it holds no tensors; download the weights again"));
    }
    Ok(found)
}

fn unreadable(file: &Path, detail: impl Into<String>) -> Error {
    Error::Unreadable { file: file.to_owned(), detail: detail.into() }
}

fn truncated(file: &Path, detail: impl Into<String>) -> Error {
    Error::Truncated { file: file.to_owned(), detail: detail.into() }
}

fn safetensors_contents(path: &Path, content: &[u8], file: usize) -> Result<Contents> {
    let (header, metadata) =
        SafeTensors::read_metadata(content).map_err(|e| header_error(path, content, &e))?;
    let data = 8 + header;
    let mut found = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = DType::try_from(info.dtype).map_err(|_| Error::UnsupportedDType {
            name: name.clone(),
            file: path.to_owned(),
            dtype: format!("{:?}", info.dtype),
        })?;
        let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
        found.push((name, Entry { file, bytes, dtype, shape: info.shape.clone(), strides: None }));
    }
    Ok(Contents { entries: found, num_bytes: data as u64 })
}

fn header_error(path: &Path, content: &[u8], error: &SafeTensorError) -> Error {
    let len = content.len();
    match error {
        SafeTensorError::HeaderTooSmall => truncated(path, format!("it has {len} bytes, less than a header")),
        SafeTensorError::InvalidHeaderLength => {
            truncated(path, format!("its header alone is longer than its {len} bytes"))
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            truncated(path, format!("its header describes more or less data than its {len} bytes hold"))
        }
        SafeTensorError::HeaderTooLarge => unreadable(
            path,
            "it does not begin like a safetensors file (is it a Git LFS pointer, or another format?); download it again",
        ),
        other => unreadable(path, format!("its header is broken ({other}); download it again")),
    }
}

/// The first bytes of what `torch.save` wrote before PyTorch 1.6: a pickle of protocol 2 that is a long integer.
const LEGACY_TORCH: [u8; 4] = [0x80, 0x02, 0x8a, 0x0a];

fn pickle_contents(path: &Path, content: &[u8], file: usize) -> Result<Contents> {
    if content.starts_with(&LEGACY_TORCH) {
        return Err(unreadable(
            path,
            "it was written by a PyTorch older than 1.6; load it with torch.load and write it with torch.save once",
        ));
    }
    let mut archive = zip::ZipArchive::new(Cursor::new(content)).map_err(|error| {
        if content.starts_with(b"PK") {
            truncated(path, format!("the table at the end of the archive is missing ({error})"))
        } else {
            unreadable(path, format!("it is not a file of torch.save ({error}); download it again"))
        }
    })?;
    let mut found = Vec::new();
    for info in table_of_contents(path)? {
        let storage = storage_range(path, &mut archive, &info)?;
        found.push((info.name.clone(), pickle_entry(path, &info, &storage, file)?));
    }
    Ok(Contents { entries: found, num_bytes: table_bytes(content, &mut archive) })
}

/// Bytes of the pickle, and of the archive's own table, which ends the file.
fn table_bytes(content: &[u8], archive: &mut zip::ZipArchive<Cursor<&[u8]>>) -> u64 {
    let pickle = (0..archive.len()).find_map(|i| {
        let member = archive.by_index_raw(i).ok()?;
        member.name().ok()?.ends_with("data.pkl").then(|| member.compressed_size())
    });
    (content.len() as u64).saturating_sub(archive.central_directory_start()) + pickle.unwrap_or(0)
}

/// The tensors that the pickle in the archive describes.
fn table_of_contents(path: &Path) -> Result<Vec<pickle::TensorInfo>> {
    // The unpickler indexes into tuples without a check, so that a pickle made by hand can make it panic.
    let read = std::panic::catch_unwind(|| pickle::read_pth_tensor_info(path, false, None));
    match read {
        Ok(Ok(infos)) => Ok(infos),
        Ok(Err(error)) => {
            Err(unreadable(path, format!("its pickle does not hold a state_dict of tensors ({error})")))
        }
        Err(_) => Err(unreadable(path, "its pickle does not describe its tensors as PyTorch does")),
    }
}

/// Where in the file the storage of a tensor lies.
fn storage_range(
    path: &Path,
    archive: &mut zip::ZipArchive<Cursor<&[u8]>>,
    info: &pickle::TensorInfo,
) -> Result<Range<usize>> {
    let broken = |detail: String| unreadable(path, format!("the storage of {} {detail}", info.name));
    let member =
        archive.by_name(&info.path).map_err(|error| broken(format!("is not in the archive ({error})")))?;
    if member.compression() != zip::CompressionMethod::Stored {
        return Err(broken("is compressed; write the file again with torch.save".to_owned()));
    }
    let start = member.data_start().ok_or_else(|| broken("cannot be located".to_owned()))?;
    let start = usize::try_from(start).map_err(|_| broken("lies beyond what can be addressed".to_owned()))?;
    let len =
        usize::try_from(member.size()).map_err(|_| broken("is longer than can be addressed".to_owned()))?;
    Ok(start..start.saturating_add(len))
}

fn pickle_entry(
    path: &Path,
    info: &pickle::TensorInfo,
    storage: &Range<usize>,
    file: usize,
) -> Result<Entry> {
    let shape = info.layout.dims().to_vec();
    let size = info.dtype.size_in_bytes();
    let strides = (!info.layout.is_contiguous()).then(|| info.layout.stride().to_vec());
    // candle's unpickler gives the offset in bytes.
    let start = storage.start.checked_add(info.layout.start_offset());
    let span = span(&shape, info.layout.stride()).and_then(|n| n.checked_mul(size));
    let bytes = start.zip(span).and_then(|(start, span)| Some(start..start.checked_add(span)?));
    match bytes {
        Some(bytes) if bytes.end <= storage.end => {
            Ok(Entry { file, bytes, dtype: info.dtype, shape, strides })
        }
        _ => Err(truncated(
            path,
            format!(
                "{} of shape {shape:?} does not fit into its storage of {} bytes",
                info.name,
                storage.len()
            ),
        )),
    }
}

/// Numbers from the first to the last of a strided tensor, both counted; `None` if that cannot be counted.
fn span(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (&n, &stride) in shape.iter().zip(strides) {
        last = last.checked_add((n - 1).checked_mul(stride)?)?;
    }
    last.checked_add(1)
}
