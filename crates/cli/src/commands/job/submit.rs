//! `incipit job submit`: the flags and files of `train`, for a backbone of the cluster.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use incipit_proto::Problem;
use incipit_proto::client::Client;
use incipit_proto::v1::{
    Backbone, BackboneState, CreateJobRequest, GetBackboneRequest, Job, JobReason, ListBackbonesRequest,
    RetryPolicy,
};
use incipit_tune::spec::PartialSpec;

use super::draft::{self, Draft};
use super::plan::Plan;
use super::{list, watch};
use crate::args::{Global, NamedTaskArgs};
use crate::cluster::blobs::{self, LocalFile};
use crate::cluster::names::{self, short};
use crate::cluster::{ConnectArgs, Refusal, call, list as pages, request_id, show};
use crate::commands::training::TrainingArgs;
use crate::exit::{Exit, bad_input};
use crate::progress::note;

const AFTER_HELP: &str = "\
The settings are checked as `incipit train` checks them, and the files are read, before anything is sent. Files that the coordinator \
does not have yet are uploaded. A file of settings is one of `incipit train --config`: what it says of the machine is left to the \
backbone.

Examples:
  incipit job submit --backbone base --train train.jsonl --eval dev.jsonl --watch
  incipit job submit --backbone base --task multirc --data-dir SuperGLUE
      a benchmark from its owners' files, which are uploaded: texts, labels and metrics are the benchmark's
  incipit job submit --config runs/q/run.toml --lr 0.1 --name q-slow
  incipit job submit --config runs/q/run.toml --dry-run
      what it would be: steps, bytes, its place in the queue, roughly the time; nothing is sent
  incipit job submit --backbone base --tasks tasks.toml --shared-length 50 --prompt-length 60
      several tasks whose prompts share rows, as `incipit multitask` tunes them: one job, and a prompt for each

Methods: all of `incipit train`. Only prompts share a step with others'; what trains weights needs a backbone on a CPU, and model memory for \
weights of its own. `incipit checkpoint download` fetches what was trained.
Files: JSON lines (also .gz), CSV, TSV or Parquet; with --task, those of the benchmark's splits, by --data-dir or by --train and --eval.
Prompt initialisations: class-label, vocab, uniform, uniform:LOW,HIGH, text:SOME WORDS; or another task's prompt (Vu et al. \
2022): file:PATH (an .npy, a PEFT directory or a run, which is read here and handed in), prompt:NAME or prompt:NAME/VERSION \
(one that was promoted).";

/// Flags of `job submit`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct SubmitArgs {
    /// Backbone to train on [default: the one that has the model]
    #[arg(long, value_name = "BACKBONE", help_heading = "Job", value_parser = names::backbone)]
    backbone: Option<String>,
    /// Model of the backbone, where --backbone is not given
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "Job")]
    model: Option<String>,
    /// Training examples
    #[arg(long, value_name = "FILE", help_heading = "Job")]
    train: Option<PathBuf>,
    /// Evaluation examples: they choose the best prompt
    #[arg(long, value_name = "FILE", help_heading = "Job")]
    eval: Option<PathBuf>,
    /// File with a table for each of several tasks whose prompts share rows, as for `incipit multitask`; with
    /// --shared-length
    #[arg(long, value_name = "FILE.toml", help_heading = "Job")]
    tasks: Option<PathBuf>,
    /// Rows that the prompts of all --tasks have in common, of --prompt-length
    #[arg(long, value_name = "S", help_heading = "Job")]
    shared_length: Option<usize>,
    /// Settings from a file, as for `incipit train`; flags override it
    #[arg(long, value_name = "FILE.toml", help_heading = "Job")]
    config: Option<PathBuf>,
    /// Name of the job [default: made up]
    #[arg(long, value_name = "JOB", help_heading = "Job", value_parser = names::new_id)]
    name: Option<String>,
    /// Share of the backbone's time, against its other jobs [default: 10]
    #[arg(long, value_name = "1..100", help_heading = "Job", value_parser = clap::value_parser!(u32).range(1..=100))]
    priority: Option<u32>,
    /// Whatever helps to find the job again; may be given several times
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Job", value_parser = names::label)]
    label: Vec<(String, String)>,
    /// Attempts after one that failed for want of memory, within the program, or with its engine (lost workers are not
    /// counted: from those a job always goes on) [default: 0]
    #[arg(long, value_name = "N", help_heading = "Job", value_parser = clap::value_parser!(u32).range(0..=10))]
    retries: Option<u32>,
    /// The files are on the workers' machines, under these paths; nothing is read here, or uploaded
    #[arg(long, help_heading = "Job")]
    data_on_workers: bool,
    /// Start as a prompt of another backbone, such as a copy in another type
    #[arg(long, help_heading = "Job")]
    allow_other_backbone: bool,
    /// Check everything, print what the job would be, and hand nothing in
    #[arg(long, help_heading = "Job", conflicts_with = "watch")]
    dry_run: bool,
    /// Follow the job until it ends, as `job watch` does
    #[arg(long, help_heading = "Job")]
    watch: bool,
    /// The same request sent again under the same id makes no second job [default: a new one]
    #[arg(long, value_name = "UUID", help_heading = "Job")]
    request_id: Option<String>,
    #[command(flatten)]
    named: NamedTaskArgs,
    #[command(flatten)]
    training: TrainingArgs,
}

/// Hands a job in.
///
/// # Errors
/// If the settings or the files cannot be used, or what the coordinator says.
pub(super) async fn run(args: SubmitArgs, connect: &ConnectArgs, global: &Global) -> Result<Exit> {
    let request_id = request_id(args.request_id.as_deref())?;
    let (id, backbone, dry_run, watched) =
        (args.name.clone(), args.backbone.clone(), args.dry_run, args.watch);
    let mut job = Job {
        priority: args.priority.unwrap_or(0),
        labels: args.label.iter().cloned().collect(),
        retry_policy: args.retries.map(retry_policy),
        ..Job::default()
    };
    let draft = draft(args)?;
    let mut wire = draft.wire()?;
    let data = draft.read(&mut wire, global)?;
    let client = connect.connect().await?;
    let backbone = choose(&client, backbone.as_deref(), draft.model.as_deref()).await?;
    draft.start(&mut wire, &client, &backbone).await?;
    let missing = blobs::missing(&client, &data.files).await?;
    (job.backbone, job.spec) = (backbone.name.clone(), Some(wire));
    let request = CreateJobRequest {
        job_id: id.unwrap_or_default(),
        job: Some(job),
        request_id: request_id.clone(),
        validate_only: dry_run,
        continue_from: String::new(),
    };
    if dry_run {
        let answer = ask(&client, request, &missing).await?;
        let plan = Plan::new(&draft.specs(), &data.examples, &backbone, answer.as_ref(), &missing);
        show::print(&plan, || plan.text(), global)?;
        return Ok(Exit::Ok);
    }
    blobs::upload(&client, &missing, global).await?;
    let job = call!(client, jobs.create_job(request)).map_err(|error| safe_to_repeat(error, &request_id))?;
    if watched {
        note(&format!("handed in {}", short(&job.name)));
        return watch::watch(&client, &job.name, global).await;
    }
    show::print(&job, || list::table(std::slice::from_ref(&job)), global)?;
    note(&format!("watch it: incipit job watch {}", short(&job.name)));
    Ok(Exit::Ok)
}

/// The settings that the flags and the files give.
fn draft(args: SubmitArgs) -> Result<Draft> {
    let flags = PartialSpec {
        model: args.model,
        train: args.train,
        eval: args.eval,
        task: args.named.task,
        data_dir: args.named.data_dir,
        shared_length: args.shared_length,
        allow_other_backbone: args.allow_other_backbone.then_some(true),
        ..args.training.into_spec()
    };
    let mut file = args.config.as_deref().map(PartialSpec::read).transpose()?.unwrap_or_default();
    let evaluated = |spec: &PartialSpec| spec.eval.is_some() || spec.task.is_some();
    if args.tasks.is_none() && !evaluated(&flags) && !evaluated(&file) {
        // A run writes all of its settings down, those of evaluations that it does not make too.
        (file.eval_every, file.metrics) = (None, None);
    }
    if let Some(path) = &args.config {
        draft::tell_ignored(&path.display().to_string(), &file);
    }
    Draft::resolve(flags.over(file), args.tasks.as_deref(), args.data_on_workers)
}

/// Failures that may not come again with the same numbers.
pub(super) fn retry_policy(max_retries: u32) -> RetryPolicy {
    let reasons =
        [JobReason::OutOfMemory, JobReason::Internal, JobReason::EngineCrashed].map(Into::into).to_vec();
    RetryPolicy { max_retries, reasons }
}

/// Where nobody knows whether the job was accepted, asking again under the same id finds out.
fn safe_to_repeat(error: anyhow::Error, request_id: &str) -> anyhow::Error {
    match error.downcast_ref::<Refusal>() {
        Some(refusal) if refusal.exit() == Exit::Failure => error.context(format!(
            "the job may have been accepted or not; send it again with --request-id {request_id}, and there is no second one"
        )),
        _ => error,
    }
}

/// What the coordinator would make of it. Data that would be uploaded first is no reason to refuse it now.
async fn ask(client: &Client, request: CreateJobRequest, missing: &[LocalFile]) -> Result<Option<Job>> {
    let answer = call!(client, jobs.create_job(request));
    let of_data = |error: &anyhow::Error| {
        let refused = error.downcast_ref::<Refusal>().map(|refusal| &refusal.0);
        let names = |problem: &Problem, file: &LocalFile| {
            problem.message.contains(&file.digest)
                || problem.metadata.values().any(|value| *value == file.digest)
        };
        refused.is_some_and(|problem| missing.iter().any(|file| names(problem, file)))
    };
    match answer {
        Err(error) if of_data(&error) => Ok(None),
        answer => answer.map(Some),
    }
}

/// The backbone that was named, or the one that has the model.
async fn choose(client: &Client, name: Option<&str>, model: Option<&str>) -> Result<Backbone> {
    if let Some(name) = name {
        return call!(client, backbones.get_backbone(GetBackboneRequest { name: name.to_owned() }));
    }
    let all =
        pages!(client, backbones.list_backbones(ListBackbonesRequest::default()), backbones, usize::MAX);
    let chosen = pick(all, model).context("no --backbone was given")?;
    note(&format!("on the backbone {}", short(&chosen.name)));
    Ok(chosen)
}

/// The one backbone that has the model; where several have it, the only one of them that is ready.
fn pick(all: Vec<Backbone>, model: Option<&str>) -> Result<Backbone> {
    let known = names_of(&all);
    let fits = |backbone: &Backbone| model.is_none_or(|model| is_same_model(&backbone.model, model));
    let mut fitting: Vec<Backbone> = all.into_iter().filter(fits).collect();
    if fitting.len() > 1
        && fitting.iter().filter(|backbone| backbone.state() == BackboneState::Ready).count() == 1
    {
        fitting.retain(|backbone| backbone.state() == BackboneState::Ready);
    }
    match (fitting.len(), model) {
        (1, _) => Ok(fitting.remove(0)),
        (0, Some(model)) if known.is_empty() => bad_input(format!(
            "there is no backbone; create one: incipit backbone create --name NAME --model {model}"
        )),
        (0, Some(model)) => bad_input(format!(
            "no backbone has the model {model} (there are {known}); name one with --backbone, or create one: incipit backbone \
             create --name NAME --model {model}"
        )),
        (0, None) => {
            bad_input("there is no backbone; create one: incipit backbone create --name NAME --model MODEL")
        }
        (_, Some(model)) => {
            let several = names_of(&fitting);
            bad_input(format!(
                "several backbones have the model {model}: {several}; name one with --backbone"
            ))
        }
        (_, None) => bad_input(format!("there are several backbones: {known}; name one with --backbone")),
    }
}

fn names_of(backbones: &[Backbone]) -> String {
    backbones.iter().map(|backbone| short(&backbone.name)).collect::<Vec<_>>().join(", ")
}

/// Whether two names are of one model: the same text, or directories that are the same here.
fn is_same_model(one: &str, other: &str) -> bool {
    let place = |model: &str| Path::new(model).canonicalize().ok();
    one == other || place(one).is_some_and(|one| Some(one) == place(other))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn backbone(id: &str, model: &str, state: BackboneState) -> Backbone {
        Backbone {
            name: format!("backbones/{id}"),
            model: model.into(),
            state: state.into(),
            ..Backbone::default()
        }
    }

    fn picked(all: &[Backbone], model: Option<&str>) -> Result<String, String> {
        pick(all.to_vec(), model).map(|backbone| short(&backbone.name)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_model_picks_the_backbone() {
        use BackboneState::{Loading, Ready};
        let all = [backbone("a", "m", Ready), backbone("b", "n", Ready), backbone("c", "n", Loading)];
        assert_eq!(picked(&all, Some("m")).as_deref(), Ok("a"));
        assert_eq!(picked(&all, Some("n")).as_deref(), Ok("b"), "the ready one");
        assert_eq!(picked(&all[..1], None).as_deref(), Ok("a"), "the only one");
        for (all, model, part) in [
            (&all[..], Some("x"), "there are a, b, c"),
            (&all[..], None, "several backbones: a, b, c"),
            (&all[..0], None, "incipit backbone create"),
            (&all[..0], Some("m"), "--model m"),
            (
                &[backbone("a", "m", Ready), backbone("b", "m", Ready)][..],
                Some("m"),
                "a, b; name one with --backbone",
            ),
        ] {
            let message = picked(all, model).unwrap_err();
            assert!(message.contains(part), "no {part:?} in {message:?}");
        }
        assert!(is_same_model("/tmp/../tmp", "/tmp") && !is_same_model("/tmp/no/a", "/tmp/no/b"));
    }

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: SubmitArgs,
    }

    #[test]
    fn the_file_of_a_run_without_evaluations_is_taken_and_flags_for_them_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("run.toml");
        let settings = "train = \"x.jsonl\"\neval-every = 500\nmetrics = [\"accuracy\"]\nsteps = 7\n";
        std::fs::write(&file, settings).expect("a file");
        let submit = |flags: &[&str]| {
            let file = file.display().to_string();
            let given = ["submit", "--data-on-workers", "--config", &file];
            let args = Cli::parse_from(given.into_iter().chain(flags.iter().copied())).args;
            draft(args).and_then(|draft| draft.wire()).expect("a specification")
        };
        let spec = submit(&[]);
        assert_eq!((spec.steps, spec.eval_every, spec.metrics.len()), (Some(7), None, 0));
        assert_eq!(submit(&["--eval-every", "9"]).eval_every, Some(9), "the coordinator refuses it");
        let spec = submit(&["--eval", "y.jsonl"]);
        assert_eq!((spec.eval_every, spec.metrics.len()), (Some(500), 1));
    }
}
