//! Making and reading the tables.

use std::path::Path;

use incipit_proto::v1::metric_point::Point;
use rusqlite::{Connection, OptionalExtension as _};
use serde::de::DeserializeOwned;

use super::{APPLICATION, Error, Result, SCHEMA};
use crate::core::{
    effects::Resource,
    rows::{Counter, MetricMarks, RequestRecord, Rows},
    worker::WorkerReports,
};

const TABLES: &str = "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE rows (kind TEXT NOT NULL, name TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, name))
        STRICT, WITHOUT ROWID;
    CREATE TABLE events (revision INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind INTEGER NOT NULL, name TEXT NOT NULL,
        body TEXT NOT NULL, actor TEXT NOT NULL) STRICT;
    CREATE TABLE metrics (job TEXT NOT NULL, offset INTEGER NOT NULL, step INTEGER NOT NULL, kind INTEGER NOT NULL,
        body BLOB NOT NULL, PRIMARY KEY (job, offset)) STRICT, WITHOUT ROWID;
    CREATE TABLE logs (name TEXT NOT NULL, offset INTEGER NOT NULL, rank INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (name, offset)) STRICT, WITHOUT ROWID;
";

/// Sets the connection up, and makes the tables where there are none.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<()> {
    let database = |source| Error::Database { path: path.to_owned(), source };
    let version: i32 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(database)?;
    let application: i32 =
        connection.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(database)?;
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(database)?;
    if tables > 0 && application != APPLICATION {
        return Err(Error::Foreign { path: path.to_owned() });
    }
    if version > SCHEMA {
        return Err(Error::Newer { path: path.to_owned(), found: version });
    }
    let setup = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000;";
    connection.execute_batch(setup).map_err(database)?;
    if tables == 0 {
        create(connection).map_err(database)?;
    }
    Ok(())
}

fn create(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(TABLES)?;
    let id = uuid::Uuid::new_v4().to_string();
    transaction.execute("INSERT INTO meta (key, value) VALUES ('cluster', ?1)", [id])?;
    transaction.pragma_update(None, "application_id", APPLICATION)?;
    transaction.pragma_update(None, "user_version", SCHEMA)?;
    transaction.commit()
}

/// The cluster's name.
pub(super) fn cluster(connection: &Connection) -> rusqlite::Result<String> {
    connection.query_row("SELECT value FROM meta WHERE key = 'cluster'", [], |row| row.get(0))
}

/// What the marker of the blobs' directory says, where there is one.
pub(super) fn blobs(connection: &Connection) -> rusqlite::Result<Option<String>> {
    let mut select = connection.prepare("SELECT value FROM meta WHERE key = 'blobs'")?;
    select.query_row([], |row| row.get(0)).optional()
}

/// Writes that down.
pub(super) fn set_blobs(connection: &Connection, marker: &str) -> rusqlite::Result<()> {
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('blobs', ?1)", [marker]).map(drop)
}

/// Everything that the core holds.
pub(super) fn rows(connection: &Connection, path: &Path) -> Result<Rows> {
    let database = |source| Error::Database { path: path.to_owned(), source };
    let mut rows = Rows::default();
    let mut select = connection.prepare("SELECT kind, name, body FROM rows").map_err(database)?;
    let mut found = select.query([]).map_err(database)?;
    while let Some(row) = found.next().map_err(database)? {
        let text = |index| row.get::<_, String>(index).map_err(database);
        let (kind, name, body) = (text(0)?, text(1)?, text(2)?);
        insert(&mut rows, &kind, &body).map_err(|why| {
            let path = path.to_owned();
            Error::Row { path, kind: kind.clone(), name, why }
        })?;
    }
    marks(connection, &mut rows).map_err(database)?;
    Ok(rows)
}

fn insert(rows: &mut Rows, kind: &str, body: &str) -> Result<(), String> {
    fn parse<T: DeserializeOwned>(body: &str) -> Result<T, String> {
        serde_json::from_str(body).map_err(|error| error.to_string())
    }
    match kind {
        "job" | "backbone" | "worker" | "checkpoint" | "prompt" => rows.insert(parse::<Resource>(body)?),
        "request" => {
            let record: RequestRecord = parse(body)?;
            rows.requests.insert(record.id.clone(), record);
        }
        "reports" => {
            let reports: WorkerReports = parse(body)?;
            rows.reports.insert(reports.worker.clone(), reports);
        }
        "counter" => {
            let counter: Counter = parse(body)?;
            rows.counters.insert(counter.name.clone(), counter);
        }
        _ => return Err("no such kind is known".to_owned()),
    }
    Ok(())
}

/// How far events, metrics and logs are stored.
fn marks(connection: &Connection, rows: &mut Rows) -> rusqlite::Result<()> {
    let number = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok());
    let newest = connection.query_row("SELECT max(revision) FROM events", [], |row| row.get(0))?;
    rows.revision = number(newest).unwrap_or(0);
    // By name, along the primary key: a table that holds millions of lines is not read.
    let mut last = connection.prepare("SELECT max(offset) FROM metrics WHERE job = ?1")?;
    let sql = "SELECT step FROM metrics WHERE job = ?1 AND kind = ?2 ORDER BY offset DESC LIMIT 1";
    let mut step = connection.prepare(sql)?;
    for job in rows.jobs.keys() {
        let Some(offset) = number(last.query_row([job.as_str()], |row| row.get(0))?) else { continue };
        let mut last_step = |kind: i64| {
            let found = step.query_row((job.as_str(), kind), |row| row.get(0)).optional()?;
            Ok::<_, rusqlite::Error>(number(found))
        };
        let (training_step, evaluation_step) = (last_step(TRAINING)?, last_step(EVALUATION)?);
        let marks = MetricMarks { next_offset: offset + 1, training_step, evaluation_step };
        rows.metrics.insert(job.clone(), marks);
    }
    let mut last = connection.prepare("SELECT max(offset) FROM logs WHERE name = ?1")?;
    let names = rows.jobs.keys().map(|name| name.as_str());
    for name in names.chain(rows.backbones.keys().map(|name| name.as_str())) {
        if let Some(offset) = number(last.query_row([name], |row| row.get(0))?) {
            rows.logs.insert(name.to_owned(), offset + 1);
        }
    }
    Ok(())
}

const TRAINING: i64 = 0;
const EVALUATION: i64 = 1;

/// The number under which a kind of metrics is stored.
pub(super) fn metric_kind(point: Option<&Point>) -> i64 {
    if matches!(point, Some(Point::Evaluation(_))) { EVALUATION } else { TRAINING }
}
