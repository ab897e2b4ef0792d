//! A checkpoint as a directory: fetched, verified, and then there whole, or not at all.

use std::path::Path;

use anyhow::{Context, Result};
use incipit_proto::client::Client;
use incipit_proto::v1::{Checkpoint, GetBackboneRequest, GetJobRequest, TrainingSpec};
use incipit_tune::{atomic, checkpoint::MANIFEST};
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

/// Writes a checkpoint to a directory, and says how to use it.
///
/// # Errors
/// If a file is not what the checkpoint says, or cannot be written; then nothing is there.
pub(crate) async fn download(
    client: &Client,
    checkpoint: &Checkpoint,
    out: &Path,
    global: &Global,
) -> Result<()> {
    let bytes = checkpoint.files.iter().map(|file| file.size).sum();
    let bar = progress::bytes_bar(bytes, global);
    let mut files = Vec::new();
    for file in &checkpoint.files {
        let fetched = blobs::fetch(client, file)
            .await
            .with_context(|| format!("{} is not usable", short(&checkpoint.name)))?;
        bar.inc(file.size);
        files.push((&*file.name, fetched));
    }
    drop(bar);
    let manifest = manifest(checkpoint);
    if !files.iter().any(|(name, _)| *name == MANIFEST) {
        files.push((MANIFEST, manifest.into_bytes()));
    }
    check_out(out)?;
    atomic::write_dir(out, |staged| {
        files.iter().try_for_each(|(name, bytes)| atomic::write_synced(&staged.join(name), bytes))
    })?;
    let (step, score, count) = (checkpoint.step, checkpoint.score, files.len());
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
    let settings = settings(client, checkpoint).await.unwrap_or_else(|| " --model MODEL".to_owned());
    note(&format!("measure it: incipit eval --prompt {}{settings} --data FILE", out.display()));
    Ok(())
}

/// The hashes of the files, in the form that `b3sum --check` reads.
fn manifest(checkpoint: &Checkpoint) -> String {
    checkpoint.files.iter().map(|file| format!("{}  {}\n", file.digest, file.name)).collect()
}

/// The flags that the checkpoint's job was trained with, as far as `eval` needs them; nothing where the job is gone.
async fn settings(client: &Client, checkpoint: &Checkpoint) -> Option<String> {
    let (job, _) = checkpoint.name.split_once("/checkpoints/")?;
    let job = call!(client, jobs.get_job(GetJobRequest { name: job.to_owned() })).ok()?;
    let backbone = call!(client, backbones.get_backbone(GetBackboneRequest { name: job.backbone })).ok();
    let model = backbone.map_or_else(|| "MODEL".to_owned(), |backbone| backbone.model);
    Some(flags(&model, &job.spec.unwrap_or_default()))
}

fn flags(model: &str, spec: &TrainingSpec) -> String {
    let mut text = format!(" --model {}", quoted(model));
    for (flag, value) in [("inputs", &spec.inputs), ("targets", &spec.targets), ("labels", &spec.labels)] {
        if let Some(value) = value {
            text.push_str(&format!(" --{flag} {}", quoted(value)));
        }
    }
    for (flag, value) in
        [("max-input-length", spec.max_input_length), ("max-target-length", spec.max_target_length)]
    {
        if let Some(value) = value {
            text.push_str(&format!(" --{flag} {value}"));
        }
    }
    text
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
    fn the_next_command_has_the_settings_of_the_job() {
        let spec = TrainingSpec {
            inputs: Some("question: {question}".into()),
            labels: Some("0=False,1=True".into()),
            max_input_length: Some(64),
            ..TrainingSpec::default()
        };
        let flags = flags("google/t5", &spec);
        assert_eq!(
            flags,
            " --model google/t5 --inputs 'question: {question}' --labels 0=False,1=True --max-input-length 64"
        );
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
