//! Streams: every revision once, from where one left off, with bounded memory.

use super::common::*;
use incipit_coordinator::{
    Config, Limits,
    core::{
        self, Core, Input, Request,
        backbone::{BackboneSpec, Collective, Device, Dtype},
        effects::Change,
        input::{JobTarget, NewBackbone, NewJob},
        job::RetryPolicy,
        time::Time,
    },
    store::{Kept, Store},
};
use incipit_proto::{
    Problem,
    client::Client,
    names::{BackboneName, JobName},
    v1::{
        Event, GetServerInfoRequest, StreamLogsRequest, StreamMetricsRequest, WatchEventsRequest,
        WatchEventsResponse, attach_request, job_report,
    },
};
use std::{path::Path, time::Duration};
use tonic::{Code, Status, Streaming};

async fn watch(
    client: &Client,
    start_revision: u64,
    prefixes: &[&str],
) -> Result<Streaming<WatchEventsResponse>, Status> {
    let name_prefixes = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
    let request = WatchEventsRequest { start_revision, name_prefixes };
    Ok(client.events().watch_events(request).await?.into_inner())
}

/// Reads until `last` was seen.
async fn read_to(stream: &mut Streaming<WatchEventsResponse>, last: u64) -> Vec<Event> {
    let mut events = Vec::new();
    while events.last().is_none_or(|event: &Event| event.revision < last) {
        let message = tokio::time::timeout(Duration::from_secs(60), stream.message()).await;
        events.extend(message.expect("nothing came for 60 s").unwrap().unwrap().events);
    }
    events
}

async fn newest(client: &Client) -> u64 {
    client.events().get_server_info(GetServerInfoRequest {}).await.unwrap().into_inner().revision
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_goes_on_where_it_was_sees_each_revision_once() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let mut first = watch(&client, 1, &[]).await.unwrap();
    submit(&client, "a").await;
    let middle = newest(&client).await;
    let mut seen = read_to(&mut first, middle).await;
    drop(first);
    submit(&client, "b").await;
    drop(running);
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let mut second = watch(&client, middle + 1, &[]).await.unwrap();
    submit(&client, "c").await;
    let last = newest(&client).await;
    seen.extend(read_to(&mut second, last).await);
    let revisions: Vec<u64> = seen.iter().map(|event| event.revision).collect();
    assert_eq!(revisions, (1..=last).collect::<Vec<_>>());
    let mut some = watch(&client, 1, &["jobs/b"]).await.unwrap();
    let message = some.message().await.unwrap().unwrap();
    assert!(message.events.iter().all(|event| event.name == "jobs/b") && !message.events.is_empty());
    assert_eq!(message.next_revision, last + 1, "what was not wanted is passed over too");
    let late = watch(&client, last + 2, &[]).await.expect_err("that is to come");
    assert_eq!(late.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_with_nothing_to_see_hears_where_everything_stands() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let mut stream = watch(&client, 0, &["prompts/"]).await.unwrap();
    submit(&client, "a").await;
    let last = newest(&client).await;
    let mark = tokio::time::timeout(Duration::from_secs(15), stream.message()).await;
    let mark = mark.expect("no mark came").unwrap().unwrap();
    assert_eq!((mark.events.len(), mark.next_revision), (0, last + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_what_is_compacted_ends_and_says_where_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { events: 5, ..Limits::default() };
    let running = start(Config { limits, ..config(dir.path()) }).await;
    let client = with_backbone(&running).await;
    for number in 0..10 {
        submit(&client, &format!("j{number}")).await;
    }
    let status = watch(&client, 1, &[]).await.expect_err("revision 1 is gone");
    let problem = Problem::from(&status);
    assert_eq!((problem.code, &*problem.reason), (Code::OutOfRange, "REVISION_COMPACTED"));
    let info = client.events().get_server_info(GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(problem.metadata["compact_revision"], info.compact_revision.to_string());
    assert_eq!(info.compact_revision, info.revision - 4);
    let mut stream = watch(&client, info.compact_revision, &[]).await.unwrap();
    assert_eq!(read_to(&mut stream, info.revision).await.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_reads_nothing_is_cut_off_and_may_go_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { watcher_seconds: 1, ..Limits::default() };
    let running = start(Config { limits, ..config(dir.path()) }).await;
    let client = with_backbone(&running).await;
    let mut stream = watch(&client, 1, &[]).await.unwrap();
    for number in 0..800 {
        let mut request = job_request(&format!("j{number}"));
        let spec = request.job.as_mut().unwrap().spec.as_mut().unwrap();
        spec.inputs = Some("x".repeat(15_000)); // More than the connection's windows take.
        client.jobs().create_job(request).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut seen: Vec<u64> = Vec::new();
    let status = loop {
        match stream.message().await {
            Ok(page) => seen.extend(page.expect("it ended").events.iter().map(|event| event.revision)),
            Err(status) => break status,
        }
    };
    let problem = Problem::from(&status);
    assert_eq!((problem.code, &*problem.reason), (Code::ResourceExhausted, "WATCHER_TOO_SLOW"));
    let next: u64 = problem.metadata["next_revision"].parse().unwrap();
    let last = newest(&client).await;
    assert!(next <= last, "it was cut off before the end");
    let mut stream = watch(&client, next, &[]).await.unwrap();
    seen.extend(read_to(&mut stream, last).await.iter().map(|event| event.revision));
    assert_eq!(seen, (1..=last).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_logs_are_followed_as_they_come_until_the_job_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let (mut agent, assigned) = training(&client).await;
    let request = StreamMetricsRequest { name: "jobs/j".to_owned(), offset: 2, follow: true };
    let mut metrics = client.jobs().stream_metrics(request).await.unwrap().into_inner();
    let request =
        StreamLogsRequest { name: "jobs/j".to_owned(), follow: true, ..StreamLogsRequest::default() };
    let mut logs = client.jobs().stream_logs(request).await.unwrap().into_inner();
    let following = tokio::spawn(async move {
        let (mut steps, mut lines) = (Vec::new(), Vec::new());
        while let Some(page) = metrics.message().await.unwrap() {
            steps.extend(page.points.iter().map(|point| point.step));
        }
        while let Some(page) = logs.message().await.unwrap() {
            lines.extend(page.lines.iter().map(|line| (line.offset, line.text.clone())));
        }
        (steps, lines)
    });
    for start in [1, 11, 21] {
        agent.of_job(&assigned, job_report::Report::Measured(points(start..=start + 9))).await;
        let line = incipit_proto::v1::LogLine { text: format!("step {start}"), ..Default::default() };
        let report = incipit_proto::v1::LogReport {
            backbone: "backbones/b".to_owned(),
            job: "jobs/j".to_owned(),
            lines: vec![line],
        };
        agent.report(attach_request::Message::Logs(report)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut left = incipit_proto::v1::JobLeft { step: 30, ..Default::default() };
    left.set_state(incipit_proto::v1::JobState::Failed);
    left.set_reason(incipit_proto::v1::JobReason::NonFinite);
    agent.of_job(&assigned, job_report::Report::Left(left)).await;
    let (steps, lines) = tokio::time::timeout(Duration::from_secs(20), following).await.unwrap().unwrap();
    assert_eq!(steps, (3..=30).collect::<Vec<_>>());
    let texts: Vec<&str> = lines.iter().map(|(_, text)| &**text).collect();
    assert_eq!(texts, ["step 1", "step 11", "step 21"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_for_lines_that_were_dropped_is_told_where_those_begin_that_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { log_lines: 4, ..Limits::default() };
    let running = start(Config { limits, ..config(dir.path()) }).await;
    let client = with_backbone(&running).await;
    let (mut agent, _assigned) = training(&client).await;
    let line = |n: u32| incipit_proto::v1::LogLine { rank: n % 2, text: n.to_string(), ..Default::default() };
    let report = incipit_proto::v1::LogReport {
        backbone: "backbones/b".to_owned(),
        job: "jobs/j".to_owned(),
        lines: (0..10).map(line).collect(),
    };
    agent.report(attach_request::Message::Logs(report)).await;
    for (offset, rank, first, texts) in [
        (0, None, 6, &["6", "7", "8", "9"][..]),
        (7, None, 6, &["7", "8", "9"]),
        (0, Some(1), 6, &["7", "9"]),
    ] {
        let page = loop {
            let request = StreamLogsRequest { name: "jobs/j".to_owned(), offset, rank, follow: false };
            let mut logs = client.jobs().stream_logs(request).await.unwrap().into_inner();
            // The report may still be on its way.
            if let Some(page) = logs.message().await.unwrap() {
                break page;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let found: Vec<&str> = page.lines.iter().map(|line| &*line.text).collect();
        assert_eq!((page.first_offset, page.next_offset, &found[..]), (first, 10, texts));
    }
}

/// Makes `events` events in a data directory, as a coordinator would: a job that is paused and resumed.
fn fill(dir: &Path, events: u64) {
    let (mut store, rows) = Store::open(dir, Kept { events: u64::MAX, log_lines: 10 }).unwrap();
    let mut core = Core::restore(core::Config::default(), rows, Time(1));
    let mut changes: Vec<Change> = Vec::new();
    let mut ask = |request| {
        let input = Input::Request { actor: "test".to_owned(), key: None, request };
        let effects = core.handle(input, Time(2));
        effects.reply.unwrap().unwrap();
        changes.extend(effects.changes);
        if changes.len() >= 5000 {
            store.commit(&std::mem::take(&mut changes)).unwrap();
        }
        core.revision()
    };
    let spec = BackboneSpec {
        model: "google/t5-small".to_owned(),
        dtype: Dtype::Bf16,
        device: Device::Cpu,
        tp: 1,
        dp: 1,
        min_dp: 0,
        collective: Collective::Local,
        microbatch_tokens: 0,
        max_running_jobs: 32,
    };
    let backbone = BackboneName::of_id("b", "b").unwrap();
    let new = NewBackbone { name: backbone.clone(), spec, labels: Default::default() };
    ask(Request::CreateBackbone { backbone: Box::new(new), validate_only: false });
    let name = JobName::of_id("j", "j").unwrap();
    let new = NewJob {
        name: name.clone(),
        backbone,
        spec: job_request("j").job.unwrap().spec.unwrap(),
        priority: 10,
        retry_policy: RetryPolicy::default(),
        labels: Default::default(),
        start: None,
    };
    ask(Request::CreateJob { job: Box::new(new), validate_only: false });
    while {
        ask(Request::PauseJob(JobTarget { name: name.clone(), etag: None }));
        ask(Request::ResumeJob(JobTarget { name: name.clone(), etag: None })) < events
    } {}
    store.commit(&changes).unwrap();
}

/// Kibibytes of this process that are in memory, at most since the last reset.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn many_events(events: u64) {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), events);
    let limits = Limits { events: 2 * events, ..Limits::default() };
    let running = start(Config { limits, ..config(dir.path()) }).await;
    let client = connect(&running).await;
    let last = newest(&client).await;
    assert!(last >= events);
    let before = peak();
    let mut idle = watch(&client, 1, &[]).await.unwrap(); // Reads one page, and no more.
    idle.message().await.unwrap().unwrap();
    let readers = (0..2).map(|_| {
        let client = client.clone();
        tokio::spawn(async move {
            let (mut stream, mut expected) = (watch(&client, 1, &[]).await.unwrap(), 1);
            while expected <= last {
                for event in stream.message().await.unwrap().unwrap().events {
                    assert_eq!(event.revision, expected);
                    expected += 1;
                }
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    let grown = peak().saturating_sub(before) / 1024;
    println!("{last} events, 2 readers and one that does not read: {grown} MiB more at the peak");
    assert!(grown < 100, "memory has grown by {grown} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_events_are_read_by_several_with_bounded_memory() {
    if alone("streams::a_hundred_thousand_events_are_read_by_several_with_bounded_memory") {
        many_events(100_000).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a million events"]
async fn a_million_events_are_read_by_several_with_bounded_memory() {
    if alone("streams::a_million_events_are_read_by_several_with_bounded_memory") {
        many_events(1_000_000).await;
    }
}
