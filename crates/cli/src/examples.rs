//! Examples of this machine's files, read as a training run reads them.

use std::path::Path;

use anyhow::Result;
use incipit_data::tasks::{Split, TaskExample, Use};
use incipit_data::{LoadOptions, TextExample, load_text};
use incipit_tune::spec::{PartialSpec, TrainSpec};

use crate::progress::{note, warn};

/// What stands for the fields of a run that examples have no use for.
const ELSEWHERE: &str = "elsewhere";

/// The specification of what is read here and trained elsewhere, if at all.
///
/// # Errors
/// If a field means nothing.
pub(crate) fn trained_elsewhere(given: PartialSpec) -> Result<TrainSpec> {
    let elsewhere = PartialSpec {
        model: Some(ELSEWHERE.to_owned()),
        out: Some(ELSEWHERE.into()),
        ..PartialSpec::default()
    };
    Ok(TrainSpec::resolve(elsewhere.over(given), None, false)?)
}

/// The texts at `path`, one of the specification's places of examples. Of a named task those that are `wanted`.
///
/// # Errors
/// If they cannot be read, or a record does not fit.
pub(crate) fn texts(
    spec: &TrainSpec,
    path: &Path,
    split: Split,
    wanted: impl Fn(&TaskExample) -> bool,
) -> Result<Vec<TextExample>> {
    let options = LoadOptions { skip_bad_records: spec.skip_bad_records };
    let (examples, skipped, first) = match spec.task {
        Some(task) => {
            let file = match spec.data_dir {
                Some(_) => task.file(path, split)?,
                None => path.to_owned(),
            };
            let found = task.open(&file, split, Use::of(split))?.read(options)?;
            found.left_out().iter().for_each(|said| note(said));
            let texts = found.examples.into_iter().filter(wanted).map(|example| example.text);
            (texts.collect(), found.skipped, found.first_skipped)
        }
        None => {
            let loaded = load_text(path, &spec.task_format()?, options)?;
            (loaded.examples, loaded.skipped, loaded.first_skipped)
        }
    };
    if let Some(first) = first.first() {
        warn(&format!("{skipped} records of {} are left out; the first: {first}", path.display()));
    }
    Ok(examples)
}
