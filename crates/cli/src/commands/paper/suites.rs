//! From suites to sheets: rows and columns, and what each cell is read from.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use incipit_kernels::rng::Philox;
use incipit_model::Config;
use incipit_tune::spec::Method;
use serde::Serialize;

use super::plan::{Member, Plan, number, plain};
use super::scale::{Dimension, Kind, Pair, Settings, Suite, Variant, adapted};

/// Distinguishes the random numbers of a search from others.
const SEARCH_STREAM: u64 = u64::from_be_bytes(*b"settings");

/// The published T5s, as table 4 has them.
const SIZES: [&str; 5] = ["small", "base", "large", "xl", "xxl"];

/// The row with the mean of those above it.
pub(super) const MEAN: &str = "mean";

/// What a sheet's numbers are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Unit {
    /// Shares, shown in per cent.
    Score,
    /// How many numbers are trained.
    Count,
    Seconds,
}

/// What a figure has along its axis; the others are its series.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Along {
    Rows,
    /// Models, from the smallest to the largest.
    Columns,
}

/// A table to be filled.
pub(super) struct Sheet {
    pub(super) unit: Unit,
    /// What the rows are.
    pub(super) of_rows: &'static str,
    /// What a figure has along its axis.
    pub(super) along: Along,
    pub(super) rows: Vec<String>,
    pub(super) columns: Vec<String>,
    /// Row by row.
    pub(super) cells: Vec<Vec<Cell>>,
    /// How many numbers each row's method trains: a run to read it from.
    pub(super) trained: Option<Vec<Source>>,
}

/// What a cell is read from.
pub(super) enum Cell {
    Known(f64),
    /// Of each seed the mean over some numbers.
    Means(Vec<Vec<Source>>),
    /// Of each seed the metrics of the run in this directory, which tell when it was as good as it gets.
    Times(Vec<(usize, PathBuf)>),
}

/// A number in a run's summary, or the mean of those in an object there.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) run: usize,
    /// A JSON pointer.
    pub(super) at: String,
}

impl Source {
    fn of(member: &Member, part: &str) -> Self {
        Self { run: member.run, at: format!("{}{part}", member.summary) }
    }
}

/// Plans the runs of a suite, and says what is read from them.
///
/// # Errors
/// If the scale does not have what the suite names, or a task's files are missing.
pub(super) fn sheet(plan: &mut Plan<'_>, suite: &Suite) -> Result<Sheet> {
    // What is about one model alone is about the one that was given, if one was.
    let sole = |model: &str| plan.scale.sole(model).to_owned();
    match &suite.kind {
        Kind::Models { models, tasks, variants } => over_models(plan, models, tasks, variants),
        Kind::Tasks { model, tasks, variants } => over_tasks(plan, &sole(model), tasks, variants),
        Kind::Transfer { model, pairs, metrics, variants } => {
            transfer(plan, &sole(model), (pairs, metrics), variants)
        }
        Kind::Ensemble { model, tasks, members, settings } => {
            ensemble(plan, &sole(model), (tasks, *members), settings)
        }
        Kind::Parameters { variants } => Ok(parameters(variants)),
        Kind::Time { models, task, variants } => time(plan, models, task, variants),
        Kind::Search { model, task, trials, space } => search(plan, &sole(model), (task, *trials), space),
    }
}

fn names(variants: &[Variant]) -> Vec<String> {
    variants.iter().map(|variant| variant.name.clone()).collect()
}

/// The metrics of a variant on some tasks.
fn scores(plan: &mut Plan<'_>, model: &str, tasks: &[String], variant: &Variant) -> Result<Cell> {
    if variant.mixture {
        return scores_of_mixture(plan, model, tasks, variant);
    }
    let mut of_seeds = Vec::new();
    for task in tasks {
        let examples = plan.of_task(task)?;
        let trained = plan.train(model, &examples, variant)?;
        of_seeds.resize_with(trained.of_seeds.len(), Vec::new);
        for (sources, member) in of_seeds.iter_mut().zip(&trained.of_seeds) {
            sources.push(Source::of(member, "/metrics"));
        }
    }
    Ok(Cell::Means(of_seeds))
}

/// The metrics on each task of what learnt all of them at once.
fn scores_of_mixture(plan: &mut Plan<'_>, model: &str, tasks: &[String], variant: &Variant) -> Result<Cell> {
    let examples = plan.mixture(tasks)?;
    let trained = plan.train(model, &examples, variant)?;
    let mut of_seed = |seed| {
        let score = |task: &String| {
            Ok(Source { run: plan.evaluate(&trained, seed, task)?, at: "/metrics".to_owned() })
        };
        tasks.iter().map(score).collect::<Result<Vec<_>>>()
    };
    Ok(Cell::Means((0..trained.of_seeds.len()).map(&mut of_seed).collect::<Result<_>>()?))
}

fn over_models(
    plan: &mut Plan<'_>,
    models: &[String],
    tasks: &[String],
    variants: &[Variant],
) -> Result<Sheet> {
    // By size, so that what is small is there first.
    let mut cells: Vec<Vec<Cell>> = variants.iter().map(|_| Vec::new()).collect();
    for model in models {
        for (row, variant) in cells.iter_mut().zip(variants) {
            row.push(scores(plan, model, tasks, variant)?);
        }
    }
    let (rows, columns) = (names(variants), models.to_vec());
    Ok(Sheet { unit: Unit::Score, of_rows: "", along: Along::Columns, rows, columns, cells, trained: None })
}

fn over_tasks(plan: &mut Plan<'_>, model: &str, tasks: &[String], variants: &[Variant]) -> Result<Sheet> {
    let (mut cells, mut trained) = (Vec::new(), Vec::new());
    for variant in variants {
        let row = tasks.iter().map(|task| scores(plan, model, std::slice::from_ref(task), variant));
        let row = row.collect::<Result<Vec<Cell>>>()?;
        let first = match &row[..] {
            [Cell::Means(seeds), ..] => seeds.first().and_then(|sources| sources.first()),
            _ => None,
        };
        let first = first.ok_or_else(|| anyhow!("a suite over tasks has at least one"))?;
        trained.push(Source { run: first.run, at: first.at.replace("/metrics", "/num_trained") });
        cells.push(row);
    }
    let (rows, columns) = (names(variants), tasks.to_vec());
    Ok(Sheet {
        unit: Unit::Score,
        of_rows: "method",
        along: Along::Rows,
        rows,
        columns,
        cells,
        trained: Some(trained),
    })
}

fn transfer(
    plan: &mut Plan<'_>,
    model: &str,
    (pairs, metrics): (&[Pair], &[String]),
    variants: &[Variant],
) -> Result<Sheet> {
    let (mut rows, mut cells) = (Vec::new(), Vec::new());
    for Pair { from, to } in pairs {
        let examples = plan.of_task(from)?;
        let trained = variants.iter().map(|variant| plan.train(model, &examples, variant));
        let trained = trained.collect::<Result<Vec<_>>>()?;
        for task in to {
            let mut row = Vec::new();
            for variant in &trained {
                let of_seeds = variant.of_seeds.iter().enumerate().map(|(seed, member)| {
                    // On its own task a run was measured when it was trained.
                    if task == from {
                        return Ok((member.run, format!("{}/metrics", member.summary)));
                    }
                    Ok((plan.evaluate(variant, seed, task)?, "/metrics".to_owned()))
                });
                let of_seeds = of_seeds.collect::<Result<Vec<_>>>()?;
                row.extend(metrics.iter().map(|metric| {
                    let source = |(run, at): &(usize, String)| {
                        vec![Source { run: *run, at: format!("{at}/{metric}") }]
                    };
                    Cell::Means(of_seeds.iter().map(source).collect())
                }));
            }
            rows.push(if task == from { task.clone() } else { format!("{from} -> {task}") });
            cells.push(row);
        }
    }
    let column = |variant: &Variant| {
        metrics.iter().map(|metric| format!("{} {metric}", variant.name)).collect::<Vec<_>>()
    };
    let columns = variants.iter().flat_map(column).collect();
    Ok(Sheet { unit: Unit::Score, of_rows: "", along: Along::Rows, rows, columns, cells, trained: None })
}

fn ensemble(
    plan: &mut Plan<'_>,
    model: &str,
    (tasks, members): (&[String], u64),
    settings: &Settings,
) -> Result<Sheet> {
    let variant = Variant {
        name: "prompt".to_owned(),
        stage: adapted(),
        method: Method::Prompt,
        mixture: false,
        settings: settings.clone(),
    };
    let votes = tasks.iter().map(|task| {
        let examples = plan.of_task(task)?;
        let trained = plan.train_together(model, &examples, &variant, members)?;
        plan.vote(&trained, task)
    });
    let votes = votes.collect::<Result<Vec<usize>>>()?;
    let columns = ["average", "best", "ensemble"];
    let cell = |run, column: &str| Cell::Means(vec![vec![Source { run, at: format!("/{column}") }]]);
    let mut cells: Vec<Vec<Cell>> =
        votes.iter().map(|&run| columns.map(|column| cell(run, column)).into()).collect();
    let mean = |column: &str| {
        let sources = votes.iter().map(|&run| Source { run, at: format!("/{column}") });
        Cell::Means(vec![sources.collect()])
    };
    cells.push(columns.map(mean).into());
    let rows = tasks.iter().cloned().chain([MEAN.to_owned()]).collect();
    let columns = columns.map(str::to_owned).to_vec();
    Ok(Sheet { unit: Unit::Score, of_rows: "task", along: Along::Rows, rows, columns, cells, trained: None })
}

fn parameters(variants: &[Variant]) -> Sheet {
    let size = |name: &str| Config::preset(name).expect("a published size");
    let row =
        |variant: &Variant| SIZES.map(|name| Cell::Known(num_trained(&size(name), variant) as f64)).into();
    Sheet {
        unit: Unit::Count,
        of_rows: "",
        along: Along::Columns,
        rows: names(variants),
        columns: SIZES.map(str::to_owned).to_vec(),
        cells: variants.iter().map(row).collect(),
        trained: None,
    }
}

/// How many numbers a method trains, as table 4 and figure 4 count them: docs/methods.md has the formulas.
pub(super) fn num_trained(config: &Config, variant: &Variant) -> u64 {
    let setting = |name, default| number(&variant.settings, name, default) as u64;
    let (d, inner) = (config.d_model as u64, config.inner() as u64);
    let (encoder, decoder) = (config.num_layers as u64, config.num_decoder_layers as u64);
    let length = setting("prompt-length", 100.0);
    match variant.method {
        Method::Prompt => length * d,
        Method::Prefix => 2 * length * inner * (encoder + 2 * decoder),
        Method::Adapter => {
            let width = setting("adapter-width", 64.0);
            (2 * width * d + width + d) * (2 * encoder + 3 * decoder)
        }
        Method::Model => config.num_parameters(),
        Method::Search => length,
        Method::Text => setting("max-prompt-tokens", 512.0),
    }
}

fn time(plan: &mut Plan<'_>, models: &[String], task: &str, variants: &[Variant]) -> Result<Sheet> {
    let mut cells: Vec<Vec<Cell>> = variants.iter().map(|_| Vec::new()).collect();
    let examples = plan.of_task(task)?;
    for model in models {
        for (row, variant) in cells.iter_mut().zip(variants) {
            // Alone, so that the time is that of one prompt.
            let trained = plan.train_alone(model, &examples, variant)?;
            let times = trained.of_seeds.into_iter().map(|member| (member.run, member.dir));
            row.push(Cell::Times(times.collect()));
        }
    }
    let (rows, columns) = (names(variants), models.to_vec());
    Ok(Sheet { unit: Unit::Seconds, of_rows: "", along: Along::Columns, rows, columns, cells, trained: None })
}

fn search(
    plan: &mut Plan<'_>,
    model: &str,
    (task, trials): (&str, u64),
    space: &[Dimension],
) -> Result<Sheet> {
    let (mut rows, mut cells) = (Vec::new(), Vec::new());
    for trial in 0..trials {
        let mut random = Philox::new(trial, &[SEARCH_STREAM]);
        let drawn = space.iter().map(|dimension| {
            let place = random.below(dimension.values.len() as u64) as usize;
            (dimension.setting.clone(), dimension.values[place].clone())
        });
        let settings: Settings = drawn.collect();
        let words = space.iter().map(|d| format!("{} {}", d.setting, plain(&settings[&d.setting])));
        let name = words.collect::<Vec<_>>().join(", ");
        if rows.contains(&name) {
            continue;
        }
        let (stage, method) = (adapted(), Method::Prompt);
        let variant = Variant { name: name.clone(), stage, method, mixture: false, settings };
        rows.push(name);
        cells.push(vec![scores(plan, model, &[task.to_owned()], &variant)?]);
    }
    let columns = vec![task.to_owned()];
    Ok(Sheet {
        unit: Unit::Score,
        of_rows: "settings",
        along: Along::Rows,
        rows,
        columns,
        cells,
        trained: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What runs on such a model report (crates/cli/tests/methods.rs).
    #[test]
    fn numbers_are_counted_as_runs_report_them() {
        let config = Config {
            d_model: 128,
            num_heads: 4,
            d_kv: 32,
            num_layers: 3,
            num_decoder_layers: 3,
            ..Config::preset("small").unwrap()
        };
        for (method, count) in [
            (Method::Prompt, 3 * 128),
            (Method::Prefix, 2 * 3 * 128 * 9),
            (Method::Adapter, (2 * 64 * 128 + 64 + 128) * 15),
            (Method::Search, 3),
        ] {
            let settings = toml::toml! { prompt-length = 3 };
            let variant = Variant { name: String::new(), stage: adapted(), method, mixture: false, settings };
            assert_eq!(num_trained(&config, &variant), count, "{method}");
        }
    }
}
