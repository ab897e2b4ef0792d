//! Names of resources: `jobs/trec-1`, `jobs/trec-1/checkpoints/00000500`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Problem;

/// The last part of a name: up to 63 small letters, digits and hyphens, the first a letter, the last no hyphen (AIP-122).
///
/// # Errors
/// If it is none; the problem names `field`.
pub fn check_id(field: &str, id: &str) -> Result<(), Problem> {
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let fits = id.len() <= 63
        && id.starts_with(|c: char| c.is_ascii_lowercase())
        && !id.ends_with('-')
        && id.chars().all(known);
    let what = format!(
        "is {id:?}; give up to 63 small letters, digits and hyphens, with a letter first and no hyphen last"
    );
    if fits { Ok(()) } else { Err(Problem::field(field, what)) }
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident, $collection:literal;)+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
            #[serde(transparent)]
            pub struct $name(String);

            impl $name {
                #[doc = concat!("The name that ends in `id`.\n\n# Errors\nIf that is no id; the problem names `field`.")]
                pub fn of_id(field: &str, id: &str) -> Result<Self, Problem> {
                    check_id(field, id)?;
                    Ok(Self(format!(concat!($collection, "/{}"), id)))
                }

                #[doc = concat!("The name in `text`, `", $collection, "/...`.\n\n# Errors\nIf it is none; the problem names `field`.")]
                pub fn parse(field: &str, text: &str) -> Result<Self, Problem> {
                    let id = text.strip_prefix(concat!($collection, "/"));
                    let id = id.ok_or_else(|| Problem::field(field, format!(concat!("is {:?}; give ", $collection, "/NAME"), text)))?;
                    Self::of_id(field, id)
                }

                /// Its last part.
                #[must_use]
                pub fn id(&self) -> &str {
                    &self.0[$collection.len() + 1..]
                }

                /// All of it.
                #[must_use]
                pub fn as_str(&self) -> &str {
                    &self.0
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(&self.0)
                }
            }
        )+
    };
}

names! {
    /// `jobs/{job}`.
    JobName, "jobs";
    /// `backbones/{backbone}`.
    BackboneName, "backbones";
    /// `workers/{worker}`.
    WorkerName, "workers";
    /// `prompts/{prompt}`.
    PromptName, "prompts";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_collection_and_an_id() {
        let name = JobName::parse("name", "jobs/trec-1").unwrap();
        assert_eq!((name.id(), name.as_str()), ("trec-1", "jobs/trec-1"));
        assert_eq!(JobName::of_id("job_id", "trec-1").unwrap(), name);
    }

    #[test]
    fn what_is_no_name_is_refused_with_its_field() {
        for text in ["", "jobs/", "jobs/A", "jobs/1a", "jobs/a-", "jobs/a/b", "job/a", "jobs/../a", "jobs/é"]
        {
            let problem = JobName::parse("name", text).unwrap_err();
            assert_eq!(problem.fields[0].0, "name", "{text}");
        }
        assert!(check_id("job_id", &"a".repeat(63)).is_ok());
        assert!(check_id("job_id", &"a".repeat(64)).is_err());
    }
}
