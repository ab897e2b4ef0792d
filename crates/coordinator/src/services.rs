//! The services: each turns requests into inputs of the core, and what the core says into responses.

use std::sync::Arc;

use incipit_proto::Problem;
use tokio::sync::{Semaphore, watch};
use tonic::Code;

use crate::{blobs::Blobs, config::Limits, shell::Handle, store::Reader, wire::Roots};

pub(crate) mod agent;
mod ask;
pub(crate) mod backbones;
pub(crate) mod blobs;
pub(crate) mod checkpoints;
pub(crate) mod events;
pub(crate) mod jobs;
mod pages;
pub(crate) mod prompts;
pub(crate) mod workers;

/// What the services share.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) handle: Handle,
    pub(crate) reader: Reader,
    pub(crate) blobs: Blobs,
    pub(crate) cluster: Arc<str>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) roots: Arc<Roots>,
    /// Becomes true when the coordinator ends: then streams do.
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) watchers: Arc<Semaphore>,
}

impl Context {
    /// Waits until the coordinator ends.
    pub(crate) async fn stopped(&self) {
        let mut stopping = self.stopping.clone();
        let _ = stopping.wait_for(|stopping| *stopping).await; // Nobody left to say so: it ends too.
    }
}

pub(crate) fn stopping() -> Problem {
    Problem::new(Code::Unavailable, "SHUTTING_DOWN", "the coordinator ends; come again once it is back")
}

impl From<crate::store::Error> for Problem {
    fn from(error: crate::store::Error) -> Self {
        Self::new(Code::Internal, "STORE", error.to_string())
    }
}
