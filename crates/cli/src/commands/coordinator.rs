//! `incipit coordinator`: who keeps the jobs, the checkpoints and the workers together.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use incipit_coordinator::{Config, Running, init};

use crate::args::Global;
use crate::exit::{BadInput, Exit};
use crate::output::{self, Printed};
use crate::progress::note;

/// Flags of `coordinator`.
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Off this machine's loopback it listens with TLS and tokens alone: `incipit coordinator init` makes both. Everything is \
                  under --data, and a coordinator that is started there again goes on as if it had never been away."
)]
pub(crate) struct CoordinatorArgs {
    #[command(subcommand)]
    command: Option<CoordinatorCommand>,
    #[command(flatten)]
    serve: ServeArgs,
}

/// What can be done besides.
#[derive(Subcommand)]
enum CoordinatorCommand {
    /// Make an authority, certificates and the first token
    Init(InitArgs),
    /// Make one more token
    Token(TokenArgs),
}

/// Flags of `coordinator`, where it serves.
#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Directory in which everything is kept [default: ~/.local/state/incipit/coordinator]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// File of settings, which the flags go over (docs/cluster.md lists them)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where it listens [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Where it answers /healthz and /metrics over HTTP [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Directory on the workers under which jobs may name their data by path; may be given several times [default: none, data
    /// are uploaded]
    #[arg(long, value_name = "DIR")]
    data_root: Vec<PathBuf>,
    /// Directory on the workers under which models may be; may be given several times [default: none, models come from the Hub]
    #[arg(long, value_name = "DIR")]
    model_root: Vec<PathBuf>,
    /// Where uploads and checkpoints are kept: a directory, s3://..., gs://... or az://... [default: blobs under --data]
    #[arg(long, value_name = "URL")]
    blobs: Option<String>,
    /// Let everybody on this machine in, without tokens; refused off loopback
    #[arg(long)]
    insecure: bool,
}

/// Flags of `coordinator init`.
#[derive(Args)]
struct InitArgs {
    /// Directory in which the coordinator will keep everything [default: ~/.local/state/incipit/coordinator]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Name or address by which clients and workers reach the coordinator; may be given several times
    #[arg(long, value_name = "HOST")]
    host: Vec<String>,
}

/// Flags of `coordinator token`.
#[derive(Args)]
struct TokenArgs {
    /// The coordinator's directory [default: ~/.local/state/incipit/coordinator]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Whose it is, for the audit log
    #[arg(long, value_name = "NAME")]
    name: String,
    /// What it is good for; may be given several times
    #[arg(long, value_name = "SCOPE", value_parser = ["admin", "submit", "read", "worker"], default_value = "submit")]
    scope: Vec<String>,
}

/// Runs a coordinator, or makes what it needs.
///
/// # Errors
/// If the flags or the directory cannot be used, or the coordinator's disk fails.
pub(crate) fn run(args: CoordinatorArgs, global: &Global) -> Result<Exit> {
    match args.command {
        Some(CoordinatorCommand::Init(args)) => init(&args, global),
        Some(CoordinatorCommand::Token(args)) => token(&args),
        None => serve(args.serve),
    }
}

fn serve(args: ServeArgs) -> Result<Exit> {
    let config = args.config()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = super::worker::signals()?;
        let running = incipit_coordinator::serve(config.clone(), async move {
            let _ = signals.recv().await;
        })
        .await?;
        tell(&running, &config);
        running.wait().await.context("the coordinator ends")
    })?;
    Ok(Exit::Ok)
}

/// Says where it is.
pub(crate) fn tell(running: &Running, config: &Config) {
    let scheme = if config.tls().is_some() { "https" } else { "http" };
    note(&format!(
        "the coordinator is at {scheme}://{}, with everything in {}",
        running.address(),
        config.data.display()
    ));
    if let Some(address) = running.metrics_address() {
        note(&format!("health and metrics are at http://{address}/healthz and /metrics"));
    }
}

impl ServeArgs {
    /// The flags over the file over the defaults.
    fn config(self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::read(path).map_err(|error| BadInput(error.to_string()))?,
            None => Config::new(data(self.data.as_deref())?),
        };
        if let Some(data) = self.data {
            config.data = data;
        }
        config.data = std::path::absolute(&config.data)?;
        config.listen = self.listen.unwrap_or(config.listen);
        config.metrics_listen = self.http.or(config.metrics_listen);
        config.data_roots.extend(self.data_root);
        config.model_roots.extend(self.model_root);
        config.blobs = self.blobs.or(config.blobs);
        config.insecure |= self.insecure;
        Ok(config)
    }
}

fn data(given: Option<&Path>) -> Result<PathBuf> {
    match given {
        Some(dir) => Ok(dir.to_owned()),
        None => Ok(super::worker::state_home()?.join("coordinator")),
    }
}

/// What was made, for `--json`.
#[derive(serde::Serialize)]
struct Made {
    ca: PathBuf,
    worker_certificate: PathBuf,
    worker_key: PathBuf,
    tokens: PathBuf,
    token: String,
}

impl Printed for Made {
    fn text(&self) -> String {
        let Self { ca, worker_certificate, worker_key, tokens, token } = self;
        let lines = [
            ("authority", ca.display().to_string()),
            ("worker certificate", worker_certificate.display().to_string()),
            ("worker key", worker_key.display().to_string()),
            ("tokens", tokens.display().to_string()),
            ("admin token", token.clone()),
        ];
        lines.map(|(what, value)| format!("{what:<20}{value}\n")).concat()
    }
}

fn init(args: &InitArgs, global: &Global) -> Result<Exit> {
    let data = std::path::absolute(data(args.data.as_deref())?)?;
    let made = init::init(&data, &args.host).map_err(|error| BadInput(error.to_string()))?;
    let made = Made {
        ca: made.ca,
        worker_certificate: made.worker.0,
        worker_key: made.worker.1,
        tokens: made.tokens,
        token: made.token,
    };
    output::print(&made, global.json)?;
    note(
        "the token is kept nowhere: write it down. Clients need it and the authority's certificate, workers the latter and their own",
    );
    note(&format!("next: incipit coordinator --data {} --listen 0.0.0.0:7420", data.display()));
    Ok(Exit::Ok)
}

fn token(args: &TokenArgs) -> Result<Exit> {
    let file = data(args.data.as_deref())?.join("tokens.toml");
    let token = init::add_token(&file, &args.name, &args.scope)
        .map_err(|error| BadInput(format!("{error}; `incipit coordinator init` makes the file")))?;
    println!("{token}");
    Ok(Exit::Ok)
}
