//! Reads and tokenizes the data of jobs ahead, so that the backbone never waits for them.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use incipit_proto::v1::JobAssignment;
use incipit_tune::backbone::Backbone;
use incipit_tune::checkpoint;
use incipit_tune::init::PromptInit;
use incipit_tune::prompt::Prompt;
use incipit_tune::spec::{PartialSpec, TrainSpec};
use incipit_tune::task::Task;
use tokenizers::Tokenizer;

use crate::engine::Mail;
use crate::engine::failure::Result;
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

/// The way to the thread that loads.
#[derive(Clone)]
pub(crate) struct Loader {
    requests: Sender<LocalJob>,
}

impl Loader {
    /// Loads for `backbone`, and sends what it has loaded to `inbox`. Ends when it is dropped.
    pub(crate) fn start(backbone: &Backbone, machine: Machine, inbox: Sender<Mail>) -> Self {
        let (requests, queue) = channel();
        let tokenizer = backbone.tokenizer.clone();
        let vocab_size = backbone.config().vocab_size;
        let mut shelf = Shelf { machine, tokenizer, vocab_size, tasks: VecDeque::new() };
        std::thread::spawn(move || shelf.serve(&queue, &inbox));
        Self { requests }
    }

    /// Has a job loaded.
    pub(crate) fn load(&self, job: LocalJob) {
        // The thread ends with this, not before.
        let _ = self.requests.send(job);
    }
}

struct Shelf {
    machine: Machine,
    tokenizer: Tokenizer,
    vocab_size: usize,
    /// By what decides them, the last used in front.
    tasks: VecDeque<(PartialSpec, Task)>,
}

impl Shelf {
    fn serve(&mut self, queue: &Receiver<LocalJob>, inbox: &Sender<Mail>) {
        for local in queue {
            let Some(assignment) = &local.assignment else { continue };
            let (job, attempt) = (assignment.job.clone(), assignment.attempt);
            let begin = self.begin(assignment, &local);
            if inbox.send(Mail::Loaded(Box::new(Loaded { job, attempt, begin }))).is_err() {
                return;
            }
        }
    }

    fn begin(&mut self, assignment: &JobAssignment, local: &LocalJob) -> Result<Vec<Begin>> {
        let specs = self.machine.specs(&assignment.spec.clone().unwrap_or_default(), &local.tasks)?;
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

    fn task(&mut self, spec: &TrainSpec) -> Result<Task> {
        let key = decides_data(spec);
        let kept =
            self.tasks.iter().position(|(known, _)| *known == key).and_then(|place| self.tasks.remove(place));
        let task = match kept {
            Some((_, task)) => task,
            // A prompt to start as is no part of what jobs share, and its name is no path.
            None => {
                let spec = TrainSpec { prompt_init: PromptInit::Vocab, ..spec.clone() };
                Task::load(&spec, &self.tokenizer, self.vocab_size)?
            }
        };
        self.tasks.push_front((key, task.clone()));
        self.tasks.truncate(KEPT);
        Ok(task)
    }
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
