//! A search for a prompt of tokens is a function of the backbone, the data and the seed alone, and never makes its prompt worse.

use std::{collections::HashSet, sync::Arc};

use candle_core::{Device, Tensor};
use incipit_collective::{Mesh, Options, Ranks};
use incipit_data::{
    LoadOptions, TaskFormat, TextExample, TokenizedExample, TokenizedSet, load_text, tokenize,
};
use incipit_kernels::rng::Philox;
use incipit_model::{Example, Microbatch, SoftPrompt};
use incipit_tune::{
    Error, Result,
    backbone::Backbone,
    device::DeviceChoice,
    engine::{EngineOptions, JobBatch, Objective, Recompute},
    ranks::on_threads,
    recipe::LossReduction,
    search::{Candidate, Search, SearchBatch, SearchOptions, SearchUpdate, candidates, searchable},
    spec::Precision,
    tokens::{TokenPrompt, ordinary},
};

use crate::{
    regroup::demo,
    support::{config, engine, id, model, tokenizer},
};

const STEPS: usize = 5;

fn load(microbatch_tokens: usize, ranks: Ranks) -> Result<Backbone> {
    let options = EngineOptions { microbatch_tokens: Some(microbatch_tokens), recompute: Recompute::Auto };
    let model = demo("model").display().to_string();
    Backbone::load_on(&model, Precision::Bf16, DeviceChoice::Cpu, options, &Arc::new(ranks))
}

fn data(backbone: &Backbone) -> TokenizedSet {
    let loaded =
        load_text(&demo("data/train.jsonl"), &TaskFormat::default(), LoadOptions::default()).unwrap();
    tokenize(&loaded.examples[..16], &backbone.tokenizer, 24, 8, backbone.config().vocab_size).unwrap()
}

fn begin(backbone: &Backbone, seed: u64) -> Result<Search> {
    let vocab_size = backbone.config().vocab_size;
    let pieces = searchable(&backbone.tokenizer, vocab_size, &[])?;
    let prompt = TokenPrompt::new(pieces[100..104].to_vec(), vocab_size)?;
    Search::new(prompt, 0, SearchOptions { candidates: 6, seed }, pieces)
}

/// The steps from the `first` on, with four examples for the gradient and always the same four for the choice.
fn steps(backbone: &Backbone, search: &mut Search, first: usize) -> Result<Vec<SearchUpdate>> {
    let set = &data(backbone);
    let places: Vec<usize> = (0..16).collect();
    let evaluation = SearchBatch { set, places: &places[12..] };
    let step = |step: usize| {
        let gradient = SearchBatch { set, places: &places[step % 3 * 4..][..4] };
        search.step(&backbone.engine, gradient, evaluation)
    };
    (first..STEPS).map(step).collect()
}

/// What every rank of a mesh comes to.
fn searched(mesh: Mesh, microbatch_tokens: usize, threads: usize) -> Vec<(Vec<u32>, Vec<SearchUpdate>)> {
    let results = on_threads(mesh, Some(threads), &Options::default(), |ranks| {
        let backbone = load(microbatch_tokens, ranks)?;
        let mut search = begin(&backbone, 1)?;
        let updates = steps(&backbone, &mut search, 0)?;
        Ok((search.prompt().ids().to_vec(), updates))
    });
    results.into_iter().collect::<Result<_>>().unwrap()
}

#[test]
fn the_evaluated_loss_falls_and_never_rises() {
    let (ids, updates) = searched(Mesh::new(1, 1, 1).unwrap(), 4000, 2).remove(0);
    let mut before = updates[0].before;
    for (i, update) in updates.iter().enumerate() {
        println!("{update:?}");
        assert_eq!((update.step, update.before), (i as u64 + 1, before), "the batch is the same");
        assert!(update.after < before || (update.after == before && update.new == update.old), "{update:?}");
        before = update.after;
    }
    assert!(before < updates[0].before - 0.05, "{updates:?}");
    let last = updates.last().unwrap();
    assert_eq!(ids[last.position], last.new);
}

#[test]
fn microbatches_threads_and_replicas_find_the_same() {
    let alone = searched(Mesh::new(1, 1, 1).unwrap(), 4000, 1).remove(0);
    for (dp, tokens, threads) in [(1, 100, 3), (2, 300, 2)] {
        for (rank, found) in searched(Mesh::new(1, dp, dp).unwrap(), tokens, threads).iter().enumerate() {
            assert_eq!(*found, alone, "dp {dp}, rank {rank}");
        }
    }
}

#[test]
fn ranks_that_share_the_model_find_the_same_as_each_other() {
    let found = searched(Mesh::new(2, 1, 2).unwrap(), 4000, 2);
    assert_eq!(found[0], found[1]);
    assert!(found[0].1.iter().any(|update| update.new != update.old), "{found:?}");
}

#[test]
fn a_search_goes_on_from_its_prompt_and_its_number_of_steps() {
    let backbone = load(4000, Ranks::alone()).unwrap();
    let mut whole = begin(&backbone, 2).unwrap();
    let updates = steps(&backbone, &mut whole, 0).unwrap();
    let looked_at: HashSet<usize> = updates.iter().map(|update| update.position).collect();
    assert!(looked_at.len() > 1, "{looked_at:?}");
    let mut ids = begin(&backbone, 2).unwrap().prompt().ids().to_vec();
    for update in &updates[..2] {
        ids[update.position] = update.new;
    }
    let pieces = searchable(&backbone.tokenizer, 1024, &[]).unwrap();
    let options = SearchOptions { candidates: 6, seed: 2 };
    let mut resumed = Search::new(TokenPrompt::new(ids, 1024).unwrap(), 2, options, pieces).unwrap();
    assert_eq!(steps(&backbone, &mut resumed, 2).unwrap(), updates[2..]);
    assert_eq!(resumed.prompt(), whole.prompt());
}

#[test]
fn the_rows_of_tokens_do_what_the_tokens_do_before_an_input() {
    let backbone = load(4000, Ranks::alone()).unwrap();
    let model = backbone.engine.model();
    let prompt = TokenPrompt::new(vec![700, 5, 5, 42], 1024).unwrap();
    let rows = prompt.rows(model).unwrap();
    let rows = [Tensor::from_slice(rows.values(), (4, rows.width()), &Device::Cpu).unwrap().into()];
    for TokenizedExample { input, target } in &data(&backbone).examples[..3] {
        let whole = [prompt.ids(), input].concat();
        let loss = |prompt, input| {
            let examples = [Example { prompt, input, target, key: 0 }];
            model.loss(&Microbatch { prompts: &rows, examples: &examples }).unwrap()[0]
        };
        assert_eq!(loss(Some(0), input).to_bits(), loss(None, &whole).to_bits());
    }
}

fn job<'a>(prompt: &'a SoftPrompt, examples: &'a [TokenizedExample]) -> JobBatch<'a> {
    let objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };
    JobBatch { prompt, examples: examples.iter().collect(), keys: vec![0; examples.len()], objective }
}

/// Central differences of the loss along the way from the current token's row to the candidate's.
#[test]
fn a_candidates_change_is_the_slope_of_the_loss_towards_its_row() {
    let engine = engine(1000, Recompute::Auto);
    let (width, size) = (config().d_model, config().vocab_size);
    let prompt = TokenPrompt::new(["one", "not", "was"].map(id).to_vec(), size).unwrap();
    let rows = prompt.rows(engine.model()).unwrap().into_values();
    let examples = [("red", "yes"), ("blue", "maybe"), ("green", "no")]
        .map(|(input, target)| TokenizedExample { input: vec![id(input), 1], target: vec![id(target), 1] });
    let tensor = |rows: &[f32]| SoftPrompt::from(Tensor::from_slice(rows, (3, width), &Device::Cpu).unwrap());
    let start = tensor(&rows);
    let gradient = engine.gradients(&[job(&start, &examples)]).unwrap().remove(0).unwrap().gradient;
    let mut worst: f64 = 0.0;
    for (place, current) in prompt.ids().iter().enumerate() {
        let slope = &gradient[place * width..][..width];
        let pieces = ordinary(&tokenizer());
        let found = candidates(engine.model(), slope, *current, &pieces, 100).unwrap();
        assert!(found.is_sorted_by(|a, b| a.change <= b.change));
        assert!(!found.iter().any(|candidate| [*current, id("poison"), 1].contains(&candidate.token)));
        assert_eq!(found.len(), pieces.len() - 2, "all but the current one and the one that is not finite");
        for Candidate { token, change } in &found {
            let towards = engine.model().embedding_row(*token).unwrap();
            let moved = |share: f32| {
                let mut moved = rows.clone();
                let row = moved[place * width..][..width].iter_mut();
                row.zip(&towards).for_each(|(row, towards)| *row += share * (towards - *row));
                tensor(&moved)
            };
            let step = 2f32.powi(-10);
            let (up, down) = (moved(step), moved(-step));
            let losses = engine.losses(&[job(&up, &examples), job(&down, &examples)]).unwrap();
            let [up, down] = [0, 1].map(|i| *losses[i].as_ref().unwrap());
            let slope = (up - down) / (2.0 * f64::from(step));
            let change = f64::from(*change);
            worst = worst.max((slope - change).abs() / (0.1 + change.abs()));
        }
        let few = candidates(engine.model(), slope, *current, &pieces, 4).unwrap();
        assert_eq!(few, found[..4]);
    }
    println!("slopes and changes differ by {worst:.1e} at most");
    assert!(worst < 1e-2, "{worst}");
}

#[test]
fn the_whole_vocabulary_is_scored_by_plain_products() {
    let model = model();
    let mut random = Philox::new(5, &[]);
    let direction: Vec<f32> = (0..config().d_model).map(|_| random.normal()).collect();
    let scores = model.embedding_scores(&direction).unwrap();
    assert_eq!(scores.len(), config().vocab_size);
    for (id, score) in scores.iter().enumerate() {
        let row = model.embedding_row(id as u32).unwrap();
        let plain: f64 = row.iter().zip(&direction).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((f64::from(*score) - plain).abs() < 1e-4 || (score.is_nan() && plain.is_nan()), "{id}");
    }
    assert!(model.embedding_scores(&direction[1..]).is_err());
}

#[test]
fn a_search_uses_no_special_tokens_and_no_words_it_is_told_to_avoid() {
    let tokenizer = tokenizer();
    let found =
        searchable(&tokenizer, config().vocab_size, &["yes".to_owned(), "no maybe".to_owned()]).unwrap();
    let avoided: HashSet<u32> = ["yes", "no", "maybe"].map(id).into_iter().chain(0..3).collect();
    let expected: Vec<u32> = (0..17).filter(|id| !avoided.contains(id)).collect();
    assert_eq!(found, expected, "ids beyond the tokenizer's are no pieces");
    assert_eq!(searchable(&tokenizer, 5, &[]).unwrap(), [3, 4], "nor are those beyond the model's");
}

#[test]
fn a_record_on_which_the_loss_is_no_number_is_named_and_the_prompt_stays() {
    let engine = engine(1000, Recompute::Auto);
    let example = |word| TokenizedExample { input: vec![id(word), 1], target: vec![id("yes"), 1] };
    let text = |index| TextExample { inputs: String::new(), targets: String::new(), index, line: index + 10 };
    let set = TokenizedSet {
        examples: vec![example("red"), example("poison"), example("red")],
        texts: (0..3).map(text).collect(),
        ..TokenizedSet::default()
    };
    let prompt = TokenPrompt::new(vec![id("one")], config().vocab_size).unwrap();
    let options = SearchOptions { candidates: 3, seed: 0 };
    let mut search = Search::new(prompt.clone(), 7, options, ordinary(&tokenizer())).unwrap();
    let (good, bad) = (SearchBatch { set: &set, places: &[0] }, SearchBatch { set: &set, places: &[2, 1] });
    for (gradient, evaluation) in [(bad, good), (good, bad)] {
        let error = search.step(&engine, gradient, evaluation).unwrap_err();
        assert!(matches!(error, Error::Stopped { step: 8, .. }), "{error}");
        assert!(error.to_string().contains("example 1") && error.to_string().contains("line 11"), "{error}");
        assert_eq!((search.prompt(), search.num_steps()), (&prompt, 7));
    }
    search.step(&engine, good, good).unwrap();
}

#[test]
fn a_search_for_nothing_is_refused() {
    let prompt = TokenPrompt::new(vec![id("one")], config().vocab_size).unwrap();
    let refusal = |candidates, pieces| {
        let options = SearchOptions { candidates, seed: 0 };
        Search::new(prompt.clone(), 0, options, pieces).unwrap_err().to_string()
    };
    assert!(refusal(0, vec![3]).contains("--candidates is 0"));
    assert!(refusal(1, Vec::new()).contains("no ordinary pieces"));
}
