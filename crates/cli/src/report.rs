//! `report.html`: what a run did, as one page that needs nothing else. It is made from the run's own files alone, so that it can be
//! made again at any time.

pub(crate) mod chart;
mod confusion;
pub(crate) mod page;
mod records;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::{machine, units};
use chart::{Chart, Mark, Series};
use confusion::Confusion;
use page::{Charts, Fact, Figure, Head};
pub(crate) use records::{Prediction, Records};

/// The name of the page within a run's directory.
pub(crate) const FILE: &str = "report.html";
const SAMPLES: usize = 6;
const SAMPLE_CHARS: usize = 320;
/// Colours for curves of metrics; `s0` is the loss of training.
const METRIC_CLASSES: [&str; 5] = ["s1", "s2", "s3", "s4", "s5"];

#[derive(Serialize)]
struct Page {
    head: Head,
    charts: Charts,
    evaluations: Table,
    predictions: Option<Samples>,
    confusion: Option<Confusion>,
    facts: Vec<Fact>,
    configuration: Vec<Group>,
    commands: String,
}

#[derive(Serialize)]
struct Table {
    columns: Vec<String>,
    rows: Vec<TableRow>,
}

#[derive(Serialize)]
struct TableRow {
    cells: Vec<String>,
    best: bool,
}

#[derive(Serialize)]
struct Samples {
    caption: String,
    right: Vec<Sample>,
    wrong: Vec<Sample>,
}

#[derive(Serialize)]
struct Sample {
    input: String,
    target: String,
    prediction: String,
    verdict: &'static str,
    loss: String,
}

#[derive(Serialize)]
struct Group {
    name: &'static str,
    entries: Vec<Fact>,
}

/// Makes the page of a run and writes it beside the files it was read from.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write(records: &Records, out: &Path) -> Result<PathBuf> {
    let path = out.join(FILE);
    incipit_tune::atomic::write_file(&path, render(records)?.as_bytes())?;
    Ok(path)
}

fn render(records: &Records) -> Result<String> {
    page::render("report", &page(records)?)
}

fn page(records: &Records) -> Result<Page> {
    let charts = [metric_chart(records), loss_chart(records), rate_chart(records)];
    Ok(Page {
        head: Head {
            notices: notices(records),
            figures: figures(records),
            ..Head::new("prompt tuning report", records.title(), lede(records))
        },
        charts: Charts::draw(charts.into_iter().flatten())?,
        evaluations: evaluation_table(records),
        predictions: samples(records),
        confusion: confusion::confusion(&records.predictions, &records.labels()),
        facts: facts(records),
        configuration: configuration(records),
        commands: commands(records),
    })
}

fn lede(records: &Records) -> String {
    let trained = records.run.trained.map(|n| format!(" ({} numbers)", units::count(n))).unwrap_or_default();
    let frozen =
        records.run.parameters.map(|n| format!(" of {} parameters", units::count(n))).unwrap_or_default();
    format!(
        "{} prompt rows{trained} in front of a frozen {}{frozen}, trained for {} steps{}.",
        records.setting("prompt-length"),
        records.model_name(),
        units::count(records.last_step()),
        records.ending()
    )
}

/// What a reader should not overlook.
fn notices(records: &Records) -> Vec<String> {
    let mut notices = Vec::new();
    let Some(best) = records.best() else { return notices };
    if let Some(share) = best.legal.filter(|share| *share < 0.5) {
        notices.push(format!(
            "Only {} of the best prompt's answers are labels at all. A backbone that was pretrained on span corruption alone often \
             cannot be brought to write labels: try an LM-adapted one.",
            units::percent(share)
        ));
    }
    if let (Some(majority), Some(accuracy)) = (records.majority(), best.metric("accuracy"))
        && accuracy <= majority
    {
        notices.push(format!(
            "The best accuracy, {}, does not exceed the share of the most frequent target, {}: nothing was learned yet.",
            units::percent(accuracy),
            units::percent(majority)
        ));
    }
    notices
}

fn figures(records: &Records) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut figure = |name: String, value: String, note: String| figures.push(Figure { name, value, note });
    let at = |step: u64| format!("at step {}", units::count(step));
    match (records.best(), records.steps.last()) {
        (Some(best), _) => {
            for (name, value) in best.metrics.iter().take(2) {
                figure(format!("Best {}", words(name)), units::percent(*value), at(best.step));
            }
            figure("Evaluation loss".into(), format!("{:.3}", best.loss), at(best.step));
        }
        (None, Some(last)) => figure("Training loss".into(), format!("{:.3}", last.loss), at(last.step)),
        (None, None) => {}
    }
    let time = units::duration(Duration::from_secs_f64(records.seconds));
    figure("Time".into(), time, "steps and evaluations".into());
    if let Some(rate) = records.tokens_per_second() {
        figure("Tokens a second".into(), units::rate(rate), "prompt rows counted".into());
    }
    figures
}

fn loss_chart(records: &Records) -> Option<Chart> {
    let points: Vec<(f64, f64)> = records.steps.iter().map(|s| (s.step as f64, s.loss)).collect();
    let span = (points.len() / 25).clamp(1, 200);
    let evaluated: Vec<_> = records.evaluations.iter().map(|e| (e.step as f64, e.loss)).collect();
    if points.is_empty() && evaluated.is_empty() {
        return None;
    }
    let mut series = Vec::new();
    if points.len() > 20 {
        series.push(Series::new("each step".into(), "s0", Mark::Faint, points.clone()));
        series.push(Series::new(
            "training, smoothed".into(),
            "s0",
            Mark::Line,
            chart::smoothed(&points, span),
        ));
    } else {
        series.push(Series::new("training".into(), "s0", Mark::Line, points));
    }
    series.push(Series::new("evaluation".into(), "s1", Mark::Dots, evaluated));
    series.retain(|s| !s.points.is_empty());
    Some(Chart {
        title: "Loss".into(),
        x_label: "step".into(),
        y_label: "loss per target token".into(),
        series,
        ..Chart::default()
    })
}

fn metric_chart(records: &Records) -> Option<Chart> {
    let names = records.metric_names();
    let curve = |(i, name): (usize, &String)| {
        Series::new(
            words(name),
            METRIC_CLASSES[i % METRIC_CLASSES.len()],
            Mark::Dots,
            records.evaluations.iter().filter_map(|e| e.metric(name).map(|v| (e.step as f64, v))).collect(),
        )
    };
    let mut series: Vec<Series> = names.iter().enumerate().map(curve).collect();
    let legal: Vec<_> =
        records.evaluations.iter().filter_map(|e| e.legal.map(|v| (e.step as f64, v))).collect();
    if !legal.is_empty() {
        series.push(Series::new("legal labels".into(), "s0", Mark::Line, legal));
    }
    let first = names.first()?;
    let best = records.best().and_then(|e| e.metric(first).map(|v| (e, v)));
    let is_share =
        records.evaluations.iter().flat_map(|e| e.metrics.values()).all(|v| (0.0..=1.0).contains(v));
    let baseline = records.majority().filter(|_| first == "accuracy" || first == "exact-match");
    Some(Chart {
        title: if names.len() == 1 { capital(&words(first)) } else { "Metrics".into() },
        x_label: "step".into(),
        // The title says it.
        y_label: String::new(),
        series,
        best: best.map(|(e, v)| (e.step as f64, v, format!("best {}", units::percent(v)))),
        baseline: baseline.map(|share| (share, format!("majority class {}", units::percent(share)))),
        percent: is_share,
        ..Chart::default()
    })
}

/// The learning rate, where it changes.
fn rate_chart(records: &Records) -> Option<Chart> {
    let points: Vec<(f64, f64)> = records.steps.iter().map(|s| (s.step as f64, s.lr)).collect();
    let (low, high) = points.iter().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
    if points.is_empty() || high - low < 1e-9 {
        return None;
    }
    let series = vec![Series::new("learning rate".into(), "s3", Mark::Line, points)];
    Some(Chart {
        title: "Learning rate".into(),
        x_label: "step".into(),
        y_label: "learning rate".into(),
        series,
        ..Chart::default()
    })
}

fn evaluation_table(records: &Records) -> Table {
    let names = records.metric_names();
    let has_legal = records.evaluations.iter().any(|e| e.legal.is_some());
    let mut columns = vec!["step".to_owned()];
    columns.extend(names.iter().map(|n| words(n)));
    columns.extend(has_legal.then(|| "legal labels".to_owned()));
    columns.push("loss".to_owned());
    let best = records.best().map(|e| e.step);
    let dash = || "-".to_owned();
    let row = |e: &records::Evaluation| {
        let mut cells = vec![units::count(e.step)];
        cells.extend(names.iter().map(|n| e.metric(n).map_or_else(dash, units::percent)));
        cells.extend(has_legal.then(|| e.legal.map_or_else(dash, units::percent)));
        cells.push(format!("{:.4}", e.loss));
        TableRow { cells, best: Some(e.step) == best }
    };
    Table { columns, rows: records.evaluations.iter().map(row).collect() }
}

fn samples(records: &Records) -> Option<Samples> {
    let all = &records.predictions;
    if all.is_empty() {
        return None;
    }
    let right: Vec<&Prediction> = all.iter().filter(|p| p.is_right()).collect();
    let wrong: Vec<&Prediction> = all.iter().filter(|p| !p.is_right()).collect();
    let caption = format!(
        "{} of {} predictions of the best prompt equal their targets. These are spread evenly over each side.",
        units::count(right.len() as u64),
        units::count(all.len() as u64)
    );
    Some(Samples { caption, right: spread(&right), wrong: spread(&wrong) })
}

/// A few of them, from beginning to end.
fn spread(predictions: &[&Prediction]) -> Vec<Sample> {
    let stride = predictions.len().div_ceil(SAMPLES).max(1);
    predictions.iter().step_by(stride).map(|p| sample(p)).collect()
}

fn sample(p: &Prediction) -> Sample {
    let shown = |text: &str| if text.trim().is_empty() { "(empty)".to_owned() } else { clipped(text) };
    Sample {
        input: clipped(&p.inputs),
        target: shown(&p.target),
        prediction: shown(&p.prediction),
        verdict: if p.is_right() { "right" } else { "wrong" },
        loss: p.loss.map(|l| format!("{l:.3}")).unwrap_or_default(),
    }
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(SAMPLE_CHARS) {
        Some((end, _)) => format!("{} …", text[..end].trim_end()),
        None => text.to_owned(),
    }
}

fn facts(records: &Records) -> Vec<Fact> {
    let run = &records.run;
    let mut facts = vec![Fact::code("backbone", records.setting("model"))];
    facts.extend(run.fingerprint.clone().map(|f| Fact::code("fingerprint", f)));
    facts.extend(run.parameters.map(|n| Fact::new("model parameters", units::count(n))));
    facts.extend(run.trained.map(|n| Fact::new("trained parameters", units::count(n))));
    facts.extend(run.kept.map(|n| Fact::new("parameters kept", units::count(n))));
    facts.push(Fact::new("steps", units::count(records.last_step())));
    facts.extend(
        records.evaluations.last().map(|e| Fact::new("evaluation examples", units::count(e.examples as u64))),
    );
    facts.push(Fact::new("time", units::duration(Duration::from_secs_f64(records.seconds))));
    facts.extend(records.tokens_per_second().map(|r| Fact::new("tokens a second", units::rate(r))));
    facts.extend(records.examples_per_second().map(|r| Fact::new("examples a second", units::rate(r))));
    facts.extend(machine::cpu_name().map(|name| Fact::new("processor", name)));
    facts.push(Fact::new("kernels", machine::kernel_path()));
    facts.push(Fact::new("incipit", env!("CARGO_PKG_VERSION")));
    facts
}

/// The settings of `run.toml`, in groups a reader can take in; a setting that no group names comes last.
fn configuration(records: &Records) -> Vec<Group> {
    const GROUPS: [(&str, &[&str]); 4] = [
        (
            "Model and data",
            &[
                "model",
                "dtype",
                "task",
                "data-dir",
                "train",
                "eval",
                "inputs",
                "targets",
                "labels",
                "max-input-length",
                "max-target-length",
                "skip-bad-records",
            ],
        ),
        ("Prompt", &["method", "prompt-length", "prompt-init"]),
        (
            "Optimization",
            &[
                "recipe",
                "optimizer",
                "lr",
                "schedule",
                "warmup-steps",
                "weight-decay",
                "batch-size",
                "steps",
                "dropout",
                "z-loss",
                "loss",
                "shuffle",
                "seed",
            ],
        ),
        (
            "Evaluation and checkpoints",
            &["metrics", "eval-every", "eval-limit", "patience", "checkpoint-every", "keep", "out"],
        ),
    ];
    let fact = |(name, value): (&str, String)| {
        let code = matches!(
            name,
            "model"
                | "task"
                | "data-dir"
                | "train"
                | "eval"
                | "out"
                | "inputs"
                | "targets"
                | "labels"
                | "prompt-init"
        );
        Fact { name: name.replace('-', " "), value, code }
    };
    let mut groups: Vec<Group> = GROUPS
        .iter()
        .map(|(name, keys)| {
            let known = keys.iter().filter_map(|k| records.settings.get(*k).map(|v| (*k, records::shown(v))));
            Group { name, entries: known.map(fact).collect() }
        })
        .collect();
    let named = |key: &str| GROUPS.iter().any(|(_, keys)| keys.contains(&key));
    let rest =
        records.settings.iter().filter(|(k, _)| !named(k)).map(|(k, v)| (k.as_str(), records::shown(v)));
    groups.push(Group { name: "Machine and others", entries: rest.map(fact).collect() });
    groups.retain(|g| !g.entries.is_empty());
    groups
}

fn commands(records: &Records) -> String {
    let (model, out) = (quoted(&records.setting("model")), quoted(&records.setting("out")));
    let data = match records.task() {
        Some(task) => {
            format!("--task {task} --data-dir {} --split dev", quoted(&records.setting("data-dir")))
        }
        None => "--data more.jsonl".to_owned(),
    };
    format!(
        "incipit generate --model {model} --prompt {out}/prompt.npy --input \"your text\"\n\
         incipit eval --model {model} --prompt {out}/prompt.npy {data} --output predictions.jsonl\n\
         incipit inspect prompt {out}/prompt.npy --model {model}\n\
         incipit train --config {out}/run.toml --out another-run"
    )
}

/// For a POSIX shell.
fn quoted(text: &str) -> String {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+:,".contains(c));
    if plain && !text.is_empty() { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// The name of a metric in words: `macro-f1` as `macro F1`.
pub(crate) fn words(metric: &str) -> String {
    metric.replace(['-', '_'], " ").replace("f1", "F1")
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|c| c.to_uppercase().collect::<String>() + chars.as_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
