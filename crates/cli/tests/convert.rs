//! Prompts from one kind of file to another.

mod common;

use common::{demo, incipit, path, refused, train};

#[test]
fn every_prompt_has_a_file_that_is_read_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| path(dir.path(), name);
    let more = ["--steps", "1", "--prompt-layers", "all", "--prompt-placement", "after"];
    let run = train(dir.path(), "run", &more).ok().json();
    let (source, file, again) = (at("run"), at("made/prompt.safetensors"), at("again.npy"));
    let made = incipit(&["convert", "prompt", &source, &file, "--json"]).ok().json();
    // The demo's model has three layers.
    assert_eq!((&made["kind"], &made["rows"]), (&"checkpoint".into(), &12.into()));
    let (model, few) = (demo("model"), at("few.jsonl"));
    let eval = ["eval", "--json", "--model", &model, "--prompt", &file, "--data", &few];
    let lengths = ["--max-input-length", "32", "--max-target-length", "6"];
    assert_eq!(incipit(&[&eval[..], &lengths].concat()).ok().json()["loss"], run["eval_loss"]);
    let init = format!("file:{file}");
    train(dir.path(), "further", &[&more[..], &["--prompt-init", &init]].concat()).ok();
    refused(&incipit(&["convert", "prompt", &file, &again]), &["--to checkpoint", ".safetensors"]);
    refused(&incipit(&["convert", "prompt", &file, &at("peft"), "--model", &model]), &["--to checkpoint"]);
    refused(&incipit(&["convert", "prompt", &source, &file]), &["is there already"]);
    for name in ["p.bin", "weights.safetensors", "adapter_model.safetensors"] {
        let ran = incipit(&["convert", "prompt", &source, &at(name), "--to", "checkpoint"]);
        refused(&ran, &[name, "prompt.safetensors"]);
    }
}
