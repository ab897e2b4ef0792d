//! Weights into safetensors files.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::DType;
use incipit_kernels::{Frozen, FrozenSlice};
use serde_json::{Map, Value, json};

use crate::checkpoint::CONFIG_FILE;
use crate::error::{Error, Result, io};
use crate::source::{Source, TensorInfo, round};

/// What [`write_safetensors`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The files with weights, in the directory they were written to.
    pub files: Vec<PathBuf>,
    /// Tensors in all of them.
    pub num_tensors: usize,
    /// Bytes of numbers in all of them.
    pub num_bytes: u64,
}

/// Writes all tensors of `source` as `dtype` (bf16 or f32) into the directory `dir`, with the source's side files: as
/// `model.safetensors`, or, if that would exceed `max_shard_bytes`, as shards with an index. A tensor is never cut, so
/// that a shard can exceed `max_shard_bytes` if one tensor does.
///
/// One tensor is in memory at a time. Everything is written and synced beside `dir` and then renamed, so that `dir` is
/// whole or absent, whatever happens. f16 sources are taken (see [`Source::convertible`]).
///
/// # Errors
/// If `dir` exists and is not empty, `dtype` is another, a tensor cannot be read, or the disk refuses.
pub fn write_safetensors(
    dir: &Path,
    source: &dyn Source,
    dtype: DType,
    max_shard_bytes: u64,
) -> Result<Written> {
    if !matches!(dtype, DType::BF16 | DType::F32) {
        return Err(Error::TargetDType(dtype));
    }
    refuse_taken(dir)?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    let temporary = temporary_beside(dir, parent)?;

    let shards = plan(source.tensors(), dtype, max_shard_bytes);
    let names: Vec<String> = (1..=shards.len()).map(|n| shard_name(n, shards.len())).collect();
    let mut num_bytes = 0;
    for (name, tensors) in names.iter().zip(&shards) {
        num_bytes += write_shard(&temporary.path().join(name), source, tensors, dtype)?;
    }
    if shards.len() > 1 {
        write_index(&temporary.path().join("model.safetensors.index.json"), &names, &shards, num_bytes)?;
    }
    for (name, content) in source.side_files()? {
        let content = if name == CONFIG_FILE { with_dtype(content, dtype) } else { content };
        write_synced(&temporary.path().join(name), &content)?;
    }
    sync_dir(temporary.path())?;
    // An empty directory in the way is replaced by the same rename.
    fs::rename(temporary.path(), dir).map_err(io("rename the finished files to", dir))?;
    let _ = temporary.keep();
    sync_dir(parent)?;
    let files = names.iter().map(|name| dir.join(name)).collect();
    Ok(Written { files, num_tensors: shards.iter().map(Vec::len).sum(), num_bytes })
}

fn refuse_taken(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let mut content = fs::read_dir(dir).map_err(io("list", dir))?;
    if content.next().is_some() { Err(Error::NotEmpty(dir.to_owned())) } else { Ok(()) }
}

/// A directory on the same file system, removed when dropped.
fn temporary_beside(dir: &Path, parent: &Path) -> Result<tempfile::TempDir> {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.partial-");
    builder.prefix(&prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As `mkdir` makes them, less the umask; temporary directories are otherwise closed to all but the owner.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    // The kind alone: the message would name the directory that could not be made.
    builder.tempdir_in(parent).map_err(|error| io("create a directory in", parent)(error.kind().into()))
}

fn size_of(tensor: &TensorInfo, dtype: DType) -> u64 {
    (tensor.shape.iter().product::<usize>() * dtype.size_in_bytes()) as u64
}

/// Cuts the list of tensors into shards, in order.
fn plan(tensors: Vec<TensorInfo>, dtype: DType, max_shard_bytes: u64) -> Vec<Vec<TensorInfo>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let size = size_of(&tensor, dtype);
        if filled > 0 && filled + size > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}

fn shard_name(number: usize, of: usize) -> String {
    if of == 1 { "model.safetensors".to_owned() } else { format!("model-{number:05}-of-{of:05}.safetensors") }
}

/// Writes one file, and returns the bytes of numbers in it.
fn write_shard(path: &Path, source: &dyn Source, tensors: &[TensorInfo], dtype: DType) -> Result<u64> {
    let (header, len) = header(tensors, dtype);
    let file = File::create(path).map_err(io("create", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io("write", path))?;
    out.write_all(&header).map_err(io("write", path))?;
    for tensor in tensors {
        let frozen = source.convertible(&tensor.name, &tensor.shape)?;
        write_numbers(&mut out, &frozen, dtype).map_err(io("write", path))?;
    }
    let file = out.into_inner().map_err(|error| io("write", path)(error.into_error()))?;
    file.sync_all().map_err(io("sync", path))?;
    Ok(len)
}

/// The header of a safetensors file, and the bytes of numbers after it.
fn header(tensors: &[TensorInfo], dtype: DType) -> (Vec<u8>, u64) {
    /// The numbers begin at a multiple of this, so that mapped rows lie well for vector loads.
    const ALIGNMENT: usize = 64;
    let mut fields = Map::new();
    fields.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut at = 0;
    for tensor in tensors {
        let end = at + size_of(tensor, dtype);
        let name = if dtype == DType::BF16 { "BF16" } else { "F32" };
        let entry = json!({ "dtype": name, "shape": tensor.shape, "data_offsets": [at, end] });
        fields.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut header = Value::Object(fields).to_string().into_bytes();
    let padded = (8 + header.len()).next_multiple_of(ALIGNMENT) - 8;
    header.resize(padded, b' ');
    (header, at)
}

fn write_numbers(out: &mut impl Write, frozen: &Frozen, dtype: DType) -> std::io::Result<()> {
    // Numbers that are put into bytes at a time.
    const SLICE: usize = 1 << 16;
    let (rows, cols, stride) = (frozen.rows(), frozen.cols(), frozen.stride());
    let (rows, cols) = if stride == cols { (1, rows * cols) } else { (rows, cols) };
    let mut buffer = Vec::with_capacity(4 * SLICE);
    for row in 0..rows {
        for from in (0..cols).step_by(SLICE) {
            let range = row * stride + from..row * stride + cols.min(from + SLICE);
            buffer.clear();
            match (frozen.values(), dtype) {
                (FrozenSlice::Bf16(v), DType::BF16) => extend(&mut buffer, &v[range], |x| x.to_le_bytes()),
                (FrozenSlice::Bf16(v), _) => extend(&mut buffer, &v[range], |x| x.to_f32().to_le_bytes()),
                (FrozenSlice::F32(v), DType::BF16) => {
                    extend(&mut buffer, &v[range], |x| round(x).to_le_bytes());
                }
                (FrozenSlice::F32(v), _) => extend(&mut buffer, &v[range], f32::to_le_bytes),
            }
            out.write_all(&buffer)?;
        }
    }
    Ok(())
}

fn extend<T: Copy, const N: usize>(buffer: &mut Vec<u8>, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
    buffer.extend(values.iter().flat_map(|&value| bytes(value)));
}

fn write_index(path: &Path, names: &[String], shards: &[Vec<TensorInfo>], num_bytes: u64) -> Result<()> {
    let of_shard = |(name, tensors): (&String, &Vec<TensorInfo>)| {
        let name = name.clone();
        tensors.iter().map(move |tensor| (tensor.name.clone(), Value::from(name.clone()))).collect::<Vec<_>>()
    };
    let weight_map: Map<String, Value> = names.iter().zip(shards).flat_map(of_shard).collect();
    let index = json!({ "metadata": { "total_size": num_bytes }, "weight_map": weight_map });
    write_synced(path, format!("{index:#}\n").as_bytes())
}

/// The configuration, naming the type that the weights now have. One that is no JSON object is kept as it is.
fn with_dtype(config: Vec<u8>, dtype: DType) -> Vec<u8> {
    let Ok(mut fields) = serde_json::from_slice::<Map<String, Value>>(&config) else { return config };
    let name = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = fields.get_mut(key) {
            *value = Value::from(name);
        }
    }
    format!("{:#}\n", Value::Object(fields)).into_bytes()
}

fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(io("create", path))?;
    file.write_all(content).map_err(io("write", path))?;
    file.sync_all().map_err(io("sync", path))
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}
