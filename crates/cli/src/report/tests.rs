//! The page, from records made by hand.

use super::*;
use std::collections::BTreeMap;

fn records() -> Records {
    let evil = "</script><img src=x onerror=alert(1)> & \"more\"".to_owned();
    let prediction = |target: &str, prediction: &str| Prediction {
        inputs: evil.clone(),
        target: target.to_owned(),
        prediction: prediction.to_owned(),
        loss: Some(0.25),
    };
    let step = |step: u64| records::Step {
        step,
        loss: 9.0 / step as f64,
        lr: 0.3 / step as f64,
        seconds: 0.5,
        tokens_per_second: 5_000.0,
        examples_per_second: 40.0,
    };
    let evaluation = |step: u64, accuracy: f64| records::Evaluation {
        step,
        loss: 1.5,
        score: accuracy,
        legal: Some(0.25),
        examples: 3,
        metrics: BTreeMap::from([("accuracy".to_owned(), accuracy)]),
    };
    Records {
        settings: "model = \"models/t5\"\ntrain = \"data/subj/train.jsonl\"\nout = \"it's\"\nprompt-length = 20\nsteps = 30"
            .parse()
            .expect("TOML"),
        steps: (1..=30).map(step).collect(),
        evaluations: vec![evaluation(10, 0.5), evaluation(20, 0.75), evaluation(30, 0.75)],
        predictions: vec![prediction("a", "a"), prediction("a", "b"), prediction("b", "<b>")],
        run: records::RunFacts::default(),
        seconds: 75.0,
    }
}

#[test]
fn the_page_tells_the_run_and_trusts_no_text_in_it() {
    let page = render(&records()).expect("a page");
    assert!(page.contains("<h1>subj on t5</h1>"));
    assert!(page.contains("1 min 15 s") && page.contains("majority class 66.7 %"));
    assert!(!page.contains("<img") && !page.contains("<b>x"), "text of the data became markup");
    assert!(page.contains("&lt;img") || page.contains("&lt;&#x2f;script&gt;"));
    // Both curves, and the learning rate because it changes.
    assert_eq!(page.matches("<svg viewBox").count(), 3);
    assert!(page.contains("'it'\\''s'") || page.contains("&#x27;it"), "paths are quoted for a shell");
}

#[test]
fn the_first_of_equally_good_evaluations_is_the_best() {
    assert_eq!(records().best().map(|e| e.step), Some(20));
    let page = render(&records()).expect("a page");
    assert_eq!(page.matches("class=\"tag\"").count(), 1);
}

#[test]
fn what_should_not_be_overlooked_is_said() {
    let mut records = records();
    let said = notices(&records).join(" ");
    assert!(said.contains("25.0 %") && said.contains("LM-adapted"), "{said}");
    for evaluation in &mut records.evaluations {
        evaluation.metrics.insert("accuracy".to_owned(), 0.5);
        evaluation.legal = Some(1.0);
    }
    let said = notices(&records).join(" ");
    assert!(said.contains("nothing was learned"), "{said}");
}

#[test]
fn a_run_without_a_step_still_has_a_page() {
    let mut records = records();
    records.steps.clear();
    records.evaluations.clear();
    records.predictions.clear();
    assert!(render(&records).expect("a page").contains("No step has been recorded yet"));
}
