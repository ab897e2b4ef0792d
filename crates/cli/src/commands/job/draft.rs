//! What a job is told: flags and files, checked as `incipit train` checks them, or of several tasks `incipit multitask`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use incipit_data::tasks::{Split, Task};
use incipit_proto::client::Client;
use incipit_proto::v1::data_source::Source;
use incipit_proto::v1::{Backbone, TrainingSpec, TrainingTask};
use incipit_tune::check::check_texts;
use incipit_tune::multitask;
use incipit_tune::spec::{PartialSpec, TrainSpec};
use incipit_worker::spec::to_wire;

use super::plan::Examples;
use super::start::Start;
use crate::args::Global;
use crate::cluster::blobs::LocalFile;
use crate::cluster::refusal;
use crate::examples::{texts, trained_elsewhere};
use crate::exit::bad_input;
use crate::progress::{self, note};

/// The settings of a job.
pub(super) struct Draft {
    /// One without a name, or several that share rows.
    tasks: Vec<DraftTask>,
    /// The model that was named.
    pub(super) model: Option<String>,
    /// Whether the files are on the workers' machines.
    on_workers: bool,
}

struct DraftTask {
    name: String,
    /// What was given, as it is handed in: the rest comes from the recipe and the defaults where it is trained.
    given: PartialSpec,
    /// The whole, checked.
    whole: TrainSpec,
    start: Start,
    /// Whether the prompt to start as may be of another backbone.
    any_backbone: bool,
}

impl Draft {
    /// The job of `given`, over which `tasks` is a file with a table for each of several tasks.
    ///
    /// # Errors
    /// If the settings mean nothing, or the tasks cannot share rows.
    pub(super) fn resolve(given: PartialSpec, tasks: Option<&Path>, on_workers: bool) -> Result<Self> {
        let mut model = given.model.clone();
        let tasks = match tasks {
            Some(path) => {
                let (tasks, of_all) = several(&given, path, on_workers)?;
                model = of_all;
                tasks
            }
            None if given.shared_length.is_some() => {
                return bad_input(
                    "--shared-length is of several tasks: give a file with a table for each with --tasks",
                );
            }
            None => vec![DraftTask::resolve(String::new(), given, on_workers)?],
        };
        Ok(Self { tasks, model, on_workers })
    }

    /// The whole specifications of the tasks.
    pub(super) fn specs(&self) -> Vec<&TrainSpec> {
        self.tasks.iter().map(|task| &task.whole).collect()
    }

    /// The job as it is handed in. Files are named by their paths.
    ///
    /// # Errors
    /// If something cannot be written down, or is nothing that a job can do.
    pub(super) fn wire(&self) -> Result<TrainingSpec> {
        let [first, _, ..] = &self.tasks[..] else {
            return to_wire(&self.tasks[0].given).map_err(refusal);
        };
        let (common, _) = multitask::divide(first.given.clone());
        let task = |task: &DraftTask| {
            let (_, own) = multitask::divide(task.given.clone());
            Ok(TrainingTask { name: task.name.clone(), spec: Some(to_wire(&own).map_err(refusal)?) })
        };
        let tasks = self.tasks.iter().map(task).collect::<Result<_>>()?;
        Ok(TrainingSpec { tasks, ..to_wire(&common).map_err(refusal)? })
    }

    /// Reads the files of this machine as a run would, so that a bad record is told before anything is sent, and puts their digests into
    /// `wire`.
    ///
    /// # Errors
    /// If one cannot be read, or a record does not fit.
    pub(super) fn read(&self, wire: &mut TrainingSpec, global: &Global) -> Result<Data> {
        let mut data = Data::default();
        if !self.on_workers {
            let _spinner = progress::spinner("reading the examples", global);
            for (task, wire) in self.tasks.iter().zip(of_tasks(wire)) {
                data.read(&task.whole, wire)?;
            }
        }
        data.files.extend(self.tasks.iter().filter_map(|task| task.start.file().cloned()));
        Ok(data)
    }

    /// Puts the prompts to start as into `wire`.
    ///
    /// # Errors
    /// As [`Start::source`].
    pub(super) async fn start(
        &self,
        wire: &mut TrainingSpec,
        client: &Client,
        backbone: &Backbone,
    ) -> Result<()> {
        for (task, wire) in self.tasks.iter().zip(of_tasks(wire)) {
            wire.initial = task.start.source(client, backbone, task.any_backbone).await?;
        }
        Ok(())
    }
}

/// What is said of each task: of one alone that is the whole.
fn of_tasks(wire: &mut TrainingSpec) -> Vec<&mut TrainingSpec> {
    if wire.tasks.is_empty() {
        return vec![wire];
    }
    wire.tasks.iter_mut().filter_map(|task| task.spec.as_mut()).collect()
}

/// Several tasks that share rows: a table of the file for each, and over it what is `given` for all. And the model that all name.
fn several(given: &PartialSpec, path: &Path, on_workers: bool) -> Result<(Vec<DraftTask>, Option<String>)> {
    if given.train.is_some() || given.eval.is_some() || given.task.is_some() {
        return bad_input(
            "--train, --eval and --task are for one task: give a table for each in the file of --tasks",
        );
    }
    let mut models = Vec::new();
    let task = |(name, of_task): (String, PartialSpec)| {
        multitask::check_name(&name)?;
        tell_ignored(&format!("{} [{name}]", path.display()), &of_task);
        let whole = given.clone().over(of_task);
        models.push(whole.model.clone());
        DraftTask::resolve(name, whole, on_workers)
    };
    let tasks = PartialSpec::read_several(path)?.into_iter().map(task).collect::<Result<Vec<_>>>()?;
    let model = models.first().cloned().flatten();
    if models.iter().any(|other| *other != model) {
        return bad_input("--model differs between tasks that share rows; say it once, on the command line");
    }
    multitask::check(&tasks.iter().map(|task| &task.whole).collect::<Vec<_>>())?;
    Ok((tasks, model))
}

impl DraftTask {
    fn resolve(name: String, given: PartialSpec, on_workers: bool) -> Result<Self> {
        let any_backbone = given.allow_other_backbone.unwrap_or(false);
        let mut given = job_fields(given);
        if on_workers && given.data_dir.is_some() {
            return bad_input(
                "--data-dir is a directory of this machine: of files on the workers' give those of the splits, with --train and --eval",
            );
        }
        given = of_splits(given)?;
        let promoted = Start::promoted(&mut given)?;
        let whole = trained_elsewhere(given.clone())?;
        let start = promoted.map_or_else(|| Start::read(&whole), Ok)?;
        Ok(Self { name, given, whole, start, any_backbone })
    }
}

/// A job takes files: in the place of a benchmark's directory come those of its splits.
fn of_splits(job: PartialSpec) -> Result<PartialSpec> {
    let (Some(name), Some(dir), None, None) = (&job.task, &job.data_dir, &job.train, &job.eval) else {
        return Ok(job);
    };
    let task = Task::named(name)?;
    let train = task.file(dir, Split::Train)?;
    let has_eval = task.splits().any(|split| split == Split::Dev);
    let eval = has_eval.then(|| task.file(dir, Split::Dev)).transpose()?;
    if eval.as_ref() == Some(&train) {
        return bad_input(format!(
            "{} has two splits of {task} in one, which a list beside it tells apart, and a job takes a file for each: write them with \
             `incipit task export {task} --data-dir DIR --split train --output train.jsonl`, and hand these in with --train and --eval",
            train.display()
        ));
    }
    Ok(PartialSpec { data_dir: None, train: Some(train), eval, ..job })
}

/// Without what the backbone and the worker decide.
pub(crate) fn job_fields(given: PartialSpec) -> PartialSpec {
    PartialSpec {
        model: None,
        out: None,
        device: None,
        dtype: None,
        tp: None,
        dp: None,
        collective: None,
        microbatch_tokens: None,
        recompute: None,
        allow_other_backbone: None,
        threads: None,
        ..given
    }
}

/// Says which settings of a file, or of a table in one, have no meaning for a job.
pub(super) fn tell_ignored(place: &str, file: &PartialSpec) {
    let ignored = ignored(file);
    if !ignored.is_empty() {
        note(&format!(
            "{place}: {} {} left to the backbone and the worker",
            ignored.join(", "),
            if ignored.len() == 1 { "is" } else { "are" }
        ));
    }
}

fn ignored(file: &PartialSpec) -> Vec<&'static str> {
    let given = [
        ("out", file.out.is_some()),
        ("device", file.device.is_some()),
        ("dtype", file.dtype.is_some()),
        ("tp", file.tp.is_some()),
        ("dp", file.dp.is_some()),
        ("collective", file.collective.is_some()),
        ("microbatch-tokens", file.microbatch_tokens.is_some()),
        ("recompute", file.recompute.is_some()),
        ("threads", file.threads.is_some()),
    ];
    given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
}

/// The files of this machine.
#[derive(Default)]
pub(super) struct Data {
    pub(super) files: Vec<LocalFile>,
    /// Of each task; none where they are on the workers.
    pub(super) examples: Vec<Examples>,
}

impl Data {
    /// Reads a task's files.
    fn read(&mut self, spec: &TrainSpec, wire: &mut TrainingSpec) -> Result<()> {
        let all = |path: &Path, split| texts(spec, path, split, |_| true);
        let train = all(&spec.train, Split::Train)?;
        check_texts(spec, &train)?;
        let eval = spec.eval.as_deref().map(|path| all(path, Split::Dev)).transpose()?;
        let files: [(_, Option<&PathBuf>); 2] =
            [(&mut wire.train, Some(&spec.train)), (&mut wire.eval, spec.eval.as_ref())];
        for (source, path) in files {
            if let (Some(source), Some(path)) = (source, path) {
                let file = LocalFile::read(path)?;
                source.source = Some(Source::Digest(file.digest.clone()));
                self.files.push(file);
            }
        }
        self.examples.push(Examples::count(spec, &train, eval.as_deref()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_decides_is_no_part_of_a_job() {
        let file = PartialSpec {
            model: Some("m".into()),
            out: Some("o".into()),
            threads: Some(2),
            lr: Some(0.5),
            ..PartialSpec::default()
        };
        assert_eq!(ignored(&file), ["out", "threads"]);
        assert_eq!(job_fields(file), PartialSpec { lr: Some(0.5), ..PartialSpec::default() });
        assert_eq!(ignored(&PartialSpec::defaults()).len(), 6);
    }
}
