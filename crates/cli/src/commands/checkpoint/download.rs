//! A checkpoint as a directory: fetched, verified, and then there whole, or not at all.

use std::path::Path;

use anyhow::{Context, Result};
use incipit_proto::client::Client;
use incipit_proto::v1::{Checkpoint, CheckpointFile, GetBackboneRequest, GetJobRequest, TrainingSpec};
use incipit_tune::{atomic, checkpoint::MANIFEST};
use incipit_worker::spec::tasks;
use serde::Serialize;

use crate::args::Global;
use crate::cluster::names::short;
use crate::cluster::{blobs, call, show};
use crate::exit::bad_input;
use crate::output;
use crate::progress::{self, note};
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

/// Writes a checkpoint to a directory, and says how to use it. Of a job of several tasks that of `task`, or where that is empty of each in a
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
    let bytes = wanted.iter().map(|(_, file)| file.size).sum();
    let bar = progress::bytes_bar(bytes, global);
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
    atomic::write_dir(out, |staged| {
        files.iter().try_for_each(|(name, bytes)| {
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
    let settings = settings(client, checkpoint, of).await;
    let settings = settings.unwrap_or_else(|| " --model MODEL --data FILE".to_owned());
    note(&format!("measure it: incipit eval --prompt {}{settings}", place.display()));
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

/// The flags that a task of the checkpoint's job was trained with, as far as `eval` needs them; nothing where the job is gone.
async fn settings(client: &Client, checkpoint: &Checkpoint, task: &str) -> Option<String> {
    let (job, _) = checkpoint.name.split_once("/checkpoints/")?;
    let job = call!(client, jobs.get_job(GetJobRequest { name: job.to_owned() })).ok()?;
    let backbone = call!(client, backbones.get_backbone(GetBackboneRequest { name: job.backbone })).ok();
    let model = backbone.map_or_else(|| "MODEL".to_owned(), |backbone| backbone.model);
    let spec = job.spec.unwrap_or_default();
    let (_, [own, common]) = tasks(&spec).into_iter().find(|(name, _)| *name == task)?;
    Some(flags(&model, &[own, common]))
}

/// As the first of `specs` has them that says something.
fn flags(model: &str, specs: &[TrainingSpec]) -> String {
    let text =
        |value: fn(&TrainingSpec) -> Option<&String>| specs.iter().find_map(value).map(|text| quoted(text));
    let number = |value: fn(&TrainingSpec) -> Option<u32>| {
        specs.iter().find_map(value).map(|number| number.to_string())
    };
    let given = [
        ("model", Some(quoted(model))),
        ("inputs", text(|spec| spec.inputs.as_ref())),
        ("targets", text(|spec| spec.targets.as_ref())),
        ("labels", text(|spec| spec.labels.as_ref())),
        ("max-input-length", number(|spec| spec.max_input_length)),
        ("max-target-length", number(|spec| spec.max_target_length)),
    ];
    let flags: String =
        given.into_iter().filter_map(|(flag, value)| Some(format!(" --{flag} {}", value?))).collect();
    let data = match text(|spec| spec.task.as_ref()) {
        Some(task) => format!("--task {task} --data-dir DIR"),
        None => "--data FILE".to_owned(),
    };
    format!("{flags} {data}")
}

/// A word for a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn the_next_command_has_the_settings_of_the_job() {
        let spec = TrainingSpec {
            inputs: Some("question: {question}".into()),
            labels: Some("0=False,1=True".into()),
            max_input_length: Some(64),
            ..TrainingSpec::default()
        };
        let common = TrainingSpec { max_input_length: Some(512), ..TrainingSpec::default() };
        let flags = flags("google/t5", &[spec, common]);
        assert_eq!(
            flags,
            " --model google/t5 --inputs 'question: {question}' --labels 0=False,1=True --max-input-length 64 --data FILE"
        );
        let named = TrainingSpec { task: Some("boolq".into()), ..TrainingSpec::default() };
        assert_eq!(super::flags("m", &[named]), " --model m --task boolq --data-dir DIR");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
