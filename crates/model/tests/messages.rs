//! How often, and with how many numbers, the ranks that share a model call each other in a pass with gradients.
//!
//! For `Le` encoder and `Ld` decoder layers of width `D`, a microbatch of `T` encoder and `Td` target rows, and `r` = 1 with
//! recomputation, else 0:
//!
//! ```text
//! all-reduces  (4 + r) Le + 2  of [T, D]
//!              (6 + 2r) Ld - 1 of [Td, D]
//!              for every 256 target rows or fewer, t of them: a maximum of t, sums of 2t and of [t, D]
//! numbers      ((4 + r) Le + 2) T D + (6 + 2r) Ld Td D + 3 Td
//! ```
//!
//! `scripts/bench/cost_model.py` computes with these formulas.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use incipit_collective::{Axis, Collective, Mesh, Options, Ranks, Reduce, Result, local};
use incipit_kernels::rng::Philox;
use incipit_model::{Config, Example, Microbatch, PassOptions, T5, TensorAxis};
use incipit_weights::Random;

const SEED: u64 = 2021;
/// Target rows whose logits are held at once.
const HEAD_ROWS: usize = 256;
const PROMPT: usize = 5;

/// An all-reduce: what it makes of its numbers, their type and shape.
type Call = (Reduce, DType, Vec<usize>);

/// A group that keeps a list of the calls.
#[derive(Debug)]
struct Counting {
    group: Arc<dyn Collective>,
    calls: Mutex<Vec<Call>>,
}

impl Collective for Counting {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn all_reduce(&self, x: &Tensor, reduce: Reduce) -> Result<Tensor> {
        self.calls.lock().unwrap().push((reduce, x.dtype(), x.dims().to_vec()));
        self.group.all_reduce(x, reduce)
    }

    fn all_gather(&self, _: &Tensor) -> Result<Tensor> {
        unreachable!("a pass with gradients gathers nothing")
    }

    fn broadcast(&self, _: &Tensor, _: usize) -> Result<Tensor> {
        unreachable!("a pass with gradients broadcasts nothing")
    }

    fn barrier(&self) -> Result<()> {
        unreachable!("a pass with gradients has no barrier")
    }

    fn abort(&self, reason: &str) {
        self.group.abort(reason);
    }
}

fn config(num_layers: usize, num_decoder_layers: usize) -> Config {
    let small = Config::preset("small").unwrap();
    Config {
        vocab_size: 96,
        d_model: 32,
        d_kv: 8,
        d_ff: 48,
        num_heads: 4,
        num_layers,
        num_decoder_layers,
        ..small
    }
}

/// What each of `tp` ranks calls in one pass over examples of these (input, target) lengths.
fn calls(config: &Config, lengths: &[(usize, usize)], options: &PassOptions, tp: usize) -> Vec<Vec<Call>> {
    let mut random = Philox::new(SEED, &[1]);
    let prompt: Vec<f32> = (0..PROMPT * config.d_model).map(|_| random.normal()).collect();
    let prompts = [Tensor::from_vec(prompt, (PROMPT, config.d_model), &Device::Cpu).unwrap().into()];
    let mut tokens =
        |n: usize| -> Vec<u32> { (0..n).map(|_| random.below(config.vocab_size as u64) as u32).collect() };
    let texts: Vec<_> = lengths.iter().map(|(input, target)| (tokens(*input), tokens(*target))).collect();
    let example = |(input, target)| Example { prompt: Some(0), input, target, key: 0 };
    let examples: Vec<_> = texts.iter().map(|(input, target)| example((&input[..], &target[..]))).collect();
    let batch = Microbatch { prompts: &prompts, examples: &examples };
    let on_rank = |ranks: Ranks| {
        let group = Arc::new(Counting { group: ranks.tensor().clone(), calls: Mutex::default() });
        let axis = TensorAxis::new(ranks.shard(Axis::Tensor), group.clone());
        let weights = Random::new(config.random_tensors(), DType::BF16, SEED).unwrap();
        let model = T5::load_on(config.clone(), &weights, DType::BF16, &axis, &Device::Cpu).unwrap();
        model.loss_and_gradient(&batch, &vec![1.0; examples.len()], options).unwrap();
        std::mem::take(&mut *group.calls.lock().unwrap())
    };
    let ranks = local::ranks(Mesh::new(tp, 1, tp).unwrap(), &Options::default());
    std::thread::scope(|scope| {
        let running: Vec<_> = ranks.into_iter().map(|ranks| scope.spawn(|| on_rank(ranks))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The formulas at the top, as a count of [T, D], a count of all, and numbers.
fn formula(config: &Config, (t, td): (usize, usize), recompute: bool) -> (usize, usize, usize) {
    let (le, ld, d) = (config.num_layers, config.num_decoder_layers, config.d_model);
    let r = usize::from(recompute);
    let wide = (4 + r) * le + 2;
    let all = wide + (6 + 2 * r) * ld - 1 + 3 * td.div_ceil(HEAD_ROWS);
    (wide, all, wide * t * d + (6 + 2 * r) * ld * td * d + 3 * td)
}

#[test]
fn a_pass_makes_the_all_reduces_that_the_cost_model_counts() {
    println!("seed {SEED}");
    // The first batch has few target rows an example, the second more than the head takes at once (one with both would be two
    // passes); and the second model has one layer of each kind.
    let batches = [vec![(9, 2), (4, 2), (30, 1)], vec![(40, 150), (3, 170)]];
    for (config, lengths) in [config(3, 2), config(1, 1), config(2, 4)].iter().zip(batches.iter().cycle()) {
        let t: usize = lengths.iter().map(|(input, _)| input + PROMPT).sum();
        let td: usize = lengths.iter().map(|(_, target)| target).sum();
        for (recompute, dropout, tp) in [(false, 0.0, 2), (true, 0.0, 2), (false, 0.1, 4), (true, 0.1, 4)] {
            let options = PassOptions { recompute, dropout, z_loss: 1e-3 };
            for (rank, calls) in calls(config, lengths, &options, tp).into_iter().enumerate() {
                assert!(calls.iter().all(|(_, dtype, _)| *dtype == DType::F32), "{calls:?}");
                let maxima = calls.iter().filter(|(reduce, ..)| *reduce == Reduce::Max).count();
                assert_eq!(maxima, td.div_ceil(HEAD_ROWS));
                let wide = calls.iter().filter(|(_, _, dims)| *dims == [t, config.d_model]).count();
                let numbers: usize = calls.iter().map(|(_, _, dims)| dims.iter().product::<usize>()).sum();
                println!(
                    "tp {tp}, rank {rank}, recompute {recompute}: {} calls, {numbers} numbers",
                    calls.len()
                );
                assert_eq!((wide, calls.len(), numbers), formula(config, (t, td), recompute));
            }
        }
    }
}
