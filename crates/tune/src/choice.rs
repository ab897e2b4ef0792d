//! Enumerations that people write by name: in flags, in files and in messages.

/// Defines an enumeration with one name a variant, for `FromStr`, `Display` and serde alike.
macro_rules! choices {
    ($(#[$doc:meta])* $type:ident, $what:literal { $($(#[$variant_doc:meta])* $variant:ident => $name:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $type {
            $($(#[$variant_doc])* #[serde(rename = $name)] $variant,)+
        }

        impl std::str::FromStr for $type {
            type Err = $crate::Error;

            fn from_str(name: &str) -> $crate::Result<Self> {
                match name {
                    $($name => Ok(Self::$variant),)+
                    _ => {
                        let choices = concat!($($name, ", "),+).trim_end_matches(", ");
                        Err($crate::Error::Choice { what: $what, given: name.to_owned(), choices })
                    }
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self { $(Self::$variant => $name,)+ })
            }
        }
    };
}

pub(crate) use choices;

/// The candidate that `word` was probably meant to be, if one is near.
pub(crate) fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let limit = word.chars().count().div_ceil(3);
    let distances = candidates.iter().map(|c| (edit_distance(word, c), *c));
    distances.filter(|(distance, _)| *distance <= limit).min_by_key(|(distance, _)| *distance).map(|(_, c)| c)
}

/// Insertions, deletions and substitutions from one word to the other (Levenshtein 1966).
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_counts_single_changes() {
        for (from, to, distance) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("lr", "rl", 2)] {
            assert_eq!(edit_distance(from, to), distance, "{from} to {to}");
        }
    }

    #[test]
    fn only_a_near_name_is_suggested() {
        assert_eq!(nearest("batchsize", &["steps", "batch-size"]), Some("batch-size"));
        assert_eq!(nearest("colour", &["steps", "batch-size"]), None);
    }
}
