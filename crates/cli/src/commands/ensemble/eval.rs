//! `incipit ensemble eval`: what the prompts of an ensemble are worth, each alone and by their votes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use incipit_collective::Ranks;
use incipit_data::tasks::Task;
use incipit_tune::control::Control;
use incipit_tune::ensemble::{list, read_prompts};
use incipit_tune::prompt::Prompt;
use incipit_tune::trained::Trained;
use incipit_tune::vote::Election;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::args::{Global, ModelArgs};
use crate::commands::backbone::{self, Ready};
use crate::commands::eval::{
    MeasureArgs, Named, by_name, hand_over, majority, named, percent, prepared, spinner, tell_files,
};
use crate::exit::Exit;
use crate::output::{self, Printed};
use crate::ranks::{self, RankArgs};
use crate::{report, units};

const AFTER_HELP: &str = "\
Every example goes through the backbone once with each prompt, all of them in one batch, and the answer of most members counts (Lester \
et al. 2021, section 6). Of answers with equally many votes, the one counts for which an earlier member voted first. For each metric \
the mean over the members is printed, that of the best member (the one with the highest score), and that of the votes. What flags leave \
open is taken from the run of the first member, where its run.toml lies beside it.

Examples:
  incipit ensemble eval --ensemble runs/five --data test.jsonl
  incipit ensemble eval --ensemble runs/rte --task rte --data-dir SuperGLUE
  incipit ensemble eval --model ./t5 --prompt runs/a --prompt runs/b --prompt c.npy \\
      --data test.jsonl --output votes.jsonl";

/// Flags of `ensemble eval`.
#[derive(Args)]
#[command(after_help = AFTER_HELP, mut_arg("output", |arg| arg.help(
    "File to write the votes to, one JSON object a line: index, inputs, target, prediction (what most members voted for), \
     votes (one a member); with --task the benchmark's id besides"
)))]
pub(crate) struct EnsembleEvalArgs {
    /// Ensemble: a directory that `ensemble train` has written (the best prompt of each member), or its
    /// ensemble.safetensors
    #[arg(
        long,
        value_name = "DIR|FILE",
        help_heading = "Model and prompt",
        required_unless_present = "prompts"
    )]
    ensemble: Option<PathBuf>,
    /// Prompt that votes, as `eval` takes it, in place of --ensemble; given once for each
    #[arg(
        long = "prompt",
        value_name = "PATH",
        help_heading = "Model and prompt",
        conflicts_with = "ensemble"
    )]
    prompts: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    measure: MeasureArgs,
    #[command(flatten)]
    pub(super) ranks: RankArgs,
}

/// Evaluates, writes the votes where asked to, and prints the scores.
///
/// # Errors
/// If something given cannot be used, a loss is not finite, or the votes cannot be written.
pub(crate) fn run(args: &EnsembleEvalArgs, global: &Global) -> Result<Exit> {
    let device = args.model.device.unwrap_or_default();
    let summary = ranks::run(&args.ranks, device, global.threads, |ranks| on_rank(args, ranks, global))?;
    output::print(&summary, global.json)?;
    tell_files([&summary.output, &summary.submission], global);
    Ok(Exit::Ok)
}

fn on_rank(args: &EnsembleEvalArgs, ranks: &Arc<Ranks>, global: &Global) -> Result<Summary> {
    // Before the weights, which may take minutes.
    let named = named(&args.measure, ranks.leads())?;
    let members = members(args)?;
    let paths: Vec<PathBuf> = members.iter().map(|(path, _)| path.clone()).collect();
    let voters = members.into_iter().map(|(path, prompt)| (path, Trained::Prompt(prompt))).collect();
    let chosen = backbone::choose(&args.model, voters, &args.measure.format, ranks)?;
    let (set, options) = prepared(&args.measure, &chosen, named.as_ref())?;
    let ready = chosen.load(global)?;
    let spinner = spinner(&set, &ready, global);
    let start = Instant::now();
    let Ready { backbone, prompts, .. } = &ready;
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    let election = Election::hold(backbone, &prompts, Arc::new(set), &options, &Control::new())?;
    drop(spinner);
    if ranks.leads() {
        let outcomes: Vec<&str> = election.votes.iter().map(|vote| vote.prediction.as_str()).collect();
        hand_over(&args.measure, &election.votes, &outcomes, named.as_ref())?;
    }
    Ok(summary(args, paths, &election, start.elapsed().as_secs_f64(), named))
}

/// The prompts that vote, each with where it comes from.
fn members(args: &EnsembleEvalArgs) -> Result<Vec<(PathBuf, Prompt)>> {
    match &args.ensemble {
        None => read(&args.prompts),
        Some(file) if file.is_file() => {
            Ok(read_prompts(file)?.into_iter().map(|prompt| (file.clone(), prompt)).collect())
        }
        Some(dir) => {
            let paths: Vec<PathBuf> = list(dir)?.iter().map(|member| dir.join(&member.dir)).collect();
            read(&paths)
        }
    }
}

/// The prompts that lie at `paths`, each with its path.
fn read(paths: &[PathBuf]) -> Result<Vec<(PathBuf, Prompt)>> {
    paths.iter().map(|path| Ok((path.clone(), Prompt::read(path)?))).collect()
}

#[derive(Serialize)]
struct Summary {
    task: Option<&'static Task>,
    split: Option<&'static str>,
    examples: usize,
    members: Vec<MemberScores>,
    average: Map<String, Value>,
    best: Map<String, Value>,
    /// From 0.
    best_member: usize,
    ensemble: Map<String, Value>,
    /// Of the votes.
    legal_share: Option<f64>,
    majority_share: Option<f64>,
    seconds: f64,
    output: Option<PathBuf>,
    submission: Option<PathBuf>,
}

#[derive(Serialize)]
struct MemberScores {
    prompt: PathBuf,
    metrics: Map<String, Value>,
    legal_share: Option<f64>,
}

fn summary(
    args: &EnsembleEvalArgs,
    paths: Vec<PathBuf>,
    election: &Election,
    seconds: f64,
    named: Option<Named>,
) -> Summary {
    let best = election.best();
    let scores = paths.into_iter().zip(&election.members).map(|(prompt, member)| MemberScores {
        prompt,
        metrics: by_name(&member.metrics),
        legal_share: member.legal_share,
    });
    let has_targets = named.as_ref().is_none_or(Named::is_labelled);
    Summary {
        task: named.as_ref().map(|named| named.task),
        split: named.as_ref().map(|named| named.split.name()),
        examples: election.votes.len(),
        members: scores.collect(),
        average: by_name(&election.average()),
        best: by_name(&election.members[best].metrics),
        best_member: best,
        ensemble: by_name(&election.metrics),
        legal_share: election.legal_share,
        majority_share: election.legal_share.filter(|_| has_targets).and(majority(&election.members[best])),
        seconds,
        output: args.measure.output.clone(),
        submission: named.and_then(|named| named.submission),
    }
}

impl Printed for Summary {
    fn text(&self) -> String {
        let row = |(name, average): (&String, &Value)| {
            let cell = |of: &Map<String, Value>| of.get(name).map_or_else(String::new, percent);
            vec![report::words(name), percent(average), cell(&self.best), cell(&self.ensemble)]
        };
        let mut rows: Vec<Vec<String>> = self.average.iter().map(row).collect();
        if let Some(share) = self.legal_share {
            let each: Vec<f64> = self.members.iter().filter_map(|member| member.legal_share).collect();
            let average = each.iter().sum::<f64>() / each.len() as f64;
            let cells = [average, each[self.best_member], share].map(units::percent);
            rows.push(["legal labels".to_owned()].into_iter().chain(cells).collect());
        }
        let table = output::table(&["measure", "average", "best", "ensemble"], &rows, true);
        let best = &self.members[self.best_member];
        let mut facts = vec![
            ("members", self.members.len().to_string()),
            ("best", format!("{} (member {})", best.prompt.display(), self.best_member)),
        ];
        facts.extend(self.majority_share.map(|share| ("majority class", units::percent(share))));
        facts.push(("examples", units::count(self.examples as u64)));
        facts.push(("examples a second", units::rate(self.examples as f64 / self.seconds)));
        format!("{table}\n\n{}", output::facts(facts))
    }
}
