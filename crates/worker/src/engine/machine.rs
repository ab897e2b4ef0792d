//! What a backbone decides of a job's specification.

use std::path::PathBuf;

use incipit_proto::{Problem, v1};
use incipit_tune::device::DeviceChoice;
use incipit_tune::spec::{PartialSpec, Precision, TrainSpec};

use crate::engine::failure::Result;
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
    /// The whole specification of a job, whose examples lie in these files. Nothing is written to a directory of its own.
    ///
    /// # Errors
    /// If a value means nothing, or is impossible.
    pub(crate) fn spec(&self, wire: &v1::TrainingSpec, train: &str, eval: &str) -> Result<TrainSpec> {
        let wire = v1::TrainingSpec { train: None, eval: None, ..wire.clone() };
        let given =
            spec::from_wire(&wire, |_| Err(Problem::field("spec", "has a file where there is none")))?;
        let given = PartialSpec {
            model: Some(self.model.clone()),
            dtype: Some(self.dtype),
            device: Some(self.device.to_string()),
            train: Some(train.into()),
            eval: (!eval.is_empty()).then(|| eval.into()),
            out: Some(PathBuf::from("the coordinator")),
            ..given
        };
        Ok(TrainSpec::resolve(given, None, false)?)
    }
}
