//! Ensembles: prompts of one task that differ in their seed alone, trained together (Lester et al. 2021, section 6).
//!
//! A member's directory `out/member-0` is one of a training run, and ends in the bytes of a run that had the backbone for itself:
//! the steps of all members go through the backbone together, and no number of one depends on the others. Beside the members lie
//! `ensemble.json`, which lists them, and `ensemble.safetensors` with the prompts of all.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Instant,
};

use incipit_collective::{Options, Ranks};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result, atomic,
    backbone::Backbone,
    checkpoint::{self, Best},
    control::Control,
    optimizer::NamedTensor,
    placement,
    prompt::Prompt,
    ranks,
    run_dir::{RunDir, holds_something_else},
    spec::{Method, PartialSpec, TrainSpec, validate::MAX_SEED},
    task::Task,
    tenant::Due,
    tensors,
    train::{Observer, Outcome, Run, as_threads, load, telling},
};

/// The file in an ensemble's directory that lists its members.
pub const FILE: &str = "ensemble.json";
/// The file with the prompts of all members: the tensor `prompts` `[N, P, D]` f32, in the order of the members; `[N, L, P, D]` with rows
/// for each layer, and named `prompts.after` or `prompts.decoder` where they do not stand before the input.
pub const PROMPTS: &str = "ensemble.safetensors";
/// How many members there are where nobody says: as many as in the paper.
pub const DEFAULT_MEMBERS: usize = 5;
/// The version of the list written here.
const FORMAT: u32 = 1;
const TENSOR: &str = "prompts";

/// A prompt of an ensemble.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its directory within the ensemble's.
    pub dir: String,
    /// Its seed.
    pub seed: u64,
    /// Its best evaluation, when the last process ended.
    pub best: Option<Best>,
}

/// `ensemble.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    format: u32,
    members: Vec<Member>,
}

/// The specifications of an ensemble's members: what `flags`, `config` and, with `resume`, the directory say, with a directory and a
/// seed for each. The first has the seed that is given, and each of the others the next one. `flags.out` is the ensemble's directory.
///
/// # Errors
/// As [`TrainSpec::resolve`]; also if no member or another number of members than the ensemble has is asked for.
pub fn resolve(
    flags: PartialSpec,
    config: Option<&Path>,
    resume: bool,
    members: Option<usize>,
) -> Result<Vec<TrainSpec>> {
    let Some(out) = flags.out.clone().filter(|out| !out.as_os_str().is_empty()) else {
        return Err(Error::spec("out", &"is missing; pass a directory for the ensemble"));
    };
    let listed = if resume && out.join(FILE).exists() { Some(list(&out)?.len()) } else { None };
    let count = match (members, listed) {
        (Some(0), _) => return Err(Error::spec("members", &"is 0; pass at least 1, or leave it out")),
        (Some(now), Some(was)) if now != was => {
            return Err(Error::OtherSpec {
                flag: "members".into(),
                was: was.to_string(),
                now: now.to_string(),
            });
        }
        (now, was) => now.or(was).unwrap_or(DEFAULT_MEMBERS),
    };
    let flags = PartialSpec { out: Some(out.join(name(0))), ..flags };
    let first = TrainSpec::resolve(flags, config, resume)?;
    if first.method != Method::Prompt {
        let what = format!("is {}, and the members of an ensemble are prompts; leave it out", first.method);
        return Err(Error::spec("method", &what));
    }
    if MAX_SEED - first.seed < count as u64 {
        let what = format!("{} leaves no seeds for {count} members; pass a smaller one", first.seed);
        return Err(Error::spec("seed", &what));
    }
    let member = |i: usize| TrainSpec {
        out: first.out.with_file_name(name(i)),
        seed: first.seed + i as u64,
        ..first.clone()
    };
    Ok((0..count).map(member).collect())
}

fn name(member: usize) -> String {
    format!("member-{member}")
}

/// The members of the ensemble in `dir`.
///
/// # Errors
/// If `dir` holds none, or its list is damaged.
pub fn list(dir: &Path) -> Result<Vec<Member>> {
    let path = dir.join(FILE);
    let refuse = |what| Error::Ensemble { path: path.clone(), what };
    if !path.exists() {
        let what = "it is not there; give a directory that `incipit ensemble train` has written, or prompts with --prompt";
        return Err(refuse(what.to_owned()));
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

/// The prompts in a file such as `ensemble.safetensors`.
///
/// # Errors
/// If it cannot be read, or holds anything but finite numbers of such a name and shape.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let refuse = |what| Error::Ensemble { path: path.to_owned(), what };
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let tensors = tensors::decode(&bytes).map_err(refuse)?;
    let placed = |tensor: NamedTensor| Some((placement::of_name(&tensor.name, TENSOR)?, tensor));
    let Some((place, tensor)) = tensors.into_iter().find_map(placed) else {
        return Err(refuse(format!("it has no tensor {TENSOR:?}; give the {PROMPTS} of an ensemble")));
    };
    let [_, shape @ ..] = &tensor.shape[..] else {
        return Err(refuse("its prompts have no shape; give the file that was written".to_owned()));
    };
    let parts = tensor.data.chunks(shape.iter().product::<usize>().max(1));
    let prompt = |values: &[f32]| Ok(Prompt::of_shape(shape, values.to_vec()).map_err(refuse)?.placed(place));
    let prompts = parts.map(prompt).collect::<Result<Vec<_>>>()?;
    if prompts.is_empty() {
        return Err(refuse("it holds no prompt; train the ensemble anew".to_owned()));
    }
    Ok(prompts)
}

/// Writes the best prompt of each member where others find all of them.
fn write_prompts(dir: &Path, members: &[&TrainSpec]) -> Result<()> {
    let prompts = members.iter().map(|spec| Prompt::read(&spec.out)).collect::<Result<Vec<_>>>()?;
    let Some(first) = prompts.first() else { return Ok(()) };
    let shape = [vec![prompts.len()], first.shape()].concat();
    let name = format!("{TENSOR}{}", placement::suffix(first.placement()));
    let values: Vec<f32> = prompts.iter().flat_map(Prompt::values).copied().collect();
    let path = dir.join(PROMPTS);
    let bytes = tensors::encode(&[(&name, &shape, &values)])
        .map_err(|what| Error::Ensemble { path: path.clone(), what })?;
    atomic::write_file(&path, &bytes)
}

/// The directory of an ensemble, while this process writes to it.
struct EnsembleDir {
    out: PathBuf,
    /// Holds the lock.
    _lock: File,
}

impl EnsembleDir {
    /// Takes the directory of these members: an empty one, or with `--resume` one in which they have begun.
    fn open(specs: &[TrainSpec]) -> Result<Self> {
        let Some((out, resume)) = specs.first().and_then(|spec| Some((spec.out.parent()?, spec.resume)))
        else {
            return Err(Error::spec("members", &"is 0; pass at least 1, or leave it out"));
        };
        let begun = out.join(FILE).exists();
        if !resume && (begun || holds_something_else(out)?) {
            return Err(Error::OutNotEmpty { path: out.to_owned() });
        }
        if !begun && holds_something_else(out)? {
            let what =
                format!("it holds no ensemble that could go on (there is no {FILE}); pass another --out");
            return Err(Error::Ensemble { path: out.to_owned(), what });
        }
        atomic::create_dir(out)?;
        let lock = checkpoint::lock(out)?;
        atomic::clean(out)?;
        let dir = Self { out: out.to_owned(), _lock: lock };
        if !begun {
            dir.list(specs, |_| None)?;
        }
        Ok(dir)
    }

    fn list(&self, specs: &[TrainSpec], best: impl Fn(usize) -> Option<Best>) -> Result<()> {
        let member = |(i, spec): (usize, &TrainSpec)| Member { dir: name(i), seed: spec.seed, best: best(i) };
        let list = List { format: FORMAT, members: specs.iter().enumerate().map(member).collect() };
        let mut bytes = serde_json::to_vec_pretty(&list).expect("numbers and names are JSON");
        bytes.push(b'\n');
        atomic::write_file(&self.out.join(FILE), &bytes)
    }

    /// Writes down what came of the members.
    fn close(&self, specs: &[TrainSpec], outcomes: &[Result<Outcome>]) -> Result<()> {
        let outcome = |i: usize| outcomes.get(i).and_then(|outcome| outcome.as_ref().ok());
        let best = |i: usize| outcome(i).and_then(|outcome| outcome.best);
        self.list(specs, best)?;
        if (0..specs.len()).all(|i| outcome(i).is_some_and(|outcome| outcome.trained.is_some())) {
            write_prompts(&self.out, &specs.iter().collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

/// An ensemble that was refused before a member began leaves nothing.
impl Drop for EnsembleDir {
    fn drop(&mut self) {
        if !self.out.join(name(0)).exists() {
            // What cannot be removed stays, and nothing is lost.
            let _ = std::fs::remove_file(self.out.join(FILE));
            let _ = std::fs::remove_dir(&self.out);
        }
    }
}

/// Trains the members of an ensemble: loads the backbone once and carries all of them to their ends, or on from where they were left, each
/// from its own last checkpoint. There is one observer a member. What says how the backbone is loaded and run is the first one's.
///
/// A loss or gradient that is not finite ends its member; the others go on, and end as if it had never been there.
///
/// # Errors
/// As [`crate::train::train`].
pub fn train<O: Observer>(
    specs: &[TrainSpec],
    options: &Options,
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let Some(first) = specs.first() else { return Ok(Vec::new()) };
    as_threads(first, options, observers, |ranks, observers| match observers {
        Some(observers) => train_as_rank(specs, ranks, control, observers),
        None => train_as_rank(specs, ranks, control, &mut vec![(); specs.len()]),
    })
}

/// Trains the members of an ensemble as one of several ranks, which are all told the same.
///
/// # Errors
/// As [`crate::train::train_as_rank`].
pub fn train_as_rank<O: Observer>(
    specs: &[TrainSpec],
    ranks: Ranks,
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let Some(first) = specs.first() else { return Ok(Vec::new()) };
    telling(ranks, |ranks| {
        // Before the backbone, which may take minutes.
        let dirs = if ranks.leads() { Some(Dirs::open(specs)?) } else { None };
        let options = first.engine_options();
        let backbone = Backbone::load_on(&first.model, first.dtype, first.device, options, ranks)?;
        carry_on(&backbone, specs, dirs, control, observers)
    })
}

/// Trains the members of an ensemble on a backbone that is loaded already.
///
/// # Errors
/// As [`crate::train::train_on`].
pub fn train_on<O: Observer>(
    backbone: &Backbone,
    specs: &[TrainSpec],
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let dirs = if backbone.engine.ranks().leads() { Some(Dirs::open(specs)?) } else { None };
    carry_on(backbone, specs, dirs, control, observers)
}

/// The directories that rank 0 writes to. Members' are let go of first.
struct Dirs {
    members: Vec<RunDir>,
    ensemble: EnsembleDir,
}

impl Dirs {
    fn open(specs: &[TrainSpec]) -> Result<Self> {
        let ensemble = EnsembleDir::open(specs)?;
        let members = specs.iter().map(RunDir::open).collect::<Result<_>>()?;
        Ok(Self { members, ensemble })
    }
}

fn carry_on<O: Observer>(
    backbone: &Backbone,
    specs: &[TrainSpec],
    dirs: Option<Dirs>,
    control: &Control,
    observers: &mut [O],
) -> Result<Vec<Result<Outcome>>> {
    let (mut dirs, ensemble) = match dirs {
        Some(Dirs { members, ensemble }) => (members.into_iter().map(Some).collect(), Some(ensemble)),
        None => (Vec::new(), None),
    };
    dirs.resize_with(specs.len(), || None);
    let Some(first) = specs.first() else { return Ok(Vec::new()) };
    // All have the same data, and warnings of it are told once.
    let mut task = load(first, backbone)?;
    let mut members = Vec::with_capacity(specs.len());
    for ((spec, dir), observer) in specs.iter().zip(dirs).zip(observers) {
        members.push(Ok(Run::begin(spec, backbone, (dir, task.clone()), control, observer)?));
        task = Task { warnings: Vec::new(), ..task };
    }
    while settle(&mut members)? && step(backbone, control, &mut members)? {}
    let leave = |member: Result<Run<'_>>| match member {
        Ok(run) => run.leave().map(Ok),
        Err(error) => Ok(Err(error)),
    };
    let outcomes = members.into_iter().map(leave).collect::<Result<Vec<_>>>()?;
    ensemble.map_or(Ok(()), |ensemble| ensemble.close(specs, &outcomes))?;
    Ok(outcomes)
}

/// Carries out what is due besides steps. False if someone asked to stop meanwhile.
fn settle(members: &mut [Result<Run<'_>>]) -> Result<bool> {
    let mut goes_on = true;
    for member in members {
        let Ok(run) = member else { continue };
        match run.settle() {
            Ok(settled) => goes_on &= settled,
            Err(error) => *member = Err(of_member(error)?),
        }
    }
    Ok(goes_on)
}

/// A step of each member that is not at its end, in one pass through the backbone. False if there is none, or someone asked to stop.
fn step(backbone: &Backbone, control: &Control, members: &mut [Result<Run<'_>>]) -> Result<bool> {
    let steps = |member: &Result<Run<'_>>| member.as_ref().is_ok_and(|run| run.tenant.due() == Due::Step);
    let places: Vec<usize> = (0..members.len()).filter(|place| steps(&members[*place])).collect();
    // All ranks leave after the same step.
    if places.is_empty() || ranks::any(backbone.engine.ranks(), control.stop_requested())? {
        return Ok(false);
    }
    let start = Instant::now();
    let running = places.iter().filter_map(|place| members[*place].as_ref().ok());
    let batches: Vec<_> = running.filter_map(|run| run.tenant.batch()).collect();
    let gradients = backbone.engine.gradients(&batches)?;
    drop(batches);
    let mut updates = Vec::with_capacity(places.len());
    for (place, gradient) in places.into_iter().zip(gradients) {
        let Ok(run) = &mut members[place] else { continue };
        match run.tenant.stepped(gradient) {
            Ok(update) => updates.push((place, update)),
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
