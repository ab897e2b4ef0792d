//! A group of runs whose steps go through one backbone together. Each has a directory of its own, as one run has, beneath the group's, which
//! lists them. Members are independent, or share the first rows of their prompts: then they make every step together, and each step's
//! gradient to the shared rows is the mean of theirs.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Instant,
};

use incipit_collective::{Options, Ranks};
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::{
    Error, Result, atomic,
    backbone::{Backbone, Opened},
    check::check,
    checkpoint::{self, Best},
    control::Control,
    engine::{JobFault, JobGradient},
    ranks,
    run_dir::{RunDir, holds_something_else},
    spec::TrainSpec,
    task::Task,
    tenant::Due,
    train::{Event, Observer, Outcome, Run, as_threads, telling},
};

/// The version of the list written here.
const FORMAT: u32 = 1;

/// What kind of group it is.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The file that lists the members.
    pub(crate) file: &'static str,
    /// What people call it.
    pub(crate) what: &'static str,
    /// What is done when every member has something to show.
    pub(crate) close: fn(&Path, &[TrainSpec]) -> Result<()>,
}

/// A run of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its directory within the group's.
    pub dir: String,
    /// Its seed.
    pub seed: u64,
    /// Its best evaluation, when the last process ended.
    pub best: Option<Best>,
}

/// The list of the members.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    format: u32,
    members: Vec<Member>,
}

/// The members that `file` in `dir` lists; `mend` says how to come by one.
pub(crate) fn list(dir: &Path, file: &str, mend: &str) -> Result<Vec<Member>> {
    let path = dir.join(file);
    let refuse = |what| Error::Ensemble { path: path.clone(), what };
    if !path.exists() {
        return Err(refuse(format!("it is not there; {mend}")));
    }
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let List { format, members } = serde_json::from_slice(&bytes)
        .map_err(|error| refuse(format!("it is no list of members ({error}); was the file changed?")))?;
    if format != FORMAT {
        return Err(refuse(format!(
            "it has the format {format}, and this version reads {FORMAT}; use the one that wrote it"
        )));
    }
    if members.is_empty() {
        return Err(refuse("it lists no member; was the file changed?".to_owned()));
    }
    Ok(members)
}

/// The name of a run's directory.
fn dir_name(spec: &TrainSpec) -> String {
    spec.out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The directory of a group, while this process writes to it.
struct GroupDir {
    kind: Kind,
    out: PathBuf,
    /// Holds the lock.
    _lock: File,
}

impl GroupDir {
    /// Takes the directory of these members: an empty one, or with `--resume` one in which they have begun.
    fn open(kind: &Kind, specs: &[TrainSpec]) -> Result<Self> {
        let Some((out, resume)) = specs.first().and_then(|spec| Some((spec.out.parent()?, spec.resume)))
        else {
            return Err(Error::spec("members", &"is 0; pass at least 1, or leave it out"));
        };
        let (file, what) = (kind.file, kind.what);
        let begun = out.join(file).exists();
        if !resume && (begun || holds_something_else(out)?) {
            return Err(Error::OutNotEmpty { path: out.to_owned() });
        }
        if !begun && holds_something_else(out)? {
            let what =
                format!("it holds no {what} that could go on (there is no {file}); pass another --out");
            return Err(Error::Ensemble { path: out.to_owned(), what });
        }
        atomic::create_dir(out)?;
        let lock = checkpoint::lock(out)?;
        atomic::clean(out)?;
        let dir = Self { kind: *kind, out: out.to_owned(), _lock: lock };
        if !begun {
            dir.list(specs, |_| None)?;
        }
        Ok(dir)
    }

    fn list(&self, specs: &[TrainSpec], best: impl Fn(usize) -> Option<Best>) -> Result<()> {
        let member =
            |(i, spec): (usize, &TrainSpec)| Member { dir: dir_name(spec), seed: spec.seed, best: best(i) };
        let list = List { format: FORMAT, members: specs.iter().enumerate().map(member).collect() };
        let mut bytes = serde_json::to_vec_pretty(&list).expect("numbers and names are JSON");
        bytes.push(b'\n');
        atomic::write_file(&self.out.join(self.kind.file), &bytes)
    }

    /// Writes down what came of the members.
    fn close(&self, specs: &[TrainSpec], outcomes: &[Result<Outcome>]) -> Result<()> {
        let outcome = |i: usize| outcomes.get(i).and_then(|outcome| outcome.as_ref().ok());
        let best = |i: usize| outcome(i).and_then(|outcome| outcome.best);
        self.list(specs, best)?;
        if (0..specs.len()).all(|i| outcome(i).is_some_and(|outcome| outcome.trained.is_some())) {
            (self.kind.close)(&self.out, specs)?;
        }
        Ok(())
    }
}

/// A group that was refused before a member began leaves nothing.
impl Drop for GroupDir {
    fn drop(&mut self) {
        let members = list(&self.out, self.kind.file, "").unwrap_or_default();
        if !members.iter().any(|member| self.out.join(&member.dir).exists()) {
            // What cannot be removed stays, and nothing is lost.
            let _ = std::fs::remove_file(self.out.join(self.kind.file));
            let _ = std::fs::remove_dir(&self.out);
        }
    }
}

/// Trains the members of a group: loads the backbone once and carries all of them to their ends, or on from where they were left. There is
/// one observer a member. What says how the backbone is loaded and run is the first one's.
///
/// # Errors
/// As [`crate::train::train`].
pub fn train<O: Observer>(
    kind: &Kind,
    specs: &[TrainSpec],
    options: &Options,
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let Some(first) = specs.first() else { return Ok(Vec::new()) };
    as_threads(first, options, observers, |ranks, observers| match observers {
        Some(observers) => train_as_rank(kind, specs, ranks, control, observers),
        None => train_as_rank(kind, specs, ranks, control, &mut vec![(); specs.len()]),
    })
}

/// Trains the members of a group as one of several ranks, which are all told the same.
///
/// # Errors
/// As [`crate::train::train_as_rank`].
pub fn train_as_rank<O: Observer>(
    kind: &Kind,
    specs: &[TrainSpec],
    ranks: Ranks,
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let Some(first) = specs.first() else { return Ok(Vec::new()) };
    telling(ranks, |ranks| {
        // Before the weights, which may take minutes.
        let dirs = if ranks.leads() { Some(Dirs::open(kind, specs)?) } else { None };
        let model = Opened::open(&first.model, first.dtype, first.device, ranks)?;
        let tasks = load(specs, &model.tokenizer, model.config.vocab_size)?;
        specs.iter().zip(&tasks).try_for_each(|(spec, task)| check(spec, task, &model))?;
        if let Some(observer) = observers.first_mut() {
            observer.on(&Event::Loading(model.loading()));
        }
        let backbone = model.load(first.engine_options(), ranks)?;
        carry_on(&backbone, specs, (dirs, tasks), control, observers)
    })
}

/// Trains the members of a group on a backbone that is loaded already.
///
/// # Errors
/// As [`crate::train::train_on`].
pub fn train_on<O: Observer>(
    kind: &Kind,
    backbone: &Backbone,
    specs: &[TrainSpec],
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let dirs = if backbone.engine.ranks().leads() { Some(Dirs::open(kind, specs)?) } else { None };
    let tasks = load(specs, &backbone.tokenizer, backbone.config().vocab_size)?;
    carry_on(backbone, specs, (dirs, tasks), control, observers)
}

/// The data of each member.
fn load(specs: &[TrainSpec], tokenizer: &Tokenizer, vocab_size: usize) -> Result<Vec<Task>> {
    let mut tasks: Vec<Task> = Vec::with_capacity(specs.len());
    for (place, spec) in specs.iter().enumerate() {
        // Of the same data as the one's before it, warnings are told once.
        tasks.push(match tasks.last() {
            Some(task) if same_data(&specs[place - 1], spec) => Task { warnings: Vec::new(), ..task.clone() },
            _ => Task::load(spec, tokenizer, vocab_size)?,
        });
    }
    Ok(tasks)
}

/// The directories that rank 0 writes to. Members' are let go of first.
struct Dirs {
    members: Vec<RunDir>,
    group: GroupDir,
}

impl Dirs {
    fn open(kind: &Kind, specs: &[TrainSpec]) -> Result<Self> {
        let group = GroupDir::open(kind, specs)?;
        let mut members = specs.iter().map(RunDir::open).collect::<Result<Vec<_>>>()?;
        if is_tied(specs) {
            // The rows that they share are those of one step.
            let step = common_step(&group.out, &members)?;
            members.iter_mut().for_each(|member| member.go_on_from(step));
        }
        Ok(Self { members, group })
    }
}

/// Whether the members share rows of their prompts.
fn is_tied(specs: &[TrainSpec]) -> bool {
    specs.first().is_some_and(|spec| spec.shared_length.is_some())
}

/// The newest step of which every member has a checkpoint that can be used: a process may have died between two members' checkpoints.
///
/// # Errors
/// If there is none although they have come further than a first one.
fn common_step(out: &Path, members: &[RunDir]) -> Result<Option<u64>> {
    let steps = members.iter().map(|member| member.store.steps()).collect::<Result<Vec<_>>>()?;
    let is_whole = |step: u64| members.iter().all(|m| checkpoint::load(&m.store.path(step)).is_ok());
    let common = steps.first().and_then(|first| first.iter().rev().copied().find(|step| is_whole(*step)));
    if common.is_none() && steps.iter().any(|steps| steps.len() > 1) {
        let what = "its runs have no checkpoint of one step that can be used, and would begin anew; pass another --out";
        return Err(Error::Ensemble { path: out.to_owned(), what: what.to_owned() });
    }
    Ok(common)
}

fn carry_on<O: Observer>(
    backbone: &Backbone,
    specs: &[TrainSpec],
    (dirs, tasks): (Option<Dirs>, Vec<Task>),
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let (mut dirs, group) = match dirs {
        Some(Dirs { members, group }) => (members.into_iter().map(Some).collect(), Some(group)),
        None => (Vec::new(), None),
    };
    dirs.resize_with(specs.len(), || None);
    let tied = is_tied(specs);
    let mut members = Vec::with_capacity(specs.len());
    for (((spec, task), dir), observer) in specs.iter().zip(tasks).zip(dirs).zip(observers) {
        members.push(Ok(Run::begin(spec, backbone, (dir, task), control, observer)?));
    }
    while settle(&mut members, tied)? && step(backbone, control, &mut members, tied)? {}
    let leave = |member: Result<Run<'_>>| match member {
        Ok(run) => run.leave().map(Ok),
        Err(error) => Ok(Err(error)),
    };
    let outcomes = members.into_iter().map(leave).collect::<Result<Vec<_>>>()?;
    group.map_or(Ok(()), |group| group.close(specs, &outcomes))?;
    Ok(outcomes)
}

/// Whether two members differ in what their examples do not depend on alone: where they write to, and their seed.
fn same_data(one: &TrainSpec, other: &TrainSpec) -> bool {
    *one == TrainSpec { out: one.out.clone(), seed: one.seed, ..other.clone() }
}

/// Carries out what is due besides steps. False if someone asked to stop meanwhile.
/// Members that share rows are saved together.
fn settle(members: &mut [Result<Run<'_>>], tied: bool) -> Result<bool> {
    let mut goes_on = true;
    for member in members.iter_mut() {
        let Ok(run) = member else { continue };
        match run.settle() {
            Ok(settled) => goes_on &= settled,
            Err(error) if tied => return Err(error),
            Err(error) => *member = Err(of_member(error)?),
        }
    }
    if tied && goes_on && members.iter().flatten().any(|run| run.tenant.is_saved()) {
        for run in members.iter_mut().flatten().filter(|run| !run.tenant.is_saved()) {
            run.checkpoint()?;
        }
    }
    Ok(goes_on)
}

/// A step of each member that is not at its end, in one pass through the backbone. False if there is none, or someone asked to stop.
fn step(backbone: &Backbone, control: &Control, members: &mut [Result<Run<'_>>], tied: bool) -> Result<bool> {
    let steps = |member: &Result<Run<'_>>| member.as_ref().is_ok_and(|run| run.tenant.due() == Due::Step);
    let places: Vec<usize> = (0..members.len()).filter(|place| steps(&members[*place])).collect();
    // All ranks leave after the same step.
    if places.is_empty() || ranks::any(backbone.engine.ranks(), control.stop_requested())? {
        return Ok(false);
    }
    let start = Instant::now();
    let running = places.iter().filter_map(|place| members[*place].as_ref().ok());
    let batches: Vec<_> = running.filter_map(|run| run.tenant.batch()).collect();
    let mut gradients = backbone.engine.gradients(&batches)?;
    drop(batches);
    if let Some(shared) = members.iter().flatten().find_map(|run| run.tenant.num_shared()) {
        tie(shared, &mut gradients);
    }
    let mut updates = Vec::with_capacity(places.len());
    for (place, gradient) in places.into_iter().zip(gradients) {
        let Ok(run) = &mut members[place] else { continue };
        match run.tenant.stepped(gradient) {
            Ok(update) => updates.push((place, update)),
            Err(error) if tied => return Err(error),
            Err(error) => members[place] = Err(of_member(error)?),
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    for (place, update) in updates {
        let Ok(run) = &mut members[place] else { continue };
        run.stepped(&update, seconds)?;
    }
    Ok(true)
}

/// Gives every member the mean of all members' gradients to the `shared` numbers that they share, summed in their order. Where one has no
/// gradient, no member is to make the step.
pub fn tie(shared: usize, gradients: &mut [Result<JobGradient, JobFault>]) {
    let mut sum = vec![0.0f64; shared];
    for gradient in gradients.iter().flatten() {
        sum.iter_mut().zip(&gradient.gradient).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let count = gradients.len() as f64;
    for gradient in gradients.iter_mut().flatten() {
        gradient.gradient.iter_mut().zip(&sum).for_each(|(value, sum)| *value = (sum / count) as f32);
    }
}

/// An error that ends one member.
///
/// # Errors
/// With any other.
fn of_member(error: Error) -> Result<Error> {
    match error {
        Error::NonFinite { .. } | Error::NonFiniteEvaluation { .. } | Error::Stopped { .. } => Ok(error),
        _ => Err(error),
    }
}
