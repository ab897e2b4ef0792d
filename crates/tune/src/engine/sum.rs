//! From examples' gradients to jobs' gradients, over all replicas: two exchanges a step, however many jobs there are.
//!
//! First everybody learns of each example its loss, and the exponent of its gradient or what is wrong with it: so all agree on
//! each job's fault, or on the unit of its sum. Then the integer sums of all jobs travel together. No result depends on which
//! replica had which example.

use incipit_collective::{Coordinates, Ranks, Reduce, gather_bytes};

use super::{Gathered, JobBatch, JobFault, JobGradient, cost, num_targets};
use crate::{Result, ranks, reduce};

/// In the place of a loss or an exponent: another replica has the example. Everything else is larger.
const ABSENT: i64 = i64::MIN;
/// In the place of an exponent: the gradient is not finite.
const NOT_FINITE: i64 = 1 << 32;
/// In the place of an exponent: the example could not go through the backbone.
const REFUSED: i64 = 1 << 33;

/// What everybody knows of an example.
#[derive(Clone, Copy)]
struct Known {
    loss: f32,
    exponent: i64,
    replica: usize,
}

/// What a job's examples gave on this rank, as numbers.
struct Terms {
    /// By example; none where another replica has it.
    gradients: Vec<Option<Vec<f32>>>,
    refusal: Option<String>,
}

pub(super) fn over_replicas(
    ranks: &Ranks,
    jobs: &[JobBatch<'_>],
    gathered: Vec<Result<Gathered, String>>,
    replicas: &[usize],
) -> Result<Vec<Result<JobGradient, JobFault>>> {
    let mine: Vec<bool> = replicas.iter().map(|replica| *replica == ranks.coordinates().data).collect();
    let (mut own, mut first) = (Vec::new(), 0);
    let mut terms = Vec::with_capacity(jobs.len());
    for (job, gathered) in jobs.iter().zip(gathered) {
        terms.push(read(&mine[first..], job, gathered, &mut own)?);
        first += job.examples.len();
    }
    let known = exchanged(ranks, replicas, own)?;
    let mut rest = &known[..];
    let mut outcomes = Vec::with_capacity(jobs.len());
    let mut sums = Vec::new();
    for (job, terms) in jobs.iter().zip(&terms) {
        let (examples, later) = rest.split_at(job.examples.len());
        rest = later;
        let outcome = judged(ranks, examples, terms)?;
        if let Ok(exponent) = outcome {
            let first = sums.len();
            sums.resize(first + job.prompt.elem_count(), 0);
            for gradient in terms.gradients.iter().flatten() {
                reduce::quantize(gradient, exponent, &mut sums[first..])?;
            }
        }
        outcomes.push(outcome.map(|exponent| (exponent, examples)));
    }
    let sums = ranks::reduced(&**ranks.data(), sums, Reduce::Sum)?;
    let mut rest = &sums[..];
    let mut finish = |(job, outcome): (&JobBatch<'_>, Result<(i32, &[Known]), JobFault>)| {
        let (exponent, examples) = outcome?;
        let (sum, later) = rest.split_at(job.prompt.elem_count());
        rest = later;
        finished(job, examples, &reduce::dequantize(sum, exponent))
    };
    Ok(jobs.iter().zip(outcomes).map(&mut finish).collect())
}

/// The numbers of a job's examples that are here; what others should know of them is added to `own`.
fn read(
    mine: &[bool],
    job: &JobBatch<'_>,
    gathered: Result<Gathered, String>,
    own: &mut Vec<i64>,
) -> Result<Terms> {
    let (gathered, refusal) = match gathered {
        Ok(gathered) => (gathered, None),
        Err(refusal) => (vec![None; job.examples.len()], Some(refusal)),
    };
    let mut gradients = Vec::with_capacity(gathered.len());
    for (example, gradient) in gathered.into_iter().enumerate() {
        let Some(gradient) = gradient else {
            let exponent = if mine[example] { REFUSED } else { ABSENT };
            own.extend([ABSENT, exponent]);
            gradients.push(None);
            continue;
        };
        let values: Vec<f32> = gradient.prompt_gradient.flatten_all()?.to_vec1()?;
        let exponent = reduce::max_exponent(&values).map_or(NOT_FINITE, i64::from);
        own.extend([i64::from(gradient.loss.to_bits()), exponent]);
        gradients.push(Some(values));
    }
    Ok(Terms { gradients, refusal })
}

/// What all replicas know, in the order of the jobs' examples.
fn exchanged(ranks: &Ranks, replicas: &[usize], own: Vec<i64>) -> Result<Vec<Known>> {
    let known = ranks::reduced(&**ranks.data(), own, Reduce::Max)?;
    let of = |([loss, exponent], replica): (&[i64; 2], &usize)| Known {
        loss: f32::from_bits(*loss as u32),
        exponent: *exponent,
        replica: *replica,
    };
    Ok(known.as_chunks().0.iter().zip(replicas).map(of).collect())
}

/// The exponent of the job's sum, or its first fault: the same on every rank.
fn judged(ranks: &Ranks, examples: &[Known], terms: &Terms) -> Result<Result<i32, JobFault>> {
    if examples.iter().any(|known| known.exponent == REFUSED) {
        let words = terms.refusal.clone().unwrap_or_default();
        let all = gather_bytes(&**ranks.data(), words.as_bytes())?;
        let words = all.into_iter().find(|words| !words.is_empty()).unwrap_or_default();
        let what = String::from_utf8_lossy(&words).into_owned();
        return Ok(Err(JobFault::Refused { what }));
    }
    if let Some(example) = examples.iter().position(|known| known.exponent == ABSENT) {
        let what = format!(
            "no replica went through example {example} of the batch: the ranks were told different things"
        );
        return Ok(Err(JobFault::Refused { what }));
    }
    let mut exponent = reduce::ZERO_EXPONENT;
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

fn finished(job: &JobBatch<'_>, examples: &[Known], gradient: &[f32]) -> Result<JobGradient, JobFault> {
    if !gradient.iter().all(|g| g.is_finite()) {
        let what = "the sum of the batch's gradients is beyond f32".to_owned();
        return Err(JobFault::Refused { what });
    }
    let num_targets = num_targets(job);
    // In the order of the batch, so that the rounding is that of one rank.
    let loss: f64 = examples.iter().map(|known| f64::from(known.loss)).sum();
    let num_tokens = (0..job.examples.len()).map(|example| cost(job, example)).sum();
    Ok(JobGradient { loss: loss / num_targets as f64, num_targets, num_tokens, gradient: gradient.to_vec() })
}
