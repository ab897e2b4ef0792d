//! A training run, from its specification to its files.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use incipit_collective::{Mesh, Options, Ranks, broadcast_bytes};
use incipit_weights::Loading;

use crate::{
    Error, Result,
    backbone::{Backbone, Opened},
    check::check,
    checkpoint::{Best, Checkpoint, TrainState},
    control::Control,
    evaluate::Evaluation,
    job::Update,
    log::{Line, MetricsLog},
    ranks,
    run_dir::{self, RunDir},
    spec::{Backend, TrainSpec},
    task::Task,
    tenant::{Due, Tenant},
};

pub use crate::tenant::End;

/// Watches a run.
pub trait Observer: Send {
    /// Is told of everything that happens, in order, on the thread that trains.
    fn on(&mut self, event: &Event<'_>);
}

/// Nobody watches.
impl Observer for () {
    fn on(&mut self, _: &Event<'_>) {}
}

/// What happens in a run.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The weights are loaded from now on, which this tells of.
    Loading(Arc<Loading>),
    /// The backbone and the data are there, and the first step is next.
    Loaded(Loaded<'a>),
    /// Something that a person should know, and that does not stop the run.
    Warning(&'a str),
    /// A step was made.
    Step {
        /// What it did.
        update: &'a Update,
        /// How long it took.
        seconds: f64,
    },
    /// The prompt was evaluated.
    Evaluated {
        /// Steps made.
        step: u64,
        /// The outcome, predictions included.
        evaluation: &'a Evaluation,
        /// Whether it is the best so far.
        best: bool,
        /// How long it took.
        seconds: f64,
    },
    /// A checkpoint was saved.
    Checkpointed {
        /// Steps made.
        step: u64,
        /// Its directory.
        path: &'a Path,
    },
    /// The run is over, and its files are written.
    Finished(&'a Outcome),
}

/// What a run begins with.
#[derive(Clone, Debug)]
pub struct Loaded<'a> {
    /// The specification.
    pub spec: &'a TrainSpec,
    /// Numbers of the frozen backbone.
    pub num_parameters: u64,
    /// Fingerprint of the backbone.
    pub fingerprint: String,
    /// Numbers that are trained.
    pub num_trained: u64,
    /// Numbers that are left of them when training is over.
    pub num_kept: u64,
    /// Tokens that go through the backbone at once, at most.
    pub microbatch_tokens: usize,
    /// Training examples.
    pub num_train: usize,
    /// Evaluation examples.
    pub num_eval: Option<usize>,
    /// The label set, if the task has one.
    pub labels: Option<&'a [String]>,
    /// Steps made by earlier processes.
    pub resumed_at: u64,
}

/// What a run leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Why it ended.
    pub end: End,
    /// Steps made, by earlier processes too.
    pub step: u64,
    /// The best evaluation, if there was one.
    pub best: Option<Best>,
    /// The directory of the run.
    pub out: PathBuf,
    /// What was trained, as it was best, or last where nothing was evaluated: `prompt.npy`, the trained weights, or the directory of the
    /// whole model. None before the first checkpoint.
    pub trained: Option<PathBuf>,
}

/// Trains a prompt: loads the backbone and carries the run to its end, or on from where it was left. Where `spec` asks for several
/// ranks, they are threads of this process; `options` says how long they wait for each other.
///
/// # Errors
/// Whatever of the specification, the files and the numbers is wrong. Nothing half-written is left behind, and what was
/// saved before stays.
pub fn train(
    spec: &TrainSpec,
    options: &Options,
    control: &Control,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    as_threads(spec, options, observer, |ranks, observer| match observer {
        Some(observer) => train_as_rank(spec, ranks, control, observer),
        None => train_as_rank(spec, ranks, control, &mut ()),
    })
}

/// Does the work of a run on the ranks that it asks for, which are threads of this process, and returns what it came to on rank 0, which
/// alone is given the observer.
pub(crate) fn as_threads<T: Send, O: Send + ?Sized>(
    spec: &TrainSpec,
    options: &Options,
    observer: &mut O,
    work: impl Fn(Ranks, Option<&mut O>) -> Result<T> + Sync,
) -> Result<T> {
    if spec.collective != Backend::Local {
        let what = "is for several processes, each of them one rank; start them with `incipit launch`";
        return Err(Error::spec("collective", &format!("{} {what}", spec.collective)));
    }
    let mesh = Mesh::new(spec.tp, spec.dp, spec.tp.saturating_mul(spec.dp))?;
    if mesh.world() == 1 && spec.threads.is_none() {
        // On one of the threads that compute: handing them each operation from outside costs two wake-ups.
        return rayon::scope(|_| work(Ranks::alone(), Some(observer)));
    }
    let observer = Mutex::new(observer);
    let results = ranks::on_threads(mesh, spec.threads, options, |ranks| {
        if !ranks.leads() {
            return work(ranks, None);
        }
        let mut observer = observer.lock().unwrap_or_else(PoisonError::into_inner);
        work(ranks, Some(&mut **observer))
    });
    Ok(ranks::first_cause(results, Error::is_echo)?.swap_remove(0))
}

/// Trains a prompt as one of several ranks, which are all told the same. Rank 0 alone writes files and tells its observer what
/// happens; a request to stop may come to any of them.
///
/// # Errors
/// As [`train`]; also if an exchange with another rank fails ([`Error::is_echo`] if that one failed first).
pub fn train_as_rank(
    spec: &TrainSpec,
    ranks: Ranks,
    control: &Control,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    telling(ranks, |ranks| load_and_train(spec, ranks, control, observer))
}

/// Does a rank's work. If it fails, the others are told, so that they can say why they end.
pub(crate) fn telling<T>(ranks: Ranks, work: impl FnOnce(&Arc<Ranks>) -> Result<T>) -> Result<T> {
    let ranks = Arc::new(ranks);
    let done = work(&ranks);
    if let Err(error) = &done {
        ranks.abort(&error.to_string());
    }
    done
}

fn load_and_train(
    spec: &TrainSpec,
    ranks: &Arc<Ranks>,
    control: &Control,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    // Before the weights, which may take minutes.
    let dir = if ranks.leads() { Some(open(spec)?) } else { None };
    let model = Opened::open(&spec.model, spec.dtype, spec.device, ranks)?;
    let task = Task::load(spec, &model.tokenizer, model.config.vocab_size)?;
    check(spec, &task, &model)?;
    observer.on(&Event::Loading(model.loading()));
    let backbone = model.load(spec.engine_options(), ranks)?;
    Run::begin(spec, &backbone, (dir, task), control, observer)?.carry_on()
}

/// Takes the directory of a run, unless it is one of several that share rows.
fn open(spec: &TrainSpec) -> Result<RunDir> {
    if spec.shared_length.is_some() {
        let what = "is of several tasks; train them, and go on with them, by `incipit multitask`";
        return Err(Error::spec("shared-length", &what));
    }
    RunDir::open(spec)
}

/// Trains a prompt on a backbone that is loaded already; `spec.model` and what says how to load and run it are not looked at.
/// Where several ranks have the backbone, each makes this call.
///
/// # Errors
/// As [`train`].
pub fn train_on(
    backbone: &Backbone,
    spec: &TrainSpec,
    control: &Control,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let dir = if backbone.engine.ranks().leads() { Some(open(spec)?) } else { None };
    let task = Task::load(spec, &backbone.tokenizer, backbone.config().vocab_size)?;
    Run::begin(spec, backbone, (dir, task), control, observer)?.carry_on()
}

/// A run on its way.
pub(crate) struct Run<'a> {
    spec: &'a TrainSpec,
    backbone: &'a Backbone,
    control: &'a Control,
    observer: &'a mut dyn Observer,
    /// On rank 0.
    files: Option<Files>,
    pub(crate) tenant: Tenant,
}

/// What a run writes.
struct Files {
    dir: RunDir,
    log: MetricsLog,
}

impl<'a> Run<'a> {
    /// A run before its next step: the first, or the one after its last checkpoint. Rank 0 gives its directory.
    pub(crate) fn begin(
        spec: &'a TrainSpec,
        backbone: &'a Backbone,
        (dir, task): (Option<RunDir>, Task),
        control: &'a Control,
        observer: &'a mut dyn Observer,
    ) -> Result<Self> {
        agree(spec, backbone, &task)?;
        let mut damaged = Vec::new();
        let earlier = newest(dir.as_ref(), backbone.engine.ranks(), &mut damaged)?;
        let tenant = match &earlier {
            Some(earlier) => Tenant::resume(backbone, spec, task, earlier)?,
            None => Tenant::start(backbone, spec, task)?,
        };
        let mut warnings = [tenant.warnings(), &damaged].concat();
        if spec.resume && earlier.is_none() {
            warnings.push(format!(
                "there is no checkpoint in {} yet: beginning with the first step",
                spec.out.display()
            ));
        }
        let trained =
            || [("another prompt, or weights, to begin with", ranks::trained_digest(&tenant.trained()))];
        ranks::agree(backbone.engine.ranks(), trained)?;
        let state = earlier.map(|earlier| earlier.state);
        let num_steps = tenant.num_steps();
        let files = dir.map(|dir| Files::begin(dir, spec, num_steps, state.as_ref())).transpose()?;
        for warning in &warnings {
            observer.on(&Event::Warning(warning));
        }
        observer.on(&Event::Loaded(Loaded {
            spec,
            num_parameters: backbone.num_parameters,
            fingerprint: backbone.fingerprint.to_string(),
            num_trained: tenant.num_trained(),
            num_kept: tenant.num_kept(),
            microbatch_tokens: backbone.engine.microbatch_tokens(),
            num_train: tenant.task().train.examples.len(),
            num_eval: tenant.task().eval.as_ref().map(|eval| eval.examples.len()),
            labels: tenant.task().labels.as_deref(),
            resumed_at: num_steps,
        }));
        Ok(Self { spec, backbone, control, observer, files, tenant })
    }

    fn carry_on(mut self) -> Result<Outcome> {
        while self.settle()? && self.tenant.due() == Due::Step && self.step()? {}
        self.leave()
    }

    /// Does what is due until that is a step or nothing. False if someone asked to stop meanwhile. Every turn of the loop begins where a
    /// checkpoint can be: a run that goes on from one does what it would have done.
    pub(crate) fn settle(&mut self) -> Result<bool> {
        loop {
            match self.tenant.due() {
                Due::Evaluate if !self.evaluate()? => return Ok(false),
                Due::Evaluate => {}
                Due::Checkpoint => self.checkpoint()?,
                Due::Step | Due::End(_) => return Ok(true),
            }
        }
    }

    /// Ends the run here, and saves where it stands.
    pub(crate) fn leave(mut self) -> Result<Outcome> {
        let end = match self.tenant.due() {
            Due::End(end) => end,
            Due::Evaluate | Due::Checkpoint | Due::Step => End::Requested,
        };
        if !self.tenant.is_saved() {
            self.checkpoint()?;
        }
        if let Some(files) = &self.files {
            files.dir.finish(self.backbone, self.spec.method)?;
        }
        let trained = self.spec.out.join(run_dir::published(self.spec.method));
        let outcome = Outcome {
            end,
            step: self.tenant.num_steps(),
            best: self.tenant.best(),
            out: self.spec.out.clone(),
            trained: trained.exists().then_some(trained),
        };
        self.observer.on(&Event::Finished(&outcome));
        Ok(outcome)
    }

    fn log(&mut self, line: &Line) -> Result<()> {
        self.files.as_mut().map_or(Ok(()), |files| files.log.write(line))
    }

    /// Makes a step. False if someone asked to stop before it.
    fn step(&mut self) -> Result<bool> {
        // All ranks leave after the same step.
        if ranks::any(self.backbone.engine.ranks(), self.control.stop_requested())? {
            return Ok(false);
        }
        let start = Instant::now();
        let update = self.tenant.step(self.backbone)?;
        self.stepped(&update, start.elapsed().as_secs_f64())?;
        Ok(true)
    }

    /// Takes note of a step that was made.
    pub(crate) fn stepped(&mut self, update: &Update, seconds: f64) -> Result<()> {
        self.log(&Line::update(update, seconds))?;
        self.observer.on(&Event::Step { update, seconds });
        Ok(())
    }

    /// Evaluates the prompt. False if someone asked to stop meanwhile.
    fn evaluate(&mut self) -> Result<bool> {
        let start = Instant::now();
        let (engine, tokenizer) = (self.tenant.engine(self.backbone), &self.backbone.tokenizer);
        let begun = self.tenant.evaluation(self.backbone)?;
        let evaluation = match begun.complete(engine, tokenizer, self.control) {
            Err(Error::Interrupted) => return Ok(false),
            evaluation => evaluation?,
        };
        let seconds = start.elapsed().as_secs_f64();
        let best = self.tenant.evaluated(&evaluation);
        let step = self.tenant.num_steps();
        self.log(&Line::evaluation(step, &evaluation, seconds))?;
        self.observer.on(&Event::Evaluated { step, evaluation: &evaluation, best, seconds });
        Ok(true)
    }

    /// Saves where the run stands.
    pub(crate) fn checkpoint(&mut self) -> Result<()> {
        let checkpoint = self.tenant.checkpoint();
        let Some(Files { dir, log }) = &mut self.files else { return Ok(()) };
        log.sync()?;
        let step = checkpoint.state.step;
        let path = dir.store.save(&checkpoint)?;
        if self.tenant.is_best() {
            dir.store.mark_best(step)?;
        }
        dir.store.prune(self.spec.keep)?;
        // Weights are shown at the end.
        if self.tenant.prompt().is_some() && (self.tenant.is_best() || self.tenant.best().is_none()) {
            dir.publish(self.backbone)?;
        }
        self.observer.on(&Event::Checkpointed { step, path: &path });
        Ok(())
    }
}

impl Files {
    fn begin(dir: RunDir, spec: &TrainSpec, num_steps: u64, state: Option<&TrainState>) -> Result<Self> {
        dir.begin(spec)?;
        if let Some(state) = state {
            dir.settle(state, spec.keep)?;
        }
        let log = MetricsLog::open(&spec.out, num_steps, state.map_or(0, |state| state.evaluated))?;
        Ok(Self { dir, log })
    }
}

/// Checks that all ranks were told the same, as far as it decides what they compute.
fn agree(spec: &TrainSpec, backbone: &Backbone, task: &Task) -> Result<()> {
    ranks::agree(backbone.engine.ranks(), || {
        let schedule = (spec.steps, spec.eval_every, spec.checkpoint_every, spec.patience);
        let examples = task.train_hash.clone() + &ranks::tokens_digest(&task.train.examples);
        [
            ("another specification", format!("{} {schedule:?}", spec.identity_hash())),
            ("another backbone", backbone.fingerprint.to_string()),
            ("other training data, or another tokenizer", examples),
            ("other evaluation data", format!("{:?}", task.eval_hash)),
        ]
    })
}

/// The checkpoint to go on from, which rank 0 reads and sends to the others.
fn newest(dir: Option<&RunDir>, ranks: &Ranks, warnings: &mut Vec<String>) -> Result<Option<Checkpoint>> {
    let found = dir.map(|dir| dir.newest(warnings)).transpose()?.flatten();
    let bytes = found.as_ref().map(Checkpoint::to_bytes).transpose()?.unwrap_or_default();
    let bytes = broadcast_bytes(&**ranks.world(), &bytes, 0)?;
    if ranks.leads() || bytes.is_empty() { Ok(found) } else { Checkpoint::from_bytes(&bytes).map(Some) }
}
