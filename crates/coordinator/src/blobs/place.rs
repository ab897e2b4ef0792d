//! Where blobs are kept: a directory, or an object store.

use std::{
    fmt, io,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use object_store::{ObjectStore, local::LocalFileSystem, path::Path};

use super::{Error, Result};

/// A file in a directory of blobs, with a text that no other has: where it is not, neither is the directory's disk, and no blob can be said to
/// be missing.
pub(super) const MARKER: &str = "incipit-blobs";

/// What a directory of blobs should be.
#[derive(Debug)]
pub struct Expected {
    /// What its marker says, where that is known.
    pub marker: Option<String>,
    /// Whether there are to be blobs in it.
    pub has_some: bool,
}

/// The directory `dir`, which is made.
///
/// # Errors
/// If the system refuses.
pub(super) fn local(dir: &FilePath) -> Result<(Arc<dyn ObjectStore>, Path)> {
    let failed = failed(dir);
    std::fs::create_dir_all(dir).map_err(|e| failed(&e))?;
    for path in interrupted(dir).map_err(|e| failed(&e))? {
        std::fs::remove_file(path).map_err(|e| failed(&e))?;
    }
    let store = LocalFileSystem::new_with_prefix(dir).map_err(|e| failed(&e))?;
    Ok((Arc::new(store.with_fsync(true)), Path::default()))
}

/// What the marker of `dir` says, which is made where the directory can be the one that is `expected` and has none, or that of another
/// coordinator of which nothing is expected here. An empty marker, which a person has made, is taken for any.
///
/// # Errors
/// If it is another directory, or the system refuses.
pub(super) fn claim(dir: &FilePath, expected: &Expected) -> Result<String> {
    let (failed, path) = (failed(dir), dir.join(MARKER));
    let found = match std::fs::read_to_string(&path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(&error)),
    };
    if let Some(found) = found.as_ref().filter(|found| expected.marker.as_ref() == Some(*found)) {
        return Ok(found.clone());
    }
    let is_made_by_hand = found.is_some_and(|found| found.is_empty());
    // No marker was written down: the directory is from before there were any.
    let is_older = expected.marker.is_none() && has_blobs(dir).map_err(|e| failed(&e))?;
    if expected.has_some && !is_made_by_hand && !is_older {
        let why = format!(
            "it is not the directory in which jobs of this coordinator have files: is its disk mounted? if they are lost, make an empty file \
             {MARKER} there to go on without them"
        );
        return Err(failed(&why));
    }
    let marker = uuid::Uuid::new_v4().to_string();
    std::fs::write(&path, &marker).map_err(|e| failed(&e))?;
    Ok(marker)
}

/// Whether a directory has blobs: they lie in directories of two hexadecimal digits.
fn has_blobs(dir: &FilePath) -> io::Result<bool> {
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        if name.len() == 2 && name.to_string_lossy().chars().all(|c| c.is_ascii_hexdigit()) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn failed(dir: &FilePath) -> impl Fn(&dyn fmt::Display) -> Error {
    let url = dir.display().to_string();
    move |why| Error::Place { url: url.clone(), why: why.to_string() }
}

/// Files that uploads did not finish: `object_store` stages them beside their place, as `...#1`.
fn interrupted(dir: &FilePath) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                let path = entry?.path();
                if path.to_string_lossy().contains('#') {
                    found.push(path);
                }
            }
        }
    }
    Ok(found)
}

/// The store at `url`.
///
/// # Errors
/// If there is no such kind of store, or its settings are not in the environment.
pub(super) fn remote(url: &str) -> Result<(Arc<dyn ObjectStore>, Path)> {
    let failed = |why: &dyn fmt::Display| Error::Place { url: url.to_owned(), why: why.to_string() };
    let parsed = url::Url::parse(url).map_err(|e| failed(&e))?;
    if !["s3", "gs", "az"].contains(&parsed.scheme()) {
        return Err(failed(&"no such kind of store"));
    }
    let options = std::env::vars().map(|(key, value)| (key.to_ascii_lowercase(), value));
    let (store, prefix) = object_store::parse_url_opts(&parsed, options).map_err(|e| failed(&e))?;
    Ok((Arc::from(store), prefix))
}
