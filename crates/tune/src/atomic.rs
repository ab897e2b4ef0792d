//! Writing files so that a crash at any moment leaves the old state or the new one.
//!
//! What is written goes to a temporary name beside its place, is flushed to the disk, and is renamed; then
//! the directory is flushed, so that the rename lasts. A process that dies leaves at most temporary names
//! (`.tmp-…`), which [`clean`] removes.

use crate::{Error, Result};
use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
};

/// What temporary names begin with.
const TEMPORARY: &str = ".tmp-";

/// Writes `bytes` at `path`: afterwards it holds what it held before, or all of `bytes`. A link stays one, and the file that it
/// points to is written; a device or a pipe is not replaced by a file, but written to.
///
/// # Errors
/// If the system refuses (a full disk, an unwritable directory); then `path` holds what it held before.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
        return std::fs::write(path, bytes).map_err(Error::io("write", path));
    }
    let linked = if path.is_symlink() { std::fs::canonicalize(path).ok() } else { None };
    let path = linked.as_deref().unwrap_or(path);
    let staged = temporary(path);
    let written = write_synced(&staged, bytes).and_then(|()| replace(&staged, path));
    if written.is_err() {
        let _ = disk::remove_file(&staged); // The first error is the one to tell.
    }
    written
}

/// Writes a directory: `fill` is given an empty one beside `place` and writes its files with
/// [`write_synced`]; then it takes the place of the one that is there, if any, whole.
///
/// # Errors
/// What `fill` says, or if the system refuses; then `place` is as it was before.
pub fn write_dir(place: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let staged = temporary(place);
    let written = remove(&staged)
        .and_then(|()| disk::create_dir_all(&staged).map_err(Error::io("create", place)))
        .and_then(|()| fill(&staged))
        .and_then(|()| disk::sync_dir(&staged).map_err(Error::io("flush", place)))
        .and_then(|()| replace(&staged, place));
    let removed = remove(&staged); // What failed, or what the new directory took the place of.
    written.and(removed)
}

/// Creates a directory and those above it that are missing.
///
/// # Errors
/// If the system refuses, or a file is there.
pub fn create_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    disk::create_dir_all(dir).map_err(Error::io("create", dir))?;
    disk::sync_dir(parent(dir)).map_err(Error::io("flush", parent(dir)))
}

/// Makes `link` a symbolic link to `target` (as seen from `link`'s directory), whether it is there already or
/// not.
///
/// # Errors
/// If the system refuses; then `link` points where it pointed before.
pub fn relink(link: &Path, target: &Path) -> Result<()> {
    let staged = temporary(link);
    let linked = remove(&staged)
        .and_then(|()| disk::symlink(target, &staged).map_err(Error::io("link", link)))
        .and_then(|()| replace(&staged, link));
    if linked.is_err() {
        let _ = disk::remove_file(&staged); // The first error is the one to tell.
    }
    linked
}

/// Removes a directory with all it holds: it vanishes from its place whole. One that is not there is no
/// error.
///
/// # Errors
/// If the system refuses.
pub fn remove_dir(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let staged = temporary(dir);
    remove(&staged)?;
    disk::rename(dir, &staged).map_err(Error::io("remove", dir))?;
    disk::sync_dir(parent(dir)).map_err(Error::io("flush", parent(dir)))?;
    remove(&staged)
}

/// Removes what processes that died left under temporary names in `dir`, and says what it was.
///
/// # Errors
/// If the system refuses. A directory that is not there holds nothing.
pub fn clean(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("read", dir))?,
    };
    let mut removed = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes())) {
            remove(&path)?;
            removed.push(path);
        }
    }
    removed.sort();
    Ok(removed)
}

/// Writes a file of a directory that is not yet in its place, and flushes it to the disk.
///
/// # Errors
/// If the system refuses.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    disk::write(path, bytes).map_err(Error::io("write", path))?;
    disk::sync(path).map_err(Error::io("write", path))
}

/// Puts `staged` in the place of `path`. Of two directories, `staged` then holds the old one.
fn replace(staged: &Path, path: &Path) -> Result<()> {
    let is_dir = staged.is_dir() && !staged.is_symlink();
    let renamed = if is_dir && path.exists() { exchange(staged, path) } else { disk::rename(staged, path) };
    renamed.map_err(Error::io("write", path))?;
    disk::sync_dir(parent(path)).map_err(Error::io("flush", parent(path)))
}

/// Exchanges two directories, at once where the file system can.
fn exchange(staged: &Path, path: &Path) -> io::Result<()> {
    match disk::exchange(staged, path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            exchange_in_steps(staged, path)
        }
        exchanged => exchanged,
    }
}

/// What network file systems allow. A crash after the first step leaves the old directory as `….old` and
/// nothing in its place: for a moment the promise holds less than elsewhere, but nothing is lost.
fn exchange_in_steps(staged: &Path, path: &Path) -> io::Result<()> {
    let old = path.with_extension("old");
    if old.exists() {
        disk::remove_dir_all(&old)?;
    }
    disk::rename(path, &old)?;
    disk::rename(staged, path)?;
    disk::rename(&old, staged)
}

/// Removes whatever is at `path`, if anything is.
fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(data) if data.is_dir() => disk::remove_dir_all(path),
        Ok(_) => disk::remove_file(path),
        Err(_) => return Ok(()),
    };
    removed.map_err(Error::io("remove", path))
}

/// A name beside `path` that nobody reads: hidden, and this process's own.
fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(TEMPORARY);
    name.push(path.file_name().unwrap_or(OsStr::new("file")));
    name.push(format!("-{}", std::process::id()));
    path.with_file_name(name)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The operations on the disk, each a moment at which a test can let the process die.
mod disk {
    use super::{OsStr, Path, io};
    use std::fs::{self, File};

    #[cfg(not(test))]
    fn moment(_operation: &str, _path: &Path) -> io::Result<()> {
        Ok(())
    }
    #[cfg(test)]
    use super::faults::moment;

    pub(super) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = File::create(path)?;
        let half = bytes.len() / 2;
        io::Write::write_all(&mut &file, &bytes[..half])?;
        moment("write", path)?;
        io::Write::write_all(&mut &file, &bytes[half..])?;
        #[cfg(test)]
        super::faults::written(path, file);
        Ok(())
    }

    pub(super) fn sync(path: &Path) -> io::Result<()> {
        moment("sync", path)?;
        File::open(path)?.sync_all()?;
        #[cfg(test)]
        super::faults::synced(path);
        Ok(())
    }

    pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
        moment("sync_dir", dir)?;
        File::open(dir)?.sync_all()
    }

    pub(super) fn create_dir_all(dir: &Path) -> io::Result<()> {
        moment("create_dir", dir)?;
        fs::create_dir_all(dir)
    }

    pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
        moment("rename", to)?;
        fs::rename(from, to)
    }

    pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
        moment("exchange", other)?;
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        Ok(rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, flags)?)
    }

    pub(super) fn symlink(target: &Path, link: &Path) -> io::Result<()> {
        moment("symlink", link)?;
        std::os::unix::fs::symlink(target, link)
    }

    pub(super) fn remove_file(path: &Path) -> io::Result<()> {
        moment("remove_file", path)?;
        fs::remove_file(path)
    }

    /// Files in the order of their names, each a moment of its own: a directory can be left half removed.
    pub(super) fn remove_dir_all(dir: &Path) -> io::Result<()> {
        let mut names = fs::read_dir(dir)?.map(|e| Ok(e?.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        for name in names {
            moment("remove_file", dir.join(&name).as_ref())?;
            remove_entry(dir, &name)?;
        }
        moment("remove_dir", dir)?;
        fs::remove_dir(dir)
    }

    fn remove_entry(dir: &Path, name: &OsStr) -> io::Result<()> {
        let path = dir.join(name);
        if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
    }
}

#[cfg(test)]
pub(crate) mod faults;
#[cfg(test)]
mod tests;
