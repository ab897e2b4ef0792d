//! A job on a backbone: a tenant, or one for each of several tasks whose prompts share rows. Those make every step together, and are
//! evaluated, saved and ended together.

use std::path::{Path, PathBuf};

use incipit_tune::backbone::Backbone;
use incipit_tune::checkpoint::Checkpoint;
use incipit_tune::engine::{JobBatch, JobFault, JobGradient};
use incipit_tune::evaluate::{Evaluation, PartialEvaluation};
use incipit_tune::group;
use incipit_tune::job::Update;
use incipit_tune::spec::TrainSpec;
use incipit_tune::task::Task;
use incipit_tune::tenant::{Due, Tenant};

use crate::engine::failure::{Failure, Result};
use crate::engine::machine::Machine;
use crate::engine::plan::{Admission, SentTask};
use crate::engine::share::Want;
use crate::frames::LocalTask;

/// Something of each task by its name, in the order of the tasks. The task of a job that has one has no name.
pub(crate) type OfTasks<T> = Vec<(String, T)>;

/// Where in the directory of a job's checkpoint that of a task lies: the only task's is the whole.
pub(crate) fn dir_of(checkpoint: &Path, task: &str) -> PathBuf {
    if task.is_empty() { checkpoint.to_owned() } else { checkpoint.join(task) }
}

/// What came of the evaluations of tasks, and whether each is its task's best.
pub(crate) type Evaluated = OfTasks<(Evaluation, bool)>;

/// What a task begins with.
pub(crate) struct Begin {
    pub(crate) name: String,
    pub(crate) spec: TrainSpec,
    pub(crate) task: Task,
    pub(crate) checkpoint: Option<Checkpoint>,
}

/// A job on the backbone.
pub(crate) struct Resident {
    tenants: OfTasks<Tenant>,
    /// Of the first task that is due for one and not among `evaluated`.
    evaluation: Option<PartialEvaluation>,
    /// What came of tasks, by their places, while others are still to be evaluated. Their tenants do not know yet: a job that is left
    /// meanwhile evaluates all again.
    evaluated: Vec<(usize, Evaluation)>,
}

impl Resident {
    /// A job that comes to the backbone.
    ///
    /// # Errors
    /// If one of its tenants cannot begin or go on.
    pub(crate) fn admit(backbone: &Backbone, begin: Vec<Begin>) -> Result<Self> {
        let tenant = |Begin { name, spec, task, checkpoint }: Begin| {
            let tenant = match checkpoint {
                Some(checkpoint) => Tenant::resume(backbone, &spec, task, &checkpoint),
                None => Tenant::start(backbone, &spec, task),
            };
            let tenant = tenant.map_err(|error| of_task(&name, error))?;
            Ok((name, tenant))
        };
        let tenants = begin.into_iter().map(tenant).collect::<Result<_>>()?;
        Ok(Self { tenants, evaluation: None, evaluated: Vec::new() })
    }

    fn all(&self) -> impl Iterator<Item = &Tenant> {
        self.tenants.iter().map(|(_, tenant)| tenant)
    }

    /// Steps made.
    pub(crate) fn num_steps(&self) -> u64 {
        self.all().next().map_or(0, Tenant::num_steps)
    }

    /// Training examples of all tasks.
    pub(crate) fn num_examples(&self) -> usize {
        self.all().map(|tenant| tenant.task().train.examples.len()).sum()
    }

    /// What a person should know of its data and of its first prompts.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let of_task = |(name, tenant): &(String, Tenant)| {
            tenant.warnings().iter().map(|warning| named(name, warning)).collect::<Vec<_>>()
        };
        self.tenants.iter().flat_map(of_task).collect()
    }

    /// What comes next: what one of the tasks needs before the next step, else the step of all or the end of all.
    pub(crate) fn due(&self) -> Due {
        let dues: Vec<Due> = self.all().map(Tenant::due).collect();
        let first = [Due::Evaluate, Due::Checkpoint, Due::Step].into_iter().find(|due| dues.contains(due));
        first.unwrap_or_else(|| dues[0])
    }

    /// What it wants of the backbone next, if anything. `microbatch` is what goes through it at once, in tokens.
    pub(crate) fn want(&self, microbatch: u64) -> Option<Want> {
        match self.due() {
            Due::Step => Some(Want {
                tokens: self.all().map(Tenant::step_tokens).sum(),
                shared: self.all().all(Tenant::shares_steps),
            }),
            Due::Evaluate => {
                // Before its first round the cost is not known: a round is about as much as a microbatch.
                let known = self.evaluation.as_ref().map(|evaluation| evaluation.next_cost() as u64);
                Some(Want { tokens: known.unwrap_or(microbatch), shared: false })
            }
            Due::Checkpoint | Due::End(_) => None,
        }
    }

    /// The next step's batches, one a task, which other jobs' can go with; none if the job makes its steps alone.
    pub(crate) fn batches(&self) -> Vec<JobBatch<'_>> {
        self.all().filter_map(Tenant::batch).collect()
    }

    /// Makes a step of what the engine gave for [`Self::batches`].
    ///
    /// # Errors
    /// If that is an error, or the step of one of the tasks is; then the job is over.
    pub(crate) fn stepped(
        &mut self,
        mut gradients: Vec<std::result::Result<JobGradient, JobFault>>,
    ) -> Result<OfTasks<Update>> {
        if let Some(shared) = self.all().find_map(Tenant::num_shared) {
            group::tie(shared, &mut gradients);
        }
        let step = |((name, tenant), gradient): (&mut (String, Tenant), _)| {
            Ok((name.clone(), tenant.stepped(gradient).map_err(|error| of_task(name, error))?))
        };
        self.tenants.iter_mut().zip(gradients).map(step).collect()
    }

    /// Makes a step that can go with no other's.
    ///
    /// # Errors
    /// As [`Tenant::step`].
    pub(crate) fn step(&mut self, backbone: &Backbone) -> Result<OfTasks<Update>> {
        let step = |(name, tenant): &mut (String, Tenant)| Ok((name.clone(), tenant.step(backbone)?));
        self.tenants.iter_mut().map(step).collect()
    }

    /// A round of the evaluation that is due. After the last round of the last task, what came of each, and whether it is the task's best.
    ///
    /// # Errors
    /// If a number is not finite, or an exchange with other ranks fails.
    pub(crate) fn round(&mut self, backbone: &Backbone) -> Result<Option<Evaluated>> {
        let Some(place) = self.to_evaluate() else { return Ok(None) };
        let (name, tenant) = &self.tenants[place];
        let of_task = |error| of_task(name, error);
        let mut evaluation = match self.evaluation.take() {
            Some(evaluation) => evaluation,
            None => tenant.evaluation(backbone).map_err(of_task)?,
        };
        let engine = tenant.engine(backbone);
        if !evaluation.advance(engine).map_err(of_task)? {
            self.evaluation = Some(evaluation);
            return Ok(None);
        }
        let evaluation = evaluation.finish(engine, &backbone.tokenizer).map_err(of_task)?;
        self.evaluated.push((place, evaluation));
        Ok(self.to_evaluate().is_none().then(|| self.told()))
    }

    /// The first task that is due for an evaluation and has had none.
    fn to_evaluate(&self) -> Option<usize> {
        let is_over = |place: usize| self.evaluated.iter().any(|(over, _)| *over == place);
        let is_due = |place: &usize| self.tenants[*place].1.due() == Due::Evaluate && !is_over(*place);
        (0..self.tenants.len()).find(is_due)
    }

    /// Has the tenants know what came of their evaluations.
    fn told(&mut self) -> Evaluated {
        let mut told = Vec::new();
        for (place, evaluation) in std::mem::take(&mut self.evaluated) {
            let (name, tenant) = &mut self.tenants[place];
            let best = tenant.evaluated(&evaluation);
            told.push((name.clone(), (evaluation, best)));
        }
        told
    }

    /// Whether the last checkpoint holds all that there is.
    pub(crate) fn is_saved(&self) -> bool {
        self.all().all(Tenant::is_saved)
    }

    /// Whether the best evaluation of each task is that of this step.
    pub(crate) fn best(&self) -> OfTasks<bool> {
        self.tenants.iter().map(|(name, tenant)| (name.clone(), tenant.is_best())).collect()
    }

    /// Where it stands. From now on it [`is_saved`](Self::is_saved).
    pub(crate) fn checkpoint(&mut self) -> OfTasks<Checkpoint> {
        self.tenants.iter_mut().map(|(name, tenant)| (name.clone(), tenant.checkpoint())).collect()
    }
}

/// An error of a task, which is named if there are several.
pub(crate) fn of_task(name: &str, error: impl Into<Failure>) -> Failure {
    let failure = error.into();
    Failure { message: named(name, &failure.message), ..failure }
}

/// What is said of a task, behind its name if it has one.
fn named(name: &str, text: &str) -> String {
    if name.is_empty() { text.to_owned() } else { format!("{name}: {text}") }
}

/// What a job begins with, as the leader sent it.
///
/// # Errors
/// If the bytes are not what the leader says.
pub(crate) fn sent(admission: &Admission, machine: &Machine) -> Result<Vec<Begin>> {
    let wire = admission.spec.clone().unwrap_or_default();
    let files = |task: &SentTask| LocalTask {
        train: task.train.clone(),
        eval: task.eval.clone(),
        initial: String::new(),
    };
    let files: Vec<LocalTask> = admission.tasks.iter().map(files).collect();
    let begin = |((name, spec), sent): ((String, TrainSpec), &SentTask)| {
        let checkpoint = (!sent.checkpoint.is_empty()).then(|| Checkpoint::from_bytes(&sent.checkpoint));
        Ok(Begin { name, spec, task: Task::from_bytes(&sent.task)?, checkpoint: checkpoint.transpose()? })
    };
    machine.specs(&wire, &files)?.into_iter().zip(&admission.tasks).map(begin).collect()
}
