//! A fingerprint names the numbers and the architecture, and nothing of the files.

use std::ops::Range;

use candle_core::DType;
use incipit_weights::{Checkpoint, Digests, Fingerprint};

use crate::support::{fixture, numbers, ones, says, sharded, single, tensor};

/// The dim along which the ranks of a replica would share a tensor.
fn dim(name: &str) -> Option<usize> {
    match name {
        "shared.weight" | "lm_head.weight" => Some(0),
        n if n.ends_with(".wo.weight") => Some(1),
        n if n.ends_with("_norm.weight") => None,
        _ => Some(0),
    }
}

fn of(dir: &std::path::Path) -> Fingerprint {
    Checkpoint::open(dir, DType::BF16).unwrap().fingerprint(&dim).unwrap()
}

/// The digests that each of `ranks` ranks makes.
fn shares(checkpoint: &Checkpoint, ranks: usize) -> Vec<Digests> {
    let share = |rank: usize| move |n: usize| -> Range<usize> { rank * n / ranks..(rank + 1) * n / ranks };
    (0..ranks).map(|rank| checkpoint.fingerprint_parts(&dim, &share(rank))).collect()
}

fn together(digests: impl IntoIterator<Item = Digests>) -> Digests {
    let mut all = Digests::default();
    for digests in digests {
        all.merge(Digests::from_bytes(&digests.to_bytes()).unwrap());
    }
    all
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
    let path = fixture("safetensors");
    assert_eq!(Checkpoint::open(&path, DType::F32).unwrap().fingerprint(&dim).unwrap(), of(&path));
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

/// Matrices that are shared by rows and by columns in 64, 32 and fewer parts, and tensors that are not shared.
fn backbone(shift: f32) -> tempfile::TempDir {
    let values = |n: usize| numbers(n).into_iter().map(|x| x + shift).collect::<Vec<_>>();
    single(&[
        ("shared.weight", tensor(&values(192 * 3), &[192, 3], DType::F32)),
        ("lm_head.weight", tensor(&values(96 * 5), &[96, 5], DType::BF16)),
        ("encoder.wi.weight", tensor(&values(33 * 4), &[33, 4], DType::F32)),
        ("encoder.wo.weight", tensor(&values(5 * 128), &[5, 128], DType::BF16)),
        ("encoder.2.wo.weight", tensor(&values(5 * 20), &[5, 20], DType::F32)),
        ("encoder.layer_norm.weight", tensor(&values(5), &[5], DType::F32)),
        ("encoder.bias", tensor(&values(16), &[16], DType::F32)),
        ("none", tensor(&[], &[0, 4], DType::F32)),
    ])
}

#[test]
fn it_does_not_depend_on_how_many_ranks_share_the_hashing() {
    let dir = backbone(0.0);
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16).unwrap();
    let expected = of(dir.path());
    for ranks in [1, 2, 3, 4, 8, 100] {
        let shares = shares(&checkpoint, ranks);
        assert_eq!(checkpoint.fingerprint_of(&together(shares.clone())).unwrap(), expected, "{ranks} ranks");
        let reversed = together(shares.into_iter().rev());
        assert_eq!(checkpoint.fingerprint_of(&reversed).unwrap(), expected, "{ranks} ranks, last first");
    }
    // Replicas that hash the same parts do no harm.
    let twice = together([shares(&checkpoint, 2), shares(&checkpoint, 4)].concat());
    assert_eq!(checkpoint.fingerprint_of(&twice).unwrap(), expected);
}

#[test]
fn ranks_can_share_the_hashing_of_pytorch_files() {
    let expected = of(&fixture("safetensors"));
    for name in ["bin", "bin_sharded"] {
        let checkpoint = Checkpoint::open(&fixture(name), DType::F32).unwrap();
        let digests = together(shares(&checkpoint, 2));
        assert_eq!(checkpoint.fingerprint_of(&digests).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_part_that_nobody_hashed_is_named() {
    let dir = backbone(0.0);
    let checkpoint = Checkpoint::open(dir.path(), DType::BF16).unwrap();
    let [first, _, third, fourth] = &shares(&checkpoint, 4)[..] else { panic!("four ranks") };
    let digests = together([first, third, fourth].map(Clone::clone));
    says(
        &checkpoint.fingerprint_of(&digests).unwrap_err().to_string(),
        &["part 1 of the 4 of encoder.2.wo.weight is missing", "every part of every tensor"],
    );
    says(
        &checkpoint.fingerprint_of(&Digests::default()).unwrap_err().to_string(),
        &["no rank hashed encoder.2.wo.weight"],
    );
}

#[test]
fn ranks_that_read_different_weights_are_found_out() {
    let [dir, other] = [backbone(0.0), backbone(1.0)];
    let open = |dir: &tempfile::TempDir| Checkpoint::open(dir.path(), DType::BF16).unwrap();
    let mixed = |other: &Checkpoint| together([shares(&open(&dir), 2), shares(other, 3)].concat());
    let refusal = |digests| open(&dir).fingerprint_of(&digests).unwrap_err().to_string();
    says(&refusal(mixed(&open(&other))), &["two ranks read part 0 of encoder.2.wo.weight differently"]);
    let wide = single(&[("shared.weight", ones(&[192, 4], DType::F32))]);
    says(&refusal(mixed(&open(&wide))), &["shared.weight is f32 of [192, 3] in 64 parts", "f32 of [192, 4]"]);
    let more = single(&[("extra", ones(&[192, 4], DType::F32))]);
    says(&refusal(mixed(&open(&more))), &["a rank hashed extra, which these weights do not have"]);
}

#[test]
fn digests_that_were_garbled_on_the_way_are_refused() {
    let dir = backbone(0.0);
    let digests = shares(&Checkpoint::open(dir.path(), DType::BF16).unwrap(), 2).remove(1);
    let bytes = digests.to_bytes();
    assert_eq!(Digests::from_bytes(&bytes).unwrap(), digests);
    let refused = |bytes: &[u8]| Digests::from_bytes(bytes).unwrap_err().to_string();
    says(&refused(&bytes[..bytes.len() - 1]), &["they cannot be read"]);
    says(&refused(b"not a message at all"), &["the digests of the ranks"]);
    // A record that has no parts.
    says(&refused(b"\x0a\x03\x0a\x01w"), &["what they say of \"w\" cannot be right"]);
}

#[test]
fn without_a_configuration_there_is_none() {
    let dir = single(&[("w", ones(&[2], DType::F32))]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    let checkpoint = Checkpoint::open(dir.path(), DType::F32).unwrap();
    says(
        &checkpoint.fingerprint(&dim).unwrap_err().to_string(),
        &["config.json is not a model's configuration"],
    );
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    says(&checkpoint.fingerprint(&dim).unwrap_err().to_string(), &["has no config.json"]);
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
