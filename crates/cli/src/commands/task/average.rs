//! `incipit task average`: SuperGLUE's score, of what evaluations of its tasks printed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use incipit_data::metrics::Metric;
use incipit_data::tasks::{Family, Task, super_glue_average};
use serde::{Deserialize, Serialize};

use crate::exit::{BadInput, bad_input};
use crate::output::{self, Printed};
use crate::units::percent;

/// Flags of `task average`.
#[derive(Args)]
#[command(after_help = "\
The score is the mean over the eight tasks of the mean of each task's metrics, as SuperGLUE's site has it.

Example:
  for task in boolq cb copa multirc record rte wic wsc; do
      incipit eval --prompt runs/$task --task $task --data-dir SuperGLUE --json > $task.json
  done
  incipit task average *.json")]
pub(crate) struct AverageArgs {
    /// What `incipit eval --task NAME --json` printed, a file for each of SuperGLUE's tasks
    #[arg(value_name = "FILE.json", required = true)]
    files: Vec<PathBuf>,
}

/// What an evaluation printed.
#[derive(Deserialize)]
struct Evaluated {
    task: Option<String>,
    metrics: BTreeMap<String, f64>,
}

/// A task's metrics, each from 0 to 1.
type Scores = (&'static Task, Vec<(Metric, f64)>);

/// The score, and what it is made of.
#[derive(Serialize)]
pub(super) struct Average {
    average: f64,
    tasks: BTreeMap<&'static str, BTreeMap<&'static str, f64>>,
}

/// Reads the files.
///
/// # Errors
/// If one cannot be read or is not what an evaluation of a task of SuperGLUE by its own metrics prints, or a task is missing or there twice.
pub(super) fn average(args: &AverageArgs) -> Result<Average> {
    let scores = args.files.iter().map(|path| read(path)).collect::<Result<Vec<Scores>>>()?;
    let count = |task: &Task| scores.iter().filter(|(other, _)| other.name == task.name).count();
    for task in Task::all().filter(|task| task.family == Family::SuperGlue) {
        match count(task) {
            0 => {
                return bad_input(format!(
                    "{task} is missing: give what `incipit eval --task {task} --json` printed"
                ));
            }
            1 => {}
            several => return bad_input(format!("{several} files are of {task}: give one of each task")),
        }
    }
    let average = super_glue_average(&scores).context("no task has a score")?;
    let by_name = |(task, scores): &Scores| {
        (task.name, scores.iter().map(|(metric, value)| (metric.name(), *value)).collect())
    };
    Ok(Average { average, tasks: scores.iter().map(by_name).collect() })
}

fn read(path: &Path) -> Result<Scores> {
    let wrong = |what: String| BadInput(format!("{}: {what}", path.display()));
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let found: Evaluated = serde_json::from_str(&text)
        .map_err(|error| wrong(format!("it is not what `incipit eval --json` prints: {error}")))?;
    let Some(name) = found.task else {
        return Err(wrong("it is of no benchmark: evaluate with --task".to_owned()).into());
    };
    let task = Task::named(&name)?;
    if task.family != Family::SuperGlue {
        return Err(wrong(format!("{task} is none of SuperGLUE's tasks: leave it out")).into());
    }
    let own: BTreeSet<&str> = task.metrics.iter().map(|metric| metric.name()).collect();
    if own != found.metrics.keys().map(String::as_str).collect() {
        let own = own.into_iter().collect::<Vec<_>>().join(" and ");
        return Err(wrong(format!("{task} is measured by {own}: evaluate it without --metrics")).into());
    }
    let value = |metric: &Metric| (*metric, found.metrics[metric.name()]);
    Ok((task, task.metrics.iter().map(value).collect()))
}

impl Printed for Average {
    fn text(&self) -> String {
        let metrics = |scores: &BTreeMap<&str, f64>| {
            scores.iter().map(|(name, value)| format!("{name} {}", percent(*value))).collect::<Vec<_>>()
        };
        let row = |(task, scores): (&&str, &BTreeMap<&str, f64>)| {
            let mean = scores.values().sum::<f64>() / scores.len() as f64;
            vec![(*task).to_owned(), percent(mean), metrics(scores).join(", ")]
        };
        let mut rows: Vec<Vec<String>> = self.tasks.iter().map(row).collect();
        rows.push(vec!["SuperGLUE".to_owned(), percent(self.average), String::new()]);
        output::table(&["task", "score", "metrics"], &rows, false)
    }
}
