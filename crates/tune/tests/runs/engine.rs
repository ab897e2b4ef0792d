//! A job's gradient is a function of the backbone, its prompt and its examples alone.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use incipit_data::{TextExample, TokenizedExample, TokenizedSet};
use incipit_kernels::rng::Philox;
use incipit_model::SoftPrompt;
use incipit_tune::{
    engine::{Engine, JobBatch, JobFault, JobGradient, Objective, Recompute},
    job::{Job, JobSpec},
    optimizer::OptimizerKind,
    prompt::Prompt,
    recipe::LossReduction,
    schedule::Schedule,
};

use crate::support::{config, engine, id};

const PAPER: Objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };
const RELEASED: Objective = Objective { reduction: LossReduction::Sum, dropout: 0.1, z_loss: 1e-4 };

/// A job's part of a step, with what it borrows.
struct Owned {
    prompt: SoftPrompt,
    examples: Vec<TokenizedExample>,
    objective: Objective,
}

impl Owned {
    /// A prompt of `rows` rows and `num_examples` examples of all lengths, drawn from `seed`.
    fn new(seed: u64, rows: usize, num_examples: usize, objective: Objective) -> Self {
        let mut random = Philox::new(seed, &[]);
        let values: Vec<f32> = (0..rows * config().d_model).map(|_| random.normal()).collect();
        let prompt = Tensor::from_vec(values, (rows, config().d_model), &Device::Cpu).unwrap().into();
        let mut tokens = |longest: u64| {
            let length = 1 + random.below(longest);
            (0..length).map(|_| 3 + random.below(12) as u32).chain([1]).collect::<Vec<u32>>()
        };
        let examples =
            (0..num_examples).map(|_| TokenizedExample { input: tokens(14), target: tokens(3) }).collect();
        Self { prompt, examples, objective }
    }

    fn batch(&self) -> JobBatch<'_> {
        JobBatch {
            prompt: &self.prompt,
            examples: self.examples.iter().collect(),
            keys: (0..self.examples.len() as u64).map(|i| 1000 + i).collect(),
            objective: self.objective,
        }
    }
}

fn alone(engine: &Engine, job: &Owned) -> Result<JobGradient, JobFault> {
    engine.gradients(&[job.batch()]).unwrap().pop().unwrap()
}

/// Bits, so that even the sign of a zero counts.
fn bits(gradient: &JobGradient) -> (u64, Vec<u32>) {
    (gradient.loss.to_bits(), gradient.gradient.iter().map(|g| g.to_bits()).collect())
}

#[test]
fn the_microbatches_and_recomputation_change_no_bit() {
    for objective in [PAPER, RELEASED] {
        let job = Owned::new(1, 5, 9, objective);
        let whole = alone(&engine(100_000, Recompute::Off), &job).unwrap();
        assert!(whole.gradient.iter().any(|g| *g != 0.0));
        for (tokens, recompute) in
            [(1, Recompute::Off), (40, Recompute::On), (77, Recompute::Off), (100_000, Recompute::On)]
        {
            let cut = alone(&engine(tokens, recompute), &job).unwrap();
            assert_eq!(bits(&cut), bits(&whole), "{tokens} tokens, {objective:?}");
        }
    }
}

#[test]
fn seven_neighbours_with_other_prompts_change_no_bit() {
    let engine = engine(90, Recompute::Auto);
    for objective in [PAPER, RELEASED] {
        let jobs: Vec<Owned> = (0..8)
            .map(|n| {
                Owned::new(
                    n,
                    1 + 3 * n as usize,
                    2 + n as usize % 4,
                    if n % 3 == 0 { PAPER } else { objective },
                )
            })
            .collect();
        let batches: Vec<JobBatch<'_>> = jobs.iter().map(Owned::batch).collect();
        for (n, together) in engine.gradients(&batches).unwrap().into_iter().enumerate() {
            let together = together.unwrap();
            assert_eq!(bits(&together), bits(&alone(&engine, &jobs[n]).unwrap()), "job {n}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let job = Owned::new(3, 7, 12, RELEASED);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bits(&alone(&engine(100_000, Recompute::Off), &job).unwrap()))
    };
    let one = on(1);
    for threads in [2, 3, 5] {
        assert_eq!(on(threads), one, "{threads} threads");
    }
}

#[test]
fn the_order_of_a_batch_changes_no_bit_of_the_gradient() {
    let engine = engine(60, Recompute::Auto);
    let mut job = Owned::new(4, 4, 10, PAPER);
    let straight = alone(&engine, &job).unwrap();
    job.examples.reverse();
    let reversed = alone(&engine, &job).unwrap();
    assert_eq!(bits(&straight).1, bits(&reversed).1);
}

#[test]
fn dropout_draws_by_key_and_nothing_else() {
    let engine = engine(1000, Recompute::Auto);
    let job = Owned::new(5, 4, 6, RELEASED);
    let first = alone(&engine, &job).unwrap();
    assert_eq!(bits(&alone(&engine, &job).unwrap()), bits(&first));
    let mut other = job.batch();
    other.keys.iter_mut().for_each(|key| *key += 1);
    assert_ne!(bits(engine.gradients(&[other]).unwrap()[0].as_ref().unwrap()), bits(&first));
}

#[test]
fn a_number_that_is_none_ends_its_job_and_leaves_the_neighbours_bits() {
    let engine = engine(70, Recompute::Auto);
    let mut jobs: Vec<Owned> = (0..4).map(|n| Owned::new(10 + n, 3 + n as usize, 5, PAPER)).collect();
    jobs[1].examples[3].input[0] = id("poison");
    let bad = vec![f32::INFINITY; 4 * config().d_model];
    jobs[2].prompt = Tensor::from_vec(bad, (4, config().d_model), &Device::Cpu).unwrap().into();
    let batches: Vec<JobBatch<'_>> = jobs.iter().map(Owned::batch).collect();
    let results = engine.gradients(&batches).unwrap();
    assert!(
        matches!(results[1], Err(JobFault::Loss { example: 3, loss, rank: 0 }) if loss.is_nan()),
        "{:?}",
        results[1]
    );
    assert!(matches!(results[2], Err(JobFault::Loss { example: 0, .. })), "{:?}", results[2]);
    for n in [0, 3] {
        let together = results[n].as_ref().unwrap();
        assert_eq!(bits(together), bits(&alone(&engine, &jobs[n]).unwrap()), "job {n}");
    }
}

#[test]
fn an_example_that_the_model_refuses_ends_its_job_alone() {
    let engine = engine(100_000, Recompute::Auto);
    let mut jobs: Vec<Owned> = (0..3).map(|n| Owned::new(20 + n, 3, 4, PAPER)).collect();
    jobs[1].examples[2].input[0] = 999;
    let batches: Vec<JobBatch<'_>> = jobs.iter().map(Owned::batch).collect();
    let results = engine.gradients(&batches).unwrap();
    let fault = results[1].as_ref().unwrap_err().to_string();
    assert!(fault.contains("999"), "{fault}");
    for n in [0, 2] {
        assert_eq!(bits(results[n].as_ref().unwrap()), bits(&alone(&engine, &jobs[n]).unwrap()), "job {n}");
    }
}

#[test]
fn losses_alone_are_those_that_come_with_gradients_however_the_batch_is_cut() {
    let jobs: Vec<Owned> = (0..5).map(|n| Owned::new(30 + n, 1 + 2 * n as usize, 6, PAPER)).collect();
    let batches: Vec<JobBatch<'_>> = jobs.iter().map(Owned::batch).collect();
    let whole = engine(100_000, Recompute::Off);
    let expected: Vec<u64> =
        whole.gradients(&batches).unwrap().into_iter().map(|job| job.unwrap().loss.to_bits()).collect();
    // Neither dropout nor z-loss is in a loss alone.
    let mut others = batches.clone();
    others[1].objective = RELEASED;
    for tokens in [1, 50, 100_000] {
        let losses = engine(tokens, Recompute::Auto).losses(&others).unwrap().into_iter();
        let losses: Vec<u64> = losses.map(|loss| loss.unwrap().to_bits()).collect();
        assert_eq!(losses, expected, "{tokens} tokens");
    }
}

#[test]
fn a_fault_in_one_of_many_losses_leaves_the_others() {
    let engine = engine(100_000, Recompute::Auto);
    let mut jobs: Vec<Owned> = (0..4).map(|n| Owned::new(40 + n, 3, 4, PAPER)).collect();
    jobs[1].examples[3].input[0] = id("poison");
    jobs[2].examples[0].input[0] = 999;
    let batches: Vec<JobBatch<'_>> = jobs.iter().map(Owned::batch).collect();
    let results = engine.losses(&batches).unwrap();
    assert!(matches!(results[1], Err(JobFault::Loss { example: 3, rank: 0, .. })), "{:?}", results[1]);
    assert!(
        matches!(&results[2], Err(JobFault::Refused(why)) if why.what.contains("999") && !why.out_of_memory),
        "{:?}",
        results[2]
    );
    for n in [0, 3] {
        assert_eq!(*results[n].as_ref().unwrap(), alone(&engine, &jobs[n]).unwrap().loss, "job {n}");
    }
}

#[test]
fn the_mean_is_over_the_target_tokens_of_the_batch() {
    let engine = engine(100_000, Recompute::Auto);
    let mean = Owned::new(6, 4, 5, PAPER);
    let sum = Owned {
        objective: Objective { reduction: LossReduction::Sum, ..PAPER },
        ..Owned::new(6, 4, 5, PAPER)
    };
    let (mean, sum) = (alone(&engine, &mean).unwrap(), alone(&engine, &sum).unwrap());
    assert_eq!(mean.loss, sum.loss);
    for (m, s) in mean.gradient.iter().zip(&sum.gradient) {
        let (m, s) = (f64::from(*m) * mean.num_targets as f64, f64::from(*s));
        assert!((m - s).abs() <= 1e-4 * s.abs() + 1e-5, "{m} {s}");
    }
}

/// Examples that no two jobs share.
fn data(seed: u64) -> Arc<TokenizedSet> {
    let examples = Owned::new(seed, 1, 30, PAPER).examples;
    let text = |index| TextExample { inputs: String::new(), targets: String::new(), index, line: index + 1 };
    let texts = (0..examples.len()).map(text).collect();
    Arc::new(TokenizedSet { examples, texts, ..TokenizedSet::default() })
}

fn job(n: u64) -> Job {
    let spec = JobSpec {
        optimizer: if n == 1 { OptimizerKind::adamw(0.01) } else { OptimizerKind::adafactor(1e-5, 0) },
        lr: 0.1 + n as f32,
        schedule: Schedule::Constant,
        warmup_steps: n,
        num_steps: 9,
        batch_size: 3 + n as usize,
        shuffle: true,
        seed: n,
        objective: if n == 2 { RELEASED } else { PAPER },
        shared_length: 0,
    };
    let (rows, cols) = (2 + n as usize, config().d_model);
    let mut random = Philox::new(n, &[1]);
    let prompt = Prompt::new(rows, cols, (0..rows * cols).map(|_| random.normal()).collect()).unwrap();
    Job::new(spec, data(n), prompt).unwrap()
}

#[test]
fn jobs_trained_together_get_the_prompts_that_they_get_alone() {
    let engine = engine(100, Recompute::Auto);
    let mut together: Vec<Job> = (0..4).map(job).collect();
    for _ in 0..12 {
        let batches: Vec<JobBatch<'_>> = together.iter().map(Job::batch).collect();
        let gradients = engine.gradients(&batches).unwrap();
        for (job, gradient) in together.iter_mut().zip(gradients) {
            job.update(gradient).unwrap();
        }
    }
    for (n, job) in together.iter().enumerate() {
        let mut alone = self::job(n as u64);
        let start = alone.prompt().clone();
        for step in 1..=12 {
            assert_eq!(alone.step(&engine).unwrap().step, step);
        }
        assert_ne!(*alone.prompt(), start);
        assert_eq!(alone.prompt(), job.prompt(), "job {n}");
        assert_eq!(alone.cursor(), job.cursor());
    }
}

#[test]
fn a_job_is_restored_from_its_prompt_its_optimizer_and_its_number_of_steps() {
    let engine = engine(100, Recompute::Auto);
    for n in 0..4 {
        let mut whole = job(n);
        for _ in 0..7 {
            whole.step(&engine).unwrap();
        }
        let (prompt, state) = (whole.prompt().clone(), whole.optimizer_state());
        let mut restored = Job::restore(whole.spec().clone(), data(n), prompt, 7, &state).unwrap();
        for _ in 0..9 {
            assert_eq!(restored.step(&engine).unwrap(), whole.step(&engine).unwrap());
        }
        assert_eq!(restored.prompt(), whole.prompt(), "job {n}");
    }
}
