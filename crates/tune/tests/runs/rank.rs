//! Ranked labels have the log-likelihoods that the losses say, whatever they share the backbone with.

use std::sync::Arc;

use incipit_collective::{Mesh, Options};
use incipit_data::{TokenizedSet, metrics::Metric};
use incipit_model::{Example, Microbatch};
use incipit_tune::{
    control::Control,
    engine::{Engine, EngineOptions, Recompute},
    evaluate::{EvalOptions, Evaluation, evaluate},
    job::prompt_rows,
    prompt::Prompt,
    rank::Predict,
    ranks::on_threads,
    spec::{PartialSpec, TrainSpec},
    train::train_on,
};

use crate::evaluation::{RECORDS, prompt, set};
use crate::support::{Files, Last, backbone, config, engine, id, model, resolve, tokenizer};

/// The last two tell a sum of log-likelihoods from a mean: the longer one has the other's tokens and more.
const LABELS: [&str; 4] = ["yes", "no", "maybe no", "maybe"];

fn options(labels: Option<&[String]>) -> incipit_tune::Result<EvalOptions> {
    Ok(EvalOptions {
        metrics: vec![Metric::Accuracy],
        labels: labels.map(<[_]>::to_vec),
        max_new_tokens: 5,
        candidates: Predict::Rank.candidates(labels, &tokenizer(), config().vocab_size, false)?,
        ..EvalOptions::default()
    })
}

fn ranked(engine: &Engine, prompt: Option<&Prompt>, set: &TokenizedSet) -> incipit_tune::Result<Evaluation> {
    let options = options(Some(&LABELS.map(str::to_owned)))?;
    evaluate(engine, prompt, set, &tokenizer(), &options, &Control::new())
}

#[test]
fn a_labels_score_is_minus_its_loss_and_the_highest_is_the_prediction() {
    let (engine, set, prompt) = (engine(10_000, Recompute::Auto), set(&RECORDS), prompt());
    let evaluation = ranked(&engine, Some(&prompt), &set).unwrap();
    let decoded = evaluate(
        &engine,
        Some(&prompt),
        &set,
        &tokenizer(),
        &EvalOptions { candidates: None, ..options(Some(&LABELS.map(str::to_owned))).unwrap() },
        &Control::new(),
    )
    .unwrap();
    let rows = prompt_rows(&prompt).unwrap();
    for (prediction, example) in evaluation.predictions.iter().zip(&set.examples) {
        let scores = prediction.scores.as_ref().unwrap();
        assert_eq!(scores.len(), LABELS.len());
        for (label, score) in scores {
            let target: Vec<u32> = label.split(' ').map(id).chain([1]).collect();
            let pair = Example { prompt: Some(0), input: &example.input, target: &target, key: 0 };
            let alone = Microbatch { prompts: std::slice::from_ref(&rows), examples: &[pair] };
            let loss = model().loss(&alone).unwrap()[0];
            assert_eq!(*score, f64::from(-loss), "{label} for {}", prediction.inputs);
        }
        let best = scores.iter().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        assert_eq!(prediction.prediction, *best.0);
    }
    assert_eq!(evaluation.legal_share, Some(1.0));
    let losses = |evaluation: &Evaluation| evaluation.predictions.iter().map(|p| p.loss).collect::<Vec<_>>();
    assert_eq!((evaluation.loss, losses(&evaluation)), (decoded.loss, losses(&decoded)), "the target's loss");
    let right = evaluation.predictions.iter().filter(|p| p.prediction == p.target).count();
    assert_eq!(evaluation.metrics, [(Metric::Accuracy, right as f64 / RECORDS.len() as f64)]);
}

#[test]
fn neither_microbatches_nor_replicas_change_a_score() {
    let set = set(&RECORDS);
    for prompt in [None, Some(&prompt())] {
        let whole = ranked(&engine(10_000, Recompute::Auto), prompt, &set).unwrap();
        for tokens in [1, 40] {
            assert_eq!(ranked(&engine(tokens, Recompute::Auto), prompt, &set).unwrap(), whole, "{tokens}");
        }
        for (dp, tokens) in [(2, 30), (8, 1)] {
            let results = on_threads(Mesh::new(1, dp, dp).unwrap(), None, &Options::default(), |ranks| {
                let options = EngineOptions { microbatch_tokens: Some(tokens), recompute: Recompute::Auto };
                ranked(&Engine::on(model(), options, Arc::new(ranks))?, prompt, &set)
            });
            assert!(results.into_iter().all(|evaluation| evaluation.unwrap() == whole), "dp {dp}");
        }
    }
}

#[test]
fn without_labels_there_is_nothing_to_rank() {
    for labels in [None, Some(&[][..])] {
        let refused = options(labels).unwrap_err().to_string();
        assert!(refused.contains("--predict rank") && refused.contains("--labels"), "{refused}");
    }
    let named = |task: &str| {
        let flags = PartialSpec {
            model: Some("tiny".to_owned()),
            task: Some(task.to_owned()),
            data_dir: Some("/data".into()),
            out: Some("/out".into()),
            predict: Some(Predict::Rank),
            ..PartialSpec::default()
        };
        TrainSpec::resolve(flags, None, false).unwrap_err().to_string()
    };
    assert!(named("squad").contains("--predict rank chooses among labels, and squad has none"));
    assert!(named("boolq").contains("/data"), "a task with labels is only without its files");
}

#[test]
fn a_run_that_ranks_says_so_in_its_file_and_chooses_its_best_by_it() {
    let (files, backbone) = (Files::new(), backbone());
    let few = PartialSpec { steps: Some(4), ..PartialSpec::default() };
    let spec =
        resolve(PartialSpec { predict: Some(Predict::Rank), ..few.clone() }.over(files.flags("ranked")));
    assert!(spec.to_toml().contains("predict = \"rank\""));
    let mut last = Last::default();
    let outcome = train_on(&backbone, &spec, &Control::new(), &mut last).unwrap();
    let evaluation = last.0.unwrap();
    assert_eq!(evaluation.legal_share, Some(1.0));
    assert!(evaluation.predictions.iter().all(|p| p.scores.as_ref().is_some_and(|s| s.len() == 3)));
    assert_eq!(outcome.best.unwrap().score, evaluation.score());
    // A run of a version that knew nothing of it goes on.
    let plain = resolve(few.over(files.flags("plain")));
    assert!(!plain.to_toml().contains("predict"));
    assert_ne!(plain.identity_hash(), spec.identity_hash());
}
