//! The audit log: a line of JSON for every call that changes something, or wanted to.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::Serialize;

/// Files beside the current one: `audit.1.jsonl` is the newest.
const OLD: u32 = 9;

/// A line.
#[derive(Clone, Debug, Serialize)]
pub struct Line<'a> {
    /// When the call was answered, in RFC 3339.
    pub time: String,
    /// Who made it.
    pub actor: &'a str,
    /// `Service/Method`.
    pub method: &'a str,
    /// The resource; empty if the call did not come that far.
    pub resource: &'a str,
    /// The code, `Ok` if it was carried out.
    pub outcome: String,
}

/// The log, in a directory. It is kept in ten files, the newest lines in `audit.jsonl`.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    limit: u64,
    file: Mutex<(File, u64)>,
}

impl Audit {
    /// Opens the log, whose files have `limit` bytes at most.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn open(dir: &Path, limit: u64) -> io::Result<Self> {
        let path = dir.join("audit.jsonl");
        let file = Mutex::new(append(&path)?);
        Ok(Self { path, limit, file })
    }

    /// Writes a line. What cannot be written is said in the log of the program, and stops nobody.
    pub fn write(&self, line: &Line<'_>) {
        let mut place = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written = serde_json::to_vec(line).map_err(io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            if place.1 > 0 && place.1 + bytes.len() as u64 > self.limit {
                *place = self.rotate()?;
            }
            place.0.write_all(&bytes)?; // One write: lines do not mix.
            place.1 += bytes.len() as u64;
            Ok(())
        });
        if let Err(error) = written {
            tracing::error!("cannot write to {}: {error}", self.path.display());
        }
    }

    fn rotate(&self) -> io::Result<(File, u64)> {
        let old = |number: u32| self.path.with_extension(format!("{number}.jsonl"));
        for number in (1..OLD).rev() {
            if old(number).exists() {
                fs::rename(old(number), old(number + 1))?;
            }
        }
        fs::rename(&self.path, old(1))?;
        append(&self.path)
    }
}

fn append(path: &Path) -> io::Result<(File, u64)> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// The time, in RFC 3339 and UTC.
#[must_use]
pub fn now() -> String {
    time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_over_rotations_and_reopening() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..2 {
            let audit = Audit::open(dir.path(), 400).unwrap();
            for number in 0..5 {
                let resource = format!("jobs/a{round}{number}");
                let line = Line {
                    time: now(),
                    actor: "ana",
                    method: "JobService/CreateJob",
                    resource: &resource,
                    outcome: "Ok".to_owned(),
                };
                audit.write(&line);
            }
        }
        let mut seen = Vec::new();
        for name in ["audit.4.jsonl", "audit.3.jsonl", "audit.2.jsonl", "audit.1.jsonl", "audit.jsonl"] {
            for line in fs::read_to_string(dir.path().join(name)).unwrap_or_default().lines() {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                seen.push(line["resource"].as_str().unwrap().to_owned());
            }
        }
        let all = (0..2).flat_map(|round| (0..5).map(move |number| format!("jobs/a{round}{number}")));
        assert_eq!(seen, all.collect::<Vec<_>>());
    }
}
