//! What a backbone decides of a job's specification.

use std::path::PathBuf;

use incipit_proto::{Problem, v1};
use incipit_tune::device::DeviceChoice;
use incipit_tune::multitask;
use incipit_tune::spec::{PartialSpec, Precision, TrainSpec};

use crate::engine::failure::Result;
use crate::engine::resident::of_task;
use crate::frames::LocalTask;
use crate::spec;

/// The part of a specification that is the backbone's, and not the job's.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// The model's name.
    pub(crate) model: String,
    /// Type of its weights.
    pub(crate) dtype: Precision,
    /// Where it computes.
    pub(crate) device: DeviceChoice,
}

impl Machine {
    /// The whole specifications of a job's tasks, whose examples lie in these files, by the tasks' names. Nothing is written to a directory
    /// of their own.
    ///
    /// # Errors
    /// If a value means nothing, or is impossible, or the tasks cannot share rows.
    pub(crate) fn specs(
        &self,
        wire: &v1::TrainingSpec,
        files: &[LocalTask],
    ) -> Result<Vec<(String, TrainSpec)>> {
        let tasks = spec::tasks(wire);
        if tasks.len() != files.len() {
            let what = format!("has {} tasks, and there are files of {}", tasks.len(), files.len());
            return Err(Problem::field("spec.tasks", what).into());
        }
        let whole = |((name, [own, common]), files): ((&str, [_; 2]), &LocalTask)| {
            let given = examples_aside(own)?.over(examples_aside(common)?);
            let spec = self.spec(given, files).map_err(|failure| of_task(name, failure))?;
            Ok((name.to_owned(), spec))
        };
        let specs = tasks.into_iter().zip(files).map(whole).collect::<Result<Vec<_>>>()?;
        if !wire.tasks.is_empty() || wire.shared_length.is_some() {
            multitask::check(&specs.iter().map(|(_, spec)| spec).collect::<Vec<_>>())?;
            specs.iter().try_for_each(|(name, _)| multitask::check_name(name))?;
        }
        Ok(specs)
    }

    fn spec(&self, given: PartialSpec, files: &LocalTask) -> Result<TrainSpec> {
        let given = PartialSpec {
            model: Some(self.model.clone()),
            dtype: Some(self.dtype),
            device: Some(self.device.to_string()),
            train: Some((&files.train).into()),
            eval: (!files.eval.is_empty()).then(|| (&files.eval).into()),
            out: Some(PathBuf::from("the coordinator")),
            ..given
        };
        Ok(TrainSpec::resolve(given, None, false)?)
    }
}

/// The settings, without the files of examples.
fn examples_aside(wire: v1::TrainingSpec) -> Result<PartialSpec> {
    let wire = v1::TrainingSpec { train: None, eval: None, ..wire };
    Ok(spec::from_wire(&wire, |_| Err(Problem::field("spec", "has a file where there is none")))?)
}
