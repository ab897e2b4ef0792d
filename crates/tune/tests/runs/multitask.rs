//! Prompts of several tasks that share rows.

use std::path::Path;

use incipit_tune::{
    Error,
    backbone::Backbone,
    control::Control,
    group,
    multitask::{FILE, MULTITASK, resolve},
    placement::PromptLayers,
    prompt::Prompt,
    recipe::OptimizerName,
    spec::{PartialSpec, TrainSpec},
    task::Task,
    tenant::{End, Tenant},
    train::train_on,
};

use crate::support::{Files, StopAfter, backbone, tokenizer, tree};

const SHARED: usize = 3;

/// Two tasks: the second has the first one's examples for evaluation and the other way round.
fn tasks(files: &Files) -> std::path::PathBuf {
    let table = |name: &str, train: &str, eval: &str| {
        let (train, eval) = (files.path(train), files.path(eval));
        format!("[{name}]\ntrain = '{}'\neval = '{}'\n", train.display(), eval.display())
    };
    files.write(
        "tasks.toml",
        &(table("here", "train.jsonl", "eval.jsonl") + &table("there", "eval.jsonl", "train.jsonl")),
    );
    files.path("tasks.toml")
}

fn flags(files: &Files, out: &str, change: PartialSpec) -> PartialSpec {
    let common = PartialSpec {
        shared_length: Some(SHARED),
        train: None,
        eval: None,
        batch_size: Some(4),
        ..files.flags(out)
    };
    change.over(PartialSpec { train: None, eval: None, ..common })
}

fn specs(files: &Files, out: &str, change: PartialSpec) -> Vec<TrainSpec> {
    resolve(&flags(files, out, change), Some(&tasks(files)), false).unwrap()
}

fn prompts(specs: &[TrainSpec], at: &str) -> Vec<Prompt> {
    specs.iter().map(|spec| Prompt::read(&spec.out.join(at)).unwrap()).collect()
}

fn load(backbone: &Backbone, spec: &TrainSpec) -> Task {
    Task::load(spec, &tokenizer(), backbone.config().vocab_size).unwrap()
}

#[test]
fn a_step_moves_shared_rows_by_the_mean_of_the_tasks_gradients_and_a_tasks_own_by_its_own() {
    let (files, backbone) = (Files::new(), backbone());
    let descent = PartialSpec {
        optimizer: Some(OptimizerName::Sgd),
        lr: Some(0.1),
        weight_decay: Some(0.0),
        steps: Some(1),
        ..PartialSpec::default()
    };
    let specs = specs(&files, "both", descent);
    let first: Vec<Prompt> = specs
        .iter()
        .map(|spec| Tenant::start(&backbone, spec, load(&backbone, spec)).unwrap().prompt().unwrap().clone())
        .collect();
    group::train_on(&MULTITASK, &backbone, &specs, &Control::new(), &mut [(), ()]).unwrap();
    let together = prompts(&specs, "last");
    // Each task alone, from the same prompt.
    let alone: Vec<Prompt> = specs
        .iter()
        .zip(&first)
        .enumerate()
        .map(|(i, (spec, prompt))| {
            let start = files.path(&format!("first-{i}.safetensors"));
            incipit_tune::checkpoint::write_prompt(&start, prompt).unwrap();
            let out = files.path(&format!("alone-{i}"));
            let prompt_init = format!("file:{}", start.display()).parse().unwrap();
            let alone = TrainSpec { out: out.clone(), shared_length: None, prompt_init, ..spec.clone() };
            train_on(&backbone, &alone, &Control::new(), &mut ()).unwrap();
            Prompt::read(&out.join("last")).unwrap()
        })
        .collect();
    let shared = SHARED * backbone.config().d_model;
    assert_eq!(first[0].values()[..shared], first[1].values()[..shared]);
    for (together, alone) in together.iter().zip(&alone) {
        assert_eq!(together.values()[shared..], alone.values()[shared..]);
    }
    for i in 0..shared {
        let mean = f32::midpoint(alone[0].values()[i], alone[1].values()[i]);
        for task in &together {
            assert!((task.values()[i] - mean).abs() <= 1e-6 * mean.abs().max(1.0), "number {i}");
        }
    }
    assert_ne!(together[0].values()[..shared], first[0].values()[..shared], "they have moved");
}

#[test]
fn shared_rows_stay_the_same_in_all_tasks_whatever_the_optimizer() {
    let (files, backbone) = (Files::new(), backbone());
    for optimizer in [OptimizerName::Adafactor, OptimizerName::AdamW] {
        let change = PartialSpec { optimizer: Some(optimizer), steps: Some(7), ..PartialSpec::default() };
        let specs = specs(&files, &optimizer.to_string(), change);
        group::train_on(&MULTITASK, &backbone, &specs, &Control::new(), &mut [(), ()]).unwrap();
        let last = prompts(&specs, "last");
        let shared = SHARED * backbone.config().d_model;
        assert_eq!(last[0].values()[..shared], last[1].values()[..shared], "{optimizer}");
        assert_ne!(last[0].values()[shared..], last[1].values()[shared..], "{optimizer}");
    }
}

#[test]
fn tasks_go_on_from_a_step_that_all_have_to_the_same_bytes() {
    let (files, backbone) = (Files::new(), backbone());
    let steps = |n| PartialSpec { steps: Some(n), ..PartialSpec::default() };
    let (whole, cut) = (specs(&files, "whole", steps(17)), specs(&files, "cut", steps(17)));
    group::train_on(&MULTITASK, &backbone, &whole, &Control::new(), &mut [(), ()]).unwrap();

    let control = Control::new();
    let mut observers = [0; 2].map(|_| StopAfter { step: 8, control: &control });
    let outcomes = group::train_on(&MULTITASK, &backbone, &cut, &control, &mut observers).unwrap();
    assert!(outcomes.iter().flatten().all(|outcome| outcome.end == End::Requested && outcome.step == 8));
    // A kill between the two tasks' checkpoints leaves one of them behind.
    std::fs::remove_dir_all(cut[1].out.join("checkpoints/step-00000008")).unwrap();
    let again: Vec<TrainSpec> = cut.iter().map(|spec| TrainSpec { resume: true, ..spec.clone() }).collect();
    group::train_on(&MULTITASK, &backbone, &again, &Control::new(), &mut [(), ()]).unwrap();
    for (whole, cut) in whole.iter().zip(&cut) {
        assert_eq!(tree(&whole.out), tree(&cut.out));
    }
    // What the command line asks for without naming the tasks again.
    let flags = PartialSpec { out: Some(files.path("cut")), ..PartialSpec::default() };
    let listed = resolve(&flags, None, true).unwrap();
    assert_eq!(
        listed.iter().map(|spec| &spec.out).collect::<Vec<_>>(),
        cut.iter().map(|s| &s.out).collect::<Vec<_>>()
    );
    assert!(files.path("cut").join(FILE).exists());
}

#[test]
fn a_tasks_prompt_is_not_gone_on_with_alone() {
    let (files, backbone) = (Files::new(), backbone());
    let specs = specs(&files, "both", PartialSpec { steps: Some(1), ..PartialSpec::default() });
    group::train_on(&MULTITASK, &backbone, &specs, &Control::new(), &mut [(), ()]).unwrap();
    let alone = PartialSpec { out: Some(specs[0].out.clone()), ..PartialSpec::default() };
    let spec = TrainSpec::resolve(alone, None, true).unwrap();
    let error = train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap_err().to_string();
    assert!(error.contains("--shared-length") && error.contains("incipit multitask"), "{error}");
}

#[test]
fn tasks_that_cannot_share_rows_are_refused_with_the_mend() {
    let files = Files::new();
    let path = tasks(&files);
    let refused = |change: PartialSpec, path: Option<&Path>| -> String {
        let error: Error = resolve(&flags(&files, "none", change), path, false).unwrap_err();
        error.to_string()
    };
    let none = PartialSpec::default;
    let written = |text: &str| {
        files.write("odd.toml", text);
        files.path("odd.toml")
    };
    let all = std::fs::read_to_string(&path).unwrap();
    for (error, words) in [
        (refused(none(), None), ["--tasks is missing", "a table for each task"]),
        (
            refused(PartialSpec { shared_length: Some(5), ..none() }, Some(&path)),
            ["--shared-length is 5", "less than --prompt-length"],
        ),
        (
            refused(PartialSpec { shared_length: Some(0), ..none() }, Some(&path)),
            ["--shared-length is 0", "at least 1"],
        ),
        (refused(PartialSpec { patience: Some(2), ..none() }, Some(&path)), ["--patience", "leave it out"]),
        (
            refused(PartialSpec { prompt_layers: Some(PromptLayers::All), ..none() }, Some(&path)),
            ["--shared-length", "--prompt-layers"],
        ),
        (refused(PartialSpec { keep: Some(1), ..none() }, Some(&path)), ["--keep", "pass 2"]),
        (
            refused(none(), Some(&written(&all.replace("[there]", "[there]\nlr = 0.1")))),
            ["--lr differs", "on the command line"],
        ),
        (
            refused(none(), Some(&written(&all.replace("[there]", "[there]\ntrian = 'x'")))),
            ["trian", "`train`"],
        ),
        (refused(none(), Some(&written(&all.replace("[there]", "['../there']")))), ["../there", "letters"]),
        (
            refused(none(), Some(&written(all.split("[there]").next().unwrap()))),
            ["fewer than two", "incipit train"],
        ),
        (refused(none(), Some(&written("train = 'x'"))), ["no key `train`", "odd.toml"]),
    ] {
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    }
    assert!(!files.path("none").exists());
}
