//! The prompt that a job starts as, where that is another task's (Vu et al. 2022).

use anyhow::Result;
use incipit_proto::client::Client;
use incipit_proto::v1::{Backbone, DataSource, GetPromptVersionRequest};
use incipit_tune::checkpoint;
use incipit_tune::init::PromptInit;
use incipit_tune::placement::PromptLayers;
use incipit_tune::prompt::Prompt;
use incipit_tune::spec::{PartialSpec, TrainSpec};
use incipit_worker::spec::initial_of;

use crate::cluster::blobs::LocalFile;
use crate::cluster::call;
use crate::cluster::names::{self, short};
use crate::exit::bad_input;

/// What `--prompt-init` begins with for a prompt of the cluster's registry.
const PROMOTED: &str = "prompt:";

/// What a job starts as.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// A prompt that is made where the job is trained.
    Made,
    /// A prompt of this machine, to be handed in, and the fingerprint of the backbone on which it was trained, if its files tell.
    Here(LocalFile, Option<String>),
    /// A version of a promoted prompt, by its whole name.
    Promoted(String),
}

impl Start {
    /// A promoted prompt, if `job` names one. In its place `job` gets a file, which is what the worker makes of it.
    ///
    /// # Errors
    /// If it is no name of a prompt.
    pub(super) fn promoted(job: &mut PartialSpec) -> Result<Option<Self>> {
        let Some(name) = job.prompt_init.as_deref().and_then(|init| init.strip_prefix(PROMOTED)) else {
            return Ok(None);
        };
        match names::prompt_version(name) {
            Ok(version) => {
                job.prompt_init = Some(format!("file:{name}"));
                Ok(Some(Self::Promoted(version)))
            }
            Err(what) => bad_input(format!("--prompt-init prompt:{name}: {what}")),
        }
    }

    /// What else the specification starts from: a prompt of this machine is read.
    ///
    /// # Errors
    /// If it holds no prompt, one of another length, or one with rows for every layer where the job's has them for the first.
    pub(super) fn read(spec: &TrainSpec) -> Result<Self> {
        let PromptInit::File(path) = &spec.prompt_init else { return Ok(Self::Made) };
        let prompt = Prompt::read(path)?;
        if prompt.num_layers() != 1 && spec.prompt_layers == PromptLayers::First {
            return bad_input(format!(
                "--prompt-init {}: it has rows for {} layers; give --prompt-layers all, or a prompt of one layer",
                spec.prompt_init,
                prompt.num_layers()
            ));
        }
        // Rows that tasks share begin otherwise.
        let shared = spec.shared_length.unwrap_or_default();
        let (length, given) = (prompt.length(), spec.prompt_length - shared);
        if length != given {
            return bad_input(format!(
                "--prompt-init {}: it has {length} rows, not {given}; give --prompt-length {}",
                spec.prompt_init,
                length + shared
            ));
        }
        let file = LocalFile::made(path, checkpoint::prompt_bytes(&prompt)?);
        // The checkpoint of its run may be of another version, and tell nothing.
        Ok(Self::Here(file, checkpoint::backbone_of(path).ok().flatten()))
    }

    /// The file to hand in, if there is one.
    pub(super) fn file(&self) -> Option<&LocalFile> {
        match self {
            Self::Here(file, _) => Some(file),
            Self::Made | Self::Promoted(_) => None,
        }
    }

    /// What goes with the job on `backbone`; from a prompt of any other one it starts where that is `allowed`.
    ///
    /// # Errors
    /// If the prompt was trained on another backbone; what the coordinator says of a promoted one.
    pub(super) async fn source(
        &self,
        client: &Client,
        backbone: &Backbone,
        allowed: bool,
    ) -> Result<Option<DataSource>> {
        let (digest, was) = match self {
            Self::Made => return Ok(None),
            Self::Here(file, origin) => (file.digest.clone(), origin.clone().unwrap_or_default()),
            Self::Promoted(name) => {
                let request = GetPromptVersionRequest { name: name.clone() };
                let version = call!(client, prompts.get_prompt_version(request))?;
                (version.digest, version.backbone_fingerprint)
            }
        };
        // One that has not loaded yet has none.
        let now = &backbone.fingerprint;
        if !allowed && !was.is_empty() && !now.is_empty() && was != *now {
            return bad_input(format!(
                "the prompt of --prompt-init was trained on the backbone {was}, and {} is {now}; choose that one with --backbone, or pass \
                 --allow-other-backbone if they are meant to differ",
                short(&backbone.name)
            ));
        }
        Ok(Some(initial_of(&digest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promoted_prompt_is_told_from_a_file() {
        let start = |init: &str| {
            let mut job = PartialSpec { prompt_init: Some(init.to_owned()), ..PartialSpec::default() };
            let found = Start::promoted(&mut job).map_err(|error| error.to_string());
            (found, job.prompt_init.unwrap_or_default())
        };
        let version = Start::Promoted("prompts/greeter/versions/3".to_owned());
        assert_eq!(start("prompt:greeter/3"), (Ok(Some(version)), "file:greeter/3".to_owned()));
        assert_eq!(start("file:prompt:x"), (Ok(None), "file:prompt:x".to_owned()));
        assert_eq!(start("vocab").0, Ok(None));
        assert!(start("prompt:greeter/zero").0.unwrap_err().contains("greeter/zero"));
    }
}
