//! A prompt of one task on another that asks the same in other words.

use super::Task;
use crate::labels::LabelMap;

/// Tasks whose labels mean the same, in the same order.
const PARAPHRASE: [&str; 2] = ["mrpc", "qqp"];

/// From the labels of the task `trained` to those of the task `evaluated`, for the predictions of a prompt of the one on
/// the other: `duplicate` of QQP is `equivalent` of MRPC, and the reverse (Lester et al. 2021, table 2). None unless the two
/// are that pair. Targets are put into the prompt's words by the map with the tasks exchanged.
pub fn transferred_labels(trained: &Task, evaluated: &Task) -> Option<LabelMap> {
    let is_pair = trained.name != evaluated.name
        && [trained, evaluated].iter().all(|task| PARAPHRASE.contains(&task.name));
    let entries = || trained.labels.iter().copied().zip(evaluated.labels.iter().copied());
    is_pair.then(|| LabelMap::of(entries()))
}
