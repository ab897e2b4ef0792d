//! What callers ask, over gRPC.

use super::common::*;
use incipit_coordinator::{Config, config::Limits};
use incipit_proto::{
    Problem,
    client::{Client, ClientConfig},
    v1::{
        AttachRequest, Backbone, CancelJobRequest, CreateJobRequest, DeleteJobRequest, GetBackboneRequest,
        GetJobRequest, GetServerInfoRequest, Job, JobState, ListJobsRequest, ListWorkersRequest, Method,
        UpdateBackboneRequest, UpdateJobRequest, attach_request, attach_response, job_report,
    },
};
use pbjson_types::FieldMask;
use std::time::Duration;
use tonic::{Code, Status};

fn reason(status: &Status) -> String {
    Problem::from(status).reason
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_submitted_is_shown_and_listed_a_page_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    for number in 0..25 {
        submit(&client, &format!("j{number}")).await;
    }
    let request = GetJobRequest { name: "jobs/j7".to_owned() };
    let job = client.unary(request, async |request| client.jobs().get_job(request).await).await.unwrap();
    assert_eq!((&*job.backbone, job.state()), ("backbones/b", JobState::Queued));
    let (mut names, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListJobsRequest { page_size: 10, page_token: token, ..ListJobsRequest::default() };
        let page = client.jobs().list_jobs(request).await.unwrap().into_inner();
        names.extend(page.jobs.into_iter().map(|job| job.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(names, (0..25).rev().map(|number| format!("jobs/j{number}")).collect::<Vec<_>>());
    let missing = GetJobRequest { name: "jobs/none".to_owned() };
    assert_eq!(client.jobs().get_job(missing).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_makes_one_job_also_over_a_restart_of_the_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let request = CreateJobRequest { job_id: String::new(), ..job_request("") };
    let first = client.jobs().create_job(request.clone()).await.unwrap().into_inner();
    let again = client.jobs().create_job(request.clone()).await.unwrap().into_inner();
    assert_eq!(first.name, again.name);
    drop(running); // Without a farewell.
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let again = client.jobs().create_job(request.clone()).await.unwrap().into_inner();
    assert_eq!(first.name, again.name);
    let jobs = client.jobs().list_jobs(ListJobsRequest::default()).await.unwrap().into_inner().jobs;
    assert_eq!(jobs.len(), 1);
    let other = CreateJobRequest { job_id: "other".to_owned(), ..request };
    let refused = client.jobs().create_job(other).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::InvalidArgument, "REQUEST_ID_REUSED"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_is_under_no_root_and_data_that_was_not_uploaded_are_refused() {
    use incipit_proto::v1::data_source::Source;
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let with = |source| {
        let mut request = job_request("j");
        request.job.as_mut().unwrap().spec.as_mut().unwrap().train.as_mut().unwrap().source = Some(source);
        request
    };
    let outside = client.jobs().create_job(with(Source::Path("/etc/passwd".to_owned()))).await.unwrap_err();
    assert_eq!(outside.code(), Code::InvalidArgument);
    let missing = with(Source::Digest("0".repeat(64)));
    let missing = client.jobs().create_job(missing).await.unwrap_err();
    assert_eq!((missing.code(), &*reason(&missing)), (Code::FailedPrecondition, "BLOB_MISSING"));
    let digest = upload(&client, b"{}").await.unwrap();
    client.jobs().create_job(with(Source::Digest(digest))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_of_a_job_and_a_backbone_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let job = submit(&client, "j").await;
    let mask =
        |paths: &[&str]| Some(FieldMask { paths: paths.iter().map(|&path| path.to_owned()).collect() });
    let new = Job { name: job.name.clone(), priority: 77, etag: job.etag.clone(), ..Job::default() };
    let request = UpdateJobRequest {
        job: Some(new),
        update_mask: mask(&["priority"]),
        request_id: uuid(),
        validate_only: false,
    };
    let changed = client.jobs().update_job(request.clone()).await.unwrap().into_inner();
    assert_eq!((changed.priority, &changed.spec), (77, &job.spec));
    // The same request has no second effect; as another one it is refused, for the job has changed.
    assert_eq!(client.jobs().update_job(request.clone()).await.unwrap().into_inner(), changed);
    let other = UpdateJobRequest { request_id: uuid(), ..request };
    assert_eq!(reason(&client.jobs().update_job(other).await.unwrap_err()), "ETAG_MISMATCH");
    let labels = [("team".to_owned(), "nlp".to_owned())].into();
    let new = Backbone { name: "backbones/b".to_owned(), max_running_jobs: 3, labels, ..Backbone::default() };
    let update_mask = mask(&["max_running_jobs", "labels.team"]);
    let request =
        UpdateBackboneRequest { backbone: Some(new), update_mask, request_id: uuid(), validate_only: false };
    client.backbones().update_backbone(request).await.unwrap();
    drop(running); // Without a farewell.
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let job = client.jobs().get_job(GetJobRequest { name: job.name }).await.unwrap().into_inner();
    assert_eq!(job.priority, 77);
    let request = GetBackboneRequest { name: "backbones/b".to_owned() };
    let backbone = client.backbones().get_backbone(request).await.unwrap().into_inner();
    assert_eq!((backbone.max_running_jobs, &*backbone.labels["team"]), (3, "nlp"));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_jobs_than_the_configuration_allows_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { jobs: 1, ..Limits::default() };
    let running = start(Config { limits, ..config(dir.path()) }).await;
    let client = with_backbone(&running).await;
    submit(&client, "j").await;
    let refused = client.jobs().create_job(job_request("k")).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::ResourceExhausted, "TOO_MANY_JOBS"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_coordinator_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _running = start(config(dir.path())).await;
    let error = incipit_coordinator::serve(config(dir.path()), std::future::pending()).await.unwrap_err();
    assert!(error.to_string().contains("another coordinator"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_asked_to_end_ends_in_order_with_streams_open() {
    let dir = tempfile::tempdir().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = incipit_coordinator::serve(config(dir.path()), async move {
        let _ = stopped.await;
    });
    let running = running.await.unwrap();
    let client = with_backbone(&running).await;
    let mut agent = Agent::attach(&client, hello("w")).await.unwrap();
    let watch = incipit_proto::v1::WatchEventsRequest::default();
    let mut events = client.events().watch_events(watch).await.unwrap().into_inner();
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), running.wait()).await.unwrap().unwrap();
    let status = loop {
        match events.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), &*reason(&status)), (Code::Unavailable, "SHUTTING_DOWN"));
    assert!(agent.until(|_| None::<()>).await.is_err());
    start(config(dir.path())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_from_the_queue_over_an_agent_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let (mut agent, assigned) = training(&client).await;
    let started = incipit_proto::v1::JobStarted::default();
    agent.of_job(&assigned, job_report::Report::Started(started)).await;
    agent.of_job(&assigned, job_report::Report::Measured(points(1..=100))).await;
    agent.of_job(&assigned, job_report::Report::Measured(points(51..=150))).await; // Made twice.
    let digest = upload(&client, b"weights").await.unwrap();
    let file = incipit_proto::v1::CheckpointFile { name: "prompt.safetensors".to_owned(), digest, size: 7 };
    let saved = incipit_proto::v1::CheckpointSaved {
        step: 150,
        files: vec![file],
        score: Some(0.5),
        best: true,
        tasks: Vec::new(),
    };
    agent.of_job(&assigned, job_report::Report::Saved(saved)).await;
    let mut left = incipit_proto::v1::JobLeft { step: 150, ..incipit_proto::v1::JobLeft::default() };
    left.set_state(JobState::Succeeded);
    left.set_reason(incipit_proto::v1::JobReason::StepsDone);
    let last = agent.of_job(&assigned, job_report::Report::Left(left)).await;
    agent.acknowledged(last).await.unwrap();
    let job = client.jobs().get_job(GetJobRequest { name: "jobs/j".to_owned() }).await.unwrap().into_inner();
    assert_eq!(job.state(), JobState::Succeeded);
    assert_eq!(job.progress.unwrap().committed_step, 150);
    let request = incipit_proto::v1::StreamMetricsRequest { name: job.name.clone(), offset: 0, follow: true };
    let mut stream = client.jobs().stream_metrics(request).await.unwrap().into_inner();
    let mut steps = Vec::new();
    while let Some(page) = stream.message().await.unwrap() {
        steps.extend(page.points.into_iter().map(|point| (point.offset, point.step)));
    }
    assert_eq!(steps, (1..=150).map(|step| (step - 1, step)).collect::<Vec<_>>());
    let name = "jobs/j/checkpoints/best".to_owned();
    let request = incipit_proto::v1::VerifyCheckpointRequest { name, task: String::new() };
    let found = client.checkpoints().verify_checkpoint(request).await.unwrap().into_inner();
    assert!(found.valid && found.bytes == 7, "{found:?}");
    let (head, text) = get(running.metrics_address().unwrap(), "/metrics").await;
    assert!(head.contains("200") && text.contains("incipit_steps_total 150"), "{text}");
    assert!(text.contains("incipit_jobs{state=\"succeeded\"} 1"), "{text}");
    assert!(text.contains("incipit_commit_seconds_bucket"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_whose_files_were_not_uploaded_ends_the_stream_and_is_taken_after_the_upload() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    submit(&client, "j").await;
    let who = hello("w");
    let mut agent = Agent::attach(&client, who.clone()).await.unwrap();
    let engine = agent.load().await;
    let assigned = agent.job().await;
    let digest = blake3::hash(b"weights").to_hex().to_string();
    let file = incipit_proto::v1::CheckpointFile { name: "prompt.safetensors".to_owned(), digest, size: 7 };
    let saved = incipit_proto::v1::CheckpointSaved {
        step: 10,
        files: vec![file],
        score: None,
        best: false,
        tasks: Vec::new(),
    };
    let report = job_report::Report::Saved(saved);
    let sequence = agent.of_job(&assigned, report.clone()).await;
    let status = agent.acknowledged(sequence).await.unwrap_err();
    assert_eq!((status.code(), &*reason(&status)), (Code::FailedPrecondition, "BLOB_MISSING"));
    upload(&client, b"weights").await.unwrap();
    let engines = vec![incipit_proto::v1::EngineStatus {
        backbone: engine.backbone,
        epoch: engine.epoch,
        rank: 0,
        ready: true,
        ..Default::default()
    }];
    let mut again = Agent::attach(&client, incipit_proto::v1::Hello { engines, ..who }).await.unwrap();
    let (jobs, job) = &assigned;
    let report = incipit_proto::v1::JobReport {
        backbone: jobs.backbone.clone(),
        epoch: jobs.epoch,
        job: job.job.clone(),
        attempt: job.attempt,
        report: Some(report),
    };
    let message = Some(attach_request::Message::Job(report));
    again.sender.send(AttachRequest { sequence, message }).await.unwrap();
    again.acknowledged(sequence).await.unwrap();
    let job = client.jobs().get_job(GetJobRequest { name: "jobs/j".to_owned() }).await.unwrap().into_inner();
    assert_eq!(job.progress.unwrap().committed_step, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_protocol_or_cluster_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let old = incipit_proto::v1::Hello { protocol_min: 7, protocol_max: 9, ..hello("w") };
    let refused = refusal(&client, old).await;
    assert_eq!((refused.code(), &*reason(&refused)), (Code::FailedPrecondition, "PROTOCOL"));
    let foreign = incipit_proto::v1::Hello { cluster_id: "elsewhere".to_owned(), ..hello("w") };
    let refused = refusal(&client, foreign).await;
    assert_eq!((refused.code(), &*reason(&refused)), (Code::FailedPrecondition, "OTHER_CLUSTER"));
    let info = client.events().get_server_info(GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.cluster_id, running.cluster());
    let ours = incipit_proto::v1::Hello { cluster_id: info.cluster_id.clone(), ..hello("w") };
    let mut agent = Agent::attach(&client, ours).await.unwrap();
    let attach_response::Message::Welcome(welcome) = agent.next().await.unwrap() else {
        panic!("no welcome")
    };
    assert_eq!((welcome.cluster_id, welcome.acknowledged), (info.cluster_id, 0));
    let workers = client.workers().list_workers(ListWorkersRequest::default()).await.unwrap().into_inner();
    assert_eq!(workers.workers.len(), 1);
}

async fn refusal(client: &incipit_proto::client::Client, hello: incipit_proto::v1::Hello) -> Status {
    match Agent::attach(client, hello).await {
        Err(status) => status,
        Ok(mut agent) => agent.next().await.unwrap_err(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_deleted_with_what_hangs_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    submit(&client, "j").await;
    let delete =
        DeleteJobRequest { name: "jobs/j".to_owned(), request_id: uuid(), ..DeleteJobRequest::default() };
    let early = client.jobs().delete_job(delete.clone()).await.unwrap_err();
    assert_eq!((early.code(), &*reason(&early)), (Code::FailedPrecondition, "JOB_STATE"));
    let cancel = CancelJobRequest { name: "jobs/j".to_owned(), ..CancelJobRequest::default() };
    client.jobs().cancel_job(cancel).await.unwrap();
    client.jobs().delete_job(delete.clone()).await.unwrap();
    client.jobs().delete_job(delete).await.unwrap(); // The same request: it is done.
    let missing = client.jobs().get_job(GetJobRequest { name: "jobs/j".to_owned() }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_speaks_for_all_ranks_of_all_backbones() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let address = running.metrics_address().unwrap();
    assert!(get(address, "/healthz").await.0.contains("200"));
    let client = with_backbone(&running).await;
    let (head, body) = get(address, "/healthz").await;
    assert!(head.contains("503") && body.contains("backbones/b: pending, 0 of 1 ranks"), "{body}");
    assert!(get(address, "/livez").await.0.contains("200"));
    let mut agent = Agent::attach(&client, hello("w")).await.unwrap();
    agent.load().await;
    for _ in 0..100 {
        if get(address, "/healthz").await.0.contains("200") {
            let text = get(address, "/metrics").await.1;
            assert!(text.contains("incipit_backbone_ready{backbone=\"b\"} 1"), "{text}");
            assert!(text.contains("incipit_backbone_ranks_wanted{backbone=\"b\"} 1"), "{text}");
            assert!(text.contains("incipit_workers{state=\"online\"} 1"), "{text}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the backbone did not become healthy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_be_written_ends_the_coordinator_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let other = rusqlite::Connection::open(dir.path().join("state.sqlite")).unwrap();
    other.execute_batch("PRAGMA busy_timeout = 5000; DROP TABLE events;").unwrap();
    let lost = client.jobs().create_job(job_request("j")).await.unwrap_err();
    assert_eq!(lost.code(), Code::Unavailable, "nothing is acknowledged that is not on the disk");
    let error = tokio::time::timeout(Duration::from_secs(10), running.wait()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("state.sqlite"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_may_be_repeated_outlives_a_restart_of_the_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let listen = running.address();
    with_backbone(&running).await;
    // Five attempts last a second and a half at least; on a busy machine a coordinator may take longer to come back.
    let client = Client::connect(&ClientConfig { attempts: 10, ..client_config(&running) }).await.unwrap();
    let restarted = tokio::spawn({
        let config = Config { listen, ..config(dir.path()) };
        async move {
            drop(running);
            tokio::time::sleep(Duration::from_millis(500)).await;
            start(config).await
        }
    });
    let calling = tokio::spawn(async move {
        for number in 0..20 {
            let request = job_request(&format!("j{number}"));
            let call = async |request| client.jobs().create_job(request).await;
            client.unary(request, call).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        client.jobs().list_jobs(ListJobsRequest::default()).await.unwrap().into_inner().jobs.len()
    });
    let _running = restarted.await.unwrap();
    assert_eq!(calling.await.unwrap(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_does_not_answer_is_given_up_at_the_deadline() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let config = ClientConfig { timeout: Duration::from_millis(300), ..ClientConfig::new(endpoint) };
    let client = Client::connect(&config).await.unwrap();
    let request = GetJobRequest { name: "jobs/j".to_owned() };
    let problem =
        client.unary(request, async |request| client.jobs().get_job(request).await).await.unwrap_err();
    assert_eq!((problem.code, &*problem.reason), (Code::DeadlineExceeded, "DEADLINE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_checkpoints_could_not_be_stored_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    // The agent's model has 60 million weights.
    config.limits.max_blob_bytes = 200_000_000;
    let running = start(config).await;
    let client = with_backbone(&running).await;
    let job = |id: &str, method| {
        let mut request = job_request(id);
        request.job.as_mut().unwrap().spec.as_mut().unwrap().set_method(method);
        request
    };
    let mut agent = Agent::attach(&client, hello("w")).await.unwrap();
    agent.load().await;
    client.jobs().create_job(job("j", Method::Adapter)).await.unwrap();
    agent.job().await;
    let status = client.jobs().create_job(job("k", Method::Model)).await.unwrap_err();
    assert_eq!((status.code(), &*reason(&status)), (Code::InvalidArgument, "BAD_FIELD"));
    assert!(status.message().contains("240000000") && status.message().contains("limits.max_blob_bytes"));
}
