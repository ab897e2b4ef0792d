//! Who comes in, over TLS and with tokens.

use super::common::*;
use incipit_coordinator::{Config, Limits, Running, SERVICES, doors::tls::TlsFiles, init, serve};
use incipit_proto::{
    Problem,
    client::{Client, ClientConfig, PROTOCOL, PROTOCOL_KEY, problem_of},
    v1::{GetServerInfoRequest, ListJobsRequest, event_service_client::EventServiceClient},
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::{Code, Request, Status};

struct Secured {
    running: Running,
    made: init::Made,
}

async fn secured(dir: &Path, limits: Limits) -> Secured {
    let made = init::init(dir, &["cluster.example".to_owned()]).unwrap();
    let config = Config { insecure: false, metrics_listen: None, limits, ..config(dir) };
    Secured { running: start(config).await, made }
}

impl Secured {
    fn config(&self, token: &str) -> ClientConfig {
        ClientConfig {
            token: Some(token.to_owned()),
            ca: Some(self.made.ca.clone()),
            ..ClientConfig::new(format!("https://localhost:{}", self.running.address().port()))
        }
    }

    async fn client(&self, token: &str) -> Client {
        Client::connect(&self.config(token)).await.unwrap()
    }
}

fn token(dir: &Path, name: &str, scopes: &[&str], expires: &str) -> String {
    let path = dir.join("tokens.toml");
    let scopes: Vec<String> = scopes.iter().map(|scope| (*scope).to_owned()).collect();
    let token = init::add_token(&path, name, &scopes).unwrap();
    if !expires.is_empty() {
        let text = fs::read_to_string(&path).unwrap() + &format!("expires = {expires}\n");
        fs::write(path, text).unwrap();
    }
    token
}

fn reason(status: &Status) -> String {
    Problem::from(status).reason
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_what_its_scopes_say_and_every_change_is_in_the_audit_log() {
    let dir = tempfile::tempdir().unwrap();
    let secured = secured(dir.path(), Limits::default()).await;
    let reader = token(dir.path(), "reader", &["read"], "");
    let old = token(dir.path(), "old", &["admin"], "2001-01-01T00:00:00Z");
    tokio::time::sleep(Duration::from_secs(1)).await; // The file is looked at twice a second.
    let admin = secured.client(&secured.made.token).await;
    admin.backbones().create_backbone(backbone_request("b")).await.unwrap();
    submit(&admin, "j").await;
    let reading = secured.client(&reader).await;
    reading.jobs().list_jobs(ListJobsRequest::default()).await.unwrap();
    let refused = reading.jobs().create_job(job_request("k")).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::PermissionDenied, "SCOPE"));
    let old = secured.client(&old).await;
    let refused = old.jobs().list_jobs(ListJobsRequest::default()).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::Unauthenticated, "TOKEN_EXPIRED"));
    let unknown = secured.client("inc_guess").await;
    let refused = unknown.jobs().create_job(job_request("k")).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::Unauthenticated, "BAD_TOKEN"));
    let audit = fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
    let lines: Vec<(String, String, String, String)> = audit
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            (text("actor"), text("method"), text("resource"), text("outcome"))
        })
        .collect();
    let expected = [
        ("admin", "BackboneService/CreateBackbone", "backbones/b", "Ok"),
        ("admin", "JobService/CreateJob", "jobs/j", "Ok"),
        ("reader", "JobService/CreateJob", "", "PermissionDenied"),
        ("anonymous", "JobService/CreateJob", "", "Unauthenticated"),
    ];
    let expected = expected.map(|(a, b, c, d)| (a.to_owned(), b.to_owned(), c.to_owned(), d.to_owned()));
    assert_eq!(lines, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workers_certificate_is_enough_to_be_a_worker_and_for_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let secured = secured(dir.path(), Limits::default()).await;
    let config =
        ClientConfig { token: None, identity: Some(secured.made.worker.clone()), ..secured.config("") };
    let client = Client::connect(&config).await.unwrap();
    let mut agent = Agent::attach(&client, hello("w")).await.unwrap();
    agent.next().await.unwrap();
    upload(&client, b"a file").await.unwrap();
    let refused = client.jobs().list_jobs(ListJobsRequest::default()).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::PermissionDenied, "SCOPE"));
    let nobody = ClientConfig { token: None, ..secured.config("") };
    let nobody = Client::connect(&nobody).await.unwrap();
    let refused = nobody.jobs().list_jobs(ListJobsRequest::default()).await.unwrap_err();
    assert_eq!((refused.code(), &*reason(&refused)), (Code::Unauthenticated, "NO_TOKEN"));
    let refused = Agent::attach(&nobody, hello("v")).await.err().expect("it has no certificate");
    assert_eq!(refused.code(), Code::Unauthenticated);
}

/// An authority, and certificates that it signs.
struct Authority<'a> {
    dir: &'a Path,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl<'a> Authority<'a> {
    fn new(dir: &'a Path) -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        fs::write(dir.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: rcgen::Issuer::new(params, key) }
    }

    fn sign(&self, name: &str, last_year: i32) -> (PathBuf, PathBuf) {
        use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(last_year, 1, 1);
        params.extended_key_usages = vec![ClientAuth, ServerAuth];
        let key = rcgen::KeyPair::generate().unwrap();
        let paths = (self.dir.join(format!("{name}.pem")), self.dir.join(format!("{name}-key.pem")));
        fs::write(&paths.0, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_with_who_has_a_certificate_that_has_expired_or_is_foreign() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let (good, old) = (authority.sign("good", 2999), authority.sign("old", 2001));
    let made = init::init(&dir.path().join("other"), &[]).unwrap();
    let with = |name: &str, (certificate, key): (PathBuf, PathBuf)| {
        let client_ca = dir.path().join("ca.pem");
        let files = TlsFiles { certificate, key, client_ca, require_client_certificates: false };
        let (tls, tokens) = (Some(files), Some(made.tokens.clone()));
        Config { insecure: false, metrics_listen: None, tls, tokens, ..config(&dir.path().join(name)) }
    };
    let (running, expired) = (start(with("a", good.clone())).await, start(with("b", old.clone())).await);
    let to = |running: &Running, ca: PathBuf, identity| ClientConfig {
        ca: Some(ca),
        identity: Some(identity),
        ..ClientConfig::new(format!("https://localhost:{}", running.address().port()))
    };
    let ca = dir.path().join("ca.pem");
    assert!(!cannot_call(&to(&running, ca.clone(), good.clone())).await, "this one is right");
    assert!(cannot_call(&to(&running, ca.clone(), old)).await, "an expired client is refused");
    assert!(cannot_call(&to(&running, ca.clone(), made.worker)).await, "a foreign client is refused");
    let error = Client::connect(&to(&running, made.ca, good.clone())).await.unwrap_err();
    assert!(error.message.contains("UnknownIssuer"), "a foreign server is refused: {error}");
    let error = Client::connect(&to(&expired, ca, good)).await.unwrap_err();
    assert!(error.message.to_lowercase().contains("expired"), "an expired server is refused: {error}");
}

/// TLS 1.3 lets a client find out with its first call that its certificate was refused.
async fn cannot_call(config: &ClientConfig) -> bool {
    match Client::connect(config).await {
        Err(_) => true,
        Ok(client) => {
            let answer = client.events().get_server_info(GetServerInfoRequest {}).await;
            answer.is_err_and(|status| status.code() != Code::PermissionDenied)
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_tls_gets_nothing_from_a_port_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let secured = secured(dir.path(), Limits::default()).await;
    let config = ClientConfig {
        endpoint: format!("http://127.0.0.1:{}", secured.running.address().port()),
        ca: None,
        ..secured.config(&secured.made.token)
    };
    let outcome = tokio::time::timeout(Duration::from_secs(20), async {
        match Client::connect(&config).await {
            Err(problem) => problem,
            Ok(client) => {
                let call = client.events().get_server_info(GetServerInfoRequest {}).await;
                problem_of(&call.unwrap_err())
            }
        }
    });
    let problem = outcome.await.expect("it hangs");
    assert_eq!(problem.code, Code::Unavailable, "{problem:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_does_not_listen_to_a_network_without_tls_and_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let open = Config { listen: "0.0.0.0:0".parse().unwrap(), ..config(dir.path()) };
    let error = serve(open.clone(), std::future::pending()).await.unwrap_err().to_string();
    assert!(error.contains("this machine alone"), "{error}");
    let error = serve(Config { insecure: false, ..open.clone() }, std::future::pending()).await.unwrap_err();
    assert!(error.to_string().contains("incipit coordinator init"), "{error}");
    let local = Config { insecure: false, ..config(dir.path()) };
    let error = serve(local, std::future::pending()).await.unwrap_err().to_string();
    assert!(error.contains("--insecure"), "{error}");
    init::init(dir.path(), &[]).unwrap();
    start(Config { insecure: false, ..open }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_protocol_is_told_which_one_is_spoken() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let endpoint = format!("http://{}", running.address());
    let mut client = EventServiceClient::connect(endpoint).await.unwrap();
    client.get_server_info(GetServerInfoRequest {}).await.expect("who says nothing is let in");
    let mut request = Request::new(GetServerInfoRequest {});
    request.metadata_mut().insert(PROTOCOL_KEY, (PROTOCOL + 1).into());
    let problem = Problem::from(&client.get_server_info(request).await.unwrap_err());
    assert_eq!((problem.code, &*problem.reason), (Code::FailedPrecondition, "PROTOCOL"));
    assert_eq!(problem.metadata["protocol_max"], PROTOCOL.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_calls_too_often_is_told_when_to_come_again() {
    use tonic_types::StatusExt as _;
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { calls_per_second: 1, call_burst: 3, ..Limits::default() };
    let secured = secured(dir.path(), limits).await;
    let client = secured.client(&secured.made.token).await;
    for _ in 0..3 {
        client.events().get_server_info(GetServerInfoRequest {}).await.unwrap();
    }
    let status = client.events().get_server_info(GetServerInfoRequest {}).await.unwrap_err();
    assert_eq!((status.code(), &*reason(&status)), (Code::ResourceExhausted, "RATE_LIMIT"));
    let wait = status.get_error_details().retry_info().unwrap().retry_delay.unwrap();
    tokio::time::sleep(wait + Duration::from_millis(50)).await;
    client.events().get_server_info(GetServerInfoRequest {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_came_too_often_is_made_again_when_it_may() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { calls_per_second: 2, call_burst: 1, ..Limits::default() };
    let secured = secured(dir.path(), limits).await;
    let client = secured.client(&secured.made.token).await;
    for _ in 0..4 {
        let request = GetServerInfoRequest {};
        client.unary(request, async |request| client.events().get_server_info(request).await).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_share_a_certificate_or_a_token_have_a_rate_each() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { calls_per_second: 1, call_burst: 3, ..Limits::default() };
    let secured = secured(dir.path(), limits).await;
    let (shared, reader) = (token(dir.path(), "w", &["worker"], ""), token(dir.path(), "r", &["read"], ""));
    tokio::time::sleep(Duration::from_secs(1)).await; // The file is looked at twice a second.
    let certificate =
        || ClientConfig { token: None, identity: Some(secured.made.worker.clone()), ..secured.config("") };
    let calls = async |config: ClientConfig, worker: &str| {
        let config = ClientConfig { worker: Some(format!("workers/{worker}")), ..config };
        let client = Client::connect(&config).await.unwrap();
        let mut done = 0;
        while done < 1000 && client.events().get_server_info(GetServerInfoRequest {}).await.is_ok() {
            done += 1;
        }
        assert!(done < 1000, "nothing stops {worker}");
        done
    };
    for config in [certificate(), secured.config(&shared)] {
        for worker in ["a", "b"] {
            let done = calls(config.clone(), worker).await;
            assert!(done >= 3, "{worker} made {done} calls");
        }
    }
    assert!(calls(secured.config(&reader), "a").await >= 3);
    assert!(calls(secured.config(&reader), "b").await < 3, "who is no worker has one rate under every name");
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_every_service_and_health_knows_them() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let endpoint = format!("http://{}", running.address());
    let channel = tonic::transport::Endpoint::from_shared(endpoint).unwrap().connect().await.unwrap();
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel.clone());
    let answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("no list") };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    for service in SERVICES {
        assert!(names.iter().any(|name| name == service), "{service} is not among {names:?}");
        let request = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
    }
}
