//! Pages of what is stored, for streams: each page is a short read, so that a slow reader holds nothing up.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use incipit_proto::v1::{LogLine, MetricPoint};
use prost::Message;
use rusqlite::{Connection, OpenFlags, Row, ToSql};
use tokio::sync::Semaphore;

use super::{Error, Result, int};
use crate::core::{
    effects::{Resource, Stamp},
    time::Time,
};

/// Reads that are made at once.
const PARALLEL: usize = 8;

/// Rows of a page, at most.
const ROWS: usize = 512;

/// Bytes of a page, about: the row that goes beyond is its last.
const BYTES: usize = 512 << 10;

/// Some of what is stored, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// The rows that are wanted. None if there are none yet.
    pub rows: Vec<T>,
    /// Where the first row is, wanted or not, if there is one.
    pub first: Option<u64>,
    /// Where the next page begins.
    pub next: u64,
}

/// An event, as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// What happened, when, to whom's wish.
    pub stamp: Stamp,
    /// The resource as it was after it (of one that was removed: before).
    pub resource: Resource,
}

/// Reads pages, over connections of its own. Clones share them.
#[derive(Clone, Debug)]
pub struct Reader {
    path: PathBuf,
    idle: Arc<Mutex<Vec<Connection>>>,
    running: Arc<Semaphore>,
}

impl Reader {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, idle: Arc::default(), running: Arc::new(Semaphore::new(PARALLEL)) }
    }

    /// The oldest event that is kept, and the newest; nothing before the first.
    ///
    /// # Errors
    /// If SQLite fails.
    pub async fn bounds(&self) -> Result<Option<(u64, u64)>> {
        self.run(|connection| {
            let sql = "SELECT (SELECT min(revision) FROM events), (SELECT max(revision) FROM events)";
            connection.query_row(sql, [], |row| {
                let (oldest, newest): (Option<i64>, Option<i64>) = (row.get(0)?, row.get(1)?);
                Ok(oldest
                    .zip(newest)
                    .map(|(oldest, newest)| (oldest.cast_unsigned(), newest.cast_unsigned())))
            })
        })
        .await
    }

    /// Events from a revision on, of resources whose names begin with one of `prefixes`; of all, if there is none.
    ///
    /// # Errors
    /// If SQLite fails, or an event is damaged.
    pub async fn events(&self, from: u64, prefixes: Vec<String>) -> Result<Page<EventRow>> {
        let sql = "SELECT revision, length(body), time, kind, body, actor, name FROM events WHERE revision >= ?1 ORDER BY revision";
        self.page(sql, vec![Box::new(int(from))], from, move |row| {
            let name = row.get_ref(6)?.as_str()?;
            if !prefixes.is_empty() && !prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())) {
                return Ok(None);
            }
            let kind: i32 = row.get(3)?;
            let stamp = Stamp {
                revision: unsigned(row, 0)?,
                time: Time(unsigned(row, 2)?),
                kind: kind.try_into().unwrap_or_default(),
                actor: row.get(5)?,
            };
            let body = row.get_ref(4)?.as_bytes()?;
            let resource = serde_json::from_slice(body).map_err(|error| damaged(4, error))?;
            Ok(Some(EventRow { stamp, resource }))
        })
        .await
    }

    /// Points of a job from an offset on.
    ///
    /// # Errors
    /// If SQLite fails, or a point is damaged.
    pub async fn metrics(&self, job: &str, from: u64) -> Result<Page<MetricPoint>> {
        let sql =
            "SELECT offset, length(body), body FROM metrics WHERE job = ?2 AND offset >= ?1 ORDER BY offset";
        self.page(sql, vec![Box::new(int(from)), Box::new(job.to_owned())], from, |row| decode(row, 2)).await
    }

    /// Lines of a job or backbone from an offset on, of one rank or of all. Lines that are not kept any more are left out.
    ///
    /// # Errors
    /// If SQLite fails, or a line is damaged.
    pub async fn logs(&self, name: &str, from: u64, rank: Option<u32>) -> Result<Page<LogLine>> {
        let sql = "SELECT offset, length(body), body FROM logs
            WHERE name = ?2 AND offset >= ?1 AND rank = ifnull(?3, rank) ORDER BY offset";
        let parameters: Vec<Box<dyn ToSql + Send>> =
            vec![Box::new(int(from)), Box::new(name.to_owned()), Box::new(rank)];
        self.page(sql, parameters, from, |row| decode(row, 2)).await
    }

    /// Offset of the oldest line of a job or backbone that is kept, if there is one.
    ///
    /// # Errors
    /// If SQLite fails.
    pub async fn oldest_line(&self, name: &str) -> Result<Option<u64>> {
        let name = name.to_owned();
        self.run(move |connection| {
            let sql = "SELECT min(offset) FROM logs WHERE name = ?1";
            let oldest =
                connection.prepare_cached(sql)?.query_row([name], |row| row.get::<_, Option<i64>>(0))?;
            Ok(oldest.map(i64::cast_unsigned))
        })
        .await
    }

    /// A page of a query whose first columns are the place and the size of each row, without rows that `parse` does not want.
    async fn page<T: Send + 'static>(
        &self,
        sql: &'static str,
        parameters: Vec<Box<dyn ToSql + Send>>,
        from: u64,
        parse: impl Fn(&Row<'_>) -> rusqlite::Result<Option<T>> + Send + 'static,
    ) -> Result<Page<T>> {
        self.run(move |connection| {
            let parameters: Vec<&dyn ToSql> = parameters.iter().map(|each| &**each as &dyn ToSql).collect();
            let mut select = connection.prepare_cached(sql)?;
            let mut found = select.query(&*parameters)?;
            let (mut page, mut bytes) = (Page { rows: Vec::new(), first: None, next: from }, 0);
            for _ in 0..ROWS {
                let Some(row) = found.next()?.filter(|_| bytes < BYTES) else { break };
                let place = unsigned(row, 0)?;
                (page.first, page.next) = (page.first.or(Some(place)), place + 1);
                bytes += usize::try_from(row.get::<_, i64>(1)?).unwrap_or(0);
                page.rows.extend(parse(row)?);
            }
            Ok(page)
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let failed = |source| Error::Database { path: self.path.clone(), source };
        let permit = self.running.acquire().await;
        let reader = self.clone();
        let done = tokio::task::spawn_blocking(move || reader.read(read)).await;
        drop(permit);
        match done {
            Ok(done) => done.map_err(failed),
            Err(broke) => Err(Error::Reader { why: broke.to_string() }),
        }
    }

    fn read<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = idle.map_or_else(|| open(&self.path), Ok)?;
        let result = read(&connection);
        if result.is_ok() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
        result
    }
}

fn open(path: &PathBuf) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch("PRAGMA busy_timeout = 5000;")?;
    Ok(connection)
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

fn decode<T: Message + Default>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>> {
    T::decode(row.get_ref(column)?.as_bytes()?).map(Some).map_err(|error| damaged(column, error))
}

fn damaged(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Blob, Box::new(error))
}
