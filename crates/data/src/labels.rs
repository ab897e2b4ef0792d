//! From what a data file holds to the words that the model writes.

use std::fmt;
use std::str::FromStr;

/// A map from the labels in a data file to the texts that stand for them: `0=False,1=True`.
///
/// It is applied to the whole target, after the template; a label that it does not hold is an error. White
/// space around keys and texts is dropped. A text can hold `=`, and neither can hold a comma.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelMap(Vec<(String, String)>);

/// Why a label map was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelMapError {
    /// No entries at all.
    #[error("the label map is empty; write label=text, separated by commas, as in 0=False,1=True")]
    Empty,
    /// An entry without `=`, or with nothing on one of its sides.
    #[error(
        "the entry {entry:?} of the label map is not label=text; write entries separated by commas, \
         as in 0=False,1=True (a text cannot have a comma in it)"
    )]
    Entry {
        /// The entry.
        entry: String,
    },
    /// Two entries for one label.
    #[error("the label map has {key:?} twice; keep one of the entries")]
    Duplicate {
        /// The label.
        key: String,
    },
}

impl LabelMap {
    /// The map of these labels, of which none is twice, and texts.
    pub(crate) fn of<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        Self(entries.map(|(key, text)| (key.to_owned(), text.to_owned())).collect())
    }

    /// The text for a label.
    pub fn get(&self, label: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == label).map(|(_, text)| text.as_str())
    }

    /// The texts, in the order in which they were given.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, text)| text.as_str())
    }
}

impl FromStr for LabelMap {
    type Err = LabelMapError;

    fn from_str(map: &str) -> Result<Self, LabelMapError> {
        if map.trim().is_empty() {
            return Err(LabelMapError::Empty);
        }
        let mut entries: Vec<(String, String)> = Vec::new();
        for entry in map.split(',') {
            let (key, text) = entry
                .split_once('=')
                .map(|(key, text)| (key.trim(), text.trim()))
                .filter(|(key, text)| !key.is_empty() && !text.is_empty())
                .ok_or_else(|| LabelMapError::Entry { entry: entry.to_owned() })?;
            if entries.iter().any(|(other, _)| other == key) {
                return Err(LabelMapError::Duplicate { key: key.to_owned() });
            }
            entries.push((key.to_owned(), text.to_owned()));
        }
        Ok(Self(entries))
    }
}

impl fmt::Display for LabelMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, text)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{key}={text}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_map_reads_what_it_writes() {
        let map: LabelMap = "0=False, 1 = True,eq=a=b".parse().unwrap();
        assert_eq!(map.get("1"), Some("True"));
        assert_eq!(map.get("eq"), Some("a=b"));
        assert_eq!(map.get("2"), None);
        assert_eq!(map.texts().collect::<Vec<_>>(), ["False", "True", "a=b"]);
        assert_eq!(map.to_string(), "0=False,1=True,eq=a=b");
        assert_eq!(map.to_string().parse::<LabelMap>().unwrap(), map);
    }

    #[test]
    fn a_label_map_that_is_none_is_refused() {
        let refusal = |map: &str| map.parse::<LabelMap>().unwrap_err();
        assert_eq!(refusal(" "), LabelMapError::Empty);
        assert_eq!(refusal("0=a,0=b"), LabelMapError::Duplicate { key: "0".into() });
        for bad in ["0", "0=", "=a", "0=a,", "0=a,,1=b"] {
            assert!(matches!(refusal(bad), LabelMapError::Entry { .. }), "{bad:?}");
        }
    }
}
