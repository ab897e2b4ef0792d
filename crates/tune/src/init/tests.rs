use super::*;
use std::collections::HashSet;
use tokenizers::{AddedToken, models::unigram::Unigram, pre_tokenizers::metaspace::Metaspace};

/// Pieces 0, 1, 2 are special, then a word each, then letters; the last two ids are added tokens.
fn tokenizer(num_words: usize) -> Tokenizer {
    let mut pieces: Vec<(String, f64)> = ["<pad>", "</s>", "<unk>"].map(|s| (s.to_owned(), 0.0)).to_vec();
    pieces.extend(["▁yes", "▁no", "▁may", "be"].map(|s| (s.to_owned(), -1.0)));
    pieces.extend((0..num_words).map(|i| (format!("▁w{i}"), -2.0)));
    let mut tokenizer = Tokenizer::new(Unigram::from(pieces, Some(2), false).unwrap());
    tokenizer.with_pre_tokenizer(Some(Metaspace::default()));
    let special = ["<pad>", "</s>", "<unk>", "<x0>", "<x1>"].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).unwrap();
    tokenizer
}

/// The row of piece `id` is `[id, -id]`.
fn embedding(id: u32) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
    Ok(vec![id as f32, -(id as f32)])
}

fn begin(init: &str, length: usize, labels: &[&str], seed: u64) -> Result<Initial> {
    let labels: Vec<String> = labels.iter().map(ToString::to_string).collect();
    let sources = Sources { embedding: &embedding, tokenizer: &tokenizer(50), labels: &labels, seed };
    initial_prompt(&init.parse()?, length, 2, &sources)
}

/// The pieces whose embeddings the rows are.
fn ids(initial: &Initial) -> Vec<f32> {
    initial.prompt.values().chunks(2).map(|row| row[0]).collect()
}

fn error(init: &str, length: usize, labels: &[&str]) -> String {
    begin(init, length, labels, 0).unwrap_err().to_string()
}

#[test]
fn names_are_read_back() {
    for name in ["class-label", "vocab", "uniform:-0.5,0.5", "uniform:0,0.5", "text:a: b", "file:out/best"] {
        let init: PromptInit = name.parse().unwrap();
        assert_eq!(init.to_string(), name);
        let json = serde_json::to_string(&init).unwrap();
        assert_eq!(json, format!("\"{name}\""));
        assert_eq!(serde_json::from_str::<PromptInit>(&json).unwrap(), init);
    }
    assert_eq!("uniform".parse::<PromptInit>().unwrap().to_string(), "uniform:-0.5,0.5");
    for name in ["", "labels", "text:", "text: ", "file:", "uniform:1", "uniform:1,0", "uniform:0,inf", "x:y"]
    {
        let error = name.parse::<PromptInit>().unwrap_err().to_string();
        assert!(error.contains("class-label") && error.contains(name), "{error}");
    }
}

#[test]
fn class_labels_come_first_and_sorted_as_means_of_their_pieces() {
    let initial = begin("class-label", 5, &["yes", "maybe", "no", "no"], 0).unwrap();
    // "maybe" is pieces 5 and 6; "no" is 4; "yes" is 3.
    assert_eq!(ids(&initial)[..3], [5.5, 4.0, 3.0]);
    assert_eq!(initial.prompt.values()[1], -5.5);
    assert!(ids(&initial)[3..].iter().all(|id| (3.0..57.0).contains(id) && id.fract() == 0.0));
    assert!(initial.warnings.is_empty());
}

#[test]
fn labels_beyond_the_prompts_length_are_told() {
    let initial = begin("class-label", 2, &["yes", "maybe", "no"], 0).unwrap();
    assert_eq!(ids(&initial), [5.5, 4.0]);
    assert_eq!(
        initial.warnings,
        ["3 labels, but a prompt of 2 rows: those after \"no\" have no row of their own"]
    );
}

#[test]
fn labels_that_cannot_have_a_row_are_refused() {
    assert!(error("class-label", 2, &[]).contains("give --labels, or --prompt-init vocab"));
    assert!(error("class-label", 2, &["yes", ""]).contains("\"\" has no pieces"));
}

#[test]
fn vocab_draws_ordinary_pieces_none_twice_by_the_seed() {
    let draw = |seed| ids(&begin("vocab", 54, &[], seed).unwrap());
    let all: HashSet<u32> = draw(0).into_iter().map(|id| id as u32).collect();
    assert_eq!(all, (3..57).collect(), "54 ordinary pieces, neither special nor added ones");
    assert_eq!(draw(0), draw(0));
    assert_ne!(draw(0), draw(1));
    assert!(error("vocab", 55, &[]).contains("55 rows, but 54 ordinary pieces"));
}

#[test]
fn vocab_stays_within_the_most_frequent() {
    let big = tokenizer(6000);
    let sources = Sources { embedding: &embedding, tokenizer: &big, labels: &[], seed: 0 };
    let initial = initial_prompt(&PromptInit::Vocab, 5000, 2, &sources).unwrap();
    let all: HashSet<u32> = ids(&initial).into_iter().map(|id| id as u32).collect();
    assert_eq!(all, (3..5003).collect());
    assert!(initial_prompt(&PromptInit::Vocab, 5001, 2, &sources).is_err());
}

#[test]
fn uniform_fills_its_range_and_stays_within() {
    for (name, low, high) in [
        ("uniform", -0.5, 0.5),
        ("uniform:0,0.5", 0.0, 0.5),
        ("uniform:8388608,8388609", 8_388_608.0, 8_388_609.0),
    ] {
        let initial = begin(name, 2000, &[], 3).unwrap();
        let values = initial.prompt.values();
        assert!(values.iter().all(|v| (low..high).contains(v)), "{name}");
        let mean = values.iter().map(|v| f64::from(v - low)).sum::<f64>() / 4000.0;
        assert!(high > 1.0 || (mean / f64::from(high - low) - 0.5).abs() < 0.02, "{name}: {mean}");
    }
}

#[test]
fn text_is_repeated_or_cut_to_the_length() {
    let longer = begin("text:yes maybe", 7, &[], 0).unwrap();
    assert_eq!(ids(&longer), [3.0, 5.0, 6.0, 3.0, 5.0, 6.0, 3.0]);
    assert!(longer.warnings.is_empty());
    let shorter = begin("text:yes maybe", 2, &[], 0).unwrap();
    assert_eq!(ids(&shorter), [3.0, 5.0]);
    assert_eq!(shorter.warnings, ["the text has 3 pieces and the prompt 2 rows: the text is cut"]);
}

#[test]
fn a_prompt_of_tokens_begins_with_the_pieces_whose_rows_a_soft_prompt_would_have() {
    let sources = Sources { embedding: &embedding, tokenizer: &tokenizer(50), labels: &[], seed: 4 };
    for (init, length) in [("vocab", 20), ("text:yes maybe", 7), ("text:yes maybe", 2)] {
        let (tokens, warnings) = initial_tokens(&init.parse().unwrap(), length, &sources).unwrap();
        let initial = begin(init, length, &[], 4).unwrap();
        assert_eq!(tokens.iter().map(|id| *id as f32).collect::<Vec<_>>(), ids(&initial), "{init}");
        assert_eq!(warnings, initial.warnings);
    }
    for init in ["class-label", "uniform", "file:prompt.npy"] {
        let error = initial_tokens(&init.parse().unwrap(), 2, &sources).unwrap_err().to_string();
        assert!(error.contains(init) && error.contains("give vocab or text:TEXT"), "{error}");
    }
}

#[test]
fn a_file_must_have_the_length_and_the_width() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.npy");
    let prompt = Prompt::new(2, 2, vec![1.0, 2.0, 3.0, 4.0]).unwrap();
    crate::npy::write(&path, &prompt).unwrap();
    let name = format!("file:{}", path.display());
    assert_eq!(begin(&name, 2, &[], 0).unwrap().prompt, prompt);
    assert!(error(&name, 3, &[]).contains("give --prompt-length 2"));
    crate::npy::write(&path, &Prompt::new(2, 3, vec![0.0; 6]).unwrap()).unwrap();
    assert!(error(&name, 2, &[]).contains("3 columns"));
}

#[test]
fn an_embedding_that_cannot_be_read_is_told_by_its_piece() {
    let failing: EmbeddingRow<'_> = &|id| if id == 4 { Err("no such row".into()) } else { embedding(id) };
    let narrow: EmbeddingRow<'_> = &|_| Ok(vec![1.0]);
    for (embedding, expected) in [(failing, "piece 4"), (narrow, "1 columns, not 2")] {
        let sources = Sources { embedding, tokenizer: &tokenizer(0), labels: &["no".to_owned()], seed: 0 };
        let error = initial_prompt(&PromptInit::ClassLabel, 1, 2, &sources).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
