//! All checkpoints of a training directory.

use super::{Checkpoint, load, save};
use crate::{Error, Result, atomic};
use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
};

/// The checkpoints under `out/checkpoints`, with the links `out/best` and `out/last`, while one process
/// writes them.
#[derive(Debug)]
pub struct Store {
    out: PathBuf,
    /// Holds the lock; the system lets go of it when the process ends, however that happens.
    _lock: File,
}

/// What [`Store::newest_valid`] found.
#[derive(Debug)]
pub struct Found {
    /// The newest checkpoint that can be used, with its directory.
    pub checkpoint: Option<(PathBuf, Checkpoint)>,
    /// Why each newer one cannot be.
    pub damaged: Vec<Error>,
}

impl Store {
    /// Opens the training directory `out`, creating it where it is missing, and removes what a process that
    /// died left under temporary names in it.
    ///
    /// # Errors
    /// If the system refuses, or another process writes there.
    pub fn open(out: &Path) -> Result<Self> {
        let checkpoints = out.join("checkpoints");
        atomic::create_dir(&checkpoints)?;
        let lock = lock(out)?;
        atomic::clean(out)?;
        atomic::clean(&checkpoints)?;
        Ok(Self { out: out.to_owned(), _lock: lock })
    }

    /// Where the checkpoint after `step` steps lies, whether it is there or not.
    #[must_use]
    pub fn path(&self, step: u64) -> PathBuf {
        self.out.join(relative(step))
    }

    /// Saves a checkpoint under the step of its state, and points `last` to it.
    ///
    /// # Errors
    /// If the system refuses; then `last` points where it pointed.
    pub fn save(&self, checkpoint: &Checkpoint) -> Result<PathBuf> {
        let step = checkpoint.state.step;
        save(&self.path(step), checkpoint)?;
        self.mark_last(step)?;
        Ok(self.path(step))
    }

    /// Points `last` to the checkpoint after `step` steps.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn mark_last(&self, step: u64) -> Result<()> {
        atomic::relink(&self.out.join("last"), &relative(step))
    }

    /// Points `best` to the checkpoint after `step` steps.
    ///
    /// # Errors
    /// If it is not there, or the system refuses.
    pub fn mark_best(&self, step: u64) -> Result<()> {
        if !self.path(step).is_dir() {
            let what = "it is not there to become the best".to_owned();
            return Err(Error::Checkpoint { path: self.path(step), what });
        }
        atomic::relink(&self.out.join("best"), &relative(step))
    }

    /// The step that `best` points to.
    #[must_use]
    pub fn best(&self) -> Option<u64> {
        self.linked("best")
    }

    /// The step that `last` points to.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.linked("last")
    }

    fn linked(&self, name: &str) -> Option<u64> {
        parse(&std::fs::read_link(self.out.join(name)).ok()?)
    }

    /// The steps of all checkpoints, valid or not, in ascending order.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let dir = self.out.join("checkpoints");
        let mut steps = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let entry = entry.map_err(Error::io("read", &dir))?;
            steps.extend(parse(&entry.path()).filter(|step| self.path(*step) == entry.path()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint that is whole, and what is wrong with those after it.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn newest_valid(&self) -> Result<Found> {
        let mut damaged = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let path = self.path(step);
            match load(&path) {
                Ok(checkpoint) if checkpoint.state.step == step => {
                    return Ok(Found { checkpoint: Some((path, checkpoint)), damaged });
                }
                Ok(checkpoint) => {
                    let what = format!("it was made after {} steps; was it renamed?", checkpoint.state.step);
                    damaged.push(Error::Checkpoint { path, what });
                }
                Err(error) => damaged.push(error),
            }
        }
        Ok(Found { checkpoint: None, damaged })
    }

    /// Removes all but the newest `keep` checkpoints, and never those that `best` and `last` point to;
    /// returns the steps of those removed.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn prune(&self, keep: usize) -> Result<Vec<u64>> {
        let steps = self.steps()?;
        let pinned = [self.best(), self.last(), steps.last().copied()];
        let mut removed = Vec::new();
        for step in &steps[..steps.len().saturating_sub(keep)] {
            if !pinned.contains(&Some(*step)) {
                atomic::remove_dir(&self.path(*step))?;
                removed.push(*step);
            }
        }
        Ok(removed)
    }
}

/// Takes a directory for this process, as long as it holds the file.
///
/// # Errors
/// If the system refuses, or another process has it.
pub(crate) fn lock(dir: &Path) -> Result<File> {
    let file = File::open(dir).map_err(Error::io("open", dir))?;
    // A file system without locks cannot tell us; that is no reason not to write there.
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        return Err(Error::OutInUse { path: dir.to_owned() });
    }
    Ok(file)
}

/// As seen from the training directory.
fn relative(step: u64) -> PathBuf {
    Path::new("checkpoints").join(format!("step-{step:08}"))
}

fn parse(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}
