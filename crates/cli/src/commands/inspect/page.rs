//! What `inspect` finds, as a page that needs nothing else.

use std::path::Path;

use anyhow::Result;
use incipit_tune::atomic;
use incipit_tune::interpret::{Matrix, Norms, Row};
use serde::Serialize;

use super::prompt::{self, CLUSTER_COLUMNS, LABEL_COLUMNS, NO_DIRECTION, cluster_rows, label_cells, number};
use super::similarity;
use crate::progress::note;
use crate::report::chart::{Chart, Mark, Series};
use crate::report::page::{Charts, Fact, Figure, Head, render};
use crate::units;

const CLUSTERS: &str = "The words near to a row of a trained prompt tend to belong together; those near to a random vector \
                        do not.";
const LABELS: &str = "A label is near to a row if one of its pieces is among the row's nearest words.";
const OF_ROWS: &str = "The mean cosine over all pairs of a row of the one and a row of the other. On the diagonal, how alike a \
                       prompt's own rows are.";
const OF_MEANS: &str = "The cosine of the mean rows.";

#[derive(Serialize)]
struct PromptPage {
    head: Head,
    charts: Charts,
    norms: String,
    facts: Vec<Fact>,
    clusters: Option<Table>,
    repeats: Option<Table>,
    labels: Option<Table>,
    rows: Vec<PageRow>,
}

#[derive(Serialize)]
struct Table {
    caption: String,
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

#[derive(Serialize)]
struct PageRow {
    row: usize,
    norm: String,
    tightness: String,
    words: Vec<Word>,
}

#[derive(Serialize)]
struct Word {
    piece: String,
    cosine: String,
    /// Of the colour, in per cent.
    share: u32,
}

#[derive(Serialize)]
struct SimilarityPage {
    head: Head,
    matrices: Vec<Heat>,
}

/// A matrix as coloured cells.
#[derive(Serialize)]
struct Heat {
    title: &'static str,
    caption: &'static str,
    columns: Vec<String>,
    rows: Vec<HeatRow>,
}

#[derive(Serialize)]
struct HeatRow {
    name: String,
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Cell {
    text: String,
    share: u32,
}

/// Writes a page where a file is named for it.
///
/// # Errors
/// If it cannot be made or written.
pub(super) fn write(path: Option<&Path>, page: impl FnOnce() -> Result<String>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    atomic::write_file(path, page()?.as_bytes())?;
    note(&format!("the page is {}", path.display()));
    Ok(())
}

/// The page of one prompt.
///
/// # Errors
/// If the template cannot be used.
pub(super) fn of_prompt(report: &prompt::Report) -> Result<String> {
    let table =
        |caption: String, columns: &[&'static str], rows| Table { caption, columns: columns.to_vec(), rows };
    let words = report.words.as_ref();
    let word_norms = words.and_then(|words| words.vocabulary.norms);
    let repeated = words.filter(|words| !words.repeats.repeated.is_empty());
    let labels = words.and_then(|words| words.labels.as_ref());
    let page = PromptPage {
        head: Head {
            figures: figures(report),
            ..Head::new("a look into a prompt", title(report), lede(report))
        },
        charts: Charts::draw([norm_chart(report)])?,
        norms: word_norms.map_or_else(String::new, norm_caption),
        facts: facts(report),
        clusters: words.map(|words| table(CLUSTERS.to_owned(), &CLUSTER_COLUMNS, cluster_rows(words))),
        repeats: repeated.map(|words| {
            let caption = format!("Nearest words: {}.", prompt::nearest_words(words));
            table(caption, &["word", "rows"], prompt::repeat_rows(words))
        }),
        labels: labels
            .map(|labels| table(LABELS.to_owned(), &LABEL_COLUMNS, labels.iter().map(label_cells).collect())),
        rows: report.per_row.iter().filter(|_| words.is_some()).map(page_row).collect(),
    };
    render("prompt", &page)
}

fn title(report: &prompt::Report) -> String {
    // Of a file in a run's directory, that directory's name tells more.
    let path = if report.path.is_dir() { Some(report.path.as_path()) } else { report.path.parent() };
    let name = path.and_then(Path::file_name).or(report.path.file_name());
    name.map_or_else(|| "prompt".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn lede(report: &prompt::Report) -> String {
    let first = if report.layers > 1 {
        format!(", those of the first of {} layers", report.layers)
    } else {
        String::new()
    };
    let rows = format!("{} prompt rows of {} numbers{first}", report.rows, units::count(report.width as u64));
    match &report.words {
        Some(words) => {
            let size = units::count(words.vocabulary.size as u64);
            format!("{rows}, among the {size} words of the frozen model's vocabulary.")
        }
        None => format!("{rows}. No model was given whose words they could be compared with."),
    }
}

fn figures(report: &prompt::Report) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut figure =
        |name: &str, value: String, note: String| figures.push(Figure { name: name.to_owned(), value, note });
    if let Some(words) = &report.words {
        let (ours, random) = (words.clusters.prompt, words.clusters.random);
        figure("Nearest word", number(ours.nearest), format!("cosine; random {}", number(random.nearest)));
        figure(
            "Tightness",
            number(ours.tightness),
            format!("of neighbours; random {}", number(random.tightness)),
        );
        let repeats = &words.repeats;
        figure(
            "Nearest words",
            repeats.distinct.to_string(),
            format!("{} rows share theirs", repeats.sharing),
        );
        if let Some(labels) = &words.labels {
            let near = labels.iter().filter(|label| !label.rows.is_empty()).count();
            figure("Labels found", format!("{near} of {}", labels.len()), "among nearest words".to_owned());
        }
    }
    if let Some(norms) = report.norms {
        let vocabulary = report.words.as_ref().and_then(|words| words.vocabulary.norms);
        let note = vocabulary.map_or_else(String::new, |v| format!("of words {:.2}", v.median));
        figure("Median norm", format!("{:.2}", norms.median), note);
    }
    figures
}

fn facts(report: &prompt::Report) -> Vec<Fact> {
    let mut facts = vec![Fact::code("prompt", report.path.display().to_string())];
    facts.extend(report.model.as_ref().map(|model| Fact::code("model", model.display().to_string())));
    let norms = |norms: Norms| format!("{:.2} to {:.2}, mean {:.2}", norms.min, norms.max, norms.mean);
    facts.extend(report.norms.map(|n| Fact::new("row norms", norms(n))));
    if let Some(words) = &report.words {
        facts.extend(words.vocabulary.norms.map(|n| Fact::new("word norms", norms(n))));
        facts.push(Fact::new("words without direction", words.vocabulary.undirected.to_string()));
    }
    facts
}

/// Bars of the rows' norms, and across them where those of the vocabulary lie.
fn norm_chart(report: &prompt::Report) -> Chart {
    let points = report.per_row.iter().map(|row| (row.row as f64, row.norm)).collect();
    let words = report.words.as_ref().and_then(|words| words.vocabulary.norms);
    Chart {
        title: "Norms".into(),
        x_label: "row".into(),
        y_label: "norm".into(),
        series: vec![Series::new("rows".into(), "s0", Mark::Bars, points)],
        // Its words stand above the chart, where no bar crosses them.
        baseline: words.map(|n| (n.median, String::new())),
        band: words.map(|n| (n.q05, n.q95)),
        ..Chart::default()
    }
}

fn norm_caption(norms: Norms) -> String {
    format!(
        "Half of the words are longer than {:.2} (dashed); nine in ten are {:.2} to {:.2} long (shaded).",
        norms.median, norms.q05, norms.q95
    )
}

fn page_row(row: &Row) -> PageRow {
    let word = |n: &incipit_tune::interpret::Neighbour| Word {
        piece: n.piece.clone(),
        cosine: format!("{:.2}", n.cosine),
        share: percent(f64::from(n.cosine)),
    };
    let mut words: Vec<Word> = row.nearest.iter().map(word).collect();
    if words.is_empty() {
        words.push(Word { piece: NO_DIRECTION.to_owned(), cosine: String::new(), share: 0 });
    }
    PageRow { row: row.row, norm: format!("{:.2}", row.norm), tightness: number(row.tightness), words }
}

/// The page of several prompts.
///
/// # Errors
/// If the template cannot be used.
pub(super) fn of_similarity(report: &similarity::Report) -> Result<String> {
    let count = report.prompts.len();
    let rows: usize = report.prompts.iter().map(|prompt| prompt.rows).sum();
    let lede = format!(
        "{count} prompts, {rows} rows in all: the stronger a cell's colour, the more alike its two prompts are."
    );
    let found = &report.similarity;
    let matrices = vec![
        heat(report, "Rows", OF_ROWS, &found.of_rows),
        heat(report, "Mean rows", OF_MEANS, &found.of_means),
    ];
    let head = Head::new("prompts side by side", "How alike prompts are".to_owned(), lede);
    render("similarity", &SimilarityPage { head, matrices })
}

fn heat(report: &similarity::Report, title: &'static str, caption: &'static str, matrix: &Matrix) -> Heat {
    let greatest = matrix.iter().flatten().flatten().fold(0.0, |high: f64, v| high.max(*v));
    let cell = |cosine: &Option<f64>| Cell {
        text: similarity::shown(*cosine),
        share: cosine.filter(|_| greatest > 0.0).map_or(0, |cosine| percent(cosine / greatest)),
    };
    let row = |(i, row): (usize, &Vec<Option<f64>>)| HeatRow {
        name: format!("{}  {}", i + 1, report.prompts[i].path),
        cells: row.iter().map(cell).collect(),
    };
    let columns = (1..=report.prompts.len()).map(|n| n.to_string()).collect();
    Heat { title, caption, columns, rows: matrix.iter().enumerate().map(row).collect() }
}

/// A share within 0..=1 in whole per cent; what is negative is 0.
fn percent(share: f64) -> u32 {
    (100.0 * share.clamp(0.0, 1.0)).round() as u32
}
