//! `incipit bench`: how long things take on this machine.

mod attention;
mod collective;
mod gpu;
mod load;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};
use clap::{Args, Subcommand};
use incipit_collective::{Ranks, gather_bytes};
use incipit_data::TokenizedExample;
use incipit_kernels::DeviceMemory;
use incipit_kernels::rng::Philox;
use incipit_model::sharding::part_bytes;
use incipit_model::{Config, SoftPrompt, T5, TensorAxis};
use incipit_tune::device::DeviceChoice;
use incipit_tune::engine::{Engine, EngineOptions, JobBatch, Objective, Recompute};
use incipit_tune::optimizer::{Optimizer, OptimizerKind};
use incipit_tune::recipe::LossReduction;
use incipit_tune::spec::{Backend, Precision};
use incipit_weights::{Checkpoint, Loading, Random};
use serde::{Deserialize, Serialize};

use crate::args::{Global, choice, names};
use crate::exit::{Exit, bad_input};
use crate::loading;
use crate::output::{self, Printed};
use crate::progress::{self, note};
use crate::ranks::{self, RankArgs};
use crate::{machine, units};

pub(crate) use collective::CollectiveArgs;

/// The random streams of prompts and tokens.
const PROMPT_STREAM: u64 = 1;
const TOKEN_STREAM: u64 = 2;
const LEARNING_RATE: f32 = 0.3;
const MEBIBYTE: f64 = 1024.0 * 1024.0;

/// What can be timed.
#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// One training step: forward, backward to the prompt, and the optimizer's update
    Step(StepArgs),
    /// What ranks exchange: all-reduce, all-gather and barrier, by size
    Collective(CollectiveArgs),
    /// A coordinator: submits, watchers and lists
    Load(load::LoadArgs),
}

const AFTER_HELP: &str = "\
Weights are random, in the shape of a T5 1.1 or of the config.json in a directory; a directory with weights is used as it is.

Examples:
  incipit bench step --shape base --lengths 8x128
  incipit bench step --shape base --lengths 96,82,131,95,64,111,195,158 --jobs 2 --json
  incipit bench step --shape base --lengths 8x128 --dp 2
  incipit launch --nproc 2 -- bench step --shape ./t5-xxl --lengths 2x64 --tp 2

Useful floating-point operations of a step are 4 x the parameters that a token passes x the tokens: 2 forward, 2 backward to the \
input. Recomputation is not counted. Memory and bytes from disk are those of the process that has most of them.";

/// Flags of `bench step`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct StepArgs {
    /// small, base, large, xl or xxl (T5 1.1, random weights), or a directory: its weights, or its config.json and random weights
    #[arg(long, value_name = "SHAPE|DIR")]
    shape: String,
    /// Tokens of each example's input, prompt not counted: a list, or COUNTxLENGTH
    #[arg(long, value_name = "LIST|NxL", value_parser = parse_lengths)]
    lengths: Lengths,
    /// Tokens of each target
    #[arg(long, value_name = "N", default_value_t = 4)]
    target_length: usize,
    /// Rows of each prompt
    #[arg(long, value_name = "P", default_value_t = 100)]
    prompt_length: usize,
    /// Jobs between which the examples are divided, each with a prompt of its own
    #[arg(long, value_name = "K", default_value_t = 1)]
    jobs: usize,
    /// Type of the backbone's weights
    #[arg(long, default_value = "bf16", value_parser = choice::<Precision>(names::DTYPES))]
    dtype: Precision,
    /// Steps that are timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Where the backbone runs: cpu, cuda (each rank on the GPU of its number) or cuda:N; GPUs need a build with the
    /// feature `cuda`
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    /// Time every kernel of one more step, on a GPU
    #[arg(long)]
    profile: bool,
    /// Tokens that go through the backbone at once [default: by the memory there is]
    #[arg(long, value_name = "N")]
    microbatch_tokens: Option<usize>,
    /// Whether activations are computed again in the backward pass instead of kept
    #[arg(long, default_value = "auto", value_parser = choice::<Recompute>(names::RECOMPUTES))]
    recompute: Recompute,
    /// Seed of weights, prompts and tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

#[derive(Clone, Debug, PartialEq)]
struct Lengths(Vec<usize>);

#[derive(Serialize)]
struct Report {
    shape: String,
    dtype: String,
    device: String,
    /// Instructions of the CPU that its kernels use.
    instructions: &'static str,
    tp: usize,
    dp: usize,
    collective: String,
    /// Of each rank.
    threads: usize,
    jobs: usize,
    examples: usize,
    prompt_length: usize,
    target_length: usize,
    microbatch_tokens: usize,
    /// Inputs, prompt rows and targets of a step.
    tokens: usize,
    parameters: u64,
    steps: usize,
    median_s: f64,
    min_s: f64,
    seconds: Vec<f64>,
    peak_rss_mb: Option<f64>,
    /// Memory that is not a view of a file, at the end.
    anonymous_rss_mb: Option<f64>,
    useful_tflop: f64,
    /// Useful, by the median.
    tflop_s: f64,
    /// Bytes from disk in a step, on average.
    read_mb: Option<f64>,
    /// Of one rank alone.
    attention_share: Option<f64>,
    /// Kernels and products that a step starts on a GPU.
    launches: Option<u64>,
    /// Memory of the GPU: the most that was in use at once, and all of it.
    device_peak_mb: Option<f64>,
    device_total_mb: Option<f64>,
    /// Of one step, longest first.
    kernels: Vec<gpu::Kernel>,
    /// Of the steps, what rank 0 spends in exchanges with other ranks, waiting for them included.
    collective_share: f64,
    loss: f64,
}

/// One prompt of the benchmark.
struct Job {
    prompt: Vec<f32>,
    optimizer: Optimizer,
    examples: Vec<TokenizedExample>,
}

/// Times the steps and prints what they took.
///
/// # Errors
/// If the shape or the lengths cannot be used, or a step fails.
pub(crate) fn run(command: &BenchCommand, global: &Global) -> Result<Exit> {
    match command {
        BenchCommand::Step(args) => output::print(&step(args, global)?, global.json)?,
        BenchCommand::Load(args) => output::print(&load::measure(args)?, global.json)?,
        BenchCommand::Collective(args) => output::print(&collective::measure(args, global)?, global.json)?,
    }
    Ok(Exit::Ok)
}

/// `96,82,131` or `8x128`.
fn parse_lengths(text: &str) -> Result<Lengths, String> {
    let number = |part: &str| match part.trim().parse::<usize>() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!(
            "`{part}` is not a number of tokens: write a list such as 96,82,131, or COUNTxLENGTH such as 8x128"
        )),
    };
    match text.split_once(['x', 'X']) {
        Some((count, length)) => Ok(Lengths(vec![number(length)?; number(count)?])),
        None => text.split(',').map(number).collect::<Result<_, _>>().map(Lengths),
    }
}

fn check(args: &StepArgs) -> Result<()> {
    let Lengths(lengths) = &args.lengths;
    match args {
        StepArgs { steps: 0, .. } => bad_input("--steps is 0: nothing would be timed"),
        StepArgs { target_length: 0, .. } => {
            bad_input("--target-length is 0: a target ends with </s>, give at least 1")
        }
        StepArgs { prompt_length: 0, .. } => {
            bad_input("--prompt-length is 0: there would be nothing to train")
        }
        StepArgs { jobs, .. } if !(1..=lengths.len()).contains(jobs) => {
            bad_input(format!("--jobs is {jobs}: give 1 to {}, as many as there are examples", lengths.len()))
        }
        _ => Ok(()),
    }
}

fn step(args: &StepArgs, global: &Global) -> Result<Report> {
    check(args)?;
    note("making the weights ready");
    if args.profile && !args.device.is_gpu() {
        return bad_input("--profile times the kernels of a GPU: pass --device cuda besides");
    }
    ranks::run(&args.ranks, args.device, global.threads, |ranks| on_rank(args, ranks, global))
}

/// What one process used, for the others to know.
#[derive(Serialize, Deserialize)]
struct Used {
    /// Bytes.
    peak: Option<u64>,
    /// Bytes.
    anonymous: Option<u64>,
    /// Bytes from disk during the timed steps.
    read: Option<u64>,
}

/// What was read off while the steps ran.
struct Measured {
    seconds: Vec<f64>,
    loss: f64,
    used: Vec<Used>,
    exchange_s: f64,
    attention_s: Option<f64>,
    launches: Option<u64>,
    memory: Option<DeviceMemory>,
    kernels: Vec<gpu::Kernel>,
}

fn on_rank(args: &StepArgs, ranks: &Arc<Ranks>, global: &Global) -> Result<Report> {
    let device = args.device.open(ranks)?;
    let model = model(args, ranks, &device, global)?;
    let config = model.config().clone();
    let options = EngineOptions { microbatch_tokens: args.microbatch_tokens, recompute: args.recompute };
    let engine = Engine::on(Arc::new(model), options, ranks.clone())?;
    let mut jobs = jobs(args, &config);
    let bar = ranks.leads().then(|| progress::bar(args.steps as u64 + 1, "steps", global));
    let mut one = || -> Result<(f64, f64)> {
        let start = Instant::now();
        let loss = one_step(&engine, &mut jobs, args.prompt_length, config.d_model)?;
        bar.iter().for_each(|bar| bar.inc(1));
        Ok((start.elapsed().as_secs_f64(), loss))
    };
    // The first step touches the files for the first time.
    one()?;
    let (read, exchanged) = (machine::bytes_read(), ranks.seconds());
    let started = incipit_kernels::launches(&device)?;
    let steps: Vec<_> = (0..args.steps).map(|_| one()).collect::<Result<_>>()?;
    let used = Used {
        // Read before attention is timed alone, which would add to it.
        peak: machine::peak_memory(),
        anonymous: machine::anonymous_memory(),
        read: machine::bytes_read().zip(read).map(|(now, before)| now.saturating_sub(before)),
    };
    let exchange_s = ranks.seconds() - exchanged;
    let launched = incipit_kernels::launches(&device)?.zip(started).map(|(now, before)| now - before);
    let launches = launched.map(|launches| launches / args.steps as u64);
    let memory = incipit_kernels::device_memory(&device)?;
    let kernels = if args.profile { gpu::profile(&device, || one().map(drop))? } else { Vec::new() };
    let used = gather_bytes(&**ranks.world(), &serde_json::to_vec(&used)?)?;
    let used = used.iter().map(|used| serde_json::from_slice(used)).collect::<Result<_, _>>()?;
    let attention_s = match ranks.mesh().world() {
        1 if !args.device.is_gpu() => {
            Some(attention::seconds(&config, args.dtype.into(), &rows(args), args.target_length)?)
        }
        _ => None,
    };
    let (seconds, losses): (Vec<f64>, Vec<f64>) = steps.into_iter().unzip();
    let loss = losses.last().copied().unwrap_or_default();
    Ok(report(
        args,
        &engine,
        Measured { seconds, loss, used, exchange_s, attention_s, launches, memory, kernels },
    ))
}

/// Rows of each example in the encoder.
fn rows(args: &StepArgs) -> Vec<usize> {
    let Lengths(lengths) = &args.lengths;
    lengths.iter().map(|length| length + args.prompt_length).collect()
}

fn report(args: &StepArgs, engine: &Engine, measured: Measured) -> Report {
    let Measured { seconds, loss, used, exchange_s, attention_s, launches, memory, kernels } = measured;
    let (config, mesh) = (engine.model().config(), engine.ranks().mesh());
    let rows = rows(args);
    let (encoder, decoder) = (rows.iter().sum::<usize>(), rows.len() * args.target_length);
    let (encoder_parameters, decoder_parameters) = config.parameters_passed();
    let flop =
        4.0 * (encoder_parameters as f64 * encoder as f64 + decoder_parameters as f64 * decoder as f64);
    let median_s = median(&seconds);
    let most =
        |of: &dyn Fn(&Used) -> Option<u64>| used.iter().filter_map(of).max().map(|n| n as f64 / MEBIBYTE);
    Report {
        shape: args.shape.clone(),
        dtype: args.dtype.to_string(),
        device: args.device.to_string(),
        instructions: incipit_kernels::isa().name(),
        tp: mesh.tp(),
        dp: mesh.dp(),
        collective: args.ranks.collective.unwrap_or(Backend::Local).to_string(),
        threads: rayon::current_num_threads(),
        jobs: args.jobs,
        examples: rows.len(),
        prompt_length: args.prompt_length,
        target_length: args.target_length,
        microbatch_tokens: engine.microbatch_tokens(),
        tokens: encoder + decoder,
        parameters: config.num_parameters(),
        steps: args.steps,
        median_s,
        min_s: seconds.iter().copied().fold(f64::MAX, f64::min),
        peak_rss_mb: most(&|used| used.peak),
        anonymous_rss_mb: most(&|used| used.anonymous),
        read_mb: most(&|used| used.read).map(|mb| mb / args.steps as f64),
        useful_tflop: flop / 1e12,
        tflop_s: flop / 1e12 / median_s,
        attention_share: attention_s.map(|s| s / median_s),
        launches,
        device_peak_mb: memory.and_then(|memory| memory.peak).map(|peak| peak as f64 / MEBIBYTE),
        device_total_mb: memory.map(|memory| memory.total as f64 / MEBIBYTE),
        kernels,
        collective_share: exchange_s / seconds.iter().sum::<f64>(),
        seconds,
        loss,
    }
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[half - 1], sorted[half]) } else { sorted[half] }
}

fn model(args: &StepArgs, ranks: &Ranks, device: &Device, global: &Global) -> Result<T5> {
    let (dtype, axis) = (args.dtype.into(), &TensorAxis::of(ranks));
    let show = |loading: Arc<Loading>| ranks.leads().then(|| loading::show(loading, global));
    let made_up = |config: Config| -> Result<T5> {
        let weights = Random::new(config.random_tensors(), dtype, args.seed)?;
        weights.expect(part_bytes(&weights, axis.shard()));
        let _shown = show(weights.loading());
        Ok(T5::load_on(config, &weights, dtype, axis, device)?)
    };
    if let Some(config) = Config::preset(&args.shape) {
        return made_up(config);
    }
    let dir = Path::new(&args.shape);
    if !dir.is_dir() {
        return bad_input(format!(
            "--shape {} is neither small, base, large, xl or xxl nor a directory",
            args.shape
        ));
    }
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = Config::from_json(&text)?;
    match Checkpoint::open(dir, dtype) {
        Ok(checkpoint) => {
            checkpoint.expect(part_bytes(&checkpoint, axis.shard()), !device.is_cpu(), false);
            let _shown = show(checkpoint.loading());
            Ok(T5::load_on(config, &checkpoint, dtype, axis, device)?)
        }
        Err(incipit_weights::Error::NoWeights { .. }) => made_up(config),
        Err(error) => Err(error.into()),
    }
}

/// The examples in order, cut into as many parts as there are jobs.
fn jobs(args: &StepArgs, config: &Config) -> Vec<Job> {
    let Lengths(lengths) = &args.lengths;
    let mut tokens = Philox::new(args.seed, &[TOKEN_STREAM]);
    // Ids below 3 are padding, the end and the unknown.
    let mut sequence = |length: usize| -> Vec<u32> {
        let mut ids: Vec<u32> =
            (1..length).map(|_| 3 + tokens.below(config.vocab_size as u64 - 3) as u32).collect();
        ids.push(config.eos_token_id);
        ids
    };
    let mut examples: Vec<_> = lengths
        .iter()
        .map(|length| TokenizedExample { input: sequence(*length), target: sequence(args.target_length) })
        .collect();
    let mut jobs = Vec::new();
    for k in 0..args.jobs {
        let mut rng = Philox::new(args.seed, &[PROMPT_STREAM, k as u64]);
        let prompt = (0..args.prompt_length * config.d_model).map(|_| rng.uniform() - 0.5).collect();
        let optimizer =
            Optimizer::new(&OptimizerKind::adafactor(1e-5, 0), args.prompt_length, config.d_model);
        let share = examples.len() / (args.jobs - k);
        jobs.push(Job { prompt, optimizer, examples: examples.drain(..share).collect() });
    }
    jobs
}

/// One update of every job; the mean of their losses.
fn one_step(engine: &Engine, jobs: &mut [Job], rows: usize, width: usize) -> Result<f64> {
    let prompts: Vec<SoftPrompt> = jobs
        .iter()
        .map(|job| Ok(Tensor::from_slice(&job.prompt, (rows, width), &Device::Cpu)?.into()))
        .collect::<candle_core::Result<_>>()?;
    let objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };
    let batches: Vec<JobBatch<'_>> = jobs
        .iter()
        .zip(&prompts)
        .map(|(job, prompt)| JobBatch {
            prompt,
            examples: job.examples.iter().collect(),
            keys: (0..job.examples.len() as u64).collect(),
            objective,
        })
        .collect();
    let gradients = engine.gradients(&batches)?;
    drop(batches);
    let mut loss = 0.0;
    let count = jobs.len() as f64;
    for (job, gradient) in jobs.iter_mut().zip(gradients) {
        let gradient = gradient.map_err(|fault| anyhow!("the step failed: {fault}"))?;
        job.optimizer.step(&mut job.prompt, &gradient.gradient, LEARNING_RATE);
        loss += gradient.loss / count;
    }
    Ok(loss)
}

impl Printed for Report {
    fn text(&self) -> String {
        let mb = |n: Option<f64>| {
            n.map_or_else(|| "not told by this system".to_owned(), |mb| format!("{} MiB", units::rate(mb)))
        };
        let mut rows = vec![
            vec!["median of a step".to_owned(), format!("{:.3} s", self.median_s)],
            vec!["fastest step".to_owned(), format!("{:.3} s", self.min_s)],
            vec!["tokens a step".to_owned(), units::count(self.tokens as u64)],
            vec!["tokens a second".to_owned(), units::rate(self.tokens as f64 / self.median_s)],
            vec!["examples a second".to_owned(), units::rate(self.examples as f64 / self.median_s)],
            vec!["useful work a step".to_owned(), format!("{:.3} TFLOP", self.useful_tflop)],
            vec!["useful rate".to_owned(), format!("{:.3} TFLOP/s", self.tflop_s)],
            vec!["peak memory".to_owned(), mb(self.peak_rss_mb)],
            vec!["of it no view of a file".to_owned(), mb(self.anonymous_rss_mb)],
            vec!["read from disk a step".to_owned(), mb(self.read_mb)],
        ];
        rows.extend(self.launches.map(|n| vec!["kernels started a step".to_owned(), units::count(n)]));
        rows.extend(self.device_total_mb.map(|total| {
            let peak = mb(self.device_peak_mb);
            vec!["peak memory of the GPU".to_owned(), format!("{peak} of {}", mb(Some(total)))]
        }));
        rows.extend(self.attention_share.map(|s| vec!["share of attention".to_owned(), units::percent(s)]));
        if self.tp * self.dp > 1 {
            rows.push(vec!["share of exchanges".to_owned(), units::percent(self.collective_share)]);
        }
        let what = format!(
            "{} in {}, {} parameters; {} examples of {} jobs, {} prompt rows, {} target tokens; kernels {}, {}{} threads",
            self.shape,
            self.dtype,
            units::count(self.parameters),
            self.examples,
            self.jobs,
            self.prompt_length,
            self.target_length,
            self.instructions,
            if self.tp * self.dp > 1 {
                format!("tp {} x dp {} ({}), each ", self.tp, self.dp, self.collective)
            } else {
                String::new()
            },
            self.threads
        );
        let table = output::table(&["measure", "value"], &rows, true);
        format!("{what}\n{table}{}", gpu::table(&self.kernels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_a_list_or_a_count_of_equal_ones() {
        assert_eq!(parse_lengths("8x128"), Ok(Lengths(vec![128; 8])));
        assert_eq!(parse_lengths("96, 82,131"), Ok(Lengths(vec![96, 82, 131])));
        for bad in ["", "0", "8x", "x8", "8x0", "1,,2", "-3", "many"] {
            assert!(parse_lengths(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_median_lies_between_the_middle_two() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
