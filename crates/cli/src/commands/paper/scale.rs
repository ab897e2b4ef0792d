//! A scale: the models, the tasks, the settings and the suites of a reproduction, as a file says them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use incipit_data::tasks::{Split, Task};
use incipit_model::Config;
use incipit_tune::spec::{Method, PartialSpec};
use serde::Deserialize;

use crate::exit::{BadInput, bad_input};

/// Settings by the names of `train`'s flags.
pub(super) type Settings = toml::Table;

/// The model that suites name which are about one model alone: that of `--model`, or the scale's last.
pub(super) const MAIN: &str = "main";

/// Settings that a plan gives to its runs, or that only a person should.
const PLANNED: [&str; 14] = [
    "model",
    "train",
    "eval",
    "task",
    "data-dir",
    "out",
    "method",
    "seed",
    "device",
    "tp",
    "dp",
    "collective",
    "threads",
    "allow-other-backbone",
];

/// The scales that come with the program, each with its name.
pub(super) const BUILT_IN: [(&str, &str); 2] =
    [("tiny", include_str!("tiny.toml")), ("paper", include_str!("paper.toml"))];

/// How large a reproduction is.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Scale {
    /// What the scale is for, in a sentence.
    pub(super) about: String,
    /// Runs of each kind, which differ in their seed alone: 0, 1, ...
    pub(super) seeds: u64,
    /// What holds for every run that trains on a task, unless its method or suite says otherwise.
    pub(super) train: Settings,
    /// By method.
    #[serde(default)]
    pub(super) methods: BTreeMap<String, Settings>,
    /// How models are made, by the name of the stage.
    #[serde(default)]
    pub(super) stages: BTreeMap<String, Stage>,
    /// From the smallest to the largest.
    pub(super) models: Vec<Model>,
    pub(super) tasks: BTreeMap<String, TaskFiles>,
    #[serde(rename = "suite")]
    pub(super) suites: Vec<Suite>,
    /// What [`MAIN`] is, if not the last model.
    #[serde(skip)]
    main: Option<Model>,
}

/// How a model is made of text, or of itself at another stage.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Stage {
    /// The stage that it goes on from; none begins with random weights.
    pub(super) from: Option<String>,
    /// Flags of `pretrain`.
    pub(super) settings: Settings,
}

/// A model, at one or several stages of its training.
#[derive(Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Model {
    pub(super) name: String,
    pub(super) shape: Shape,
    /// Where it is found at a stage: a directory, or a name on the Hugging Face Hub. What is not found is made.
    #[serde(default)]
    pub(super) found: BTreeMap<String, String>,
}

/// The sizes of a T5 v1.1.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Shape {
    /// A published one.
    Preset(String),
    Sizes(Sizes),
    /// As the model's own files say.
    #[serde(skip)]
    Own(Option<Box<Config>>),
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Sizes {
    pub(super) d_model: usize,
    pub(super) d_ff: usize,
    pub(super) d_kv: usize,
    pub(super) num_heads: usize,
    pub(super) num_layers: usize,
}

/// A task's files below `--data-dir`, or a benchmark's name and folder.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct TaskFiles {
    /// The name of a benchmark.
    task: Option<String>,
    /// Its folder.
    folder: Option<PathBuf>,
    train: Option<PathBuf>,
    eval: Option<PathBuf>,
    inputs: Option<String>,
    targets: Option<String>,
    labels: Option<String>,
    metrics: Option<String>,
    /// Tokens of a usual input, for estimates of time.
    input_tokens: f64,
    /// Examples to evaluate on, for estimates of time.
    eval_examples: f64,
}

/// How much a task asks of a model, for estimates of time.
#[derive(Clone, Copy)]
pub(super) struct Load {
    /// Of a usual input.
    pub(super) input_tokens: f64,
    /// To evaluate on.
    pub(super) eval_examples: f64,
}

/// A table or figure.
#[derive(Deserialize)]
pub(super) struct Suite {
    pub(super) name: String,
    pub(super) title: String,
    /// How the scale departs from the paper here.
    pub(super) note: Option<String>,
    #[serde(flatten)]
    pub(super) kind: Kind,
}

/// What a suite compares.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Kind {
    /// Variants on each model, as the mean over the tasks.
    Models { models: Vec<String>, tasks: Vec<String>, variants: Vec<Variant> },
    /// Variants on each task, on one model; with what each trains.
    Tasks { model: String, tasks: Vec<String>, variants: Vec<Variant> },
    /// Variants trained on one task and measured on others.
    Transfer { model: String, pairs: Vec<Pair>, metrics: Vec<String>, variants: Vec<Variant> },
    /// Prompts that vote.
    Ensemble {
        model: String,
        tasks: Vec<String>,
        members: u64,
        #[serde(default)]
        settings: Settings,
    },
    /// What methods train on the published T5s; nothing is run.
    Parameters { variants: Vec<Variant> },
    /// The time until a variant is within a hundredth of what it comes to.
    Time { models: Vec<String>, task: String, variants: Vec<Variant> },
    /// Settings drawn from a space.
    Search { model: String, task: String, trials: u64, space: Vec<Dimension> },
}

/// What is compared with others.
#[derive(Clone, Deserialize)]
pub(super) struct Variant {
    pub(super) name: String,
    /// The stage of the model.
    #[serde(default = "adapted")]
    pub(super) stage: String,
    #[serde(default = "prompt")]
    pub(super) method: Method,
    /// Whether it learns all tasks of its suite at once, from inputs that begin with their task's name.
    #[serde(default)]
    pub(super) mixture: bool,
    /// The variant's own settings.
    #[serde(flatten)]
    pub(super) settings: Settings,
}

/// From one task to others.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pair {
    pub(super) from: String,
    pub(super) to: Vec<String>,
}

/// A setting of a search, and what it is drawn from.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Dimension {
    pub(super) setting: String,
    pub(super) values: Vec<toml::Value>,
}

/// The stage of a model that prompts are tuned on.
pub(super) fn adapted() -> String {
    "lm".to_owned()
}

fn prompt() -> Method {
    Method::Prompt
}

impl Scale {
    /// The text of the scale of a name or, where there is none, of a file.
    ///
    /// # Errors
    /// If there is neither.
    pub(super) fn text(name: &str) -> Result<String> {
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Ok((*text).to_owned()),
            None if Path::new(name).is_file() => {
                std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))
            }
            None => {
                let known = BUILT_IN.map(|(name, _)| name).join(", ");
                bad_input(format!("--scale {name} is neither one of {known} nor a file"))
            }
        }
    }

    /// Reads a scale.
    ///
    /// # Errors
    /// As [`Self::text`]; also if it says something that means nothing.
    pub(super) fn read(name: &str) -> Result<Self> {
        let text = Self::text(name)?;
        let scale: Self = toml::from_str(&text).map_err(|error| BadInput(format!("{name}: {error}")))?;
        scale.check().map_err(|what| BadInput(format!("{name}: {what}")).into()).map(|()| scale)
    }

    fn check(&self) -> Result<(), String> {
        if self.seeds == 0 || self.models.is_empty() {
            return Err("a scale has at least one seed and one model".to_owned());
        }
        for method in self.methods.keys() {
            method.parse::<Method>().map_err(|error| error.to_string())?;
        }
        let all = self.methods.values().chain([&self.train]).chain(self.stages.values().map(|s| &s.settings));
        let all = all.chain(self.suites.iter().flat_map(|suite| suite.kind.settings()));
        all.flat_map(Settings::iter).try_for_each(is_known)?;
        self.suites.iter().flat_map(|suite| suite.kind.space()).try_for_each(is_known)?;
        self.suites.iter().try_for_each(Suite::check_mixtures)?;
        let mut names: Vec<&str> = self.suites.iter().map(|suite| suite.name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(twice) => Err(format!("two suites are called {}", twice[0])),
            None => Ok(()),
        }
    }

    /// The suites of these names, in the scale's order; all where none is named.
    ///
    /// # Errors
    /// If there is none of a name.
    pub(super) fn named(&self, names: &[String]) -> Result<Vec<&Suite>> {
        let known = |name: &&String| !self.suites.iter().any(|suite| suite.name == **name);
        if let Some(unknown) = names.iter().find(known) {
            let all: Vec<&str> = self.suites.iter().map(|suite| suite.name.as_str()).collect();
            return bad_input(format!("there is no suite {unknown}; there are {}", all.join(", ")));
        }
        Ok(self.suites.iter().filter(|suite| names.is_empty() || names.contains(&suite.name)).collect())
    }

    /// The model of a name.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn model(&self, name: &str) -> Result<&Model> {
        let found = match name {
            MAIN => self.main.as_ref().or(self.models.last()),
            _ => self.models.iter().find(|model| model.name == name),
        };
        found.with_context(|| format!("the scale has no model {name}"))
    }

    /// Puts a model in the place of the scale's last, for what is about one model alone.
    ///
    /// # Errors
    /// If it is a directory without a T5's configuration.
    pub(super) fn put_main(&mut self, path: &str) -> Result<()> {
        let file = Path::new(path).join("config.json");
        let config = if Path::new(path).is_dir() {
            let text =
                std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            Some(Box::new(Config::from_json(&text).with_context(|| file.display().to_string())?))
        } else {
            None
        };
        self.main = Some(Model {
            name: MAIN.to_owned(),
            shape: Shape::Own(config),
            found: BTreeMap::from([(adapted(), path.to_owned())]),
        });
        Ok(())
    }

    /// The name of the model for what is about one alone, which a suite calls `name`.
    pub(super) fn sole<'a>(&self, name: &'a str) -> &'a str {
        if self.main.is_some() { MAIN } else { name }
    }

    /// What holds for a run of a variant: its own settings over those of its method over those of all.
    pub(super) fn settings(&self, variant: &Variant) -> Settings {
        let of_method = self.methods.get(&variant.method.to_string());
        let mut settings = self.train.clone();
        settings.extend(of_method.cloned().unwrap_or_default());
        settings.extend(variant.settings.clone());
        settings
    }
}

impl Model {
    /// Its shape, with `vocab_size` rows where the scale gives sizes alone; none if it is not known yet.
    ///
    /// # Errors
    /// If the scale names no published shape.
    pub(super) fn config(&self, vocab_size: usize) -> Result<Option<Config>> {
        Ok(match &self.shape {
            Shape::Own(config) => config.as_deref().cloned(),
            Shape::Preset(name) => Some(
                Config::preset(name)
                    .with_context(|| format!("model {}: there is no T5 v1.1 of size {name}", self.name))?,
            ),
            Shape::Sizes(sizes) => Some(Config {
                vocab_size,
                d_model: sizes.d_model,
                d_ff: sizes.d_ff,
                d_kv: sizes.d_kv,
                num_heads: sizes.num_heads,
                num_layers: sizes.num_layers,
                num_decoder_layers: sizes.num_layers,
                ..Config::preset("small").expect("a published size")
            }),
        })
    }
}

impl Suite {
    /// A mixture is of several tasks, which suites over models have.
    fn check_mixtures(&self) -> Result<(), String> {
        let may = matches!(&self.kind, Kind::Models { tasks, .. } if tasks.len() > 1);
        match self.kind.variants().iter().find(|variant| variant.mixture && !may) {
            Some(Variant { name, .. }) => Err(format!(
                "{name} of {} is a mixture, and only suites over models of several tasks have them",
                self.name
            )),
            None => Ok(()),
        }
    }
}

impl Kind {
    fn variants(&self) -> &[Variant] {
        match self {
            Self::Models { variants, .. }
            | Self::Tasks { variants, .. }
            | Self::Transfer { variants, .. }
            | Self::Parameters { variants }
            | Self::Time { variants, .. } => variants,
            Self::Ensemble { .. } | Self::Search { .. } => &[],
        }
    }

    fn settings(&self) -> Vec<&Settings> {
        let own = match self {
            Self::Ensemble { settings, .. } => Some(settings),
            _ => None,
        };
        self.variants().iter().map(|variant| &variant.settings).chain(own).collect()
    }

    /// What a search draws from.
    fn space(&self) -> Vec<(&String, &toml::Value)> {
        let Self::Search { space, .. } = self else { return Vec::new() };
        space.iter().flat_map(|d| d.values.iter().map(move |value| (&d.setting, value))).collect()
    }
}

/// Whether a setting is one of a run's that a scale may give.
fn is_known((name, value): (&String, &toml::Value)) -> Result<(), String> {
    if PLANNED.contains(&name.as_str()) {
        return Err(format!("{name} is decided by the plan of the runs: leave it out"));
    }
    let alone = Settings::from_iter([(name.clone(), value.clone())]);
    alone.try_into::<PartialSpec>().map(|_| ()).map_err(|error| error.message().to_owned())
}

impl TaskFiles {
    /// The flags that name what is trained on, and how it is read.
    pub(super) fn to_train(&self, data: &Path) -> Vec<String> {
        let files = [("--train", &self.train), ("--eval", &self.eval)];
        let files = files.into_iter().filter_map(|(flag, file)| Some(pair(flag, &data.join(file.as_ref()?))));
        self.benchmark(data).into_iter().chain(files.flatten()).chain(self.format()).collect()
    }

    /// What names it in a file of several tasks, by the names of the flags.
    pub(super) fn settings(&self, data: &Path) -> Settings {
        let at = |path: &Path| Some(data.join(path).display().to_string());
        let folder = self.task.as_ref().map(|_| self.folder.as_deref().unwrap_or(Path::new("")));
        let settings = [
            ("task", self.task.clone()),
            ("data-dir", folder.and_then(at)),
            ("train", self.train.as_deref().and_then(at)),
            ("eval", self.eval.as_deref().and_then(at)),
            ("inputs", self.inputs.clone()),
            ("targets", self.targets.clone()),
            ("labels", self.labels.clone()),
        ];
        let given = settings.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.into())));
        given.collect()
    }

    /// How much it asks of a model.
    pub(super) fn load(&self) -> Load {
        Load { input_tokens: self.input_tokens, eval_examples: self.eval_examples }
    }

    /// The flags that name what is evaluated on, and how it is read.
    pub(super) fn to_eval(&self, data: &Path) -> Vec<String> {
        let file = self.eval.iter().flat_map(|file| pair("--data", &data.join(file)));
        self.benchmark(data).into_iter().chain(file).chain(self.format()).collect()
    }

    fn benchmark(&self, data: &Path) -> Vec<String> {
        let Some(task) = &self.task else { return Vec::new() };
        let folder = data.join(self.folder.as_deref().unwrap_or(Path::new("")));
        let dir = pair("--data-dir", &folder);
        ["--task".to_owned(), task.clone()].into_iter().chain(dir).collect()
    }

    fn format(&self) -> Vec<String> {
        let flags = [
            ("--inputs", &self.inputs),
            ("--targets", &self.targets),
            ("--labels", &self.labels),
            ("--metrics", &self.metrics),
        ];
        let given = flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value.clone()?]));
        given.flatten().collect()
    }

    /// What of the files is not there, of those to train on and to evaluate on, or of these alone.
    pub(super) fn missing(&self, data: &Path, to_train: bool) -> Option<String> {
        if let Some(name) = &self.task {
            let dir = data.join(self.folder.as_deref().unwrap_or(Path::new("")));
            let splits: &[Split] = if to_train { &[Split::Train, Split::Dev] } else { &[Split::Dev] };
            let found = Task::named(name)
                .and_then(|task| splits.iter().try_for_each(|split| task.file(&dir, *split).map(|_| ())));
            return found.err().map(|error| error.to_string());
        }
        let files = [self.train.as_ref().filter(|_| to_train), self.eval.as_ref()];
        let gone = files.into_iter().flatten().map(|file| data.join(file)).find(|file| !file.is_file());
        gone.map(|file| format!("{} is missing", file.display()))
    }
}

fn pair(flag: &str, path: &Path) -> [String; 2] {
    [flag.to_owned(), path.display().to_string()]
}
