//! Which label was taken for which.

use incipit_data::metrics;
use serde::Serialize;

use super::Prediction;
use crate::units;

/// More labels than this are not a classification that a table shows.
const MAX_LABELS: usize = 12;
/// Texts longer than this are answers, not labels.
const MAX_LABEL_CHARS: usize = 40;
/// The column of predictions that are no label at all.
const OTHER: &str = "(no label)";

/// Counts of target against prediction, and each label's scores.
#[derive(Serialize)]
pub(super) struct Confusion {
    /// Whether it needs more room than half the page.
    wide: bool,
    columns: Vec<String>,
    rows: Vec<Row>,
    scores: Vec<Score>,
}

#[derive(Serialize)]
struct Row {
    label: String,
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Cell {
    count: usize,
    /// Of the row, in per cent.
    share: usize,
    hit: bool,
}

#[derive(Serialize)]
struct Score {
    label: String,
    examples: String,
    precision: String,
    recall: String,
    f1: String,
}

/// The confusion of `predictions` among `labels` and the distinct targets. `None` when they are too many or too long to be labels.
pub(super) fn confusion(predictions: &[Prediction], labels: &[String]) -> Option<Confusion> {
    let column =
        |of: fn(&Prediction) -> &String| predictions.iter().map(|p| of(p).clone()).collect::<Vec<_>>();
    let counted = metrics::Confusion::new(&column(|p| &p.prediction), &column(|p| &p.target), labels);
    let (mut labels, counts) = (counted.labels, counted.counts);
    let fits = (2..=MAX_LABELS).contains(&labels.len())
        && labels.iter().all(|l| l.chars().count() <= MAX_LABEL_CHARS);
    if predictions.is_empty() || !fits {
        return None;
    }
    let has_other = counts.iter().any(|row| row[labels.len()] > 0);
    let width = labels.len() + usize::from(has_other);
    let rows = labels
        .iter()
        .zip(&counts)
        .enumerate()
        .map(|(i, (label, row))| cells(label, i, &row[..width]))
        .collect();
    let scores = (0..labels.len()).map(|i| score(&labels[i], i, &counts)).collect();
    if has_other {
        labels.push(OTHER.to_owned());
    }
    Some(Confusion { wide: width > 4, columns: labels, rows, scores })
}

fn cells(label: &str, target: usize, row: &[usize]) -> Row {
    let total: usize = row.iter().sum::<usize>().max(1);
    let cell = |(i, &count): (usize, &usize)| Cell {
        count,
        share: (100 * count + total / 2) / total,
        hit: i == target,
    };
    Row { label: label.to_owned(), cells: row.iter().enumerate().map(cell).collect() }
}

fn score(label: &str, i: usize, counts: &[Vec<usize>]) -> Score {
    let hits = counts[i][i];
    let targets: usize = counts[i].iter().sum();
    let predicted: usize = counts.iter().map(|row| row[i]).sum();
    let share = |part: usize, whole: usize| {
        if whole == 0 { "-".to_owned() } else { units::percent(part as f64 / whole as f64) }
    };
    Score {
        label: label.to_owned(),
        examples: units::count(targets as u64),
        precision: share(hits, predicted),
        recall: share(hits, targets),
        f1: share(2 * hits, targets + predicted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictions(pairs: &[(&str, &str)]) -> Vec<Prediction> {
        let one = |(target, prediction): &(&str, &str)| Prediction {
            inputs: String::new(),
            target: (*target).to_owned(),
            prediction: (*prediction).to_owned(),
            loss: None,
        };
        pairs.iter().map(one).collect()
    }

    #[test]
    fn each_target_is_counted_in_its_row_and_each_prediction_in_its_column() {
        let seen = predictions(&[("a", "a"), ("a", "b"), ("b", "b"), ("b", "what"), ("b", "b")]);
        let table = confusion(&seen, &[]).expect("two labels");
        assert_eq!(table.columns, ["a", "b", OTHER]);
        let counts: Vec<Vec<usize>> =
            table.rows.iter().map(|r| r.cells.iter().map(|c| c.count).collect()).collect();
        assert_eq!(counts, [[1, 1, 0], [0, 2, 1]]);
        assert_eq!(table.scores[1].precision, "66.7 %");
        assert_eq!(table.scores[1].recall, "66.7 %");
    }

    #[test]
    fn a_label_that_is_never_seen_has_a_row_and_no_scores() {
        let table =
            confusion(&predictions(&[("no", "no")]), &["yes".into(), "no".into()]).expect("two labels");
        assert_eq!(table.columns, ["no", "yes"]);
        assert_eq!(table.scores[0].f1, "100.0 %");
        assert_eq!(table.scores[1].recall, "-");
    }

    #[test]
    fn free_text_is_no_classification() {
        let long = "an answer that is far too long to be the name of a class";
        assert!(confusion(&predictions(&[(long, "a"), ("b", "b")]), &[]).is_none());
        assert!(confusion(&[], &["a".into(), "b".into()]).is_none());
    }
}
