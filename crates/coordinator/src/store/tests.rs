use super::*;
use crate::core::{
    Config, Core,
    backbone::{BackboneSpec, Collective, Device, Dtype},
    input::{Input, JobTarget, NewBackbone, NewJob, Request, RequestKey},
    job::RetryPolicy,
    time::Time,
};
use incipit_proto::{
    names::{BackboneName, JobName},
    v1::{EvalMetrics, LogLine, MetricPoint, StepMetrics, TrainingSpec, metric_point::Point},
};
use std::collections::BTreeMap;

const KEPT: Kept = Kept { events: 1000, log_lines: 100 };

fn backbone() -> BackboneName {
    BackboneName::of_id("backbone", "b").unwrap()
}

fn job(number: u32) -> JobName {
    JobName::of_id("job", &format!("j{number}")).unwrap()
}

fn create_backbone() -> Request {
    let spec = BackboneSpec {
        model: "t5-small".to_owned(),
        dtype: Dtype::F32,
        device: Device::Cpu,
        tp: 1,
        dp: 1,
        min_dp: 0,
        collective: Collective::Local,
        microbatch_tokens: 0,
        max_running_jobs: 4,
    };
    let backbone = NewBackbone { name: backbone(), spec, labels: BTreeMap::new() };
    Request::CreateBackbone { backbone: Box::new(backbone), validate_only: false }
}

fn create_job(number: u32) -> Request {
    let new = NewJob {
        name: job(number),
        backbone: backbone(),
        spec: TrainingSpec { lr: Some(0.1 + 0.2), ..TrainingSpec::default() },
        priority: 10,
        retry_policy: RetryPolicy::default(),
        labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        start: None,
    };
    Request::CreateJob { job: Box::new(new), validate_only: false }
}

struct Both {
    store: Store,
    core: Core,
}

impl Both {
    fn open(dir: &Path, kept: Kept) -> Self {
        let (store, rows) = Store::open(dir, kept).unwrap();
        Self { store, core: Core::restore(Config::default(), rows, Time(1000)) }
    }

    fn ask(&mut self, request: Request) {
        let key = RequestKey { id: uuid::Uuid::new_v4().to_string(), hash: "h".to_owned() };
        let input = Input::Request { actor: "ana".to_owned(), key: Some(key), request };
        let effects = self.core.handle(input, Time(2000));
        effects.reply.unwrap().unwrap();
        self.store.commit(&effects.changes).unwrap();
    }
}

fn point(offset: u64, step: u64, point: Point) -> MetricPoint {
    MetricPoint { offset, step, time: None, point: Some(point) }
}

#[tokio::test]
async fn what_is_read_back_is_what_the_core_holds() {
    let dir = tempfile::tempdir().unwrap();
    let mut both = Both::open(dir.path(), KEPT);
    both.ask(create_backbone());
    for number in 0..5 {
        both.ask(create_job(number));
    }
    both.ask(Request::CancelJob(JobTarget { name: job(1), etag: None }));
    both.ask(Request::DeleteJob(JobTarget { name: job(1), etag: None }));
    let mut rows = both.core.rows().clone();
    let points = vec![
        point(0, 1, Point::Training(StepMetrics::default())),
        point(1, 1, Point::Evaluation(EvalMetrics::default())),
        point(2, 2, Point::Training(StepMetrics { loss: 0.1 + 0.2, ..StepMetrics::default() })),
    ];
    let more = [Change::AppendMetrics(job(0), points.clone())];
    both.store.commit(&more).unwrap();
    rows.apply(&more[0]);
    let reader = both.store.reader();
    assert_eq!(
        reader.metrics("jobs/j0", 1).await.unwrap(),
        Page { rows: points[1..].to_vec(), first: Some(1), next: 3 }
    );
    let cluster = both.store.cluster().to_owned();
    drop(both);
    let (store, read) = Store::open(dir.path(), KEPT).unwrap();
    assert_eq!(read, rows);
    assert_eq!(store.cluster(), cluster);
}

#[tokio::test]
async fn events_have_every_revision_once_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut both = Both::open(dir.path(), Kept { events: 10, ..KEPT });
    both.ask(create_backbone());
    for number in 0..30 {
        both.ask(create_job(number));
    }
    let reader = both.store.reader();
    let newest = both.core.revision();
    assert_eq!(reader.bounds().await.unwrap(), Some((newest - 9, newest)));
    let page = reader.events(0, Vec::new()).await.unwrap();
    let revisions: Vec<u64> = page.rows.iter().map(|row| row.stamp.revision).collect();
    assert_eq!(revisions, (newest - 9..=newest).collect::<Vec<_>>());
    assert_eq!(page.next, newest + 1);
    assert_eq!(page.rows[0].stamp.actor, "ana");
    let one = reader.events(0, vec!["jobs/j29".to_owned(), "workers/".to_owned()]).await.unwrap();
    assert_eq!((one.first, one.next), (Some(newest - 9), newest + 1));
    assert!(one.rows.iter().all(|row| row.resource.name() == "jobs/j29") && !one.rows.is_empty());
    drop(both);
    let (_, rows) = Store::open(dir.path(), KEPT).unwrap();
    assert_eq!(rows.revision, newest);
}

#[tokio::test]
async fn logs_keep_their_newest_lines_and_go_with_their_job() {
    let dir = tempfile::tempdir().unwrap();
    let mut both = Both::open(dir.path(), KEPT);
    both.ask(create_backbone());
    both.ask(create_job(0));
    for start in (0..250).step_by(50) {
        let line = |offset: u64| LogLine { offset, rank: (offset % 2) as u32, ..LogLine::default() };
        let lines = (start..start + 50).map(line).collect();
        both.store.commit(&[Change::AppendLogs("jobs/j0".to_owned(), lines)]).unwrap();
    }
    let reader = both.store.reader();
    let page = reader.logs("jobs/j0", 0, None).await.unwrap();
    assert_eq!((page.rows[0].offset, page.rows.len(), page.next), (150, 100, 250));
    assert_eq!(reader.oldest_line("jobs/j0").await.unwrap(), Some(150));
    let page = reader.logs("jobs/j0", 0, Some(1)).await.unwrap();
    assert_eq!((page.rows[0].offset, page.rows.len()), (151, 50));
    both.ask(Request::CancelJob(JobTarget { name: job(0), etag: None }));
    both.ask(Request::DeleteJob(JobTarget { name: job(0), etag: None }));
    assert!(reader.logs("jobs/j0", 0, None).await.unwrap().rows.is_empty());
    assert_eq!(reader.oldest_line("jobs/j0").await.unwrap(), None);
}

#[test]
fn a_second_coordinator_is_refused_until_the_first_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(dir.path(), KEPT).unwrap();
    let error = Store::open(dir.path(), KEPT).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(first);
    assert!(Store::open(dir.path(), KEPT).is_ok());
}

#[test]
fn tables_of_a_later_version_and_foreign_databases_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path(), KEPT).unwrap());
    let path = dir.path().join("state.sqlite");
    Connection::open(&path).unwrap().pragma_update(None, "user_version", SCHEMA + 1).unwrap();
    let error = Store::open(dir.path(), KEPT).unwrap_err();
    assert!(matches!(error, Error::Newer { found, .. } if found == SCHEMA + 1), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.sqlite");
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE songs (name TEXT)").unwrap();
    let error = Store::open(dir.path(), KEPT).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
}

#[test]
fn a_damaged_row_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut both = Both::open(dir.path(), KEPT);
    both.ask(create_backbone());
    both.store.connection.execute("UPDATE rows SET body = '{' WHERE kind = 'backbone'", []).unwrap();
    drop(both);
    let error = Store::open(dir.path(), KEPT).unwrap_err().to_string();
    assert!(error.contains("backbone") && error.contains("backbones/b"), "{error}");
}

#[test]
fn a_commit_that_fails_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut both = Both::open(dir.path(), KEPT);
    both.ask(create_backbone());
    let before = both.core.rows().clone();
    both.store.connection.execute_batch("DROP TABLE logs; DROP TABLE events").unwrap();
    let key = None;
    let input = Input::Request { actor: String::new(), key, request: create_job(0) };
    let effects = both.core.handle(input, Time(2000));
    assert!(both.store.commit(&effects.changes).is_err());
    let jobs: i64 = both
        .store
        .connection
        .query_row("SELECT count(*) FROM rows WHERE kind = 'job'", [], |row| row.get(0))
        .unwrap();
    assert_eq!((jobs, before.jobs.len()), (0, 0));
}
