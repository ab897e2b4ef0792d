//! A tokenizer gives the ids that transformers gives, whichever file it comes from.

use std::fs;
use std::path::{Path, PathBuf};

use incipit_weights::load_tokenizer;
use serde::Deserialize;

use crate::support::says;

/// A text and its ids by transformers' `T5Tokenizer`, with `</s>`.
#[derive(Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
}

/// A SentencePiece model, and what transformers makes of awkward texts with it.
fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tokenizer")
}

/// A directory with the golden `spiece.model` alone.
fn spiece_alone() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden_dir().join("spiece.model"), dir.path().join("spiece.model")).unwrap();
    dir
}

fn goldens() -> Vec<Golden> {
    serde_json::from_slice(&fs::read(golden_dir().join("strings.json")).unwrap()).unwrap()
}

fn check(tokenizer: &tokenizers::Tokenizer) {
    let goldens = goldens();
    assert!(goldens.len() >= 500, "{} texts", goldens.len());
    for golden in goldens {
        let encoded = tokenizer.encode(golden.text.as_str(), true).unwrap();
        assert_eq!(encoded.get_ids(), golden.ids, "{:?}", golden.text);
    }
}

#[test]
fn spiece_alone_gives_the_ids_of_transformers() {
    check(&load_tokenizer(spiece_alone().path()).unwrap());
}

#[test]
fn a_tokenizer_json_gives_the_same_ids() {
    let dir = tempfile::tempdir().unwrap();
    let mut tokenizer = load_tokenizer(spiece_alone().path()).unwrap();
    // As a careless user may have saved it.
    tokenizer
        .with_truncation(Some(tokenizers::TruncationParams { max_length: 3, ..Default::default() }))
        .unwrap();
    tokenizer.with_padding(Some(tokenizers::PaddingParams::default()));
    tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
    check(&load_tokenizer(dir.path()).unwrap());
}

#[test]
fn the_sentinels_come_last_and_count_down() {
    let tokenizer = load_tokenizer(spiece_alone().path()).unwrap();
    let size = u32::try_from(tokenizer.get_vocab_size(true)).unwrap();
    let ids =
        ["<extra_id_0>", "<extra_id_1>", "<extra_id_99>"].map(|token| tokenizer.token_to_id(token).unwrap());
    assert_eq!(ids, [size - 1, size - 2, size - 100]);
    assert_eq!(
        ["<pad>", "</s>", "<unk>"].map(|token| tokenizer.token_to_id(token)),
        [Some(0), Some(1), Some(2)]
    );
}

#[test]
fn decoding_gives_the_text_back() {
    let tokenizer = load_tokenizer(spiece_alone().path()).unwrap();
    let ids = tokenizer.encode("the answer is this", true).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the answer is this");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "the answer is this</s>");
}

#[test]
fn a_pair_ends_with_the_end_twice() {
    let tokenizer = load_tokenizer(spiece_alone().path()).unwrap();
    let encoded = tokenizer.encode(("the", "the"), true).unwrap();
    let ids = encoded.get_ids();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 2);
    assert_eq!((ids.last(), encoded.get_type_ids().iter().max()), (Some(&1), Some(&0)));
}

#[test]
fn the_number_of_sentinels_is_read_where_it_is_said() {
    let dir = spiece_alone();
    let size = |dir: &Path| load_tokenizer(dir).unwrap().get_vocab_size(true);
    let usual = size(dir.path());
    let config = dir.path().join("tokenizer_config.json");
    for (content, expected) in [(r#"{"extra_ids": 0}"#, usual - 100), (r#"{"eos_token": "</s>"}"#, usual)] {
        fs::write(&config, content).unwrap();
        assert_eq!(size(dir.path()), expected);
    }
    fs::write(&config, "{").unwrap();
    says(
        &load_tokenizer(dir.path()).unwrap_err().to_string(),
        &["tokenizer_config.json", "cannot be parsed"],
    );
}

#[test]
fn what_is_not_a_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = || load_tokenizer(dir.path()).unwrap_err().to_string();
    says(&refusal(), &["neither tokenizer.json nor spiece.model"]);
    fs::write(dir.path().join("spiece.model"), "version https://git-lfs.github.com/spec/v1").unwrap();
    says(&refusal(), &["spiece.model is not a tokenizer", "download it again"]);
    fs::write(dir.path().join("spiece.model"), "").unwrap();
    says(&refusal(), &["spiece.model", "no vocabulary"]);
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    says(&refusal(), &["tokenizer.json is not a tokenizer"]);
}

#[test]
fn a_tokenizer_json_that_does_not_end_texts_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut tokenizer = load_tokenizer(spiece_alone().path()).unwrap();
    tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
    tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
    says(&load_tokenizer(dir.path()).unwrap_err().to_string(), &["tokenizer.json", "does not end with </s>"]);
}
