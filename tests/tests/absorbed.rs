//! Examples with few rows in the decoder attend to the encoder's result without keys and values of it. What they get is what they would
//! get with them, and depends on no example beside them.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use incipit_kernels::rng::Philox;
use incipit_model::{
    Config, Example, ExampleGradient, GenerateOptions, Microbatch, PassOptions, SoftPrompt, T5,
    WeightGradients,
};
use incipit_weights::Random;

const SEED: u64 = 71;
const VOCABULARY: u64 = 97;
/// Rows of which a head of 64 numbers has few: a quarter.
const FEW: usize = 16;

fn model(dtype: DType) -> Result<T5> {
    println!("seed {SEED}");
    let config = Config {
        vocab_size: VOCABULARY as usize,
        d_model: 80,
        d_kv: 64,
        d_ff: 96,
        num_heads: 3,
        num_layers: 2,
        num_decoder_layers: 2,
        ..Config::preset("small").expect("a known shape")
    };
    let weights = Random::new(config.random_tensors(), dtype, SEED)?;
    Ok(T5::load(config, &weights, dtype)?)
}

/// Prompts, and texts of these lengths of targets.
struct Texts {
    prompts: Vec<SoftPrompt>,
    texts: Vec<(Vec<u32>, Vec<u32>)>,
}

impl Texts {
    fn new(targets: &[usize]) -> Result<Self> {
        let mut random = Philox::new(SEED, &[1]);
        let values: Vec<f32> = (0..5 * 80).map(|_| random.normal()).collect();
        let prompts = vec![Tensor::from_vec(values, (5, 80), &Device::Cpu)?.into()];
        let mut tokens = |n: usize| -> Vec<u32> { (0..n).map(|_| random.below(VOCABULARY) as u32).collect() };
        let text = |(i, target): (usize, &usize)| (tokens(7 + 13 * i), tokens(*target));
        Ok(Self { prompts, texts: targets.iter().enumerate().map(text).collect() })
    }

    fn examples(&self) -> Vec<Example<'_>> {
        let example = |(input, target)| Example { prompt: Some(0), input, target, key: 0 };
        self.texts.iter().map(|(input, target)| (&input[..], &target[..])).map(example).collect()
    }
}

fn bits(gradients: &[ExampleGradient]) -> Result<Vec<Vec<u32>>> {
    let of = |g: &ExampleGradient| -> Result<Vec<u32>> {
        let values = g.prompt_gradient.flatten_all()?.to_vec1::<f32>()?;
        Ok([g.loss].iter().chain(&values).map(|x| x.to_bits()).collect())
    };
    gradients.iter().map(of).collect()
}

#[test]
fn an_example_has_the_same_bits_alone_and_beside_those_with_fewer_or_more_rows() -> Result<()> {
    let texts = Texts::new(&[4, 30, FEW, FEW + 1, 1])?;
    let examples = texts.examples();
    for dtype in [DType::BF16, DType::F32] {
        let model = model(dtype)?;
        let made = |examples: &[Example<'_>], recompute| {
            let batch = Microbatch { prompts: &texts.prompts, examples };
            let options = PassOptions { recompute, ..PassOptions::default() };
            bits(&model.loss_and_gradient(&batch, &vec![0.5; examples.len()], &options)?)
        };
        let gradients = |examples: &[Example<'_>]| made(examples, false);
        ensure!(
            gradients(&examples)? == made(&examples, true)?,
            "{dtype:?}: recomputed layers have other bits"
        );
        let losses = |examples: &[Example<'_>]| {
            Ok::<_, anyhow::Error>(model.loss(&Microbatch { prompts: &texts.prompts, examples })?)
        };
        let (together, of_all) = (gradients(&examples)?, losses(&examples)?);
        for (i, example) in examples.iter().enumerate() {
            ensure!(gradients(&[*example])?[0] == together[i], "{dtype:?}: gradient {i} has other bits");
            ensure!(losses(&[*example])?[0] == of_all[i], "{dtype:?}: loss {i} has other bits");
            ensure!(of_all[i].to_bits() == together[i][0], "{dtype:?}: loss {i} differs without a gradient");
        }
    }
    Ok(())
}

/// In f32 keys and values are made always. What bf16 makes of them differs from that as much.
#[test]
fn losses_and_gradients_are_near_to_those_of_f32_which_has_keys_and_values() -> Result<()> {
    let texts = Texts::new(&[4, FEW, 1])?;
    let examples = texts.examples();
    let batch = Microbatch { prompts: &texts.prompts, examples: &examples };
    let (scale, options) = (vec![1.0; examples.len()], PassOptions::default());
    let weights = || -> Result<[T5; 2]> { Ok([model(DType::F32)?, model(DType::BF16)?]) };
    let [exact, rounded] = weights()?;
    let expected = exact.loss_and_gradient(&batch, &scale, &options)?;
    let found = rounded.loss_and_gradient(&batch, &scale, &options)?;
    // A pass that trains weights makes keys and values.
    let mut trained = WeightGradients::of(["decoder.final_layer_norm.weight"]);
    let with = rounded.loss_and_weight_gradients(&batch, &scale, &options, &mut trained)?;
    for ((found, expected), with) in found.iter().zip(&expected).zip(&with) {
        let [without, with] = [found.loss, *with].map(|loss| (loss / expected.loss - 1.0).abs());
        let [found, expected] = [found, expected].map(|g| g.prompt_gradient.flatten_all()?.to_vec1::<f32>());
        let (found, expected) = (found?, expected?);
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let apart =
            norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied());
        println!("losses off by {without:.1e}, with keys and values by {with:.1e}; gradient by {apart:.1e}");
        ensure!(without < 1e-3 && apart < 0.03, "off by {without:.1e}, gradient by {apart:.1e}");
    }
    Ok(())
}

/// All labels' rows decide together; else losses differ as bf16 does, whose numbers have eight bits.
#[test]
fn labels_have_the_losses_that_each_has_as_a_target_and_few_of_them_the_same_bits() -> Result<()> {
    let texts = Texts::new(&[1, 1, 1])?;
    let examples = texts.examples();
    let batch = Microbatch { prompts: &texts.prompts, examples: &examples };
    let model = model(DType::BF16)?;
    let encoded = model.encoded(&batch)?;
    for (lengths, few) in [(&[2, 5, 3, 6][..], true), (&[2, FEW + 4, 3, FEW], false)] {
        let labels: Vec<Vec<u32>> =
            lengths.iter().map(|n| (0..*n as u32).map(|t| t % 90).collect()).collect();
        let found = model.label_losses_after(&encoded, &batch, &labels)?;
        for (e, example) in examples.iter().enumerate() {
            for (l, label) in labels.iter().enumerate() {
                let alone = [Example { target: label, ..*example }];
                let expected = model.loss(&Microbatch { prompts: &texts.prompts, examples: &alone })?[0];
                let found = found[e * labels.len() + l];
                ensure!(
                    (found / expected - 1.0).abs() < 1e-2,
                    "label {l} of example {e}: {found} {expected}"
                );
                ensure!(!few || found == expected, "label {l} of example {e} has other bits");
            }
        }
    }
    Ok(())
}

#[test]
fn the_same_tokens_are_written_with_keys_and_values_and_without() -> Result<()> {
    let texts = Texts::new(&[1, 1, 1, 1])?;
    let examples = texts.examples();
    let batch = Microbatch { prompts: &texts.prompts, examples: &examples };
    let model = model(DType::BF16)?;
    let written = |max_new_tokens| {
        model.generate(&batch, &GenerateOptions { max_new_tokens, ..GenerateOptions::default() })
    };
    let (without, with) = (written(FEW)?, written(FEW + 1)?);
    for (without, with) in without.iter().zip(&with) {
        ensure!(
            !without.tokens.is_empty() && with.tokens.starts_with(&without.tokens),
            "{without:?} {with:?}"
        );
    }
    Ok(())
}
