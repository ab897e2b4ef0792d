//! `incipit train`: tunes a prompt.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use incipit_collective::Options;
use incipit_tune::control::Control;
use incipit_tune::engine::Recompute;
use incipit_tune::spec::{Backend, Method, PartialSpec, Precision, TrainSpec};
use incipit_tune::train::{End, Observer, Outcome, train, train_as_rank};
use serde::Serialize;

use crate::args::{Global, NamedTaskArgs, choice, names};
use crate::commands::training::TrainingArgs;
use crate::exit::Exit;
use crate::interrupt::stop_on_ctrl_c;
use crate::output::{self, Printed};
use crate::progress::{Watch, note};
use crate::ranks::{self, RankArgs};
use crate::report::{self, Records};
use crate::units;

/// What holds the prompt for PEFT, in a run's directory.
const ADAPTER_DIR: &str = "adapter";

const AFTER_HELP: &str = "\
The prompt is evaluated as it learns. OUT receives the best one for Incipit (prompt.npy) and for PEFT (adapter/), checkpoints, \
metrics.jsonl and the same for TensorBoard, and report.html.

Examples:
  incipit train --model google/t5-small-lm-adapt --train train.jsonl --eval dev.jsonl --out runs/first
      where each line of the files is {\"inputs\": \"...\", \"targets\": \"...\"}

  incipit train --model ./t5 --train q.csv --eval q-dev.csv --out runs/q \\
      --inputs \"question: {question}\" --targets \"{label}\" --labels 0=False,1=True --steps 2000

  incipit train --model ./t5 --task multirc --data-dir SuperGLUE --out runs/multirc
      a benchmark from its owners' files: train split, development split, labels and metrics are the benchmark's

  incipit train --config runs/q/run.toml --out runs/again --seed 1
      the same settings with another seed: flags override the file, the file overrides the defaults

  incipit train --out runs/q --resume
      goes on after Ctrl-C, a crash or a kill, and ends in the same bytes as an undisturbed run

Files: JSON lines (also .gz), CSV, TSV or Parquet. Of a benchmark named with --task, `incipit task show NAME` tells which.
Prompt initialisations: class-label, vocab, uniform, uniform:LOW,HIGH, text:SOME WORDS, file:PATH (an .npy, a
PEFT directory or another run).
Next: open OUT/report.html, and try `incipit generate --prompt OUT`.";

/// Flags of `train`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct TrainArgs {
    /// Backbone: a directory with config.json, weights and tokenizer, or a name on the Hugging Face Hub
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "Run")]
    model: Option<String>,
    /// Training examples
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    train: Option<PathBuf>,
    /// Evaluation examples: they choose the best prompt
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    eval: Option<PathBuf>,
    /// Directory of the run: new, or empty, or with --resume a run's
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Settings from a file, such as another run's run.toml; names as the flags', unknown names are errors
    #[arg(long, value_name = "FILE.toml", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Go on with the run in --out from its last checkpoint
    #[arg(long, help_heading = "Run")]
    resume: bool,
    #[command(flatten)]
    named: NamedTaskArgs,
    #[command(flatten)]
    training: TrainingArgs,
    /// What is trained [default: prompt]
    #[arg(long, help_heading = "Prompt", value_parser = choice::<Method>(names::METHODS))]
    method: Option<Method>,
    /// Resume on a backbone with another fingerprint
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    allow_other_backbone: bool,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Machine")]
struct MachineArgs {
    /// Where the backbone runs: cpu, cuda (each rank on the GPU of its number) or cuda:N; GPUs need a build with the
    /// feature `cuda` [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Type of the backbone's weights [default: bf16]
    #[arg(long, value_parser = choice::<Precision>(names::DTYPES))]
    dtype: Option<Precision>,
    /// Tokens that go through the backbone at once (results do not depend on it) [default: by the memory there is]
    #[arg(long, value_name = "N")]
    microbatch_tokens: Option<usize>,
    /// Whether activations are computed again in the backward pass instead of kept [default: auto]
    #[arg(long, value_parser = choice::<Recompute>(names::RECOMPUTES))]
    recompute: Option<Recompute>,
}

impl TrainArgs {
    /// The run that the flags, the configuration file and the defaults describe.
    fn resolve(self, global: &Global) -> Result<TrainSpec> {
        let (config, resume) = (self.config.clone(), self.resume);
        let flags = self.flags(global);
        Ok(TrainSpec::resolve(flags, config.as_deref(), resume)?)
    }

    fn flags(self, global: &Global) -> PartialSpec {
        let Self { training, machine, ranks, .. } = self;
        PartialSpec {
            model: self.model,
            train: self.train,
            eval: self.eval,
            task: self.named.task,
            data_dir: self.named.data_dir,
            out: self.out,
            method: self.method,
            device: machine.device,
            dtype: machine.dtype,
            tp: ranks.tp,
            dp: ranks.dp,
            collective: ranks.collective,
            microbatch_tokens: machine.microbatch_tokens,
            recompute: machine.recompute,
            // Absent flags leave the word to the file.
            allow_other_backbone: self.allow_other_backbone.then_some(true),
            threads: global.threads.map(usize::from),
            ..training.into_spec()
        }
    }
}

/// Trains, then prints what came of it.
///
/// # Errors
/// Whatever stops a run: see the exit codes.
pub(crate) fn run(args: TrainArgs, global: &Global) -> Result<Exit> {
    let options = args.ranks.options();
    let spec = args.resolve(global)?;
    let control = Control::new();
    stop_on_ctrl_c(control.clone())?;
    let mut watch = Watch::new(global);
    let start = Instant::now();
    let (outcome, leads) = outcome(&spec, &options, &control, &mut watch)?;
    let interrupted = outcome.end == End::Requested;
    if !leads {
        return Ok(if interrupted { Exit::Interrupted } else { Exit::Ok });
    }
    if let Some(failure) = watch.failure {
        return Err(failure.context("the run is done and its prompt is saved, but not its predictions"));
    }
    let summary = summary(&spec, outcome, start.elapsed())?;
    output::print(&summary, global.json)?;
    if interrupted {
        let how = ranks::launch_prefix(spec.tp * spec.dp);
        note(&format!("go on with: {how}train --out {} --resume", spec.out.display()));
        return Ok(Exit::Interrupted);
    }
    note(&format!(
        "next: open {}, or try: incipit generate --prompt {} --input \"your text\"",
        summary.report.display(),
        spec.out.display()
    ));
    Ok(Exit::Ok)
}

/// What a run left, for people and programs.
#[derive(Serialize)]
struct Summary {
    end: Ending,
    steps: u64,
    best_step: Option<u64>,
    metrics: BTreeMap<String, f64>,
    legal_share: Option<f64>,
    eval_loss: Option<f64>,
    train_loss: Option<f64>,
    seconds: f64,
    tokens_per_s: Option<f64>,
    examples_per_s: Option<f64>,
    prompt: Option<PathBuf>,
    adapter: Option<PathBuf>,
    report: PathBuf,
}

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Ending {
    AllSteps,
    Patience,
    Interrupted,
}

/// Trains, and says what came of it and whether this process speaks for all ranks.
fn outcome(
    spec: &TrainSpec,
    options: &Options,
    control: &Control,
    watch: &mut Watch,
) -> Result<(Outcome, bool)> {
    if spec.collective == Backend::Local {
        ranks::refuse_several_processes()?;
        note(&format!("loading {}", spec.model));
        return Ok((train(spec, options, control, watch)?, true));
    }
    let ranks = ranks::join(spec.collective, (spec.tp, spec.dp), spec.device, options)?;
    note(&format!("loading {}", spec.model));
    let leads = ranks.leads();
    let observer: &mut dyn Observer = if leads { watch } else { &mut () };
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(spec.threads.unwrap_or_else(rayon::current_num_threads));
    let outcome = pool.build()?.install(|| train_as_rank(spec, ranks, control, observer))?;
    Ok((outcome, leads))
}

/// Makes the report, and sums the run up.
fn summary(spec: &TrainSpec, outcome: Outcome, time: Duration) -> Result<Summary> {
    let records = Records::read(&spec.out)?;
    let report = report::write(&records, &spec.out)?;
    let best = records.best();
    Ok(Summary {
        end: match outcome.end {
            End::Steps => Ending::AllSteps,
            End::Patience => Ending::Patience,
            End::Requested => Ending::Interrupted,
        },
        steps: outcome.step,
        best_step: best.map(|b| b.step),
        metrics: best.map(|b| b.metrics.clone()).unwrap_or_default(),
        legal_share: best.and_then(|b| b.legal),
        eval_loss: best.map(|b| b.loss),
        train_loss: records.steps.last().map(|s| s.loss),
        seconds: time.as_secs_f64(),
        tokens_per_s: records.tokens_per_second(),
        examples_per_s: records.examples_per_second(),
        adapter: outcome.prompt.as_ref().map(|_| spec.out.join(ADAPTER_DIR)),
        prompt: outcome.prompt,
        report,
    })
}

impl Printed for Summary {
    fn text(&self) -> String {
        let mut rows = Vec::new();
        let mut row = |name: String, value: String| rows.push(vec![name, value]);
        let at = self.best_step.map(|step| format!(" (step {})", units::count(step))).unwrap_or_default();
        for (name, value) in &self.metrics {
            row(format!("best {}", report::words(name)), format!("{}{at}", units::percent(*value)));
        }
        if let Some(share) = self.legal_share {
            row("legal labels".into(), units::percent(share));
        }
        if let Some(loss) = self.eval_loss {
            row("evaluation loss".into(), format!("{loss:.4}"));
        }
        if let Some(loss) = self.train_loss {
            row("last training loss".into(), format!("{loss:.4}"));
        }
        let end = match self.end {
            Ending::AllSteps => "",
            Ending::Patience => ", ended early: nothing better for as long as --patience allows",
            Ending::Interrupted => ", interrupted",
        };
        row("steps".into(), format!("{}{end}", units::count(self.steps)));
        row("time".into(), units::duration(Duration::from_secs_f64(self.seconds)));
        if let (Some(tokens), Some(examples)) = (self.tokens_per_s, self.examples_per_s) {
            row(
                "speed".into(),
                format!("{} tokens/s, {} examples/s", units::rate(tokens), units::rate(examples)),
            );
        }
        for (name, path) in [
            ("prompt", &self.prompt),
            ("PEFT adapter", &self.adapter),
            ("report", &Some(self.report.clone())),
        ] {
            row(name.into(), path.as_ref().map_or("none yet".to_owned(), |p| p.display().to_string()));
        }
        output::table(&["run", ""], &rows, false)
    }
}
