//! The jobs that are on a backbone, as one rank has them. Every rank carries out the same plans and finds the same.

use std::collections::BTreeMap;

use incipit_tune::backbone::Backbone;
use incipit_tune::engine::JobBatch;
use incipit_tune::job::Update;
use incipit_tune::tenant::Due;

use crate::engine::failure::{Result, as_of_group, unless_of_group};
use crate::engine::plan::{Admission, Plan};
use crate::engine::resident::{Begin, Evaluated, OfTasks, Resident};
use crate::engine::share::{Key, Want};

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
    pub(crate) steps: Vec<(Key, Result<OfTasks<Update>>)>,
    /// An evaluation that was completed.
    pub(crate) evaluated: Option<(Key, Result<Evaluated>)>,
}

impl Residents {
    /// A job on the backbone.
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut Resident> {
        self.jobs.get_mut(&key)
    }

    /// What a job does next.
    pub(crate) fn due(&self, key: Key) -> Option<Due> {
        Some(self.jobs.get(&key)?.due())
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
        mut begin: impl FnMut(&Admission) -> Result<Vec<Begin>>,
    ) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for key in &plan.dismissals {
            self.jobs.remove(key);
        }
        for admission in &plan.admissions {
            let admitted = unless_of_group(
                backbone,
                begin(admission).and_then(|begin| Resident::admit(backbone, begin)),
            )?;
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
    fn step(&mut self, keys: &[Key], backbone: &Backbone) -> Result<Vec<(Key, Result<OfTasks<Update>>)>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let batches = |key: &Key| Some((*key, self.jobs.get(key)?.batches()));
        let (keys, batches): (Vec<Key>, Vec<Vec<JobBatch<'_>>>) = keys.iter().filter_map(batches).unzip();
        let counts: Vec<usize> = batches.iter().map(Vec::len).collect();
        let gradients = backbone.engine.gradients(&batches.concat());
        let mut gradients = gradients.map_err(|error| as_of_group(backbone, error.into()))?.into_iter();
        let mut steps = Vec::with_capacity(keys.len());
        for (key, count) in keys.into_iter().zip(counts) {
            let gradients: Vec<_> = gradients.by_ref().take(count).collect();
            let Some(job) = self.jobs.get_mut(&key) else { continue };
            steps.push((key, unless_of_group(backbone, job.stepped(gradients))?));
        }
        Ok(steps)
    }

    /// A step of a job whose batch can go with no other's.
    fn step_alone(
        &mut self,
        key: Key,
        backbone: &Backbone,
    ) -> Result<Option<(Key, Result<OfTasks<Update>>)>> {
        let Some(job) = self.jobs.get_mut(&key) else { return Ok(None) };
        Ok(Some((key, unless_of_group(backbone, job.step(backbone))?)))
    }

    /// A round of a job's evaluation, the outcome if it was the last.
    fn evaluate(&mut self, key: Key, backbone: &Backbone) -> Result<Option<Result<Evaluated>>> {
        let Some(job) = self.jobs.get_mut(&key) else { return Ok(None) };
        Ok(unless_of_group(backbone, job.round(backbone))?.transpose())
    }
}
