//! A checkpoint as a directory: fetched, verified, and then there whole, or not at all.

use std::path::Path;

use anyhow::{Context, Result};
use incipit_proto::client::Client;
use incipit_proto::v1::{
    Backbone, Checkpoint, CheckpointFile, DataSource, GetBackboneRequest, GetJobRequest, TrainingSpec,
    data_source,
};
use incipit_tune::spec::{PartialSpec, RUN_FILE};
use incipit_tune::{atomic, checkpoint::MANIFEST, multitask};
use incipit_worker::spec::{from_wire, path_of, tasks};
use serde::Serialize;
use tonic::Code;

use crate::args::Global;
use crate::cluster::names::short;
use crate::cluster::{Refusal, blobs, call, refusal, show};
use crate::commands::job::job_fields;
use crate::exit::bad_input;
use crate::output;
use crate::progress::{self, note, warn};
use crate::units;

/// What was written.
#[derive(Serialize)]
struct Downloaded<'a> {
    name: &'a str,
    step: u64,
    score: Option<f64>,
    out: &'a Path,
    files: usize,
    bytes: u64,
}

/// Refuses a directory that holds something: it would be lost.
///
/// # Errors
/// If it does, or cannot be looked into.
pub(crate) fn check_out(out: &Path) -> Result<()> {
    match std::fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => bad_input(format!("--out {} is not empty; name a new directory", out.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            bad_input(format!("--out {} is a file; name a new directory", out.display()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot look into --out {}", out.display())),
    }
}

/// Writes a checkpoint to a directory with the settings of its job, and says how to use it. Of a job of several tasks that of `task`, or where that is empty of each in a
/// directory of its name.
///
/// # Errors
/// If a file is not what the checkpoint says, or cannot be written; then nothing is there.
pub(crate) async fn download(
    client: &Client,
    (checkpoint, task): (&Checkpoint, &str),
    out: &Path,
    global: &Global,
) -> Result<()> {
    let wanted = of_task(checkpoint, task)?;
    let origin = Origin::find(client, checkpoint).await?;
    let run_files = origin.as_ref().map(|origin| origin.files(task)).transpose().unwrap_or_else(|error| {
        warn(&format!("the settings of its job are left out, for this program cannot read them: {error:#}"));
        None
    });
    let run_files = run_files.unwrap_or_default();
    let bytes = wanted.iter().map(|(_, file)| file.size).sum();
    let bar = progress::bytes_bar("fetching", bytes, global);
    let mut files = Vec::new();
    for (name, file) in &wanted {
        let fetched = blobs::fetch(client, file)
            .await
            .with_context(|| format!("{} is not usable", short(&checkpoint.name)))?;
        bar.inc(file.size);
        files.push((*name, fetched));
    }
    drop(bar);
    let manifest = manifest(&wanted);
    if !files.iter().any(|(name, _)| *name == MANIFEST) {
        files.push((MANIFEST, manifest.into_bytes()));
    }
    check_out(out)?;
    let made = run_files.iter().map(|(name, bytes)| (&**name, bytes));
    atomic::write_dir(out, |staged| {
        files.iter().map(|(name, bytes)| (*name, bytes)).chain(made).try_for_each(|(name, bytes)| {
            let path = staged.join(name);
            path.parent().map_or(Ok(()), atomic::create_dir)?;
            atomic::write_synced(&path, bytes)
        })
    })?;
    let of_task = checkpoint.tasks.iter().find(|of| of.name == task);
    let score = of_task.map_or(checkpoint.score, |task| task.score);
    let (step, count) = (checkpoint.step, files.len());
    let downloaded = Downloaded { name: &checkpoint.name, step, score, out, files: count, bytes };
    let text = || {
        output::facts([
            ("checkpoint", short(&checkpoint.name)),
            ("step", units::count(step)),
            ("score", show::score(score)),
            ("directory", out.display().to_string()),
            ("verified", format!("{count} files, {}", units::bytes(bytes))),
        ])
    };
    show::print(&downloaded, text, global)?;
    let all = checkpoint.tasks.first().filter(|_| task.is_empty());
    let (of, place) = match all {
        Some(first) => (&*first.name, out.join(&first.name)),
        None => (task, out.to_owned()),
    };
    match origin {
        Some(origin) => {
            note(&format!("measure it: incipit eval --prompt {}{}", place.display(), origin.flags(of)));
        }
        None => warn(
            "its job is gone, and with it what it was trained with: give `eval` and `generate` its model, templates, labels and metrics",
        ),
    }
    Ok(())
}

/// The files that are wanted, by the names that they get: of a task those in its directory, else all.
fn of_task<'a>(checkpoint: &'a Checkpoint, task: &str) -> Result<Vec<(&'a str, &'a CheckpointFile)>> {
    let named = |file: &'a CheckpointFile| match task {
        "" => Some((&*file.name, file)),
        task => Some((file.name.strip_prefix(task)?.strip_prefix('/')?, file)),
    };
    let files: Vec<_> = checkpoint.files.iter().filter_map(named).collect();
    if files.is_empty() {
        return bad_input(format!("{} has no files of a task {task:?}", short(&checkpoint.name)));
    }
    Ok(files)
}

/// The hashes of the files, in the form that `b3sum --check` reads.
fn manifest(files: &[(&str, &CheckpointFile)]) -> String {
    files.iter().map(|(name, file)| format!("{}  {name}\n", file.digest)).collect()
}

/// The settings of the job that has saved a checkpoint.
struct Origin {
    spec: TrainingSpec,
    /// None where it was deleted, or is another one.
    backbone: Option<Backbone>,
}

impl Origin {
    /// None where the job was deleted.
    async fn find(client: &Client, checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some((job, _)) = checkpoint.name.split_once("/checkpoints/") else { return Ok(None) };
        let job = call!(client, jobs.get_job(GetJobRequest { name: job.to_owned() }));
        let Some(job) = if_there(job)? else { return Ok(None) };
        let backbone = call!(client, backbones.get_backbone(GetBackboneRequest { name: job.backbone }));
        // Another one may have its name by now.
        let was = &*checkpoint.backbone_fingerprint;
        let is_it = |now: &str| now == was || now.is_empty() || was.is_empty();
        let backbone = if_there(backbone)?.filter(|backbone| is_it(&backbone.fingerprint));
        Ok(Some(Self { spec: job.spec.unwrap_or_default(), backbone }))
    }

    /// The `run.toml` of each task that is fetched, under the name that it gets.
    fn files(&self, task: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let all = tasks(&self.spec).into_iter();
        let wanted = all.filter(|(name, _)| task.is_empty() || *name == task);
        let file = |(name, [own, common]): (&str, [TrainingSpec; 2])| {
            if !name.is_empty() {
                // A name may not lead elsewhere.
                multitask::check_name(name)?;
            }
            let name = if task.is_empty() { Path::new(name).join(RUN_FILE) } else { RUN_FILE.into() };
            let settings = toml::to_string(&self.settings(own, common)?)?;
            let text =
                format!("# Written by incipit: the settings of the job that has saved this.\n{settings}");
            Ok((name.to_string_lossy().into_owned(), text.into_bytes()))
        };
        wanted.map(file).collect()
    }

    /// What a task was trained with.
    fn settings(&self, own: TrainingSpec, common: TrainingSpec) -> Result<PartialSpec> {
        let from_prompt = own.initial.is_some() || common.initial.is_some();
        let read = |spec| from_wire(&without_blobs(spec), path_of).map_err(refusal);
        let backbone = self.backbone.as_ref();
        // Empty is the default.
        let dtype = backbone.map(|backbone| &*backbone.dtype).filter(|dtype| !dtype.is_empty());
        let of_backbone = PartialSpec {
            model: backbone.map(|backbone| backbone.model.clone()),
            dtype: dtype.map(str::parse).transpose()?,
            ..PartialSpec::default()
        };
        let job = read(own)?.over(read(common)?).with_presets()?.over(job_fields(PartialSpec::defaults()));
        // The prompt that it began as is known by its digest alone.
        let prompt_init = job.prompt_init.filter(|_| !from_prompt);
        Ok(of_backbone.over(PartialSpec { prompt_init, ..job }))
    }

    /// What `eval` has to be told besides the prompt of a task.
    fn flags(&self, task: &str) -> String {
        let model = if self.backbone.is_some() { "" } else { " --model MODEL" };
        let of_task = tasks(&self.spec).into_iter().find(|(name, _)| *name == task);
        match of_task.and_then(|(_, [own, common])| own.task.or(common.task)) {
            Some(task) => format!("{model} --task {task} --data-dir DIR"),
            None => format!("{model} --data FILE"),
        }
    }
}

/// Without the files that the cluster has under their digests alone.
fn without_blobs(spec: TrainingSpec) -> TrainingSpec {
    let path = |source: Option<DataSource>| {
        source.filter(|source| matches!(source.source, Some(data_source::Source::Path(_))))
    };
    let prompt_init = spec.prompt_init.filter(|_| spec.initial.is_none());
    TrainingSpec { train: path(spec.train), eval: path(spec.eval), prompt_init, initial: None, ..spec }
}

/// What was asked for; nothing where it is gone.
fn if_there<T>(found: Result<T>) -> Result<Option<T>> {
    let is_gone = |error: &anyhow::Error| {
        error.downcast_ref::<Refusal>().is_some_and(|refusal| refusal.0.code == Code::NotFound)
    };
    match found {
        Err(error) if is_gone(&error) => Ok(None),
        found => found.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use incipit_data::metrics::Metric;
    use incipit_proto::v1::TrainingTask;
    use incipit_tune::rank::Predict;
    use incipit_tune::recipe::Recipe;
    use incipit_tune::spec::Precision;
    use incipit_worker::spec::{initial_of, to_wire};

    use super::*;

    #[test]
    fn a_directory_that_holds_something_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        check_out(dir.path()).unwrap();
        check_out(&dir.path().join("new/deep")).unwrap();
        let file = dir.path().join("mine.txt");
        std::fs::write(&file, "").unwrap();
        assert!(check_out(dir.path()).unwrap_err().to_string().contains("not empty"));
        assert!(check_out(&file).unwrap_err().to_string().contains("is a file"));
    }

    #[test]
    fn a_task_of_several_is_fetched_alone_or_all_are() {
        let file = |name: &str| CheckpointFile { name: name.to_owned(), ..CheckpointFile::default() };
        let files = ["a/MANIFEST", "a/prompt.safetensors", "ab/MANIFEST"].map(file).to_vec();
        let checkpoint = Checkpoint { files, ..Checkpoint::default() };
        let names = |task| {
            let files = of_task(&checkpoint, task).unwrap();
            files.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names("a"), ["MANIFEST", "prompt.safetensors"]);
        assert_eq!(names("ab"), ["MANIFEST"]);
        assert_eq!(names(""), ["a/MANIFEST", "a/prompt.safetensors", "ab/MANIFEST"]);
        assert!(of_task(&checkpoint, "b").unwrap_err().to_string().contains("no files of a task \"b\""));
    }

    fn path(path: &str) -> Option<DataSource> {
        let source = data_source::Source::Path(path.to_owned());
        Some(DataSource { source: Some(source), file_name: "a.jsonl".to_owned() })
    }

    fn read(file: &[u8]) -> PartialSpec {
        let file_on_disk = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file_on_disk.path(), file).unwrap();
        PartialSpec::read(file_on_disk.path()).unwrap()
    }

    #[test]
    fn a_run_file_has_all_that_a_job_was_trained_with_but_blobs() {
        let given = PartialSpec {
            labels: Some("0=False,1=True".into()),
            metrics: Some(vec![Metric::TokenF1, Metric::MacroF1]),
            predict: Some(Predict::Rank),
            target_sentinel: Some(true),
            recipe: Some(Recipe::ReleasedCode),
            max_input_length: Some(64),
            prompt_init: Some("file:another".into()),
            ..PartialSpec::default()
        };
        let digest = "ab".repeat(32);
        let spec = TrainingSpec {
            train: path("/data/a.jsonl"),
            eval: Some(initial_of(&digest)),
            initial: Some(initial_of(&digest)),
            ..to_wire(&given).unwrap()
        };
        let backbone = Backbone { model: "google/t5".into(), dtype: "f32".into(), ..Backbone::default() };
        let origin = Origin { spec, backbone: Some(backbone) };
        let files = origin.files("").unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(files[0].0, RUN_FILE);
        let job = given.with_presets().unwrap().over(job_fields(PartialSpec::defaults()));
        let expected = PartialSpec {
            model: Some("google/t5".into()),
            dtype: Some(Precision::F32),
            train: Some("/data/a.jsonl".into()),
            prompt_init: None,
            ..job
        };
        assert_eq!(read(&files[0].1), expected);
        assert_eq!(origin.flags(""), " --data FILE");
        let gone =
            Origin { spec: TrainingSpec { task: Some("boolq".into()), ..origin.spec }, backbone: None };
        assert_eq!(gone.flags(""), " --model MODEL --task boolq --data-dir DIR");
        let named = read(&gone.files("").unwrap()[0].1);
        assert_eq!((named.task.as_deref(), named.model), (Some("boolq"), None));
    }

    #[test]
    fn each_task_of_several_has_a_run_file_of_its_own() {
        let spec = |inputs: &str| TrainingSpec { inputs: Some(inputs.into()), ..TrainingSpec::default() };
        let task = |name: &str, inputs| TrainingTask { name: name.into(), spec: Some(spec(inputs)) };
        let tasks = vec![task("a", "of a: {x}"), task("b", "of b: {x}")];
        let common = TrainingSpec { max_input_length: Some(64), tasks, ..TrainingSpec::default() };
        let origin = Origin { spec: common, backbone: None };
        let of = |task: &str| origin.files(task).unwrap();
        let names: Vec<String> = of("").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a/run.toml", "b/run.toml"]);
        let [(name, file)] = &of("b")[..] else { panic!("one task, one file") };
        let settings = read(file);
        assert_eq!((&**name, settings.inputs.as_deref()), (RUN_FILE, Some("of b: {x}")));
        assert_eq!((settings.max_input_length, settings.model), (Some(64), None));
        assert_eq!(settings.prompt_init.as_deref(), Some("class-label"));
    }
}
