//! Weights come out of every container as they went in.

use candle_core::DType;
use incipit_kernels::FrozenSlice;
use incipit_weights::{Checkpoint, Source};

use crate::support::{contents, fixture, numbers, ones, says, sharded, single, tensor};

const WO: &str = "encoder.block.0.layer.1.DenseReluDense.wo.weight";

#[test]
fn a_tensor_comes_out_as_it_went_in() {
    let values = numbers(28);
    let dir = single(&[("shared.weight", tensor(&values, &[7, 4], DType::F32))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    let frozen = checkpoint.frozen("shared.weight", &[7, 4]).unwrap();
    assert_eq!((frozen.rows(), frozen.cols(), frozen.dtype()), (7, 4, DType::F32));
    assert_eq!(frozen.to_f32(), values);
    assert!(checkpoint.contains("shared.weight") && !checkpoint.contains("shared"));
}

#[test]
fn a_vector_has_one_row() {
    let dir = single(&[("norm.weight", ones(&[5], DType::BF16))]);
    let frozen = Checkpoint::open(dir.path(), DType::BF16).unwrap().frozen("norm.weight", &[5]).unwrap();
    assert_eq!((frozen.rows(), frozen.cols()), (1, 5));
}

#[test]
fn f32_becomes_bf16_rounded_to_nearest() {
    // More than one slice of the conversion, with a rest.
    let values = numbers(600 * 1001);
    let dir = single(&[("w", tensor(&values, &[600, 1001], DType::F32))]);
    let frozen = Checkpoint::open(dir.path(), DType::BF16).unwrap().frozen("w", &[600, 1001]).unwrap();
    assert_eq!(frozen.dtype(), DType::BF16);
    let rounded = tensor(&values, &[600 * 1001], DType::BF16).to_dtype(DType::F32).unwrap();
    assert_eq!(frozen.to_f32(), rounded.to_vec1::<f32>().unwrap());
}

#[test]
fn bf16_stays_bf16_when_f32_is_asked_for() {
    let dir = single(&[("w", tensor(&numbers(6), &[2, 3], DType::BF16))]);
    let frozen = Checkpoint::open(dir.path(), DType::F32).unwrap().frozen("w", &[2, 3]).unwrap();
    assert_eq!(frozen.dtype(), DType::BF16);
}

#[test]
fn stored_numbers_are_read_in_place() {
    let dir = single(&[("w", tensor(&numbers(6), &[2, 3], DType::BF16))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16).unwrap();
    let address = || match checkpoint.frozen("w", &[2, 3]).unwrap().values() {
        FrozenSlice::Bf16(values) => values.as_ptr() as usize,
        FrozenSlice::F32(values) => values.as_ptr() as usize,
    };
    let first = checkpoint.frozen("w", &[2, 3]).unwrap();
    let FrozenSlice::Bf16(values) = first.values() else { panic!("{first:?} is not bf16") };
    assert_eq!(values.as_ptr() as usize, address(), "two views of one tensor are one place in memory");
}

#[test]
fn shards_are_read_as_one() {
    let (a, b) = (tensor(&numbers(6), &[2, 3], DType::F32), ones(&[4], DType::BF16));
    let split = sharded(&[
        ("model-00001-of-00002.safetensors", &[("a", a.clone())]),
        ("model-00002-of-00002.safetensors", &[("b", b.clone())]),
    ]);
    let whole = single(&[("a", a), ("b", b)]);
    let open = |dir: &tempfile::TempDir| contents(&Checkpoint::open(dir.path(), DType::F32).unwrap());
    assert_eq!(open(&split), open(&whole));
}

#[test]
fn pytorch_files_hold_what_safetensors_hold() {
    let expected = contents(&Checkpoint::open(&fixture("safetensors"), DType::F32).unwrap());
    assert_eq!(expected.len(), 5);
    let mut single = contents(&Checkpoint::open(&fixture("bin"), DType::F32).unwrap());
    for copy in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] {
        assert_eq!(single.remove(copy).as_ref(), single.get("shared.weight"));
    }
    assert_eq!(single, expected);
    assert_eq!(contents(&Checkpoint::open(&fixture("bin_sharded"), DType::F32).unwrap()), expected);
}

#[test]
fn a_transposed_f32_tensor_of_a_pytorch_file_becomes_bf16() {
    let of = |name: &str| Checkpoint::open(&fixture(name), DType::BF16).unwrap().frozen(WO, &[4, 6]).unwrap();
    assert_eq!(of("bin").dtype(), DType::BF16);
    assert_eq!(of("bin").to_f32(), of("safetensors").to_f32());
}

#[test]
fn copies_of_the_shared_embedding_are_not_parameters() {
    let count = |name: &str| Checkpoint::open(&fixture(name), DType::F32).unwrap().num_parameters();
    assert_eq!(count("safetensors"), 28 + 28 + 24 + 24 + 4);
    assert_eq!(count("bin"), count("safetensors"));
}

#[test]
fn safetensors_are_preferred_to_pytorch_files() {
    let dir = single(&[("w", ones(&[2], DType::F32))]);
    std::fs::write(dir.path().join("pytorch_model.bin"), "not even a zip").unwrap();
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    assert_eq!(checkpoint.files(), [dir.path().join("model.safetensors")]);
}

#[test]
fn the_configuration_is_given_as_it_is() {
    let dir = single(&[("w", ones(&[2], DType::F32))]);
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    assert_eq!(checkpoint.config_json().unwrap(), crate::support::CONFIG);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    says(
        &checkpoint.config_json().unwrap_err().to_string(),
        &["has no config.json", dir.path().to_str().unwrap()],
    );
}

#[test]
fn a_real_model_opens() {
    let Some(shared) = std::env::var_os("INCIPIT_SHARED").filter(|dir| std::path::Path::new(dir).is_dir())
    else {
        println!("skipped: INCIPIT_SHARED names no directory with the trained small model");
        return;
    };
    let dir = std::path::Path::new(&shared).join("models/t5-mini-lm");
    let checkpoint = Checkpoint::open(&dir, DType::BF16).unwrap();
    let table = checkpoint.frozen("shared.weight", &[8128, 256]).unwrap();
    assert_eq!((table.rows(), table.cols()), (8128, 256));
    assert!(table.to_f32().iter().all(|x| x.is_finite()));
    let fingerprint = || checkpoint.fingerprint(&|_| None).unwrap();
    assert_eq!(fingerprint(), fingerprint());
    assert!(checkpoint.num_parameters() > 8128 * 256);
    let ids = incipit_weights::load_tokenizer(&dir)
        .unwrap()
        .encode("Hello, world!", true)
        .unwrap()
        .get_ids()
        .to_vec();
    assert_eq!(ids.last(), Some(&1));
}
