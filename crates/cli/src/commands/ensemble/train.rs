//! `incipit ensemble train`: tunes the prompts of an ensemble.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use incipit_tune::control::Control;
use incipit_tune::ensemble::{self, PROMPTS};
use incipit_tune::spec::TrainSpec;
use incipit_tune::train::{End, Outcome};
use serde::Serialize;

use crate::args::Global;
use crate::commands::train::{self, TrainArgs, on_ranks};
use crate::exit::Exit;
use crate::interrupt::stop_on_ctrl_c;
use crate::output::{self, Printed};
use crate::progress::{Watch, note};
use crate::{ranks, report, units};

const AFTER_HELP: &str = "\
Member i is trained with the seed --seed + i: another start of the prompt and another order of the data. A step of all members goes \
through the backbone as one batch, and each member ends in the bytes of `incipit train` with its seed. OUT/member-0 and so on are run \
directories as `train` makes them, OUT/ensemble.json lists them, and OUT/ensemble.safetensors has the best prompts of all as one \
tensor, [members, rows, columns].

Examples:
  incipit ensemble train --model ./t5 --train train.jsonl --eval dev.jsonl --out runs/five
  incipit ensemble train --model ./t5 --task rte --data-dir SuperGLUE --out runs/rte --members 3 --seed 10
  incipit ensemble train --out runs/five --resume
      goes on with every member from its own last checkpoint, after Ctrl-C, a crash or a kill

Files of examples and prompt initialisations are those that `incipit train --help` lists.
Next: `incipit ensemble eval --ensemble OUT --data test.jsonl`.";

/// Flags of `ensemble train`.
#[derive(Args)]
#[command(
    after_help = AFTER_HELP,
    mut_arg("out", |arg| arg.help("Directory of the ensemble: new, or empty, or with --resume an ensemble's")),
    mut_arg("resume", |arg| arg.help("Go on with the ensemble in --out, every member from its last checkpoint")),
    mut_arg("seed", |arg| {
        arg.help("Seed of the first member's prompt, order of data and dropout; each of the others has the next one [default: 0]")
    })
)]
pub(crate) struct EnsembleTrainArgs {
    /// Prompts to train [default: 5, or with --resume as many as there are]
    #[arg(long, value_name = "N", help_heading = "Run")]
    members: Option<usize>,
    #[command(flatten)]
    pub(super) train: TrainArgs,
}

/// Trains, then prints what came of each member.
///
/// # Errors
/// Whatever stops a run: see the exit codes. If a member alone has failed, the others are told of first.
pub(crate) fn run(args: EnsembleTrainArgs, global: &Global) -> Result<Exit> {
    let options = args.train.ranks.options();
    let (flags, config, resume) = args.train.layers(global);
    let specs = ensemble::resolve(flags, config.as_deref(), resume, args.members)?;
    let control = Control::new();
    stop_on_ctrl_c(control.clone())?;
    let mut watches = Watch::several(specs.len(), global);
    let start = Instant::now();
    let (outcomes, leads) = on_ranks(&specs[0], &options, |ranks| match ranks {
        None => ensemble::train(&specs, &options, &control, &mut watches),
        Some(ranks) if ranks.leads() => ensemble::train_as_rank(&specs, ranks, &control, &mut watches),
        Some(ranks) => ensemble::train_as_rank(&specs, ranks, &control, &mut vec![(); specs.len()]),
    })?;
    let interrupted = outcomes.iter().flatten().any(|outcome| outcome.end == End::Requested);
    let exit = if interrupted { Exit::Interrupted } else { Exit::Ok };
    if !leads {
        // Rank 0 tells of members that failed, once it has told of the others.
        return Ok(exit);
    }
    if let Some(failure) = watches.into_iter().find_map(|watch| watch.failure) {
        return Err(
            failure.context("the ensemble is done and its prompts are saved, but not all predictions")
        );
    }
    let out = specs[0].out.parent().unwrap_or(Path::new("")).to_owned();
    let how = ranks::launch_prefix(specs[0].tp * specs[0].dp);
    let (summary, failure) = summary(&specs, &out, outcomes, start)?;
    output::print(&summary, global.json)?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    if interrupted {
        note(&format!("go on with: {how}ensemble train --out {} --resume", out.display()));
    } else {
        note(&format!("next: incipit ensemble eval --ensemble {} --data FILE", out.display()));
    }
    Ok(exit)
}

#[derive(Serialize)]
struct Summary {
    out: PathBuf,
    members: Vec<MemberSummary>,
    /// The prompts of all, once every member has one.
    prompts: Option<PathBuf>,
    seconds: f64,
}

#[derive(Serialize)]
struct MemberSummary {
    dir: PathBuf,
    seed: u64,
    /// Why it has no outcome.
    error: Option<String>,
    #[serde(flatten)]
    run: Option<train::Summary>,
}

/// Makes the members' reports and sums all up; with the error of the first member that failed.
fn summary(
    specs: &[TrainSpec],
    out: &Path,
    outcomes: Vec<incipit_tune::Result<Outcome>>,
    start: Instant,
) -> Result<(Summary, Option<anyhow::Error>)> {
    let (mut members, mut failure) = (Vec::with_capacity(specs.len()), None);
    for (i, (spec, outcome)) in specs.iter().zip(outcomes).enumerate() {
        let mut member = MemberSummary { dir: spec.out.clone(), seed: spec.seed, error: None, run: None };
        match outcome {
            Ok(outcome) => member.run = Some(train::summary(spec, outcome, start.elapsed())?),
            Err(error) => {
                member.error = Some(error.to_string());
                failure = failure.or(Some(anyhow::Error::new(error).context(format!("member {i}"))));
            }
        }
        members.push(member);
    }
    let prompts = Some(out.join(PROMPTS)).filter(|path| path.exists());
    let seconds = start.elapsed().as_secs_f64();
    Ok((Summary { out: out.to_owned(), members, prompts, seconds }, failure))
}

impl Printed for Summary {
    fn text(&self) -> String {
        let runs = || self.members.iter().filter_map(|member| member.run.as_ref());
        let metrics: Vec<&String> = runs().next().map(|run| run.metrics.keys().collect()).unwrap_or_default();
        let named: Vec<String> = metrics.iter().map(|name| format!("best {}", report::words(name))).collect();
        let mut header = vec!["member", "seed"];
        header.extend(named.iter().map(String::as_str));
        header.extend(["at step", "steps"]);
        let row = |member: &MemberSummary| {
            let run = member.run.as_ref();
            let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            let mut row = vec![member.dir.display().to_string(), member.seed.to_string()];
            row.extend(metrics.iter().map(|name| {
                or_none(run.and_then(|run| run.metrics.get(*name)).map(|value| units::percent(*value)))
            }));
            row.push(or_none(run.and_then(|run| run.best_step).map(units::count)));
            row.push(or_none(run.map(|run| units::count(run.steps))));
            row
        };
        let rows: Vec<Vec<String>> = self.members.iter().map(row).collect();
        output::table(&header, &rows, true)
    }
}
