//! What is trained in the place of a prompt, and the models that it is trained on, from the command line.

mod common;

use std::path::Path;

use common::{demo, few_examples, incipit, path, refused, train};

#[test]
fn a_model_made_of_plain_text_is_adapted_and_serves_every_method() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| path(dir.path(), name);
    let corpus =
        "the parcel came late and the box was torn\nplease send a new bill for the repair\n".repeat(60);
    std::fs::write(at("corpus.txt"), &corpus).expect("a file");
    std::fs::write(at("held-out.txt"), &corpus[..1200]).expect("a file");
    let (config, tokenizer) = (demo("model/config.json"), demo("model"));
    let lengths = ["--max-input-length", "16", "--batch-size", "4", "--steps", "3", "--eval-every", "3"];
    let text = ["--corpus", &at("corpus.txt"), "--eval", &at("held-out.txt")].map(str::to_owned);
    let text: Vec<&str> = text.iter().map(String::as_str).collect();

    let new = ["pretrain", "--config", &config, "--tokenizer", &tokenizer, "--out", &at("new"), "--json"]
        .map(str::to_owned);
    let new: Vec<&str> = new.iter().map(String::as_str).collect();
    let made = incipit(&[&new, &text[..], &lengths[..], &["--max-target-length", "8"]].concat()).ok().json();
    assert_eq!((&made["method"], &made["steps"]), (&"model".into(), &3.into()));
    assert!(made["eval_loss"].is_number(), "{made}");
    refused(&incipit(&[&new, &text[..]].concat()), &["initial is there already", "choose another --out"]);

    let model = at("new/model");
    let adapted = at("adapted");
    let further = ["pretrain", "--model", &model, "--objective", "prefix-lm", "--out", &adapted];
    incipit(&[&further, &text[..], &lengths[..]].concat()).ok();

    let model = at("adapted/model");
    let few = few_examples(dir.path());
    for method in ["prompt", "model", "prefix", "adapter", "text", "search"] {
        let out = at(method);
        let mut args = vec!["train", "--method", method, "--model", &model, "--train", &few, "--eval", &few];
        args.extend(["--out", &out, "--batch-size", "4", "--eval-every", "1", "--json"]);
        args.extend(if method == "text" { ["--shots", "2"] } else { ["--steps", "1"] });
        if method != "text" {
            args.extend(["--prompt-length", "3"]);
        }
        let run = incipit(&args).ok().json();
        // The demo's model: d_model 128, 4 heads of 32, 3 layers either side. docs/methods.md has the formulas.
        let trained = match method {
            "prompt" => 3 * 128,
            "prefix" => 2 * 3 * 128 * 9,
            "adapter" => (2 * 64 * 128 + 64 + 128) * 15,
            "search" => 3,
            _ => 0,
        };
        if trained > 0 {
            assert_eq!(run["num_trained"], trained, "{method}");
        }
        let measured = incipit(&["eval", "--prompt", &out, "--data", &few, "--json"]).ok().json();
        assert_eq!(measured["loss"], run["eval_loss"], "{method}: {measured}");
    }

    let with =
        |trained: &str| incipit(&["convert", "model", &model, &at("whole"), "--weights", &at(trained)]);
    refused(&with("adapter"), &["adapter.down.bias is no weight of", "`eval` and `generate`"]);
    refused(&with("prompt"), &["holds a prompt", "`convert prompt`"]);
    with("model/last").ok();
    let tensors = |dir: &str| std::fs::read(Path::new(&at(dir)).join("model.safetensors")).expect("a model");
    assert_eq!(
        tensors("whole"),
        tensors("model/model"),
        "a checkpoint makes the directory that its run left"
    );
}

#[test]
fn tasks_that_share_rows_are_tuned_together_and_serve_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let (few, out) = (few_examples(dir.path()), path(dir.path(), "both"));
    let tasks = path(dir.path(), "tasks.toml");
    let table = |name: &str, inputs: &str| {
        format!("[{name}]\ntrain = '{few}'\neval = '{few}'\ninputs = '{inputs}'\n")
    };
    std::fs::write(&tasks, table("plain", "{inputs}") + &table("asked", "which? {inputs}")).expect("a file");
    let model = demo("model");
    let mut args = vec!["multitask", "--model", &model, "--tasks", &tasks, "--out", &out, "--json"];
    args.extend(["--prompt-length", "6", "--shared-length", "2", "--batch-size", "4", "--steps", "2"]);
    let printed = incipit(&args).ok().json();
    let tasks = printed["members"].as_array().expect("tasks");
    assert_eq!(tasks.len(), 2, "{printed}");
    for task in tasks {
        let dir = task["dir"].as_str().expect("a directory");
        let measured = incipit(&["eval", "--prompt", dir, "--data", &few, "--json"]).ok().json();
        assert_eq!(measured["loss"], task["eval_loss"], "{measured}");
    }
    let further = incipit(&["multitask", "--out", &out, "--resume", "--steps", "3", "--json"]).ok().json();
    assert_eq!(further["members"][1]["steps"], 3, "{further}");
    refused(
        &incipit(&[&args[..], &["--train", &few]].concat()),
        &["--train, --eval and --task are for one task"],
    );
    let one = path(dir.path(), "both/plain");
    refused(&incipit(&["train", "--out", &one, "--resume"]), &["--shared-length", "incipit multitask"]);
}

#[test]
fn a_prompt_in_any_place_is_measured_and_used_from_its_run() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| path(dir.path(), name);
    let few = few_examples(dir.path());
    for (name, place) in [
        ("after", &["--prompt-placement", "after"][..]),
        ("decoder", &["--prompt-placement", "decoder"]),
        ("all", &["--prompt-layers", "all"]),
    ] {
        let short = ["--steps", "2", "--eval-every", "1"];
        let run = train(dir.path(), name, &[&short[..], place].concat()).ok().json();
        assert!(run["adapter"].is_null(), "{run}");
        let measured = incipit(&["eval", "--prompt", &at(name), "--data", &few, "--json"]).ok().json();
        assert_eq!(measured["loss"], run["eval_loss"], "{name}: {measured}");
        let tp = ["eval", "--prompt", &at(name), "--data", &few, "--json", "--tp", "2", "--dtype", "f32"]
            .map(str::to_owned);
        incipit(&tp.iter().map(String::as_str).collect::<Vec<_>>()).ok();
        incipit(&["generate", "--prompt", &at(name), "--input", "the parcel came late"]).ok();
        let ran = incipit(&["convert", "prompt", &at(name), &at("peft")]);
        refused(&ran, &["PEFT"]);
    }
    let ran = incipit(&["convert", "prompt", &at("decoder"), &at("p.npy")]);
    refused(&ran, &["does not stand before the input", "checkpoint"]);
    for name in ["all", "decoder"] {
        incipit(&["inspect", "prompt", &at(name)]).ok();
    }
    refused(&incipit(&["inspect", "similarity", &at("all"), &at("all")]), &["layers", "--prompt-layers"]);
    let votes =
        ["ensemble", "eval", "--prompt", &at("after"), "--prompt", &at("all"), "--data", &few, "--json"]
            .map(str::to_owned);
    incipit(&votes.iter().map(String::as_str).collect::<Vec<_>>()).ok();
}
