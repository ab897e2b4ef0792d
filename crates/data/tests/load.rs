//! Reading good files.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Folder, format, golden, gzip, load};
use incipit_data::{Format, LoadOptions, TextExample, labels_of, load_inputs, load_text, read_records};
use proptest::prelude::*;

fn triples(examples: &[TextExample]) -> Vec<(&str, &str, usize)> {
    examples.iter().map(|e| (e.inputs.as_str(), e.targets.as_str(), e.line)).collect()
}

#[test]
fn every_text_format_gives_the_same_examples() {
    let json =
        "{\"inputs\": \"a, \\\"b\\\"\", \"targets\": \"yes\"}\n{\"inputs\": \"é\", \"targets\": \"no\"}\n";
    let csv = "inputs,targets\n\"a, \"\"b\"\"\",yes\né,no\n";
    let tsv = "inputs\ttargets\na, \"b\"\tyes\né\tno\n";
    let folder = Folder::new();
    for (name, text) in
        [("a.jsonl", json), ("a.json", json), ("A.NDJSON", json), ("a.csv", csv), ("a.tsv", tsv)]
    {
        let plain = folder.write(name, text);
        let packed = folder.write(&format!("{name}.gz"), gzip(text));
        let from = if name.to_lowercase().contains("json") { 1 } else { 2 };
        for path in [plain, packed] {
            let loaded = load(&path);
            let expected = [("a, \"b\"", "yes", from), ("é", "no", from + 1)];
            assert_eq!(triples(&loaded.examples), expected, "{}", path.display());
            assert_eq!((loaded.skipped, loaded.first_skipped.len()), (0, 0));
        }
    }
}

#[test]
fn gzip_files_of_several_members_are_read_whole() {
    let folder = Folder::new();
    let mut bytes = gzip("{\"inputs\": \"a\", \"targets\": \"1\"}\n");
    bytes.extend(gzip("{\"inputs\": \"b\", \"targets\": \"2\"}\n"));
    let loaded = load(&folder.write("a.jsonl.gz", bytes));
    assert_eq!(triples(&loaded.examples), [("a", "1", 1), ("b", "2", 2)]);
}

#[test]
fn a_byte_order_mark_blank_lines_and_windows_line_ends_are_passed_over() {
    let folder = Folder::new();
    let json = "\u{feff}\r\n{\"inputs\": \"a\", \"targets\": \"1\"}\r\n \t\r\n\r\n\
                {\"inputs\": \"b\", \"targets\": \"2\"}";
    let loaded = load(&folder.write("a.jsonl", json));
    assert_eq!(triples(&loaded.examples), [("a", "1", 2), ("b", "2", 5)]);
    assert_eq!(loaded.examples.iter().map(|e| e.index).collect::<Vec<_>>(), [0, 1]);

    let csv = "\u{feff}inputs,targets\r\n\r\n\"a\r\nb\",1\r\n\r\n  \r\nc,2";
    let loaded = load(&folder.write("a.csv", csv));
    assert_eq!(triples(&loaded.examples), [("a\nb", "1", 3), ("c", "2", 7)]);
}

#[test]
fn quotes_in_tsv_are_characters_like_any_other() {
    let folder = Folder::new();
    let loaded = load(&folder.write("a.tsv", "inputs\ttargets\n\"he said\t1\nit's 5\" wide\t\"2\"\n"));
    assert_eq!(triples(&loaded.examples), [("\"he said", "1", 2), ("it's 5\" wide", "\"2\"", 3)]);
}

#[test]
fn a_csv_with_a_nameless_column_of_row_numbers_is_read() {
    let folder = Folder::new();
    let loaded = load(&folder.write("a.csv", ",inputs,targets\n0,a,x\n1,b,y\n"));
    assert_eq!(triples(&loaded.examples), [("a", "x", 2), ("b", "y", 3)]);
}

#[test]
fn templates_and_labels_make_texts_of_fields() {
    let folder = Folder::new();
    let json =
        "{\"q\": \"why?\", \"n\": 2, \"label\": true}\n{\"q\": \"how?\", \"n\": 0.5, \"label\": false}\n";
    let path = folder.write("a.jsonl", json);
    let task = format("question: {q} n: {n}", "{label}", Some("true=yes,false=no"));
    let loaded = load_text(&path, &task, LoadOptions::default()).unwrap();
    let expected = [("question: why? n: 2", "yes", 1), ("question: how? n: 0.5", "no", 2)];
    assert_eq!(triples(&loaded.examples), expected);
}

#[test]
fn inputs_are_read_without_targets() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", "{\"q\": \"why?\"}\n");
    let loaded = load_inputs(&path, &"q: {q}".parse().unwrap(), LoadOptions::default()).unwrap();
    assert_eq!(triples(&loaded.examples), [("q: why?", "", 1)]);
}

#[test]
fn parquet_files_of_every_compression_are_read() {
    for compression in ["none", "snappy", "gzip", "zstd", "lz4"] {
        let loaded = load(&golden(&format!("rows_{compression}.parquet")));
        let expected = [("plain", "yes", 1), ("Émile 東京", "no", 2), ("third, \"row\"\n", "yes", 3)];
        assert_eq!(triples(&loaded.examples), expected, "{compression}");
    }
}

#[test]
fn parquet_values_become_json_values() {
    let records: Vec<_> = read_records(&golden("types.parquet")).unwrap().collect::<Result<_, _>>().unwrap();
    let [(1, record)] = records.as_slice() else { panic!("one row, but found {records:?}") };
    let expected = serde_json::json!({
        "text": "a", "int": -3, "big": u64::MAX, "single": 0.1, "half": 0.5, "double": 0.25, "nan": null,
        "flag": true, "none": null, "bytes_text": "bytes", "bytes": [255, 0], "date": "2021-04-18", "price": "12.50",
        "list": ["x", "y"], "struct": {"k": 1},
    });
    assert_eq!(serde_json::to_value(record).unwrap(), expected);
}

#[test]
fn the_formats_are_told_by_the_ending_of_the_name() {
    let of = |name: &str| Format::of(name.as_ref());
    assert_eq!(of("x/train.v2.JSONL.gz"), Some((Format::JsonLines, true)));
    assert_eq!(of("a.parquet"), Some((Format::Parquet, false)));
    for unknown in ["a.parquet.gz", "a.txt", "jsonl", "a.gz", "a.jsonl/", ".."] {
        let known = unknown == "a.jsonl/";
        assert_eq!(of(unknown).is_some(), known, "{unknown}");
    }
}

#[test]
fn labels_are_the_sorted_distinct_targets_if_they_are_few() {
    let example =
        |target: &str| TextExample { inputs: String::new(), targets: target.into(), index: 0, line: 1 };
    let examples = ["no", "yes", "no", "maybe"].map(example);
    assert_eq!(labels_of(&examples, 3).unwrap(), ["maybe", "no", "yes"]);
    assert_eq!(labels_of(&examples, 2), None);
    assert_eq!(labels_of(&[], 2).unwrap(), Vec::<String>::new());
}

proptest! {
    #[test]
    fn reading_any_bytes_never_panics_and_ends(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        name in prop::sample::select(vec!["a.jsonl", "a.csv", "a.tsv", "a.csv.gz", "a.parquet"]),
    ) {
        let folder = Folder::new();
        let path = folder.write(name, &bytes);
        if let Ok(records) = read_records(&path) {
            prop_assert!(records.take(300).count() < 300);
        }
    }

    #[test]
    fn text_near_a_format_never_panics_and_ends(
        text in "[{}\\[\\]\":,a1\n\r\t\\\\ é\u{feff}]{0,60}",
        name in prop::sample::select(vec!["a.jsonl", "a.csv", "a.tsv"]),
    ) {
        let folder = Folder::new();
        let path = folder.write(name, &text);
        if let Ok(records) = read_records(&path) {
            prop_assert!(records.take(100).count() < 100);
        }
    }

    #[test]
    fn a_parquet_file_with_a_changed_byte_or_a_cut_never_panics_and_ends(
        name in prop::sample::select(vec!["rows_snappy.parquet", "rows_zstd.parquet", "types.parquet"]),
        at in any::<usize>(),
        value in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = std::fs::read(golden(name)).unwrap();
        let at = at % bytes.len();
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] = value;
        }
        let folder = Folder::new();
        if let Ok(records) = read_records(&folder.write("a.parquet", bytes)) {
            prop_assert!(records.take(1000).count() < 1000);
        }
    }
}
