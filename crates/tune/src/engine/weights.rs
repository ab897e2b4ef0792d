//! Gradients to weights: of one job, whose backbone nobody shares.
//!
//! Unlike a prompt's, they are summed in f32 as the batch goes through, microbatch by microbatch and then over the replicas by rank: the
//! same ranks and microbatches give the same bits.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use incipit_collective::{Coordinates, Reduce};
use incipit_model::{Microbatch, WeightGradients};

use super::{Engine, JobBatch, JobFault, Refusal, assemble, cost, num_targets, scale, sum::untouched};
use crate::{Error, Result, microbatch, pace::Work, ranks};

/// Numbers that replicas sum at once, unless one weight has more.
const BUCKET: usize = 1 << 22;

/// In the place of a loss: another replica has the example. Everything else is larger.
const ABSENT: i64 = i64::MIN;
/// In the place of a loss: the example could not go through the model.
const REFUSED: i64 = i64::MAX;

/// What a step gives a job that trains weights.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightGradient {
    /// Mean cross-entropy over the batch's target tokens, in nats, whatever the objective.
    pub loss: f64,
    /// All tokens of the batch: inputs, prompt rows and targets.
    pub num_tokens: usize,
    /// Gradient of the objective to each weight, whole and row-major, by its name.
    pub gradients: BTreeMap<String, Vec<f32>>,
}

impl Engine {
    /// The loss and the gradients to the weights `wanted` (name and number of numbers) of a batch, whose prompt may have no rows.
    ///
    /// # Errors
    /// If the device or an exchange with other ranks fails. A batch with a number that is not finite, or one that the model refuses, gets a fault.
    pub fn weight_gradients(
        &self,
        job: &JobBatch<'_>,
        wanted: &[(&str, usize)],
    ) -> Result<Result<WeightGradient, JobFault>> {
        let replicas = self.replicas(std::slice::from_ref(job));
        let mut gradients = WeightGradients::of(wanted.iter().map(|(name, _)| *name));
        let (told, refusal) = self.weight_passes(job, &replicas, &mut gradients)?;
        let num_tokens = job.num_tokens();
        let sums = self.begin(Work::SumsOfWeights, num_tokens);
        let loss = match self.mean_loss(job, told, refusal.as_ref(), &replicas)? {
            Ok(loss) => loss,
            Err(fault) => return Ok(Err(fault)),
        };
        let mut gathered = self.model.gathered(gradients)?;
        let own = wanted.iter().map(|(name, len)| match gathered.remove(*name) {
            Some(sum) => Ok(sum.flatten_all()?),
            None => Ok(Tensor::zeros(*len, DType::F32, self.model.device())?),
        });
        let summed = self.over_replicas(&own.collect::<Result<Vec<_>>>()?)?;
        self.confirm()?;
        sums.succeeds(1.0);
        let gradients: BTreeMap<_, _> =
            wanted.iter().map(|(name, _)| (*name).to_owned()).zip(summed).collect();
        if let Some((name, _)) = gradients.iter().find(|(_, values)| !values.iter().all(|g| g.is_finite())) {
            return Ok(Err(Refusal::from(format!("the gradient to {name} is not finite")).into()));
        }
        Ok(Ok(WeightGradient { loss, num_tokens, gradients }))
    }

    /// Sends this replica's examples through the model. Gives what it tells of each example of the batch, and why one could not go
    /// through.
    fn weight_passes(
        &self,
        job: &JobBatch<'_>,
        replicas: &[usize],
        gradients: &mut WeightGradients,
    ) -> Result<(Vec<i64>, Option<Refusal>)> {
        let jobs = std::slice::from_ref(job);
        let mut told = vec![ABSENT; job.examples.len()];
        let mut refusal = None;
        for (options, rows) in self.passes(jobs, replicas) {
            let costs: Vec<usize> = rows.iter().map(|row| cost(job, row.example)).collect();
            for run in microbatch::cut(&costs, self.limits.budget) {
                let rows = &rows[run];
                let (prompts, examples) = assemble(jobs, rows);
                let batch = Microbatch { prompts: &prompts, examples: &examples };
                let scales = vec![scale(job); rows.len()];
                let num_tokens = rows.iter().map(|row| cost(job, row.example)).sum();
                let under = self.begin(Work::WeightGradients, num_tokens);
                let losses = self.model.loss_and_weight_gradients(&batch, &scales, &options, gradients);
                match losses.inspect(|_| under.succeeds(1.0)) {
                    Ok(losses) => {
                        let losses = losses.iter().map(|loss| i64::from(loss.to_bits()));
                        rows.iter().zip(losses).for_each(|(row, loss)| told[row.example] = loss);
                    }
                    Err(error) => {
                        refusal = Some(self.refusal(error, jobs, rows)?);
                        rows.iter().for_each(|row| told[row.example] = REFUSED);
                    }
                }
            }
        }
        Ok((told, refusal))
    }

    /// The batch's mean loss, or what is wrong with it: the same on every rank.
    fn mean_loss(
        &self,
        job: &JobBatch<'_>,
        told: Vec<i64>,
        refusal: Option<&Refusal>,
        replicas: &[usize],
    ) -> Result<Result<f64, JobFault>> {
        let known = ranks::reduced(&**self.ranks.data(), told, Reduce::Max)?;
        if known.contains(&REFUSED) {
            return Ok(Err(Refusal::agreed(&self.ranks, refusal)?.into()));
        }
        if let Some(example) = known.iter().position(|loss| *loss == ABSENT) {
            return Ok(Err(untouched(example)));
        }
        let losses: Vec<f32> = known.iter().map(|bits| f32::from_bits(*bits as u32)).collect();
        if let Some(example) = losses.iter().position(|loss| !loss.is_finite()) {
            let place = Coordinates { data: replicas[example], tensor: 0 };
            let rank = self.ranks.mesh().rank(place);
            return Ok(Err(JobFault::Loss { example, loss: losses[example], rank }));
        }
        let sum: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
        Ok(Ok(sum / num_targets(job) as f64))
    }

    /// The sums over all replicas, some weights at a time.
    fn over_replicas(&self, own: &[Tensor]) -> Result<Vec<Vec<f32>>> {
        let to_host = |sum: &Tensor| sum.to_vec1().map_err(Error::from);
        if self.ranks.data().size() == 1 {
            return own.iter().map(to_host).collect();
        }
        let lengths: Vec<usize> = own.iter().map(Tensor::elem_count).collect();
        let mut summed = Vec::with_capacity(own.len());
        for run in microbatch::cut(&lengths, BUCKET) {
            let bucket = self.ranks.data().all_reduce(&Tensor::cat(&own[run.clone()], 0)?, Reduce::Sum)?;
            let bucket: Vec<f32> = to_host(&bucket)?;
            let mut rest = &bucket[..];
            for len in &lengths[run] {
                let (one, later) = rest.split_at(*len);
                summed.push(one.to_vec());
                rest = later;
            }
        }
        Ok(summed)
    }
}
