//! A coordinator on 127.0.0.1, and an agent that speaks the protocol and has no model.
#![allow(dead_code, unreachable_pub, reason = "each test file takes what it needs")]

use std::{path::Path, time::Duration};

use incipit_coordinator::{Config, Running, serve};
use incipit_proto::{
    client::{Client, ClientConfig, PROTOCOL},
    v1::{
        self, AttachRequest, AttachResponse, Backbone, CreateBackboneRequest, CreateJobRequest, DataSource,
        Hello, Job, Machine, TrainingSpec, attach_request, attach_response, data_source,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

pub fn config(data: &Path) -> Config {
    Config {
        insecure: true,
        listen: "127.0.0.1:0".parse().unwrap(),
        metrics_listen: Some("127.0.0.1:0".parse().unwrap()),
        data_roots: vec!["/data".into()],
        model_roots: vec!["/models".into()],
        ..Config::new(data)
    }
}

/// Starts a coordinator, once whoever had the directory before has let go of it.
pub async fn start(config: Config) -> Running {
    for _ in 0..100 {
        match serve(config.clone(), std::future::pending()).await {
            Ok(running) => return running,
            Err(error) if error.to_string().contains("another coordinator") => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the directory stays in use");
}

pub fn client_config(running: &Running) -> ClientConfig {
    ClientConfig::new(format!("http://{}", running.address()))
}

pub async fn connect(running: &Running) -> Client {
    Client::connect(&client_config(running)).await.unwrap()
}

pub fn uuid() -> String {
    uuid::Uuid::new_v4().to_string()
}

pub fn backbone_request(id: &str) -> CreateBackboneRequest {
    let backbone = Backbone { model: "google/t5-small".to_owned(), ..Backbone::default() };
    CreateBackboneRequest {
        backbone_id: id.to_owned(),
        backbone: Some(backbone),
        request_id: uuid(),
        validate_only: false,
    }
}

pub fn source() -> DataSource {
    let source = Some(data_source::Source::Path("/data/train.jsonl".to_owned()));
    DataSource { source, file_name: "train.jsonl".to_owned() }
}

pub fn job_request(id: &str) -> CreateJobRequest {
    let spec = TrainingSpec {
        train: Some(source()),
        eval: Some(source()),
        steps: Some(1000),
        ..TrainingSpec::default()
    };
    let job = Job { backbone: "backbones/b".to_owned(), spec: Some(spec), ..Job::default() };
    CreateJobRequest {
        job_id: id.to_owned(),
        job: Some(job),
        request_id: uuid(),
        ..CreateJobRequest::default()
    }
}

/// A cluster with a backbone `b`.
pub async fn with_backbone(running: &Running) -> Client {
    let client = connect(running).await;
    client.backbones().create_backbone(backbone_request("b")).await.unwrap();
    client
}

pub async fn submit(client: &Client, id: &str) -> Job {
    client.jobs().create_job(job_request(id)).await.unwrap().into_inner()
}

/// An agent without engines.
pub struct Agent {
    pub sender: mpsc::Sender<AttachRequest>,
    pub receiver: Streaming<AttachResponse>,
    sequence: u64,
}

pub fn hello(worker: &str) -> Hello {
    Hello {
        protocol_min: PROTOCOL,
        protocol_max: PROTOCOL,
        worker: format!("workers/{worker}"),
        incarnation: uuid(),
        version: "0".to_owned(),
        machine: Some(Machine {
            hostname: worker.to_owned(),
            cpu_cores: 2,
            memory_bytes: 1 << 34,
            collectives: vec!["local".to_owned()],
            ..Machine::default()
        }),
        slots: 4,
        ..Hello::default()
    }
}

impl Agent {
    /// Connects and says hello. The welcome is not read yet.
    pub async fn attach(client: &Client, hello: Hello) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::channel(64);
        let message = attach_request::Message::Hello(hello);
        sender.send(AttachRequest { sequence: 0, message: Some(message) }).await.unwrap();
        let receiver = client.agent().attach(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { sender, receiver, sequence: 0 })
    }

    pub async fn next(&mut self) -> Result<attach_response::Message, Status> {
        let message = tokio::time::timeout(Duration::from_secs(10), self.receiver.message());
        let message = message.await.expect("nothing came for 10 s")?;
        message.and_then(|message| message.message).ok_or_else(|| Status::aborted("the stream ended"))
    }

    /// The next message that `pick` wants; others are left out.
    pub async fn until<T>(
        &mut self,
        pick: impl Fn(attach_response::Message) -> Option<T>,
    ) -> Result<T, Status> {
        loop {
            if let Some(picked) = pick(self.next().await?) {
                return Ok(picked);
            }
        }
    }

    pub async fn say(&self, message: attach_request::Message) {
        self.sender.send(AttachRequest { sequence: 0, message: Some(message) }).await.unwrap();
    }

    /// Sends a report, and says under which number.
    pub async fn report(&mut self, message: attach_request::Message) -> u64 {
        self.sequence += 1;
        let message = AttachRequest { sequence: self.sequence, message: Some(message) };
        self.sender.send(message).await.unwrap();
        self.sequence
    }

    pub async fn acknowledged(&mut self, sequence: u64) -> Result<(), Status> {
        self.until(|message| match message {
            attach_response::Message::Acknowledged(stored) if stored >= sequence => Some(()),
            _ => None,
        })
        .await
    }

    /// Waits for engines to hold, and says that they are ready.
    pub async fn load(&mut self) -> v1::EngineAssignment {
        let engine = self
            .until(|message| match message {
                attach_response::Message::Engines(engines) => engines.engines.into_iter().next(),
                _ => None,
            })
            .await
            .unwrap();
        let ready = v1::EngineReady {
            pid: 7,
            fingerprint: "f".repeat(64),
            num_parameters: 60_000_000,
            d_model: 512,
            num_layers: 8,
            microbatch_tokens: 4096,
        };
        let report = v1::EngineReport {
            backbone: engine.backbone.clone(),
            epoch: engine.epoch,
            rank: engine.ranks[0],
            report: Some(v1::engine_report::Report::Ready(ready)),
        };
        self.report(attach_request::Message::Engine(report)).await;
        engine
    }

    /// Waits until there is a job to train.
    pub async fn job(&mut self) -> (v1::JobAssignments, v1::JobAssignment) {
        self.until(|message| match message {
            attach_response::Message::Jobs(jobs) => jobs.jobs.first().cloned().map(|job| (jobs.clone(), job)),
            _ => None,
        })
        .await
        .unwrap()
    }

    /// Reports something of a job.
    pub async fn of_job(
        &mut self,
        assigned: &(v1::JobAssignments, v1::JobAssignment),
        report: v1::job_report::Report,
    ) -> u64 {
        let (jobs, job) = assigned;
        let report = v1::JobReport {
            backbone: jobs.backbone.clone(),
            epoch: jobs.epoch,
            job: job.job.clone(),
            attempt: job.attempt,
            report: Some(report),
        };
        self.report(attach_request::Message::Job(report)).await
    }
}

/// The agent `w`, which has loaded its backbone, and the job `j`, which it was given.
pub async fn training(client: &Client) -> (Agent, (v1::JobAssignments, v1::JobAssignment)) {
    submit(client, "j").await;
    let mut agent = Agent::attach(client, hello("w")).await.unwrap();
    agent.load().await;
    let assigned = agent.job().await;
    (agent, assigned)
}

/// Points of steps.
pub fn points(steps: std::ops::RangeInclusive<u64>) -> v1::JobMeasured {
    let point = |step| v1::MetricPoint {
        step,
        point: Some(v1::metric_point::Point::Training(v1::StepMetrics {
            loss: 1.0 / step as f64,
            num_tokens: 100,
            ..v1::StepMetrics::default()
        })),
        ..v1::MetricPoint::default()
    };
    v1::JobMeasured { points: steps.map(point).collect() }
}

/// Stores a blob.
pub async fn upload(client: &Client, bytes: &[u8]) -> Result<String, Status> {
    let digest = blake3::hash(bytes).to_hex().to_string();
    upload_as(client, &digest, bytes.len() as u64, bytes).await?;
    Ok(digest)
}

/// Stores bytes that are announced as something.
pub async fn upload_as(client: &Client, digest: &str, size: u64, bytes: &[u8]) -> Result<u64, Status> {
    let mut messages: Vec<v1::WriteBlobRequest> = bytes
        .chunks(1 << 20)
        .map(|data| v1::WriteBlobRequest { data: data.to_vec().into(), ..v1::WriteBlobRequest::default() })
        .collect();
    let first = v1::WriteBlobRequest { digest: digest.to_owned(), size, ..v1::WriteBlobRequest::default() };
    messages.insert(0, first);
    let response = client.blobs().write_blob(tokio_stream::iter(messages)).await?;
    Ok(response.into_inner().size)
}

/// What a URL of plain HTTP says: the first line and the body.
pub async fn get(address: std::net::SocketAddr, path: &str) -> (String, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

const ALONE: &str = "INCIPIT_TEST_ALONE";

/// Whether this process has the test of this name for itself; if not, runs it in one that has.
pub fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--include-ignored", "--nocapture"])
        .env(ALONE, "1")
        .status();
    assert!(child.unwrap().success(), "{test} failed; what it said is above");
    false
}
