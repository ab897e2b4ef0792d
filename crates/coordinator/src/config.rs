//! What a coordinator is told.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{core, doors::tls::TlsFiles};

/// The port where a coordinator listens if it is not told otherwise.
pub const PORT: u16 = 7420;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It says what it must not.
    #[error("the configuration {path} is wrong: {why}")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// A coordinator's configuration: a TOML file whose keys are these fields. All but `data` have defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where everything is kept.
    pub data: PathBuf,
    /// Where gRPC is served; 127.0.0.1:7420 if nothing is said.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// Where `/healthz` and `/metrics` are served, over plain HTTP; nowhere if nothing is said.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// Where blobs are: a directory, or `s3://`, `gs://` or `az://` with a bucket; `blobs` under `data` if nothing is said.
    #[serde(default)]
    pub blobs: Option<String>,
    /// Directories on the workers' machines under which jobs may name data by path.
    #[serde(default)]
    pub data_roots: Vec<PathBuf>,
    /// Directories on the workers' machines under which backbones may name models by path.
    #[serde(default)]
    pub model_roots: Vec<PathBuf>,
    /// Whether backbones may name models of the Hugging Face Hub, which workers then download; yes if nothing is said.
    #[serde(default = "yes")]
    pub hub: bool,
    /// Let everybody on this machine in. Only on loopback.
    #[serde(default)]
    pub insecure: bool,
    /// Certificates; those of `tls` under `data`, if they are there and nothing is said.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// The file of tokens; `tokens.toml` under `data`, if it is there and nothing is said.
    #[serde(default)]
    pub tokens: Option<PathBuf>,
    /// How much is too much.
    #[serde(default)]
    pub limits: Limits,
}

/// How much is too much.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a blob.
    pub max_blob_bytes: u64,
    /// Bytes of the disk of blobs that uploads leave free, for the coordinator itself; with 0 they may fill it.
    pub min_free_bytes: u64,
    /// Bytes of a message that comes in.
    pub max_message_bytes: usize,
    /// Jobs that have not ended.
    pub jobs: usize,
    /// Days after its end for which a job is kept, unless a checkpoint of it is pinned or a version of a prompt; 0: until it is deleted.
    pub job_days: u32,
    /// Calls under way at once that are no streams.
    pub calls: usize,
    /// Streams that watch, at once.
    pub watchers: usize,
    /// Calls a second, each token.
    pub calls_per_second: u32,
    /// Calls at once, each token.
    pub call_burst: u32,
    /// Events that are kept.
    pub events: u64,
    /// Lines of a job's or backbone's log that are kept.
    pub log_lines: u64,
    /// Bytes of a file of the audit log, of which there are ten.
    pub audit_bytes: u64,
    /// Seconds that a watcher may take for a page before it is cut off.
    pub watcher_seconds: u64,
    /// Seconds that a blob that nothing names is kept.
    pub garbage_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_blob_bytes: 4 << 30,
            min_free_bytes: 1 << 30,
            max_message_bytes: 4 << 20,
            jobs: core::Config::default().max_jobs,
            job_days: 0,
            calls: 512,
            watchers: 1024,
            calls_per_second: 500,
            call_burst: 1000,
            events: 100_000,
            log_lines: 50_000,
            audit_bytes: 16 << 20,
            watcher_seconds: 30,
            garbage_seconds: 3600,
        }
    }
}

impl Limits {
    /// What they are for the core.
    pub(crate) fn core(&self) -> core::Config {
        let kept = u64::from(self.job_days) * 24 * 3600 * 1000;
        let job_ttl_ms = Some(kept).filter(|kept| *kept > 0);
        core::Config { job_ttl_ms, max_jobs: self.jobs, ..core::Config::default() }
    }
}

fn listen() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))
}

fn yes() -> bool {
    true
}

impl Config {
    /// The defaults, with everything under `data`.
    #[must_use]
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            listen: listen(),
            metrics_listen: None,
            blobs: None,
            data_roots: Vec::new(),
            model_roots: Vec::new(),
            hub: true,
            insecure: false,
            tls: None,
            tokens: None,
            limits: Limits::default(),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, or has what no configuration has.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|error| Error::Bad { path: path.to_owned(), why: error.to_string() })
    }

    /// The certificates to use, if any.
    #[must_use]
    pub fn tls(&self) -> Option<TlsFiles> {
        let found = TlsFiles::of(&self.data);
        let found = Some(found).filter(|found| found.certificate.exists());
        if self.insecure { None } else { self.tls.clone().or(found) }
    }

    /// The file of tokens to use, if any.
    #[must_use]
    pub fn tokens(&self) -> Option<PathBuf> {
        let found = Some(self.default_tokens()).filter(|found| found.exists());
        if self.insecure { None } else { self.tokens.clone().or(found) }
    }

    pub(crate) fn default_tokens(&self) -> PathBuf {
        self.data.join("tokens.toml")
    }

    /// Where blobs are.
    #[must_use]
    pub fn blobs(&self) -> String {
        self.blobs.clone().unwrap_or_else(|| self.data.join("blobs").display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_differs_and_nothing_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.toml");
        let text = "data = \"/d\"\nlisten = \"[::1]:1\"\n[limits]\nevents = 7\njobs = 3\njob_days = 30\n";
        fs::write(&path, text).unwrap();
        let config = Config::read(&path).unwrap();
        assert_eq!((config.limits.events, config.limits.calls), (7, Limits::default().calls));
        assert_eq!(config.blobs(), "/d/blobs");
        let core = config.limits.core();
        assert_eq!((core.max_jobs, core.job_ttl_ms), (3, Some(30 * 24 * 3600 * 1000)));
        assert_eq!(Limits::default().core(), core::Config::default());
        fs::write(&path, "data = \"/d\"\nlisen = \"[::1]:1\"\n").unwrap();
        assert!(Config::read(&path).unwrap_err().to_string().contains("coordinator.toml"));
    }
}
