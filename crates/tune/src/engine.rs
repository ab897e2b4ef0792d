//! The step engine: batches of many jobs, each with a prompt of its own, through one frozen backbone.
//!
//! Examples of all jobs lie side by side in microbatches. What an example gives depends on itself and its prompt alone, and
//! a job's sum over its examples does not depend on their order, so that a job's gradient is the same bits whatever the
//! microbatches, the neighbours and the threads.

use std::{collections::BTreeMap, sync::Arc};

use incipit_collective::{Axis, Ranks};
use incipit_data::TokenizedExample;
use incipit_model::{Example, ExampleGradient, Microbatch, PassOptions, Placement, SoftPrompt, T5};

use crate::{
    Error, Result,
    choice::choices,
    microbatch::{self, Taste, TokenMemory},
    pace::{Pace, Under, Work},
    ranks,
    recipe::LossReduction,
    weights::Promises,
};

mod losses;
mod refusal;
mod shortage;
mod sum;
mod weights;

pub use refusal::Refusal;
use shortage::Lacked;
pub(crate) use shortage::{Limits, Shortage};
pub use weights::WeightGradient;

choices! {
    /// Whether a layer's inside is computed again in the backward pass instead of kept. Results do not depend on it.
    Recompute, "recompute" {
        /// Kept where the free memory allows.
        Auto => "auto",
        /// Computed again: about half as much time more, far less memory.
        On => "on",
        /// Kept.
        Off => "off",
    }
}

/// How the backbone is run; no result depends on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineOptions {
    /// Tokens (inputs, prompt rows and targets) that go through the backbone at once. Where none are given: what the free
    /// memory holds, up to 2,048 on a CPU and 65,536 on a GPU.
    pub microbatch_tokens: Option<usize>,
    /// Whether a layer's inside is kept.
    pub recompute: Recompute,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { microbatch_tokens: None, recompute: Recompute::Auto }
    }
}

/// What is made smaller.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// How the token losses of a batch become one number.
    pub reduction: LossReduction,
    /// Dropout inside the backbone.
    pub dropout: f32,
    /// Weight of the squared logarithm of the softmax's denominator.
    pub z_loss: f32,
}

/// One job's part of a step.
#[derive(Clone, Debug)]
pub struct JobBatch<'a> {
    /// A job that trains weights has no rows here.
    pub prompt: &'a SoftPrompt,
    /// The examples, in the order of the batch.
    pub examples: Vec<&'a TokenizedExample>,
    /// One an example: names its random numbers.
    pub keys: Vec<u64>,
    /// What is made smaller.
    pub objective: Objective,
}

impl JobBatch<'_> {
    /// All its tokens: inputs, prompt rows and targets.
    pub(crate) fn num_tokens(&self) -> usize {
        (0..self.examples.len()).map(|example| cost(self, example)).sum()
    }
}

/// What a step gives one job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobGradient {
    /// Mean cross-entropy over the batch's target tokens, in nats, whatever the objective.
    pub loss: f64,
    /// Target tokens of the batch.
    pub num_targets: usize,
    /// All tokens of the batch: inputs, prompt rows and targets.
    pub num_tokens: usize,
    /// Gradient of the objective to the prompt's rows, row-major.
    pub gradient: Vec<f32>,
}

/// Why a job got no gradient. Its neighbours did.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum JobFault {
    /// An example's loss is infinite or not a number.
    #[error("the loss of example {example} of the batch is {loss}")]
    Loss {
        /// Place in the batch.
        example: usize,
        /// The loss.
        loss: f32,
        /// The rank that met it; of a replica the first.
        rank: usize,
    },
    /// An example's gradient has an infinite element, or one that is not a number.
    #[error("the gradient of example {example} of the batch is not finite")]
    Gradient {
        /// Place in the batch.
        example: usize,
        /// The rank that met it; of a replica the first.
        rank: usize,
    },
    /// The batch cannot go through the backbone.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A frozen backbone, ready for batches of many jobs. Where several ranks have one together, they make every call together,
/// with the same arguments, and get the same results.
pub struct Engine {
    model: Arc<T5>,
    ranks: Arc<Ranks>,
    limits: Limits,
    shortage: Shortage,
    /// Memory that jobs on this backbone were promised; models with trained weights share it.
    pub(crate) promises: Promises,
    pace: Arc<Pace>,
}

/// An example of a step, and where it comes from.
#[derive(Clone, Copy)]
struct Row {
    job: usize,
    example: usize,
}

/// What the examples of a job gave that are this rank's, in the order of its batch; or why the model refused the job.
type Gathered<T> = Result<Vec<Option<T>>, Refusal>;

/// A microbatch through the backbone: something for each of the rows that it consists of.
type Through<'a, T> = &'a dyn Fn(&Microbatch<'_>, &[Row]) -> incipit_model::Result<Vec<T>>;

impl Engine {
    /// An engine over `model`, which lies in main memory, on one rank.
    #[must_use]
    pub fn new(model: Arc<T5>, options: EngineOptions) -> Self {
        let limits = Self::plan(&model, 1, options, microbatch::free_memory());
        let (shortage, promises, pace) = Default::default();
        Self { model, ranks: Arc::new(Ranks::alone()), limits, shortage, promises, pace }
    }

    /// An engine over `model`, which is this rank's part of it. Examples are dealt out to the replicas.
    ///
    /// # Errors
    /// If the ranks cannot agree on the size of a microbatch, or the device does not tell of its memory.
    pub fn on(model: Arc<T5>, options: EngineOptions, ranks: Arc<Ranks>) -> Result<Self> {
        Self::within(model, options, None, ranks)
    }

    /// As [`Self::on`], where this rank knows of an earlier group what it can take.
    pub(crate) fn within(
        model: Arc<T5>,
        options: EngineOptions,
        known: Option<Limits>,
        ranks: Arc<Ranks>,
    ) -> Result<Self> {
        // Ranks of one machine share its memory, and each has a GPU's for itself.
        let sharing = ranks::on_this_machine(&ranks)?;
        let free = match incipit_kernels::device_memory(model.device())? {
            Some(memory) => Some(memory.free),
            None => microbatch::free_memory().map(|bytes| bytes / sharing.max(1) as u64),
        };
        let planned = known.unwrap_or_else(|| Self::plan(&model, ranks.mesh().tp(), options, free));
        let limits = planned.agreed(&ranks)?;
        let (shortage, promises, pace) = Default::default();
        Ok(Self { model, ranks, limits, shortage, promises, pace })
    }

    /// `shards` ranks have the model together.
    fn plan(model: &T5, shards: usize, options: EngineOptions, free: Option<u64>) -> Limits {
        let memory = TokenMemory::of(model.config(), model.dtype(), shards);
        let recompute = match options.recompute {
            Recompute::Auto => None,
            Recompute::On => Some(true),
            Recompute::Off => Some(false),
        };
        let taste = Taste::of(model.device());
        let (budget, recompute) = microbatch::plan(taste, memory, free, options.microbatch_tokens, recompute);
        tracing::debug!(budget, recompute, free, "planned microbatches");
        Limits::planned(budget, recompute)
    }

    /// The same ranks and microbatches, with another model in the place of the backbone: this one, with some of its weights trained.
    #[must_use]
    pub fn with_model(&self, model: T5) -> Self {
        let (ranks, limits, shortage) = (self.ranks.clone(), self.limits, self.shortage.clone());
        let (promises, pace) = (self.promises.clone(), self.pace.clone());
        Self { model: Arc::new(model), ranks, limits, shortage, promises, pace }
    }

    /// The ranks that have the backbone together.
    #[must_use]
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// The backbone.
    #[must_use]
    pub fn model(&self) -> &T5 {
        &self.model
    }

    /// What goes through the backbone now, and how long that may take.
    #[must_use]
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// Begins what device, disk and other ranks have to get on with.
    pub(crate) fn begin(&self, work: Work, num_tokens: usize) -> Under<'_> {
        self.pace.begin(&self.ranks, work, num_tokens)
    }

    /// Most tokens of a microbatch.
    #[must_use]
    pub fn microbatch_tokens(&self) -> usize {
        self.limits.budget
    }

    /// Each job's loss and gradient. A job with a number that is not finite, or with a batch that the model refuses, gets a
    /// fault, and the others get what they would have got without it.
    ///
    /// # Errors
    /// If the device or an exchange with other ranks fails; then no job has a gradient.
    pub fn gradients(&self, jobs: &[JobBatch<'_>]) -> Result<Vec<Result<JobGradient, JobFault>>> {
        let replicas = self.replicas(jobs);
        let mut gathered = nothing(jobs);
        for (options, rows) in self.passes(jobs, &replicas) {
            let pass: Through<'_, ExampleGradient> = &|batch, rows| {
                let scales: Vec<f32> = rows.iter().map(|row| scale(&jobs[row.job])).collect();
                self.model.loss_and_gradient(batch, &scales, &options)
            };
            // The model would make two passes of one with both kinds of examples.
            let few = |row: &Row| {
                options.dropout == 0.0 && self.model.absorbs(decoder_rows(&jobs[row.job], row.example))
            };
            let (few, many): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(few);
            self.gather(jobs, &few, (Work::Gradients, pass), &mut gathered)?;
            self.gather(jobs, &many, (Work::Gradients, pass), &mut gathered)?;
        }
        let sums = self.begin(Work::Sums, jobs.iter().map(JobBatch::num_tokens).sum());
        let gradients = sum::over_replicas(&self.ranks, self.model.device(), jobs, gathered, &replicas)?;
        self.confirm()?;
        sums.succeeds(1.0);
        Ok(gradients)
    }

    /// Over NCCL what ranks disagreed on in a pass may be found out behind it: nothing counts before every group has met.
    ///
    /// # Errors
    /// If the ranks did not do the same, or one is lost.
    pub fn confirm(&self) -> Result<()> {
        if self.model.device().is_cpu() {
            return Ok(());
        }
        self.ranks.tensor().barrier()?;
        self.ranks.data().barrier()?;
        Ok(())
    }

    /// Which replica has which example, all jobs' in one row.
    fn replicas(&self, jobs: &[JobBatch<'_>]) -> Vec<usize> {
        let costs: Vec<usize> =
            jobs.iter().flat_map(|job| (0..job.examples.len()).map(|example| cost(job, example))).collect();
        microbatch::deal(&costs, self.ranks.mesh().dp())
    }

    /// This replica's examples.
    fn own_rows(&self, jobs: &[JobBatch<'_>], replicas: &[usize]) -> Vec<Row> {
        let own = self.ranks.shard(Axis::Data).index();
        let places = jobs.iter().enumerate();
        let all = places
            .flat_map(|(job, batch)| (0..batch.examples.len()).map(move |example| Row { job, example }));
        all.zip(replicas).filter(|(_, replica)| **replica == own).map(|(row, _)| row).collect()
    }

    /// This replica's examples, those that can share a microbatch together: dropout and z-loss are of a whole pass.
    fn passes(&self, jobs: &[JobBatch<'_>], replicas: &[usize]) -> Vec<(PassOptions, Vec<Row>)> {
        let mut passes: BTreeMap<(u32, u32), Vec<Row>> = BTreeMap::new();
        for row in self.own_rows(jobs, replicas) {
            let Objective { dropout, z_loss, .. } = jobs[row.job].objective;
            passes.entry((dropout.to_bits(), z_loss.to_bits())).or_default().push(row);
        }
        let options = |dropout, z_loss| PassOptions {
            recompute: self.limits.recompute,
            dropout: f32::from_bits(dropout),
            z_loss: f32::from_bits(z_loss),
        };
        passes.into_iter().map(|((dropout, z_loss), rows)| (options(dropout, z_loss), rows)).collect()
    }

    /// Sends these examples through the backbone, a microbatch at a time.
    fn gather<T>(
        &self,
        jobs: &[JobBatch<'_>],
        rows: &[Row],
        pass: (Work, Through<'_, T>),
        gathered: &mut [Gathered<T>],
    ) -> Result<()> {
        // Without gradients nothing is kept: what has no room there would have some here.
        let fitting =
            if pass.0 == Work::Gradients { self.fitting(jobs, rows, gathered) } else { rows.to_vec() };
        let rows = &fitting[..];
        let costs: Vec<usize> = rows.iter().map(|row| cost(&jobs[row.job], row.example)).collect();
        let runs = microbatch::cut(&costs, self.limits.budget);
        runs.into_iter().try_for_each(|run| self.send(jobs, &rows[run], pass, gathered))
    }

    /// Sends one microbatch through the backbone. If the model refuses one of several jobs, each goes alone.
    fn send<T>(
        &self,
        jobs: &[JobBatch<'_>],
        rows: &[Row],
        pass: (Work, Through<'_, T>),
        gathered: &mut [Gathered<T>],
    ) -> Result<()> {
        let (prompts, examples) = assemble(jobs, rows);
        let batch = Microbatch { prompts: &prompts, examples: &examples };
        let num_tokens = rows.iter().map(|row| cost(&jobs[row.job], row.example)).sum();
        let (work, through) = pass;
        let under = self.begin(work, num_tokens);
        let given = through(&batch, rows).inspect(|_| under.succeeds(1.0));
        let refusal = match given {
            Ok(given) => {
                for (row, given) in rows.iter().zip(given) {
                    if let Ok(gathered) = &mut gathered[row.job] {
                        gathered[row.example] = Some(given);
                    }
                }
                return Ok(());
            }
            Err(incipit_model::Error::Example { example, what }) => {
                // Named by its place in the job's batch, not in the microbatch.
                let example = rows.get(example).map_or(example, |row| row.example);
                self.refusal(incipit_model::Error::Example { example, what }, jobs, rows)?
            }
            Err(error) => self.refusal(error, jobs, rows)?,
        };
        if prompts.len() == 1 {
            gathered[rows[0].job] = Err(refusal);
            return Ok(());
        }
        rows.chunk_by(|a, b| a.job == b.job).try_for_each(|alone| self.send(jobs, alone, pass, gathered))
    }

    /// Why the model refused these rows. What is no fault of the batch is an error instead: one of the ranks, or of a device that failed;
    /// and memory that ran out on one of several ranks that go through the model in step.
    fn refusal(&self, error: incipit_model::Error, jobs: &[JobBatch<'_>], rows: &[Row]) -> Result<Refusal> {
        let error = Error::from(error);
        let works = self.device_works();
        if works && error.is_of_gpu_memory() && self.shares_model() {
            return Err(self.lacks(&error, Lacked::of(jobs, rows)));
        }
        if error.is_of_group() || !works {
            return Err(error);
        }
        Ok(Refusal { what: error.to_string(), out_of_memory: error.is_out_of_memory() })
    }

    /// Whether the model's device works. With one that failed, no process goes on.
    #[must_use]
    pub fn device_works(&self) -> bool {
        incipit_kernels::check_device(self.model.device()).is_ok()
    }
}

/// Before the first microbatch.
fn nothing<T: Clone>(jobs: &[JobBatch<'_>]) -> Vec<Gathered<T>> {
    jobs.iter().map(|job| Ok(vec![None; job.examples.len()])).collect()
}

/// Tokens that an example takes of a microbatch.
fn cost(job: &JobBatch<'_>, example: usize) -> usize {
    let example = job.examples[example];
    job.prompt.length() + example.input.len() + example.target.len()
}

/// Rows that an example has in the decoder.
fn decoder_rows(job: &JobBatch<'_>, example: usize) -> usize {
    let prompt = if job.prompt.placement == Placement::Decoder { job.prompt.length() } else { 0 };
    prompt + job.examples[example].target.len()
}

/// d objective / d (sum of an example's token losses): known before the pass, so that no cut of the batch can change it.
fn scale(job: &JobBatch<'_>) -> f32 {
    match job.objective.reduction {
        LossReduction::Sum => 1.0,
        LossReduction::Mean => 1.0 / num_targets(job) as f32,
    }
}

fn num_targets(job: &JobBatch<'_>) -> usize {
    job.examples.iter().map(|example| example.target.len()).sum()
}

/// The prompts of the jobs that the rows name, and the examples with their prompts. Rows of a job lie together.
fn assemble<'a>(jobs: &[JobBatch<'a>], rows: &[Row]) -> (Vec<SoftPrompt>, Vec<Example<'a>>) {
    let (mut prompts, mut examples, mut last) = (Vec::new(), Vec::new(), None);
    for row in rows {
        let job = &jobs[row.job];
        if last != Some(row.job) {
            prompts.push(job.prompt.clone());
            last = Some(row.job);
        }
        let TokenizedExample { input, target, .. } = job.examples[row.example];
        examples.push(Example { prompt: Some(prompts.len() - 1), input, target, key: job.keys[row.example] });
    }
    (prompts, examples)
}
