//! Small checkpoints in temporary directories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use incipit_weights::{Checkpoint, Source};
use tempfile::TempDir;

pub(crate) const CONFIG: &str = r#"{"model_type":"t5","d_model":4,"vocab_size":7,"torch_dtype":"float32"}"#;

/// A directory of the committed fixtures.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub(crate) fn tensor(values: &[f32], shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a small tensor")
}

/// Numbers that differ from one another and are not exact in bf16.
pub(crate) fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|n| (n as f32 - 3.0) / 7.0).collect()
}

pub(crate) fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).expect("a small tensor")
}

pub(crate) fn write_file(path: &Path, tensors: &[(&str, Tensor)]) {
    let tensors: BTreeMap<String, Tensor> =
        tensors.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
    safetensors::serialize_to_file(tensors.iter(), None, path).expect("a writable directory");
}

/// A directory with a configuration and one safetensors file.
pub(crate) fn single(tensors: &[(&str, Tensor)]) -> TempDir {
    let dir = with_config();
    write_file(&dir.path().join("model.safetensors"), tensors);
    dir
}

pub(crate) fn with_config() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("config.json"), CONFIG).expect("a writable directory");
    dir
}

/// A directory with a configuration, shards and their index.
pub(crate) fn sharded(shards: &[(&str, &[(&str, Tensor)])]) -> TempDir {
    let dir = with_config();
    let mut map = serde_json::Map::new();
    for (file, tensors) in shards {
        write_file(&dir.path().join(file), tensors);
        map.extend(tensors.iter().map(|(name, _)| ((*name).to_owned(), (*file).into())));
    }
    write_index(dir.path(), &serde_json::Value::Object(map));
    dir
}

pub(crate) fn write_index(dir: &Path, weight_map: &serde_json::Value) {
    let index = serde_json::json!({ "weight_map": weight_map }).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), index).expect("a writable directory");
}

/// All tensors of a source, as f32, by name.
pub(crate) fn contents(source: &dyn Source) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let read = |name: String, shape: Vec<usize>| {
        let values = source.convertible(&name, &shape).expect("a tensor it lists").to_f32();
        (name, (shape, values))
    };
    source.tensors().into_iter().map(|info| read(info.name, info.shape)).collect()
}

/// What opening the directory says is wrong.
pub(crate) fn refusal(dir: &Path) -> String {
    match Checkpoint::open(dir, DType::BF16) {
        Ok(checkpoint) => panic!("{checkpoint:?} was opened"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
pub(crate) fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}
