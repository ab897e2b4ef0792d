//! What is to be run for some suites: commands of this program, each once, in an order in which each finds what it needs.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use incipit_model::Config;
use incipit_tune::spec::{Backend, Method};
use serde::Serialize;
use toml::Value;

use super::scale::{Load, Model, Scale, Settings, TaskFiles, Variant};
use crate::exit::bad_input;

/// Tokens of a usual answer, for estimates of time.
const ANSWER_TOKENS: f64 = 3.0;

/// Flags that stand alone.
const ALONE: [&str; 2] = ["target-sentinel", "skip-bad-records"];

/// A command of this program and what it leaves.
#[derive(Serialize)]
pub(super) struct Run {
    /// Its place below `runs/`, which says what it is.
    pub(super) name: String,
    /// The words behind `incipit`, without those that say where it computes.
    pub(super) command: Vec<String>,
    /// The runs that it needs.
    pub(super) after: Vec<usize>,
    /// About how many floating-point operations it takes; none if the model's shape is not known.
    pub(super) work: Option<f64>,
}

/// What the flags of `paper` say of all runs.
pub(super) struct Place {
    pub(super) out: PathBuf,
    pub(super) data: PathBuf,
    pub(super) corpus: Option<PathBuf>,
    pub(super) held_out: Option<PathBuf>,
    pub(super) tokenizer: Option<PathBuf>,
    /// Rows of new models' embeddings.
    pub(super) vocab_size: usize,
    pub(super) device: Option<String>,
    /// Flags that every run is given: where it computes.
    pub(super) machine: Vec<String>,
    /// Flags that say on how many ranks.
    pub(super) ranks: Vec<String>,
    /// What connects ranks that are processes, and how many there are.
    pub(super) launched: Option<(Backend, usize)>,
}

/// The runs, and where each is in them by name.
pub(super) struct Plan<'a> {
    pub(super) scale: &'a Scale,
    pub(super) place: &'a Place,
    pub(super) runs: Vec<Run>,
    /// Files that runs read and that are to be written before them.
    pub(super) files: BTreeMap<PathBuf, String>,
    index: HashMap<String, usize>,
}

/// What runs are trained on.
pub(super) struct Examples {
    name: String,
    /// The flags that name it, and say how it is read.
    flags: Vec<String>,
    /// The runs that make it.
    after: Vec<usize>,
    load: Load,
    /// Whether inputs begin with the name of their task.
    prefixed: bool,
}

/// A trained variant: of each seed, the run and the directory that it leaves.
pub(super) struct Trained {
    pub(super) of_seeds: Vec<Member>,
    /// The model's shape, if it is known.
    config: Option<Config>,
    /// Rows before an input.
    rows: f64,
    /// Whether inputs begin with the name of their task.
    prefixed: bool,
}

pub(super) struct Member {
    pub(super) run: usize,
    /// Its summary in the run's: a JSON pointer.
    pub(super) summary: String,
    pub(super) dir: PathBuf,
}

impl<'a> Plan<'a> {
    pub(super) fn new(scale: &'a Scale, place: &'a Place) -> Self {
        Self { scale, place, runs: Vec::new(), files: BTreeMap::new(), index: HashMap::new() }
    }

    /// Where a run's directory is.
    pub(super) fn dir(&self, name: &str) -> PathBuf {
        self.place.out.join("runs").join(name)
    }

    /// The words behind `incipit` that carry a run out on this machine.
    pub(super) fn command(&self, run: &Run) -> Vec<String> {
        let Place { machine, ranks, launched, .. } = self.place;
        // Examples need no model.
        if run.command[0] == "task" {
            return run.command.clone();
        }
        let command = run.command.iter().chain(machine).cloned();
        // A model is made on one rank.
        if run.command[0] == "pretrain" {
            return command.collect();
        }
        let launcher = launched.iter().flat_map(|(collective, ranks)| {
            words(["launch", "--nproc", &ranks.to_string(), "--collective", &collective.to_string(), "--"])
        });
        launcher.chain(command).chain(ranks.iter().cloned()).collect()
    }

    /// Leaves out the runs from `first` on.
    pub(super) fn forget(&mut self, first: usize) {
        for run in self.runs.drain(first..) {
            self.index.remove(&run.name);
        }
    }

    fn add(&mut self, run: Run) -> usize {
        if let Some(&known) = self.index.get(&run.name) {
            return known;
        }
        self.index.insert(run.name.clone(), self.runs.len());
        self.runs.push(run);
        self.runs.len() - 1
    }

    /// A model at a stage: where it is, and the run that makes it if it is not there already.
    ///
    /// # Errors
    /// If the scale does not say how to come by it, or what it is made of is not given.
    pub(super) fn model(&mut self, model: &Model, stage: &str) -> Result<(String, Vec<usize>)> {
        if let Some(found) = model.found.get(stage) {
            return Ok((found.clone(), Vec::new()));
        }
        let how = self.scale.stages.get(stage);
        let how =
            how.with_context(|| format!("the scale does not say what stage {stage} of {} is", model.name))?;
        let Some(corpus) = &self.place.corpus else {
            return bad_input(format!(
                "model {} at stage {stage} has to be made: give the text to make it of with --corpus",
                model.name
            ));
        };
        let name = format!("model/{}-{stage}", model.name);
        let dir = self.dir(&name);
        let mut command = words(["pretrain", "--out", &shown(&dir), "--corpus", &shown(corpus)]);
        command.extend(self.place.held_out.iter().flat_map(|path| words(["--eval", &shown(path)])));
        let after = match &how.from {
            Some(from) => {
                let (path, after) = self.model(model, from)?;
                command.extend(words(["--model", &path]));
                after
            }
            None => {
                command.extend(self.beginning(model)?);
                Vec::new()
            }
        };
        command.extend(flags(&how.settings));
        let work =
            model.config(self.place.vocab_size)?.map(|config| pretraining_work(&config, &how.settings));
        let run = self.add(Run { name, command, after, work });
        Ok((shown(&dir.join("model")), vec![run]))
    }

    /// The flags of a model that begins with random weights.
    fn beginning(&self, model: &Model) -> Result<Vec<String>> {
        let Some(tokenizer) = &self.place.tokenizer else {
            return bad_input(format!(
                "model {} has to be made: give the directory of its tokenizer with --tokenizer",
                model.name
            ));
        };
        let config = shown(&super::shape_file(&self.place.out, &model.name));
        Ok(words(["--config", &config, "--tokenizer", &shown(tokenizer)]))
    }

    /// A task's files, which must be there.
    ///
    /// # Errors
    /// If the scale does not have the task, or a file is missing.
    pub(super) fn task(&self, name: &str, to_train: bool) -> Result<&'a TaskFiles> {
        let task = self.scale.tasks.get(name).with_context(|| format!("the scale has no task {name}"))?;
        match task.missing(&self.place.data, to_train) {
            Some(what) => bad_input(format!("task {name}: {what}")),
            None => Ok(task),
        }
    }

    /// A task's examples, to train on.
    ///
    /// # Errors
    /// As [`Self::task`].
    pub(super) fn of_task(&self, name: &str) -> Result<Examples> {
        let task = self.task(name, true)?;
        let (flags, load) = (task.to_train(&self.place.data), task.load());
        Ok(Examples { name: name.to_owned(), flags, after: Vec::new(), load, prefixed: false })
    }

    /// Those of several tasks in one.
    ///
    /// # Errors
    /// As [`Self::task`].
    pub(super) fn mixture(&mut self, tasks: &[String]) -> Result<Examples> {
        let files = tasks.iter().map(|task| self.task(task, true)).collect::<Result<Vec<_>>>()?;
        let tables = tasks.iter().zip(&files);
        let tables = tables.map(|(task, files)| (task.clone(), files.settings(&self.place.data).into()));
        let all = tasks.join("+");
        let list = self.place.out.join("mixtures").join(format!("{all}.toml"));
        self.files.insert(list.clone(), Settings::from_iter(tables).to_string());
        let name = format!("mixture/{all}");
        let dir = self.dir(&format!("{name}/examples"));
        let command = words(["task", "mix", "--tasks", &shown(&list), "--output", &shown(&dir)]);
        let run =
            self.add(Run { name: format!("{name}/examples"), command, after: Vec::new(), work: Some(0.0) });
        let [train, eval] = ["train.jsonl", "dev.jsonl"].map(|file| shown(&dir.join(file)));
        let loads = files.iter().map(|files| files.load());
        let load = Load {
            input_tokens: loads.clone().map(|load| load.input_tokens).sum::<f64>() / tasks.len() as f64,
            eval_examples: loads.map(|load| load.eval_examples).sum(),
        };
        let flags = words(["--train", &train, "--eval", &eval]);
        Ok(Examples { name, flags, after: vec![run], load, prefixed: true })
    }

    /// The runs of a variant on some examples, one a seed; prompts of all seeds go through the backbone together.
    ///
    /// # Errors
    /// As [`Self::model`].
    pub(super) fn train(&mut self, model: &str, on: &Examples, variant: &Variant) -> Result<Trained> {
        if variant.method == Method::Prompt && self.scale.seeds > 1 {
            return self.train_together(model, on, variant, self.scale.seeds);
        }
        self.train_alone(model, on, variant)
    }

    /// Prompts that are trained in one batch.
    ///
    /// # Errors
    /// As [`Self::train`].
    pub(super) fn train_together(
        &mut self,
        model: &str,
        on: &Examples,
        variant: &Variant,
        members: u64,
    ) -> Result<Trained> {
        let count = members.to_string();
        let start = words(["ensemble", "train", "--members", &count]);
        let run = self.training(model, on, variant, (start, &format!("{members}-prompts"), members))?;
        let dir = self.dir(&self.runs[run].name);
        let member =
            |i| Member { run, summary: format!("/members/{i}"), dir: dir.join(format!("member-{i}")) };
        self.trained(model, on, variant, (0..members).map(member).collect())
    }

    /// Runs of their own, one a seed.
    ///
    /// # Errors
    /// As [`Self::train`].
    pub(super) fn train_alone(&mut self, model: &str, on: &Examples, variant: &Variant) -> Result<Trained> {
        let of_seeds = (0..self.scale.seeds).map(|seed| {
            let start = words(["train", "--seed", &seed.to_string()]);
            let run = self.training(model, on, variant, (start, &format!("seed-{seed}"), 1))?;
            let dir = self.dir(&self.runs[run].name);
            Ok(Member { run, summary: String::new(), dir })
        });
        let of_seeds = of_seeds.collect::<Result<_>>()?;
        self.trained(model, on, variant, of_seeds)
    }

    fn trained(
        &self,
        model: &str,
        on: &Examples,
        variant: &Variant,
        of_seeds: Vec<Member>,
    ) -> Result<Trained> {
        let config = self.scale.model(model)?.config(self.place.vocab_size)?;
        let rows = rows(variant.method, &self.scale.settings(variant), on.load);
        Ok(Trained { of_seeds, config, rows, prefixed: on.prefixed })
    }

    /// A training run: `start` is the command's first words, what tells it from its like, and how many it trains.
    fn training(
        &mut self,
        model: &str,
        on: &Examples,
        variant: &Variant,
        (start, which, count): (Vec<String>, &str, u64),
    ) -> Result<usize> {
        let (scale, place) = (self.scale, self.place);
        let model = scale.model(model)?;
        let (path, mut after) = self.model(model, &variant.stage)?;
        after.extend(&on.after);
        let what = [variant.method.to_string()].into_iter().chain(own(&variant.settings)).collect::<Vec<_>>();
        let name = format!("{}/{}-{}/{}/{which}", on.name, model.name, variant.stage, what.join(","));
        let settings = scale.settings(variant);
        let mut command = start;
        command.extend(words(["--out", &shown(&self.dir(&name)), "--model", &path]));
        if variant.method != Method::Prompt {
            command.extend(words(["--method", &variant.method.to_string()]));
        }
        command.extend(on.flags.clone());
        command.extend(flags(&settings));
        let config = model.config(place.vocab_size)?;
        let work =
            config.map(|config| training_work(&config, variant.method, &settings, on.load) * count as f64);
        Ok(self.add(Run { name, command, after, work }))
    }

    /// An evaluation of what a seed has trained, on another task.
    ///
    /// # Errors
    /// As [`Self::task`].
    pub(super) fn evaluate(&mut self, of: &Trained, seed: usize, task: &str) -> Result<usize> {
        let Member { run, dir, .. } = &of.of_seeds[seed];
        let mut command = words(["eval", "--prompt", &shown(dir)]);
        if of.prefixed {
            command.extend(words(["--input-prefix", task]));
        }
        self.evaluation((*run, dir), task, command, of.forward(self.task(task, false)?.load()))
    }

    /// The votes of prompts that were trained together, on their own task.
    ///
    /// # Errors
    /// As [`Self::task`].
    pub(super) fn vote(&mut self, of: &Trained, task: &str) -> Result<usize> {
        let run = of.of_seeds[0].run;
        let dir = self.dir(&self.runs[run].name);
        let command = words(["ensemble", "eval", "--ensemble", &shown(&dir)]);
        let work = of.forward(self.task(task, false)?.load()).map(|work| work * of.of_seeds.len() as f64);
        self.evaluation((run, &dir), task, command, work)
    }

    fn evaluation(
        &mut self,
        (of, dir): (usize, &Path),
        task: &str,
        mut command: Vec<String>,
        work: Option<f64>,
    ) -> Result<usize> {
        command.extend(self.task(task, false)?.to_eval(&self.place.data));
        let trained = dir.strip_prefix(self.place.out.join("runs")).expect("a run's directory").display();
        let name = format!("on-{task}/{trained}");
        Ok(self.add(Run { name, command, after: vec![of], work }))
    }
}

impl Trained {
    /// The work of evaluating one of the seeds on a task.
    fn forward(&self, task: Load) -> Option<f64> {
        let config = self.config.as_ref()?;
        Some(forward(config, self.rows + task.input_tokens, ANSWER_TOKENS) * task.eval_examples)
    }
}

/// Settings as flags.
fn flags(settings: &Settings) -> Vec<String> {
    let mut flags = Vec::new();
    for (name, value) in settings {
        match value {
            Value::Boolean(true) if ALONE.contains(&name.as_str()) => flags.push(format!("--{name}")),
            Value::Boolean(false) if ALONE.contains(&name.as_str()) => {}
            _ => flags.extend([format!("--{name}"), plain(value)]),
        }
    }
    flags
}

/// What tells a variant from its like, as a part of a path.
fn own(settings: &Settings) -> impl Iterator<Item = String> {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "=._+".contains(c) { c } else { '-' };
    settings.iter().map(move |(name, value)| {
        let value: String = plain(value).chars().map(safe).collect();
        format!("{name}={value}")
    })
}

/// A value as a flag takes it.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A setting that is a number, or what holds where nobody says.
pub(super) fn number(settings: &Settings, name: &str, default: f64) -> f64 {
    let value = settings.get(name);
    value.and_then(|value| value.as_float().or(value.as_integer().map(|n| n as f64))).unwrap_or(default)
}

/// Two operations a parameter that a token passes.
fn forward(config: &Config, encoder_tokens: f64, decoder_tokens: f64) -> f64 {
    let (encoder, decoder) = config.parameters_passed();
    2.0 * (encoder as f64 * encoder_tokens + decoder as f64 * decoder_tokens)
}

fn pretraining_work(config: &Config, settings: &Settings) -> f64 {
    let number = |name, default| number(settings, name, default);
    let one = forward(config, number("max-input-length", 512.0), number("max-target-length", 114.0));
    3.0 * one * number("batch-size", 32.0) * number("steps", 30_000.0)
}

/// Rows of a prompt or of keys, or tokens that are shown, before an input.
fn rows(method: Method, settings: &Settings, task: Load) -> f64 {
    match method {
        Method::Prompt | Method::Prefix | Method::Search => number(settings, "prompt-length", 100.0),
        Method::Text => number(settings, "shots", 4.0) * (task.input_tokens + ANSWER_TOKENS),
        Method::Model | Method::Adapter => 0.0,
    }
}

/// A step goes forward, backward to the activations and, where weights are trained, to them; a search tries its candidates besides.
fn training_work(config: &Config, method: Method, settings: &Settings, task: Load) -> f64 {
    let number = |name, default| number(settings, name, default);
    let rows = rows(method, settings, task);
    let one = forward(config, rows + task.input_tokens, ANSWER_TOKENS);
    let (passes, steps) = match method {
        Method::Model => (3.0, number("steps", 30_000.0)),
        Method::Search => (3.0 + number("candidates", 32.0), number("steps", 30_000.0)),
        Method::Text => (1.0, 1.0),
        Method::Prompt | Method::Prefix | Method::Adapter => (2.0, number("steps", 30_000.0)),
    };
    let evaluations = (steps / number("eval-every", 500.0)).ceil();
    one * (passes * steps * number("batch-size", 32.0) + evaluations * task.eval_examples)
}
