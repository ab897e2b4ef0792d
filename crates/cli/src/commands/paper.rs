//! `incipit paper`: the tables and figures of Lester et al. (2021), run again.

mod estimate;
mod execute;
mod plan;
mod present;
mod published;
mod scale;
mod suites;
mod values;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use incipit_tune::atomic;
use incipit_tune::spec::Backend;
use incipit_weights::load_tokenizer;
use serde::Serialize;

use crate::args::Global;
use crate::exit::{Exit, bad_input};
use crate::interrupt::signals;
use crate::output::{self, Printed};
use crate::progress::{note, warn};
use crate::{ranks, units};
use execute::Progress;
use plan::{Place, Plan};
use present::Filled;
use scale::{Scale, Shape, Suite};
use suites::Sheet;

/// Embeddings of new models have a multiple of so many rows, as T5's do.
const ROWS: usize = 64;

const AFTER_HELP: &str = "\
Every run is a command of this program, which --dry-run prints; OUT/runs keeps what it leaves. Started again with the same --out, the
suites go on where they were, after Ctrl-C, a crash or a kill; runs that several suites have in common are made once.

Each suite becomes OUT/SUITE.txt, .json, .csv and .svg, with the paper's numbers beside ours and, over several seeds, with mean and
deviation (that of a sample); OUT/paper.html has all that were asked for.

Scales:
  tiny     small models, made on the spot of --corpus; short runs, for two cores and no GPU
  paper    T5 1.1 and its LM-adapted form in five sizes, SuperGLUE and the paper's settings
  FILE     a scale of your own: `incipit paper --scale tiny --print-scale` prints one to begin with

Suites: table-1 to table-6, figure-1, figure-3a to figure-3d, figure-4, and methods, which sets prompt tuning beside what it is compared with.

Examples:
  incipit paper --scale tiny --data-dir data --corpus books/ --tokenizer ./t5-small --out tiny --dry-run
  incipit paper figure-3a table-3 --scale paper --data-dir data --out paper --device cuda
  incipit paper methods --scale tiny --model ./t5-small-lm --data-dir data --out methods";

/// Flags of `paper`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PaperArgs {
    /// Tables and figures to make [default: all that the data at hand allow]
    #[arg(value_name = "SUITE")]
    suites: Vec<String>,
    /// How large: tiny, paper, or a file
    #[arg(long, value_name = "NAME|FILE", help_heading = "Run")]
    scale: String,
    /// Print the scale's file, and do nothing
    #[arg(long, help_heading = "Run")]
    print_scale: bool,
    /// Print what would run, and for about how long, and do nothing
    #[arg(long, help_heading = "Run")]
    dry_run: bool,
    /// Directory for the runs and what comes of them: new, or that of the same suites begun before
    #[arg(long, value_name = "DIR", help_heading = "Run", required_unless_present = "print_scale")]
    out: Option<PathBuf>,
    /// Runs of each kind, which differ in their seed [default: as the scale says]
    #[arg(long, value_name = "N", help_heading = "Run", value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: Option<u64>,
    /// Directory of the tasks' folders
    #[arg(long, value_name = "DIR", help_heading = "Data", required_unless_present = "print_scale")]
    data_dir: Option<PathBuf>,
    /// Text that new models are made of: a file, or a directory of files
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    corpus: Option<PathBuf>,
    /// Text to measure new models on
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    held_out: Option<PathBuf>,
    /// Directory of the tokenizer of new models
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    tokenizer: Option<PathBuf>,
    /// LM-adapted model for the suites that are about one model alone: a directory, or a name on the Hugging Face Hub
    /// [default: as the suite says]
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "Data")]
    model: Option<String>,
    /// Where the runs compute: cpu or cuda [default: cpu]
    #[arg(long, value_name = "DEVICE", help_heading = "Machine")]
    device: Option<String>,
    /// Ranks that share one copy of a model's weights [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    tp: Option<usize>,
    /// Copies of a model, between which the examples are divided [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    dp: Option<usize>,
    /// What a rank is: a thread (local), or a process that is started for it (gloo; with a GPU each, nccl) [default: local]
    #[arg(long, value_name = "local|gloo|nccl", help_heading = "Machine", value_parser = ranks::collective)]
    collective: Option<Backend>,
}

/// Plans the suites, carries them out and says what came of them.
///
/// # Errors
/// If the scale or something that a suite needs cannot be used, or a file cannot be written.
pub(crate) fn run(args: &PaperArgs, global: &Global) -> Result<Exit> {
    if args.print_scale {
        return output::line(Scale::text(&args.scale)?.trim_end()).map(|()| Exit::Ok);
    }
    let mut scale = Scale::read(&args.scale)?;
    scale.seeds = args.seeds.unwrap_or(scale.seeds);
    if let Some(model) = &args.model {
        scale.put_main(model)?;
    }
    let place = args.place(global)?;
    let mut plan = Plan::new(&scale, &place);
    let suites = planned(&mut plan, &args.suites)?;
    let mut progress = execute::done(&plan)?;
    if args.dry_run {
        output::print(&DryRun::of(&plan, &suites, &progress)?, global.json)?;
        return Ok(Exit::Ok);
    }
    write_shapes(&scale, &place)?;
    plan.files.iter().try_for_each(|(path, text)| write_below(path, text.as_bytes()))?;
    execute::carry_out(&plan, &mut progress, &signals()?)?;
    let filled = suites.iter().map(|(suite, sheet)| Filled::new(suite, sheet, &progress));
    let filled = filled.collect::<Result<Vec<_>>>()?;
    write(&place.out, &filled, &args.scale, &scale)?;
    output::print(&Sheets { suites: filled }, global.json)?;
    Ok(ending(&plan, &progress, &place.out))
}

impl PaperArgs {
    fn place(&self, global: &Global) -> Result<Place> {
        let (Some(out), Some(data)) = (&self.out, &self.data_dir) else {
            return bad_input("--out and --data-dir are missing");
        };
        if !data.is_dir() {
            return bad_input(format!("--data-dir {} is not a directory", data.display()));
        }
        let vocab_size = match &self.tokenizer {
            Some(dir) => load_tokenizer(dir)?.get_vocab_size(true).next_multiple_of(ROWS),
            None => ROWS,
        };
        let threads = global.threads.map(|threads| threads.to_string());
        let (tp, dp) = (self.tp.map(|n| n.to_string()), self.dp.map(|n| n.to_string()));
        let given = |flags: [(&str, &Option<String>); 2]| {
            let words = |(flag, value): (&str, &Option<String>)| Some([flag.to_owned(), value.clone()?]);
            flags.into_iter().filter_map(words).flatten().collect::<Vec<_>>()
        };
        let num_ranks = self.tp.unwrap_or(1) * self.dp.unwrap_or(1);
        let launched = self.collective.filter(|collective| *collective != Backend::Local);
        Ok(Place {
            out: out.clone(),
            data: data.clone(),
            corpus: self.corpus.clone(),
            held_out: self.held_out.clone(),
            tokenizer: self.tokenizer.clone(),
            vocab_size,
            device: self.device.clone(),
            machine: given([("--device", &self.device), ("--threads", &threads)]),
            ranks: given([("--tp", &tp), ("--dp", &dp)]),
            launched: launched.map(|collective| (collective, num_ranks)),
        })
    }
}

/// The suites that are asked for, planned. Where none is named, those whose data are not there are left out.
fn planned<'a>(plan: &mut Plan<'a>, names: &[String]) -> Result<Vec<(&'a Suite, Sheet)>> {
    let mut suites = Vec::new();
    for suite in plan.scale.named(names)? {
        let known = plan.runs.len();
        match suites::sheet(plan, suite) {
            Ok(sheet) => suites.push((suite, sheet)),
            Err(error) if names.is_empty() => {
                plan.forget(known);
                warn(&format!("{} is left out: {error:#}", suite.name));
            }
            Err(error) => return Err(error.context(format!("suite {}", suite.name))),
        }
    }
    if suites.is_empty() {
        return bad_input("nothing is left to run: see the warnings for what is missing");
    }
    Ok(suites)
}

/// The file of a new model's shape.
fn shape_file(out: &Path, model: &str) -> PathBuf {
    out.join("shapes").join(format!("{model}.json"))
}

/// Writes the shapes of the models that are made here.
fn write_shapes(scale: &Scale, place: &Place) -> Result<()> {
    for model in scale.models.iter().filter(|model| !matches!(model.shape, Shape::Own(_))) {
        let Some(config) = model.config(place.vocab_size)? else { continue };
        let path = shape_file(&place.out, &model.name);
        let text = serde_json::to_vec_pretty(&serde_json::json!({
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "vocab_size": config.vocab_size,
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "d_kv": config.d_kv,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": false,
            "relative_attention_num_buckets": config.relative_attention_num_buckets,
            "relative_attention_max_distance": config.relative_attention_max_distance,
            "layer_norm_epsilon": config.layer_norm_epsilon,
            "dropout_rate": 0.0,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.decoder_start_token_id,
            "decoder_start_token_id": config.decoder_start_token_id,
        }))?;
        write_below(&path, &text)?;
    }
    Ok(())
}

/// Writes a file that runs read, and makes its directory.
fn write_below(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new(""));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    Ok(atomic::write_file(path, bytes)?)
}

/// Writes every form of every suite.
fn write(out: &Path, sheets: &[Filled], name: &str, scale: &Scale) -> Result<()> {
    for sheet in sheets {
        let file = |extension: &str| out.join(format!("{}.{extension}", sheet.name));
        atomic::write_file(&file("txt"), format!("{}\n", sheet.text()).as_bytes())?;
        atomic::write_file(&file("json"), &serde_json::to_vec_pretty(sheet)?)?;
        atomic::write_file(&file("csv"), sheet.csv().as_bytes())?;
        if let Some(svg) = sheet.chart().to_file() {
            atomic::write_file(&file("svg"), svg.as_bytes())?;
        }
    }
    let page = present::page(sheets, name, &scale.about)?;
    Ok(atomic::write_file(&out.join("paper.html"), page.as_bytes())?)
}

fn ending(plan: &Plan<'_>, progress: &Progress, out: &Path) -> Exit {
    if progress.interrupted {
        note("interrupted: the same command goes on from here");
        return Exit::Interrupted;
    }
    if progress.failed.is_empty() {
        note(&format!("next: open {}", out.join("paper.html").display()));
        return Exit::Ok;
    }
    let names: Vec<&str> = progress.failed.iter().map(|&run| plan.runs[run].name.as_str()).collect();
    warn(&format!(
        "{} runs failed, and the same command tries them again: {}",
        names.len(),
        names.join(", ")
    ));
    Exit::Failure
}

/// What came of the suites.
#[derive(Serialize)]
struct Sheets {
    suites: Vec<Filled>,
}

impl Printed for Sheets {
    fn text(&self) -> String {
        self.suites.iter().map(Filled::text).collect::<Vec<_>>().join("\n\n")
    }
}

/// What would run.
#[derive(Serialize)]
struct DryRun {
    suites: Vec<String>,
    runs: Vec<DryRunOf>,
    /// Floating-point operations of what is not done yet, where the models' shapes are known.
    work: Option<f64>,
    /// About how long that takes at the speed of the runs that are done.
    seconds: Option<f64>,
    /// What it would take at the speed of a plain product of matrices on this machine's CPU, if it runs there.
    product_seconds: Option<f64>,
}

#[derive(Serialize)]
struct DryRunOf {
    name: String,
    done: bool,
    work: Option<f64>,
    command: String,
}

impl DryRun {
    fn of(plan: &Plan<'_>, suites: &[(&Suite, Sheet)], progress: &Progress) -> Result<Self> {
        let run = |(run, done): (&plan::Run, &Option<execute::Done>)| DryRunOf {
            name: run.name.clone(),
            done: done.is_some(),
            work: run.work,
            command: format!("incipit {}", plan.command(run).join(" ")),
        };
        let runs: Vec<DryRunOf> = plan.runs.iter().zip(&progress.done).map(run).collect();
        let work = runs.iter().filter(|run| !run.done).map(|run| run.work).sum::<Option<f64>>();
        let on_cpu = plan.place.launched.is_none()
            && plan.place.device.as_deref().is_none_or(|device| device == "cpu");
        let rate = if on_cpu { Some(estimate::product_rate()?) } else { None };
        Ok(Self {
            suites: suites.iter().map(|(suite, _)| suite.name.clone()).collect(),
            runs,
            work,
            seconds: estimate::left(plan, progress).map(|time| time.as_secs_f64()),
            product_seconds: work.zip(rate).map(|(work, rate)| work / rate),
        })
    }
}

impl Printed for DryRun {
    fn text(&self) -> String {
        let row = |run: &DryRunOf| {
            let work = run.work.map_or("unknown".to_owned(), |work| format!("{:.2}", work / 1e12));
            vec![run.name.clone(), if run.done { "done".to_owned() } else { work }]
        };
        let rows: Vec<Vec<String>> = self.runs.iter().map(row).collect();
        let commands: Vec<&str> =
            self.runs.iter().filter(|run| !run.done).map(|run| run.command.as_str()).collect();
        let time = |seconds: f64| units::duration(Duration::from_secs_f64(seconds));
        let mut facts = vec![
            ("suites", self.suites.join(", ")),
            ("to run", format!("{} of {}", commands.len(), self.runs.len())),
        ];
        match (self.seconds, self.product_seconds) {
            (Some(seconds), _) => {
                facts.push(("time", format!("about {}, at the speed of what is done", time(seconds))));
            }
            (None, Some(product)) => {
                facts.push((
                    "time",
                    format!(
                        "about {} if all went at the speed of a plain product of matrices",
                        time(product)
                    ),
                ));
            }
            (None, None) => facts.push(("time", "not known before a run is done".to_owned())),
        }
        let table = output::table(&["run", "TFLOP"], &rows, true);
        format!("{}\n\n{table}\n\n{}", commands.join("\n"), output::facts(facts))
    }
}
