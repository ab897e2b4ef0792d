//! A written model is the model that was read, and is there whole or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use candle_core::DType;
use incipit_kernels::Frozen;
use incipit_weights::{
    Checkpoint, Error, Random, RandomTensor, Result, Source, TensorInfo, write_safetensors,
};

use crate::support::{contents, fixture, says};

const PLENTY: u64 = 1 << 40;

fn listing(dir: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn a_model_rewritten_as_f32_is_the_same_model() {
    let source = Checkpoint::open(&fixture("bin"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("new/model");
    let written = write_safetensors(&dir, &source, DType::F32, PLENTY).unwrap();
    assert_eq!(written.files, [dir.join("model.safetensors")]);
    assert_eq!((written.num_tensors, written.num_bytes), (7, 4 * (4 * 28 + 2 * 24 + 4)));
    let read = Checkpoint::open(&dir, DType::F32).unwrap();
    assert_eq!(contents(&read), contents(&source));
    assert_eq!(listing(&parent.path().join("new")).len(), 1, "nothing is left beside it");
}

#[test]
fn a_model_rewritten_as_bf16_is_rounded_and_says_so() {
    let source = Checkpoint::open(&fixture("bin"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    write_safetensors(&dir, &source, DType::BF16, PLENTY).unwrap();
    let read = Checkpoint::open(&dir, DType::BF16).unwrap();
    assert!(read.tensors().iter().all(|tensor| tensor.dtype == DType::BF16));
    assert_eq!(contents(&read), contents(&Checkpoint::open(&fixture("bin"), DType::BF16).unwrap()));
    let config: serde_json::Value = serde_json::from_str(&read.config_json().unwrap()).unwrap();
    assert_eq!((&config["torch_dtype"], &config["d_model"]), (&"bfloat16".into(), &4.into()));
}

#[test]
fn other_readers_agree_on_the_file() {
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    let written = write_safetensors(&dir, &source, DType::F32, PLENTY).unwrap();
    let tensors = candle_core::safetensors::load(&written.files[0], &candle_core::Device::Cpu).unwrap();
    for (name, (shape, values)) in contents(&source) {
        assert_eq!(tensors[&name].dims(), shape);
        assert_eq!(tensors[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap(), values);
    }
    let bytes = fs::read(&written.files[0]).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!((8 + header) % 64, 0, "the numbers begin on a cache line");
}

#[test]
fn shards_keep_to_their_size_and_have_an_index() {
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    // In f32: 24 and 24 numbers, 4, 28 and 28; so 24 + 24, 4 + 28, 28.
    let written = write_safetensors(&dir, &source, DType::F32, 4 * 50).unwrap();
    let names: Vec<_> = written.files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["1", "2", "3"].map(|n| format!("model-0000{n}-of-00003.safetensors")));
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], written.num_bytes);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 5);
    let read = Checkpoint::open(&dir, DType::F32).unwrap();
    assert_eq!(contents(&read), contents(&source));
}

#[test]
fn a_tensor_larger_than_a_shard_has_one_of_its_own() {
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    let written = write_safetensors(&dir, &source, DType::F32, 1).unwrap();
    assert_eq!(written.files.len(), 5);
    assert_eq!(contents(&Checkpoint::open(&dir, DType::F32).unwrap()), contents(&source));
}

#[test]
fn rewriting_keeps_the_fingerprint_when_it_keeps_the_numbers() {
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| parent.path().join(name));
    write_safetensors(&first, &source, DType::BF16, PLENTY).unwrap();
    let first = Checkpoint::open(&first, DType::BF16).unwrap();
    write_safetensors(&second, &first, DType::BF16, 100).unwrap();
    let second = Checkpoint::open(&second, DType::BF16).unwrap();
    assert_eq!(first.fingerprint(&|_| None).unwrap(), second.fingerprint(&|_| None).unwrap());
}

#[test]
fn f16_is_taken_for_conversion() {
    let source = Checkpoint::open(&fixture("bin_float16"), DType::BF16).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    write_safetensors(&dir, &source, DType::BF16, PLENTY).unwrap();
    let read = Checkpoint::open(&dir, DType::BF16).unwrap();
    let exact = contents(&Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap());
    for (name, (_, values)) in contents(&read) {
        for (found, expected) in values.iter().zip(&exact[&name].1) {
            assert!((found - expected).abs() <= expected.abs() / 128.0, "{name}: {found} for {expected}");
        }
    }
}

#[test]
fn made_up_weights_can_be_written_with_a_configuration() {
    let tensor =
        RandomTensor { name: "shared.weight".to_owned(), shape: vec![300, 400], mean: 0.0, deviation: 1.0 };
    let files = vec![("config.json".to_owned(), b"{\"d_model\": 400}".to_vec())];
    let source = Random::new(vec![tensor], DType::BF16, 1).unwrap().with_side_files(files);
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    write_safetensors(&dir, &source, DType::BF16, PLENTY).unwrap();
    let read = Checkpoint::open(&dir, DType::BF16).unwrap();
    assert_eq!(contents(&read), contents(&source));
    says(&read.config_json().unwrap(), &["400"]);
}

#[test]
fn a_directory_in_use_is_left_alone() {
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    fs::write(parent.path().join("mine"), "precious").unwrap();
    let error = write_safetensors(parent.path(), &source, DType::F32, PLENTY).unwrap_err();
    says(&error.to_string(), &["exists and is not empty"]);
    assert_eq!(listing(parent.path()).into_iter().collect::<Vec<_>>(), ["mine"]);
}

#[test]
fn an_empty_directory_is_filled() {
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(dir.path(), &source, DType::F32, PLENTY).unwrap();
    assert_eq!(listing(dir.path()).into_iter().collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
}

/// A source that fails at its last tensor.
struct Broken(Checkpoint);

impl Source for Broken {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        if name == "shared.weight" { Err(Error::TargetDType(DType::U8)) } else { self.0.frozen(name, shape) }
    }
}

#[test]
fn a_failure_half_way_leaves_nothing() {
    let source = Broken(Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap());
    let parent = tempfile::tempdir().unwrap();
    write_safetensors(&parent.path().join("model"), &source, DType::F32, 100).unwrap_err();
    assert_eq!(listing(parent.path()).len(), 0);
}

#[cfg(unix)]
#[test]
fn others_may_read_what_was_written() {
    use std::os::unix::fs::PermissionsExt;
    let source = Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let [plain, dir] = ["plain", "model"].map(|name| parent.path().join(name));
    fs::create_dir(&plain).unwrap();
    write_safetensors(&dir, &source, DType::F32, PLENTY).unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&dir), mode(&plain), "the directory has the rights that mkdir gives");
}
