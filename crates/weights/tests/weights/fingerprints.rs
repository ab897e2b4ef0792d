//! A fingerprint names the numbers and the architecture, and nothing of the files.

use candle_core::DType;
use incipit_weights::{Checkpoint, Fingerprint};

use crate::support::{fixture, numbers, ones, says, sharded, single, tensor};

fn of(dir: &std::path::Path) -> Fingerprint {
    Checkpoint::open(dir, DType::BF16).unwrap().fingerprint().unwrap()
}

#[test]
fn one_file_shards_and_pytorch_files_are_one_model() {
    let expected = of(&fixture("safetensors"));
    // `bin` also holds copies of the shared embedding under the names of its users.
    assert_eq!(of(&fixture("bin")), expected);
    assert_eq!(of(&fixture("bin_sharded")), expected);

    let (a, b) = (tensor(&numbers(6), &[2, 3], DType::F32), ones(&[4], DType::BF16));
    let split =
        sharded(&[("one.safetensors", &[("b", b.clone())]), ("two.safetensors", &[("a", a.clone())])]);
    assert_eq!(of(split.path()), of(single(&[("a", a), ("b", b)]).path()));
}

#[test]
fn the_type_asked_for_does_not_matter() {
    let dir = fixture("safetensors");
    assert_eq!(Checkpoint::open(&dir, DType::F32).unwrap().fingerprint().unwrap(), of(&dir));
}

#[test]
fn any_difference_in_the_weights_shows() {
    let values = numbers(6);
    let of_tensors = |name: &str, values: &[f32], shape: &[usize], dtype| {
        of(single(&[(name, tensor(values, shape, dtype))]).path())
    };
    let expected = of_tensors("w", &values, &[2, 3], DType::F32);
    assert_eq!(of_tensors("w", &values, &[2, 3], DType::F32), expected);
    let mut changed = values.clone();
    changed[5] = f32::from_bits(changed[5].to_bits() ^ 1);
    assert_ne!(of_tensors("w", &changed, &[2, 3], DType::F32), expected, "the last bit of a number");
    assert_ne!(of_tensors("w", &values, &[3, 2], DType::F32), expected, "the shape");
    assert_ne!(of_tensors("v", &values, &[2, 3], DType::F32), expected, "the name");
    assert_ne!(of_tensors("w", &values, &[2, 3], DType::BF16), expected, "the type");
}

#[test]
fn a_head_of_its_own_shows_and_a_copy_of_the_embedding_does_not() {
    let shared = tensor(&numbers(6), &[2, 3], DType::F32);
    let expected = of(single(&[("shared.weight", shared.clone())]).path());
    let with_head = |head| of(single(&[("shared.weight", shared.clone()), ("lm_head.weight", head)]).path());
    assert_eq!(with_head(shared.clone()), expected);
    assert_ne!(with_head(ones(&[2, 3], DType::F32)), expected);
}

#[test]
fn the_architecture_shows_and_the_rest_of_the_configuration_does_not() {
    let dir = single(&[("w", ones(&[2], DType::F32))]);
    let with = |config: &str| {
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        of(dir.path())
    };
    let expected = with(r#"{"num_layers": 2, "layer_norm_epsilon": 1e-06, "dropout_rate": 0.1}"#);
    let same = r#"{"torch_dtype": "bfloat16", "layer_norm_epsilon": 0.000001, "num_decoder_layers": 2, "num_layers": 2.0}"#;
    assert_eq!(with(same), expected, "numbers in other words, defaults, and keys that change no result");
    assert_eq!(
        with(r#"{"num_layers": 2, "relative_attention_max_distance": 128}"#),
        expected,
        "a default, spelled out"
    );
    assert_ne!(with(r#"{"num_layers": 3}"#), expected);
    assert_ne!(with(r#"{"num_layers": 2, "feed_forward_proj": "gated-gelu"}"#), expected);
    assert_ne!(with(r#"{"num_layers": 2, "tie_word_embeddings": false}"#), expected);
}

#[test]
fn without_a_configuration_there_is_none() {
    let dir = single(&[("w", ones(&[2], DType::F32))]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    says(&checkpoint.fingerprint().unwrap_err().to_string(), &["config.json is not a model's configuration"]);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    says(&checkpoint.fingerprint().unwrap_err().to_string(), &["has no config.json"]);
}

#[test]
fn it_is_written_as_64_hexadecimal_digits_and_read_back() {
    let fingerprint = of(&fixture("safetensors"));
    let text = fingerprint.to_string();
    assert_eq!(text.len(), 64);
    assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
    let json = serde_json::to_string(&fingerprint).unwrap();
    assert_eq!(json, format!("\"{text}\""));
    assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
    for wrong in ["", "abc", &text[1..], &format!("g{}", &text[1..])] {
        says(&wrong.parse::<Fingerprint>().unwrap_err().to_string(), &["is not a fingerprint"]);
    }
}
