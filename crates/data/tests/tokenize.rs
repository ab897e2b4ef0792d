//! Tokenization, with a small tokenizer of words.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use incipit_data::{Error, TextExample, tokenize};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

const VOCABULARY: [&str; 8] = ["<pad>", "</s>", "<unk>", "a", "b", "c", "yes", "no"];

/// Words to ids; a post-processor ends every text with `</s>`, as a T5's tokenizer does.
fn tokenizer() -> Tokenizer {
    let vocabulary = VOCABULARY.iter().zip(0u32..).map(|(word, id)| ((*word).to_owned(), id)).collect();
    let model = WordLevel::builder().vocab(vocabulary).unk_token("<unk>".into()).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    let processor = TemplateProcessing::builder()
        .try_single("$A </s>")
        .unwrap()
        .special_tokens(vec![("</s>", 1)])
        .build()
        .unwrap();
    tokenizer.with_post_processor(Some(processor));
    tokenizer
}

fn texts(pairs: &[(&str, &str)]) -> Vec<TextExample> {
    let example = |(index, (inputs, targets)): (usize, &(&str, &str))| TextExample {
        inputs: (*inputs).to_owned(),
        targets: (*targets).to_owned(),
        index,
        line: index + 1,
    };
    pairs.iter().enumerate().map(example).collect()
}

#[test]
fn both_texts_end_with_one_end_mark() {
    let texts = texts(&[("a b zzz", "yes"), ("", "no yes")]);
    let set = tokenize(&texts, &tokenizer(), 512, 16, 8).unwrap();
    assert_eq!(set.examples[0].input, [3, 4, 2, 1]);
    assert_eq!(set.examples[0].target, [6, 1]);
    assert_eq!(
        (set.examples[1].input.as_slice(), set.examples[1].target.as_slice()),
        (&[1][..], &[7, 6, 1][..])
    );
    assert_eq!((set.longest_input, set.longest_target), (4, 3));
    assert_eq!((set.truncated_inputs, set.truncated_targets), (0, 0));
    assert_eq!(set.texts, texts);
}

#[test]
fn long_texts_are_cut_before_the_end_mark_and_counted() {
    let texts = texts(&[("a b c", "yes"), ("a b c a", "yes no a b"), ("a a a a a", "no")]);
    let set = tokenize(&texts, &tokenizer(), 4, 3, 8).unwrap();
    let inputs: Vec<&[u32]> = set.examples.iter().map(|example| example.input.as_slice()).collect();
    assert_eq!(inputs, [[3, 4, 5, 1], [3, 4, 5, 1], [3, 3, 3, 1]]);
    assert_eq!(set.examples[1].target, [6, 7, 1]);
    assert_eq!((set.truncated_inputs, set.truncated_targets), (2, 1));
    assert_eq!((set.longest_input, set.longest_target), (6, 5));
}

#[test]
fn the_tokenizers_own_truncation_and_padding_are_ignored() {
    let mut own = tokenizer();
    own.with_truncation(Some(TruncationParams { max_length: 2, ..Default::default() })).unwrap();
    own.with_padding(Some(PaddingParams::default()));
    let texts = texts(&[("a b c", "yes"), ("a", "no")]);
    assert_eq!(tokenize(&texts, &own, 9, 9, 8).unwrap(), tokenize(&texts, &tokenizer(), 9, 9, 8).unwrap());
}

#[test]
fn many_texts_keep_their_order() {
    let pairs: Vec<(&str, &str)> =
        (0..2500).map(|i| (["a", "b", "c"][i % 3], ["yes", "no"][i % 2])).collect();
    let set = tokenize(&texts(&pairs), &tokenizer(), 9, 9, 8).unwrap();
    assert_eq!(set.examples.len(), 2500);
    for (i, example) in set.examples.iter().enumerate() {
        let expected = (3 + (i % 3) as u32, 6 + (i % 2) as u32);
        assert_eq!((example.input[0], example.target[0]), expected, "example {i}");
    }
}

#[test]
fn a_tokenizer_that_makes_ids_beyond_the_vocabulary_is_refused() {
    let texts = texts(&[("a b", "no")]);
    let message = tokenize(&texts, &tokenizer(), 9, 9, 7).unwrap_err().to_string();
    for words in ["does not match the model", "\"no\" has the id 7", "ends at 6", "came with the model"] {
        assert!(message.contains(words), "{message}");
    }
    assert!(tokenize(&texts, &tokenizer(), 9, 9, 8).is_ok());
    assert!(matches!(tokenize(&[], &tokenizer(), 9, 9, 1), Err(Error::TokenizerMismatch { id: 1, .. })));
}

#[test]
fn a_tokenizer_without_an_end_mark_is_refused() {
    let vocabulary = [("<unk>".to_owned(), 0u32)].into_iter().collect();
    let model = WordLevel::builder().vocab(vocabulary).unk_token("<unk>".into()).build().unwrap();
    let message = tokenize(&texts(&[("a", "b")]), &Tokenizer::new(model), 9, 9, 8).unwrap_err().to_string();
    assert!(message.contains("no </s>") && message.contains("came with the model"), "{message}");
}

#[test]
fn a_limit_without_room_is_refused() {
    for (max_input, max_target, side) in [(1, 9, "input"), (9, 0, "target")] {
        let error = tokenize(&texts(&[("a", "b")]), &tokenizer(), max_input, max_target, 8).unwrap_err();
        assert!(error.to_string().contains(&format!("maximum {side} length")), "{error}");
    }
}

#[test]
fn a_target_that_leaves_no_token_is_refused() {
    let error = tokenize(&texts(&[("a", "b"), ("a", " \u{2003}")]), &tokenizer(), 9, 9, 8).unwrap_err();
    assert!(matches!(error, Error::NoTargetTokens { line: 2, .. }), "{error}");
}
