//! `incipit up`: a whole cluster on one machine.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use incipit_coordinator::{Config, serve};
use incipit_proto::Problem;
use incipit_proto::client::{Client, ClientConfig};
use incipit_proto::v1;
use incipit_tune::device::DeviceChoice;
use incipit_tune::spec::Precision;
use incipit_worker::agent;
use tokio::sync::oneshot;

use super::coordinator::tell;
use super::worker::{MachineArgs, agent_config, name_of, signals, state_home};
use crate::args::{choice, names};
use crate::cluster::{call, refusal};
use crate::exit::{Exit, bad_input};
use crate::progress::note;
use crate::telemetry::worker_span;

/// Flags of `up`.
#[derive(Args)]
#[command(
    after_help = "A coordinator and a worker in one process, for whoever is on this machine. With --model it holds that model from the \
                  beginning; `incipit backbone create` adds others, and `incipit job submit` trains on them. Ctrl-C saves all jobs, \
                  which go on when it is started again. A backbone that is there from before stays as it is, and what is said of it \
                  has to be so."
)]
pub(crate) struct UpArgs {
    /// Directory in which everything is kept [default: ~/.local/state/incipit]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the coordinator listens; on loopback alone
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7420")]
    listen: SocketAddr,
    /// Where it answers /healthz and /metrics over HTTP [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Directory under which jobs may name their data by path; may be given several times [default: none, data are uploaded]
    #[arg(long, value_name = "DIR")]
    data_root: Vec<PathBuf>,
    /// Model to hold from the beginning: a directory, or a name on the Hugging Face Hub; the backbone is named after it
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: Option<String>,
    /// Where the model computes: cpu or cuda [default: cpu]
    #[arg(long, value_name = "DEVICE", requires = "model")]
    device: Option<DeviceChoice>,
    /// Type of the model's weights [default: bf16]
    #[arg(long, requires = "model", value_parser = choice::<Precision>(names::DTYPES))]
    dtype: Option<Precision>,
    /// Ranks that share the model's weights [default: 1]
    #[arg(long, value_name = "N", requires = "model")]
    tp: Option<u32>,
    /// Copies of the model, between which examples are divided [default: 1]
    #[arg(long, value_name = "N", requires = "model")]
    dp: Option<u32>,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs a coordinator and a worker.
///
/// # Errors
/// If the flags or the directory cannot be used, or the coordinator's disk fails.
pub(crate) fn run(args: &UpArgs) -> Result<Exit> {
    let data = match &args.data {
        Some(data) => std::path::absolute(data)?,
        None => state_home()?,
    };
    let mut config = Config::new(data.join("coordinator"));
    (config.listen, config.metrics_listen, config.insecure) = (args.listen, args.http, true);
    config.data_roots.clone_from(&args.data_root);
    // Whoever can reach the loopback is on this machine, and sees its models anyway.
    config.model_roots = vec!["/".into()];
    let backbone = args.backbone()?;
    // The system ends engines with the thread that has started them: the agent has the main one.
    let behind = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let running = behind.block_on(serve(config.clone(), async { drop(stopped.await) }))?;
    tell(&running, &config);
    let coordinator = ClientConfig::new(format!("http://{}", running.address()));
    let agent = agent_config(coordinator.clone(), "local".to_owned(), &data.join("worker"), &args.machine)?;
    let span = worker_span(&agent.worker_id).entered();
    let here = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut ended = behind.spawn(running.wait());
    let ran = here.block_on(async {
        if let Some((name, backbone)) = backbone {
            hold(&coordinator, name, backbone).await?;
        }
        tokio::select! {
            done = agent::run(agent, signals()?) => done.context("the worker ends"),
            done = &mut ended => done.map_err(anyhow::Error::from).and_then(|done| done.context("the coordinator ends")),
        }
    });
    // With its runtime goes the agent's connection, which would keep the coordinator waiting.
    drop((here, span));
    let _ = stop.send(());
    if !ended.is_finished() {
        behind.block_on(ended)?.context("the coordinator ends")?;
    }
    ran.map(|()| Exit::Ok)
}

impl UpArgs {
    fn backbone(&self) -> Result<Option<(String, v1::Backbone)>> {
        let Some(model) = &self.model else { return Ok(None) };
        let model = super::backbones::as_elsewhere(model);
        let last = incipit_weights::split_revision(&model).0.rsplit('/').next().unwrap_or_default();
        let Some(name) = name_of(last) else {
            return bad_input(format!(
                "--model {model}: no name can be made of it; use `incipit backbone create --name`"
            ));
        };
        let backbone = v1::Backbone {
            model,
            device: self.device.map(|device| device.to_string()).unwrap_or_default(),
            dtype: self.dtype.map(|dtype| dtype.to_string()).unwrap_or_default(),
            tp: self.tp.unwrap_or(0),
            dp: self.dp.unwrap_or(0),
            ..v1::Backbone::default()
        };
        Ok(Some((name, backbone)))
    }
}

/// Has the coordinator hold a backbone, unless it does.
///
/// # Errors
/// If it refuses, or has another one of that name.
async fn hold(coordinator: &ClientConfig, name: String, backbone: v1::Backbone) -> Result<()> {
    let client = Client::connect(coordinator).await.map_err(refusal)?;
    let create = v1::CreateBackboneRequest {
        backbone_id: name.clone(),
        backbone: Some(backbone.clone()),
        request_id: uuid::Uuid::new_v4().to_string(),
        validate_only: false,
    };
    let created = client.unary(create, async |request| client.backbones().create_backbone(request).await);
    match created.await {
        Ok(_) => {
            let next = format!("incipit job submit --backbone {name} --train FILE");
            note(&format!("loading backbones/{name}; train on it: {next}"));
            Ok(())
        }
        Err(Problem { code: tonic::Code::AlreadyExists, .. }) => {
            let request = v1::GetBackboneRequest { name: format!("backbones/{name}") };
            let there = call!(client, backbones.get_backbone(request))?;
            check_same(&name, &backbone, &there)?;
            note(&format!("backbones/{name} is there from before"));
            Ok(())
        }
        Err(problem) => Err(refusal(problem).context(format!(
            "backbones/{name} cannot be had; without --model, `up` goes on with what is there"
        ))),
    }
}

/// Checks that a backbone which is there is what was asked for, as far as anything was said.
fn check_same(name: &str, asked: &v1::Backbone, there: &v1::Backbone) -> Result<()> {
    let number = |number: u32| if number == 0 { String::new() } else { number.to_string() };
    let both = |field: fn(&v1::Backbone) -> &str| [field(asked).to_owned(), field(there).to_owned()];
    let all = [
        ("model", both(|backbone| &backbone.model)),
        ("dtype", both(|backbone| &backbone.dtype)),
        ("device", both(|backbone| &backbone.device)),
        ("tp", [asked.tp, there.tp].map(number)),
        ("dp", [asked.dp, there.dp].map(number)),
    ];
    let differs = all.iter().find(|(_, [asked, there])| !asked.is_empty() && asked != there);
    let Some((flag, [asked, there])) = differs else { return Ok(()) };
    bad_input(format!(
        "backbones/{name} is there from before with --{flag} {there}, and --{flag} {asked} is given: start without --model, and make \
         another with `incipit backbone create --name`, or remove this one with `incipit backbone delete {name}`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backbone_from_before_is_what_is_said_of_it() {
        let backbone = |model: &str, dtype: &str, device: &str, (tp, dp)| v1::Backbone {
            model: model.into(),
            dtype: dtype.into(),
            device: device.into(),
            tp,
            dp,
            ..v1::Backbone::default()
        };
        let there = backbone("/a/t5", "f32", "cpu", (2, 1));
        let check = |asked: v1::Backbone| check_same("t5", &asked, &there);
        check(there.clone()).unwrap();
        check(backbone("/a/t5", "", "", (0, 0))).unwrap();
        for (asked, part) in [
            (backbone("/b/t5", "", "", (0, 0)), "with --model /a/t5, and --model /b/t5 is given"),
            (backbone("/a/t5", "bf16", "", (0, 0)), "--dtype f32"),
            (backbone("/a/t5", "", "cuda", (0, 0)), "--device cuda"),
            (backbone("/a/t5", "", "", (1, 0)), "--tp 1"),
            (backbone("/a/t5", "", "", (0, 2)), "--dp 2"),
        ] {
            let error = check(asked).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("incipit backbone delete t5"), "{error}");
        }
    }
}
