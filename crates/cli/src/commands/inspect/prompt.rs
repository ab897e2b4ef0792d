//! A prompt, and where its rows lie among the words of the vocabulary.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use incipit_kernels::Frozen;
use incipit_tune::prompt::Prompt;
use incipit_weights::{Checkpoint, Source, load_tokenizer, resolve};
use rayon::prelude::*;
use serde::Serialize;

use super::PromptArgs;
use crate::exit::BadInput;
use crate::output::{self, Printed};
use crate::units;

/// Rows of the vocabulary that a task looks through at a time.
const CHUNK: usize = 256;
const EMBEDDING: &str = "shared.weight";

#[derive(Serialize)]
pub(super) struct Report {
    path: PathBuf,
    rows: usize,
    width: usize,
    norms: Norms,
    vocabulary: Option<Vocabulary>,
    per_row: Vec<Row>,
}

/// Euclidean norms.
#[derive(Serialize)]
struct Norms {
    min: f32,
    median: f32,
    max: f32,
}

#[derive(Serialize)]
struct Vocabulary {
    model: PathBuf,
    size: usize,
    norms: Norms,
}

#[derive(Serialize)]
struct Row {
    row: usize,
    norm: f32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    nearest: Vec<Neighbour>,
}

#[derive(Clone, Serialize)]
struct Neighbour {
    id: usize,
    piece: String,
    cosine: f32,
}

pub(super) fn examine(args: &PromptArgs) -> Result<Report> {
    let prompt = Prompt::read(&args.prompt)?;
    let rows: Vec<&[f32]> = prompt.values().chunks_exact(prompt.width()).collect();
    let mut per_row: Vec<Row> = rows
        .iter()
        .enumerate()
        .map(|(row, values)| Row { row, norm: norm(values), nearest: Vec::new() })
        .collect();
    let vocabulary =
        args.model.as_deref().map(|model| compare(args, model, &prompt, &mut per_row)).transpose()?;
    let norms = norms(per_row.iter().map(|r| r.norm).collect());
    Ok(Report {
        path: args.prompt.clone(),
        rows: prompt.length(),
        width: prompt.width(),
        norms,
        vocabulary,
        per_row,
    })
}

/// Fills in each row's nearest words.
fn compare(args: &PromptArgs, model: &str, prompt: &Prompt, rows: &mut [Row]) -> Result<Vocabulary> {
    let dir = resolve(model)?;
    let checkpoint = Checkpoint::open(&dir, DType::F32)?;
    let tokenizer = load_tokenizer(&dir)?;
    let shape = checkpoint.tensors().into_iter().find(|t| t.name == EMBEDDING).map(|t| t.shape);
    let shape =
        shape.ok_or_else(|| BadInput(format!("{} has no tensor {EMBEDDING}: it is no T5", dir.display())))?;
    let table = checkpoint.frozen(EMBEDDING, &shape)?;
    prompt.check_width(table.cols(), &args.prompt)?;
    let (nearest, vocabulary_norms) = nearest(prompt, &table, args.neighbours);
    for (row, found) in rows.iter_mut().zip(nearest) {
        let named = found.into_iter().map(|(cosine, id)| {
            let piece = u32::try_from(id).ok().and_then(|id| tokenizer.id_to_token(id));
            Neighbour { id, piece: piece.unwrap_or_else(|| "(unused)".to_owned()), cosine }
        });
        row.nearest = named.collect();
    }
    Ok(Vocabulary { model: dir, size: table.rows(), norms: norms(vocabulary_norms) })
}

/// For each row of the prompt the `count` rows of `table` with the greatest cosine, as (cosine, id); and the norms of the table's rows.
fn nearest(prompt: &Prompt, table: &Frozen, count: usize) -> (Vec<Vec<(f32, usize)>>, Vec<f32>) {
    let rows: Vec<Vec<f32>> = prompt.values().chunks_exact(prompt.width()).map(unit).collect();
    let chunks: Vec<usize> = (0..table.rows()).step_by(CHUNK).collect();
    let parts: Vec<_> = chunks
        .into_par_iter()
        .map(|first| {
            let mut found = vec![Vec::new(); rows.len()];
            let mut norms = Vec::new();
            let mut word = vec![0.0; table.cols()];
            for id in first..(first + CHUNK).min(table.rows()) {
                table.copy_row(id, &mut word);
                norms.push(norm(&word));
                let word = unit(&word);
                for (found, row) in found.iter_mut().zip(&rows) {
                    found.push((dot(row, &word), id));
                }
            }
            found.iter_mut().for_each(|list| keep_greatest(list, count));
            (found, norms)
        })
        .collect();
    let mut all = vec![Vec::new(); rows.len()];
    let mut norms = Vec::with_capacity(table.rows());
    for (found, part_norms) in parts {
        all.iter_mut().zip(found).for_each(|(list, part)| list.extend(part));
        norms.extend(part_norms);
    }
    all.iter_mut().for_each(|list| keep_greatest(list, count));
    (all, norms)
}

fn keep_greatest(list: &mut Vec<(f32, usize)>, count: usize) {
    list.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    list.truncate(count);
}

/// Eight sums side by side, which the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a_parts, b_parts) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_parts.remainder().iter().zip(b_parts.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_parts.zip(b_parts) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn norm(values: &[f32]) -> f32 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32
}

/// The same direction with norm 1; a row of zeros stays.
fn unit(values: &[f32]) -> Vec<f32> {
    let norm = norm(values);
    let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
    values.iter().map(|v| v * scale).collect()
}

fn norms(mut values: Vec<f32>) -> Norms {
    values.sort_by(f32::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
    Norms { min: at(0), median: at(values.len() / 2), max: at(values.len().saturating_sub(1)) }
}

impl Norms {
    fn words(&self) -> String {
        format!("min {:.2}, median {:.2}, max {:.2}", self.min, self.median, self.max)
    }
}

impl Printed for Report {
    fn text(&self) -> String {
        let mut facts = vec![
            ("prompt", self.path.display().to_string()),
            (
                "shape",
                format!(
                    "{} rows of {} ({} numbers)",
                    self.rows,
                    self.width,
                    units::count((self.rows * self.width) as u64)
                ),
            ),
            ("row norms", self.norms.words()),
        ];
        if let Some(vocabulary) = &self.vocabulary {
            facts.push((
                "vocabulary",
                format!("{} rows of {}", units::count(vocabulary.size as u64), vocabulary.model.display()),
            ));
            facts.push(("its norms", vocabulary.norms.words()));
        }
        let line = |row: &Row| {
            let near = row.nearest.iter().map(|n| format!("{} {:.2}", n.piece, n.cosine));
            let mut cells = vec![row.row.to_string(), format!("{:.2}", row.norm)];
            cells.extend(self.vocabulary.is_some().then(|| near.collect::<Vec<_>>().join("  ")));
            cells
        };
        let lines: Vec<_> = self.per_row.iter().map(line).collect();
        let header: &[&str] = if self.vocabulary.is_some() {
            &["row", "norm", "nearest words, by cosine"]
        } else {
            &["row", "norm"]
        };
        format!("{}\n\n{}", output::facts(facts), output::table(header, &lines, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_words_are_those_of_like_direction_whatever_their_length() {
        let prompt = Prompt::new(2, 3, vec![2.0, 0.0, 0.0, 0.0, 1.0, 1.0]).expect("a prompt");
        let words = vec![0.0, 0.0, 5.0, 9.0, 0.1, 0.0, -1.0, 0.0, 0.0, 0.0, 0.2, 0.2];
        let (found, norms) = nearest(&prompt, &Frozen::from_f32(words, 4, 3), 2);
        assert_eq!(found[0][0].1, 1);
        assert_eq!(found[1].iter().map(|f| f.1).collect::<Vec<_>>(), [3, 0]);
        assert!((found[1][0].0 - 1.0).abs() < 1e-6);
        assert_eq!(norms.len(), 4);
    }

    #[test]
    fn a_row_of_zeros_is_near_to_nothing_and_no_nan() {
        let prompt = Prompt::new(1, 2, vec![0.0, 0.0]).expect("a prompt");
        let (found, _) = nearest(&prompt, &Frozen::from_f32(vec![1.0, 2.0], 1, 2), 5);
        assert_eq!(found, [[(0.0, 0)]]);
    }
}
