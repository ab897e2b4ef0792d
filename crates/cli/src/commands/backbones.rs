//! `incipit backbone`: frozen models that workers hold in memory for any number of jobs.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use incipit_proto::client::Client;
use incipit_proto::v1::{
    Backbone, BackboneState, CreateBackboneRequest, DeleteBackboneRequest, GetBackboneRequest,
    ListBackbonesRequest, RankPlacement, RetryBackboneRequest, UpdateBackboneRequest,
};
use incipit_tune::spec::Precision;
use pbjson_types::FieldMask;

use crate::args::{Global, choice, names as flag_names};
use crate::cluster::labels::LabelArgs;
use crate::cluster::logs::{self, LogsArgs};
use crate::cluster::names::{self, short};
use crate::cluster::{ConnectArgs, block_on, call, list, request_id, show};
use crate::exit::{Exit, bad_input};
use crate::loading::{self, Gauge};
use crate::output;
use crate::progress::{self, note};
use crate::units;

/// How often a backbone is looked at that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Flags of `backbone`.
#[derive(Args)]
pub(crate) struct BackboneArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: BackboneCommand,
}

/// What can be done with backbones.
#[derive(Subcommand)]
enum BackboneCommand {
    /// Have a model loaded, and kept for jobs
    Create(Box<CreateArgs>),
    /// List backbones
    List,
    /// Show a backbone, and who has its ranks
    Get(OneArgs),
    /// Print what its engines logged, but for lines of a single job
    Logs(BackboneLogsArgs),
    /// Change how many jobs are on it at once, or its labels
    Update(UpdateArgs),
    /// Have the model of a backbone that has failed loaded again; its jobs have waited
    Retry(RetryArgs),
    /// Let a model go
    Delete(DeleteArgs),
}

/// Flags of `backbone create`.
#[derive(Args)]
struct CreateArgs {
    /// Name of the backbone
    #[arg(long, value_name = "BACKBONE", value_parser = names::new_id)]
    name: String,
    /// Model: a directory as the workers see it, or a name on the Hugging Face Hub (ORG/NAME, or ORG/NAME@REVISION for a
    /// branch, a tag or a commit)
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: String,
    /// Type of the weights [default: bf16]
    #[arg(long, value_parser = choice::<Precision>(flag_names::DTYPES))]
    dtype: Option<Precision>,
    /// Where it computes [default: cpu]
    #[arg(long, value_parser = PossibleValuesParser::new(["cpu", "cuda"]))]
    device: Option<String>,
    /// Ranks that share one copy of the weights [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tp: Option<u32>,
    /// Copies of the model, between which the examples are divided [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    dp: Option<u32>,
    /// Copies that are enough while no worker has room for more: jobs go on with these, and with more when there is room again (for `gloo` and
    /// `nccl`) [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    min_dp: Option<u32>,
    /// What carries numbers between ranks; with `local` they are threads of one process [default: local]
    #[arg(long, value_parser = PossibleValuesParser::new(["local", "gloo", "nccl"]))]
    collective: Option<String>,
    /// Tokens that go through the model at once [default: by the memory there is]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    microbatch_tokens: Option<u32>,
    /// Jobs that are on it at once, at most [default: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_running_jobs: Option<u32>,
    /// Whatever helps to find it again; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = names::label)]
    label: Vec<(String, String)>,
    /// Check everything, print what the backbone would be, and have nothing loaded
    #[arg(long, conflicts_with = "wait")]
    dry_run: bool,
    /// Wait until it is ready (exit code 0) or has failed (1)
    #[arg(long)]
    wait: bool,
    /// The same request sent again under the same id makes no second backbone [default: a new one]
    #[arg(long, value_name = "UUID")]
    request_id: Option<String>,
}

/// A backbone.
#[derive(Args)]
struct OneArgs {
    /// The backbone
    #[arg(value_name = "BACKBONE", value_parser = names::backbone)]
    backbone: String,
}

/// Flags of `backbone logs`.
#[derive(Args)]
struct BackboneLogsArgs {
    #[command(flatten)]
    one: OneArgs,
    #[command(flatten)]
    logs: LogsArgs,
}

/// Flags of `backbone update`.
#[derive(Args)]
struct UpdateArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Jobs that are on it at once, at most; those that run stay
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_running_jobs: Option<u32>,
    /// Copies of the model that are enough while no worker has room for more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    min_dp: Option<u32>,
    #[command(flatten)]
    labels: LabelArgs,
    /// Check everything, print what the backbone would be, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Flags of `backbone retry`.
#[derive(Args)]
struct RetryArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Wait until it is ready (exit code 0) or has failed again (1)
    #[arg(long)]
    wait: bool,
}

/// Flags of `backbone delete`.
#[derive(Args)]
struct DeleteArgs {
    /// The backbone
    #[arg(value_name = "BACKBONE", value_parser = names::backbone)]
    backbone: String,
    /// Cancel the jobs that want it, instead of refusing
    #[arg(long)]
    force: bool,
}

/// Does it.
///
/// # Errors
/// What the coordinator says, or if it cannot be reached.
pub(crate) fn run(args: BackboneArgs, global: &Global) -> Result<Exit> {
    let BackboneArgs { connect, command } = args;
    block_on(async move {
        match command {
            BackboneCommand::Create(args) => create(*args, &connect, global).await,
            BackboneCommand::List => {
                let client = connect.connect().await?;
                let all = list!(
                    client,
                    backbones.list_backbones(ListBackbonesRequest::default()),
                    backbones,
                    usize::MAX
                );
                show::print(&all, || table(&all), global)?;
                Ok(Exit::Ok)
            }
            BackboneCommand::Get(args) => {
                let backbone = get(&connect.connect().await?, &args.backbone).await?;
                show::print(&backbone, || facts(&backbone), global)?;
                Ok(Exit::Ok)
            }
            BackboneCommand::Logs(args) => {
                let (client, name) = (connect.connect().await?, args.one.backbone);
                // It has no end but its deletion.
                logs::logs(&args.logs, &name, &client, global, async || Ok(false)).await
            }
            BackboneCommand::Update(args) => {
                let dry_run = args.dry_run;
                let backbone = update(args, &connect).await?;
                show::print(&backbone, || facts(&backbone), global)?;
                if dry_run {
                    note("so it would be; nothing was changed");
                }
                Ok(Exit::Ok)
            }
            BackboneCommand::Retry(args) => {
                let (client, request_id) = (connect.connect().await?, request_id(None)?);
                let request =
                    RetryBackboneRequest { name: args.one.backbone, request_id, etag: String::new() };
                let backbone = call!(client, backbones.retry_backbone(request))?;
                follow(&client, backbone, args.wait, global).await
            }
            BackboneCommand::Delete(args) => {
                let client = connect.connect().await?;
                let (name, force) = (args.backbone, args.force);
                let request = DeleteBackboneRequest {
                    name: name.clone(),
                    force,
                    request_id: request_id(None)?,
                    etag: String::new(),
                };
                call!(client, backbones.delete_backbone(request))?;
                note(&format!("deleted {}", short(&name)));
                Ok(Exit::Ok)
            }
        }
    })
}

async fn get(client: &Client, name: &str) -> Result<Backbone> {
    call!(client, backbones.get_backbone(GetBackboneRequest { name: name.to_owned() }))
}

async fn update(args: UpdateArgs, connect: &ConnectArgs) -> Result<Backbone> {
    let mut paths = Vec::new();
    let labels = args.labels.changes(&mut paths);
    let mut backbone = Backbone { name: args.one.backbone, labels, ..Backbone::default() };
    if let Some(places) = args.max_running_jobs {
        backbone.max_running_jobs = places;
        paths.push("max_running_jobs".to_owned());
    }
    if let Some(copies) = args.min_dp {
        backbone.min_dp = copies;
        paths.push("min_dp".to_owned());
    }
    if paths.is_empty() {
        return bad_input(
            "nothing is to change; give --max-running-jobs, --min-dp, --label or --remove-label",
        );
    }
    let (update_mask, request_id) = (Some(FieldMask { paths }), request_id(None)?);
    let (backbone, validate_only) = (Some(backbone), args.dry_run);
    let request = UpdateBackboneRequest { backbone, update_mask, request_id, validate_only };
    let client = connect.connect().await?;
    call!(client, backbones.update_backbone(request))
}

async fn create(args: CreateArgs, connect: &ConnectArgs, global: &Global) -> Result<Exit> {
    let request_id = request_id(args.request_id.as_deref())?;
    let client = connect.connect().await?;
    let backbone = Backbone {
        model: as_elsewhere(&args.model),
        dtype: args.dtype.map(|dtype| dtype.to_string()).unwrap_or_default(),
        device: args.device.unwrap_or_default(),
        tp: args.tp.unwrap_or_default(),
        dp: args.dp.unwrap_or_default(),
        min_dp: args.min_dp.unwrap_or_default(),
        collective: args.collective.unwrap_or_default(),
        microbatch_tokens: args.microbatch_tokens.unwrap_or_default(),
        max_running_jobs: args.max_running_jobs.unwrap_or_default(),
        labels: args.label.into_iter().collect(),
        ..Backbone::default()
    };
    let request = CreateBackboneRequest {
        backbone_id: args.name,
        backbone: Some(backbone),
        request_id,
        validate_only: args.dry_run,
    };
    let backbone = call!(client, backbones.create_backbone(request))?;
    if args.dry_run {
        show::print(&backbone, || facts(&backbone), global)?;
        note("so it would be; nothing is loaded");
        return Ok(Exit::Ok);
    }
    follow(&client, backbone, args.wait, global).await
}

/// Shows a backbone that is to be loaded, if wanted when it is or has failed.
async fn follow(client: &Client, mut backbone: Backbone, wait: bool, global: &Global) -> Result<Exit> {
    if wait {
        backbone = until_settled(client, backbone, global).await?;
    }
    show::print(&backbone, || table(std::slice::from_ref(&backbone)), global)?;
    let name = short(&backbone.name);
    match backbone.state() {
        BackboneState::Failed if wait => {
            progress::error(&format!("the backbone {name} failed: {}", why(&backbone)));
            return Ok(Exit::Failure);
        }
        BackboneState::Ready => {
            note(&format!("train on it: incipit job submit --backbone {name} --train FILE --eval FILE"));
        }
        _ => note(&format!("see how it gets on: incipit backbone get {name}")),
    }
    Ok(Exit::Ok)
}

/// Waits until a backbone trains, or never will; tells of its states on the way.
async fn until_settled(client: &Client, mut backbone: Backbone, global: &Global) -> Result<Backbone> {
    let (mut told, mut spinner, mut gauge) = (String::new(), None, None);
    while !matches!(backbone.state(), BackboneState::Ready | BackboneState::Failed) {
        let now = format!("{}: {} ({})", short(&backbone.name), state(&backbone), why(&backbone));
        if now != told {
            gauge = None;
            spinner = Some(progress::spinner(&now, global));
            told = now;
        }
        if let Some(bytes) = loaded(&backbone) {
            spinner = None; // The bar takes its place.
            let what = || Gauge::new(&format!("loading {}", short(&backbone.name)), global);
            gauge.get_or_insert_with(what).show(bytes);
        }
        tokio::time::sleep(LOOK_EVERY).await;
        backbone = get(client, &backbone.name).await?;
    }
    drop(spinner);
    Ok(backbone)
}

/// Bytes of all ranks' parts that are loaded, and of the parts, while that is known of a rank that is not ready.
fn loaded(backbone: &Backbone) -> Option<(u64, u64)> {
    let all = || backbone.ranks.iter();
    all().find(|rank| !rank.ready && rank.total_bytes > 0)?;
    Some((all().map(|rank| rank.loaded_bytes).sum(), all().map(|rank| rank.total_bytes).sum()))
}

/// A directory of this machine under its whole path: who reads it stands elsewhere. Another name as it is.
pub(crate) fn as_elsewhere(model: &str) -> String {
    let path = Path::new(model);
    let whole = if path.is_dir() { path.canonicalize().ok() } else { None };
    whole.and_then(|path| path.to_str().map(str::to_owned)).unwrap_or_else(|| model.to_owned())
}

fn state(backbone: &Backbone) -> String {
    show::word(backbone.state().as_str_name(), "BACKBONE_STATE_")
}

fn why(backbone: &Backbone) -> String {
    let reason = show::word(backbone.reason().as_str_name(), "BACKBONE_REASON_");
    if backbone.message.is_empty() { reason } else { format!("{reason}: {}", backbone.message) }
}

/// Backbones, one a line.
fn table(backbones: &[Backbone]) -> String {
    let row = |backbone: &Backbone| {
        vec![
            short(&backbone.name),
            short_model(&backbone.model),
            state(backbone),
            format!("{}x{}", replicas(backbone, "/"), backbone.tp.max(1)),
            format!("{}+{}", backbone.running_jobs, backbone.queued_jobs),
            rate(backbone),
            show::age(backbone.create_time.as_ref()),
        ]
    };
    let header = ["NAME", "MODEL", "STATE", "DPxTP", "JOBS", "TOKENS/S", "AGE"];
    let nothing = "no backbones; create one with `incipit backbone create`";
    show::table(&header, backbones.iter().map(row).collect(), &[1], nothing)
}

/// Copies of the model; of a backbone that works with fewer than it is to have, how many.
fn replicas(backbone: &Backbone, of: &str) -> String {
    let (all, here) = (backbone.dp.max(1), backbone.ranks.len() as u32 / backbone.tp.max(1));
    if backbone.state() == BackboneState::Ready && here < all {
        return format!("{here}{of}{all}");
    }
    all.to_string()
}

/// A directory's last part says most.
fn short_model(model: &str) -> String {
    let path = Path::new(model);
    let last = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_absolute());
    last.unwrap_or(model).to_owned()
}

fn rate(backbone: &Backbone) -> String {
    if backbone.tokens_per_second > 0.0 {
        units::rate(backbone.tokens_per_second)
    } else {
        show::NONE.to_owned()
    }
}

/// Its state, and while it loads how far it is.
fn standing(backbone: &Backbone) -> String {
    let how_far = loaded(backbone).map(|bytes| format!(", {} loaded", loading::share(bytes)));
    state(backbone) + &how_far.unwrap_or_default()
}

/// All there is to know of a backbone.
fn facts(backbone: &Backbone) -> String {
    let number = |n: u64| if n == 0 { show::NONE.to_owned() } else { units::count(n) };
    let mesh = format!(
        "{} x {} ranks (dp x tp), {} on {}, {}",
        replicas(backbone, " of "),
        backbone.tp.max(1),
        backbone.collective,
        backbone.device,
        backbone.dtype
    );
    let text = output::facts([
        ("backbone", short(&backbone.name)),
        ("model", backbone.model.clone()),
        ("state", standing(backbone)),
        ("reason", why(backbone)),
        ("mesh", mesh),
        ("epoch", number(backbone.epoch)),
        (
            "jobs",
            format!(
                "{} of {} running, {} queued",
                backbone.running_jobs, backbone.max_running_jobs, backbone.queued_jobs
            ),
        ),
        ("tokens/s", rate(backbone)),
        ("parameters", number(backbone.num_parameters)),
        ("width", number(u64::from(backbone.d_model))),
        ("encoder layers", number(u64::from(backbone.num_layers))),
        (
            "microbatch",
            if backbone.microbatch_tokens == 0 {
                show::NONE.to_owned()
            } else {
                format!("{} tokens", units::count(u64::from(backbone.microbatch_tokens)))
            },
        ),
        ("fingerprint", show::or_none(backbone.fingerprint.clone())),
        ("labels", show::labels(&backbone.labels)),
        ("created", show::time(backbone.create_time.as_ref())),
        ("ready", show::time(backbone.ready_time.as_ref())),
    ]);
    if backbone.ranks.is_empty() {
        return text;
    }
    let row = |rank: &RankPlacement| {
        let pid = number(u64::from(rank.pid)).replace(',', "");
        let ready = match (rank.ready, rank.total_bytes) {
            (true, _) => "yes".to_owned(),
            (false, 0) => "no".to_owned(),
            (false, total) => format!("no, {}", units::percent(rank.loaded_bytes as f64 / total as f64)),
        };
        vec![rank.rank.to_string(), short(&rank.worker), pid, ready]
    };
    let ranks =
        show::table(&["RANK", "WORKER", "PID", "READY"], backbone.ranks.iter().map(row).collect(), &[], "");
    format!("{text}\n\n{ranks}")
}

#[cfg(test)]
mod tests {
    use incipit_proto::v1::BackboneReason;

    use super::*;

    fn backbone() -> Backbone {
        Backbone {
            name: "backbones/t5-xxl".into(),
            model: "/models/t5/a-model-with-a-name-that-is-longer-than-any-column-should-be".into(),
            dp: 2,
            tp: 4,
            collective: "gloo".into(),
            device: "cpu".into(),
            dtype: "bf16".into(),
            state: BackboneState::Degraded.into(),
            reason: BackboneReason::WorkerLost.into(),
            message: "worker w-2 gave no sign of life for 4 s".into(),
            tokens_per_second: 12_345.0,
            max_running_jobs: 32,
            ranks: vec![RankPlacement {
                rank: 1,
                worker: "workers/w-2".into(),
                pid: 4711,
                ready: true,
                ..RankPlacement::default()
            }],
            ..Backbone::default()
        }
    }

    #[test]
    fn backbones_fit_a_terminal() {
        let text = table(&[backbone()]);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for part in ["t5-xxl", "degraded", "2x4", "12,345", "a-model"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(table(&[]).contains("backbone create"));
    }

    #[test]
    fn a_backbone_is_shown_with_its_ranks_and_its_trouble() {
        let text = facts(&backbone());
        for part in ["worker lost: worker w-2", "2 x 4 ranks", "w-2", "4711", "yes"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
    }

    #[test]
    fn a_backbone_that_loads_is_shown_with_how_far_its_ranks_are() {
        let rank = |rank, ready, loaded_bytes| RankPlacement {
            rank,
            ready,
            loaded_bytes,
            total_bytes: 1 << 30,
            ..RankPlacement::default()
        };
        let ranks = vec![rank(0, true, 1 << 30), rank(1, false, 1 << 29)];
        let loads = Backbone { state: BackboneState::Loading.into(), ranks, ..backbone() };
        let text = facts(&loads);
        for part in ["loading, 1.5 GiB of 2.0 GiB (75.0 %) loaded", "no, 50.0 %", "yes"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        let ready = Backbone { ranks: vec![rank(0, true, 1 << 30)], ..loads };
        assert_eq!(loaded(&ready), None);
    }

    #[test]
    fn a_backbone_with_fewer_replicas_than_it_is_to_have_is_seen_by_that() {
        let rank = |rank| RankPlacement { rank, ..RankPlacement::default() };
        let ranks = (0..4).map(rank).collect();
        let short = Backbone { state: BackboneState::Ready.into(), ranks, ..backbone() };
        assert!(
            table(std::slice::from_ref(&short)).contains("1/2x4")
                && facts(&short).contains("1 of 2 x 4 ranks")
        );
    }

    #[test]
    fn a_models_directory_is_named_as_it_is_seen_from_everywhere() {
        assert_eq!(as_elsewhere("google/t5-small-lm-adapt"), "google/t5-small-lm-adapt");
        let here = std::env::current_dir().unwrap().join("src");
        assert_eq!(as_elsewhere("src"), here.display().to_string());
    }
}
