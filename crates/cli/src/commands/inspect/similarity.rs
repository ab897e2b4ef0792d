//! Prompts of several tasks, and how like they are to each other.

use std::path::Path;

use anyhow::Result;
use incipit_tune::interpret::{self, Matrix};
use incipit_tune::prompt::Prompt;
use serde::Serialize;

use super::SimilarityArgs;
use crate::exit::bad_input;
use crate::output::{self, Printed};

#[derive(Serialize)]
pub(super) struct Report {
    pub(super) prompts: Vec<Compared>,
    #[serde(flatten)]
    pub(super) similarity: interpret::Similarity,
}

/// One of the prompts.
#[derive(Serialize)]
pub(super) struct Compared {
    pub(super) path: String,
    pub(super) rows: usize,
}

pub(super) fn examine(args: &SimilarityArgs) -> Result<Report> {
    let read = |path: &std::path::PathBuf| Ok((path.display().to_string(), read(path)?));
    let prompts: Vec<(String, Prompt)> = args.prompts.iter().map(read).collect::<Result<_>>()?;
    let similarity = interpret::similarity(&prompts)?;
    let compared = |(path, prompt): (String, Prompt)| Compared { path, rows: prompt.length() };
    Ok(Report { prompts: prompts.into_iter().map(compared).collect(), similarity })
}

/// The prompt at `path`, whose rows are in the space of words.
///
/// # Errors
/// If there is none, or it has rows for layers that read no words.
fn read(path: &Path) -> Result<Prompt> {
    let prompt = Prompt::read(path)?;
    match prompt.num_layers() {
        1 => Ok(prompt),
        layers => bad_input(format!(
            "{} has rows for each of {layers} layers, and only those of the first lie among words: take a prompt \
             that was trained without --prompt-layers all",
            path.display()
        )),
    }
}

impl Printed for Report {
    fn text(&self) -> String {
        let tables = [
            ("mean cosine of their rows", &self.similarity.of_rows),
            ("cosine of their mean rows", &self.similarity.of_means),
        ];
        tables.map(|(head, matrix)| self.table(head, matrix)).join("\n\n")
    }
}

impl Report {
    /// Columns have numbers for names: paths are long.
    fn table(&self, head: &str, matrix: &Matrix) -> String {
        let numbers: Vec<String> = (1..=self.prompts.len()).map(|n| n.to_string()).collect();
        let header: Vec<&str> = std::iter::once(head).chain(numbers.iter().map(String::as_str)).collect();
        let line = |(i, row): (usize, &Vec<Option<f64>>)| {
            let name = format!("{}  {}", i + 1, self.prompts[i].path);
            std::iter::once(name).chain(row.iter().map(|cosine| shown(*cosine))).collect()
        };
        let lines: Vec<Vec<String>> = matrix.iter().enumerate().map(line).collect();
        output::table(&header, &lines, true)
    }
}

/// A similarity, to as many digits as tell prompts apart; where one of them is all zeros there is none.
pub(super) fn shown(cosine: Option<f64>) -> String {
    cosine.map_or_else(|| "-".to_owned(), |cosine| format!("{cosine:.3}"))
}
