//! A connection to a coordinator: typed clients of every service, deadlines, and retries of what may be sent twice.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use tonic::{
    Code, GrpcMethod, Request, Response, Status,
    metadata::{AsciiMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{
    Problem, trace,
    v1::{
        agent_service_client::AgentServiceClient, backbone_service_client::BackboneServiceClient,
        blob_service_client::BlobServiceClient, checkpoint_service_client::CheckpointServiceClient,
        event_service_client::EventServiceClient, job_service_client::JobServiceClient,
        prompt_service_client::PromptServiceClient, worker_service_client::WorkerServiceClient,
    },
};

mod retry;

pub use retry::Repeatable;

/// The protocol that this program speaks. It is raised with whatever programs of two versions cannot do together: in the interface, and in what
/// ranks exchange when they meet.
pub const PROTOCOL: u32 = 2;

/// The metadata in which a caller says which protocol it speaks.
pub const PROTOCOL_KEY: &str = "incipit-protocol";

/// The metadata in which an agent says which worker it is, on every call.
pub const WORKER_KEY: &str = "incipit-worker";

/// Largest message that a client takes; a page of 1000 jobs fits.
const MESSAGE_LIMIT: usize = 32 << 20;

/// Calls that last, and so have no deadline.
const STREAMS: [&str; 6] = ["StreamMetrics", "StreamLogs", "WatchEvents", "WriteBlob", "ReadBlob", "Attach"];

/// Calls that read or delete whole files, and so have none either.
const LONG: [&str; 2] = ["VerifyCheckpoint", "CollectGarbage"];

/// Where a coordinator is, and who asks.
#[derive(Clone)]
pub struct ClientConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoint: String,
    /// Bearer token.
    pub token: Option<String>,
    /// The certificate of who signed the coordinator's, a PEM file. Needed for `https`.
    pub ca: Option<PathBuf>,
    /// The caller's own certificate and key, PEM files.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long a call may take that is no stream, retries not counted.
    pub timeout: Duration,
    /// How often a call is made at most, if the coordinator cannot be reached, or turns it away for now.
    pub attempts: u32,
    /// `workers/{worker}`, where a worker asks: calls of one do not count as another's.
    pub worker: Option<String>,
}

impl ClientConfig {
    /// Five seconds to connect, thirty a call, five attempts, no credentials.
    #[must_use]
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            token: None,
            ca: None,
            identity: None,
            connect_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(30),
            attempts: 5,
            worker: None,
        }
    }

    fn endpoint(&self) -> Result<Endpoint, Problem> {
        let address = &self.endpoint;
        let wrong = |why: &dyn fmt::Display| {
            let what =
                format!("{address:?} is no endpoint ({why}); give http://HOST:PORT or https://HOST:PORT");
            Problem::new(Code::InvalidArgument, "BAD_ENDPOINT", what)
        };
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|e| wrong(&e))?;
        let endpoint = endpoint
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(Duration::from_secs(30)))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .user_agent(concat!("incipit/", env!("CARGO_PKG_VERSION")))
            .map_err(|e| wrong(&e))?;
        match endpoint.uri().scheme_str() {
            Some("http") if self.identity.is_none() => Ok(endpoint),
            Some("http") => Err(wrong(&"a certificate of your own needs https")),
            Some("https") => endpoint.tls_config(self.tls()?).map_err(|e| wrong(&e)),
            _ => Err(wrong(&"no scheme")),
        }
    }

    fn tls(&self) -> Result<ClientTlsConfig, Problem> {
        let Some(ca) = &self.ca else {
            let what = format!(
                "{} needs the certificate of who signed the coordinator's: give ca.pem of `incipit coordinator init`",
                self.endpoint
            );
            return Err(Problem::new(Code::InvalidArgument, "NO_CA", what));
        };
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
        if let Some((certificate, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(tls)
    }
}

impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "...");
        f.debug_struct("ClientConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("ca", &self.ca)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

fn read(path: &std::path::Path) -> Result<Vec<u8>, Problem> {
    std::fs::read(path).map_err(|error| {
        Problem::new(
            Code::InvalidArgument,
            "BAD_CREDENTIALS",
            format!("cannot read {}: {error}", path.display()),
        )
    })
}

/// Puts the token, the worker, the protocol, the deadline and the trace on every call.
#[derive(Clone, Debug)]
pub struct Credentials {
    token: Option<AsciiMetadataValue>,
    worker: Option<AsciiMetadataValue>,
    timeout: Duration,
}

impl Credentials {
    fn new(config: &ClientConfig) -> Result<Self, Problem> {
        let parse = |token: &String| -> Result<AsciiMetadataValue, Problem> {
            let mut value: AsciiMetadataValue = format!("Bearer {}", token.trim()).parse().map_err(|_| {
                Problem::new(
                    Code::InvalidArgument,
                    "BAD_CREDENTIALS",
                    "the token has characters that no token has",
                )
            })?;
            value.set_sensitive(true);
            Ok(value)
        };
        let worker = config.worker.as_ref().map(|worker| {
            let what = format!("{worker:?} is no worker's name");
            worker.parse().map_err(|_| Problem::new(Code::InvalidArgument, "BAD_FIELD", what))
        });
        let (token, worker) = (config.token.as_ref().map(parse).transpose()?, worker.transpose()?);
        Ok(Self { token, worker, timeout: config.timeout })
    }
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let method = request.extensions().get::<GrpcMethod<'_>>().map(|method| method.method().to_owned());
        let lasts = method.is_some_and(|method| STREAMS.contains(&&*method) || LONG.contains(&&*method));
        if !lasts && !request.metadata().contains_key("grpc-timeout") {
            request.set_timeout(self.timeout);
        }
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        if let Some(worker) = &self.worker {
            request.metadata_mut().insert(WORKER_KEY, worker.clone());
        }
        request.metadata_mut().insert(PROTOCOL_KEY, MetadataValue::from(PROTOCOL));
        trace::name_caller(request.metadata_mut());
        Ok(request)
    }
}

/// What the typed clients speak through.
pub type Connection = InterceptedService<Channel, Credentials>;

/// A connection to a coordinator. Clones share it. It is made again by itself after a break.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Connection,
    config: Arc<ClientConfig>,
}

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $client:ident;)+) => {
        $(
            $(#[$doc])*
            #[must_use]
            pub fn $name(&self) -> $client<Connection> {
                $client::new(self.connection.clone()).max_decoding_message_size(MESSAGE_LIMIT)
            }
        )+
    };
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// If the configuration is wrong, or nobody answers at the endpoint.
    pub async fn connect(config: &ClientConfig) -> Result<Self, Problem> {
        let channel = config.endpoint()?.connect().await.map_err(|error| unreachable_at(config, &error))?;
        Ok(Self {
            connection: InterceptedService::new(channel, Credentials::new(config)?),
            config: Arc::new(config.clone()),
        })
    }

    services! {
        /// Jobs.
        jobs: JobServiceClient;
        /// Backbones.
        backbones: BackboneServiceClient;
        /// Checkpoints.
        checkpoints: CheckpointServiceClient;
        /// Prompts.
        prompts: PromptServiceClient;
        /// Blobs.
        blobs: BlobServiceClient;
        /// Workers.
        workers: WorkerServiceClient;
        /// Events.
        events: EventServiceClient;
        /// The agents' service.
        agent: AgentServiceClient;
    }

    /// Makes a call, and makes it again (with growing, random pauses) while the coordinator cannot be reached, if `request` may be
    /// sent twice, and while it turns the call away for now, having done nothing:
    /// `client.unary(request, async |request| client.jobs().get_job(request).await)`.
    ///
    /// # Errors
    /// What the coordinator says, or `DEADLINE` after too long, or `UNAVAILABLE`.
    pub async fn unary<T, R, F>(&self, request: T, call: impl Fn(Request<T>) -> F) -> Result<R, Problem>
    where
        T: Repeatable + Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut attempt = 1;
        loop {
            let problem = match call(Request::new(request.clone())).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => problem_of(&status),
            };
            let unreachable = problem.code == Code::Unavailable && request.is_repeatable();
            if !(unreachable || problem.is_for_now()) || attempt >= self.config.attempts {
                return Err(problem);
            }
            tokio::time::sleep(retry::pause(attempt, problem.pause_wanted())).await;
            attempt += 1;
        }
    }
}

fn unreachable_at(config: &ClientConfig, error: &tonic::transport::Error) -> Problem {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        causes.push(cause.to_string());
        source = cause.source();
    }
    causes.dedup();
    let what = format!(
        "cannot reach a coordinator at {} ({}); is it running, and is the endpoint right?",
        config.endpoint,
        causes.join(": ")
    );
    Problem::new(Code::Unavailable, "UNREACHABLE", what).with("endpoint", &config.endpoint)
}

/// What a status means. tonic says CANCELLED where a deadline has passed, and UNKNOWN or CANCELLED where the connection broke; here these are
/// `DEADLINE` and `UNAVAILABLE`.
#[must_use]
pub fn problem_of(status: &Status) -> Problem {
    let problem = Problem::from(status);
    if problem.reason != "UNKNOWN" {
        return problem;
    }
    let late = problem.code == Code::DeadlineExceeded
        || (problem.code == Code::Cancelled && problem.message.to_lowercase().contains("timeout expired"));
    if late {
        let what = "the coordinator did not answer in time; try again";
        return Problem::new(Code::DeadlineExceeded, "DEADLINE", what);
    }
    // What a coordinator says has no source; what was made up here, of an error on the way, has one.
    let broke = problem.code == Code::Unavailable || std::error::Error::source(status).is_some();
    if broke {
        let what = format!("the connection to the coordinator broke ({}); is it running?", problem.message);
        return Problem::new(Code::Unavailable, "UNAVAILABLE", what);
    }
    problem
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_not_printed() {
        let config =
            ClientConfig { token: Some("secret".to_owned()), ..ClientConfig::new("http://localhost:1") };
        assert!(!format!("{config:?}").contains("secret"));
    }

    #[test]
    fn an_endpoint_without_a_scheme_is_refused_with_an_example() {
        let problem = ClientConfig::new("localhost:7000").endpoint().unwrap_err();
        assert!(problem.message.contains("http://HOST:PORT"), "{problem}");
    }

    #[test]
    fn https_without_a_ca_is_refused() {
        let problem = ClientConfig::new("https://localhost:7000").endpoint().unwrap_err();
        assert_eq!(problem.reason, "NO_CA");
    }

    #[test]
    fn a_timeout_is_a_deadline() {
        assert_eq!(problem_of(&Status::cancelled("Timeout expired")).reason, "DEADLINE");
        assert_eq!(problem_of(&Status::unavailable("no")).reason, "UNAVAILABLE");
        assert_eq!(problem_of(&Status::not_found("no")).code, Code::NotFound);
    }
}
