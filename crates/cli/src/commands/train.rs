//! `incipit train`: tunes a prompt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use incipit_collective::{Options, Ranks};
use incipit_tune::control::Control;
use incipit_tune::engine::Recompute;
use incipit_tune::spec::{Backend, Method, PartialSpec, Precision, PrefixPart, TrainSpec};
use incipit_tune::train::{End, Outcome, train, train_as_rank};
use serde::Serialize;

use crate::args::{Global, NamedTaskArgs, choice, names};
use crate::commands::training::TrainingArgs;
use crate::exit::{Exit, bad_input};
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

Methods:
  prompt   rows of numbers before the input (Lester et al. 2021): OUT/prompt.npy, OUT/adapter
  model    all weights of the model, by T5's recipe: OUT/model, a directory for --model
  prefix   --prompt-length keys and values before those of every attention (Li and Liang 2021): OUT/weights.safetensors;
           with --prefix-part decoder as PEFT has them: OUT/adapter besides
  adapter  small layers of --adapter-width behind every sub-layer (Houlsby et al. 2019): OUT/weights.safetensors
  text     nothing: --shots examples with their answers before the input (Brown et al. 2020): OUT/tokens.json
  search   --prompt-length tokens before the input, found by the gradient (Shin et al. 2020): OUT/tokens.json
Each has defaults of its own for optimizer, learning rate, decay and dropout. The model, its parts and whole new ones train on a CPU.

Files: JSON lines (also .gz), CSV, TSV or Parquet. Of a benchmark named with --task, `incipit task show NAME` tells which.
Prompt initialisations: class-label, vocab, uniform, uniform:LOW,HIGH, text:SOME WORDS, file:PATH (an .npy, a
PEFT directory or another run).
Next: open OUT/report.html, and try `incipit generate --prompt OUT`.";

/// Flags of `train`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct TrainArgs {
    /// Backbone: a directory with config.json, weights and tokenizer, or a name on the Hugging Face Hub (ORG/NAME, or
    /// ORG/NAME@REVISION for a branch, a tag or a commit)
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
    /// Resume, or start from a prompt, on a backbone with another fingerprint
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    allow_other_backbone: bool,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct MachineArgs {
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
    /// What the flags say, the configuration file, and whether a run goes on.
    pub(crate) fn layers(self, global: &Global) -> (PartialSpec, Option<PathBuf>, bool) {
        let Self { training, machine, ranks, .. } = self;
        let flags = PartialSpec {
            model: self.model,
            train: self.train,
            eval: self.eval,
            task: self.named.task,
            data_dir: self.named.data_dir,
            out: self.out,
            // Absent flags leave the word to the file.
            allow_other_backbone: self.allow_other_backbone.then_some(true),
            threads: global.threads.map(usize::from),
            ..training.into_spec().over(machine.spec()).over(ranks.spec())
        };
        (flags, self.config, self.resume)
    }
}

impl MachineArgs {
    /// What the flags say of a run.
    pub(crate) fn spec(&self) -> PartialSpec {
        PartialSpec {
            device: self.device.clone(),
            dtype: self.dtype,
            microbatch_tokens: self.microbatch_tokens,
            recompute: self.recompute,
            ..PartialSpec::default()
        }
    }
}

/// Trains, then prints what came of it.
///
/// # Errors
/// Whatever stops a run: see the exit codes.
pub(crate) fn run(args: TrainArgs, global: &Global) -> Result<Exit> {
    let options = args.ranks.options();
    let (flags, config, resume) = args.layers(global);
    let of_evaluations = [
        ("--eval-every", flags.eval_every.is_some()),
        ("--metrics", flags.metrics.is_some()),
        ("--predict", flags.predict.is_some()),
    ];
    let spec = TrainSpec::resolve(flags, config.as_deref(), resume)?;
    let given = of_evaluations.into_iter().find(|(_, given)| *given && spec.eval.is_none());
    if let Some((flag, _)) = given {
        return bad_input(format!(
            "{flag} is of evaluations, and there are none; pass a file with --eval as well"
        ));
    }
    carry_out(&spec, &options, global)
}

/// Carries a run out, then prints what came of it.
///
/// # Errors
/// Whatever stops a run: see the exit codes.
pub(crate) fn carry_out(spec: &TrainSpec, options: &Options, global: &Global) -> Result<Exit> {
    let control = Control::new();
    stop_on_ctrl_c(control.clone())?;
    let mut watch = Watch::new(global);
    let start = Instant::now();
    let (outcome, leads) = on_ranks(spec, options, |ranks| match ranks {
        None => train(spec, options, &control, &mut watch),
        Some(ranks) if ranks.leads() => train_as_rank(spec, ranks, &control, &mut watch),
        Some(ranks) => train_as_rank(spec, ranks, &control, &mut ()),
    })?;
    let interrupted = outcome.end == End::Requested;
    if !leads {
        return Ok(if interrupted { Exit::Interrupted } else { Exit::Ok });
    }
    if let Some(failure) = watch.failure {
        return Err(failure.context("the run is done and its prompt is saved, but not its predictions"));
    }
    let summary = summary(spec, outcome, start.elapsed())?;
    output::print(&summary, global.json)?;
    if interrupted {
        let how = ranks::launch_prefix(spec.tp * spec.dp);
        let command = if spec.objective.is_some() { "pretrain" } else { "train" };
        note(&format!("go on with: {how}{command} --out {} --resume", spec.out.display()));
        return Ok(Exit::Interrupted);
    }
    let next = match &summary.trained {
        Some(model) if spec.objective.is_some() => {
            format!("incipit train --model {} --help", model.display())
        }
        _ => format!("incipit generate --prompt {} --input \"your text\"", spec.out.display()),
    };
    note(&format!("next: open {}, or try: {next}", summary.report.display()));
    Ok(Exit::Ok)
}

/// What a run left, for people and programs.
#[derive(Serialize)]
pub(crate) struct Summary {
    end: Ending,
    pub(crate) steps: u64,
    pub(crate) best_step: Option<u64>,
    pub(crate) metrics: BTreeMap<String, f64>,
    legal_share: Option<f64>,
    eval_loss: Option<f64>,
    train_loss: Option<f64>,
    seconds: f64,
    tokens_per_s: Option<f64>,
    examples_per_s: Option<f64>,
    method: Method,
    /// How many numbers were trained.
    num_trained: Option<u64>,
    /// What was trained: a prompt, weights, or the directory of a whole model.
    trained: Option<PathBuf>,
    /// The prompt again, as PEFT reads it.
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

/// Does the work of a run: without ranks where they are threads of this process, else as the rank that it is. Says what came of it, and
/// whether this process speaks for all ranks.
///
/// # Errors
/// If the ranks cannot meet, and those of the work.
pub(crate) fn on_ranks<T: Send>(
    spec: &TrainSpec,
    options: &Options,
    work: impl FnOnce(Option<Ranks>) -> incipit_tune::Result<T> + Send,
) -> Result<(T, bool)> {
    if spec.collective == Backend::Local {
        ranks::refuse_several_processes()?;
        note(&format!("loading {}", spec.model));
        return Ok((work(None)?, true));
    }
    let ranks = ranks::join(spec.collective, (spec.tp, spec.dp), spec.device, options)?;
    note(&format!("loading {}", spec.model));
    let leads = ranks.leads();
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(spec.threads.unwrap_or_else(rayon::current_num_threads));
    Ok((pool.build()?.install(|| work(Some(ranks)))?, leads))
}

/// Makes the report, and sums the run up.
///
/// # Errors
/// If the run's files cannot be read, or the report cannot be written.
pub(crate) fn summary(spec: &TrainSpec, outcome: Outcome, time: Duration) -> Result<Summary> {
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
        method: spec.method,
        num_trained: records.run.trained,
        adapter: outcome
            .trained
            .as_ref()
            .filter(|_| spec.method == Method::Prompt || spec.prefix_part == Some(PrefixPart::Decoder))
            .map(|_| spec.out.join(ADAPTER_DIR))
            .filter(|adapter| adapter.exists()),
        trained: outcome.trained,
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
        let shown = |path: &Path| path.display().to_string();
        let trained = self.trained.as_deref().map_or("none yet".to_owned(), shown);
        row(self.method.to_string(), trained);
        if let Some(adapter) = &self.adapter {
            row("PEFT adapter".into(), shown(adapter));
        }
        row("report".into(), shown(&self.report));
        output::table(&["run", ""], &rows, false)
    }
}
