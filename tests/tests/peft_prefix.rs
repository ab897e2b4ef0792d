//! Prefixes that PEFT saved give the losses, logits and tokens that PEFT gives: the goldens in `tests/goldens/peft_prefix`, which
//! `scripts/goldens/peft_prefix.py` made. Those of the decoder alone (`past_k`) learn by the slopes of the loss.

#![allow(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use incipit_kernels::Frozen;
use incipit_model::{
    Config, Example, GenerateOptions, Microbatch, PassOptions, T5, TensorAxis, WeightGradients,
};
use incipit_tune::{optimizer::NamedTensor, peft, trained::Trained};
use incipit_weights::{Checkpoint, Overlay};
use serde::Deserialize;

const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Batch {
    max_new_tokens: usize,
    examples: Vec<Pair>,
    results: BTreeMap<String, Expected>,
}

#[derive(Deserialize)]
struct Pair {
    input: Vec<u32>,
    target: Vec<u32>,
}

#[derive(Deserialize)]
struct Expected {
    model: String,
    /// Each example's mean.
    losses: Vec<f64>,
    greedy: Vec<Vec<u32>>,
    /// Of the first example.
    logits: Vec<f64>,
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

fn batch() -> Batch {
    serde_json::from_slice(&std::fs::read(goldens().join("peft_prefix/batch.json")).unwrap()).unwrap()
}

/// A golden's model with these weights laid into it.
fn model(name: &str, over: &[NamedTensor]) -> T5 {
    let checkpoint = Checkpoint::open(&goldens().join(name), DType::F32).unwrap();
    let config = Config::from_json(&checkpoint.config_json().unwrap()).unwrap();
    let mut source = Overlay::new(&checkpoint);
    for NamedTensor { name, shape, data } in over {
        source.put(name, shape, Frozen::from_f32(data.clone(), shape[0], shape[1]));
    }
    T5::load_on(config, &source, DType::F32, &TensorAxis::whole(), &Device::Cpu).unwrap()
}

fn examples(pairs: &[Pair]) -> Vec<Example<'_>> {
    pairs
        .iter()
        .map(|pair| Example { prompt: None, input: &pair.input, target: &pair.target, key: 0 })
        .collect()
}

fn assert_near(what: &str, ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let scale = theirs.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
    let apart = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f64::max);
    println!("{what}: {apart:.1e}");
    assert!(apart <= TOLERANCE, "{what} is off by {apart:.2e}");
}

#[test]
fn prefixes_that_peft_saved_give_pefts_losses_logits_and_tokens() {
    let batch = batch();
    let examples = examples(&batch.examples);
    let all = Microbatch { prompts: &[], examples: &examples };
    assert_eq!(batch.results.len(), 5);
    for (name, expected) in &batch.results {
        let Trained::Weights(prefix) = Trained::read(&goldens().join("peft_prefix").join(name)).unwrap()
        else {
            panic!("{name} is a prefix")
        };
        let model = model(&expected.model, &prefix);
        let sums = model.loss(&all).unwrap();
        let means = sums.iter().zip(&examples).map(|(sum, e)| f64::from(*sum) / e.target.len() as f64);
        assert_near(&format!("{name} losses"), &means.collect::<Vec<_>>(), &expected.losses);
        let first = Microbatch { prompts: &[], examples: &examples[..1] };
        let logits: Vec<f32> = model.logits(&first).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
        assert_near(&format!("{name} logits"), &logits, &expected.logits);
        let options = GenerateOptions { max_new_tokens: batch.max_new_tokens, ..GenerateOptions::default() };
        let written: Vec<_> = model.generate(&all, &options).unwrap().into_iter().map(|g| g.tokens).collect();
        assert_eq!(written, expected.greedy, "{name}");
    }
}

#[test]
fn the_gradients_to_a_prefix_with_positions_are_the_slopes_of_the_loss() {
    let (batch, step) = (batch(), 2e-2f32);
    let examples = examples(&batch.examples);
    for name in ["wide_heads", "four_layers"] {
        let given = peft::prefix::read(&goldens().join("peft_prefix").join(name)).unwrap();
        let table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight".to_owned();
        let wanted: Vec<&str> = given.iter().map(|t| &*t.name).chain([&*table]).collect();
        let losses = |given: &[NamedTensor], gradients: &mut WeightGradients, recompute: bool| {
            let model = model(&batch.results[name].model, given);
            let options = PassOptions { recompute, ..PassOptions::default() };
            let all = Microbatch { prompts: &[], examples: &examples };
            let scale = vec![0.1; examples.len()];
            let sums = model.loss_and_weight_gradients(&all, &scale, &options, gradients).unwrap();
            (model, 0.1 * sums.iter().map(|sum| f64::from(*sum)).sum::<f64>())
        };
        let mut gradients = WeightGradients::of(wanted.iter().copied());
        let (model, _) = losses(&given, &mut gradients, true);
        let gradients = model.gathered(gradients).unwrap();
        assert!(gradients[&table].abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() > 0.0);
        for (t, tensor) in given.iter().enumerate() {
            // Along the gradient, where the slope is its norm.
            let gradient: Vec<f32> = flat(&gradients[&tensor.name]);
            let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
            let at = |step: f32| {
                let mut moved = given.clone();
                moved[t].data.iter_mut().zip(&gradient).for_each(|(x, g)| *x += step * g / norm);
                losses(&moved, &mut WeightGradients::default(), false).1
            };
            let (norm, slope) = (f64::from(norm), (at(step) - at(-step)) / f64::from(2.0 * step));
            println!("{name} {}: norm {norm:.3e}, slope {slope:.3e}", tensor.name);
            assert!(
                (slope - norm).abs() <= 0.02 * norm + 1e-4,
                "{name} {}: {slope}, not {norm}",
                tensor.name
            );
        }
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
