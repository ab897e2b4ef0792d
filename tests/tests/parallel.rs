//! The parity ladder: what one rank computes, 2 and 4 ranks that share the model compute together, and so do replicas that
//! share the examples. Ranks are threads here; `processes.rs` has the same over Gloo.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use incipit_collective::{Mesh, Options, Ranks};
use incipit_data::TokenizedExample;
use incipit_kernels::rng::Philox;
use incipit_kernels::{Activation, Frozen};
use incipit_model::{
    Config, Example, ExampleGradient, GenerateOptions, Microbatch, PassOptions, Placement, SoftPrompt, T5,
    TensorAxis,
};
use incipit_tune::engine::{Engine, EngineOptions, JobBatch, JobFault, Objective, Recompute};
use incipit_tune::ranks::{agree, on_threads};
use incipit_tune::recipe::LossReduction;
use incipit_weights::{Random, Source, TensorInfo};

const SEED: u64 = 2021;
/// What the loss of tp 2 and 4 may differ by from that of tp 1, relative.
const LOSS: f64 = 1e-6;
/// What an element of the gradient may differ by, as a share of the gradient's largest element.
const GRADIENT: f64 = 1e-5;

/// T5 1.1; T5 1.0 (tied, plain relu) with unequal depths; heads narrower together than the model, silu.
fn configs() -> Vec<(&'static str, Config)> {
    let base = Config::preset("small").expect("a known shape");
    let v11 = Config {
        vocab_size: 96,
        d_model: 64,
        d_kv: 16,
        d_ff: 96,
        num_heads: 8,
        num_layers: 3,
        num_decoder_layers: 3,
        ..base
    };
    let v10 = Config {
        activation: Activation::Relu,
        gated: false,
        own_head: false,
        scale_logits: true,
        num_decoder_layers: 2,
        ..v11
    };
    let narrow = Config { activation: Activation::Silu, d_kv: 5, num_heads: 4, num_layers: 2, ..v11 };
    vec![("v1.1", v11), ("v1.0", v10), ("narrow", narrow)]
}

fn model(config: &Config, dtype: DType, axis: &TensorAxis) -> Result<T5> {
    let weights = Random::new(config.random_tensors(), dtype, SEED)?;
    Ok(T5::load_on(config.clone(), &weights, dtype, axis, &Device::Cpu)?)
}

/// Prompts of 7 and of 3 rows before the input, one behind it, one in the decoder and one for all layers, and examples of many lengths,
/// one of them without a prompt.
struct Batch {
    prompts: Vec<SoftPrompt>,
    examples: Vec<(Option<usize>, Vec<u32>, Vec<u32>)>,
}

impl Batch {
    fn new(config: &Config) -> Result<Self> {
        println!("seed {SEED}");
        let mut random = Philox::new(SEED, &[1]);
        let mut prompt = |rows: usize| {
            let values: Vec<f32> = (0..rows * config.d_model).map(|_| random.normal()).collect();
            Tensor::from_vec(values, (rows, config.d_model), &Device::Cpu).map(SoftPrompt::from)
        };
        let placed = |prompt: SoftPrompt, placement| SoftPrompt { placement, ..prompt };
        let num_layers = config.num_layers;
        let prompts = vec![
            prompt(7)?,
            prompt(3)?,
            placed(prompt(4)?, Placement::After),
            placed(prompt(5)?, Placement::Decoder),
            SoftPrompt { num_layers, ..placed(prompt(2 * num_layers)?, Placement::After) },
        ];
        let mut random = Philox::new(SEED, &[2]);
        let mut tokens = |n: usize| -> Vec<u32> {
            (0..n).map(|_| random.below(config.vocab_size as u64) as u32).collect()
        };
        let shapes = [(Some(0), 5, 2), (Some(1), 11, 4), (None, 9, 1), (Some(0), 1, 3), (Some(0), 30, 5)];
        let placed = [(Some(2), 6, 2), (Some(3), 8, 3), (Some(4), 4, 2)];
        let shapes = shapes.into_iter().chain(placed);
        let examples = shapes.map(|(prompt, input, target)| (prompt, tokens(input), tokens(target)));
        Ok(Self { prompts, examples: examples.collect() })
    }

    fn with<R>(&self, f: impl FnOnce(&Microbatch<'_>) -> R) -> R {
        let examples = self.examples.iter().enumerate();
        let examples: Vec<Example<'_>> = examples
            .map(|(key, (prompt, input, target))| Example { prompt: *prompt, input, target, key: key as u64 })
            .collect();
        f(&Microbatch { prompts: &self.prompts, examples: &examples })
    }
}

/// What is compared: losses, gradients, logits, and the tokens of greedy and beam decoding.
struct Computed {
    gradients: Vec<ExampleGradient>,
    logits: Tensor,
    tokens: Vec<Vec<u32>>,
}

fn compute(model: &T5, batch: &Batch, options: &PassOptions) -> Result<Computed> {
    batch.with(|batch| {
        let scale = vec![0.1; batch.examples.len()];
        let gradients = model.loss_and_gradient(batch, &scale, options)?;
        let mut tokens = Vec::new();
        for num_beams in [1, 3] {
            let options = GenerateOptions { max_new_tokens: 8, num_beams, ..GenerateOptions::default() };
            tokens.extend(model.generate(batch, &options)?.into_iter().map(|generated| generated.tokens));
        }
        Ok(Computed { gradients, logits: model.logits(batch)?, tokens })
    })
}

/// Largest difference of two tensors by the largest number of `b`, both of which are finite.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    ensure!(a.dims() == b.dims(), "{:?} and {:?}", a.dims(), b.dims());
    let (a, b) = (bits(a)?, bits(b)?);
    let (mut largest, mut difference) = (f32::MIN_POSITIVE, 0f32);
    for (a, b) in a.into_iter().zip(b).map(|(a, b)| (f32::from_bits(a), f32::from_bits(b))) {
        ensure!(a.is_finite() && b.is_finite(), "{a} and {b}");
        (largest, difference) = (largest.max(b.abs()), difference.max((a - b).abs()));
    }
    Ok(f64::from(difference) / f64::from(largest))
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

fn same_within_rounding(what: &str, found: &Computed, expected: &Computed) -> Result<()> {
    ensure!(found.gradients.len() == expected.gradients.len(), "{what}: {} gradients", found.gradients.len());
    for (i, (a, b)) in found.gradients.iter().zip(&expected.gradients).enumerate() {
        let loss = f64::from((a.loss - b.loss).abs() / b.loss);
        ensure!(loss <= LOSS, "{what}: loss of example {i}: {} and {}", a.loss, b.loss);
        let gradient = apart(&a.prompt_gradient, &b.prompt_gradient)?;
        println!("{what}, example {i}: loss apart by {loss:.1e}, gradient by {gradient:.1e}");
        ensure!(gradient <= GRADIENT, "{what}: gradient of example {i} is {gradient:e} apart");
    }
    let logits = apart(&found.logits, &expected.logits)?;
    ensure!(logits <= GRADIENT, "{what}: logits are {logits:e} apart");
    ensure!(found.tokens == expected.tokens, "{what}: {:?} and {:?}", found.tokens, expected.tokens);
    Ok(())
}

/// Every rank's result is the same bits, and that of one rank within rounding.
fn ladder(tp: usize, options: &PassOptions) -> Result<()> {
    for (name, config) in configs() {
        let batch = Batch::new(&config)?;
        let alone = compute(&model(&config, DType::F32, &TensorAxis::whole())?, &batch, options)?;
        let results = on_threads(Mesh::new(tp, 1, tp)?, None, &Options::default(), |ranks| {
            compute(&model(&config, DType::F32, &TensorAxis::of(&ranks))?, &batch, options)
        });
        let results = results.into_iter().collect::<Result<Vec<_>>>()?;
        for (rank, found) in results.iter().enumerate() {
            same_within_rounding(&format!("{name}, tp {tp}, rank {rank}"), found, &alone)?;
            for (a, b) in found.gradients.iter().zip(&results[0].gradients) {
                ensure!(a.loss.to_bits() == b.loss.to_bits(), "{name}: ranks differ in a loss");
                let same = bits(&a.prompt_gradient)? == bits(&b.prompt_gradient)?;
                ensure!(same, "{name}: ranks differ in a gradient");
            }
        }
    }
    Ok(())
}

#[test]
fn parity_tp1_over_a_mesh_of_one() -> Result<()> {
    ladder(1, &PassOptions::default())
}

#[test]
fn parity_tp2_threads() -> Result<()> {
    ladder(2, &PassOptions::default())
}

#[test]
fn parity_tp4_threads() -> Result<()> {
    ladder(4, &PassOptions::default())
}

#[test]
fn parity_tp4_threads_with_recomputation_dropout_and_z_loss() -> Result<()> {
    ladder(4, &PassOptions { recompute: true, dropout: 0.1, z_loss: 1e-3 })
}

/// The jobs' gradients that ranks of a mesh get for one step, as bits.
fn step_over(mesh: Mesh, config: &Config, batch: &Batch, microbatch_tokens: usize) -> Result<Vec<Vec<u32>>> {
    let on_rank = |ranks: Ranks| -> Result<Vec<u32>> {
        let model = Arc::new(model(config, DType::BF16, &TensorAxis::of(&ranks))?);
        let options =
            EngineOptions { microbatch_tokens: Some(microbatch_tokens), recompute: Recompute::Auto };
        let engine = Engine::on(model, options, Arc::new(ranks))?;
        let texts: Vec<_> = batch
            .examples
            .iter()
            .map(|(_, input, target)| TokenizedExample { input: input.clone(), target: target.clone() })
            .collect();
        let objective = Objective { reduction: LossReduction::Mean, dropout: 0.1, z_loss: 0.0 };
        let job = |prompt: usize, from: usize| JobBatch {
            prompt: &batch.prompts[prompt],
            examples: texts[from..].iter().collect(),
            keys: (from as u64..texts.len() as u64).collect(),
            objective,
        };
        let mut bits = Vec::new();
        for gradient in engine.gradients(&[job(0, 0), job(1, 2), job(2, 1), job(3, 3), job(4, 0)])? {
            let gradient = gradient?;
            bits.extend((gradient.loss as f32).to_bits().to_le_bytes().map(u32::from));
            bits.extend(gradient.gradient.iter().map(|g| g.to_bits()));
        }
        Ok(bits)
    };
    on_threads(mesh, None, &Options::default(), on_rank).into_iter().collect()
}

#[test]
fn replicas_and_microbatches_change_no_bit_of_a_step() -> Result<()> {
    for (name, config) in configs() {
        let batch = Batch::new(&config)?;
        for tp in [1, 2] {
            let alone = step_over(Mesh::new(tp, 1, tp)?, &config, &batch, 2000)?.swap_remove(0);
            // Six replicas are more than there are examples.
            for (dp, tokens) in [(1, 20), (2, 2000), (3, 20), (4, 60), (6, 2000)] {
                for (rank, bits) in
                    step_over(Mesh::new(tp, dp, tp * dp)?, &config, &batch, tokens)?.iter().enumerate()
                {
                    ensure!(*bits == alone, "{name}: tp {tp}, dp {dp}, rank {rank} has other bits");
                }
            }
        }
    }
    Ok(())
}

/// Weights in which the embedding of one token is not a number.
struct Spoilt {
    weights: Random,
    token: usize,
}

impl Source for Spoilt {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.weights.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.weights.contains(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> incipit_weights::Result<Frozen> {
        let frozen = self.weights.frozen(name, shape)?;
        if name != "shared.weight" {
            return Ok(frozen);
        }
        let mut values = frozen.to_f32();
        values[self.token * shape[1]..][..shape[1]].fill(f32::NAN);
        Ok(Frozen::from_f32(values, shape[0], shape[1]))
    }
}

fn job_of<'a>(prompt: &'a SoftPrompt, examples: &'a [TokenizedExample]) -> JobBatch<'a> {
    let keys = (0..examples.len() as u64).collect();
    let objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };
    JobBatch { prompt, examples: examples.iter().collect(), keys, objective }
}

#[test]
fn a_number_that_is_not_finite_ends_its_job_on_every_rank_and_no_other() -> Result<()> {
    let (_, config) = configs().remove(0);
    let batch = Batch::new(&config)?;
    let token = config.vocab_size - 1;
    // All are as long, so that they go to the replicas in turn: the spoilt one, the tenth of the step, to the second.
    let example = |last: usize| TokenizedExample { input: vec![5, 6, last as u32], target: vec![7, 1] };
    let clean: Vec<_> = (0..6).map(|_| example(9)).collect();
    let mut spoilt = clean.clone();
    spoilt[3] = example(token);
    let results = on_threads(Mesh::new(2, 2, 4)?, None, &Options::default(), |ranks| -> Result<_> {
        let weights = Spoilt { weights: Random::new(config.random_tensors(), DType::F32, SEED)?, token };
        let model = T5::load_on(config.clone(), &weights, DType::F32, &TensorAxis::of(&ranks), &Device::Cpu)?;
        let engine = Engine::on(Arc::new(model), EngineOptions::default(), Arc::new(ranks))?;
        let job = |examples| job_of(&batch.prompts[0], examples);
        let [alone] = <[_; 1]>::try_from(engine.gradients(&[job(&clean)])?).expect("one job");
        let [first, middle, last] =
            <[_; 3]>::try_from(engine.gradients(&[job(&clean), job(&spoilt), job(&clean)])?)
                .expect("three jobs");
        ensure!(first == alone && last == alone, "the neighbours have other bits");
        Ok(middle.expect_err("a loss that is not a number"))
    });
    for fault in results {
        // The first rank of the second replica is 2.
        let fault = fault?;
        ensure!(matches!(fault, JobFault::Loss { example: 3, rank: 2, .. }), "{fault:?}");
    }
    Ok(())
}

#[test]
fn why_a_replica_refused_a_job_is_told_on_every_rank() -> Result<()> {
    let (_, config) = configs().remove(0);
    let batch = Batch::new(&config)?;
    let examples = [5, config.vocab_size as u32]
        .map(|token| TokenizedExample { input: vec![6, token], target: vec![7, 1] });
    let results = on_threads(Mesh::new(2, 2, 4)?, None, &Options::default(), |ranks| -> Result<_> {
        let weights = Random::new(config.random_tensors(), DType::F32, SEED)?;
        let model = T5::load_on(config.clone(), &weights, DType::F32, &TensorAxis::of(&ranks), &Device::Cpu)?;
        let engine = Engine::on(Arc::new(model), EngineOptions::default(), Arc::new(ranks))?;
        let gradient = engine.gradients(&[job_of(&batch.prompts[0], &examples)])?.remove(0);
        Ok(gradient.expect_err("a token that is not in the vocabulary"))
    });
    for fault in results {
        let JobFault::Refused(why) = fault? else { anyhow::bail!("another fault") };
        let token = config.vocab_size.to_string();
        ensure!(why.what.contains(&token) && !why.out_of_memory, "{why:?}");
    }
    Ok(())
}

#[test]
fn a_rank_that_was_told_something_else_is_named_on_every_rank() -> Result<()> {
    let results = on_threads(Mesh::new(1, 3, 3)?, None, &Options::default(), |ranks| -> Result<()> {
        let things = |own: &str| [("another model", "t5".to_owned()), ("other data", own.to_owned())];
        agree(&ranks, || things("same"))?;
        let own = if ranks.rank() == 2 { "b" } else { "a" };
        let message = agree(&ranks, || things(own)).expect_err("rank 2 differs").to_string();
        ensure!(message.contains("rank 2 has other data than rank 0"), "{message}");
        Ok(())
    });
    results.into_iter().collect()
}

#[test]
fn a_model_that_cannot_be_cut_is_refused_on_every_rank() -> Result<()> {
    let (_, config) = configs().remove(0);
    let config = Config { d_ff: 98, ..config };
    let results = on_threads(Mesh::new(4, 1, 4)?, None, &Options::default(), |ranks| {
        model(&config, DType::F32, &TensorAxis::of(&ranks)).map(drop)
    });
    for result in results {
        let message = result.expect_err("98 is no multiple of 4").to_string();
        ensure!(message.contains("d_ff") && message.contains("98"), "{message}");
    }
    Ok(())
}
