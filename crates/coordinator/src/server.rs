//! Putting it all together, and letting it listen.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{Arc, Once},
    time::Duration,
};

use incipit_proto::v1::{
    DESCRIPTORS, agent_service_server as agent, backbone_service_server as backbones,
    blob_service_server as blobs, checkpoint_service_server as checkpoints, event_service_server as events,
    job_service_server as jobs, prompt_service_server as prompts, worker_service_server as workers,
};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinHandle,
};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    blobs::{Blobs, Digest, Expected},
    config::{self, Config},
    core::Core,
    doors::{Guard, GuardLayer, Rate, audit::Audit, tls, tokens},
    http,
    services::{self, Context},
    shell::{self, Clock, Handle},
    store::{self, Kept, Store},
    telemetry::Telemetry,
    wire::Roots,
};

/// How long calls may go on when the coordinator ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// Names of all services, for health.
pub const SERVICES: [&str; 8] = [
    agent::SERVICE_NAME,
    backbones::SERVICE_NAME,
    blobs::SERVICE_NAME,
    checkpoints::SERVICE_NAME,
    events::SERVICE_NAME,
    jobs::SERVICE_NAME,
    prompts::SERVICE_NAME,
    workers::SERVICE_NAME,
];

/// Why a coordinator cannot begin, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its configuration cannot be used.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// It must not listen, or has no certificates to.
    #[error(transparent)]
    Door(#[from] tls::Error),
    /// Its tokens cannot be used.
    #[error(transparent)]
    Tokens(#[from] tokens::Error),
    /// Its store cannot be used, or failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Its blobs cannot be used.
    #[error(transparent)]
    Blobs(#[from] crate::blobs::Error),
    /// It cannot listen.
    #[error("cannot listen on {address}: {source}; is another program there?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The system refuses something else.
    #[error("cannot {what}: {source}")]
    System {
        /// What was wanted.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// What speaks gRPC failed.
    #[error("cannot serve gRPC: {0}")]
    Grpc(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The thread that decides everything is gone, without a word.
    #[error(
        "the coordinator's core broke off; this is a mistake in the program, and the log above says where"
    )]
    Core,
}

/// A coordinator that runs. Dropped, it ends at once, without a farewell to anybody.
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    cluster: String,
    task: JoinHandle<Result<(), Error>>,
}

impl Running {
    /// Where gRPC is served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where health and counters are served over HTTP, if they are.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Names the cluster.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// If it was not asked to: the process is to end too, with an error.
    pub async fn wait(mut self) -> Result<(), Error> {
        (&mut self.task).await.unwrap_or(Err(Error::Core))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts a coordinator, which runs until `shutdown` is done.
///
/// # Errors
/// If the configuration would let everybody in, another coordinator has the directory, the address is taken, ...
pub async fn serve(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<Running, Error> {
    choose_provider();
    let tokens = config.tokens();
    let tls_files = config.tls();
    tls::check(
        config.listen,
        tls_files.is_some(),
        tokens.as_deref(),
        config.insecure,
        &config.default_tokens(),
    )?;
    let tls = tls_files.map(|files| files.load()).transpose()?;
    let listening = |source| Error::Listen { address: config.listen, source };
    let incoming = TcpIncoming::bind(config.listen).map_err(listening)?.with_nodelay(Some(true));
    let address = incoming.local_addr().map_err(listening)?;
    let core = open(&config)?;
    let guard = guard(&config, tokens.as_deref())?;
    let cluster = core.cluster.to_string();
    let (stop, stopping) = watch::channel(false);
    let context = core.context(&config, stopping);
    let (routes, reporter) = routes(&context, &config).await?;
    let metrics = match config.metrics_listen {
        Some(address) => {
            let served = http::serve(address, core.handle.clone(), Arc::clone(&core.telemetry)).await;
            Some(served.map_err(|source| Error::Listen { address, source })?)
        }
        None => None,
    };
    let metrics_address = metrics.as_ref().map(|(address, _)| *address);
    tokio::spawn(services::checkpoints::sweep(context));
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(1024)
        .layer(GuardLayer(Arc::new(guard)));
    if let Some(tls) = tls {
        server = server.tls_config(tls).map_err(|error| Error::Grpc(error.into()))?;
    }
    let mut stopped = stop.subscribe();
    let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    });
    let ending = Ending { stop, reporter, handle: core.handle, end: core.end };
    let http = metrics.map(|(_, task)| AbortOnDrop(task));
    let task = tokio::spawn(async move {
        let result = ending.run(serving, shutdown).await;
        drop(http);
        result
    });
    tracing::info!("coordinator of cluster {cluster} listens on {address}");
    Ok(Running { address, metrics_address, cluster, task })
}

/// Both of rustls's providers may be linked into the program (the object stores' client brings the other one); one has to be chosen.
fn choose_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default(); // Someone else has chosen: fine.
    });
}

struct Opened {
    handle: Handle,
    end: shell::End,
    reader: store::Reader,
    blobs: Blobs,
    cluster: Arc<str>,
    telemetry: Arc<Telemetry>,
}

fn open(config: &Config) -> Result<Opened, Error> {
    let kept = Kept { events: config.limits.events, log_lines: config.limits.log_lines };
    let (store, rows) = Store::open(&config.data, kept)?;
    let (reader, cluster) = (store.reader(), Arc::from(store.cluster()));
    let clock = Clock::start();
    let telemetry = Arc::new(Telemetry::default());
    let core = Core::restore(config.limits.core(), rows, clock.now());
    let (limits, has_some) = (&config.limits, core.digests().next().is_some());
    let expected = Expected { marker: store.blobs()?, has_some };
    let blobs = Blobs::open(&config.blobs(), limits.max_blob_bytes, limits.min_free_bytes, &expected)?;
    blobs.suspect(core.damaged().filter_map(|digest| Digest::parse("digest", digest).ok()));
    if let Some(marker) = blobs.marker().filter(|marker| expected.marker.as_deref() != Some(*marker)) {
        store.set_blobs(marker)?;
    }
    let started = shell::start(core, store, clock, Arc::clone(&telemetry));
    let (handle, end) =
        started.map_err(|source| Error::System { what: "start a thread".to_owned(), source })?;
    Ok(Opened { handle, end, reader, blobs, cluster, telemetry })
}

impl Opened {
    fn context(&self, config: &Config, stopping: watch::Receiver<bool>) -> Context {
        Context {
            handle: self.handle.clone(),
            reader: self.reader.clone(),
            blobs: self.blobs.clone(),
            cluster: Arc::clone(&self.cluster),
            limits: Arc::new(config.limits.clone()),
            roots: Arc::new(Roots {
                data: config.data_roots.clone(),
                models: config.model_roots.clone(),
                hub: config.hub,
            }),
            stopping,
            watchers: Arc::new(Semaphore::new(config.limits.watchers)),
        }
    }
}

fn guard(config: &Config, tokens: Option<&std::path::Path>) -> Result<Guard, Error> {
    let limits = &config.limits;
    let audit = Audit::open(&config.data, limits.audit_bytes);
    let what = format!("write the audit log in {}", config.data.display());
    let audit = audit.map_err(|source| Error::System { what, source })?;
    let tokens = tokens.map(tokens::Tokens::open).transpose()?;
    let rate = tokens.is_some().then(|| Rate::new(limits.calls_per_second, limits.call_burst));
    Ok(Guard::new(tokens, rate, limits.calls, audit))
}

async fn routes(context: &Context, config: &Config) -> Result<(Routes, HealthReporter), Error> {
    let limit = config.limits.max_message_bytes;
    let new = || context.clone();
    let (reporter, health) = tonic_health::server::health_reporter();
    for name in SERVICES.into_iter().chain([""]) {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |error: tonic_reflection::server::Error| Error::Grpc(error.into());
    let mut routes = Routes::builder();
    routes
        .add_service(
            agent::AgentServiceServer::new(services::agent::Agent::new(new()))
                .max_decoding_message_size(limit),
        )
        .add_service(
            backbones::BackboneServiceServer::new(services::backbones::Backbones(new()))
                .max_decoding_message_size(limit),
        )
        .add_service(
            blobs::BlobServiceServer::new(services::blobs::Blobs::new(new()))
                .max_decoding_message_size(limit),
        )
        .add_service(
            checkpoints::CheckpointServiceServer::new(services::checkpoints::Checkpoints(new()))
                .max_decoding_message_size(limit),
        )
        .add_service(
            events::EventServiceServer::new(services::events::Events(new())).max_decoding_message_size(limit),
        )
        .add_service(
            jobs::JobServiceServer::new(services::jobs::Jobs(new())).max_decoding_message_size(limit),
        )
        .add_service(
            prompts::PromptServiceServer::new(services::prompts::Prompts(new()))
                .max_decoding_message_size(limit),
        )
        .add_service(
            workers::WorkerServiceServer::new(services::workers::Workers(new()))
                .max_decoding_message_size(limit),
        )
        .add_service(health)
        .add_service(reflection().build_v1().map_err(failed)?)
        .add_service(reflection().build_v1alpha().map_err(failed)?);
    Ok((std::mem::take(&mut routes).routes(), reporter))
}

/// What is needed to end in order.
struct Ending {
    stop: watch::Sender<bool>,
    reporter: HealthReporter,
    handle: Handle,
    end: shell::End,
}

impl Ending {
    /// Serves until something ends: whoever asked for it, the core, or the listening.
    async fn run(
        mut self,
        serving: impl Future<Output = Result<(), tonic::transport::Error>> + Send,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), Error> {
        let mut serving = Box::pin(serving);
        let cause = tokio::select! {
            () = shutdown => Ok(()),
            end = &mut self.end => Err(match end {
                Ok(Err(error)) => Error::Store(error),
                Ok(Ok(())) | Err(_) => Error::Core,
            }),
            served = &mut serving => return served.map_err(|error| Error::Grpc(error.into())),
        };
        for name in SERVICES.into_iter().chain([""]) {
            self.reporter.set_service_status(name, ServingStatus::NotServing).await;
        }
        self.stop.send_replace(true);
        if tokio::time::timeout(FAREWELL, serving).await.is_err() {
            tracing::warn!("calls were cut off that did not end within {} s", FAREWELL.as_secs());
        }
        cause?;
        self.handle.stop().await;
        match self.end.await {
            Ok(result) => Ok(result?),
            Err(_) => Err(Error::Core),
        }
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
