//! Whether a predicted noun phrase names a referent, as T5 judges the Winograd schemas.

use std::collections::BTreeSet;

/// Words that are left out of the comparison.
const DETERMINERS: [&str; 21] = [
    "a", "an", "each", "every", "few", "her", "his", "many", "much", "my", "our", "some", "that", "the",
    "their", "these", "this", "those", "which", "whose", "your",
];

/// True if the words of one text, in lower case and without determiners, are all among the other's, and both have
/// an apostrophe or neither (`Bob` does not name `Bob's hat`).
///
/// `None` for a prediction of which nothing is left: it is wrong whatever the label.
pub fn names_referent(prediction: &str, referent: &str) -> Option<bool> {
    let (prediction, referent) = (cleaned(prediction), cleaned(referent));
    if prediction.is_empty() {
        return None;
    }
    if prediction.contains('\'') != referent.contains('\'') {
        return Some(false);
    }
    // Two spaces in a row leave an empty word, which T5 counts as one.
    let words = |text: &str| -> BTreeSet<String> { text.split(' ').map(str::to_owned).collect() };
    let (prediction, referent) = (words(&prediction), words(&referent));
    Some(prediction.is_subset(&referent) || referent.is_subset(&prediction))
}

fn cleaned(text: &str) -> String {
    let text = text.trim_matches(super::is_space).to_lowercase();
    let words: Vec<&str> = text.split(' ').filter(|word| !DETERMINERS.contains(word)).collect();
    words.join(" ")
}
