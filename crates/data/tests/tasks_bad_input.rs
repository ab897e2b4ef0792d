//! Named tasks' files that are missing or wrong: each kind gives one message that names the file, the line and the
//! mend.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Folder, golden, gzip};
use incipit_data::tasks::{Split, Task, TaskSplit, Use};
use incipit_data::{LoadOptions, Result};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

const SKIP: LoadOptions = LoadOptions { skip_bad_records: true };

fn read(task: &str, dir: &Path, split: Split) -> Result<TaskSplit> {
    Task::named(task).unwrap().read(dir, split, Use::Evaluation, LoadOptions::default())
}

/// Asserts that a task's file of these bytes is refused with its name and these words.
#[track_caller]
fn assert_refused(task: &str, split: Split, content: impl AsRef<[u8]>, words: &[&str]) {
    let folder = Folder::new();
    let task = Task::named(task).unwrap();
    let path = folder.write(task.files[split as usize][0], content);
    let error =
        task.read(path.parent().unwrap(), split, Use::Evaluation, LoadOptions::default()).unwrap_err();
    assert_says(&error.to_string(), &[words, &[path.to_str().unwrap()]].concat());
}

#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn a_name_that_no_task_has() {
    let message = Task::named("bool").unwrap_err().to_string();
    assert_says(&message, &["no task \"bool\"", "known are boolq, cb", "mrqa-race", "subj"]);
}

#[test]
fn a_split_that_is_missing() {
    let folder = Folder::new();
    let message = read("rte", &folder.path(""), Split::Dev).unwrap_err().to_string();
    let dir = folder.path("").display().to_string();
    assert_says(
        &message,
        &[&dir, "no dev split of the task rte", "RTE/", "val.jsonl or dev.jsonl", "--data-dir"],
    );
}

#[test]
fn a_split_that_was_never_published() {
    let message = read("squad", &golden("tasks/data"), Split::Test).unwrap_err().to_string();
    assert_says(&message, &["squad has no test split", "use train or dev"]);
}

#[test]
fn a_directory_that_is_not_there() {
    let message = read("boolq", Path::new("/no/such/folder"), Split::Dev).unwrap_err().to_string();
    assert_says(&message, &["/no/such/folder", "the task boolq", "--data-dir", "BoolQ"]);
}

#[test]
fn another_tasks_folder() {
    let message = read("boolq", &golden("tasks/data/CB"), Split::Dev).unwrap_err().to_string();
    let words = ["CB/val.jsonl, line 1", "no `passage`, only `premise`", "boolq needs it", "--data-dir"];
    assert_says(&message, &words);
}

#[test]
fn a_label_that_the_task_does_not_have() {
    let record = "{\"premise\": \"a\", \"hypothesis\": \"b\", \"label\": \"perhaps\"}\n";
    let words = ["line 1", "the label \"perhaps\" is none of cb's", "entailment, contradiction, neutral"];
    assert_refused("cb", Split::Dev, record, &words);
    assert_refused(
        "sst2",
        Split::Train,
        "sentence\tlabel\nfine\t2\n",
        &["line 2", "\"2\"", "negative, positive"],
    );
    let record = "{\"question\": \"a\", \"passage\": \"b\", \"label\": [true]}\n";
    assert_refused("boolq", Split::Dev, record, &["the label [true]", "False, True"]);
}

#[test]
fn a_record_without_a_label_where_it_is_scored() {
    let record = "{\"question\": \"a\", \"passage\": \"b\", \"idx\": 0}\n";
    assert_refused(
        "boolq",
        Split::Dev,
        record,
        &["line 1", "no label (`label`)", "only the test split", "boolq"],
    );
    let table = "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\ta\tb\n";
    assert_refused("mrpc", Split::Dev, table, &["line 2", "(`label` or `Quality`)"]);
}

#[test]
fn a_value_of_another_kind() {
    let record = "{\"question\": 3, \"passage\": \"b\", \"label\": true}\n";
    assert_refused("boolq", Split::Dev, record, &["`question` is a number", "boolq needs a text", "mend"]);
    let record = "{\"idx\": 0, \"passage\": {\"text\": \"a\", \"questions\": {}}}\n";
    assert_refused("multirc", Split::Dev, record, &["`questions` is an object", "a list of objects"]);
    let record = "{\"idx\": -1, \"passage\": {}}\n";
    assert_refused("record", Split::Dev, record, &["`idx` is a number", "a number from 0"]);
}

#[test]
fn malformed_records() {
    assert_refused("wic", Split::Dev, "{\"word\": \n", &["line 1", "malformed JSON"]);
    let json = "{\"data\": [\n{\"title\": }]}";
    assert_refused("squad", Split::Dev, json, &["line 2", "malformed JSON", "fetch it again"]);
    assert_refused("squad", Split::Dev, "", &["is empty"]);
    let cut = &gzip("{\"header\": {}}\n{\"context\": \"a\", \"qas\": []}\n")[..30];
    assert_refused("mrqa-race", Split::Dev, cut, &["cannot decompress", "cut short"]);
}

#[test]
fn a_squad_question_without_answers_is_named_by_its_place() {
    let qas = "[{\"id\": \"x\", \"question\": \"a\", \"answers\": []}]";
    let json = format!("{{\"data\": [{{\"paragraphs\": [{{\"context\": \"c\", \"qas\": {qas}}}]}}]}}");
    assert_refused("squad", Split::Dev, json, &["question 1", "no label (`answers`)"]);
    assert_refused("squad", Split::Dev, "{\"data\": [{}]}", &["question 1", "no `paragraphs`"]);
}

#[test]
fn a_pronoun_that_is_not_at_its_place() {
    let record = |noun: &str, index: usize| {
        let target = format!(
            "{{\"span1_text\": \"{noun}\", \"span1_index\": 0, \"span2_text\": \"it\", \"span2_index\": {index}}}"
        );
        format!("{{\"text\": \"Cats say it .\", \"target\": {target}, \"label\": true, \"idx\": 0}}\n")
    };
    assert_refused("wsc", Split::Dev, record("Cats", 3), &["line 1", "word 3", "the pronoun \"it\""]);
    assert_refused("wsc", Split::Dev, record("Dogs", 2), &["does not have \"Dogs\" at its word 0"]);
}

#[test]
fn an_entity_outside_its_passage() {
    let record = "{\"idx\": 0, \"passage\": {\"text\": \"é\", \"entities\": [{\"start\": 1, \"end\": 1}]}, \"qas\": []}\n";
    assert_refused("record", Split::Dev, record, &["line 1", "1 to 1", "1 characters"]);
}

#[test]
fn rows_that_are_too_wide_are_refused_though_short_ones_are_left_out() {
    let table = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\textra\n";
    assert_refused("qqp", Split::Train, table, &["line 2", "7 fields and the header 6"]);
}

#[test]
fn microsofts_mrpc_has_no_development_set_without_glues_list() {
    let folder = Folder::new();
    let table = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n";
    folder.write("msr_paraphrase_train.txt", table);
    let message = read("mrpc", &folder.path(""), Split::Dev).unwrap_err().to_string();
    assert_says(&message, &["no dev split of the task mrpc", "dev_ids.tsv beside msr_paraphrase_train.txt"]);
    assert_eq!(read("mrpc", &folder.path(""), Split::Train).unwrap().examples.len(), 1);
}

#[test]
fn bad_records_are_skipped_whole_if_asked_to() {
    let folder = Folder::new();
    let good = "{\"question\": \"a\", \"passage\": \"b\", \"label\": true, \"idx\": 5}\n";
    let path = folder.write("val.jsonl", format!("{{}}\n{good}nonsense\n"));
    let task = Task::named("boolq").unwrap();
    let found = task.read(path.parent().unwrap(), Split::Dev, Use::Evaluation, SKIP).unwrap();
    assert_eq!((found.examples.len(), found.skipped, found.first_skipped.len()), (1, 2, 2));
    assert_eq!((found.examples[0].text.line, found.examples[0].text.index), (2, 0));
}

/// Each task's hand-made files, one split each.
fn files() -> Vec<(&'static Task, Split, PathBuf)> {
    let data = golden("tasks/data");
    let mut files = Vec::new();
    for task in Task::all() {
        for split in task.splits() {
            if let Ok(examples) = task.examples(&data, split, Use::Evaluation) {
                files.push((task, split, examples.path().to_path_buf()));
            }
        }
    }
    files
}

proptest! {
    #[test]
    fn a_file_with_changed_bytes_never_panics_and_ends(
        file in proptest::sample::select(files()),
        at in any::<usize>(),
        value in proptest::sample::select(b"\x00\n\t\"9{]\xff a".to_vec()),
    ) {
        let (task, split, path) = file;
        let mut bytes = std::fs::read(path).unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        let folder = Folder::new();
        let name = Path::new(task.files[split as usize][0]);
        std::fs::create_dir_all(folder.path("").join(name).parent().unwrap()).unwrap();
        folder.write(name.to_str().unwrap(), bytes);
        if let Ok(examples) = task.examples(&folder.path(""), split, Use::Training) {
            prop_assert!(examples.take(100).count() < 100);
        }
    }
}
