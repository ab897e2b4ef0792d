//! The metrics against scikit-learn's and against SQuAD's definition; `goldens/make_metrics.py` made the
//! expected scores.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use incipit_data::metrics::{Confusion, Metric, legal_share, score, token_f1};
use serde_json::Value;

fn goldens() -> Value {
    serde_json::from_str(include_str!("goldens/metrics.json")).unwrap()
}

fn texts(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

fn strings<const N: usize>(texts: [&str; N]) -> Vec<String> {
    texts.map(str::to_owned).to_vec()
}

fn assert_close(found: f64, expected: &Value) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
}

#[test]
fn accuracy_macro_f1_and_confusion_equal_scikit_learns() {
    let goldens = goldens();
    let cases = goldens["classification"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let (predictions, targets) = (texts(&case["predictions"]), texts(&case["targets"]));
        assert_close(score(Metric::Accuracy, &predictions, &targets), &case["accuracy"]);
        assert_close(score(Metric::MacroF1, &predictions, &targets), &case["macro_f1"]);
        let confusion = Confusion::new(&predictions, &targets, &[]);
        assert_eq!(confusion.labels, texts(&case["labels"]));
        assert_eq!(serde_json::to_value(&confusion.counts).unwrap(), case["confusion"]);
    }
}

#[test]
fn token_f1_and_exact_match_equal_squads_definition() {
    let goldens = goldens();
    let answers = goldens["answers"].as_array().unwrap();
    assert!(answers.len() > 20);
    let mut predictions = Vec::new();
    let mut targets = Vec::new();
    let (mut f1, mut exact) = (0.0, 0.0);
    for answer in answers {
        let prediction = answer["prediction"].as_str().unwrap();
        let target = answer["target"].as_str().unwrap();
        assert_close(token_f1(prediction, target), &answer["token_f1"]);
        let one = score(Metric::ExactMatch, &strings([prediction]), &strings([target]));
        assert_eq!(one == 1.0, answer["exact_match"].as_bool().unwrap(), "{prediction:?} {target:?}");
        predictions.push(prediction.to_owned());
        targets.push(target.to_owned());
        f1 += answer["token_f1"].as_f64().unwrap();
        exact += one;
    }
    let count = answers.len() as f64;
    assert_close(score(Metric::TokenF1, &predictions, &targets), &Value::from(f1 / count));
    assert_close(score(Metric::ExactMatch, &predictions, &targets), &Value::from(exact / count));
}

#[test]
fn accuracy_drops_white_space_around_texts_and_nothing_else() {
    let predictions = strings([" True", "true", "True.", "False\n"]);
    let targets = strings(["True", "True", "True", "False"]);
    assert_eq!(score(Metric::Accuracy, &predictions, &targets), 0.5);
    assert_eq!(score(Metric::ExactMatch, &predictions, &targets), 1.0);
}

#[test]
fn a_class_that_only_predictions_have_is_no_class() {
    // F1 of "a" is 2·1/(1+2), and "b" only costs it a hit.
    assert_eq!(score(Metric::MacroF1, &strings(["a", "b"]), &strings(["a", "a"])), 2.0 / 3.0);
}

#[test]
fn no_predictions_score_zero() {
    for metric in Metric::ALL {
        assert_eq!(score(metric, &[], &[]), 0.0, "{metric}");
    }
    assert_eq!(legal_share(&[], &strings(["a"])), 0.0);
}

#[test]
fn the_legal_share_counts_predictions_that_are_labels() {
    let predictions = strings(["yes", " no ", "<extra_id_0>", "Yes"]);
    assert_eq!(legal_share(&predictions, &strings(["yes", "no"])), 0.5);
    assert_eq!(legal_share(&predictions, &[]), 0.0);
}

#[test]
fn the_confusion_table_has_a_row_for_labels_that_no_target_has() {
    let confusion = Confusion::new(&strings(["a", "?"]), &strings(["b", "b"]), &strings(["c", "a"]));
    assert_eq!(confusion.labels, ["a", "b", "c"]);
    assert_eq!(confusion.counts, [[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]);
    assert_eq!((confusion.other(1), confusion.other(0)), (1, 0));
}

#[test]
fn a_metric_is_known_by_its_name() {
    for metric in Metric::ALL {
        assert_eq!(metric.to_string().parse(), Ok(metric));
        assert_eq!(serde_json::to_value(metric).unwrap(), metric.name());
    }
    let message = "f1".parse::<Metric>().unwrap_err().to_string();
    assert_eq!(
        message,
        "there is no metric \"f1\"; known are accuracy, exact-match, token-f1, macro-f1, \
        positive-f1, group-exact-match and containment"
    );
}
