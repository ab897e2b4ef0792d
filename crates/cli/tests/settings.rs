//! What flags say holds, where there is a word about it from before.

mod common;

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use common::{command, demo, incipit, path, refused, train, with_stdin};

#[test]
fn a_template_that_is_given_holds_for_texts_too() {
    let model = demo("model");
    let ask = ["generate", "--json", "--model", &model, "--max-new-tokens", "2", "--inputs"];
    let with = |more: &[&'static str]| [&ask[..], more].concat();
    let input = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["input"].clone();
    let given = incipit(&with(&["mail: {text}; {text}", "--input", "Hello"])).ok().stdout;
    assert_eq!(input(&given), "mail: Hello; Hello");
    let piped = with_stdin(&with(&["mail: {text}"]), "one\ntwo\n").ok().stdout;
    assert_eq!(piped.lines().map(input).collect::<Vec<_>>(), ["mail: one", "mail: two"]);
    for texts in [&["--input", "Hello"][..], &[]] {
        for (template, part) in [("{subject}: {text}", "2 fields"), ("mail", "no field")] {
            let ran = incipit(&[&with(&[])[..], &[template], texts].concat());
            refused(&ran, &["--inputs", template, part]);
            assert!(!ran.stderr.contains("loading"), "{}", ran.stderr);
        }
    }
    refused(&incipit(&with(&["{text}", "--raw", "--input", "Hello"])), &["--raw", "--inputs"]);
}

#[test]
fn a_sentinel_can_be_said_of_a_prompt_without_its_run() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = train(dir.path(), "run", &["--steps", "1", "--target-sentinel"]).ok().json();
    let (alone, few) = (path(dir.path(), "alone.npy"), path(dir.path(), "few.jsonl"));
    std::fs::copy(dir.path().join("run/prompt.npy"), &alone).expect("a prompt");
    let eval =
        ["eval", "--json", "--model", &demo("model"), "--prompt", &alone, "--data", &few].map(str::to_owned);
    let loss = |more: &[&str]| {
        let eval: Vec<&str> = eval.iter().map(String::as_str).collect();
        let lengths = ["--max-input-length", "32", "--max-target-length", "6"];
        incipit(&[&eval[..], &lengths, more].concat()).ok().json()["loss"].clone()
    };
    assert_eq!(loss(&["--target-sentinel"]), run["eval_loss"]);
    assert_ne!(loss(&[]), run["eval_loss"]);
}

#[test]
fn up_ends_where_its_backbone_is_another_one_or_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (data, model) = (path(dir.path(), "data"), demo("model"));
    let up = ["up", "--data", &data, "--listen", "127.0.0.1:0", "--slots", "1", "--model", &model];
    let mut first = command(&up).stderr(Stdio::piped()).spawn().expect("the program starts");
    let said = BufReader::new(first.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    let loading = said.into_iter().find(|line| line.contains("loading backbones/model"));
    first.kill().expect("it runs");
    first.wait().expect("it ends");
    assert!(loading.is_some(), "it never came to hold its backbone");
    let again = |more: &[&str]| incipit(&[&up[..], more].concat());
    let parts =
        ["backbones/model is there from before with --dtype bf16", "--dtype f32 is given", "delete model"];
    refused(&again(&["--dtype", "f32"]), &parts);
    refused(&again(&["--dtype", "bf16", "--tp", "3"]), &["with --tp 1", "--tp 3 is given"]);
    let absent =
        ["up", "--data", &data, "--listen", "127.0.0.1:0", "--slots", "1", "--model", "./no/such/model"];
    refused(&incipit(&absent), &["cannot be had", "./no/such/model"]);
}
