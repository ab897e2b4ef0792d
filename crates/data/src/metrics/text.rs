//! SQuAD's comparison of answers, as its evaluation script (version 2.0) defines it.

use std::collections::HashMap;

/// An answer in lower case, without ASCII punctuation and the words a, an and the, and with single spaces
/// between the others.
pub fn normalize_answer(answer: &str) -> String {
    let kept: String = answer.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut without_articles = String::with_capacity(kept.len());
    let mut rest = kept.as_str();
    while !rest.is_empty() {
        // An article is a whole run of word characters: "a–b" has one, though no space stands beside it.
        let word = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
        let gap = rest[word..].find(char::is_alphanumeric).map_or(rest.len(), |gap| word + gap);
        match &rest[..word] {
            "a" | "an" | "the" => without_articles.push(' '),
            other => without_articles.push_str(other),
        }
        without_articles.push_str(&rest[word..gap]);
        rest = &rest[gap..];
    }
    let words: Vec<&str> = without_articles.split(is_space).filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

/// White space as Python has it, which counts the four separators of ASCII.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The harmonic mean of precision and recall over the two answers' normalised tokens, repeated ones counted
/// as often as both have them. Where an answer has no tokens it is 1 if neither has, else 0.
pub fn token_f1(prediction: &str, target: &str) -> f64 {
    let (prediction, target) = (normalize_answer(prediction), normalize_answer(target));
    if prediction.is_empty() || target.is_empty() {
        return f64::from(prediction == target);
    }
    let mut unmatched: HashMap<&str, usize> = HashMap::new();
    let mut num_target = 0_usize;
    for token in target.split(' ') {
        *unmatched.entry(token).or_default() += 1;
        num_target += 1;
    }
    let (mut num_prediction, mut common) = (0_usize, 0_usize);
    for token in prediction.split(' ') {
        num_prediction += 1;
        if let Some(count) = unmatched.get_mut(token).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    2.0 * common as f64 / (num_prediction + num_target) as f64
}

/// [`token_f1`] against the best of several answers, as SQuAD's script of version 1.1 and ReCoRD's have it: texts
/// with nothing in common score 0, even where neither has a token.
pub fn best_token_f1(prediction: &str, answers: &[String]) -> f64 {
    let f1 = |answer: &String| match normalize_answer(answer).is_empty() {
        true => 0.0,
        false => token_f1(prediction, answer),
    };
    answers.iter().map(f1).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_are_normalised_as_squad_does() {
        assert_eq!(normalize_answer("The  U.S. (an) Army's\tÉCOLE"), "us armys école");
        assert_eq!(normalize_answer("a–b theatre another"), "–b theatre another");
        assert_eq!(normalize_answer("the a, an!"), "");
    }

    #[test]
    fn token_f1_counts_repeated_tokens_once_each() {
        assert_eq!(token_f1("cat cat cat", "cat dog"), 2.0 / 5.0);
        assert_eq!(token_f1("the", "a"), 1.0);
        assert_eq!(token_f1("", "cat"), 0.0);
    }

    proptest! {
        #[test]
        fn token_f1_is_symmetric_within_bounds_and_one_for_equals(
            a in "[ab the,–é ]{0,16}",
            b in "[ab the,–é ]{0,16}",
        ) {
            let f1 = token_f1(&a, &b);
            prop_assert!((0.0..=1.0).contains(&f1));
            prop_assert_eq!(f1, token_f1(&b, &a));
            prop_assert_eq!(token_f1(&a, &a), 1.0);
        }

        #[test]
        fn normalising_any_text_twice_changes_nothing_more(text in "\\PC{0,24}") {
            let once = normalize_answer(&text);
            prop_assert_eq!(normalize_answer(&once), once);
        }
    }
}
