//! Sheets with their values, as text, JSON, CSV, a figure and a page; the paper's numbers beside ours.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::execute::Progress;
use super::published::Published;
use super::scale::Suite;
use super::suites::{Along, MEAN, Sheet, Unit};
use super::values::Values;
use crate::output;
use crate::report::chart::{Chart, Mark, Series};
use crate::report::page::{Charts, Head, render};
use crate::units;

const CLASSES: [&str; 6] = ["s0", "s1", "s2", "s3", "s4", "s5"];
/// What stands where there is no number.
const NOTHING: &str = "-";

/// A suite's sheet, filled as far as its runs are done.
#[derive(Serialize)]
pub(super) struct Filled {
    pub(super) name: String,
    title: String,
    note: Option<String>,
    unit: Unit,
    #[serde(skip)]
    of_rows: &'static str,
    #[serde(skip)]
    along: Along,
    columns: Vec<String>,
    rows: Vec<Row>,
    /// Seeds of all cells that are not there.
    pub(super) missing: usize,
    /// Seeds that were never as good as their like are on average.
    below: usize,
    paper: Published,
}

#[derive(Serialize)]
struct Row {
    name: String,
    /// How many numbers the row's method trains.
    num_trained: Option<f64>,
    cells: Vec<Filling>,
}

#[derive(Serialize)]
struct Filling {
    #[serde(flatten)]
    ours: Values,
    paper: Option<String>,
}

impl Filled {
    /// # Errors
    /// If a run's files cannot be read.
    pub(super) fn new(suite: &Suite, sheet: &Sheet, progress: &Progress) -> Result<Self> {
        let paper = Published::of(&suite.name);
        let (mut rows, mut missing, mut below) = (Vec::new(), 0, 0);
        for (i, (name, cells)) in sheet.rows.iter().zip(&sheet.cells).enumerate() {
            let cells = sheet.columns.iter().zip(cells).map(|(column, cell)| {
                let ours = progress.values(cell)?;
                missing += ours.missing;
                below += ours.below;
                // A mean is that of its rows.
                let same = name != MEAN || paper.has_rows(&sheet.rows);
                Ok(Filling { ours, paper: paper.cell(name, column).filter(|_| same).map(str::to_owned) })
            });
            let cells = cells.collect::<Result<_>>()?;
            let num_trained = sheet.trained.as_ref().and_then(|trained| progress.number(&trained[i]));
            rows.push(Row { name: name.clone(), num_trained, cells });
        }
        Ok(Self {
            name: suite.name.clone(),
            title: suite.title.clone(),
            note: suite.note.clone(),
            unit: sheet.unit,
            of_rows: sheet.of_rows,
            along: sheet.along,
            columns: sheet.columns.clone(),
            rows,
            missing,
            below,
            paper,
        })
    }

    /// Whether the paper has a number beside one of ours.
    fn is_compared(&self) -> bool {
        self.rows.iter().flat_map(|row| &row.cells).any(|cell| cell.paper.is_some())
    }

    fn counts_trained(&self) -> bool {
        self.rows.iter().any(|row| row.num_trained.is_some())
    }

    fn header(&self) -> Vec<String> {
        let mut header = vec![self.of_rows.to_owned()];
        header.extend(self.counts_trained().then(|| "trained".to_owned()));
        for column in &self.columns {
            header.push(column.clone());
            header.extend(self.is_compared().then(|| "paper".to_owned()));
        }
        header
    }

    fn table(&self) -> Vec<Vec<String>> {
        let row = |row: &Row| {
            let mut cells = vec![row.name.clone()];
            let trained = row.num_trained.map_or(NOTHING.to_owned(), |count| units::count(count as u64));
            cells.extend(self.counts_trained().then_some(trained));
            for cell in &row.cells {
                cells.push(text(self.unit, &cell.ours));
                let paper = cell.paper.clone().unwrap_or_else(|| NOTHING.to_owned());
                cells.extend(self.is_compared().then_some(paper));
            }
            cells
        };
        self.rows.iter().map(row).collect()
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{}: {}\n", self.name, self.title);
        if let Some(note) = &self.note {
            let _ = writeln!(text, "{note}");
        }
        if let Some(finding) = &self.paper.finding {
            let _ = writeln!(text, "The paper: {finding}");
        }
        let header = self.header();
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let _ = write!(text, "{}", output::table(&header, &self.table(), true));
        if !self.paper.rows.is_empty() && !self.is_compared() {
            let header: Vec<&str> = std::iter::once("as the paper prints it")
                .chain(self.paper.columns.iter().map(String::as_str))
                .collect();
            let _ = write!(text, "\n{}", output::table(&header, &self.paper.rows, true));
        }
        if self.missing > 0 {
            let _ = write!(text, "\n{} values are not there yet, or their runs failed", self.missing);
        }
        if self.below > 0 {
            let _ = write!(
                text,
                "\n{} runs never came near to the mean of their like, and have no time",
                self.below
            );
        }
        text
    }

    /// A line for every cell.
    pub(super) fn csv(&self) -> String {
        let mut csv = "suite,row,trained,column,mean,deviation,values,paper\n".to_owned();
        for row in &self.rows {
            for (column, cell) in self.columns.iter().zip(&row.cells) {
                let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
                let values: Vec<String> = cell.ours.values.iter().map(f64::to_string).collect();
                let fields = [
                    self.name.clone(),
                    row.name.clone(),
                    number(row.num_trained),
                    column.clone(),
                    number(cell.ours.mean),
                    number(cell.ours.deviation),
                    values.join(" "),
                    cell.paper.clone().unwrap_or_default(),
                ];
                csv += &fields.map(|field| quoted(&field)).join(",");
                csv.push('\n');
            }
        }
        csv
    }

    /// Rows as curves over the columns; of a sheet whose rows are many, columns over the rows; of methods on tasks, what they come to
    /// over what they train.
    pub(super) fn chart(&self) -> Chart {
        let percent = self.unit == Unit::Score;
        let y_label = match self.unit {
            Unit::Score => "score",
            Unit::Count => "numbers trained",
            Unit::Seconds => "seconds",
        };
        let chart =
            Chart { title: self.title.clone(), y_label: y_label.to_owned(), percent, ..Chart::default() };
        if self.counts_trained() {
            let x_label = "numbers trained, as a power of ten".to_owned();
            let series = self.rows.iter().enumerate().filter_map(|(i, row)| over_trained(i, row));
            return Chart { x_label, series: series.collect(), ..chart };
        }
        if self.along == Along::Columns {
            let series = self.rows.iter().enumerate().map(|(i, row)| {
                let cells = row.cells.iter().map(|cell| &cell.ours);
                series(i, &row.name, Mark::Dots, cells)
            });
            return Chart {
                x_label: "model".to_owned(),
                x_names: self.columns.clone(),
                series: series.collect(),
                ..chart
            };
        }
        let series = self.columns.iter().enumerate().map(|(i, column)| {
            let cells = self.rows.iter().map(|row| &row.cells[i].ours);
            series(i, column, Mark::Points, cells)
        });
        let long = self.rows.iter().any(|row| row.name.len() > 24);
        let name = |(i, row): (usize, &Row)| if long { (i + 1).to_string() } else { row.name.clone() };
        Chart {
            x_label: self.of_rows.to_owned(),
            x_names: self.rows.iter().enumerate().map(name).collect(),
            series: series.collect(),
            ..chart
        }
    }
}

/// Values over the places of their cells.
fn series<'a>(i: usize, name: &str, mark: Mark, cells: impl Iterator<Item = &'a Values>) -> Series {
    let there = cells.enumerate().filter_map(|(x, cell)| Some((x as f64, cell.mean?, cell.deviation)));
    let (points, spread) = there.map(|(x, mean, deviation)| ((x, mean), deviation.unwrap_or(0.0))).unzip();
    Series { spread, ..Series::new(name.to_owned(), CLASSES[i % CLASSES.len()], mark, points) }
}

/// A method's mean over its tasks, over how many numbers it trains.
fn over_trained(i: usize, row: &Row) -> Option<Series> {
    let x = row.num_trained?.max(1.0).log10();
    let means = row.cells.iter().map(|cell| cell.ours.mean).collect::<Option<Vec<f64>>>()?;
    let mean = means.iter().sum::<f64>() / means.len() as f64;
    Some(Series::new(row.name.clone(), CLASSES[i % CLASSES.len()], Mark::Points, vec![(x, mean)]))
}

fn text(unit: Unit, values: &Values) -> String {
    let show = |value: f64| match unit {
        Unit::Score => format!("{:.1}", 100.0 * value),
        Unit::Count => units::count(value as u64),
        Unit::Seconds => units::duration(Duration::from_secs_f64(value)),
    };
    match (values.mean, values.deviation) {
        (None, _) => NOTHING.to_owned(),
        (Some(mean), None) => show(mean),
        (Some(mean), Some(deviation)) => format!("{} ± {}", show(mean), show(deviation)),
    }
}

/// A field of CSV (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[derive(Serialize)]
struct Page<'a> {
    head: Head,
    charts: Charts,
    sheets: Vec<PageSheet<'a>>,
}

#[derive(Serialize)]
struct PageSheet<'a> {
    name: &'a str,
    title: &'a str,
    note: Option<&'a str>,
    finding: Option<&'a str>,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    published: Option<&'a Published>,
}

impl<'a> PageSheet<'a> {
    fn of(sheet: &'a Filled) -> Self {
        Self {
            name: &sheet.name,
            title: &sheet.title,
            note: sheet.note.as_deref(),
            finding: sheet.paper.finding.as_deref(),
            header: sheet.header(),
            rows: sheet.table(),
            published: (!sheet.paper.rows.is_empty() && !sheet.is_compared()).then_some(&sheet.paper),
        }
    }
}

/// All sheets as a page.
///
/// # Errors
/// If the template cannot be used.
pub(super) fn page(sheets: &[Filled], scale: &str, about: &str) -> Result<String> {
    let title = "The Power of Scale for Parameter-Efficient Prompt Tuning".to_owned();
    let page = Page {
        head: Head::new("the paper, run again", title, format!("Scale {scale}: {about}")),
        charts: Charts::draw(sheets.iter().map(Filled::chart))?,
        sheets: sheets.iter().map(PageSheet::of).collect(),
    };
    render("paper", &page)
}
