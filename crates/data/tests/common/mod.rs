//! Data files for a test, in a folder that goes with it.

#![allow(dead_code, reason = "each test file uses a part")]

use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use incipit_data::{LoadOptions, Loaded, TaskFormat, load_text};
use tempfile::TempDir;

/// A folder of data files.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

/// Bytes as gzip has them.
pub(crate) fn gzip(content: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content.as_ref()).unwrap();
    encoder.finish().unwrap()
}

/// A file beside the tests.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

pub(crate) fn format(inputs: &str, targets: &str, labels: Option<&str>) -> TaskFormat {
    TaskFormat {
        inputs: inputs.parse().unwrap(),
        targets: targets.parse().unwrap(),
        labels: labels.map(|labels| labels.parse().unwrap()),
    }
}

/// Loads a file that is as it should be.
pub(crate) fn load(path: &Path) -> Loaded {
    load_text(path, &TaskFormat::default(), LoadOptions::default()).unwrap()
}
