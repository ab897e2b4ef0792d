//! Examples out of corpora: order, packing, going on from a place, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use common::{Folder, golden, gzip};
use incipit_data::pretrain::{Cursor, Objective, PretrainError, PretrainOptions, Pretraining, add_sentinel};
use incipit_data::{Error, TokenizedExample};
use tokenizers::Tokenizer;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;

const END: u32 = 1;
const SENTINEL: u32 = 1099;
const VOCABULARY: usize = 1100;

/// Words to ids: the letters from 3 on, `w0`, `w1` and so on from 29 on, and sentinels that count down from the last id.
fn tokenizer(sentinels: u32) -> Tokenizer {
    let special = [("<pad>", 0), ("</s>", END), ("<unk>", 2)].map(|(word, id)| (word.to_owned(), id));
    let letters = ('a'..='z').zip(3..).map(|(letter, id)| (letter.to_string(), id));
    let words = (0..900).map(|n| (format!("w{n}"), 29 + n));
    let sentinels = (0..sentinels).map(|n| (format!("<extra_id_{n}>"), SENTINEL - n));
    let vocabulary = special.into_iter().chain(letters).chain(words).chain(sentinels).collect();
    let model = WordLevel::builder().vocab(vocabulary).unk_token("<unk>".into()).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    tokenizer
}

/// Short segments, in the order of the files.
fn in_order(objective: Objective) -> PretrainOptions {
    PretrainOptions {
        objective,
        input_length: 20,
        target_length: 20,
        noise_density: 0.3,
        mean_span_length: 2.0,
        shuffle: false,
        epochs: NonZeroU64::new(1),
        ..PretrainOptions::default()
    }
}

fn open(paths: &[PathBuf], options: &PretrainOptions) -> Pretraining {
    Pretraining::open(paths, &tokenizer(100), VOCABULARY, options).unwrap()
}

/// All examples of some epochs.
fn read(paths: &[PathBuf], options: &PretrainOptions) -> Vec<TokenizedExample> {
    open(paths, options).next_batch(usize::MAX).unwrap()
}

/// Documents of words, none of them twice in the same order; some have none. Words are far apart, so that few of them are more
/// text than is read at once.
fn documents(count: usize) -> Vec<String> {
    let mut state = 9_u64;
    let mut below = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut document = |_| {
        let words: Vec<String> = (0..below(40)).map(|_| format!("w{}", below(900))).collect();
        words.join("        ")
    };
    (0..count).map(&mut document).collect()
}

fn lines(documents: &[String]) -> String {
    documents.iter().map(|text| format!("{text}\n")).collect()
}

fn records(documents: &[String]) -> String {
    documents.iter().map(|text| format!("{}\n", serde_json::json!({"id": 1, "text": text}))).collect()
}

/// The ids of documents end to end.
fn tokens(documents: &[String]) -> Vec<u32> {
    let (mut ids, tokenizer) = (Vec::new(), tokenizer(0));
    for document in documents.iter().filter(|text| !text.is_empty()) {
        ids.extend(document.split_whitespace().map(|word| tokenizer.token_to_id(word).unwrap()));
        ids.push(END);
    }
    ids
}

/// The segment that an example was made of, put together again from its two sides.
fn restored(example: &TokenizedExample) -> Vec<u32> {
    let (Some((&END, input)), Some((&END, target))) =
        (example.input.split_last(), example.target.split_last())
    else {
        panic!("both sides end with </s>: {example:?}");
    };
    let is_sentinel = |id: &u32| *id > SENTINEL - 100;
    let Some(&first) = target.first().filter(|id| is_sentinel(id)) else {
        return [input, target].concat();
    };
    assert_eq!(first, SENTINEL);
    let mut spans = target[1..].split(is_sentinel);
    let mut ids = Vec::new();
    let mut next = SENTINEL;
    for &id in input {
        if is_sentinel(&id) {
            assert_eq!(id, next, "sentinels count down");
            next -= 1;
            ids.extend(spans.next().unwrap());
        } else {
            ids.push(id);
        }
    }
    assert_eq!(spans.next(), None, "every span of the target has its place in the input");
    ids
}

#[test]
fn segments_are_the_documents_end_to_end_each_of_them_full() {
    let folder = Folder::new();
    let documents = documents(300);
    folder.write("1.txt", lines(&documents[..100]));
    folder.write("2.jsonl", records(&documents[100..]));
    for objective in Objective::ALL {
        let options = PretrainOptions { epochs: NonZeroU64::new(2), ..in_order(objective) };
        let lengths = options.lengths().unwrap();
        let expected = [tokens(&documents), tokens(&documents)].concat();
        let examples = read(&[folder.path("")], &options);
        assert_eq!(examples.len(), expected.len() / lengths.segment, "{objective}");
        for (example, segment) in examples.iter().zip(expected.chunks(lengths.segment)) {
            assert_eq!(restored(example), segment, "{objective}");
            let found = (example.input.len(), example.target.len());
            match objective {
                Objective::SpanCorruption => assert_eq!(found, (lengths.input, lengths.target)),
                Objective::PrefixLm => assert!(found.0 >= 2 && found.1 >= 2, "{example:?}"),
            }
        }
    }
}

#[test]
fn a_stream_goes_on_from_every_place_with_the_same_bytes() {
    let folder = Folder::new();
    let documents = documents(1300);
    folder.write("a.txt", lines(&documents[..500]));
    folder.write("b.jsonl.gz", gzip(records(&documents[500..900])));
    folder.write("c.parquet", std::fs::read(golden("documents.parquet")).unwrap());
    folder.write("d.txt.gz", gzip(format!("\n\n{}", lines(&documents[900..]))));
    let paths = [folder.path("")];
    for shuffle in [true, false] {
        let options = PretrainOptions { shuffle, epochs: None, ..in_order(Objective::SpanCorruption) };
        let mut whole = open(&paths, &options);
        let mut cursors: Vec<Cursor> = Vec::new();
        let mut examples = Vec::new();
        // Batches of an odd size, so that cursors stand at all places of a window; past the second epoch.
        while whole.cursor().epoch() < 2 {
            cursors.push(whole.cursor().clone());
            examples.extend(whole.next_batch(301).unwrap());
        }
        assert!(cursors.len() > 6);
        for cursor in cursors {
            let saved = serde_json::to_string(&cursor).unwrap();
            assert!(saved.len() < 250, "{saved}");
            let mut resumed = open(&paths, &options);
            resumed.seek(&serde_json::from_str(&saved).unwrap()).unwrap();
            assert_eq!(resumed.cursor(), &cursor);
            let at = cursor.examples() as usize;
            let expected = &examples[at..examples.len().min(at + 800)];
            assert!(
                resumed.next_batch(expected.len()).unwrap() == expected,
                "shuffle {shuffle}, from {saved}"
            );
        }
    }
}

#[test]
fn a_shuffled_epoch_has_the_examples_of_one_in_order_in_an_order_of_its_seed() {
    let folder = Folder::new();
    let paths = [folder.write("a.txt", lines(&documents(1300)))];
    let ordered = PretrainOptions { seed: 4, ..in_order(Objective::SpanCorruption) };
    let shuffled = PretrainOptions { shuffle: true, ..ordered };
    let in_order = read(&paths, &ordered);
    let found = read(&paths, &shuffled);
    assert!(in_order.len() > 1024, "more than a window");
    assert_eq!(found, read(&paths, &shuffled));
    let sorted = |mut examples: Vec<TokenizedExample>| {
        examples.sort_by(|a, b| (&a.input, &a.target).cmp(&(&b.input, &b.target)));
        examples
    };
    assert!(found != in_order);
    assert!(
        sorted(found.clone()) == sorted(in_order),
        "noise goes by the place in the stream, not by its order"
    );
    assert!(read(&paths, &PretrainOptions { seed: 5, ..shuffled }) != found);
}

#[test]
fn every_epoch_has_every_file_in_an_order_of_its_own() {
    let folder = Folder::new();
    let options = PretrainOptions { shuffle: true, epochs: None, ..in_order(Objective::PrefixLm) };
    let words = options.lengths().unwrap().segment - 1;
    for n in 0..9 {
        folder.write(&format!("{n}.txt"), format!("w{n} ").repeat(words));
    }
    let mut stream = open(&[folder.path("")], &options);
    let mut epoch = |number: u64| -> Vec<u32> {
        let batch = stream.next_batch(9).unwrap();
        assert_eq!(stream.cursor().epoch(), number);
        batch.iter().map(|example| restored(example)[0]).collect()
    };
    let orders = [epoch(0), epoch(1), epoch(2)];
    assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    for mut order in orders {
        order.sort_unstable();
        assert_eq!(order, (29..38).collect::<Vec<u32>>());
    }
}

#[test]
fn a_corpus_is_the_same_in_every_format_from_every_place() {
    let folder = Folder::new();
    let documents: Vec<String> = ["a b c", "", "d e f g h i j", "k", "l m"].map(str::to_owned).into();
    let options =
        PretrainOptions { input_length: 5, epochs: NonZeroU64::new(3), ..in_order(Objective::PrefixLm) };
    let expected = read(&[folder.write("a.txt", lines(&documents))], &options);
    assert_eq!(expected.len(), 17 * 3 / 4);
    for path in [
        folder.write("b.TXT", format!("\u{feff}{}", lines(&documents).replace('\n', "\r\n"))),
        folder.write("c.txt.gz", gzip(lines(&documents))),
        folder.write("d.jsonl", records(&documents)),
        folder.write("e.ndjson.gz", gzip(records(&documents))),
        folder.write("f.csv", format!("text,id\n{}", lines(&documents).replace('\n', ",1\n"))),
        golden("documents.parquet"),
    ] {
        let paths = [path];
        let mut stream = open(&paths, &options);
        for at in 0..expected.len() {
            let mut resumed = open(&paths, &options);
            resumed.seek(stream.cursor()).unwrap();
            assert_eq!(resumed.next_batch(99).unwrap(), expected[at..], "{paths:?} from {at}");
            assert_eq!(stream.next_batch(1).unwrap(), expected[at..=at], "{paths:?} at {at}");
        }
    }
}

#[test]
fn a_directory_is_walked_in_the_order_of_names_and_only_text_is_taken() {
    let folder = Folder::new();
    std::fs::create_dir_all(folder.path("b/deeper")).unwrap();
    folder.write("c.txt", "c c c");
    folder.write("a.jsonl", "{\"text\": \"a a a\"}");
    folder.write("b/deeper/x.txt", "b b b");
    for other in ["README.md", ".hidden.txt", "b/a.lock"] {
        folder.write(other, "z z z");
    }
    let options = PretrainOptions { input_length: 5, ..in_order(Objective::PrefixLm) };
    let firsts = |paths: &[PathBuf]| -> Vec<u32> {
        read(paths, &options).iter().map(|example| restored(example)[0]).collect()
    };
    assert_eq!(firsts(&[folder.path("")]), [3, 4, 5]);
    assert_eq!(firsts(&[folder.path("c.txt"), folder.path("b")]), [5, 4]);
}

#[test]
fn a_corpus_is_read_as_it_is_used_and_a_bad_record_is_named() {
    let folder = Folder::new();
    let documents = documents(1300);
    let path = folder.write("far.jsonl", format!("{}{{\"title\": \"x\"}}\n", records(&documents)));
    let mut stream = open(&[path], &in_order(Objective::SpanCorruption));
    assert_eq!(stream.next_batch(64).unwrap().len(), 64, "the far end is not read yet");
    let message = stream.next_batch(usize::MAX).unwrap_err().to_string();
    assert!(message.contains("far.jsonl, line 1301: the record"), "{message}");
    for (bad, words) in [
        (
            &b"{\"title\": \"x\"}\n"[..],
            "the record has only `title`, and a corpus has a text in `text`; rename",
        ),
        (b"{\"text\": null}\n", "the record has null in the field `text`"),
        (b"{\"text\": \"\xff\"}\n", "is not UTF-8; save the file as UTF-8"),
        (b"[1]\n", "not a JSON object"),
    ] {
        let path = folder.write("a.jsonl", [b"\n", bad].concat());
        let message = open(&[path], &in_order(Objective::PrefixLm)).next_batch(1).unwrap_err().to_string();
        assert!(message.contains("a.jsonl, line 2: ") && message.contains(words), "{message}");
    }
    let table = open(&[golden("rows_none.parquet")], &in_order(Objective::SpanCorruption)).next_batch(1);
    let message = table.unwrap_err().to_string();
    assert!(
        message.contains("rows_none.parquet, row 1: ") && message.contains("`inputs`, `targets`"),
        "{message}"
    );
}

#[test]
fn what_is_no_corpus_is_refused_before_anything_is_read() {
    let folder = Folder::new();
    let options = in_order(Objective::SpanCorruption);
    let refusal = |path: &Path| {
        Pretraining::open(&[path.to_path_buf()], &tokenizer(100), VOCABULARY, &options)
            .unwrap_err()
            .to_string()
    };
    std::fs::create_dir(folder.path("d")).unwrap();
    for (path, words) in [
        (folder.path("none.txt"), "cannot open"),
        (folder.write("empty.txt", ""), "is empty"),
        (folder.write("a.docx", "a"), "no known format of a corpus; known are .txt"),
        (folder.path("d"), "holds no text; name files of text"),
    ] {
        let message = refusal(&path);
        assert!(message.contains(path.to_str().unwrap()) && message.contains(words), "{message}");
    }
}

#[test]
fn a_corpus_without_text_or_too_little_of_it_ends_with_an_error() {
    let folder = Folder::new();
    let endless = PretrainOptions { epochs: None, ..in_order(Objective::PrefixLm) };
    for content in ["\n\n", "\u{2003}\n\u{2003}\n"] {
        let paths = [folder.write("a.txt", content), folder.write("b.txt", " \n")];
        let message = open(&paths, &endless).next_batch(1).unwrap_err().to_string();
        assert!(message.contains("a.txt") && message.contains("holds no text"), "{message}");
    }
    let paths = [folder.write("a.txt", "a b c")];
    let short = open(&paths, &in_order(Objective::PrefixLm)).next_batch(1).unwrap_err();
    assert!(matches!(short, Error::Pretrain(PretrainError::ShortCorpus { segment: 19 })), "{short}");
    assert_eq!(open(&paths, &endless).next_batch(2).unwrap().len(), 2, "many epochs fill an example");
}

#[test]
fn after_the_last_epoch_batches_are_empty_also_from_a_cursor() {
    let folder = Folder::new();
    let paths = [folder.write("a.txt", lines(&documents(50)))];
    let options = PretrainOptions { shuffle: true, ..in_order(Objective::SpanCorruption) };
    let mut stream = open(&paths, &options);
    let count = stream.next_batch(usize::MAX).unwrap().len();
    assert_eq!(stream.cursor().examples(), count as u64);
    let end = stream.cursor().clone();
    for stream in [&mut stream, &mut open(&paths, &options)] {
        stream.seek(&end).unwrap();
        assert_eq!(stream.next_batch(3).unwrap(), []);
        assert_eq!(stream.cursor(), &end);
    }
    let mut longer = open(&paths, &PretrainOptions { epochs: None, ..options });
    longer.seek(&end).unwrap();
    assert_eq!(longer.next_batch(3).unwrap().len(), 3, "more epochs may be asked for later");
}

#[test]
fn a_cursor_of_other_files_or_options_is_refused() {
    let folder = Folder::new();
    let paths = [folder.write("a.txt", lines(&documents(50)))];
    let options = in_order(Objective::SpanCorruption);
    let cursor = open(&paths, &options).cursor().clone();
    let refused = |options: &PretrainOptions| {
        matches!(open(&paths, options).seek(&cursor), Err(Error::Pretrain(PretrainError::OtherStream)))
    };
    assert!(!refused(&options));
    assert!(refused(&PretrainOptions { seed: 1, ..options }));
    assert!(refused(&PretrainOptions { input_length: 21, ..options }));
    folder.write("a.txt", lines(&documents(51)));
    assert!(refused(&options));
}

#[test]
fn a_tokenizer_that_is_not_the_models_is_refused() {
    let folder = Folder::new();
    let paths = [folder.write("a.txt", "a b c")];
    let refusal = |sentinels, vocabulary, options: &PretrainOptions| {
        let opened = Pretraining::open(&paths, &tokenizer(sentinels), vocabulary, options);
        opened.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let spans = in_order(Objective::SpanCorruption);
    let message = refusal(0, VOCABULARY, &spans);
    assert!(message.contains("<extra_id_0>") && message.contains("prefix-lm"), "{message}");
    let message = refusal(2, VOCABULARY, &spans);
    assert!(message.contains("only 2 sentinels"), "{message}");
    let message = refusal(100, VOCABULARY - 1, &spans);
    assert!(message.contains("does not match the model") && message.contains("<extra_id_0>"), "{message}");
    assert_eq!(refusal(0, VOCABULARY - 1, &in_order(Objective::PrefixLm)), "");
}

#[test]
fn a_sentinel_stands_before_a_downstream_target() {
    let mut examples = [TokenizedExample { input: vec![3, END], target: vec![4, 5, END] }];
    add_sentinel(&mut examples, &tokenizer(100)).unwrap();
    assert_eq!(examples, [TokenizedExample { input: vec![3, END], target: vec![SENTINEL, 4, 5, END] }]);
    assert!(matches!(
        add_sentinel(&mut examples, &tokenizer(0)),
        Err(Error::Pretrain(PretrainError::NoSentinels))
    ));
}

#[test]
fn a_stream_can_be_read_on_a_thread_of_its_own() {
    fn sent<T: Send>(_: &T) {}
    let folder = Folder::new();
    sent(&open(&[folder.write("a.txt", "a")], &in_order(Objective::PrefixLm)));
}
