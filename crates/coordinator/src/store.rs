//! What the coordinator remembers: rows, events, metrics and logs, in one SQLite database.
//!
//! The one writer is the thread that owns the core. A commit is on the disk when [`Store::commit`] returns (write-ahead log,
//! `synchronous=FULL`). Readers of pages have connections of their own, and never wait for the writer.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

use prost::Message as _;
use rusqlite::{Connection, Transaction, params};

use crate::core::{
    effects::{Change, Resource, Stamp},
    rows::Rows,
};

mod load;
mod reader;

pub use reader::{EventRow, Page, Reader};

/// The version of the tables that this program knows.
const SCHEMA: i32 = 1;

/// Marks a database as one of ours (`PRAGMA application_id`).
const APPLICATION: i32 = 0x494e_4350;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A read broke off.
    #[error("a read of the database broke off: {why}; this is a mistake in the program")]
    Reader {
        /// How.
        why: String,
    },
    /// The directory cannot be used.
    #[error("cannot use the data directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error("another coordinator uses {path}; stop it first, or give this one a directory of its own")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// A later version wrote it.
    #[error(
        "{path} was written by a later version (tables {found}, this program knows {SCHEMA}); use that one"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: i32,
    },
    /// It is a database of something else.
    #[error("{path} is a database, but none of Incipit's; give another data directory")]
    Foreign {
        /// The database.
        path: PathBuf,
    },
    /// SQLite failed.
    #[error("the database {path} failed: {source}")]
    Database {
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// A row is damaged.
    #[error("the {kind} {name} in {path} cannot be read ({why}); restore the database from a backup")]
    Row {
        /// The database.
        path: PathBuf,
        /// Kind of the row.
        kind: String,
        /// Its name.
        name: String,
        /// What is wrong.
        why: String,
    },
}

/// The outcome of something done with the store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How much of what grows is kept.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// Events, the newest.
    pub events: u64,
    /// Lines of a log, the newest.
    pub log_lines: u64,
}

/// The database, while this process alone has it.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
    cluster: String,
    kept: Kept,
    /// Holds the lock; the system lets go of it when the process ends, however that happens.
    _lock: File,
}

impl Store {
    /// Opens the store in `dir`, making it where it is missing, and reads what it holds.
    ///
    /// # Errors
    /// If another process has it, a later version or something else wrote it, or it is damaged.
    pub fn open(dir: &Path, kept: Kept) -> Result<(Self, Rows)> {
        let failed = |source| Error::Directory { path: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(failed)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"));
        let lock = lock.map_err(failed)?;
        // A file system without locks cannot tell us; that is no reason not to work there.
        if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(Error::InUse { path: dir.to_owned() });
        }
        let path = dir.join("state.sqlite");
        let database = |source| Error::Database { path: path.clone(), source };
        let mut connection = Connection::open(&path).map_err(database)?;
        load::prepare(&mut connection, &path)?;
        let cluster = load::cluster(&connection).map_err(database)?;
        let rows = load::rows(&connection, &path)?;
        Ok((Self { connection, path, cluster, kept, _lock: lock }, rows))
    }

    /// Names the cluster: made up when the store was.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What the marker of the directory of blobs says that this store goes with, if that was written down.
    ///
    /// # Errors
    /// If SQLite fails.
    pub fn blobs(&self) -> Result<Option<String>> {
        load::blobs(&self.connection).map_err(|source| Error::Database { path: self.path.clone(), source })
    }

    /// Writes down what that marker says.
    ///
    /// # Errors
    /// If SQLite fails.
    pub fn set_blobs(&self, marker: &str) -> Result<()> {
        let written = load::set_blobs(&self.connection, marker);
        written.map_err(|source| Error::Database { path: self.path.clone(), source })
    }

    /// A reader of pages.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(self.path.clone())
    }

    /// Writes changes, in order, all or none. They are on the disk when this returns.
    ///
    /// # Errors
    /// If SQLite fails (a full disk); then none is written.
    pub fn commit(&mut self, changes: &[Change]) -> Result<()> {
        let (path, kept) = (&self.path, self.kept);
        let write = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            for change in changes {
                apply(&transaction, change, kept)?;
            }
            compact(&transaction, changes, kept)?;
            transaction.commit()
        };
        write(&mut self.connection).map_err(|source| Error::Database { path: path.clone(), source })
    }
}

fn apply(transaction: &Transaction<'_>, change: &Change, kept: Kept) -> rusqlite::Result<()> {
    match change {
        Change::Put(stamp, resource) => {
            let body = json(resource)?;
            put(transaction, resource.kind(), &resource.name(), &body)?;
            event(transaction, stamp, resource, &body)
        }
        Change::Remove(stamp, resource) => {
            remove(transaction, resource.kind(), &resource.name())?;
            forget(transaction, resource)?;
            event(transaction, stamp, resource, &json(resource)?)
        }
        Change::PutRequest(record) => put(transaction, "request", &record.id, &json(record)?),
        Change::RemoveRequest(id) => remove(transaction, "request", id),
        Change::PutReports(reports) => put(transaction, "reports", reports.worker.as_str(), &json(reports)?),
        Change::RemoveReports(worker) => remove(transaction, "reports", worker.as_str()),
        Change::PutCounter(counter) => put(transaction, "counter", &counter.name, &json(counter)?),
        Change::RemoveCounter(name) => remove(transaction, "counter", name),
        Change::AppendMetrics(job, points) => {
            let sql = "INSERT INTO metrics (job, offset, step, kind, body) VALUES (?1, ?2, ?3, ?4, ?5)";
            let mut insert = transaction.prepare_cached(sql)?;
            for point in points {
                let kind = load::metric_kind(point.point.as_ref());
                let row = (job.as_str(), int(point.offset), int(point.step), kind, point.encode_to_vec());
                insert.execute(row)?;
            }
            Ok(())
        }
        Change::AppendLogs(name, lines) => {
            let sql = "INSERT INTO logs (name, offset, rank, body) VALUES (?1, ?2, ?3, ?4)";
            let mut insert = transaction.prepare_cached(sql)?;
            for line in lines {
                insert.execute((name, int(line.offset), line.rank, line.encode_to_vec()))?;
            }
            let Some(last) = lines.last() else { return Ok(()) };
            let first = (last.offset + 1).saturating_sub(kept.log_lines);
            let sql = "DELETE FROM logs WHERE name = ?1 AND offset < ?2";
            transaction.prepare_cached(sql)?.execute((name, int(first)))?;
            Ok(())
        }
    }
}

fn put(transaction: &Transaction<'_>, kind: &str, name: &str, body: &str) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO rows (kind, name, body) VALUES (?1, ?2, ?3)";
    transaction.prepare_cached(sql)?.execute((kind, name, body))?;
    Ok(())
}

fn remove(transaction: &Transaction<'_>, kind: &str, name: &str) -> rusqlite::Result<()> {
    let sql = "DELETE FROM rows WHERE kind = ?1 AND name = ?2";
    transaction.prepare_cached(sql)?.execute((kind, name))?;
    Ok(())
}

fn event(
    transaction: &Transaction<'_>,
    stamp: &Stamp,
    resource: &Resource,
    body: &str,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO events (revision, time, kind, name, body, actor) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    let row = params![
        int(stamp.revision),
        int(stamp.time.0),
        stamp.kind as i32,
        resource.name(),
        body,
        stamp.actor
    ];
    transaction.prepare_cached(sql)?.execute(row)?;
    Ok(())
}

/// What goes with a resource.
fn forget(transaction: &Transaction<'_>, resource: &Resource) -> rusqlite::Result<()> {
    let name = resource.name();
    if matches!(resource, Resource::Job(_)) {
        transaction.prepare_cached("DELETE FROM metrics WHERE job = ?1")?.execute([&name])?;
    }
    if matches!(resource, Resource::Job(_) | Resource::Backbone(_)) {
        transaction.prepare_cached("DELETE FROM logs WHERE name = ?1")?.execute([&name])?;
    }
    Ok(())
}

/// Deletes the oldest events, as many as have come too many.
fn compact(transaction: &Transaction<'_>, changes: &[Change], kept: Kept) -> rusqlite::Result<()> {
    let newest = changes.iter().rev().find_map(|change| match change {
        Change::Put(stamp, _) | Change::Remove(stamp, _) => Some(stamp.revision),
        _ => None,
    });
    let Some(newest) = newest else { return Ok(()) };
    let last = newest.saturating_sub(kept.events.max(1));
    transaction.prepare_cached("DELETE FROM events WHERE revision <= ?1")?.execute([int(last)])?;
    Ok(())
}

fn json(value: &impl serde::Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

/// SQLite's integers have a sign. What is counted never comes near the end of them.
fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
