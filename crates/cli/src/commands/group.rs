//! Several runs on one backbone, from their specifications to what is printed of them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use incipit_collective::Options;
use incipit_tune::control::Control;
use incipit_tune::ensemble::PROMPTS;
use incipit_tune::group::{self, Kind};
use incipit_tune::spec::TrainSpec;
use incipit_tune::train::{End, Outcome};
use serde::Serialize;

use crate::args::Global;
use crate::commands::train::{self, on_ranks};
use crate::exit::Exit;
use crate::interrupt::stop_on_ctrl_c;
use crate::output::{self, Printed};
use crate::progress::{Watch, note};
use crate::{ranks, report, units};

/// Trains, then prints what came of each run. `command` is how one goes on, and `next` what can be done then with the group's directory.
///
/// # Errors
/// Whatever stops a run: see the exit codes. If one run alone has failed, the others are told of first.
pub(crate) fn carry_out(
    specs: &[TrainSpec],
    kind: &Kind,
    options: &Options,
    global: &Global,
    (command, next): (&str, &dyn Fn(&Path) -> String),
) -> Result<Exit> {
    let control = Control::new();
    stop_on_ctrl_c(control.clone())?;
    let mut watches = Watch::several(specs.len(), global);
    let start = Instant::now();
    let (outcomes, leads) = on_ranks(&specs[0], options, |ranks| match ranks {
        None => group::train(kind, specs, options, &control, &mut watches),
        Some(ranks) if ranks.leads() => group::train_as_rank(kind, specs, ranks, &control, &mut watches),
        Some(ranks) => group::train_as_rank(kind, specs, ranks, &control, &mut vec![(); specs.len()]),
    })?;
    let interrupted = outcomes.iter().flatten().any(|outcome| outcome.end == End::Requested);
    let exit = if interrupted { Exit::Interrupted } else { Exit::Ok };
    if !leads {
        // Rank 0 tells of runs that failed, once it has told of the others.
        return Ok(exit);
    }
    if let Some(failure) = watches.into_iter().find_map(|watch| watch.failure) {
        return Err(failure.context("the runs are done and their prompts are saved, but not all predictions"));
    }
    let out = specs[0].out.parent().unwrap_or(Path::new("")).to_owned();
    let how = ranks::launch_prefix(specs[0].tp * specs[0].dp);
    let (summary, failure) = summary(specs, &out, outcomes, start)?;
    output::print(&summary, global.json)?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    if interrupted {
        note(&format!("go on with: {how}{command} --out {} --resume", out.display()));
    } else {
        note(&format!("next: {}", next(&out)));
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
        // Tasks may be measured by other metrics than their neighbours.
        let metrics: BTreeSet<&String> = runs().flat_map(|run| run.metrics.keys()).collect();
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
