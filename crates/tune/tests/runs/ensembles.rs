//! The members of an ensemble end in the bytes of runs that had the backbone for themselves.

use std::{path::Path, sync::Arc};

use incipit_tune::{
    Error,
    control::Control,
    ensemble::{ENSEMBLE, FILE, PROMPTS, list, read_prompts, resolve},
    evaluate::{EvalOptions, evaluate},
    group,
    prompt::Prompt,
    spec::{PartialSpec, TrainSpec},
    train::{End, train_on},
    vote::Election,
};

use crate::evaluation::{RECORDS, set};
use crate::support::{Files, StopAfter, backbone, engine, tokenizer, tree};
use incipit_tune::{backbone::Backbone, engine::Recompute};

const MEMBERS: usize = 3;

fn specs(files: &Files, out: &str, change: PartialSpec) -> Vec<TrainSpec> {
    resolve(change.over(files.flags(out)), None, false, Some(MEMBERS)).unwrap()
}

/// Some end sooner than others.
fn impatient() -> PartialSpec {
    PartialSpec { patience: Some(2), seed: Some(4), ..PartialSpec::default() }
}

fn again(specs: &[TrainSpec]) -> Vec<TrainSpec> {
    specs.iter().map(|spec| TrainSpec { resume: true, ..spec.clone() }).collect()
}

fn unwatched() -> [(); MEMBERS] {
    [(); MEMBERS]
}

/// What `train` leaves of each member.
fn alone(backbone: &Backbone, specs: &[TrainSpec], files: &Files) -> Vec<Vec<(String, Vec<u8>)>> {
    let of = |(i, spec): (usize, &TrainSpec)| {
        let spec = TrainSpec { out: files.path(&format!("alone-{i}")), ..spec.clone() };
        // A run that fails leaves files as well.
        let _ = train_on(backbone, &spec, &Control::new(), &mut ());
        tree(&spec.out)
    };
    specs.iter().enumerate().map(of).collect()
}

fn together(specs: &[TrainSpec]) -> Vec<Vec<(String, Vec<u8>)>> {
    specs.iter().map(|spec| tree(&spec.out)).collect()
}

#[test]
fn each_member_ends_in_the_bytes_of_a_run_alone() {
    let (files, backbone) = (Files::new(), backbone());
    let specs = specs(&files, "five", impatient());
    let outcomes = group::train_on(&ENSEMBLE, &backbone, &specs, &Control::new(), &mut unwatched()).unwrap();
    let outcomes: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
    let steps: Vec<u64> = outcomes.iter().map(|outcome| outcome.step).collect();
    assert!(steps.iter().any(|step| *step != steps[0]), "all end after {steps:?} steps: choose another seed");
    assert_eq!(together(&specs), alone(&backbone, &specs, &files));
    // The list and the prompts of all.
    let out = files.path("five");
    let members = list(&out).unwrap();
    assert_eq!(members.iter().map(|m| m.seed).collect::<Vec<_>>(), [4, 5, 6]);
    assert!(members.iter().zip(&outcomes).all(|(member, outcome)| member.best == outcome.best));
    let each: Vec<Prompt> = members.iter().map(|m| Prompt::read(&out.join(&m.dir)).unwrap()).collect();
    assert_eq!(read_prompts(&out.join(PROMPTS)).unwrap(), each);
    assert!(each[0] != each[1] && each[1] != each[2]);
}

#[test]
fn members_that_stand_at_different_checkpoints_go_on_to_the_same_bytes() {
    let (files, backbone) = (Files::new(), backbone());
    let specs = specs(&files, "cut", PartialSpec { steps: Some(18), ..PartialSpec::default() });
    let control = Control::new();
    let mut observers = [(); MEMBERS].map(|()| StopAfter { step: 7, control: &control });
    let outcomes = group::train_on(&ENSEMBLE, &backbone, &specs, &control, &mut observers).unwrap();
    assert!(outcomes.iter().flatten().all(|outcome| outcome.end == End::Requested && outcome.step == 7));
    // A kill may catch one before its last checkpoint, one in the middle of one, and one before it began. (The checkpoints of these steps
    // are pruned in the end.)
    let newest = |member: usize| specs[member].out.join("checkpoints/step-00000007");
    std::fs::remove_dir_all(newest(0)).unwrap();
    std::fs::write(newest(1).join("state.json"), "cut off").unwrap();
    std::fs::remove_dir_all(&specs[2].out).unwrap();
    std::fs::remove_file(files.path("cut").join(PROMPTS)).unwrap();
    group::train_on(&ENSEMBLE, &backbone, &again(&specs), &Control::new(), &mut unwatched()).unwrap();
    let alone = alone(&backbone, &specs, &files);
    assert_eq!(together(&specs), alone);
    assert!(files.path("cut").join(PROMPTS).exists());
    // All are at their ends: nothing is left to do.
    let outcomes =
        group::train_on(&ENSEMBLE, &backbone, &again(&specs), &Control::new(), &mut unwatched()).unwrap();
    assert!(outcomes.iter().flatten().all(|outcome| outcome.end == End::Steps));
    assert_eq!(together(&specs), alone);
}

#[test]
fn a_member_whose_loss_is_no_number_ends_alone() {
    let (files, backbone) = (Files::new(), backbone());
    let good = std::fs::read_to_string(files.path("train.jsonl")).unwrap();
    files.write("train.jsonl", &(good + "{\"inputs\": \"poison\", \"targets\": \"no\"}\n"));
    let short = PartialSpec { steps: Some(2), ..PartialSpec::default() };
    let specs = specs(&files, "poisoned", short);
    let outcomes = group::train_on(&ENSEMBLE, &backbone, &specs, &Control::new(), &mut unwatched()).unwrap();
    let failed = outcomes.iter().filter(|outcome| matches!(outcome, Err(Error::NonFinite { .. }))).count();
    let ended = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!(failed > 0 && ended > 0 && failed + ended == MEMBERS, "choose other seeds: {outcomes:?}");
    assert_eq!(together(&specs), alone(&backbone, &specs, &files));
    assert!(!files.path("poisoned").join(PROMPTS).exists());
}

#[test]
fn an_ensemble_that_cannot_begin_or_go_on_is_refused_with_the_mend() {
    let (files, backbone) = (Files::new(), backbone());
    let refused =
        |flags: PartialSpec, resume, members| resolve(flags, None, resume, members).unwrap_err().to_string();
    assert!(refused(files.flags("x"), false, Some(0)).contains("--members is 0"));
    assert!(refused(PartialSpec { out: None, ..files.flags("x") }, false, None).contains("--out is missing"));
    let last = PartialSpec { seed: Some(i64::MAX as u64 - 1), ..files.flags("x") };
    assert!(refused(last, false, None).contains("leaves no seeds for 5 members"));
    let begin = |specs: &[TrainSpec]| {
        group::train_on(&ENSEMBLE, &backbone, specs, &Control::new(), &mut unwatched())
            .map(drop)
            .map_err(|e| e.to_string())
    };
    // Data that make no batch: nothing is left behind.
    let big = specs(&files, "big", PartialSpec { batch_size: Some(100), ..PartialSpec::default() });
    assert!(begin(&big).unwrap_err().contains("--batch-size") && !files.path("big").exists());
    // A directory with something else.
    let taken = specs(&files, "taken", PartialSpec::default());
    std::fs::create_dir_all(files.path("taken")).unwrap();
    files.write("taken/notes.txt", "mine");
    assert!(begin(&taken).unwrap_err().contains("is not empty; pass --resume"));
    assert!(begin(&again(&taken)).unwrap_err().contains("no ensemble.json"));
    // One that has begun.
    let short = PartialSpec { steps: Some(1), ..PartialSpec::default() };
    let few = specs(&files, "few", short);
    begin(&few).unwrap();
    assert!(begin(&few).unwrap_err().contains("is not empty; pass --resume"));
    assert_eq!(resolve(files.flags("few"), None, true, None).unwrap().len(), MEMBERS);
    assert!(refused(files.flags("few"), true, Some(4)).contains("--members 3 and would go on with 4"));
    files.write("few/ensemble.json", "{");
    assert!(refused(files.flags("few"), true, None).contains("no list of members"));
    for (path, part) in [("none", "ensemble train"), ("few", "no list of members")] {
        let error = list(&files.path(path)).unwrap_err().to_string();
        assert!(error.contains(FILE) && error.contains(part), "{error}");
    }
    let error = read_prompts(&files.path("few/member-0/last/prompt.safetensors")).unwrap_err().to_string();
    assert!(error.contains("no tensor \"prompts\""), "{error}");
    assert!(read_prompts(Path::new("/none")).is_err());
}

#[test]
fn votes_are_cast_in_one_pass_as_if_each_member_were_alone() {
    let set = set(&RECORDS);
    let width = crate::support::config().d_model;
    let prompt = |length: usize, phase: f32| {
        let values = (0..length * width).map(|i| (i as f32 * 0.7 + phase).sin() * 3.0).collect();
        Prompt::new(length, width, values).unwrap()
    };
    let members = [prompt(3, 0.0), prompt(5, 1.0), prompt(3, 2.0)];
    let options = EvalOptions {
        metrics: vec![incipit_data::metrics::Metric::Accuracy, incipit_data::metrics::Metric::TokenF1],
        labels: Some(["yes", "no"].map(str::to_owned).to_vec()),
        max_new_tokens: 3,
        ..EvalOptions::default()
    };
    let control = Control::new();
    let hold = |tokens| {
        let backbone = Backbone { engine: engine(tokens, Recompute::Auto), ..backbone() };
        let members: Vec<&Prompt> = members.iter().collect();
        Election::hold(&backbone, &members, Arc::new(set.clone()), &options, &control).unwrap()
    };
    let election = hold(10_000);
    for (member, prompt) in election.members.iter().zip(&members) {
        let engine = engine(10_000, Recompute::Auto);
        let alone = evaluate(&engine, Some(prompt), &set, &tokenizer(), &options, &control).unwrap();
        assert_eq!(*member, alone);
    }
    for (i, vote) in election.votes.iter().enumerate() {
        let cast: Vec<&str> = election.members.iter().map(|m| m.predictions[i].prediction.as_str()).collect();
        assert_eq!(vote.votes, cast);
        let most = cast.iter().filter(|text| **text == vote.prediction).count();
        assert!(cast.iter().all(|text| cast.iter().filter(|other| *other == text).count() <= most));
        assert_eq!((vote.index, vote.inputs.as_str(), vote.target.as_str()), (i, RECORDS[i].0, RECORDS[i].1));
    }
    let right = election.votes.iter().filter(|vote| vote.prediction == vote.target).count();
    assert_eq!(election.metrics[0].1, right as f64 / RECORDS.len() as f64);
    let scores: Vec<f64> = election.members.iter().map(|m| m.metrics[1].1).collect();
    assert!((election.average()[1].1 - scores.iter().sum::<f64>() / 3.0).abs() < 1e-12);
    assert!(election.members.iter().all(|m| m.score() <= election.members[election.best()].score()));
    for tokens in [1, 30] {
        assert_eq!(hold(tokens), election, "{tokens} tokens");
    }
}
