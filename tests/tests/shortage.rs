//! One of two ranks that share a model has not the GPU memory for a microbatch: their group ends with words of memory on both, the next ones go
//! through less at once, to the same bits, and a job that has no room even alone ends by itself.
#![cfg(feature = "emulator")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use incipit_collective::{Axis, Mesh, Options, Ranks, local};
use incipit_data::TokenizedExample;
use incipit_model::SoftPrompt;
use incipit_tune::Error;
use incipit_tune::backbone::{Opened, Part};
use incipit_tune::engine::{EngineOptions, JobBatch, JobFault, JobGradient, Objective, Recompute};
use incipit_tune::ranks::on_threads;
use incipit_tune::recipe::LossReduction;
use incipit_tune::spec::Precision;

use common::demo;

const OPTIONS: EngineOptions = EngineOptions { microbatch_tokens: Some(4000), recompute: Recompute::Off };
/// Groups that are formed at most.
const GROUPS: u64 = 5;
/// Bytes that the second rank's GPU has for a tensor: 375 rows of the stream, in f32, and 300 of what a feed-forward layer multiplies, in bf16.
const ROOM: usize = 300 * 320 * 2;

/// What a rank came to in one group after the other, until its step was made.
#[derive(Default)]
struct Course {
    budgets: Vec<usize>,
    errors: Vec<Error>,
    gradients: Vec<Result<JobGradient, JobFault>>,
}

/// Forms groups until a step of these jobs is made. The second rank has room for tensors of so many bytes.
fn courses(jobs: &[JobBatch<'_>], room: usize) -> Result<[Course; 2]> {
    let mesh = Mesh::new(2, 1, 2)?;
    let group = |epoch| local::ranks(mesh, &Options { epoch, ..Options::default() }).into_iter().map(Some);
    let groups: Vec<Mutex<Vec<Option<Ranks>>>> =
        (0..GROUPS).map(|epoch| Mutex::new(group(epoch).collect())).collect();
    let courses = on_threads(mesh, None, &Options::default(), |place| {
        incipit_kernels::on_emulated_gpu(0, || {
            let model = Opened::at(Path::new(&demo("model")), "demo", Precision::Bf16, Device::Cpu)?;
            let part = model.part(place.shard(Axis::Tensor))?;
            if place.rank() == 1 {
                incipit_kernels::limit_emulated_gpu(room);
            }
            let own = |group: &Mutex<Vec<Option<Ranks>>>| {
                group.lock().unwrap_or_else(PoisonError::into_inner)[place.rank()].take()
            };
            course(part, jobs, groups.iter().filter_map(own))
        })
    });
    let courses: Vec<Course> = courses.into_iter().collect::<Result<_>>()?;
    courses.try_into().ok().context("two ranks")
}

fn course(mut part: Part, jobs: &[JobBatch<'_>], groups: impl Iterator<Item = Ranks>) -> Result<Course> {
    let mut course = Course::default();
    for ranks in groups {
        let ranks = Arc::new(ranks);
        let backbone = part.meet(OPTIONS, &ranks)?;
        course.budgets.push(backbone.engine.microbatch_tokens());
        match backbone.engine.gradients(jobs) {
            Ok(gradients) => return Ok(Course { gradients, ..course }),
            Err(error) => {
                ranks.abort(&error.to_string());
                course.errors.push(error);
            }
        }
    }
    bail!("no step after {:?}", course.errors)
}

fn examples(count: usize, num_tokens: usize) -> Vec<TokenizedExample> {
    let tokens = |i: usize| (0..num_tokens).map(|t| ((31 * i + 7 * t) % 900 + 3) as u32).collect();
    (0..count).map(|i| TokenizedExample { input: tokens(i), target: vec![7, 1] }).collect()
}

fn job<'a>(prompt: &'a SoftPrompt, examples: &'a [TokenizedExample]) -> JobBatch<'a> {
    let keys = (0..examples.len() as u64).collect();
    let objective = Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 };
    JobBatch { prompt, examples: examples.iter().collect(), keys, objective }
}

fn prompt() -> Result<SoftPrompt> {
    let values: Vec<f32> = (0..4 * 128).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect();
    Ok(Tensor::from_vec(values, (4, 128), &Device::Cpu)?.into())
}

/// Both ranks say that the second one has run out of memory, how much was asked for, and what helps.
fn told(courses: &[Course; 2]) -> Result<()> {
    for (rank, course) in courses.iter().enumerate() {
        for error in &course.errors {
            let message = error.to_string();
            println!("rank {rank}: {message}");
            for part in ["rank 1 has run out of GPU memory", "were asked for", "--microbatch-tokens", "--tp"]
            {
                ensure!(message.contains(part), "rank {rank}, no {part:?} in {message:?}");
            }
            ensure!(error.is_of_group(), "rank {rank}: a job is blamed for {message:?}");
            ensure!(error.is_echo() == (rank == 0), "rank {rank}: {message}");
        }
    }
    Ok(())
}

#[test]
fn a_rank_without_room_ends_its_group_and_the_next_ones_go_through_less_to_the_same_bits() -> Result<()> {
    let (prompt, examples) = (prompt()?, examples(12, 30));
    let jobs = [job(&prompt, &examples)];
    let [undisturbed, _] = courses(&jobs, usize::MAX)?;
    ensure!(undisturbed.errors.is_empty() && undisturbed.gradients[0].is_ok());
    // 432 tokens have no room; nor have they where layers are computed again; half of them have.
    let disturbed = courses(&jobs, ROOM)?;
    told(&disturbed)?;
    for course in &disturbed {
        ensure!(course.budgets == [4000, 4000, 256], "{:?}", course.budgets);
        ensure!(course.gradients == undisturbed.gradients, "other bits");
    }
    Ok(())
}

#[test]
fn a_job_without_room_even_alone_ends_on_all_ranks_and_its_neighbour_keeps_every_bit() -> Result<()> {
    let (prompt, small, large) = (prompt()?, examples(4, 30), examples(1, 400));
    let [alone, _] = courses(&[job(&prompt, &small)], usize::MAX)?;
    let beside = courses(&[job(&prompt, &small), job(&prompt, &large)], ROOM)?;
    told(&beside)?;
    for course in &beside {
        ensure!(course.errors.len() == 3, "{:?}", course.errors);
        ensure!(course.gradients[0] == alone.gradients[0] && alone.gradients[0].is_ok(), "other bits");
        let Err(JobFault::Refused(why)) = &course.gradients[1] else { bail!("{:?}", course.gradients[1]) };
        ensure!(why.out_of_memory && why.what.contains("406 tokens"), "{why:?}");
        ensure!(why.what.contains("--max-input-length") && why.what.contains("--tp"), "{why:?}");
    }
    Ok(())
}
