//! What the program tells of itself while it runs: its log on standard error, and spans for whoever collects them (docs/cluster.md).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, fs, io::IsTerminal as _, str::FromStr};

use anyhow::{Context as _, Result};
use clap::ArgMatches;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{RetryPolicy, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, SpanData, SpanExporter,
};
use tokio::runtime::Runtime;
use tonic::transport::{Certificate, ClientTlsConfig};
use tracing::{Level, Metadata, Span, field};
use tracing_subscriber::filter::{EnvFilter, FilterExt as _, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Registry, fmt};

use crate::args::{Cli, Command, Global, choice, names};
use crate::exit::{BadInput, Exit};
use crate::{progress, ranks};

/// The variable that chooses how the log is written.
pub(crate) const FORMAT_VARIABLE: &str = "INCIPIT_LOG_FORMAT";
/// Where spans go; the first that is set. Without them nothing of OpenTelemetry is started.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
/// Target of notes to people, which are in the log where it is JSON.
pub(crate) const NOTES: &str = "incipit::notes";
/// Target of the span that marks all lines of a process. It lasts as long as the process, and is not collected.
const PROCESS: &str = "incipit::process";
/// How often spans are sent where `OTEL_BSP_SCHEDULE_DELAY` says nothing. Engines are killed by their agents, and what they have not
/// sent goes with them.
const DELAY: Duration = Duration::from_secs(1);
/// How long the last spans may keep the program from ending.
const FAREWELL: Duration = Duration::from_secs(2);

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = BadInput;

    fn from_str(name: &str) -> Result<Self, BadInput> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(BadInput(format!("{name:?} is no format of the log: give text or json"))),
        }
    }
}

/// What `--log-format` takes.
pub(crate) fn log_format() -> impl clap::builder::TypedValueParser<Value = LogFormat> {
    choice::<LogFormat>(names::LOG_FORMATS)
}

/// Starts the log, and where somebody collects spans, sending them.
///
/// # Errors
/// If the environment names a format that there is not. A collector that cannot be used is told in the log.
pub(crate) fn start(cli: &Cli) -> Result<Exporter> {
    let format = match &cli.command {
        // Its agent reads its lines, and hands them on.
        Command::Engine(_) => LogFormat::Text,
        _ => format(&cli.global)?,
    };
    let exporter = open(service(&cli.command)).transpose();
    let (exporter, failure) = match exporter {
        Ok(exporter) => (Exporter(exporter), None),
        Err(error) => (Exporter(None), Some(error)),
    };
    let mut layers = vec![log(&cli.global, format)];
    if let Some((provider, _)) = &exporter.0 {
        let tracer = provider.tracer("incipit");
        let spans = tracing_opentelemetry::layer().with_tracer(tracer).with_location(false);
        let spans = spans.with_tracked_inactivity(false).with_threads(false).with_target(false);
        layers.push(spans.with_filter(filter_fn(|of| is_ours(of) && of.target() != PROCESS)).boxed());
        global::set_text_map_propagator(TraceContextPropagator::new());
    }
    tracing_subscriber::registry().with(layers).init();
    if format == LogFormat::Json {
        progress::log_notes();
        std::panic::set_hook(Box::new(|panic| tracing::error!(target: NOTES, "{panic}")));
    }
    if let Some(error) = failure {
        tracing::warn!("spans are not collected: {error:#}");
    }
    Ok(exporter)
}

fn format(global: &Global) -> Result<LogFormat> {
    if let Some(format) = global.log_format {
        return Ok(format);
    }
    let Ok(name) = env::var(FORMAT_VARIABLE) else { return Ok(LogFormat::Text) };
    let format = name.parse::<LogFormat>();
    format.map_err(|BadInput(error)| BadInput(format!("{FORMAT_VARIABLE}: {error}, or unset it")).into())
}

/// The log of the libraries on standard error. `INCIPIT_LOG` takes a filter (`incipit_tune=debug`) for those who look closer.
fn log(global: &Global, format: LogFormat) -> Box<dyn Layer<Registry> + Send + Sync> {
    let level = match global.verbose {
        // A run tells its warnings to whoever watches it, too.
        0 => "warn,incipit_tune::train=error",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("INCIPIT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = fmt::layer().with_writer(|| progress::Marked);
    match format {
        LogFormat::Text => {
            let colours = std::io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none();
            let log = log.with_ansi(colours).with_target(global.verbose > 1).without_time();
            // Lines stay short: what they are about, they say themselves.
            log.with_filter(filter.and(filter_fn(|of| !of.is_span()))).boxed()
        }
        LogFormat::Json => {
            let log = log.json().flatten_event(true).with_current_span(false).with_span_list(true);
            // Lines have what their spans know, at every level.
            let known = filter_fn(|of| of.target() == NOTES || (of.is_span() && is_ours(of)));
            log.with_filter(filter.or(known.with_max_level_hint(LevelFilter::INFO))).boxed()
        }
    }
}

/// Whether it comes from this program, and not from what moves its messages; nothing below INFO, which steps are.
fn is_ours(of: &Metadata<'_>) -> bool {
    of.target().starts_with("incipit") && *of.level() <= Level::INFO
}

/// What the program is called among others, if `OTEL_SERVICE_NAME` does not say.
fn service(command: &Command) -> &'static str {
    match command {
        Command::Coordinator(_) => "incipit-coordinator",
        Command::Worker(_) => "incipit-worker",
        Command::Engine(_) => "incipit-engine",
        _ => "incipit",
    }
}

/// The span of a command, from which the calls that it makes descend. Programs that last have none: their calls have their own.
pub(crate) fn command_span(matches: &ArgMatches, command: &Command) -> Span {
    let lasts =
        matches!(command, Command::Up(_) | Command::Coordinator(_) | Command::Worker(_) | Command::Engine(_));
    if lasts {
        return Span::none();
    }
    let mut name = "incipit".to_owned();
    let mut inner = matches.subcommand();
    while let Some((word, matches)) = inner {
        name = format!("{name} {word}");
        inner = matches.subcommand();
    }
    tracing::info_span!(
        "command",
        otel.name = name,
        otel.status_code = field::Empty,
        rank = ranks::rank_of_process(),
        exit = field::Empty,
    )
}

/// Notes in the span of a command how it has ended.
pub(crate) fn ended(span: &Span, exit: Exit) {
    span.record("exit", exit as u8);
    if exit != Exit::Ok {
        span.record("otel.status_code", "ERROR");
    }
}

/// The span that marks all lines of an agent's process with its name.
pub(crate) fn worker_span(name: &str) -> Span {
    tracing::info_span!(target: PROCESS, "worker", worker = name)
}

/// What sends spans, if somebody collects them: with the threads that it needs.
pub(crate) struct Exporter(Option<(SdkTracerProvider, Runtime)>);

impl Exporter {
    /// Sends what is left, for as long as that may take.
    pub(crate) fn end(self) {
        let Some((provider, runtime)) = self.0 else { return };
        if let Err(error) = provider.shutdown_with_timeout(FAREWELL) {
            complain(&error);
        }
        runtime.shutdown_background();
    }
}

/// Gets ready to send spans, if the environment says where to.
fn open(service: &'static str) -> Option<Result<(SdkTracerProvider, Runtime)>> {
    let given = |name: &&str| env::var(name).ok().filter(|value| !value.is_empty());
    let endpoint = ENDPOINTS.iter().find_map(given)?;
    Some(provider(service, &endpoint).with_context(|| format!("the collector at {endpoint}")))
}

fn provider(service: &'static str, endpoint: &str) -> Result<(SdkTracerProvider, Runtime)> {
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = threads.worker_threads(1).thread_name("spans").enable_all().build()?;
    let inside = runtime.enter();
    // A batch that was not taken is let go: trying again would hold up the end of the program.
    let patience = RetryPolicy::default().with_max_retries(0);
    let mut exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_retry_policy(patience);
    if endpoint.starts_with("https") {
        exporter = exporter.with_tls_config(tls()?);
    }
    let exporter = Complaining(exporter.build()?);
    drop(inside);
    let mut batches = BatchConfigBuilder::default();
    if env::var_os("OTEL_BSP_SCHEDULE_DELAY").is_none() {
        batches = batches.with_scheduled_delay(DELAY);
    }
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches.build()).build();
    let provider = SdkTracerProvider::builder().with_span_processor(processor);
    Ok((provider.with_resource(resource(service)).build(), runtime))
}

/// Whom to trust: the usual authorities, and the one that the environment names.
fn tls() -> Result<ClientTlsConfig> {
    let tls = ClientTlsConfig::new().with_enabled_roots();
    let Some(path) = env::var_os("OTEL_EXPORTER_OTLP_CERTIFICATE") else { return Ok(tls) };
    let pem = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(tls.ca_certificate(Certificate::from_pem(pem)))
}

/// What the environment says of this program, over what is known of it.
fn resource(service: &'static str) -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder_empty()
        .with_attributes([KeyValue::new("service.name", service), version])
        .with_detectors(&[Box::new(TelemetryResourceDetector), Box::new(EnvResourceDetector::new())]);
    match env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => resource.with_service_name(name).build(),
        _ => resource.build(),
    }
}

/// Says that spans cannot be sent, once.
fn complain(error: &OTelSdkError) {
    static COMPLAINED: AtomicBool = AtomicBool::new(false);
    if !COMPLAINED.swap(true, Ordering::Relaxed) {
        tracing::warn!("spans are lost, and this is said once: {error}");
    }
}

/// Sends spans, and complains where that fails.
#[derive(Debug)]
struct Complaining(opentelemetry_otlp::SpanExporter);

impl SpanExporter for Complaining {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.export(batch).await.inspect_err(complain)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}
