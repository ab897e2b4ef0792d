//! What was acknowledged is there after `kill -9`.

use super::common::*;
use incipit_coordinator::Config;
use incipit_proto::{
    client::{Client, ClientConfig},
    v1::{ListJobsRequest, WatchEventsRequest},
};
use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

const DIR: &str = "INCIPIT_TEST_CHILD_DIR";

/// No test: what the child process of the others runs.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: run by other tests, as a process of its own"]
async fn a_coordinator_in_a_process_of_its_own() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let running = start(Config { metrics_listen: None, ..config(Path::new(&dir)) }).await;
    println!("\nlistens on {}", running.address());
    running.wait().await.unwrap();
}

struct Process {
    child: Child,
    endpoint: String,
}

impl Process {
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::a_coordinator_in_a_process_of_its_own", "--ignored", "--nocapture"])
            .env(DIR, dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said =
            lines.map(Result::unwrap).find_map(|line| line.strip_prefix("listens on ").map(str::to_owned));
        Self { child, endpoint: format!("http://{}", said.expect("it ended before it listened")) }
    }

    async fn client(&self) -> Client {
        Client::connect(&ClientConfig { attempts: 1, ..ClientConfig::new(&self.endpoint) }).await.unwrap()
    }

    /// `SIGKILL`.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_blobs_and_events_that_were_acknowledged_survive_kill_9_in_the_middle_of_requests() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let client = process.client().await;
    client.backbones().create_backbone(backbone_request("b")).await.unwrap();
    let blob = upload(&client, b"data").await.unwrap();
    let submitting = (0..8).map(|task| {
        let client = client.clone();
        tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for number in 0.. {
                let id = format!("j{task}-{number}");
                if client.jobs().create_job(job_request(&id)).await.is_err() {
                    break;
                }
                acknowledged.push(format!("jobs/{id}"));
            }
            acknowledged
        })
    });
    let submitting: Vec<_> = submitting.collect();
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    process.kill();
    let mut acknowledged = Vec::new();
    for task in submitting {
        acknowledged.extend(task.await.unwrap());
    }
    println!("{} jobs were acknowledged before the kill", acknowledged.len());
    assert!(!acknowledged.is_empty());

    let process = Process::start(dir.path());
    let client = process.client().await;
    let (mut found, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListJobsRequest { page_size: 1000, page_token: token, ..Default::default() };
        let page = client.jobs().list_jobs(request).await.unwrap().into_inner();
        found.extend(page.jobs.into_iter().map(|job| job.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let lost: Vec<_> = acknowledged.iter().filter(|name| !found.contains(name)).collect();
    assert!(lost.is_empty(), "acknowledged, and not there: {lost:?}");
    let request = incipit_proto::v1::FindBlobsRequest { digests: vec![blob] };
    assert!(client.blobs().find_blobs(request).await.unwrap().into_inner().missing.is_empty());
    let request = WatchEventsRequest { start_revision: 1, name_prefixes: Vec::new() };
    let mut events = client.events().watch_events(request).await.unwrap().into_inner();
    let mut expected = 1;
    while expected <= found.len() as u64 {
        for event in events.message().await.unwrap().unwrap().events {
            assert_eq!(event.revision, expected, "every revision is there once");
            expected += 1;
        }
    }
    process.kill();
}
