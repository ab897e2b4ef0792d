//! Our T5 computes what transformers computes: losses, logits, prompt gradients and generated tokens of tiny models, against
//! the goldens in `tests/goldens/`, which `scripts/goldens/t5.py` and `peft_adapter.py` made. Run with `--nocapture` to see
//! the differences.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use incipit_model::{
    Config, Example, ExampleGradient, GenerateOptions, Microbatch, PassOptions, SoftPrompt, T5,
};
use incipit_weights::Checkpoint;
use serde::Deserialize;

/// What f32 may differ by, relative to the golden's norm and to its largest number.
const F32_TOLERANCE: f64 = 1e-4;
/// Our bf16 may be so many times as far from f32 as PyTorch's bf16 is,
const BF16_RATIO: f64 = 1.5;
/// and this much more, since PyTorch can be close by luck.
const BF16_FLOOR: f64 = 2e-3;
/// A prompt of 7 rows, one of 3, and none.
const CASES: [&str; 3] = ["p7", "p3", "none"];

/// `meta.json` of a golden.
#[derive(Deserialize)]
struct Meta {
    inputs: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    max_new_tokens: usize,
    generated: BTreeMap<String, Outputs>,
}

#[derive(Deserialize)]
struct Outputs {
    greedy: Vec<Vec<u32>>,
    beam4: Beams,
    beam3_long: Beams,
}

#[derive(Deserialize)]
struct Beams {
    num_beams: usize,
    length_penalty: f32,
    tokens: Vec<Vec<u32>>,
    scores: Vec<f32>,
}

struct Golden {
    name: &'static str,
    tensors: HashMap<String, Tensor>,
    meta: Meta,
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

fn load_model(name: &str, dtype: DType) -> Result<T5> {
    let checkpoint = Checkpoint::open(&goldens().join(name), dtype)?;
    Ok(T5::load(Config::from_json(&checkpoint.config_json()?)?, &checkpoint, dtype)?)
}

impl Golden {
    fn load(name: &'static str) -> Result<Self> {
        let dir = goldens().join(name);
        let tensors = candle_core::safetensors::load(dir.join("io.safetensors"), &Device::Cpu)?;
        let meta = serde_json::from_str(&std::fs::read_to_string(dir.join("meta.json"))?)?;
        Ok(Self { name, tensors, meta })
    }

    fn tensor(&self, key: &str) -> Result<&Tensor> {
        self.tensors.get(key).with_context(|| format!("{} has no {key}", self.name))
    }

    /// The prompts that examples name by their place in [`CASES`].
    fn prompts(&self) -> Result<Vec<SoftPrompt>> {
        ["p7.prompt", "p3.prompt"].iter().map(|key| Ok(self.tensor(key)?.clone().into())).collect()
    }

    fn examples(&self, case: &str) -> Vec<Example<'_>> {
        let prompt = ["p7", "p3"].iter().position(|c| *c == case);
        let pairs = self.meta.inputs.iter().zip(&self.meta.targets);
        pairs.map(|(input, target)| Example { prompt, input, target, key: 0 }).collect()
    }

    /// Every example under every case, the cases taking turns.
    fn mixed(&self) -> Vec<Example<'_>> {
        let [a, b, c] = CASES.map(|case| self.examples(case));
        a.into_iter().zip(b).zip(c).flat_map(|((a, b), c)| [a, b, c]).collect()
    }

    fn num_target_tokens(&self) -> usize {
        self.meta.targets.iter().map(Vec::len).sum()
    }
}

/// How far `ours` is from `golden`.
struct Difference {
    /// Norm of the difference by the norm of the golden.
    norm: f64,
    /// Largest difference by the largest number of the golden.
    max: f64,
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn difference(ours: &Tensor, golden: &Tensor) -> Result<Difference> {
    ensure!(ours.dims() == golden.dims(), "the shape is {:?}, the golden's {:?}", ours.dims(), golden.dims());
    let (ours, golden) = (numbers(ours)?, numbers(golden)?);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let max = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |a: f64, v| a.max(v.abs()));
    let apart: Vec<f64> = ours.iter().zip(&golden).map(|(a, b)| a - b).collect();
    Ok(Difference {
        norm: norm(&mut apart.iter().copied()) / norm(&mut golden.iter().copied()),
        max: max(&mut apart.iter().copied()) / max(&mut golden.iter().copied()),
    })
}

fn assert_equal_in_f32(what: &str, ours: &Tensor, golden: &Tensor) -> Result<()> {
    let Difference { norm, max } = difference(ours, golden).with_context(|| what.to_owned())?;
    println!("f32  {what}: norm {norm:.1e}, max {max:.1e}");
    ensure!(
        norm <= F32_TOLERANCE && max <= F32_TOLERANCE,
        "{what} is off by {norm:.2e} in norm, {max:.2e} at most"
    );
    Ok(())
}

fn vector(values: &[f32]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}

fn losses(gradients: &[ExampleGradient]) -> Result<Tensor> {
    vector(&gradients.iter().map(|g| g.loss).collect::<Vec<_>>())
}

fn prompt_gradients(gradients: &[ExampleGradient]) -> Result<Tensor> {
    Ok(Tensor::stack(&gradients.iter().map(|g| &g.prompt_gradient).collect::<Vec<_>>(), 0)?)
}

fn assert_forward_equals(golden: &Golden) -> Result<()> {
    let model = load_model(golden.name, DType::F32)?;
    let prompts = golden.prompts()?;
    for case in CASES {
        let name = format!("{} {case}", golden.name);
        let batch = Microbatch { prompts: &prompts, examples: &golden.examples(case) };
        if case == "p7" {
            let encoded = golden.tensor("p7.encoder_output")?;
            assert_equal_in_f32(&format!("{name} encoder output"), &model.encode(&batch)?, encoded)?;
        }
        let logits = golden.tensor(&format!("{case}.logits"))?;
        assert_equal_in_f32(&format!("{name} logits"), &model.logits(&batch)?, logits)?;
        let loss = model.loss(&batch)?;
        let sums = golden.tensor(&format!("{case}.loss_sum"))?;
        assert_equal_in_f32(&format!("{name} loss of each example"), &vector(&loss)?, sums)?;
        // Every target is a label of every example, and each example's own is among them.
        let labels = model.label_losses_after(&model.encoded(&batch)?, &batch, &golden.meta.targets)?;
        let own: Vec<f32> = labels.iter().step_by(golden.meta.targets.len() + 1).copied().collect();
        assert_equal_in_f32(&format!("{name} loss of each example's label"), &vector(&own)?, sums)?;
        let mean = loss.iter().sum::<f32>() / golden.num_target_tokens() as f32;
        let of_batch = golden.tensor(&format!("{case}.loss_mean"))?;
        assert_equal_in_f32(&format!("{name} mean loss"), &vector(&[mean])?, of_batch)?;
    }
    Ok(())
}

fn assert_gradients_equal(golden: &Golden, recompute: bool) -> Result<()> {
    let model = load_model(golden.name, DType::F32)?;
    let prompts = golden.prompts()?;
    let options = PassOptions { recompute, dropout: 0.0, z_loss: 0.0 };
    for case in ["p7", "p3"] {
        let name = format!("{} {case}, recompute {recompute},", golden.name);
        let examples = golden.examples(case);
        let batch = Microbatch { prompts: &prompts, examples: &examples };
        let sums = model.loss_and_gradient(&batch, &vec![1.0; examples.len()], &options)?;
        let loss = golden.tensor(&format!("{case}.loss_sum"))?;
        assert_equal_in_f32(&format!("{name} loss beside the gradient"), &losses(&sums)?, loss)?;
        let each = golden.tensor(&format!("{case}.prompt_gradients"))?;
        assert_equal_in_f32(&format!("{name} gradient of each example"), &prompt_gradients(&sums)?, each)?;

        let mean = vec![1.0 / golden.num_target_tokens() as f32; examples.len()];
        let parts = model.loss_and_gradient(&batch, &mean, &options)?;
        let of_batch = golden.tensor(&format!("{case}.prompt_gradient"))?;
        let total = prompt_gradients(&parts)?.sum(0)?;
        assert_equal_in_f32(&format!("{name} gradient of the mean loss"), &total, of_batch)?;
    }
    Ok(())
}

/// Examples with a long prompt, with a short one and with none in one microbatch, each as if it were alone.
fn assert_prompts_mix(golden: &Golden) -> Result<()> {
    let model = load_model(golden.name, DType::F32)?;
    let prompts = golden.prompts()?;
    let examples = golden.mixed();
    let batch = Microbatch { prompts: &prompts, examples: &examples };
    let options = PassOptions { recompute: false, dropout: 0.0, z_loss: 0.0 };
    let results = model.loss_and_gradient(&batch, &vec![1.0; examples.len()], &options)?;
    let sums = CASES.map(|case| golden.tensor(&format!("{case}.loss_sum")));
    let sums = sums.into_iter().collect::<Result<Vec<_>>>()?;
    assert_equal_in_f32(
        &format!("{} mixed, loss", golden.name),
        &losses(&results)?,
        &Tensor::stack(&sums, 1)?.flatten_all()?,
    )?;
    for (k, case) in ["p7", "p3"].iter().enumerate() {
        let own: Vec<_> = results.iter().skip(k).step_by(CASES.len()).map(|g| &g.prompt_gradient).collect();
        let gradients = golden.tensor(&format!("{case}.prompt_gradients"))?;
        assert_equal_in_f32(
            &format!("{} mixed, gradients of {case}", golden.name),
            &Tensor::stack(&own, 0)?,
            gradients,
        )?;
    }
    Ok(())
}

fn assert_tracks_in_bf16(what: &str, ours: &Tensor, golden: &Golden, key: &str) -> Result<()> {
    let exact = golden.tensor(key)?;
    let ours = difference(ours, exact)?.norm;
    let theirs = difference(golden.tensor(&format!("bf16.{key}"))?, exact)?.norm;
    println!("bf16 {what}: ours {ours:.1e}, PyTorch's {theirs:.1e}");
    ensure!(
        ours <= BF16_RATIO * theirs + BF16_FLOOR,
        "{what} is off by {ours:.2e}; PyTorch's bf16 by {theirs:.2e}"
    );
    Ok(())
}

fn assert_bf16_tracks_f32(golden: &Golden) -> Result<()> {
    let model = load_model(golden.name, DType::BF16)?;
    let prompts = golden.prompts()?;
    let options = PassOptions { recompute: false, dropout: 0.0, z_loss: 0.0 };
    for case in CASES {
        let name = format!("{} {case}", golden.name);
        let examples = golden.examples(case);
        let batch = Microbatch { prompts: &prompts, examples: &examples };
        assert_tracks_in_bf16(
            &format!("{name} logits"),
            &model.logits(&batch)?,
            golden,
            &format!("{case}.logits"),
        )?;
        let loss = vector(&model.loss(&batch)?)?;
        assert_tracks_in_bf16(&format!("{name} loss"), &loss, golden, &format!("{case}.loss_sum"))?;
        if case != "none" {
            let results = model.loss_and_gradient(&batch, &vec![1.0; examples.len()], &options)?;
            let (gradients, key) = (prompt_gradients(&results)?, format!("{case}.prompt_gradients"));
            assert_tracks_in_bf16(&format!("{name} gradients"), &gradients, golden, &key)?;
        }
    }
    Ok(())
}

fn assert_generates(golden: &Golden, beams: impl Fn(&Outputs) -> Option<&Beams>) -> Result<()> {
    let model = load_model(golden.name, DType::F32)?;
    let prompts = golden.prompts()?;
    for case in CASES {
        let outputs = golden.meta.generated.get(case).with_context(|| format!("no outputs for {case}"))?;
        let beams = beams(outputs);
        let options = GenerateOptions {
            max_new_tokens: golden.meta.max_new_tokens,
            num_beams: beams.map_or(1, |b| b.num_beams),
            length_penalty: beams.map_or(1.0, |b| b.length_penalty),
            top_p: None,
            temperature: 1.0,
            seed: 0,
        };
        let batch = Microbatch { prompts: &prompts, examples: &golden.examples(case) };
        let generated = model.generate(&batch, &options)?;
        let tokens: Vec<_> = generated.iter().map(|g| g.tokens.clone()).collect();
        let expected = beams.map_or(&outputs.greedy, |b| &b.tokens);
        ensure!(tokens == *expected, "{} {case}: {tokens:?} instead of {expected:?}", golden.name);
        if let Some(beams) = beams {
            let scores: Vec<f32> = generated.iter().map(|g| g.score).collect();
            assert_equal_in_f32(
                &format!("{} {case} scores", golden.name),
                &vector(&scores)?,
                &vector(&beams.scores)?,
            )?;
        }
    }
    Ok(())
}

macro_rules! parity {
    ($($name:ident),*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn encoder_output_logits_and_losses_equal_transformers_in_f32() -> Result<()> {
                assert_forward_equals(&Golden::load(stringify!($name))?)
            }

            #[test]
            fn prompt_gradients_equal_transformers_in_f32() -> Result<()> {
                let golden = Golden::load(stringify!($name))?;
                assert_gradients_equal(&golden, false)?;
                assert_gradients_equal(&golden, true)
            }

            #[test]
            fn several_prompts_in_a_microbatch_do_not_mix() -> Result<()> {
                assert_prompts_mix(&Golden::load(stringify!($name))?)
            }

            #[test]
            fn bf16_tracks_f32_as_closely_as_pytorch_does() -> Result<()> {
                assert_bf16_tracks_f32(&Golden::load(stringify!($name))?)
            }

            #[test]
            fn greedy_decoding_finds_transformers_tokens() -> Result<()> {
                assert_generates(&Golden::load(stringify!($name))?, |_| None)
            }

            #[test]
            fn beam_search_finds_transformers_tokens_and_scores() -> Result<()> {
                let golden = Golden::load(stringify!($name))?;
                assert_generates(&golden, |outputs| Some(&outputs.beam4))?;
                assert_generates(&golden, |outputs| Some(&outputs.beam3_long))
            }
        }
    )*};
}

parity!(
    v1_1_untied,
    v1_0_tied,
    wide_heads,
    unequal_depths,
    mt5,
    mt5_saved_by_transformers_5,
    silu,
    few_buckets,
    shared_head_unscaled,
    own_head_scaled
);

/// `batch.json` of the prompts that PEFT trained.
#[derive(Deserialize)]
struct PeftBatch {
    model: String,
    max_new_tokens: usize,
    examples: Vec<PeftExample>,
    results: BTreeMap<String, PeftResult>,
}

#[derive(Deserialize)]
struct PeftExample {
    input: Vec<u32>,
    target: Vec<u32>,
}

#[derive(Deserialize)]
struct PeftResult {
    loss: f32,
    /// Each example's mean.
    losses: Vec<f32>,
    greedy: Vec<Vec<u32>>,
}

fn assert_adapter_gives_pefts_results(batch: &PeftBatch, adapter: &Path, result: &PeftResult) -> Result<()> {
    let model = load_model(&batch.model, DType::F32)?;
    let prompt = incipit_tune::peft::read(adapter)?;
    let prompt = Tensor::from_slice(prompt.values(), (prompt.length(), prompt.width()), &Device::Cpu)?;
    let pairs = batch.examples.iter().map(|e| (&e.input, &e.target));
    let examples: Vec<_> =
        pairs.map(|(input, target)| Example { prompt: Some(0), input, target, key: 0 }).collect();
    let microbatch = Microbatch { prompts: &[prompt.into()], examples: &examples };
    let sums = model.loss(&microbatch)?;
    let name = adapter.file_name().unwrap_or_default().to_string_lossy();
    let num_tokens: usize = batch.examples.iter().map(|e| e.target.len()).sum();
    let mean = sums.iter().sum::<f32>() / num_tokens as f32;
    assert_equal_in_f32(&format!("PEFT {name} mean loss"), &vector(&[mean])?, &vector(&[result.loss])?)?;
    let means: Vec<f32> =
        sums.iter().zip(&batch.examples).map(|(sum, e)| sum / e.target.len() as f32).collect();
    assert_equal_in_f32(
        &format!("PEFT {name} loss of each example"),
        &vector(&means)?,
        &vector(&result.losses)?,
    )?;
    let options = GenerateOptions {
        max_new_tokens: batch.max_new_tokens,
        num_beams: 1,
        length_penalty: 1.0,
        top_p: None,
        temperature: 1.0,
        seed: 0,
    };
    let tokens: Vec<_> = model.generate(&microbatch, &options)?.into_iter().map(|g| g.tokens).collect();
    ensure!(tokens == result.greedy, "PEFT {name}: {tokens:?} instead of {:?}", result.greedy);
    Ok(())
}

#[test]
fn adapters_that_peft_saved_give_the_losses_and_tokens_that_peft_gives() -> Result<()> {
    let dir = goldens().join("peft");
    let batch: PeftBatch = serde_json::from_str(&std::fs::read_to_string(dir.join("batch.json"))?)?;
    ensure!(batch.results.len() == 2, "an adapter of two halves and one of one");
    for (name, result) in &batch.results {
        assert_adapter_gives_pefts_results(&batch, &dir.join(name), result)?;
    }
    Ok(())
}
