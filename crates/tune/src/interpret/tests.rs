//! Against `tests/goldens/interpret.json`, which `scripts/goldens/interpret.py` made with NumPy and scikit-learn; and what is undefined.

use super::*;
use serde_json::Value;
use tokenizers::{models::unigram::Unigram, pre_tokenizers::metaspace::Metaspace};

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../../tests/goldens/interpret.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn table(golden: &Value) -> Frozen {
    matrix(numbers(&golden["table"]), 6)
}

fn matrix(values: Vec<f32>, width: usize) -> Frozen {
    let rows = values.len() / width;
    Frozen::from_f32(values, rows, width)
}

fn prompt(values: Vec<f32>, width: usize) -> Prompt {
    Prompt::new(values.len() / width, width, values).unwrap()
}

/// Pieces 0 and up are these; a text is cut at spaces.
fn tokenizer(pieces: &[&str]) -> Tokenizer {
    let pieces = pieces.iter().map(|piece| ((*piece).to_owned(), -1.0)).collect();
    let mut tokenizer = Tokenizer::new(Unigram::from(pieces, Some(0), false).unwrap());
    tokenizer.with_pre_tokenizer(Some(Metaspace::default()));
    tokenizer
}

fn look(prompt: &Prompt, table: &Frozen, pieces: &[&str], count: usize) -> (Vec<Row>, Words) {
    words(prompt, Vocabulary { table, tokenizer: &tokenizer(pieces) }, count, None).unwrap()
}

fn assert_near(what: &str, ours: Option<f64>, golden: &Value) {
    match (ours, golden.as_f64()) {
        (Some(ours), Some(golden)) => assert!((ours - golden).abs() < 2e-6, "{what}: {ours}, not {golden}"),
        (ours, golden) => assert_eq!(ours, golden, "{what}"),
    }
}

#[test]
fn neighbours_norms_and_tightness_equal_scikit_learns_and_ties_keep_the_vocabularys_order() {
    let golden = golden();
    let (rows, words) = look(&prompt(numbers(&golden["prompt"]), 6), &table(&golden), &["<unk>"], 5);
    for (row, golden) in rows.iter().zip(golden["rows"].as_array().unwrap()) {
        let ids: Vec<u32> = row.nearest.iter().map(|n| n.id).collect();
        assert_eq!(serde_json::json!(ids), golden["ids"], "row {}", row.row);
        for (near, golden) in row.nearest.iter().zip(golden["cosines"].as_array().unwrap()) {
            assert_near("cosine", Some(f64::from(near.cosine)), golden);
        }
        assert_near("norm", Some(row.norm), &golden["norm"]);
        assert_near("tightness", row.tightness, &golden["tightness"]);
    }
    assert_eq!(rows.len(), golden["rows"].as_array().unwrap().len());
    let (found, golden) = (&words.vocabulary, &golden["vocabulary"]);
    assert_eq!((found.size, serde_json::json!(found.undirected)), (40, golden["undirected"].clone()));
    assert_near("tightness of all", found.tightness, &golden["tightness"]);
    let norms = serde_json::to_value(found.norms.unwrap()).unwrap();
    for (name, golden) in golden["norms"].as_object().unwrap() {
        assert_near(name, norms[name].as_f64(), golden);
    }
}

#[test]
fn similarity_equals_the_mean_of_scikit_learns_cosines() {
    let golden = golden();
    let values = [
        numbers(&golden["prompt"]),
        numbers(&golden["other"]),
        numbers(&golden["table"])[5 * 6..6 * 6].to_vec(),
    ];
    let named = values.map(|values| ("a".to_owned(), prompt(values, 6)));
    let found = similarity(&named).unwrap();
    for (matrix, golden) in [(&found.of_rows, &golden["of_rows"]), (&found.of_means, &golden["of_means"])] {
        for (i, row) in matrix.iter().enumerate() {
            (0..3).for_each(|j| assert_near("similarity", row[j], &golden[i][j]));
        }
    }
}

#[test]
fn a_vocabulary_of_several_blocks_is_one_vocabulary() {
    let words = 2 * neighbours::BLOCK + 3;
    // Word `i` points `3 i` thousandths of a radian away from the first column; all of them make not quite a circle.
    let word = |id: usize| [(0.003 * id as f32).cos(), (0.003 * id as f32).sin()];
    let table = matrix((0..words).flat_map(word).collect(), 2);
    let last = words - 1;
    let rows = prompt([word(0), word(neighbours::BLOCK), word(last)].concat(), 2);
    let (rows, words) = look(&rows, &table, &["<unk>"], 2);
    let nearest: Vec<usize> = rows.iter().map(|row| row.nearest[0].id as usize).collect();
    assert_eq!(nearest, [0, neighbours::BLOCK, last]);
    assert_eq!(words.vocabulary.size, last + 1);
}

#[test]
fn a_row_of_zeros_is_near_to_nothing_and_a_word_of_zeros_is_nobodys_neighbour() {
    let table = matrix(vec![0.0, 0.0, 1.0, 2.0, f32::NAN, 1.0], 2);
    let (rows, words) = look(&prompt(vec![0.0, 0.0, 1.0, 0.0], 2), &table, &["<unk>"], 5);
    assert!(rows[0].nearest.is_empty() && rows[0].tightness.is_none() && rows[0].same_word.is_none());
    assert_eq!(rows[1].nearest.iter().map(|n| n.id).collect::<Vec<_>>(), [1]);
    assert_eq!(
        (words.vocabulary.size, words.vocabulary.undirected, words.vocabulary.tightness),
        (3, 2, None)
    );
    assert_eq!((words.repeats.distinct, words.repeats.sharing), (1, 0));
    let only_zeros = [("a".to_owned(), prompt(vec![0.0; 4], 2)), ("b".to_owned(), prompt(vec![1.0; 2], 2))];
    let found = similarity(&only_zeros).unwrap();
    assert_eq!(found.of_rows[0], [None, None]);
    assert_eq!(found.of_means[0][1], None);
    assert_eq!(found.of_rows[1][1].map(|c| (c * 1e6).round()), Some(1e6));
}

#[test]
fn a_vocabulary_of_zeros_alone_has_no_neighbours_and_no_random_vectors() {
    let (rows, words) = look(&prompt(vec![1.0, 0.0], 2), &matrix(vec![0.0; 6], 2), &["<unk>"], 5);
    assert!(rows[0].nearest.is_empty());
    assert_eq!((words.clusters.prompt.nearest, words.clusters.random.nearest), (None, None));
}

#[test]
fn more_neighbours_than_words_are_all_words() {
    let golden = golden();
    let one_row = prompt(numbers(&golden["prompt"])[..6].to_vec(), 6);
    let (rows, words) = look(&one_row, &table(&golden), &["<unk>"], 1000);
    assert_eq!((rows.len(), rows[0].nearest.len()), (1, 38));
    let tightness = words.vocabulary.tightness.unwrap();
    assert!((rows[0].tightness.unwrap() - tightness).abs() < 1e-9, "all words are as tight as all words");
}

#[test]
fn a_prompt_of_another_width_is_refused_with_both_widths() {
    let vocabulary = Vocabulary { table: &matrix(vec![1.0; 6], 3), tokenizer: &tokenizer(&["<unk>"]) };
    let error = words(&prompt(vec![1.0; 4], 2), vocabulary, 5, None).unwrap_err().to_string();
    assert!(error.contains("2 columns") && error.contains("have 3"), "{error}");
    let others =
        [("a.npy".to_owned(), prompt(vec![1.0; 2], 2)), ("b.npy".to_owned(), prompt(vec![1.0; 3], 3))];
    let error = similarity(&others).unwrap_err().to_string();
    assert!(error.contains("a.npy have 2") && error.contains("b.npy have 3"), "{error}");
}

/// Words 1 to 4 point along the first column, 5 and 6 along the second, and a little along a third each their own way.
fn clusters() -> (Frozen, [&'static str; 7]) {
    let third = |first: f32, second: f32, third: f32| [first, second, third];
    let rows = [
        third(0.0, 0.0, -1.0),
        third(1.0, 0.0, 0.0),
        third(1.0, 0.0, 0.1),
        third(1.0, 0.0, 0.2),
        third(1.0, 0.0, 0.3),
        third(0.0, 1.0, 0.0),
        third(0.0, 1.0, 0.1),
    ];
    let pieces = ["<unk>", "▁Technology", "technology", "▁technology", "▁machine", "▁yes", "be"];
    (matrix(rows.concat(), 3), pieces)
}

#[test]
fn pieces_that_differ_in_case_and_space_alone_are_the_same_word() {
    let (table, pieces) = clusters();
    let (rows, words) = look(&prompt(vec![1.0, 0.0, 0.0], 3), &table, &pieces, 4);
    let found: Vec<&str> = rows[0].nearest.iter().map(|n| n.piece.as_str()).collect();
    assert_eq!(found, pieces[1..5]);
    // Three of the six pairs.
    assert_eq!((rows[0].same_word, words.clusters.prompt.same_word), (Some(0.5), Some(0.5)));
}

#[test]
fn rows_with_the_same_nearest_word_are_counted() {
    let (table, pieces) = clusters();
    let rows = prompt(vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 5.0, 0.0, 0.0, 0.0, 1.0, 0.1, 2.0, 0.1, 0.0], 3);
    let found = look(&rows, &table, &pieces, 1).1.repeats;
    assert_eq!((found.distinct, found.sharing), (3, 3));
    assert_eq!(found.repeated, [Repeat { id: 1, piece: "▁Technology".to_owned(), rows: vec![0, 2, 4] }]);
}

#[test]
fn a_label_is_found_by_any_of_its_pieces_and_in_its_own_row_only_if_it_began_there() {
    let (table, pieces) = clusters();
    let rows = prompt(vec![1.0, 0.0, 0.3, 0.0, 1.0, 0.1, 1.0, 0.0, 0.29], 3);
    let look_for = |began_as_labels| {
        let texts = ["yesbe", "machine", "machine"].map(str::to_owned).to_vec();
        let labels = Labels { texts, began_as_labels };
        let vocabulary = Vocabulary { table: &table, tokenizer: &tokenizer(&pieces) };
        words(&rows, vocabulary, 1, Some(&labels)).unwrap().1.labels.unwrap()
    };
    // In the order of the alphabet, and each once.
    let [machine, maybe] = look_for(true).try_into().unwrap();
    assert_eq!((machine.label.as_str(), machine.rows), ("machine", vec![0, 2]));
    assert_eq!((machine.own_row, machine.in_own_row), (Some(0), Some(true)));
    let pieces: Vec<(&str, &[usize])> =
        maybe.pieces.iter().map(|p| (p.piece.as_str(), p.rows.as_slice())).collect();
    assert_eq!(pieces, [("▁yes", &[][..]), ("be", &[1][..])]);
    assert_eq!((maybe.rows, maybe.own_row, maybe.in_own_row), (vec![1], Some(1), Some(true)));
    assert!(look_for(false).iter().all(|label| label.own_row.is_none() && label.in_own_row.is_none()));
}

#[test]
fn random_vectors_have_the_vocabularys_columns_and_are_the_same_each_time() {
    let rows: Vec<f32> = (0..500).flat_map(|i| [10.0 + (i % 2) as f32 * 2.0, -3.0, 0.0]).collect();
    let scan = vocabulary::Scan::of(&matrix(rows, 3));
    let drawn = scan.random_vectors();
    assert_eq!(drawn, scan.random_vectors());
    let column = |c: usize| drawn.chunks_exact(3).map(|row| f64::from(row[c])).collect::<Vec<_>>();
    let mean = column(0).iter().sum::<f64>() / 64.0;
    let deviation = (column(0).iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 64.0).sqrt();
    // Means 11 and deviation 1, within four standard errors of 64 draws.
    assert!((mean - 11.0).abs() < 0.5 && (deviation - 1.0).abs() < 0.36, "{mean} {deviation}");
    assert!(column(1).iter().all(|v| (v + 3.0).abs() < 1e-3) && column(2).iter().all(|v| *v == 0.0));
}
