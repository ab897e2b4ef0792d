//! MRPC as Microsoft publishes it: one file for training and development, and GLUE's list of those for development.

use std::collections::HashSet;
use std::path::Path;

use super::{Split, Task};
use crate::error::{Error, Result};
use crate::source::Record;

/// The file that has both parts.
pub(super) const BOTH: &str = "msr_paraphrase_train.txt";
/// The list, beside it: a pair of sentence numbers a line.
const DEV_IDS: &str = "dev_ids.tsv";

/// Which of that file's records are of a split.
pub(super) struct Part {
    dev: HashSet<(String, String)>,
    split: Split,
}

impl Part {
    /// None for a file that is of one split alone. Without GLUE's list, all records are for training.
    pub(super) fn of(task: &Task, path: &Path, split: Split) -> Result<Option<Self>> {
        if path.file_name().is_none_or(|name| name != BOTH) {
            return Ok(None);
        }
        let list = path.with_file_name(DEV_IDS);
        let text = match std::fs::read_to_string(&list) {
            Ok(text) => text,
            Err(_) if split == Split::Train && !list.exists() => String::new(),
            Err(_) if !list.exists() => {
                return Err(Error::MissingSplit {
                    task: task.name,
                    split: split.name(),
                    path: path.parent().unwrap_or(path).to_path_buf(),
                    folder: task.folder,
                    wanted: format!("dev.tsv, or {DEV_IDS} beside {BOTH}"),
                });
            }
            Err(cause) => return Err(Error::Open { path: list, cause }),
        };
        let pair = |line: &str| {
            let (first, second) = line.trim().split_once('\t')?;
            Some((first.to_owned(), second.to_owned()))
        };
        Ok(Some(Self { dev: text.lines().filter_map(pair).collect(), split }))
    }

    pub(super) fn has(&self, record: &Record) -> bool {
        let id = |name| record.get(name).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        self.dev.contains(&(id("#1 ID"), id("#2 ID"))) == (self.split == Split::Dev)
    }
}
