//! What a run gives does not depend on threads, on how its batches are cut, on recomputation or on its neighbours: not by a bit.

mod common;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use incipit_data::{LoadOptions, TaskFormat, TokenizedSet, load_text, tokenize};
use incipit_kernels::rng::Philox;
use incipit_tune::backbone::Backbone;
use incipit_tune::engine::{EngineOptions, JobBatch, Objective, Recompute};
use incipit_tune::job::{Job, JobSpec};
use incipit_tune::optimizer::OptimizerKind;
use incipit_tune::prompt::Prompt;
use incipit_tune::recipe::LossReduction;
use incipit_tune::schedule::Schedule;
use incipit_tune::spec::Precision;

use common::{arg, demo, incipit};

/// Of prompts.
const SEED: u64 = 88;

/// Bytes of the prompt that the program leaves after four steps of 16 examples with 20 rows.
fn prompt(flags: &str) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    let (model, train) = (demo("model"), demo("data/train.jsonl"));
    let (out_arg, fixed) = (arg(&out), "--prompt-length 20 --batch-size 16 --steps 4 --seed 5");
    let mut args = vec!["train", "--model", &model, "--train", &train, "--out", &out_arg];
    args.extend(fixed.split(' ').chain(flags.split(' ')));
    incipit(&args)?.ok()?;
    Ok(std::fs::read(out.join("prompt.npy"))?)
}

/// The prompt of a run that computes with `numbers`, however it is carried out.
fn one_prompt_however_carried_out(numbers: &str) -> Result<Vec<u8>> {
    let plain = prompt(&format!("{numbers} --threads 1 --microbatch-tokens 4000 --recompute off"))?;
    for how in [
        "--threads 2 --microbatch-tokens 4000 --recompute off",
        "--threads 1 --microbatch-tokens 200 --recompute off",
        "--threads 1 --microbatch-tokens 4000 --recompute on",
        "--threads 2 --microbatch-tokens 200 --recompute on",
    ] {
        ensure!(prompt(&format!("{numbers} {how}"))? == plain, "{numbers}: {how} gives other bytes");
    }
    Ok(plain)
}

#[test]
fn threads_microbatches_and_recomputation_change_no_byte_in_bf16() -> Result<()> {
    let plain = one_prompt_however_carried_out("--dtype bf16 --dropout 0")?;
    let dropped = one_prompt_however_carried_out("--dtype bf16 --dropout 0.1")?;
    ensure!(plain != dropped, "dropout changes nothing");
    Ok(())
}

#[test]
fn threads_microbatches_and_recomputation_change_no_byte_in_f32() -> Result<()> {
    let plain = one_prompt_however_carried_out("--dtype f32 --dropout 0")?;
    let dropped = one_prompt_however_carried_out("--dtype f32 --dropout 0.1")?;
    ensure!(plain != dropped, "dropout changes nothing");
    Ok(())
}

fn backbone(dtype: Precision, microbatch_tokens: usize) -> Result<Backbone> {
    let options = EngineOptions { microbatch_tokens: Some(microbatch_tokens), recompute: Recompute::Off };
    Ok(Backbone::load(&demo("model"), dtype, options)?)
}

/// The examples of the demo, from number `first` on.
fn data(backbone: &Backbone, first: usize, count: usize) -> Result<Arc<TokenizedSet>> {
    let texts = load_text(demo("data/train.jsonl").as_ref(), &TaskFormat::default(), LoadOptions::default())?;
    let texts = texts.examples.get(first..first + count).context("so many examples")?;
    let vocab_size = backbone.config().vocab_size;
    // A limit of its own, so that the lengths of jobs differ more than those of the letters do.
    let longest = 12 + 3 * (first % 17);
    Ok(Arc::new(tokenize(texts, &backbone.tokenizer, longest, 8, vocab_size)?))
}

/// Job `n` of eight that differ in everything: rows, batch, data, seed, optimizer, objective.
fn job(backbone: &Backbone, n: usize) -> Result<Job> {
    let dropout = if n.is_multiple_of(2) { 0.0 } else { 0.1 };
    let reduction = if n == 3 { LossReduction::Sum } else { LossReduction::Mean };
    let spec = JobSpec {
        optimizer: if n == 5 { OptimizerKind::adamw(0.0) } else { OptimizerKind::adafactor(1e-5, 0) },
        lr: 0.3,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        num_steps: 3,
        batch_size: 3 + n,
        shuffle: true,
        seed: n as u64,
        objective: Objective { reduction, dropout, z_loss: 0.0 },
        shared_length: 0,
    };
    let (rows, width) = (1 + 7 * n, backbone.config().d_model);
    let mut random = Philox::new(SEED, &[n as u64]);
    let values = (0..rows * width).map(|_| 8.0 * random.normal()).collect();
    Ok(Job::new(spec, data(backbone, 40 * n, 30)?, Prompt::new(rows, width, values)?)?)
}

/// The prompt as bits, so that even the sign of a zero counts.
fn bits(job: &Job) -> Vec<u32> {
    job.prompt().values().iter().map(|value| value.to_bits()).collect()
}

fn assert_neighbours_change_no_bit(dtype: Precision) -> Result<()> {
    println!("seed {SEED}");
    let backbone = backbone(dtype, 300)?;
    let mut together: Vec<Job> = (0..8).map(|n| job(&backbone, n)).collect::<Result<_>>()?;
    for _ in 0..3 {
        let batches: Vec<JobBatch<'_>> = together.iter().map(Job::batch).collect();
        let gradients = backbone.engine.gradients(&batches)?;
        for (job, gradient) in together.iter_mut().zip(gradients) {
            job.update(gradient)?;
        }
    }
    for (n, job) in together.iter().enumerate() {
        let mut alone = self::job(&backbone, n)?;
        let start = bits(&alone);
        for _ in 0..3 {
            alone.step(&backbone.engine)?;
        }
        ensure!(bits(&alone) != start, "job {n} learned nothing");
        ensure!(bits(&alone) == bits(job), "job {n} is another one alone than beside seven others");
    }
    Ok(())
}

#[test]
fn seven_neighbours_change_no_bit_in_bf16() -> Result<()> {
    assert_neighbours_change_no_bit(Precision::Bf16)
}

#[test]
fn seven_neighbours_change_no_bit_in_f32() -> Result<()> {
    assert_neighbours_change_no_bit(Precision::F32)
}

/// A neighbour whose prompt is not a number is stopped alone.
#[test]
fn a_neighbour_that_is_stopped_changes_no_bit() -> Result<()> {
    let backbone = backbone(Precision::Bf16, 10_000)?;
    let (first, last) = (job(&backbone, 2)?, job(&backbone, 4)?);
    let poisoned = Tensor::full(f32::NAN, (5, backbone.config().d_model), &Device::Cpu)?.into();
    let bad = JobBatch { prompt: &poisoned, ..first.batch() };
    let together = backbone.engine.gradients(&[first.batch(), bad, last.batch()])?;
    ensure!(together[1].is_err(), "a prompt of NaN gives a gradient");
    for (n, job) in [(0, &first), (2, &last)] {
        let alone = backbone.engine.gradients(&[job.batch()])?;
        let (alone, together) = (alone[0].as_ref(), together[n].as_ref());
        let bits = |gradient: &[f32]| gradient.iter().map(|g| g.to_bits()).collect::<Vec<_>>();
        let (alone, together) = (alone.map_err(Clone::clone)?, together.map_err(Clone::clone)?);
        ensure!(bits(&alone.gradient) == bits(&together.gradient), "batch {n} got another gradient");
        ensure!(alone.loss.to_bits() == together.loss.to_bits(), "batch {n} got another loss");
    }
    Ok(())
}
