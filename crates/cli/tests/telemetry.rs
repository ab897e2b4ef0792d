//! What the program tells of itself while it runs: a log that programs read, and spans that a collector takes.

mod common;
#[path = "common/fake.rs"]
#[allow(dead_code)]
mod fake;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Ran, command, demo};
use fake::{Fake, State};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value as Any};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tonic::{Request, Response, Status};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Nothing here takes as long; a machine that is busy may.
const PATIENCE: Duration = Duration::from_secs(120);

/// A program that lasts. Its lines on standard error are read as they come.
struct Lasting {
    child: Child,
    lines: Receiver<String>,
    read: Vec<String>,
}

impl Drop for Lasting {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Lasting {
    fn start(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = command(args);
        command.envs(variables.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, lines, read: Vec::new() }
    }

    /// The first line that has this in it.
    fn wait_for(&mut self, part: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("no {part:?} in:\n{}", self.read.join("\n")));
            self.read.push(line.clone());
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Asks it to end; all its lines.
    fn end(mut self) -> Vec<String> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it runs");
        assert!(self.child.wait().expect("it ends").success(), "{}", self.read.join("\n"));
        let rest = self.lines.iter();
        self.read.drain(..).chain(rest).collect()
    }
}

fn coordinator(data: &std::path::Path, more: &[&str], variables: &[(&str, &str)]) -> (Lasting, String) {
    let data = data.display().to_string();
    let args = ["coordinator", "--data", &data, "--listen", "127.0.0.1:0", "--insecure", "--model-root", "/"];
    let mut coordinator = Lasting::start(&[&args, more].concat(), variables);
    let line = coordinator.wait_for("the coordinator is at ");
    let url = line.split("the coordinator is at ").nth(1).and_then(|rest| rest.split(',').next());
    (coordinator, url.expect("an address").to_owned())
}

fn worker(url: &str, dir: &std::path::Path, more: &[&str], variables: &[(&str, &str)]) -> Lasting {
    let dir = dir.display().to_string();
    let args = ["worker", "-v", "--coordinator", url, "--name", "w1", "--slots", "1", "--state-dir", &dir];
    let mut worker = Lasting::start(&[&args, more].concat(), variables);
    worker.wait_for("connected to the coordinator");
    worker
}

fn ask(url: &str, args: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = command(args);
    command.env("INCIPIT_COORDINATOR", url).envs(variables.iter().copied());
    command.output().expect("the program starts").into()
}

/// A line of the log, which has what every line has.
fn parsed(line: &str) -> Value {
    let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}"));
    for field in ["timestamp", "level", "target", "message"] {
        assert!(value[field].is_string(), "no {field} in {line}");
    }
    value
}

#[test]
fn every_line_of_a_json_log_is_an_object_that_says_where_it_comes_from() {
    let dir = tempfile::tempdir().expect("a directory");
    let (coordinator, url) = coordinator(&dir.path().join("c"), &["--log-format", "json", "-v"], &[]);
    // A flag or a variable: it is the same.
    let worker = worker(&url, &dir.path().join("w"), &[], &[("INCIPIT_LOG_FORMAT", "json")]);
    let lines: Vec<Value> = worker.end().iter().map(|line| parsed(line)).collect();
    assert!(lines.len() >= 2, "{lines:?}");
    assert!(lines.iter().all(|line| line["spans"][0]["worker"] == "w1"), "{lines:?}");
    let lines: Vec<Value> = coordinator.end().iter().map(|line| parsed(line)).collect();
    let note = lines.iter().find(|line| line["message"].as_str().is_some_and(|text| text.contains(&url)));
    assert_eq!(note.expect("it says where it is")["level"], "INFO");
    assert!(lines.iter().any(|line| line["target"] == "incipit_coordinator::server"), "{lines:?}");
}

#[test]
fn errors_are_in_the_json_log_and_a_format_that_there_is_not_is_refused() {
    let ran = ask("http://127.0.0.1:1", &["job", "list", "--log-format", "json"], &[]);
    assert_eq!(ran.code, 1);
    let line = parsed(ran.stderr.trim());
    assert_eq!((&line["level"], &line["spans"][0]["name"]), (&"ERROR".into(), &"command".into()), "{line}");
    assert!(line["message"].as_str().expect("a text").starts_with("cannot reach a coordinator"), "{line}");
    let ran = ask("http://127.0.0.1:1", &["job", "list"], &[("INCIPIT_LOG_FORMAT", "yaml")]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("INCIPIT_LOG_FORMAT: \"yaml\""), "{}", ran.stderr);
}

/// Takes spans, as a collector does.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[derive(Clone, Debug)]
struct Span {
    service: String,
    name: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    attributes: Vec<KeyValue>,
}

impl Span {
    fn attribute(&self, key: &str) -> Option<String> {
        text(&self.attributes, key)
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.clone()?.value? {
        Any::StringValue(text) => Some(text),
        Any::IntValue(number) => Some(number.to_string()),
        _ => None,
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().expect("no test panics with it");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = text(&attributes, "service.name").unwrap_or_default();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                spans.push(Span {
                    service: service.clone(),
                    name: span.name,
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    attributes: span.attributes,
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// A collector, where it is, and what it runs on.
    fn start() -> (Self, String, tokio::runtime::Runtime) {
        let collector = Self::default();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server =
            tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        runtime.spawn(async move { server.serve_with_incoming(incoming).await });
        (collector, url, runtime)
    }

    /// The first span like this, once it has come.
    fn wait_for(&self, what: &str, wanted: impl Fn(&Span) -> bool) -> Span {
        let start = Instant::now();
        loop {
            let spans = self.0.lock().expect("no test panics with it").clone();
            if let Some(span) = spans.iter().find(|span| wanted(span)) {
                return span.clone();
            }
            assert!(start.elapsed() < PATIENCE, "no {what} among {spans:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_command_and_the_request_that_it_makes_are_one_trace() {
    let dir = tempfile::tempdir().expect("a directory");
    let (collector, endpoint, _runtime) = Collector::start();
    let to_collector = [(ENDPOINT, &*endpoint)];
    let (coordinator, url) = coordinator(dir.path(), &[], &to_collector);
    ask(&url, &["job", "list"], &to_collector).ok();
    let named = [(ENDPOINT, &*endpoint), ("OTEL_SERVICE_NAME", "ci"), ("OTEL_TRACES_SAMPLER", "always_off")];
    ask(&url, &["workers", "list"], &named).ok();
    coordinator.end();
    let spans = collector.0.lock().expect("no test panics with it").clone();
    let [asking] = &spans.iter().filter(|span| span.service == "incipit").collect::<Vec<_>>()[..] else {
        panic!("not one span of the command: {spans:#?}")
    };
    assert_eq!((&*asking.name, asking.parent.len()), ("incipit job list", 0));
    let request = spans.iter().find(|span| span.name == "incipit.v1.JobService/ListJobs").expect("a request");
    assert_eq!((&request.trace, &request.parent), (&asking.trace, &asking.id));
    assert_eq!(request.service, "incipit-coordinator");
    assert_eq!(request.attribute("code").as_deref(), Some("Ok"));
    assert_eq!(request.attribute("actor").as_deref(), Some("anonymous"));
    // Whoever is not to be traced is not, and neither is what descends from it.
    assert!(
        !spans.iter().any(|span| span.service == "ci" || span.name.contains("ListWorkers")),
        "{spans:#?}"
    );
}

#[test]
fn the_way_of_a_job_can_be_followed_in_the_spans_of_its_worker() {
    let dir = tempfile::tempdir().expect("a directory");
    let (collector, endpoint, _runtime) = Collector::start();
    let (_coordinator, url) = coordinator(&dir.path().join("c"), &[], &[]);
    let _worker = worker(&url, &dir.path().join("w"), &[], &[(ENDPOINT, &endpoint)]);
    let (model, data) = (demo("model"), demo("data/train.jsonl"));
    ask(&url, &["backbone", "create", "--name", "b", "--model", &model, "--wait"], &[]).ok();
    let submit =
        ["job", "submit", "--name", "j", "--backbone", "b", "--train", &data, "--steps", "3", "--watch"];
    let more =
        ["--batch-size", "2", "--prompt-length", "4", "--max-input-length", "32", "--max-target-length", "6"];
    ask(&url, &[&submit[..], &more].concat(), &[]).ok();
    let of_group = |name: &'static str| {
        move |span: &Span| {
            let attribute = |key| span.attribute(key);
            span.name == name
                && attribute("backbone").as_deref() == Some("backbones/b")
                && attribute("epoch").is_some()
        }
    };
    let started = collector.wait_for("start of the engine", of_group("start engine"));
    assert_eq!(started.attribute("rank").as_deref(), Some("0"));
    for name in ["load", "meet"] {
        let span = collector.wait_for(name, of_group(name));
        assert_eq!((&*span.service, span.attribute("rank").as_deref()), ("incipit-engine", Some("0")));
    }
    let stay = collector.wait_for("stay of the job", of_group("attempt"));
    assert_eq!(stay.attribute("job").as_deref(), Some("jobs/j"));
    assert_eq!(stay.attribute("state").as_deref(), Some("JOB_STATE_SUCCEEDED"));
    for name in ["fetch files", "store checkpoint"] {
        let span = collector.wait_for(name, |span| span.name == name);
        assert_eq!((&*span.service, span.attribute("job").as_deref()), ("incipit-worker", Some("jobs/j")));
    }
}

#[test]
fn a_collector_that_is_not_there_or_is_mute_is_complained_of_once_and_fails_nothing() {
    let fake = Fake::start(State::default());
    // It takes connections, and says nothing.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let mute = format!("http://{}", listener.local_addr().expect("an address"));
    let alone = ask(&fake.url, &["job", "list"], &[]).ok();
    for endpoint in ["http://127.0.0.1:1", &mute, "nonsense at all"] {
        let start = Instant::now();
        let ran = ask(&fake.url, &["job", "list"], &[(ENDPOINT, endpoint)]).ok();
        println!("{endpoint}: {:?}", start.elapsed());
        assert_eq!(ran.stdout, alone.stdout);
        let said: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("spans")).collect();
        assert_eq!((said.len(), ran.stderr.contains("panicked")), (1, false), "{endpoint}: {}", ran.stderr);
    }
}
