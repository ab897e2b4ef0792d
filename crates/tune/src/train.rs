//! A training run, from its specification to its files.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use incipit_collective::{Mesh, Options, Ranks, broadcast_bytes};

use crate::{
    Error, Result,
    backbone::Backbone,
    checkpoint::{Best, Checkpoint, TrainState},
    control::Control,
    evaluate::{EvalOptions, Evaluation, evaluate},
    init::{Sources, initial_prompt},
    job::{Job, JobSpec, Update},
    log::{Line, MetricsLog},
    ranks,
    run_dir::{PROMPT_FILE, RunDir},
    spec::{Backend, TrainSpec},
    task::Task,
};

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
    /// Columns of the prompt; it has `spec.prompt_length` rows.
    pub d_model: usize,
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

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All its steps are made.
    Steps,
    /// No evaluation was better for as long as `--patience` allows.
    Patience,
    /// Someone asked; `--resume` goes on.
    Requested,
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
    /// The best prompt, or the last one where nothing was evaluated; none before the first checkpoint.
    pub prompt: Option<PathBuf>,
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
    if spec.collective != Backend::Local {
        let what = "is for several processes, each of them one rank; start them with `incipit launch`";
        return Err(Error::spec("collective", &format!("{} {what}", spec.collective)));
    }
    let mesh = Mesh::new(spec.tp, spec.dp, spec.tp.saturating_mul(spec.dp))?;
    if mesh.world() == 1 && spec.threads.is_none() {
        return train_as_rank(spec, Ranks::alone(), control, observer);
    }
    let observer = Mutex::new(observer);
    let results = ranks::on_threads(mesh, spec.threads, options, |ranks| {
        if !ranks.leads() {
            return train_as_rank(spec, ranks, control, &mut ());
        }
        let mut observer = observer.lock().unwrap_or_else(PoisonError::into_inner);
        train_as_rank(spec, ranks, control, &mut **observer)
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
    let ranks = Arc::new(ranks);
    let trained = load_and_train(spec, &ranks, control, observer);
    if let Err(error) = &trained {
        // So that the others can say why they end.
        ranks.abort(&error.to_string());
    }
    trained
}

fn load_and_train(
    spec: &TrainSpec,
    ranks: &Arc<Ranks>,
    control: &Control,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    // Before the backbone, which may take minutes.
    let dir = if ranks.leads() { Some(RunDir::open(spec)?) } else { None };
    let backbone = Backbone::load_on(&spec.model, spec.dtype, spec.device, spec.engine_options(), ranks)?;
    Run::begin(spec, &backbone, dir, control, observer)?.carry_on()
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
    let dir = if backbone.engine.ranks().leads() { Some(RunDir::open(spec)?) } else { None };
    Run::begin(spec, backbone, dir, control, observer)?.carry_on()
}

struct Run<'a> {
    spec: &'a TrainSpec,
    backbone: &'a Backbone,
    control: &'a Control,
    observer: &'a mut dyn Observer,
    /// On rank 0.
    files: Option<Files>,
    task: Task,
    job: Job,
    best: Option<Best>,
    evaluations_since_best: u64,
    /// The step of the last evaluation; 0 before the first.
    evaluated: u64,
    /// The step of the last checkpoint.
    saved: Option<u64>,
}

/// What a run writes.
struct Files {
    dir: RunDir,
    log: MetricsLog,
}

impl<'a> Run<'a> {
    fn begin(
        spec: &'a TrainSpec,
        backbone: &'a Backbone,
        dir: Option<RunDir>,
        control: &'a Control,
        observer: &'a mut dyn Observer,
    ) -> Result<Self> {
        let mut task = Task::load(spec, &backbone.tokenizer, backbone.config().vocab_size)?;
        let mut warnings = std::mem::take(&mut task.warnings);
        agree(spec, backbone, &task)?;
        let earlier = newest(dir.as_ref(), backbone.engine.ranks(), &mut warnings)?;
        let job = match &earlier {
            Some(earlier) => resumed(spec, backbone, &task, earlier)?,
            None => started(spec, backbone, &task, &mut warnings)?,
        };
        if spec.resume && earlier.is_none() {
            warnings.push(format!(
                "there is no checkpoint in {} yet: beginning with the first step",
                spec.out.display()
            ));
        }
        let prompt = || [("another prompt to begin with", ranks::prompt_digest(job.prompt()))];
        ranks::agree(backbone.engine.ranks(), prompt)?;
        let state = earlier.map(|earlier| earlier.state);
        let evaluated = state.as_ref().map_or(0, |state| state.evaluated);
        let files = dir.map(|dir| Files::begin(dir, spec, job.num_steps(), state.as_ref())).transpose()?;
        for warning in &warnings {
            observer.on(&Event::Warning(warning));
        }
        let run = Self {
            spec,
            backbone,
            control,
            observer,
            files,
            task,
            job,
            best: state.as_ref().and_then(|state| state.best),
            evaluations_since_best: state.as_ref().map_or(0, |state| state.evaluations_since_best),
            evaluated,
            saved: state.map(|state| state.step),
        };
        run.observer.on(&Event::Loaded(Loaded {
            spec,
            num_parameters: backbone.num_parameters,
            fingerprint: backbone.fingerprint.to_string(),
            d_model: run.job.prompt().width(),
            microbatch_tokens: backbone.engine.microbatch_tokens(),
            num_train: run.task.train.examples.len(),
            num_eval: run.task.eval.as_ref().map(|eval| eval.examples.len()),
            labels: run.task.labels.as_deref(),
            resumed_at: run.job.num_steps(),
        }));
        Ok(run)
    }

    /// Every turn of the loop begins where a checkpoint can be: a run that goes on from one does what it would have done.
    fn carry_on(mut self) -> Result<Outcome> {
        let end = loop {
            let evaluated = self.evaluate_if_due()?;
            let end = self.end(evaluated)?;
            if end.is_some() || self.checkpoint_due() {
                self.checkpoint()?;
            }
            if let Some(end) = end {
                break end;
            }
            self.step()?;
        };
        if let Some(files) = &self.files {
            files.dir.publish(&self.backbone.base_model())?;
        }
        let prompt = self.spec.out.join(PROMPT_FILE);
        let outcome = Outcome {
            end,
            step: self.job.num_steps(),
            best: self.best,
            out: self.spec.out.clone(),
            prompt: prompt.exists().then_some(prompt),
        };
        self.observer.on(&Event::Finished(&outcome));
        Ok(outcome)
    }

    /// Why the run ends here, if it does. `evaluated` is false if someone asked to stop in the middle of an evaluation.
    fn end(&self, evaluated: bool) -> Result<Option<End>> {
        let patience = self.spec.patience.map_or(u64::MAX, u64::from);
        let end = if !evaluated {
            Some(End::Requested)
        } else if self.job.num_steps() >= self.spec.steps {
            Some(End::Steps)
        } else if self.evaluations_since_best >= patience {
            Some(End::Patience)
        } else {
            // All ranks leave after the same step.
            ranks::any(self.backbone.engine.ranks(), self.control.stop_requested())?.then_some(End::Requested)
        };
        Ok(end)
    }

    fn log(&mut self, line: &Line) -> Result<()> {
        self.files.as_mut().map_or(Ok(()), |files| files.log.write(line))
    }

    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let update = self.job.step(&self.backbone.engine)?;
        let seconds = start.elapsed().as_secs_f64();
        self.log(&Line::update(&update, seconds))?;
        self.observer.on(&Event::Step { update: &update, seconds });
        Ok(())
    }

    /// Evaluates where the specification says so, unless it was done before. False if someone asked to stop meanwhile.
    fn evaluate_if_due(&mut self) -> Result<bool> {
        let step = self.job.num_steps();
        let due = step > 0 && (step.is_multiple_of(self.spec.eval_every) || step >= self.spec.steps);
        let Some(eval) = self.task.eval.as_ref().filter(|_| due && self.evaluated != step) else {
            return Ok(true);
        };
        let start = Instant::now();
        let options = EvalOptions {
            metrics: self.spec.metrics.clone(),
            labels: self.task.labels.clone(),
            max_new_tokens: self.task.max_new_tokens,
        };
        let (prompt, tokenizer) = (Some(self.job.prompt()), &self.backbone.tokenizer);
        let evaluation =
            match evaluate(&self.backbone.engine, prompt, eval, tokenizer, &options, self.control) {
                Err(Error::Interrupted) => return Ok(false),
                evaluation => evaluation?,
            };
        let seconds = start.elapsed().as_secs_f64();
        let score = evaluation.score();
        let best = self.best.is_none_or(|best| score > best.score);
        if best {
            self.best = Some(Best { step, score });
        }
        self.evaluations_since_best = if best { 0 } else { self.evaluations_since_best + 1 };
        self.evaluated = step;
        self.saved = None;
        self.log(&Line::evaluation(step, &evaluation, seconds))?;
        self.observer.on(&Event::Evaluated { step, evaluation: &evaluation, best, seconds });
        Ok(true)
    }

    fn checkpoint_due(&self) -> bool {
        let step = self.job.num_steps();
        let best = self.best.is_some_and(|best| best.step == step);
        step > 0 && (step.is_multiple_of(self.spec.checkpoint_every) || best)
    }

    /// Saves where the run stands, unless that was done.
    fn checkpoint(&mut self) -> Result<()> {
        let step = self.job.num_steps();
        if self.saved == Some(step) {
            return Ok(());
        }
        let (epoch, batch) = self.job.cursor();
        let state = TrainState {
            step,
            epoch,
            batch,
            seed: self.spec.seed,
            spec: self.spec.identity_hash(),
            backbone: self.backbone.fingerprint.to_string(),
            optimizer: self.spec.optimizer_kind(),
            optimizer_steps: step,
            best: self.best,
            evaluations_since_best: self.evaluations_since_best,
            evaluated: self.evaluated,
            train_data: self.task.train_hash.clone(),
            eval_data: self.task.eval_hash.clone(),
        };
        let optimizer = self.job.optimizer_state();
        let checkpoint = Checkpoint { prompt: self.job.prompt().clone(), optimizer, state };
        self.saved = Some(step);
        let Some(Files { dir, log }) = &mut self.files else { return Ok(()) };
        log.sync()?;
        let path = dir.store.save(&checkpoint)?;
        if self.best.is_some_and(|best| best.step == step) {
            dir.store.mark_best(step)?;
        }
        dir.store.prune(self.spec.keep)?;
        if self.best.is_none_or(|best| best.step == step) {
            dir.publish(&self.backbone.base_model())?;
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
        let isa = incipit_kernels::isa().name().to_owned();
        [
            ("another specification", format!("{} {schedule:?}", spec.identity_hash())),
            ("another backbone", backbone.fingerprint.to_string()),
            ("other training data, or another tokenizer", examples),
            ("other evaluation data", format!("{:?}", task.eval_hash)),
            ("other instructions of its processor (INCIPIT_ISA chooses them)", isa),
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

/// A job before its first step.
fn started(spec: &TrainSpec, backbone: &Backbone, task: &Task, warnings: &mut Vec<String>) -> Result<Job> {
    let model = backbone.engine.model();
    let embedding = |id| model.embedding_row(id).map_err(Into::into);
    let sources = Sources {
        embedding: &embedding,
        tokenizer: &backbone.tokenizer,
        labels: task.labels.as_deref().unwrap_or_default(),
        seed: spec.seed,
    };
    let initial = initial_prompt(&spec.prompt_init, spec.prompt_length, backbone.config().d_model, &sources)?;
    warnings.extend(initial.warnings);
    Job::new(JobSpec::from(spec), task.train.clone(), initial.prompt)
}

/// A job as a checkpoint left it, if it is the same job.
fn resumed(spec: &TrainSpec, backbone: &Backbone, task: &Task, earlier: &Checkpoint) -> Result<Job> {
    let state = &earlier.state;
    let fingerprint = backbone.fingerprint.to_string();
    if state.backbone != fingerprint && !spec.allow_other_backbone {
        let (model, was) = (backbone.name.clone(), state.backbone.clone());
        return Err(Error::OtherBackbone { model, was, now: fingerprint });
    }
    earlier.prompt.check_width(backbone.config().d_model, spec.out.join("last"))?;
    if state.train_data != task.train_hash {
        return Err(Error::OtherData { path: spec.train.clone() });
    }
    if state.eval_data != task.eval_hash {
        let path = spec.eval.clone().unwrap_or_else(|| "the file of --eval".into());
        return Err(Error::OtherData { path });
    }
    if state.spec != spec.identity_hash() {
        let what =
            "it was made with another specification than run.toml says; was that file changed?".to_owned();
        return Err(Error::Checkpoint { path: spec.out.join("last"), what });
    }
    let prompt = earlier.prompt.clone();
    Job::restore(JobSpec::from(spec), task.train.clone(), prompt, state.optimizer_steps, &earlier.optimizer)
}
