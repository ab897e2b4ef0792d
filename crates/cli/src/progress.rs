//! What a person sees while the program works: on a terminal bars that move, elsewhere plain lines now and then. All of it on
//! standard error.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use incipit_tune::atomic;
use incipit_tune::evaluate::Evaluation;
use incipit_tune::job::Update;
use incipit_tune::spec::Method;
use incipit_tune::train::{Event, Loaded, Observer};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Global;
use crate::loading;
use crate::output::json_lines;
use crate::report::words;
use crate::supervisor::{LAST_WORDS, prefix};
use crate::telemetry::NOTES;
use crate::units;

/// Steps over which rates and the loss are averaged.
const WINDOW: usize = 20;
/// How often a plain line is written.
pub(crate) const LINE_EVERY: Duration = Duration::from_secs(10);
/// The file beside a run's others that holds the best evaluation's predictions.
pub(crate) const PREDICTIONS_FILE: &str = "predictions.jsonl";

static QUIET: AtomicBool = AtomicBool::new(false);
/// Whether everything is told by the log.
static LOGGED: AtomicBool = AtomicBool::new(false);
/// What marks this process's lines; 0, which speaks for all, has no mark.
static RANK: AtomicUsize = AtomicUsize::new(0);

/// Leaves out all notes from now on.
pub(crate) fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Marks warnings and errors as those of a rank from now on.
pub(crate) fn speak_as(rank: usize) {
    RANK.store(rank, Ordering::Relaxed);
}

/// Tells everything by the log from now on, which has a form that programs read.
pub(crate) fn log_notes() {
    LOGGED.store(true, Ordering::Relaxed);
}

fn is_logged() -> bool {
    LOGGED.load(Ordering::Relaxed)
}

/// Says why the program ends, as this process's rank.
pub(crate) fn error(text: &str) {
    if is_logged() {
        tracing::error!(target: NOTES, "{text}");
    } else {
        eprintln!("{}error: {text}", mark());
    }
}

/// Passes on a line of another rank.
pub(crate) fn relay(rank: usize, line: &str) {
    if is_logged() {
        tracing::info!(target: NOTES, rank, "{line}");
    } else {
        let marked = if rank == 0 { format!("{line}\n") } else { format!("{}{line}\n", prefix(rank)) };
        // Nobody may be there to read it; the ranks go on.
        let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), marked.as_bytes());
    }
}

/// Passes on the error with which a rank has ended; one that all told alike is no rank's.
pub(crate) fn last_words(rank: Option<usize>, words: &str) {
    if is_logged() {
        tracing::error!(target: NOTES, rank, "{}", words.trim_start_matches(LAST_WORDS));
    } else {
        eprintln!("{}{words}", rank.map(prefix).unwrap_or_default());
    }
}

fn mark() -> String {
    match RANK.load(Ordering::Relaxed) {
        // The span of the command names the rank.
        _ if is_logged() => String::new(),
        0 => String::new(),
        rank => prefix(rank),
    }
}

/// Standard error, for the libraries' log: one write is one message.
pub(crate) struct Marked;

impl std::io::Write for Marked {
    fn write(&mut self, message: &[u8]) -> std::io::Result<usize> {
        std::io::stderr().lock().write_all(&[mark().as_bytes(), message].concat())?;
        Ok(message.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// Says something that is good to know.
pub(crate) fn note(text: &str) {
    if QUIET.load(Ordering::Relaxed) {
        return;
    }
    if is_logged() {
        tracing::info!(target: NOTES, "{}", text.trim());
    } else {
        eprintln!("{text}");
    }
}

/// Says something that should be known.
pub(crate) fn warn(text: &str) {
    if is_logged() {
        tracing::warn!(target: NOTES, "{text}");
    } else {
        eprintln!("{}warning: {text}", mark());
    }
}

/// A mark that turns while something takes its time; it goes away when it is dropped.
pub(crate) fn spinner(text: &str, global: &Global) -> Bar {
    let bar = ProgressBar::with_draw_target(None, target(global));
    bar.set_style(
        ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.set_message(text.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    if bar.is_hidden() {
        note(text);
    }
    Bar(bar)
}

/// A bar over `length` things; it goes away when it is dropped.
pub(crate) fn bar(length: u64, things: &str, global: &Global) -> Bar {
    let bar = ProgressBar::with_draw_target(Some(length), target(global));
    bar.set_style(style("{wide_bar} {pos}/{len} {msg} {elapsed}"));
    bar.set_message(things.to_owned());
    bar.tick();
    Bar(bar)
}

/// A bar over so many bytes of something; it goes away when it is dropped.
pub(crate) fn bytes_bar(what: &str, length: u64, global: &Global) -> Bar {
    let bar = ProgressBar::with_draw_target(Some(length), target(global));
    bar.set_style(style("{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"));
    bar.set_message(what.to_owned());
    bar.tick();
    Bar(bar)
}

/// Text that stands below everything else and changes; it goes away when it is dropped.
pub(crate) fn panel(global: &Global) -> Bar {
    let bar = ProgressBar::with_draw_target(None, target(global));
    bar.set_style(style("{msg}"));
    Bar(bar)
}

/// A bar that clears itself away.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// So many more are done.
    pub(crate) fn inc(&self, count: u64) {
        self.0.inc(count);
    }

    /// How many are done.
    pub(crate) fn position(&self) -> u64 {
        self.0.position()
    }

    /// So many are done, and no more.
    pub(crate) fn set_position(&self, count: u64) {
        self.0.set_position(count);
    }

    /// There are so many in all.
    pub(crate) fn set_length(&self, count: u64) {
        self.0.set_length(count);
    }

    /// This is to be read.
    pub(crate) fn say(&self, text: String) {
        self.0.set_message(text);
    }

    /// Whether nobody sees it.
    pub(crate) fn is_hidden(&self) -> bool {
        self.0.is_hidden()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸ ")
}

fn target(global: &Global) -> ProgressDrawTarget {
    let seen = std::io::stderr().is_terminal() && !global.quiet && !is_logged();
    if seen { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

/// Watches a training run.
pub(crate) struct Watch {
    bar: ProgressBar,
    /// Of several runs at once, which this is.
    member: Option<usize>,
    global: Global,
    /// What shows how far the model is loaded, meanwhile.
    loading: Option<loading::Shown>,
    steps: u64,
    recent: VecDeque<Recent>,
    last_line: Option<Instant>,
    out: PathBuf,
    eval_every: u64,
    eval_seconds: Option<f64>,
    /// Why predictions were not written.
    pub(crate) failure: Option<anyhow::Error>,
}

struct Recent {
    loss: f64,
    seconds: f64,
    examples: usize,
    tokens: usize,
}

/// The means of the last steps.
struct Means {
    loss: f64,
    step_seconds: f64,
    examples_per_second: f64,
    tokens_per_second: f64,
}

impl Watch {
    pub(crate) fn new(global: &Global) -> Self {
        Self::with_bar(ProgressBar::with_draw_target(Some(0), target(global)), None, global)
    }

    /// Watches so many runs at once, each with a bar of its own below the others.
    pub(crate) fn several(count: usize, global: &Global) -> Vec<Self> {
        let bars = MultiProgress::with_draw_target(target(global));
        let watch = |member| Self::with_bar(bars.add(ProgressBar::new(0)), Some(member), global);
        (0..count).map(watch).collect()
    }

    fn with_bar(bar: ProgressBar, member: Option<usize>, global: &Global) -> Self {
        Self {
            bar,
            member,
            global: global.clone(),
            loading: None,
            steps: 0,
            recent: VecDeque::new(),
            last_line: None,
            out: PathBuf::new(),
            eval_every: u64::MAX,
            eval_seconds: None,
            failure: None,
        }
    }

    /// A line above the bar.
    fn line(&self, text: &str) {
        if !self.global.quiet {
            self.bar.suspend(|| note(&self.marked(text)));
        }
    }

    /// Which run it tells of, where there are several.
    fn marked(&self, text: &str) -> String {
        self.member.map_or_else(|| text.to_owned(), |member| format!("member {member}: {text}"))
    }

    fn loaded(&mut self, loaded: &Loaded<'_>) {
        let spec = loaded.spec;
        (self.steps, self.out, self.eval_every) = (spec.steps, spec.out.clone(), spec.eval_every);
        let eval =
            loaded.num_eval.map(|n| format!(", {} to evaluate", units::count(n as u64))).unwrap_or_default();
        let data = match spec.objective {
            Some(objective) => format!("{objective} on {}", spec.train.display()),
            None => format!("{} training examples", units::count(loaded.num_train as u64)),
        };
        let what = format!(
            "{}: {} parameters in {}; {}; {data}{eval}",
            spec.model,
            units::count(loaded.num_parameters),
            spec.dtype,
            trained(loaded)
        );
        // It is the same for all.
        if !self.global.quiet && self.member.is_none_or(|member| member == 0) {
            self.bar.suspend(|| note(&what));
        }
        if loaded.resumed_at > 0 {
            self.line(&format!("going on after step {}", units::count(loaded.resumed_at)));
        }
        self.bar.set_style(style("{bar:18} {pos}/{len}  {msg}"));
        self.bar.set_length(spec.steps);
        self.bar.set_position(loaded.resumed_at);
    }

    fn step(&mut self, update: &Update, seconds: f64) {
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        let (examples, tokens) = (update.num_examples, update.num_tokens);
        self.recent.push_back(Recent { loss: update.loss, seconds, examples, tokens });
        let text = self.status(update.step);
        self.bar.set_position(update.step);
        if self.bar.is_hidden()
            && !self.global.quiet
            && self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY)
        {
            self.last_line = Some(Instant::now());
            let place = format!("step {}/{}", units::count(update.step), units::count(self.steps));
            note(&self.marked(&format!("{place}  {text}")));
        }
        self.bar.set_message(text);
    }

    fn means(&self) -> Means {
        let count = self.recent.len().max(1) as f64;
        let seconds: f64 = self.recent.iter().map(|r| r.seconds).sum::<f64>().max(1e-9);
        Means {
            loss: self.recent.iter().map(|r| r.loss).sum::<f64>() / count,
            step_seconds: seconds / count,
            examples_per_second: self.recent.iter().map(|r| r.examples).sum::<usize>() as f64 / seconds,
            tokens_per_second: self.recent.iter().map(|r| r.tokens).sum::<usize>() as f64 / seconds,
        }
    }

    fn status(&self, step: u64) -> String {
        let means = self.means();
        format!(
            "loss {:.4}  {} examples/s  {} tokens/s  {} left",
            means.loss,
            units::rate(means.examples_per_second),
            units::rate(means.tokens_per_second),
            units::duration(self.left(step, &means))
        )
    }

    /// Of the steps and, once one was seen, of the evaluations.
    fn left(&self, step: u64, means: &Means) -> Duration {
        let steps = self.steps.saturating_sub(step);
        let evaluations = self
            .eval_seconds
            .map_or(0.0, |s| s * (self.steps / self.eval_every - step / self.eval_every) as f64);
        Duration::from_secs_f64((steps as f64 * means.step_seconds + evaluations).min(1e9))
    }

    fn evaluated(&mut self, step: u64, evaluation: &Evaluation, best: bool, seconds: f64) {
        self.eval_seconds = Some(seconds);
        let mut parts = vec![format!("step {}", units::count(step))];
        parts.extend(
            evaluation.metrics.iter().map(|(m, v)| format!("{} {}", words(m.name()), units::percent(*v))),
        );
        parts.extend(evaluation.legal_share.map(|share| format!("legal labels {}", units::percent(share))));
        parts.push(format!("evaluation loss {:.4}", evaluation.loss));
        parts.extend(best.then(|| "best so far".to_owned()));
        self.line(&parts.join("  "));
        if best {
            let file = self.out.join(PREDICTIONS_FILE);
            let written =
                json_lines(&evaluation.predictions).and_then(|bytes| Ok(atomic::write_file(&file, &bytes)?));
            self.failure = written.err();
        }
    }
}

impl Observer for Watch {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Loading(loading) => self.loading = Some(loading::show(loading.clone(), &self.global)),
            Event::Loaded(loaded) => {
                self.loading = None;
                self.loaded(loaded);
            }
            // With `-v` the log speaks, which tells of warnings as well.
            Event::Warning(text) if self.global.verbose == 0 => self.bar.suspend(|| warn(&self.marked(text))),
            Event::Step { update, seconds } => self.step(update, *seconds),
            Event::Evaluated { step, evaluation, best, seconds } => {
                self.evaluated(*step, evaluation, *best, *seconds);
            }
            Event::Finished(_) => self.bar.finish_and_clear(),
            Event::Warning(_) | Event::Checkpointed { .. } => {}
        }
    }
}

/// What is trained, and how much it is beside the model, as the paper's table 4 counts it.
fn trained(loaded: &Loaded<'_>) -> String {
    let (numbers, all) = (loaded.num_trained, loaded.num_parameters);
    let count = units::count(numbers);
    let share = 100.0 * numbers as f64 / (all + numbers) as f64;
    match loaded.spec.method {
        Method::Prompt => {
            let (rows, width) = (loaded.spec.prompt_length, numbers / loaded.spec.prompt_length as u64);
            format!("{rows} prompt rows of {width} to train ({count} parameters, {share:.3}%)")
        }
        Method::Text => format!("{count} tokens shown, nothing to train"),
        Method::Search => format!("{count} tokens to find"),
        Method::Model => format!("all of them to train ({count})"),
        Method::Prefix => {
            let length = loaded.spec.prompt_length;
            if loaded.spec.prefix_projection.is_none() {
                return format!("prefixes of {length} to train ({count} parameters, {share:.3}%)");
            }
            let kept = 100.0 * loaded.num_kept as f64 / (all + loaded.num_kept) as f64;
            format!(
                "prefixes of {length} to train through an MLP ({count} parameters, {share:.3}%; {} kept, {kept:.3}%)",
                units::count(loaded.num_kept)
            )
        }
        Method::Adapter => {
            let width = loaded.spec.adapter_width.unwrap_or_default();
            format!("adapters of width {width} to train ({count} parameters, {share:.3}%)")
        }
    }
}
