//! Reads and tokenizes the data of jobs ahead, so that the backbone never waits for them, nor one job for another's.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use incipit_proto::v1::{JobAssignment, JobReason};
use incipit_tune::backbone::Backbone;
use incipit_tune::checkpoint;
use incipit_tune::init::PromptInit;
use incipit_tune::prompt::Prompt;
use incipit_tune::spec::{PartialSpec, TrainSpec};
use incipit_tune::task::Task;
use tokenizers::Tokenizer;

use crate::engine::Mail;
use crate::engine::failure::{Failure, Result};
use crate::engine::machine::Machine;
use crate::engine::resident::{Begin, dir_of, of_task};
use crate::frames::{LocalJob, LocalTask};

/// How many data sets are kept for other jobs with the same data: seeds and learning rates of one task.
const KEPT: usize = 8;

/// A job whose data are there, or why they are not.
pub(crate) struct Loaded {
    pub(crate) job: String,
    pub(crate) attempt: u32,
    pub(crate) begin: Result<Vec<Begin>>,
}

/// Loads data for the jobs of one backbone.
pub(crate) struct Loader {
    shelf: Arc<Shelf>,
    inbox: Sender<Mail>,
}

impl Loader {
    /// A loader for `backbone` that sends what it has loaded to `inbox`.
    pub(crate) fn new(backbone: &Backbone, machine: Machine, inbox: Sender<Mail>) -> Self {
        let tokenizer = backbone.tokenizer.clone();
        let vocab_size = backbone.config().vocab_size;
        let shelf = Shelf { machine, tokenizer, vocab_size, tasks: Mutex::default() };
        Self { shelf: Arc::new(shelf), inbox }
    }

    /// Has a job loaded, on a thread of its own: a file that nobody serves holds up nobody else.
    pub(crate) fn load(&self, job: LocalJob) {
        let (shelf, inbox) = (self.shelf.clone(), self.inbox.clone());
        let Some((name, attempt)) = job.assignment.as_ref().map(|job| (job.job.clone(), job.attempt)) else {
            return;
        };
        let load = move || {
            if let Some(loaded) = shelf.load(&job) {
                // Without an inbox the engine has ended.
                let _ = inbox.send(Mail::Loaded(Box::new(loaded)));
            }
        };
        if let Err(error) = std::thread::Builder::new().spawn(load) {
            let message = format!("its data cannot be read, for the system gives no more threads: {error}");
            let failure = Failure::of_job(JobReason::Internal, message);
            let loaded = Loaded { job: name, attempt, begin: Err(failure) };
            let _ = self.inbox.send(Mail::Loaded(Box::new(loaded)));
        }
    }
}

/// The examples of one data set, once somebody has read them. Whoever wants the same ones waits until they are read.
type Slot = Arc<Mutex<Option<Task>>>;

struct Shelf {
    machine: Machine,
    tokenizer: Tokenizer,
    vocab_size: usize,
    /// By what decides them, the last used in front.
    tasks: Mutex<VecDeque<(PartialSpec, Slot)>>,
}

impl Shelf {
    fn load(&self, local: &LocalJob) -> Option<Loaded> {
        let assignment = local.assignment.as_ref()?;
        let (job, attempt) = (assignment.job.clone(), assignment.attempt);
        let begin = catch_unwind(AssertUnwindSafe(|| self.begin(assignment, local)));
        let begin = begin.unwrap_or_else(|_| {
            let message = "its data made the loader panic; the engine's log has the place".to_owned();
            Err(Failure::of_job(JobReason::Internal, message))
        });
        Some(Loaded { job, attempt, begin })
    }

    fn begin(&self, assignment: &JobAssignment, local: &LocalJob) -> Result<Vec<Begin>> {
        let wire = assignment.spec.clone().unwrap_or_default();
        let paths = crate::spec::paths(&wire);
        paths.iter().try_for_each(|path| check_path(path, &assignment.data_roots))?;
        let specs = self.machine.specs(&wire, &local.tasks)?;
        let begin = |((name, spec), files): ((String, TrainSpec), &LocalTask)| {
            let named = |error| of_task(&name, error);
            let checkpoint = match &*local.checkpoint {
                "" => None,
                path => Some(checkpoint::load(&dir_of(Path::new(path), &name)).map_err(named)?),
            };
            let initial = match &*files.initial {
                "" => None,
                path => Some(Prompt::read(Path::new(path)).map_err(named)?),
            };
            let task = Task { initial, ..self.task(&spec).map_err(|failure| of_task(&name, failure))? };
            Ok(Begin { name, spec, task, checkpoint })
        };
        specs.into_iter().zip(&local.tasks).map(begin).collect()
    }

    fn task(&self, spec: &TrainSpec) -> Result<Task> {
        let slot = self.slot(decides_data(spec));
        let mut kept = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = &*kept {
            return Ok(task.clone());
        }
        // A prompt to start as is no part of what jobs share, and its name is no path.
        let spec = TrainSpec { prompt_init: PromptInit::Vocab, ..spec.clone() };
        let task = Task::load(&spec, &self.tokenizer, self.vocab_size)?;
        Ok(kept.insert(task).clone())
    }

    /// The place of the examples that `key` decides.
    fn slot(&self, key: PartialSpec) -> Slot {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let place = tasks.iter().position(|(known, _)| *known == key);
        let slot = place.and_then(|place| tasks.remove(place)).map(|(_, slot)| slot).unwrap_or_default();
        tasks.push_front((key, slot.clone()));
        tasks.truncate(KEPT);
        slot
    }
}

/// Checks that a path of this machine leads to something under one of `roots`, also where it has links. Their names were compared by the
/// coordinator, which does not see this machine's disk.
fn check_path(path: &str, roots: &[String]) -> Result<()> {
    let failure = |reason, message| Err(Failure::of_job(reason, message));
    let found = match std::fs::canonicalize(path) {
        Ok(found) => found,
        Err(error) => {
            let what = format!("{path} cannot be found on this machine ({error}); copy or mount it there");
            return failure(JobReason::BadData, what);
        }
    };
    // A root that this machine has not has nothing in it.
    let is_within = |root: &String| std::fs::canonicalize(root).is_ok_and(|root| found.starts_with(root));
    if roots.iter().any(is_within) {
        return Ok(());
    }
    let roots = if roots.is_empty() { "none".to_owned() } else { roots.join(", ") };
    let found = found.display();
    let what = format!(
        "{path} leads to {found}, which is under none of the coordinator's data roots ({roots}; its --data-root)"
    );
    failure(JobReason::BadSpec, what)
}

/// What of a specification decides the examples. Files of uploaded data are named by their content; others may change between two
/// jobs, so that their data are told apart by the time of the last change as well.
fn decides_data(spec: &TrainSpec) -> PartialSpec {
    let changed = |path: &Path| {
        let changed = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        format!("{} {changed:?}", path.display()).into()
    };
    PartialSpec {
        train: Some(changed(&spec.train)),
        eval: spec.eval.as_deref().map(changed),
        inputs: spec.inputs.clone(),
        targets: spec.targets.clone(),
        labels: spec.labels.clone(),
        task: spec.task.map(|task| task.name.to_owned()),
        target_sentinel: Some(spec.target_sentinel),
        max_input_length: Some(spec.max_input_length),
        max_target_length: Some(spec.max_target_length),
        skip_bad_records: Some(spec.skip_bad_records),
        ..PartialSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_lead_nowhere_but_under_a_root_whatever_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        for name in ["data", "elsewhere", "data/mine"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        for name in ["data/a.jsonl", "elsewhere/secret", "database.jsonl"] {
            std::fs::write(path(name), "{}").unwrap();
        }
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(path(to), path(name)).unwrap();
        link("data/a.jsonl", "data/mine/same.jsonl");
        link("elsewhere/secret", "data/mine/secret.jsonl");
        link("elsewhere", "data/mine/dir");
        link("data", "mounted");
        let roots = [path("nowhere"), path("mounted")];
        for name in ["data/a.jsonl", "mounted/a.jsonl", "mounted/mine/same.jsonl"] {
            assert!(check_path(&path(name), &roots).is_ok(), "{name}");
        }
        let outside =
            ["mounted/mine/secret.jsonl", "mounted/mine/dir/secret", "elsewhere/secret", "database.jsonl"];
        for name in outside {
            let failure = check_path(&path(name), &roots).expect_err(name);
            assert_eq!(failure.reason, JobReason::BadSpec, "{name}");
            assert!(failure.message.contains("under none of the coordinator's data roots"), "{failure:?}");
        }
        let failure = check_path(&path("mounted/b.jsonl"), &roots).expect_err("it is not there");
        assert_eq!(failure.reason, JobReason::BadData);
        assert!(failure.message.contains("b.jsonl cannot be found on this machine"), "{failure:?}");
    }
}
