//! From examples' gradients to jobs' gradients, over all replicas: two exchanges a step, however many jobs there are.
//!
//! First everybody learns of each example its loss, and the exponent of its gradient or what is wrong with it: so all agree on
//! each job's fault, or on the unit of its sum. Then the integer sums of all jobs travel together. No result depends on which
//! replica had which example.

use candle_core::{Device, Tensor};
use incipit_collective::{Coordinates, Ranks, Reduce};
use incipit_kernels::sums::{Sums, ZERO_EXPONENT, dequantized, max_exponents};
use incipit_model::ExampleGradient;

use super::{Gathered, JobBatch, JobFault, JobGradient, Refusal, num_targets};
use crate::{Result, ranks};

/// In the place of a loss or an exponent: another replica has the example. Everything else is larger.
const ABSENT: i64 = i64::MIN;
/// In the place of an exponent: the gradient is not finite.
const NOT_FINITE: i64 = 1 << 32;
/// In the place of an exponent: the example could not go through the backbone.
const REFUSED: i64 = 1 << 33;

/// What everybody knows of an example.
#[derive(Clone, Copy)]
pub(super) struct Known {
    loss: f32,
    exponent: i64,
    replica: usize,
}

/// What a job's examples gave on this rank.
pub(super) struct Terms<T> {
    /// By example; none where another replica has it.
    given: Vec<Option<T>>,
    refusal: Option<Refusal>,
}

impl<T> Terms<T> {
    pub(super) fn of(jobs: &[JobBatch<'_>], gathered: Vec<Gathered<T>>) -> Vec<Self> {
        let of_job = |(job, gathered): (&JobBatch<'_>, Gathered<T>)| match gathered {
            Ok(given) => Self { given, refusal: None },
            Err(refusal) => {
                Self { given: job.examples.iter().map(|_| None).collect(), refusal: Some(refusal) }
            }
        };
        jobs.iter().zip(gathered).map(of_job).collect()
    }
}

pub(super) fn over_replicas(
    ranks: &Ranks,
    device: &Device,
    jobs: &[JobBatch<'_>],
    gathered: Vec<Gathered<ExampleGradient>>,
    replicas: &[usize],
) -> Result<Vec<Result<JobGradient, JobFault>>> {
    let terms = Terms::of(jobs, gathered);
    let gradients: Vec<&Tensor> = terms
        .iter()
        .flat_map(|terms| terms.given.iter().flatten())
        .map(|given| &given.prompt_gradient)
        .collect();
    let mut exponents = max_exponents(&gradients)?.into_iter();
    let known = exchanged(ranks, &terms, replicas, |given| {
        [i64::from(given.loss.to_bits()), exponents.next().flatten().map_or(NOT_FINITE, i64::from)]
    })?;
    let mut outcomes = Vec::with_capacity(jobs.len());
    let mut len = 0;
    for (job, (terms, examples)) in jobs.iter().zip(terms.iter().zip(&known)) {
        let outcome = judged(ranks, examples, terms)?;
        let first = len;
        if outcome.is_ok() {
            len += job.prompt.rows.elem_count();
        }
        outcomes.push(outcome.map(|exponent| Outcome { exponent, first, examples }));
    }
    let sums = summed(ranks, device, &terms, &outcomes, len)?;
    let mut gradients = Vec::with_capacity(jobs.len());
    for (job, outcome) in jobs.iter().zip(outcomes) {
        gradients.push(match outcome {
            Err(fault) => Err(fault),
            Ok(Outcome { exponent, first, examples }) => {
                let range = first..first + job.prompt.rows.elem_count();
                finished(job, examples, dequantized(&sums, range, exponent)?)
            }
        });
    }
    Ok(gradients)
}

/// What becomes of a job that has a gradient.
struct Outcome<'a> {
    /// Of its sum.
    exponent: i32,
    /// Its first number among those of all jobs.
    first: usize,
    examples: &'a [Known],
}

/// The sums of all jobs that have one, over all replicas.
fn summed(
    ranks: &Ranks,
    device: &Device,
    terms: &[Terms<ExampleGradient>],
    outcomes: &[Result<Outcome<'_>, JobFault>],
    len: usize,
) -> Result<Tensor> {
    // Where all jobs are at fault, one number that is nobody's: CUDA need not give out no memory.
    let mut sums = Sums::zeros(len.max(1), device)?;
    for (terms, outcome) in terms.iter().zip(outcomes) {
        let Ok(Outcome { exponent, first, .. }) = outcome else { continue };
        for given in terms.given.iter().flatten() {
            sums.add(*first, &given.prompt_gradient, *exponent)?;
        }
    }
    let sums = sums.into_tensor()?;
    if ranks.data().size() == 1 || len == 0 {
        return Ok(sums);
    }
    Ok(ranks.data().all_reduce(&sums, Reduce::Sum)?)
}

/// What all replicas know of each job's examples. `told` says of what an example gave here two numbers that others should know: the
/// bits of its loss, and the exponent of its gradient.
pub(super) fn exchanged<T>(
    ranks: &Ranks,
    terms: &[Terms<T>],
    replicas: &[usize],
    mut told: impl FnMut(&T) -> [i64; 2],
) -> Result<Vec<Vec<Known>>> {
    let mut own = Vec::with_capacity(2 * replicas.len());
    for (given, replica) in terms.iter().flat_map(|terms| &terms.given).zip(replicas) {
        own.extend(match given {
            Some(given) => told(given),
            None if *replica == ranks.coordinates().data => [ABSENT, REFUSED],
            None => [ABSENT, ABSENT],
        });
    }
    let known = ranks::reduced(&**ranks.data(), own, Reduce::Max)?;
    let of = |([loss, exponent], replica): (&[i64; 2], &usize)| Known {
        loss: f32::from_bits(*loss as u32),
        exponent: *exponent,
        replica: *replica,
    };
    let mut known = known.as_chunks().0.iter().zip(replicas).map(of);
    Ok(terms.iter().map(|terms| known.by_ref().take(terms.given.len()).collect()).collect())
}

/// The exponent of the job's sum, or its first fault: the same on every rank.
pub(super) fn judged<T>(
    ranks: &Ranks,
    examples: &[Known],
    terms: &Terms<T>,
) -> Result<Result<i32, JobFault>> {
    if examples.iter().any(|known| known.exponent == REFUSED) {
        return Ok(Err(Refusal::agreed(ranks, terms.refusal.as_ref())?.into()));
    }
    if let Some(example) = examples.iter().position(|known| known.exponent == ABSENT) {
        return Ok(Err(untouched(example)));
    }
    let mut exponent = ZERO_EXPONENT;
    for (example, known) in examples.iter().enumerate() {
        let rank = || ranks.mesh().rank(Coordinates { data: known.replica, tensor: 0 });
        if !known.loss.is_finite() {
            return Ok(Err(JobFault::Loss { example, loss: known.loss, rank: rank() }));
        }
        if known.exponent == NOT_FINITE {
            return Ok(Err(JobFault::Gradient { example, rank: rank() }));
        }
        exponent = exponent.max(known.exponent as i32);
    }
    Ok(Ok(exponent))
}

/// Nobody has told anything of an example.
pub(super) fn untouched(example: usize) -> JobFault {
    let what = format!(
        "no replica went through example {example} of the batch: the ranks were told different things"
    );
    Refusal::from(what).into()
}

fn finished(job: &JobBatch<'_>, examples: &[Known], gradient: Vec<f32>) -> Result<JobGradient, JobFault> {
    if !gradient.iter().all(|g| g.is_finite()) {
        let what = "the sum of the batch's gradients is beyond f32".to_owned();
        return Err(Refusal::from(what).into());
    }
    let (num_targets, num_tokens) = (num_targets(job), job.num_tokens());
    Ok(JobGradient { loss: mean_loss(job, examples), num_targets, num_tokens, gradient })
}

/// Over the target tokens of the batch.
pub(super) fn mean_loss(job: &JobBatch<'_>, examples: &[Known]) -> f64 {
    // In the order of the batch, so that the rounding is that of one rank.
    let loss: f64 = examples.iter().map(|known| f64::from(known.loss)).sum();
    loss / num_targets(job) as f64
}
