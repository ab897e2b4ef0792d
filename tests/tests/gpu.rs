//! A T5 on a GPU computes what transformers computes, and what it computes on the CPU.
//!
//! Runs on the first CUDA device where there is one (feature `cuda`), and on the emulator, which runs the same kernels on the CPU
//! (feature `emulator`). Where neither is, every test says that it was skipped.
#![cfg(any(feature = "cuda", feature = "emulator"))]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use incipit_collective::Ranks;
use incipit_data::TokenizedExample;
use incipit_kernels::rng::Philox;
use incipit_model::{
    Config, Example, ExampleGradient, GenerateOptions, Microbatch, PassOptions, SoftPrompt, T5, TensorAxis,
};
use incipit_tune::engine::{Engine, EngineOptions, JobBatch, JobFault, JobGradient, Objective, Recompute};
use incipit_tune::recipe::LossReduction;
use incipit_weights::{Checkpoint, Random};

/// What f32 may differ by from transformers, relative to the largest number.
const F32_TOLERANCE: f64 = 1e-4;
const MODELS: [&str; 8] = [
    "v1_0_tied",
    "v1_1_untied",
    "wide_heads",
    "unequal_depths",
    "silu",
    "mt5",
    "few_buckets",
    "own_head_scaled",
];
const SEED: u64 = 404;

/// Runs a test on every GPU there is.
fn on_gpus(test: impl Fn(&Device) -> Result<()>) -> Result<()> {
    #[cfg(feature = "emulator")]
    incipit_kernels::on_emulated_gpu(0, || test(&Device::Cpu)).context("on the emulator")?;
    #[cfg(feature = "cuda")]
    match incipit_kernels::open_gpu(0) {
        Ok(device) => test(&device).context("on CUDA device 0")?,
        Err(error) => println!("skipped on CUDA: {error}"),
    }
    Ok(())
}

/// Asked when the test runs: it may run on another machine than it was built on.
fn goldens() -> PathBuf {
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| "tests".into())).join("goldens")
}

fn golden_model(name: &str, dtype: DType, device: &Device) -> Result<T5> {
    let checkpoint = Checkpoint::open(&goldens().join(name), dtype)?;
    let config = Config::from_json(&checkpoint.config_json()?)?;
    Ok(T5::load_on(config, &checkpoint, dtype, &TensorAxis::whole(), device)?)
}

/// Inputs and results of transformers for a tiny model, made by `scripts/goldens/t5.py`.
struct Golden {
    tensors: HashMap<String, Tensor>,
    inputs: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
    max_new_tokens: usize,
}

impl Golden {
    fn load(name: &str) -> Result<Self> {
        let dir = goldens().join(name);
        let meta: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(dir.join("meta.json"))?)?;
        let tokens = |value: &serde_json::Value| serde_json::from_value::<Vec<Vec<u32>>>(value.clone());
        Ok(Self {
            tensors: candle_core::safetensors::load(dir.join("io.safetensors"), &Device::Cpu)?,
            inputs: tokens(&meta["inputs"])?,
            targets: tokens(&meta["targets"])?,
            greedy: tokens(&meta["generated"]["p7"]["greedy"])?,
            max_new_tokens: meta["max_new_tokens"].as_u64().context("max_new_tokens")? as usize,
        })
    }

    fn tensor(&self, key: &str) -> Result<&Tensor> {
        self.tensors.get(key).with_context(|| format!("there is no {key}"))
    }

    fn examples(&self) -> Vec<Example<'_>> {
        let pairs = self.inputs.iter().zip(&self.targets);
        pairs.map(|(input, target)| Example { prompt: Some(0), input, target, key: 0 }).collect()
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn ensure_close(what: &str, found: &[f32], expected: &[f32], tolerance: f64) -> Result<()> {
    ensure!(found.len() == expected.len(), "{what}: {} numbers, not {}", found.len(), expected.len());
    let largest = expected.iter().fold(1e-30f32, |a, x| a.max(x.abs()));
    let apart = found.iter().zip(expected).fold(0.0f32, |far, (a, b)| far.max((a - b).abs()));
    let error = f64::from(apart / largest);
    println!("{what}: off by {error:.1e} of the largest number");
    ensure!(error <= tolerance && found.iter().all(|x| x.is_finite()), "{what} is off by {error:.2e}");
    Ok(())
}

fn gradients(results: &[ExampleGradient]) -> Result<Vec<f32>> {
    let all = results.iter().map(|r| numbers(&r.prompt_gradient)).collect::<Result<Vec<_>>>()?;
    Ok(all.concat())
}

#[test]
fn losses_gradients_logits_and_greedy_tokens_equal_those_of_transformers() -> Result<()> {
    on_gpus(|device| {
        for name in MODELS {
            let golden = Golden::load(name)?;
            let model = golden_model(name, DType::F32, device)?;
            let prompts = [golden.tensor("p7.prompt")?.clone().into()];
            let examples = golden.examples();
            let batch = Microbatch { prompts: &prompts, examples: &examples };
            let logits = numbers(&model.logits(&batch)?)?;
            ensure_close(
                &format!("{name} logits"),
                &logits,
                &numbers(golden.tensor("p7.logits")?)?,
                F32_TOLERANCE,
            )?;
            for recompute in [false, true] {
                let options = PassOptions { recompute, dropout: 0.0, z_loss: 0.0 };
                let found = model.loss_and_gradient(&batch, &vec![1.0; examples.len()], &options)?;
                let losses: Vec<f32> = found.iter().map(|g| g.loss).collect();
                let expected = numbers(golden.tensor("p7.loss_sum")?)?;
                ensure_close(&format!("{name} losses"), &losses, &expected, F32_TOLERANCE)?;
                let expected = numbers(golden.tensor("p7.prompt_gradients")?)?;
                ensure_close(&format!("{name} gradients"), &gradients(&found)?, &expected, F32_TOLERANCE)?;
            }
            let options =
                GenerateOptions { max_new_tokens: golden.max_new_tokens, ..GenerateOptions::default() };
            let generated: Vec<_> = model.generate(&batch, &options)?.into_iter().map(|g| g.tokens).collect();
            ensure!(generated == golden.greedy, "{name} generates {generated:?}");
        }
        Ok(())
    })
}

/// A model whose sizes are no multiples of anything, in f32 and bf16, with all that a pass can have.
#[test]
fn dropout_z_loss_and_mixed_prompts_give_what_they_give_on_the_cpu() -> Result<()> {
    let config = Config {
        vocab_size: 97,
        d_model: 40,
        d_kv: 12,
        d_ff: 72,
        num_heads: 4,
        num_layers: 2,
        num_decoder_layers: 2,
        ..Config::preset("small").context("a known shape")?
    };
    println!("seed {SEED}");
    let mut random = Philox::new(SEED, &[1]);
    let mut prompt = |rows: usize| {
        let values: Vec<f32> = (0..rows * config.d_model).map(|_| random.normal()).collect();
        Tensor::from_vec(values, (rows, config.d_model), &Device::Cpu).map(SoftPrompt::from)
    };
    let prompts = [prompt(7)?, prompt(70)?];
    let mut random = Philox::new(SEED, &[2]);
    let mut tokens = |n: usize| -> Vec<u32> { (0..n).map(|_| random.below(97) as u32).collect() };
    let shapes = [(Some(0), 5, 2), (Some(1), 11, 4), (None, 9, 1), (Some(0), 1, 3), (Some(1), 30, 5)];
    let texts = shapes.map(|(prompt, input, target)| (prompt, tokens(input), tokens(target)));
    let example = |(key, (prompt, input, target))| Example { prompt, input, target, key };
    let examples: Vec<Example<'_>> =
        (1..).zip(texts.iter().map(|(p, i, t)| (*p, &i[..], &t[..]))).map(example).collect();
    let batch = Microbatch { prompts: &prompts, examples: &examples };
    let scale = [1.0, 0.5, 1.0, 2.0, 0.25];
    let options = PassOptions { recompute: true, dropout: 0.1, z_loss: 0.01 };
    for (dtype, loss, gradient) in [(DType::F32, 1e-5, 1e-4), (DType::BF16, 0.03, 0.15)] {
        let weights = Random::new(config.random_tensors(), dtype, SEED)?;
        let model =
            |device: &Device| T5::load_on(config.clone(), &weights, dtype, &TensorAxis::whole(), device);
        let expected = model(&Device::Cpu)?.loss_and_gradient(&batch, &scale, &options)?;
        on_gpus(|device| {
            let found = model(device)?.loss_and_gradient(&batch, &scale, &options)?;
            let losses = |results: &[ExampleGradient]| results.iter().map(|r| r.loss).collect::<Vec<_>>();
            ensure_close(&format!("{dtype:?} losses"), &losses(&found), &losses(&expected), loss)?;
            ensure_close(
                &format!("{dtype:?} gradients"),
                &gradients(&found)?,
                &gradients(&expected)?,
                gradient,
            )
        })?;
    }
    Ok(())
}

/// The job beside the one that is looked at.
#[derive(Clone, Copy, PartialEq)]
enum Neighbour {
    None,
    Good,
    /// Its prompt is not finite.
    Spoilt,
    /// Its prompt is so long that no tensor with all its rows has room in [`ROOM`].
    #[cfg(feature = "emulator")]
    Large,
}

/// Bytes for which there is room.
#[cfg(feature = "emulator")]
const ROOM: usize = 1 << 20;

/// Gradients of a job and of its neighbour.
fn step(
    device: &Device,
    neighbour: Neighbour,
    microbatch_tokens: usize,
) -> Result<Vec<Result<JobGradient, JobFault>>> {
    let model = golden_model("v1_1_untied", DType::F32, device)?;
    let golden = Golden::load("v1_1_untied")?;
    let options = EngineOptions { microbatch_tokens: Some(microbatch_tokens), recompute: Recompute::Off };
    let engine = Engine::on(Arc::new(model), options, Arc::new(Ranks::alone()))?;
    let examples: Vec<TokenizedExample> = golden
        .inputs
        .iter()
        .zip(&golden.targets)
        .map(|(input, target)| TokenizedExample { input: input.clone(), target: target.clone() })
        .collect();
    let good = golden.tensor("p7.prompt")?.clone();
    let other = golden.tensor("p3.prompt")?.clone();
    let other = match neighbour {
        Neighbour::Spoilt => (other * f64::NAN)?,
        #[cfg(feature = "emulator")]
        Neighbour::Large => other.zeros_like()?.repeat((ROOM / other.elem_count(), 1))?,
        Neighbour::None | Neighbour::Good => other,
    };
    let objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };
    let job = |prompt| JobBatch {
        prompt,
        examples: examples.iter().collect(),
        keys: (0..examples.len() as u64).collect(),
        objective,
    };
    let (good, other) = (good.into(), other.into());
    let jobs = [job(&good), job(&other)];
    Ok(engine.gradients(if neighbour == Neighbour::None { &jobs[..1] } else { &jobs })?)
}

#[test]
fn a_job_that_is_not_finite_ends_alone_and_its_neighbour_keeps_every_bit() -> Result<()> {
    on_gpus(|device| {
        let (clean, spoilt) = (step(device, Neighbour::Good, 4000)?, step(device, Neighbour::Spoilt, 4000)?);
        ensure!(clean[0] == spoilt[0] && clean[0].is_ok(), "the neighbour has other bits");
        ensure!(clean[1].is_ok(), "{:?}", clean[1]);
        ensure!(matches!(spoilt[1], Err(JobFault::Loss { .. })), "{:?}", spoilt[1]);
        Ok(())
    })
}

#[cfg(feature = "emulator")]
#[test]
fn no_job_is_blamed_for_a_device_that_has_failed() -> Result<()> {
    incipit_kernels::on_emulated_gpu(0, || {
        ensure!(step(&Device::Cpu, Neighbour::Good, 4000)?.iter().all(Result::is_ok));
        incipit_kernels::fail_emulated_gpu();
        let error = match step(&Device::Cpu, Neighbour::Good, 4000) {
            Ok(results) => anyhow::bail!("jobs are told of it: {results:?}"),
            Err(error) => error.to_string(),
        };
        ensure!(error.contains("the device has failed"), "{error}");
        Ok(())
    })
}

#[cfg(feature = "emulator")]
#[test]
fn a_job_without_room_ends_alone_and_its_neighbour_keeps_every_bit() -> Result<()> {
    incipit_kernels::on_emulated_gpu(0, || {
        let alone = step(&Device::Cpu, Neighbour::None, usize::MAX)?;
        incipit_kernels::limit_emulated_gpu(ROOM);
        let beside = step(&Device::Cpu, Neighbour::Large, usize::MAX)?;
        ensure!(alone[0] == beside[0] && alone[0].is_ok(), "the neighbour has other bits");
        let Err(JobFault::Refused(why)) = &beside[1] else { anyhow::bail!("{:?}", beside[1]) };
        ensure!(why.out_of_memory && why.what.contains("--microbatch-tokens"), "{why:?}");
        let error = incipit_tune::Error::Stopped { step: 1, why: why.clone() };
        ensure!(error.is_out_of_memory() && !error.is_of_group(), "{error}");
        Ok(())
    })
}

#[test]
fn the_same_step_gives_the_same_bits_again() -> Result<()> {
    on_gpus(|device| {
        let [first, again] = [(); 2].map(|()| step(device, Neighbour::Good, 4000));
        ensure!(first? == again?, "two runs differ");
        Ok(())
    })
}

/// On CUDA this is what the choice of algorithms aims at, as is what the next test asks.
#[test]
fn a_job_has_the_same_bits_alone_as_beside_another() -> Result<()> {
    on_gpus(|device| {
        let (alone, beside) = (step(device, Neighbour::None, 4000)?, step(device, Neighbour::Good, 4000)?);
        ensure!(alone[0] == beside[0] && alone[0].is_ok(), "other bits beside another job");
        Ok(())
    })
}

#[test]
fn a_gradient_does_not_depend_on_how_the_batch_is_cut() -> Result<()> {
    on_gpus(|device| {
        let [whole, cut] = [4000, 60].map(|tokens| step(device, Neighbour::Good, tokens));
        ensure!(whole? == cut?, "other bits in smaller microbatches");
        Ok(())
    })
}
