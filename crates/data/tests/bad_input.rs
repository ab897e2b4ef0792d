//! Bad input: each kind gives one message that names the file, the line and the mend.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Folder, format, golden, gzip};
use incipit_data::{Error, LoadOptions, TaskFormat, load_text, read_records};
use std::path::Path;

const SKIP: LoadOptions = LoadOptions { skip_bad_records: true };
const GOOD: &str = "{\"inputs\": \"a\", \"targets\": \"b\"}\n";

/// The message about a file which is refused.
fn refusal(path: &Path, task: &TaskFormat) -> String {
    load_text(path, task, LoadOptions::default()).unwrap_err().to_string()
}

/// Asserts that a file of these bytes is refused with its name and these words.
#[track_caller]
fn assert_refused(name: &str, content: impl AsRef<[u8]>, words: &[&str]) {
    let folder = Folder::new();
    let path = folder.write(name, content);
    assert_says(&refusal(&path, &TaskFormat::default()), &path, words);
}

#[track_caller]
fn assert_says(message: &str, path: &Path, words: &[&str]) {
    assert!(message.contains(path.to_str().unwrap()), "{message}");
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn a_missing_file() {
    let path = Folder::new().path("none.jsonl");
    assert_says(&refusal(&path, &TaskFormat::default()), &path, &["cannot open", "check the name"]);
}

#[test]
fn a_directory() {
    let folder = Folder::new();
    let path = folder.path("d.jsonl");
    std::fs::create_dir(&path).unwrap();
    assert_says(&refusal(&path, &TaskFormat::default()), &path, &["is a directory", "name one data file"]);
}

#[test]
fn a_name_that_tells_no_format() {
    for name in ["a.txt", "a", "a.parquet.gz"] {
        assert_refused(name, GOOD, &["no known data format", ".jsonl", ".csv and .tsv", ".gz", ".parquet"]);
    }
}

#[test]
fn an_empty_file() {
    for name in ["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"] {
        assert_refused(name, "", &["is empty", "needs one record a line"]);
    }
}

#[test]
fn a_file_without_records() {
    let no_rows = std::fs::read(golden("no_rows.parquet")).unwrap();
    let cases: [(&str, &[u8]); 7] = [
        ("a.jsonl", b"\n  \n"),
        ("a.jsonl", b"\xef\xbb\xbf"),
        ("a.jsonl.gz", &gzip("")),
        ("a.csv", b"inputs,targets\n"),
        ("a.csv", b"\n\n"),
        ("a.tsv.gz", &gzip("inputs\ttargets\n\n")),
        ("a.parquet", &no_rows),
    ];
    for (name, content) in cases {
        assert_refused(name, content, &["holds no records", "add at least one"]);
    }
}

#[test]
fn malformed_json() {
    let words = ["a.jsonl, line 3: malformed JSON at column 12", "one whole JSON object"];
    assert_refused(
        "a.jsonl",
        format!("{GOOD}\n{{\"inputs\": \"a"),
        &["a.jsonl, line 3", "malformed JSON at column"],
    );
    assert_refused("a.jsonl", format!("{GOOD}\n{{\"inputs\": a}}"), &words);
    assert_refused(
        "a.jsonl",
        format!("{GOOD}{}", "[".repeat(100_000)),
        &["line 2: malformed JSON", "recursion"],
    );
    assert_refused(
        "a.json",
        "{\n\"inputs\": \"a\",\n",
        &["line 1: malformed JSON", "EOF", "one whole JSON object"],
    );
    assert_refused("a.jsonl", GOOD.trim_end().repeat(2), &["line 1: malformed JSON at column", "trailing"]);
}

#[test]
fn a_record_that_is_no_object() {
    for (line, found) in [("[1]", "an array"), ("\"a\"", "a string"), ("3", "a number"), ("null", "null")] {
        let words = [&format!("line 2: the record is {found}"), "one object a line"];
        assert_refused("a.jsonl", format!("{GOOD}{line}\n"), &words);
    }
    for array in ["[\n  {\"inputs\": \"a\"}\n]\n", "[{\"inputs\": \"a\"},\n{\"inputs\": \"b\"}]"] {
        assert_refused("a.json", array, &["line 1: the record is an array", "jq -c '.[]'"]);
    }
}

#[test]
fn a_row_of_another_width() {
    let words = ["line 5: the row has 3 fields and the header 2", "in quotes"];
    assert_refused("a.csv", "inputs,targets\n\"a\nb\",c\n\nd,e,f\n", &words);
    assert_refused("a.csv", "inputs,targets\na\n", &["line 2: the row has 1 fields and the header 2"]);
    assert_refused(
        "a.tsv",
        "inputs\ttargets\na\tb\tc\n",
        &["line 2: the row has 3 fields", "cannot hold a tab"],
    );
}

#[test]
fn a_header_that_names_no_columns_or_one_twice() {
    assert_refused(
        "a.csv",
        "\ninputs,x,inputs\n1,2,3\n",
        &["line 2: the header has the column \"inputs\" twice"],
    );
    assert_refused("a.csv", ",\n1,2\n", &["line 1: the header names no column"]);
    assert_refused("a.csv", b"inputs,\xff\n1,2\n", &["line 1: the header is not text", "UTF-8"]);
}

#[test]
fn a_quote_that_is_never_closed() {
    let words = ["line 3: a quoted field is not closed", "close it with \""];
    assert_refused("a.csv", "inputs,targets\na,b\n\"c,d\ne,f\n", &words);
    assert_refused("a.csv", "inputs,\"targets\na,b\n", &["line 1: a quoted field is not closed"]);
}

#[test]
fn a_missing_field() {
    let words = ["line 2", "\"{inputs}\"", "the field `inputs`", "only `input`, `targets`"];
    assert_refused("a.jsonl", format!("{GOOD}{{\"input\": \"a\", \"targets\": \"b\"}}\n"), &words);
    assert_refused("a.csv", "a,b\n1,2\n", &["line 2", "the field `inputs`", "only `a`, `b`"]);
    let folder = Folder::new();
    let path = folder.path("a.parquet");
    std::fs::copy(golden("rows_none.parquet"), &path).unwrap();
    let message = refusal(&path, &format("{question}", "{targets}", None));
    assert_says(&message, &path, &["a.parquet, row 1", "the field `question`", "only `inputs`, `targets`"]);
}

#[test]
fn a_value_that_is_no_text() {
    for (value, found) in [("null", "null"), ("[\"a\"]", "an array"), ("{\"a\": 1}", "an object")] {
        let words = [&format!("line 2: the field `targets` is {found}"), "give the record a value"];
        assert_refused("a.jsonl", format!("{GOOD}{{\"inputs\": \"a\", \"targets\": {value}}}\n"), &words);
    }
}

#[test]
fn a_label_outside_the_map() {
    let folder = Folder::new();
    let path =
        folder.write("a.jsonl", "{\"inputs\": \"a\", \"targets\": 0}\n{\"inputs\": \"a\", \"targets\": 2}\n");
    let message = refusal(&path, &format("{inputs}", "{targets}", Some("0=False,1=True")));
    assert_says(&message, &path, &["line 2", "the label \"2\"", "the label map 0=False,1=True", "--labels"]);
}

#[test]
fn an_empty_target() {
    for target in ["", "  "] {
        let words = ["line 2: the target is empty", "give the record a target text"];
        assert_refused(
            "a.jsonl",
            format!("{GOOD}{{\"inputs\": \"a\", \"targets\": \"{target}\"}}\n"),
            &words,
        );
    }
    assert_refused("a.csv", "inputs,targets\na,\n", &["line 2: the target is empty"]);
}

#[test]
fn bytes_that_are_no_utf8() {
    let words = ["line 2: byte 12 of the line is not UTF-8", "save the file as UTF-8"];
    assert_refused("a.jsonl", [GOOD.as_bytes(), b"{\"inputs\":\"\xe9\"}\n"].concat(), &words);
    assert_refused("a.csv", b"inputs,targets\na,\xff\n", &["line 2: byte 1 of the field", "not UTF-8"]);
    assert_refused("a.jsonl", gzip(GOOD), &["line 1", "a name that ends in .gz"]);
}

#[test]
fn gzip_that_is_cut_or_none() {
    let text: String =
        (0..2000).map(|i| format!("{{\"inputs\": \"{}\", \"targets\": \"b\"}}\n", i * i)).collect();
    let packed = gzip(text);
    let words = ["line", "cannot decompress", "cut short", "fetch or write it again"];
    assert_refused("a.jsonl.gz", &packed[..packed.len() / 2], &words);
    assert_refused("a.jsonl.gz", &packed[..packed.len() - 3], &words);
    assert_refused("a.csv.gz", &packed[..7], &words);
    assert_refused("a.jsonl.gz", GOOD, &words);
}

#[test]
fn parquet_that_is_cut_or_none() {
    let whole = std::fs::read(golden("rows_snappy.parquet")).unwrap();
    let words = ["row 1", "cannot read Parquet", "cut short or damaged", "save it as JSONL"];
    assert_refused("a.parquet", &whole[..whole.len() / 2], &words);
    assert_refused("a.parquet", &whole[..3], &words);
    assert_refused("a.parquet", GOOD, &words);
}

#[test]
fn bad_records_are_counted_and_skipped_where_that_is_asked_for() {
    let folder = Folder::new();
    let bad = ["{", "[]", "{\"inputs\": \"a\"}", "{\"inputs\": \"a\", \"targets\": null}", "3", "4", "5"]
        .join("\n");
    let path = folder.write("a.jsonl", format!("{GOOD}{bad}\n{GOOD}"));
    let loaded = load_text(&path, &TaskFormat::default(), SKIP).unwrap();
    let places: Vec<_> = loaded.examples.iter().map(|e| (e.index, e.line)).collect();
    assert_eq!(places, [(0, 1), (8, 9)]);
    assert_eq!((loaded.skipped, loaded.first_skipped.len()), (7, 5));
    assert!(loaded.first_skipped[0].to_string().contains("a.jsonl, line 2: malformed JSON"));

    let csv = folder.write("a.csv", b"inputs,targets\na,b,c\n\xff,x\nd,e\n");
    let loaded = load_text(&csv, &TaskFormat::default(), SKIP).unwrap();
    assert_eq!((loaded.examples.len(), loaded.examples[0].line, loaded.skipped), (1, 4, 2));
}

#[test]
fn a_file_of_bad_records_alone_is_refused_though_they_may_be_skipped() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", "{}\n[]\n");
    let message = load_text(&path, &TaskFormat::default(), SKIP).unwrap_err().to_string();
    assert_says(&message, &path, &["all 2 records are bad", "the first is", "line 1", "`inputs`"]);
}

#[test]
fn damage_to_the_file_is_never_skipped() {
    let folder = Folder::new();
    let packed = gzip(GOOD.repeat(10));
    for (name, content) in [
        ("a.jsonl.gz", packed[..packed.len() - 4].to_vec()),
        ("a.csv", b"inputs,targets\na,b\n\"c,d\n".to_vec()),
    ] {
        let error = load_text(&folder.write(name, content), &TaskFormat::default(), SKIP).unwrap_err();
        assert!(matches!(error, Error::Gzip { .. } | Error::UnclosedQuote { .. }), "{error}");
    }
}

#[test]
fn records_end_after_damage_and_go_on_after_a_bad_record() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", format!("[]\n{GOOD}"));
    let records: Vec<bool> = read_records(&path).unwrap().map(|record| record.is_ok()).collect();
    assert_eq!(records, [false, true]);
    let path = folder.write("a.csv", "inputs\na\n\"b");
    let records: Vec<bool> = read_records(&path).unwrap().map(|record| record.is_ok()).collect();
    assert_eq!(records, [true, false]);
}
