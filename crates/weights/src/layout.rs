//! Which files of a directory hold the weights.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result, io};

/// How a file of weights is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Safetensors,
    Pickle,
}

/// The files that hold the weights of a directory.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) format: Format,
    pub(crate) files: Vec<PathBuf>,
    /// Where there is one, the index and the shard's name of each tensor.
    pub(crate) index: Option<(PathBuf, BTreeMap<String, String>)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Safetensors before `.bin`, and one file before many: the order in which transformers looks.
const CANDIDATES: [(&str, Format, bool); 4] = [
    ("model.safetensors", Format::Safetensors, false),
    ("model.safetensors.index.json", Format::Safetensors, true),
    ("pytorch_model.bin", Format::Pickle, false),
    ("pytorch_model.bin.index.json", Format::Pickle, true),
];

/// Finds the weights in `dir`.
pub(crate) fn find(dir: &Path) -> Result<Layout> {
    if !dir.is_dir() {
        return Err(Error::NoDirectory(dir.to_owned()));
    }
    for (name, format, is_index) in CANDIDATES {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        if !is_index {
            return Ok(Layout { format, files: vec![path], index: None });
        }
        let weight_map = read_index(&path)?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        let files = shards.into_iter().map(|shard| shard_path(dir, &path, shard)).collect::<Result<_>>()?;
        return Ok(Layout { format, files, index: Some((path, weight_map)) });
    }
    Err(Error::NoWeights { dir: dir.to_owned(), found: listing(dir)? })
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::fs::read_to_string(path).map_err(io("read", path))?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|error| Error::Index { file: path.to_owned(), detail: error.to_string() })?;
    if index.weight_map.is_empty() {
        return Err(Error::Index { file: path.to_owned(), detail: "its weight_map is empty".to_owned() });
    }
    Ok(index.weight_map)
}

/// A shard lies beside its index; a name that leads elsewhere is not one.
fn shard_path(dir: &Path, index: &Path, shard: &str) -> Result<PathBuf> {
    let relative = Path::new(shard);
    if shard.is_empty() || !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        let detail = format!("it names {shard:?}, which does not lie beside it");
        return Err(Error::Index { file: index.to_owned(), detail });
    }
    let path = dir.join(relative);
    if path.is_file() {
        Ok(path)
    } else {
        Err(Error::MissingShard { index: index.to_owned(), shard: shard.to_owned() })
    }
}

/// The names of what lies in `dir`, for a message.
fn listing(dir: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io("list", dir))? {
        names.push(entry.map_err(io("list", dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(summary(&names))
}

/// The first few of many names.
pub(crate) fn summary(names: &[String]) -> String {
    const SHOWN: usize = 8;
    match names.len() {
        0 => "nothing".to_owned(),
        n if n <= SHOWN => names.join(", "),
        n => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
    }
}
