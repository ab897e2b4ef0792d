//! All rows of a vocabulary together: what a prompt's rows are held against.

use incipit_kernels::{Frozen, rng::Philox};
use rayon::prelude::*;
use serde::Serialize;

use super::Norms;
use super::neighbours::BLOCK;
use super::vectors::{add, mean_of_pairs, norm};

/// Random vectors that are drawn.
const RANDOM: usize = 64;
/// Distinguishes their numbers from all others.
const STREAM: u64 = u64::from_be_bytes(*b"look at ");

/// What is known of all rows of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct VocabularyRows {
    /// How many there are.
    pub size: usize,
    /// Of all that are finite; `None` if none is.
    pub norms: Option<Norms>,
    /// Rows of zeros, or with a number that is not finite: they have no direction, and are nobody's neighbours.
    pub undirected: usize,
    /// The mean cosine over all pairs of the others: what the tightness of rows drawn by lot is on average.
    pub tightness: Option<f64>,
}

/// Sums over the rows of a table.
pub(super) struct Scan {
    size: usize,
    /// Of the finite rows.
    norms: Vec<f64>,
    /// By column, of the rows that have a direction: of their numbers, of the squares of these, and of their directions'.
    sums: Vec<f64>,
    squares: Vec<f64>,
    directions: Vec<f64>,
}

impl Scan {
    pub(super) fn of(table: &Frozen) -> Self {
        let blocks: Vec<usize> = (0..table.rows()).step_by(BLOCK).collect();
        let parts: Vec<Self> = blocks.into_par_iter().map(|first| Self::of_block(table, first)).collect();
        // In the order of the rows, however many threads there are.
        parts.into_iter().fold(Self::empty(table.cols()), Self::and)
    }

    fn empty(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        Self { size: 0, norms: Vec::new(), sums: zeros(), squares: zeros(), directions: zeros() }
    }

    fn of_block(table: &Frozen, first: usize) -> Self {
        let mut scan = Self::empty(table.cols());
        let mut row = vec![0.0; table.cols()];
        for id in first..table.rows().min(first + BLOCK) {
            table.copy_row(id, &mut row);
            scan.size += 1;
            let norm = norm(&row);
            if norm.is_finite() {
                scan.norms.push(norm);
                if norm > 0.0 {
                    add(&mut scan.sums, &row, 1.0);
                    add(&mut scan.directions, &row, 1.0 / norm);
                    scan.squares.iter_mut().zip(&row).for_each(|(sum, v)| *sum += f64::from(*v).powi(2));
                }
            }
        }
        scan
    }

    fn and(mut self, other: Self) -> Self {
        for (sums, more) in [
            (&mut self.sums, other.sums),
            (&mut self.squares, other.squares),
            (&mut self.directions, other.directions),
        ] {
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
        self.size += other.size;
        self.norms.extend(other.norms);
        self
    }

    fn directed(&self) -> usize {
        self.norms.iter().filter(|norm| **norm > 0.0).count()
    }

    pub(super) fn vocabulary(self) -> VocabularyRows {
        let directed = self.directed();
        VocabularyRows {
            size: self.size,
            undirected: self.size - directed,
            tightness: mean_of_pairs(&self.directions, directed),
            norms: Norms::of(self.norms),
        }
    }

    /// Vectors end to end, whose numbers are normal with each column's mean and deviation; none where no row has a direction.
    pub(super) fn random_vectors(&self) -> Vec<f32> {
        let count = self.directed() as f64;
        if count == 0.0 {
            return Vec::new();
        }
        let column = |(sum, squares): (&f64, &f64)| {
            let mean = sum / count;
            (mean, (squares / count - mean * mean).max(0.0).sqrt())
        };
        let columns: Vec<(f64, f64)> = self.sums.iter().zip(&self.squares).map(column).collect();
        let mut random = Philox::new(0, &[STREAM]);
        let mut number =
            |(mean, deviation): &(f64, f64)| (mean + deviation * f64::from(random.normal())) as f32;
        (0..RANDOM).flat_map(|_| &columns).map(&mut number).collect()
    }
}
