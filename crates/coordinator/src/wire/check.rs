//! Checks of fields. All that is wrong is found at once.

use std::{
    collections::BTreeMap,
    fmt::Display,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use incipit_proto::Problem;

use crate::core::job::MAX_LABELS;

/// Bytes of a text, at most.
pub(super) const MAX_TEXT: usize = 16 * 1024;
/// Bytes of a label's key or value, at most.
const MAX_LABEL: usize = 256;

/// What is wrong so far.
#[derive(Debug, Default)]
pub(super) struct Checks {
    found: Vec<(String, String)>,
}

impl Checks {
    /// Notes something wrong.
    pub(super) fn wrong(&mut self, field: impl Into<String>, what: impl Into<String>) {
        self.found.push((field.into(), what.into()));
    }

    /// The value, if there is one; else what is wrong is noted.
    pub(super) fn take<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(problem) => {
                self.found.extend(problem.fields);
                None
            }
        }
    }

    /// Notes what `check` finds wrong, under `to` in the place of `from` at a field's beginning.
    pub(super) fn under(&mut self, from: &str, to: &str, check: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        check(&mut inner);
        let moved = |(field, what): (String, String)| match field.strip_prefix(from) {
            Some(rest) => (format!("{to}{rest}"), what.replace(from, to)),
            None => (field, what),
        };
        self.found.extend(inner.found.into_iter().map(moved));
    }

    /// A number must be in a range, if it is given.
    pub(super) fn range<T: PartialOrd + Display + Copy>(
        &mut self,
        field: &str,
        value: Option<T>,
        range: RangeInclusive<T>,
    ) {
        if let Some(value) = value
            && !range.contains(&value)
        {
            self.wrong(field, format!("is {value}; give {} to {}", range.start(), range.end()));
        }
    }

    /// A text must not be too long, nor be nothing, if it is given.
    pub(super) fn text(&mut self, field: &str, value: Option<&str>) {
        let Some(value) = value else { return };
        if value.is_empty() {
            self.wrong(field, "is empty; leave it out, or say something");
        }
        self.length(field, Some(value));
    }

    /// A text must not be too long; it may be nothing.
    pub(super) fn length(&mut self, field: &str, value: Option<&str>) {
        if let Some(value) = value
            && value.len() > MAX_TEXT
        {
            self.wrong(field, format!("has {} bytes; {MAX_TEXT} are allowed", value.len()));
        }
    }

    /// Labels must be few and short.
    pub(super) fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        if labels.len() > MAX_LABELS {
            self.wrong(field, format!("has {} entries; {MAX_LABELS} are allowed", labels.len()));
        }
        let long = |(key, value): &(&String, &String)| {
            key.is_empty() || key.len() > MAX_LABEL || value.len() > MAX_LABEL
        };
        if let Some((key, _)) = labels.iter().find(long) {
            let what =
                format!("has a key or value of more than {MAX_LABEL} bytes, or an empty key: {key:.40?}");
            self.wrong(field, what);
        }
    }

    /// A path must be whole, plain and under one of the roots.
    pub(super) fn path(&mut self, field: &str, path: &str, roots: &[PathBuf], which: &str) {
        let plain = path.strip_prefix('/').is_some_and(|rest| {
            rest.split('/').all(|part| !matches!(part, "" | "." | "..")) && !rest.contains('\0')
        });
        if !plain || path.len() > 4096 {
            self.wrong(field, format!("is {path:.100?}; give an absolute path without `.`, `..` and `//`"));
        } else if !roots.iter().any(|root| Path::new(path).starts_with(root)) {
            let roots: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
            let roots = if roots.is_empty() { "none".to_owned() } else { roots.join(", ") };
            let what =
                format!("is {path:.100?}, which is under none of the coordinator's {which} roots ({roots})");
            self.wrong(field, what);
        }
    }

    /// What was found: nothing, or one problem with all of it, whose message names the first.
    pub(super) fn finish(self) -> Result<(), Problem> {
        let Some((field, what)) = self.found.first() else { return Ok(()) };
        let mut problem = Problem::field(field, what.clone());
        if self.found.len() > 1 {
            problem.message = format!("{} (and {} more)", problem.message, self.found.len() - 1);
        }
        problem.fields = self.found;
        Err(problem)
    }
}

/// Tasks of a job, at most.
pub(super) const MAX_TASKS: usize = 64;

/// Whether a text names a task of several: its files lie in a directory of that name.
pub(super) fn is_task_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let fits = (1..=64).contains(&text.len()) && text.bytes().all(plain);
    // The list of a checkpoint's files stands beside the tasks.
    fits && !text.starts_with('.') && text != "MANIFEST"
}

/// Whether a text is a BLAKE3, as we write it.
pub(super) fn is_digest(text: &str) -> bool {
    crate::blobs::Digest::parse("", text).is_ok()
}

/// Whether a text names a file in whatever directory.
pub(super) fn is_file_name(text: &str) -> bool {
    !matches!(text, "" | "." | "..")
        && text.len() <= 255
        && !text.contains(['/', '\\'])
        && !text.chars().any(char::is_control)
}
