//! Where blobs are kept: a directory, or an object store.

use std::{
    fmt, io,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use object_store::{ObjectStore, local::LocalFileSystem, path::Path};

use super::{Error, Result};

/// A file in a directory of blobs. Where it is not, neither is the directory's disk, and no blob can be said to be missing.
pub(super) const MARKER: &str = "incipit-blobs";

/// The directory `dir`, which is made. `has_some` is whether there are to be blobs already.
///
/// # Errors
/// If the system refuses, or the directory is empty where there are to be blobs.
pub(super) fn local(dir: &FilePath, has_some: bool) -> Result<(Arc<dyn ObjectStore>, Path)> {
    let failed =
        |why: &dyn fmt::Display| Error::Place { url: dir.display().to_string(), why: why.to_string() };
    std::fs::create_dir_all(dir).map_err(|e| failed(&e))?;
    if has_some && std::fs::read_dir(dir).map_err(|e| failed(&e))?.next().is_none() {
        let why = format!(
            "it is empty, and jobs of this coordinator have files there: is its disk mounted? if they are lost, make a file {MARKER} there to \
             go on without them"
        );
        return Err(failed(&why));
    }
    std::fs::write(dir.join(MARKER), "").map_err(|e| failed(&e))?;
    for path in interrupted(dir).map_err(|e| failed(&e))? {
        std::fs::remove_file(path).map_err(|e| failed(&e))?;
    }
    let store = LocalFileSystem::new_with_prefix(dir).map_err(|e| failed(&e))?;
    Ok((Arc::new(store.with_fsync(true)), Path::default()))
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
