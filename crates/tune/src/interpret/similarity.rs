//! How like prompts of several tasks are to each other.

use serde::Serialize;

use super::vectors::{add, dot, unit};
use crate::{Error, Result, prompt::Prompt};

/// A number for each pair of prompts, symmetric; `None` where it is undefined.
pub type Matrix = Vec<Vec<Option<f64>>>;

/// The two measures of SPoT (Vu et al. 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer").
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Similarity {
    /// The mean cosine over all pairs of a row of the one and a row of the other prompt; rows of zeros are left out. Of a prompt with itself
    /// it is not 1, but says how alike its rows are.
    pub of_rows: Matrix,
    /// The cosine of the mean rows.
    pub of_means: Matrix,
}

/// Compares all pairs of prompts, which are given with their names; they need not be equally long.
///
/// # Errors
/// If they are not all of one width: rows of different models have nothing in common.
pub fn similarity(prompts: &[(String, Prompt)]) -> Result<Similarity> {
    if let Some((first, rest)) = prompts.split_first()
        && let Some(other) = rest.iter().find(|(_, prompt)| prompt.width() != first.1.width())
    {
        let what = format!(
            "the rows of {} have {} columns and those of {} have {}; compare prompts of one model",
            first.0,
            first.1.width(),
            other.0,
            other.1.width()
        );
        return Err(Error::Prompt { what });
    }
    let directions: Vec<Option<Vec<f64>>> =
        prompts.iter().map(|(_, prompt)| mean_direction(prompt)).collect();
    let means: Vec<Option<Vec<f64>>> = prompts.iter().map(|(_, prompt)| direction_of_mean(prompt)).collect();
    Ok(Similarity { of_rows: products(&directions), of_means: products(&means) })
}

/// The mean of the directions of a prompt's rows. The mean cosine over all pairs of rows of two prompts is the product of theirs.
fn mean_direction(prompt: &Prompt) -> Option<Vec<f64>> {
    let (mut sum, mut direction) = (vec![0.0; prompt.width()], vec![0.0; prompt.width()]);
    let mut count = 0.0;
    for row in prompt.values().chunks_exact(prompt.width()) {
        if unit(row, &mut direction) {
            add(&mut sum, &direction, 1.0);
            count += 1.0;
        }
    }
    (count > 0.0).then(|| sum.iter().map(|s| s / count).collect())
}

fn direction_of_mean(prompt: &Prompt) -> Option<Vec<f64>> {
    let mut sum = vec![0.0; prompt.width()];
    prompt.values().chunks_exact(prompt.width()).for_each(|row| add(&mut sum, row, 1.0));
    let norm = dot(&sum, &sum).sqrt();
    (norm > 0.0).then(|| sum.iter().map(|s| s / norm).collect())
}

fn products(vectors: &[Option<Vec<f64>>]) -> Matrix {
    let product =
        |a: &Option<Vec<f64>>, b: &Option<Vec<f64>>| Some(dot(a.as_ref()?, b.as_ref()?).clamp(-1.0, 1.0));
    vectors.iter().map(|a| vectors.iter().map(|b| product(a, b)).collect()).collect()
}
