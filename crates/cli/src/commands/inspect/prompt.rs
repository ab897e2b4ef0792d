//! A prompt, and where its rows lie among the words of the vocabulary.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::DType;
use incipit_model::embedding_name;
use incipit_tune::interpret::{self, Closeness, Norms, Persistence, Row, Vocabulary, VocabularyRows, Words};
use incipit_tune::prompt::Prompt;
use incipit_tune::spec::PartialSpec;
use incipit_weights::{Checkpoint, Source, load_tokenizer, resolve};
use serde::Serialize;

use super::PromptArgs;
use super::labels::labels;
use crate::commands::backbone::run_settings;
use crate::exit::{BadInput, bad_input};
use crate::output::{self, Printed};
use crate::progress::note;
use crate::units;

/// Repeated words that are listed; `--json` has all.
const REPEATED: usize = 10;
/// Rows that are listed after a word.
const LISTED_ROWS: usize = 12;

/// What is found; without a model, the norms alone.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) path: PathBuf,
    pub(super) layers: usize,
    /// Of each layer.
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) norms: Option<Norms>,
    pub(super) model: Option<PathBuf>,
    #[serde(flatten)]
    pub(super) words: Option<Words>,
    /// Of the first layer: what the others read are no words.
    pub(super) per_row: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) later_layers: Vec<Layer>,
}

/// The rows of a layer behind the first.
#[derive(Serialize)]
pub(super) struct Layer {
    /// From 0.
    layer: usize,
    norms: Option<Norms>,
    per_row: Vec<Row>,
}

impl Layer {
    fn of((layer, prompt): (usize, &Prompt)) -> Self {
        let per_row = interpret::rows(prompt);
        Self { layer, norms: norms_of(&per_row), per_row }
    }
}

fn norms_of(rows: &[Row]) -> Option<Norms> {
    Norms::of(rows.iter().map(|row| row.norm).collect())
}

pub(super) fn examine(args: &PromptArgs) -> Result<Report> {
    let layers = layers(&Prompt::read(&args.prompt)?)?;
    let prompt = &layers[0];
    let run = run_settings(&args.prompt)?.unwrap_or_default();
    // A model that no flag names is looked for on this machine alone.
    let model = args.model.as_deref().or(run.model.as_deref().filter(|dir| Path::new(dir).is_dir()));
    let (model, words, per_row) = match model {
        Some(model) => {
            let dir = resolve(model)?;
            let (per_row, words) = compare(args, prompt, &dir, &run)?;
            (Some(dir), Some(words), per_row)
        }
        None if args.labels.is_some() || args.task.is_some() => {
            return bad_input("--model is missing: labels are looked for among the words of its vocabulary");
        }
        None => (None, None, interpret::rows(prompt)),
    };
    if layers.len() > 1 && words.is_some() {
        note("words are told of the first layer's rows: what the others read are no words");
    }
    Ok(Report {
        path: args.prompt.clone(),
        layers: layers.len(),
        rows: prompt.length(),
        width: prompt.width(),
        norms: norms_of(&per_row),
        model,
        words,
        per_row,
        later_layers: layers.iter().enumerate().skip(1).map(Layer::of).collect(),
    })
}

/// The rows of each layer, the first one's first; one at least.
fn layers(prompt: &Prompt) -> Result<Vec<Prompt>> {
    let (length, width) = (prompt.length(), prompt.width());
    let all = prompt.values().chunks_exact(length * width);
    Ok(all.map(|rows| Prompt::new(length, width, rows.to_vec())).collect::<incipit_tune::Result<_>>()?)
}

fn compare(args: &PromptArgs, prompt: &Prompt, dir: &Path, run: &PartialSpec) -> Result<(Vec<Row>, Words)> {
    // The numbers as they are stored, and none of them copied before it is looked at.
    let checkpoint = Checkpoint::open(dir, DType::F32)?;
    let name = embedding_name(&checkpoint);
    let shape = checkpoint.tensors().into_iter().find(|t| t.name == name).map(|t| t.shape);
    let shape =
        shape.ok_or_else(|| BadInput(format!("{} has no tensor {name}: it is no T5", dir.display())))?;
    let table = checkpoint.frozen(name, &shape)?;
    prompt.check_width(table.cols(), &args.prompt)?;
    let vocabulary = Vocabulary { table: &table, tokenizer: &load_tokenizer(dir)? };
    let labels = labels(args, run)?;
    Ok(interpret::words(prompt, vocabulary, usize::from(args.neighbours), labels.as_ref())?)
}

impl Printed for Report {
    fn text(&self) -> String {
        let numbers = units::count((self.layers * self.rows * self.width) as u64);
        let each = if self.layers > 1 { format!("{} layers of ", self.layers) } else { String::new() };
        let mut facts = vec![
            ("prompt", self.path.display().to_string()),
            ("shape", format!("{each}{} rows of {} ({numbers} numbers)", self.rows, self.width)),
            (if self.layers > 1 { "first layer's norms" } else { "row norms" }, norms(self.norms)),
        ];
        let mut parts = Vec::new();
        if let (Some(words), Some(model)) = (&self.words, &self.model) {
            let vocabulary = &words.vocabulary;
            facts.push(("vocabulary", vocabulary_words(vocabulary, model)));
            facts.push(("its norms", norms(vocabulary.norms)));
            facts.push(("nearest words", nearest_words(words)));
            parts.push(output::table(&CLUSTER_COLUMNS, &cluster_rows(words), true));
            if !words.repeats.repeated.is_empty() {
                parts.push(output::table(&["nearest to several rows", "rows"], &repeat_rows(words), false));
            }
            if let Some(labels) = &words.labels {
                let lines: Vec<_> = labels.iter().map(label_cells).collect();
                parts.push(output::table(&LABEL_COLUMNS, &lines, false));
            }
        }
        parts.insert(0, output::facts(facts));
        parts.push(self.row_table());
        parts.join("\n\n")
    }
}

impl Report {
    fn row_table(&self) -> String {
        let (layered, compared) = (self.layers > 1, self.words.is_some());
        let line = |layer: usize, row: &Row| {
            let layer_cell = layered.then(|| layer.to_string());
            let mut cells: Vec<String> = layer_cell.into_iter().collect();
            cells.extend([row.row.to_string(), format!("{:.2}", row.norm)]);
            if compared {
                let words = if layer == 0 { near(row) } else { String::new() };
                cells.extend([number(row.tightness), words]);
            }
            cells
        };
        let first = self.per_row.iter().map(|row| line(0, row));
        let of_layer = |of: &Layer| of.per_row.iter().map(|row| line(of.layer, row)).collect::<Vec<_>>();
        let lines: Vec<_> = first.chain(self.later_layers.iter().flat_map(of_layer)).collect();
        let mut header = if layered { vec!["layer"] } else { Vec::new() };
        header.extend(["row", "norm"]);
        if compared {
            header.extend(["tightness", "nearest words, by cosine"]);
        }
        output::table(&header, &lines, false)
    }
}

fn near(row: &Row) -> String {
    if row.nearest.is_empty() {
        return NO_DIRECTION.to_owned();
    }
    row.nearest.iter().map(|n| format!("{} {:.2}", n.piece, n.cosine)).collect::<Vec<_>>().join("  ")
}

/// Said of a row without neighbours.
pub(super) const NO_DIRECTION: &str = "(none: all its numbers are 0)";
/// Heads of [`cluster_rows`], and of [`label_cells`].
pub(super) const CLUSTER_COLUMNS: [&str; 4] = ["on average", "cosine of nearest", "tightness", "same word"];
pub(super) const LABEL_COLUMNS: [&str; 4] = ["label", "its own row", "near to rows", "pieces found"];

fn norms(norms: Option<Norms>) -> String {
    let all = |n: Norms| {
        format!(
            "min {:.2}, 5 % {:.2}, median {:.2}, mean {:.2}, 95 % {:.2}, max {:.2}",
            n.min, n.q05, n.median, n.mean, n.q95, n.max
        )
    };
    norms.map_or_else(|| "none is finite".to_owned(), all)
}

fn vocabulary_words(vocabulary: &VocabularyRows, model: &Path) -> String {
    let undirected = match vocabulary.undirected {
        0 => String::new(),
        n => format!(", {} of them without a direction", units::count(n as u64)),
    };
    format!("{} rows of {}{undirected}", units::count(vocabulary.size as u64), model.display())
}

/// How many different ones there are.
pub(super) fn nearest_words(words: &Words) -> String {
    let repeats = &words.repeats;
    format!("{} different ones; {} rows share theirs with another row", repeats.distinct, repeats.sharing)
}

/// The prompt's neighbours, those of random vectors, and words drawn by lot.
pub(super) fn cluster_rows(words: &Words) -> Vec<Vec<String>> {
    let row = |name: &str, c: &Closeness| {
        let same = c.same_word.map_or_else(|| "-".to_owned(), units::percent);
        vec![name.to_owned(), number(c.nearest), number(c.tightness), same]
    };
    let drawn = Closeness { nearest: None, tightness: words.vocabulary.tightness, same_word: None };
    vec![
        row("the prompt's rows", &words.clusters.prompt),
        row("random vectors", &words.clusters.random),
        row("words drawn by lot", &drawn),
    ]
}

/// The most repeated words, with their rows.
pub(super) fn repeat_rows(words: &Words) -> Vec<Vec<String>> {
    let row = |r: &interpret::Repeat| vec![r.piece.clone(), listed(&r.rows)];
    words.repeats.repeated.iter().take(REPEATED).map(row).collect()
}

pub(super) fn label_cells(label: &Persistence) -> Vec<String> {
    let own = match (label.own_row, label.in_own_row) {
        (Some(row), Some(true)) => format!("{row}, still near"),
        (Some(row), _) => format!("{row}, no longer near"),
        (None, _) => "-".to_owned(),
    };
    let found = label.pieces.iter().filter(|piece| !piece.rows.is_empty()).map(|piece| piece.piece.as_str());
    let found: Vec<&str> = found.collect();
    let pieces = format!("{} of {}  {}", found.len(), label.pieces.len(), found.join(" "));
    vec![label.label.clone(), own, listed(&label.rows), pieces.trim_end().to_owned()]
}

/// How many rows, and the first of them.
fn listed(rows: &[usize]) -> String {
    if rows.is_empty() {
        return "none".to_owned();
    }
    let first: Vec<String> = rows.iter().take(LISTED_ROWS).map(ToString::to_string).collect();
    let more = if rows.len() > LISTED_ROWS { " …" } else { "" };
    format!("{}: {}{more}", rows.len(), first.join(" "))
}

/// A cosine.
pub(super) fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_rows_are_cut_and_their_length_is_told() {
        assert_eq!(listed(&[]), "none");
        assert_eq!(listed(&[3, 7]), "2: 3 7");
        let all: Vec<usize> = (0..30).collect();
        assert_eq!(listed(&all), "30: 0 1 2 3 4 5 6 7 8 9 10 11 …");
    }

    #[test]
    fn what_became_of_a_labels_own_row_is_told_only_where_it_is_known() {
        let label = |own_row, in_own_row| Persistence {
            label: "True".into(),
            pieces: vec![],
            rows: vec![],
            own_row,
            in_own_row,
        };
        assert_eq!(label_cells(&label(Some(1), Some(true)))[1], "1, still near");
        assert_eq!(label_cells(&label(Some(1), Some(false)))[1], "1, no longer near");
        assert_eq!(label_cells(&label(None, None))[1], "-");
    }
}
