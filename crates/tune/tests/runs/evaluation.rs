//! An evaluation is a function of the backbone, the prompt and the examples, in the order of the file.

use std::{collections::BTreeSet, sync::Arc};

use incipit_collective::{Mesh, Options};
use incipit_data::{LoadOptions, TaskFormat, TokenizedSet, load_text, metrics::Metric, tokenize};
use incipit_tune::{
    Error,
    control::Control,
    engine::{Engine, EngineOptions, Recompute},
    evaluate::{EvalOptions, Evaluation, PartialEvaluation, evaluate},
    prompt::Prompt,
    ranks::on_threads,
};

use crate::support::{Files, config, engine, model, tokenizer};

pub(crate) fn set(records: &[(&str, &str)]) -> TokenizedSet {
    let files = Files::new();
    let line = |(inputs, targets): &(&str, &str)| {
        format!("{{\"inputs\": \"{inputs}\", \"targets\": \"{targets}\"}}\n")
    };
    files.write("data.jsonl", &records.iter().map(line).collect::<String>());
    let loaded =
        load_text(&files.path("data.jsonl"), &TaskFormat::default(), LoadOptions::default()).unwrap();
    tokenize(&loaded.examples, &tokenizer(), 64, 8, config().vocab_size).unwrap()
}

fn options(max_new_tokens: usize) -> EvalOptions {
    let labels = ["yes", "no"].map(str::to_owned).to_vec();
    EvalOptions {
        metrics: vec![Metric::Accuracy, Metric::TokenF1],
        labels: Some(labels),
        max_new_tokens,
        ..EvalOptions::default()
    }
}

pub(crate) fn prompt() -> Prompt {
    let d = config().d_model;
    Prompt::new(3, d, (0..3 * d).map(|i| (i as f32 * 0.7).sin()).collect()).unwrap()
}

fn evaluated(engine: &Engine, prompt: Option<&Prompt>, set: &TokenizedSet) -> Evaluation {
    evaluate(engine, prompt, set, &tokenizer(), &options(5), &Control::new()).unwrap()
}

pub(crate) const RECORDS: [(&str, &str); 6] = [
    ("red", "yes"),
    ("green is not blue one two three four", "no"),
    ("blue was", "maybe no"),
    ("one two three four one two three four one two three", "yes"),
    ("not", "no"),
    ("three is green", "yes"),
];

#[test]
fn microbatches_change_no_bit_and_the_order_is_the_files() {
    let set = set(&RECORDS);
    for prompt in [None, Some(&prompt())] {
        let whole = evaluated(&engine(10_000, Recompute::Auto), prompt, &set);
        let texts: Vec<(&str, &str)> =
            whole.predictions.iter().map(|p| (p.inputs.as_str(), p.target.as_str())).collect();
        assert_eq!(texts, RECORDS);
        assert_eq!(whole.predictions.iter().map(|p| p.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        for tokens in [1, 25, 40] {
            assert_eq!(evaluated(&engine(tokens, Recompute::Auto), prompt, &set), whole, "{tokens} tokens");
        }
    }
}

#[test]
fn an_example_gets_alone_what_it_gets_among_others() {
    let engine = engine(10_000, Recompute::Auto);
    let prompt = prompt();
    let whole = evaluated(&engine, Some(&prompt), &set(&RECORDS));
    for (n, record) in RECORDS.iter().enumerate() {
        let alone = evaluated(&engine, Some(&prompt), &set(&[*record]));
        let (alone, together) = (&alone.predictions[0], &whole.predictions[n]);
        assert_eq!((&alone.prediction, alone.loss), (&together.prediction, together.loss), "example {n}");
    }
}

#[test]
fn the_loss_is_a_mean_over_target_tokens_and_the_score_one_over_metrics() {
    let set = set(&RECORDS);
    let evaluation = evaluated(&engine(10_000, Recompute::Auto), Some(&prompt()), &set);
    let lengths: Vec<f64> = set.examples.iter().map(|e| e.target.len() as f64).collect();
    let sum: f64 = evaluation.predictions.iter().zip(&lengths).map(|(p, n)| p.loss * n).sum();
    assert!((evaluation.loss - sum / lengths.iter().sum::<f64>()).abs() < 1e-6);
    let [(Metric::Accuracy, accuracy), (Metric::TokenF1, f1)] = evaluation.metrics[..] else {
        panic!("{:?}", evaluation.metrics)
    };
    assert_eq!(evaluation.score(), (accuracy + f1) / 2.0);
    let legal =
        evaluation.predictions.iter().filter(|p| ["yes", "no"].contains(&p.prediction.as_str())).count();
    assert_eq!(evaluation.legal_share, Some(legal as f64 / 6.0));
}

#[test]
fn predictions_end_where_they_are_told_to() {
    let set = set(&RECORDS);
    let engine = engine(10_000, Recompute::Auto);
    let lengths = |max| {
        let evaluation = evaluate(&engine, None, &set, &tokenizer(), &options(max), &Control::new()).unwrap();
        evaluation.predictions.iter().map(|p| p.prediction.split_whitespace().count()).max().unwrap()
    };
    assert!(lengths(2) <= 2 && lengths(6) <= 6);
}

#[test]
fn a_stop_is_heard() {
    let control = Control::new();
    control.request_stop();
    let engine = engine(10, Recompute::Auto);
    let stopped = evaluate(&engine, None, &set(&RECORDS), &tokenizer(), &options(2), &control);
    assert!(matches!(stopped, Err(Error::Interrupted)));
}

/// The costs of the rounds, and the outcome.
fn by_rounds(
    engine: &Engine,
    prompt: Option<&Prompt>,
    set: &TokenizedSet,
) -> incipit_tune::Result<(Vec<usize>, Evaluation)> {
    let mut partial = PartialEvaluation::begin(engine, prompt, Arc::new(set.clone()), options(5))?;
    let mut costs = Vec::new();
    while !partial.is_complete() {
        costs.push(partial.next_cost());
        assert_eq!(partial.advance(engine)?, partial.is_complete());
    }
    assert!(partial.next_cost() == 0 && partial.advance(engine)?);
    Ok((costs, partial.finish(engine, &tokenizer())?))
}

#[test]
fn rounds_give_what_a_whole_evaluation_gives() {
    let set = set(&RECORDS);
    for prompt in [None, Some(&prompt())] {
        let rows = prompt.map_or(0, Prompt::length);
        let all: usize = set.examples.iter().map(|e| rows + e.input.len() + e.target.len().max(5)).sum();
        for tokens in [1, 25, 40, 10_000] {
            let engine = engine(tokens, Recompute::Auto);
            let whole = evaluated(&engine, prompt, &set);
            let (costs, sliced) = by_rounds(&engine, prompt, &set).unwrap();
            assert_eq!(sliced, whole, "{tokens} tokens");
            assert_eq!(costs.iter().sum::<usize>(), all, "{tokens} tokens: {costs:?}");
            // Rounds that nobody has made are made at the end.
            let partial =
                PartialEvaluation::begin(&engine, prompt, Arc::new(set.clone()), options(5)).unwrap();
            assert_eq!(partial.finish(&engine, &tokenizer()).unwrap(), whole);
        }
    }
}

#[test]
fn replicas_make_the_same_rounds_and_get_the_same_outcome() {
    let (set, prompt) = (set(&RECORDS), prompt());
    let whole = evaluated(&engine(10_000, Recompute::Auto), Some(&prompt), &set);
    // Six examples one by one, among four: some have a round more than others. Of eight, some have none.
    for (dp, tokens) in [(2, 1), (3, 25), (4, 1), (8, 30)] {
        let results = on_threads(Mesh::new(1, dp, dp).unwrap(), None, &Options::default(), |ranks| {
            let options = EngineOptions { microbatch_tokens: Some(tokens), recompute: Recompute::Auto };
            by_rounds(&Engine::on(model(), options, Arc::new(ranks))?, Some(&prompt), &set)
        });
        let results = results.into_iter().collect::<incipit_tune::Result<Vec<_>>>().unwrap();
        for (costs, evaluation) in &results {
            assert_eq!(*costs, results[0].0, "dp {dp}");
            assert_eq!(*evaluation, whole, "dp {dp}");
        }
    }
}

#[test]
fn a_prompt_of_a_task_with_other_words_is_scored_in_the_words_of_the_task() {
    let (engine, set) = (engine(64, Recompute::Off), set(&RECORDS));
    let plain = evaluated(&engine, Some(&prompt()), &set);
    // An empty answer cannot be named in a map, and is none of the prompt's labels.
    let said = |word: &str| if word.is_empty() { String::new() } else { format!("<{word}>") };
    let written = plain.predictions.iter().map(|p| &*p.prediction).filter(|word| !word.is_empty());
    let words: BTreeSet<&str> = written.chain(["yes", "no"]).collect();
    let words: Vec<String> = words.iter().map(|word| format!("{word}={}", said(word))).collect();
    let rewrite = Some(words.join(",").parse().unwrap());
    let labels = Some(plain.predictions.iter().map(|p| said(&p.prediction)).collect());
    let options = EvalOptions { rewrite, labels, ..options(5) };
    let evaluation =
        evaluate(&engine, Some(&prompt()), &set, &tokenizer(), &options, &Control::new()).unwrap();
    assert_eq!((evaluation.loss, evaluation.legal_share), (plain.loss, Some(1.0)));
    for (ours, plain) in evaluation.predictions.iter().zip(&plain.predictions) {
        assert_eq!(ours.prediction, said(&plain.prediction));
        // A text that is no label of the prompt's task is left as it is.
        let labels = ["yes", "no"].contains(&&*plain.target);
        assert_eq!(ours.target, if labels { said(&plain.target) } else { plain.target.clone() });
    }
}
