//! Losses without gradients, for choosing between prompts.

use incipit_kernels::sums::ZERO_EXPONENT;

use super::{Engine, JobBatch, JobFault, nothing, sum};
use crate::{Result, pace::Work};

impl Engine {
    /// Each job's mean cross-entropy over its target tokens, in nats, by a forward pass alone: that of [`Self::gradients`] where the
    /// objective has neither dropout nor z-loss, and what it would be without them where it has. The microbatches and the replicas
    /// change no bit.
    ///
    /// # Errors
    /// If the device or an exchange with other ranks fails; then no job has a loss.
    pub fn losses(&self, jobs: &[JobBatch<'_>]) -> Result<Vec<Result<f64, JobFault>>> {
        let replicas = self.replicas(jobs);
        let mut gathered = nothing(jobs);
        let rows = self.own_rows(jobs, &replicas);
        self.gather(jobs, &rows, (Work::Losses, &|batch, _| self.model.loss(batch)), &mut gathered)?;
        let sums = self.begin(Work::Sums, jobs.iter().map(JobBatch::num_tokens).sum());
        let terms = sum::Terms::of(jobs, gathered);
        let told = |loss: &f32| [i64::from(loss.to_bits()), i64::from(ZERO_EXPONENT)];
        let known = sum::exchanged(&self.ranks, &terms, &replicas, told)?;
        let mut losses = Vec::with_capacity(jobs.len());
        for (job, (terms, examples)) in jobs.iter().zip(terms.iter().zip(&known)) {
            let judged = sum::judged(&self.ranks, examples, terms)?;
            losses.push(judged.map(|_| sum::mean_loss(job, examples)));
        }
        self.confirm()?;
        sums.succeeds(1.0);
        Ok(losses)
    }
}
