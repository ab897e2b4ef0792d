//! Where a split's file is.

use std::path::{Path, PathBuf};

use super::{Split, Task};
use crate::error::{Error, Result};

/// The file of a split: in the task's folder within `dir`, else in `dir` itself.
pub(super) fn file(task: &Task, dir: &Path, split: Split) -> Result<PathBuf> {
    let wanted = task.files[split as usize];
    if wanted.is_empty() {
        let others = task.splits().map(Split::name).collect::<Vec<_>>().join(" or ");
        return Err(Error::NoSuchSplit { task: task.name, split: split.name(), others });
    }
    let mut folders = own_folders(task, dir).map_err(|cause| Error::DataDirectory {
        task: task.name,
        path: dir.to_path_buf(),
        folder: task.folder,
        cause,
    })?;
    folders.push(dir.to_path_buf());
    let paths = folders.iter().flat_map(|folder| wanted.iter().map(|name| folder.join(name)));
    paths.into_iter().find(|path| path.is_file()).ok_or_else(|| Error::MissingSplit {
        task: task.name,
        split: split.name(),
        path: dir.to_path_buf(),
        folder: task.folder,
        wanted: wanted.join(" or "),
    })
}

/// What in `dir` has the name of the task's folder, its very name first; case and hyphens do not count.
fn own_folders(task: &Task, dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let bare = |name: &str| name.replace(['-', '_'], "").to_lowercase();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        names.extend(entry?.file_name().to_str().map(str::to_owned));
    }
    names.retain(|name| bare(name) == bare(task.folder));
    names.sort_by_key(|name| (name != task.folder, name.clone()));
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}
