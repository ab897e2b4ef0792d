//! The jobs that are on a backbone, as one rank has them. Every rank carries out the same plans and finds the same.

use std::collections::BTreeMap;

use incipit_tune::backbone::Backbone;
use incipit_tune::checkpoint::Checkpoint;
use incipit_tune::engine::JobBatch;
use incipit_tune::evaluate::{Evaluation, PartialEvaluation};
use incipit_tune::job::Update;
use incipit_tune::spec::TrainSpec;
use incipit_tune::task::Task;
use incipit_tune::tenant::{Due, Tenant};

use crate::engine::failure::{Failure, Result, unless_of_group};
use crate::engine::machine::Machine;
use crate::engine::plan::{Admission, Plan};
use crate::engine::share::{Key, Want};

/// What a job begins with.
pub(crate) struct Begin {
    pub(crate) spec: TrainSpec,
    pub(crate) task: Task,
    pub(crate) checkpoint: Option<Checkpoint>,
}

/// A job on the backbone.
pub(crate) struct Resident {
    pub(crate) tenant: Tenant,
    evaluation: Option<PartialEvaluation>,
}

/// The jobs on the backbone.
#[derive(Default)]
pub(crate) struct Residents {
    jobs: BTreeMap<Key, Resident>,
}

/// What a plan came to. A job that is named with an error is on the backbone no more.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Jobs that have come.
    pub(crate) admitted: Vec<(Key, Result<()>)>,
    /// Steps that were made.
    pub(crate) steps: Vec<(Key, Result<Update>)>,
    /// An evaluation that was completed, and whether it is the job's best.
    pub(crate) evaluated: Option<(Key, Result<(Evaluation, bool)>)>,
}

impl Residents {
    /// A job on the backbone.
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut Resident> {
        self.jobs.get_mut(&key)
    }

    /// What a job does next.
    pub(crate) fn due(&self, key: Key) -> Option<Due> {
        Some(self.jobs.get(&key)?.tenant.due())
    }

    /// What each job wants next; those are left out whose next thing is not the backbone's. `microbatch` is what goes through it at once,
    /// in tokens.
    pub(crate) fn wants(&self, microbatch: u64) -> BTreeMap<Key, Want> {
        let want = |(key, resident): (&Key, &Resident)| Some((*key, resident.want(microbatch)?));
        self.jobs.iter().filter_map(want).collect()
    }

    /// Carries out a plan; all ranks do so together. `begin` gives what the jobs that come begin with.
    ///
    /// # Errors
    /// If the ranks cannot go on together. What a job does wrong ends that job.
    pub(crate) fn carry_out(
        &mut self,
        plan: &Plan,
        backbone: &Backbone,
        mut begin: impl FnMut(&Admission) -> Result<Begin>,
    ) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for key in &plan.dismissals {
            self.jobs.remove(key);
        }
        for admission in &plan.admissions {
            let admitted = unless_of_group(begin(admission).and_then(|begin| admit(backbone, begin)))?;
            let admitted = admitted.map(|resident| drop(self.jobs.insert(admission.key, resident)));
            outcome.admitted.push((admission.key, admitted));
        }
        if let Some(key) = plan.evaluation {
            outcome.evaluated = self.evaluate(key, backbone)?.map(|evaluated| (key, evaluated));
        }
        outcome.steps = self.step(&plan.steps, backbone)?;
        if let Some(key) = plan.alone {
            outcome.steps.extend(self.step_alone(key, backbone)?);
        }
        let failed = outcome.steps.iter().filter(|(_, result)| result.is_err()).map(|(key, _)| *key);
        let unevaluated = outcome.evaluated.iter().filter(|(_, result)| result.is_err()).map(|(key, _)| *key);
        for key in failed.chain(unevaluated) {
            self.jobs.remove(&key);
        }
        Ok(outcome)
    }

    /// One step of each of these jobs, in one pass through the backbone.
    fn step(&mut self, keys: &[Key], backbone: &Backbone) -> Result<Vec<(Key, Result<Update>)>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let batch = |key: &Key| Some((*key, self.jobs.get(key)?.tenant.batch()?));
        let (keys, batches): (Vec<Key>, Vec<JobBatch<'_>>) = keys.iter().filter_map(batch).unzip();
        let gradients = backbone.engine.gradients(&batches)?;
        let mut steps = Vec::with_capacity(keys.len());
        for (key, gradient) in keys.into_iter().zip(gradients) {
            let Some(job) = self.jobs.get_mut(&key) else { continue };
            steps.push((key, unless_of_group(job.tenant.stepped(gradient).map_err(Failure::from))?));
        }
        Ok(steps)
    }

    /// A step of a job whose batch can go with no other's.
    fn step_alone(&mut self, key: Key, backbone: &Backbone) -> Result<Option<(Key, Result<Update>)>> {
        let Some(job) = self.jobs.get_mut(&key) else { return Ok(None) };
        let step = unless_of_group(job.tenant.step(backbone).map_err(Failure::from))?;
        Ok(Some((key, step)))
    }

    /// A round of a job's evaluation, the outcome if it was the last.
    fn evaluate(&mut self, key: Key, backbone: &Backbone) -> Result<Option<Result<(Evaluation, bool)>>> {
        let Some(job) = self.jobs.get_mut(&key) else { return Ok(None) };
        match unless_of_group(job.round(backbone))? {
            Ok(None) => Ok(None),
            Ok(Some(evaluation)) => {
                let best = job.tenant.evaluated(&evaluation);
                Ok(Some(Ok((evaluation, best))))
            }
            Err(error) => Ok(Some(Err(error))),
        }
    }
}

impl Resident {
    fn want(&self, microbatch: u64) -> Option<Want> {
        match self.tenant.due() {
            Due::Step => Some(Want { tokens: self.tenant.step_tokens(), shared: self.tenant.shares_steps() }),
            Due::Evaluate => {
                // Before its first round the cost is not known: a round is about as much as a microbatch.
                let known = self.evaluation.as_ref().map(|evaluation| evaluation.next_cost() as u64);
                Some(Want { tokens: known.unwrap_or(microbatch), shared: false })
            }
            Due::Checkpoint | Due::End(_) => None,
        }
    }

    fn round(&mut self, backbone: &Backbone) -> Result<Option<Evaluation>> {
        let mut evaluation = match self.evaluation.take() {
            Some(evaluation) => evaluation,
            None => self.tenant.evaluation(backbone)?,
        };
        let engine = self.tenant.engine(backbone);
        if !evaluation.advance(engine)? {
            self.evaluation = Some(evaluation);
            return Ok(None);
        }
        Ok(Some(evaluation.finish(engine, &backbone.tokenizer)?))
    }
}

fn admit(backbone: &Backbone, begin: Begin) -> Result<Resident> {
    let Begin { spec, task, checkpoint } = begin;
    let tenant = match checkpoint {
        Some(checkpoint) => Tenant::resume(backbone, &spec, task, &checkpoint)?,
        None => Tenant::start(backbone, &spec, task)?,
    };
    Ok(Resident { tenant, evaluation: None })
}

/// What a job begins with, as the leader sent it.
///
/// # Errors
/// If the bytes are not what the leader says.
pub(crate) fn sent(admission: &Admission, machine: &Machine) -> Result<Begin> {
    let wire = admission.spec.clone().unwrap_or_default();
    let checkpoint =
        (!admission.checkpoint.is_empty()).then(|| Checkpoint::from_bytes(&admission.checkpoint));
    Ok(Begin {
        spec: machine.spec(&wire, &admission.train, &admission.eval)?,
        task: Task::from_bytes(&admission.task)?,
        checkpoint: checkpoint.transpose()?,
    })
}
