//! What is wrong with a file is said with its name, what was expected, and how to mend it.

use std::fs;

use candle_core::{DType, Device, Tensor};
use incipit_weights::{Checkpoint, Error, Source};
use serde_json::json;

use crate::support::{
    fixture, numbers, ones, refusal, says, sharded, single, tensor, with_config, write_index,
};

fn frozen_refusal(dir: &std::path::Path, name: &str, shape: &[usize]) -> String {
    let checkpoint = Checkpoint::open(dir, DType::BF16).unwrap();
    checkpoint.frozen(name, shape).unwrap_err().to_string()
}

#[test]
fn a_missing_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    says(&refusal(&dir.path().join("nowhere")), &["there is no directory", "nowhere"]);
}

#[test]
fn a_directory_without_weights_lists_what_it_has() {
    let dir = with_config();
    fs::write(dir.path().join("tf_model.h5"), "x").unwrap();
    says(&refusal(dir.path()), &["has no weights", "model.safetensors", "config.json, tf_model.h5"]);
    let empty = tempfile::tempdir().unwrap();
    says(&refusal(empty.path()), &["has no weights", "found nothing"]);
}

#[test]
fn a_missing_tensor_comes_with_similar_names() {
    let dir = single(&[
        ("encoder.block.0.layer.0.SelfAttention.q.weight", ones(&[2, 2], DType::F32)),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", ones(&[2, 2], DType::F32)),
        ("unlike", ones(&[1], DType::F32)),
    ]);
    let text = frozen_refusal(dir.path(), "encoder.block.0.layer.0.SelfAttention.v.weight", &[2, 2]);
    says(
        &text,
        &[
            "no tensor encoder.block.0.layer.0.SelfAttention.v.weight",
            "SelfAttention.k.weight",
            "SelfAttention.q.weight",
        ],
    );
    assert!(!text.contains("unlike"), "{text}");
}

#[test]
fn another_shape_is_refused_with_both_shapes_and_the_file() {
    let dir = single(&[("shared.weight", ones(&[7, 4], DType::F32))]);
    let text = frozen_refusal(dir.path(), "shared.weight", &[4, 7]);
    says(&text, &["shared.weight", "model.safetensors", "[7, 4]", "[4, 7]"]);
}

#[test]
fn f16_is_refused_with_the_reason_and_the_mend() {
    let dir = single(&[("shared.weight", ones(&[7, 4], DType::F16))]);
    let text = frozen_refusal(dir.path(), "shared.weight", &[7, 4]);
    says(&text, &["shared.weight", "model.safetensors", "f16", "overflow", "incipit convert model"]);
    says(
        &frozen_refusal(&fixture("bin_float16"), "shared.weight", &[7, 4]),
        &["overflow", "pytorch_model.bin"],
    );
}

#[test]
fn other_types_are_refused_by_tensor_and_file() {
    let dir = single(&[("w", ones(&[3], DType::I64)), ("q", ones(&[3], DType::U8))]);
    says(&frozen_refusal(dir.path(), "w", &[3]), &["w in", "model.safetensors is i64"]);
    says(&frozen_refusal(dir.path(), "q", &[3]), &["q in", "is u8", "unquantized"]);
    for dtype in [DType::F16, DType::F64] {
        let error = Checkpoint::open(dir.path(), dtype).unwrap_err();
        assert!(matches!(error, Error::TargetDType(d) if d == dtype), "{error}");
    }
}

#[test]
fn a_file_that_is_cut_short_is_refused_wherever_it_is_cut() {
    let dir = single(&[("w", tensor(&numbers(64), &[8, 8], DType::F32))]);
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for len in [0, 5, 8, 40, whole.len() - 100, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        says(&refusal(dir.path()), &["model.safetensors is cut short", "download it again"]);
    }
}

#[test]
fn a_pytorch_file_that_is_cut_short_is_refused() {
    let dir = with_config();
    let path = dir.path().join("pytorch_model.bin");
    let whole = fs::read(fixture("bin").join("pytorch_model.bin")).unwrap();
    for len in [4, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        says(&refusal(dir.path()), &["pytorch_model.bin is cut short", "download it again"]);
    }
}

#[test]
fn a_file_of_another_format_is_refused() {
    let dir = with_config();
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    fs::write(dir.path().join("model.safetensors"), lfs).unwrap();
    says(&refusal(dir.path()), &["model.safetensors cannot be read", "Git LFS"]);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), lfs).unwrap();
    says(&refusal(dir.path()), &["pytorch_model.bin cannot be read", "torch.save"]);
}

#[test]
fn a_header_that_is_not_json_is_refused() {
    let dir = with_config();
    let mut bytes = 4u64.to_le_bytes().to_vec();
    bytes.extend(b"nope");
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    says(&refusal(dir.path()), &["its header is broken"]);
}

#[test]
fn a_pickle_that_is_not_a_state_dict_is_refused() {
    let dir = with_config();
    let file = fs::File::create(dir.path().join("pytorch_model.bin")).unwrap();
    let mut archive = zip::ZipWriter::new(file);
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    archive.start_file("model/data.pkl", options).unwrap();
    // An empty tuple where a dict should be.
    std::io::Write::write_all(&mut archive, b"\x80\x02).").unwrap();
    archive.finish().unwrap();
    says(&refusal(dir.path()), &["pytorch_model.bin", "no tensors"]);
}

#[test]
fn the_format_of_old_pytorch_versions_is_refused_with_the_mend() {
    says(&refusal(&fixture("bin_legacy")), &["pytorch_model.bin", "older than 1.6", "torch.save"]);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = sharded(&[
        ("model-00001-of-00002.safetensors", &[("a", ones(&[2], DType::F32)), ("w", ones(&[2], DType::F32))]),
        ("model-00002-of-00002.safetensors", &[("w", ones(&[2], DType::F32)), ("b", ones(&[2], DType::F32))]),
    ]);
    says(&refusal(dir.path()), &["w is both in", "model-00001-of-00002", "model-00002-of-00002"]);
}

#[test]
fn an_index_that_names_a_missing_file_is_refused() {
    let dir = sharded(&[
        ("model-00001-of-00002.safetensors", &[("a", ones(&[2], DType::F32))]),
        ("model-00002-of-00002.safetensors", &[("b", ones(&[2], DType::F32))]),
    ]);
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    says(
        &refusal(dir.path()),
        &["index.json names model-00002-of-00002.safetensors", "download the missing shard"],
    );
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let dir = sharded(&[("model-00001-of-00001.safetensors", &[("a", ones(&[2], DType::F32))])]);
    write_index(
        dir.path(),
        &json!({ "a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors" }),
    );
    says(&refusal(dir.path()), &["says that b is in model-00001-of-00001.safetensors, and it is not"]);
}

#[test]
fn an_index_that_leads_out_of_the_directory_is_refused() {
    let dir = with_config();
    for shard in ["../model.safetensors", "/etc/passwd", ""] {
        write_index(dir.path(), &json!({ "a": shard }));
        says(&refusal(dir.path()), &["is not an index of weights", "does not lie beside it"]);
    }
}

#[test]
fn an_index_that_is_not_one_is_refused() {
    let dir = with_config();
    let path = dir.path().join("model.safetensors.index.json");
    for (content, why) in [("{", "EOF"), ("{}", "weight_map"), (r#"{"weight_map":{}}"#, "empty")] {
        fs::write(&path, content).unwrap();
        says(&refusal(dir.path()), &["is not an index of weights", why]);
    }
}

#[test]
fn a_file_without_tensors_is_refused() {
    let dir = single(&[]);
    says(&refusal(dir.path()), &["it holds no tensors"]);
}

#[test]
fn a_tensor_of_no_rows_is_taken() {
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    let dir = single(&[("none", empty), ("w", ones(&[1], DType::F32))]);
    let frozen = Checkpoint::open(dir.path(), DType::BF16).unwrap().frozen("none", &[0, 4]).unwrap();
    assert_eq!((frozen.rows(), frozen.to_f32().len()), (0, 0));
}
