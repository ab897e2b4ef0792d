//! F1 scores of classes. Pairs are of a prediction and its target.

use super::mean;

/// What is counted of a class for its F1.
#[derive(Default)]
struct ClassCounts {
    predicted: usize,
    gold: usize,
    both: usize,
}

impl ClassCounts {
    fn add(&mut self, predicted: bool, gold: bool) {
        self.predicted += usize::from(predicted);
        self.gold += usize::from(gold);
        self.both += usize::from(predicted && gold);
    }

    /// 0 for a class that is neither predicted nor right anywhere.
    fn f1(&self) -> f64 {
        match self.predicted + self.gold {
            0 => 0.0,
            sum => 2.0 * self.both as f64 / sum as f64,
        }
    }
}

/// Mean F1 of the labels.
pub(super) fn macro_f1(pairs: &[(&str, &str)], labels: &[&str]) -> f64 {
    mean(labels.iter().map(|&label| {
        let mut class = ClassCounts::default();
        pairs.iter().for_each(|&(prediction, target)| class.add(prediction == label, target == label));
        class.f1()
    }))
}

/// F1 of the last label. A prediction that is no label is taken for the opposite of its target.
pub(super) fn positive_f1(pairs: &[(&str, &str)], labels: &[&str]) -> f64 {
    let Some(&positive) = labels.last() else {
        return 0.0;
    };
    let mut class = ClassCounts::default();
    for &(prediction, target) in pairs {
        let gold = target == positive;
        let predicted = if labels.contains(&prediction) { prediction == positive } else { !gold };
        class.add(predicted, gold);
    }
    class.f1()
}
