//! What a run leaves in its directory, as the report needs it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail};
use incipit_data::tasks::Task;
use incipit_tune::checkpoint;
use incipit_tune::log::{self, Line, METRICS_FILE};
use incipit_tune::spec::RUN_FILE;
use serde::Deserialize;

use crate::progress::PREDICTIONS_FILE;
use crate::units;

/// A target and what was decoded in its place: one line of `predictions.jsonl`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Prediction {
    pub(crate) inputs: String,
    pub(crate) target: String,
    pub(crate) prediction: String,
    /// Mean over the target's tokens.
    pub(crate) loss: Option<f64>,
}

impl Prediction {
    /// Whether the texts are the same, spaces around them aside.
    pub(crate) fn is_right(&self) -> bool {
        self.prediction.trim() == self.target.trim()
    }
}

/// One update.
pub(crate) struct Step {
    pub(crate) step: u64,
    pub(crate) loss: f64,
    pub(crate) lr: f64,
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    pub(crate) examples_per_second: f64,
}

/// One evaluation.
pub(crate) struct Evaluation {
    pub(crate) step: u64,
    pub(crate) loss: f64,
    /// What chooses the best: the metrics' mean, or the one that counts.
    pub(crate) score: f64,
    pub(crate) legal: Option<f64>,
    pub(crate) examples: usize,
    pub(crate) metrics: BTreeMap<String, f64>,
}

impl Evaluation {
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.get(name).copied()
    }
}

/// What the last checkpoint and the backbone's files tell; absent where they are gone.
#[derive(Default)]
pub(crate) struct RunFacts {
    pub(crate) fingerprint: Option<String>,
    pub(crate) parameters: Option<u64>,
    /// Numbers that were trained.
    pub(crate) trained: Option<u64>,
    /// Numbers that are left, where they are not those.
    pub(crate) kept: Option<u64>,
    /// Steps after which the last checkpoint was saved, and evaluations since the best one.
    saved: Option<(u64, u64)>,
}

impl RunFacts {
    fn read(out: &Path, settings: &toml::Table) -> Self {
        let mut facts = Self::default();
        if let Ok(last) = checkpoint::load(&out.join("last")) {
            // Of a prompt of tokens each counts as one number, as in the paper's figure 4.
            let tokens = last.state.tokens.as_ref().map(|tokens| tokens.len() as u64);
            let trained = tokens.unwrap_or_else(|| last.trained.num_parameters());
            facts.trained = Some(trained);
            let kept = last.trained.kept().ok().map(|kept| kept.num_parameters());
            facts.kept = kept.filter(|kept| tokens.is_none() && *kept != trained);
            facts.saved = Some((last.state.step, last.state.evaluations_since_best));
            facts.fingerprint = Some(last.state.backbone);
        }
        // A name on the hub is left alone: the report needs no network.
        let model = settings.get("model").and_then(toml::Value::as_str).map(Path::new).filter(|m| m.is_dir());
        let opened =
            model.and_then(|dir| incipit_weights::Checkpoint::open(dir, candle_core::DType::F32).ok());
        facts.parameters = opened.map(|weights| weights.num_parameters());
        facts
    }
}

/// A run's files, read.
pub(crate) struct Records {
    pub(crate) settings: toml::Table,
    pub(crate) steps: Vec<Step>,
    pub(crate) evaluations: Vec<Evaluation>,
    pub(crate) predictions: Vec<Prediction>,
    pub(crate) run: RunFacts,
    /// Of all steps and evaluations.
    pub(crate) seconds: f64,
}

impl Records {
    /// Reads `run.toml`, `metrics.jsonl`, the last checkpoint's state and, where there is one, `predictions.jsonl`.
    ///
    /// # Errors
    /// If one of them cannot be read or is not what a run writes; the message names the file and the line.
    pub(crate) fn read(out: &Path) -> Result<Self> {
        let run = out.join(RUN_FILE);
        let settings =
            std::fs::read_to_string(&run).with_context(|| format!("cannot read {}", run.display()))?;
        let settings: toml::Table =
            settings.parse().with_context(|| format!("{} is no TOML", run.display()))?;
        let mut records = Self {
            run: RunFacts::read(out, &settings),
            settings,
            steps: Vec::new(),
            evaluations: Vec::new(),
            predictions: predictions(&out.join(PREDICTIONS_FILE))?,
            seconds: 0.0,
        };
        for line in log::read(&out.join(METRICS_FILE))? {
            records.add(line);
        }
        Ok(records)
    }

    fn add(&mut self, line: Line) {
        match line {
            Line::Step { step, loss, lr, seconds, examples_per_s, tokens_per_s, .. } => {
                self.seconds += seconds;
                self.steps.push(Step {
                    step,
                    loss,
                    lr: f64::from(lr),
                    seconds,
                    tokens_per_second: tokens_per_s,
                    examples_per_second: examples_per_s,
                });
            }
            Line::Eval { step, loss, score, legal_share, examples, metrics, seconds } => {
                self.seconds += seconds;
                let metrics =
                    metrics.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
                let metrics = metrics.collect();
                self.evaluations.push(Evaluation {
                    step,
                    loss,
                    score,
                    legal: legal_share,
                    examples,
                    metrics,
                });
            }
        }
    }

    /// The setting as text, or nothing where the run has none.
    pub(crate) fn setting(&self, key: &str) -> String {
        self.settings.get(key).map(shown).unwrap_or_default()
    }

    /// The backbone's name: the last part of its path or Hub id that tells something.
    pub(crate) fn model_name(&self) -> String {
        telling(incipit_weights::split_revision(&self.setting("model")).0.rsplit('/'), &["model", "models"])
    }

    /// What the run is about: the name of its data on its backbone.
    pub(crate) fn title(&self) -> String {
        let train = self.task().map_or_else(|| self.setting("train"), |task| task.name.to_owned());
        let without_endings = train.rsplit('/').map(|part| part.split('.').next().unwrap_or_default());
        let data = telling(without_endings, &["train", "training", "data", "dataset"]);
        let model = self.model_name();
        if data == model { data } else { format!("{data} on {model}") }
    }

    /// A setting that is a whole number.
    fn number(&self, key: &str) -> Option<u64> {
        self.settings.get(key).and_then(toml::Value::as_integer).and_then(|n| n.try_into().ok())
    }

    /// Why the run ended, in words that follow "trained for 300 steps".
    pub(crate) fn ending(&self) -> &'static str {
        let (step, since_best) = self.run.saved.unwrap_or_default();
        if self.number("steps").is_some_and(|steps| step >= steps) {
            ""
        } else if self.number("patience").is_some_and(|patience| since_best >= patience) {
            ", then stopped because nothing better came"
        } else {
            " so far"
        }
    }

    /// The benchmark that the run is about, if it is known by name.
    pub(crate) fn task(&self) -> Option<&'static Task> {
        Task::named(&self.setting("task")).ok()
    }

    /// The label texts of the benchmark, or those that `run.toml` names, in its order.
    pub(crate) fn labels(&self) -> Vec<String> {
        if let Some(task) = self.task() {
            return task.label_texts().unwrap_or_default();
        }
        let labels = self.setting("labels");
        let text = |pair: &str| pair.split_once('=').map(|(_, text)| text.trim().to_owned());
        let mut seen = Vec::new();
        for label in labels.split(',').filter_map(text) {
            if !seen.contains(&label) {
                seen.push(label);
            }
        }
        seen
    }

    pub(crate) fn last_step(&self) -> u64 {
        let evaluated = self.evaluations.last().map_or(0, |e| e.step);
        self.steps.last().map_or(evaluated, |s| s.step.max(evaluated))
    }

    /// Every metric that was measured, each once.
    pub(crate) fn metric_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for name in self.evaluations.iter().flat_map(|e| e.metrics.keys()) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// The first evaluation than which none is better.
    pub(crate) fn best(&self) -> Option<&Evaluation> {
        let mut best: Option<&Evaluation> = None;
        for evaluation in &self.evaluations {
            if best.is_none_or(|b| evaluation.score > b.score) {
                best = Some(evaluation);
            }
        }
        best
    }

    /// The share of the most frequent target, where the targets are classes.
    pub(crate) fn majority(&self) -> Option<f64> {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for prediction in &self.predictions {
            *counts.entry(prediction.target.as_str()).or_default() += 1;
        }
        let most = *counts.values().max()?;
        (counts.len() <= 50 && most > 1).then(|| most as f64 / self.predictions.len() as f64)
    }

    /// The middle one of the steps' rates: a pause does not move it.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        median(self.steps.iter().map(|s| s.tokens_per_second).collect())
    }

    pub(crate) fn examples_per_second(&self) -> Option<f64> {
        median(self.steps.iter().map(|s| s.examples_per_second).collect())
    }
}

/// The first of `names` that is not among the `generic` ones; the first of all where there is none.
fn telling<'a>(names: impl Iterator<Item = &'a str>, generic: &[&str]) -> String {
    let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
    let first = names.iter().find(|name| !generic.contains(name)).or(names.first());
    first.copied().unwrap_or_default().to_owned()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// A TOML value as people write it: no quotes around text, and whole lists on one line.
pub(crate) fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(n) => u64::try_from(*n).map_or_else(|_| n.to_string(), units::count),
        toml::Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// The best evaluation's predictions; none where nothing was evaluated.
fn predictions(path: &Path) -> Result<Vec<Prediction>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    };
    let parsed = |(i, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| format!("{}, line {}: no prediction", path.display(), i + 1))
    };
    text.lines().enumerate().map(parsed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_named_by_the_parts_of_its_paths_that_tell_something() {
        for (train, model, title) in [
            ("data/subj/train.jsonl", "models/t5-v1.1/", "subj on t5-v1.1"),
            ("data/subj/train.jsonl", "google/t5-small@refs/pr/3", "subj on t5-small"),
            ("questions.csv.gz", "google/t5-base", "questions on t5-base"),
            ("/tmp/demo/data/train.jsonl", "/tmp/demo/model", "demo"),
            ("train.jsonl", "model", "train on model"),
        ] {
            let settings = toml::Table::from_iter(
                [("train", train), ("model", model)].map(|(k, v)| (k.to_owned(), v.into())),
            );
            let run = RunFacts::default();
            let records = Records {
                settings,
                steps: vec![],
                evaluations: vec![],
                predictions: vec![],
                run,
                seconds: 0.0,
            };
            assert_eq!(records.title(), title);
        }
    }
}
