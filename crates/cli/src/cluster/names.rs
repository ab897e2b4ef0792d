//! Names as people write them on the command line: `j-1`, `j-1/best`, `greeter/3`.

use incipit_proto::names::{BackboneName, JobName, PromptName, WorkerName, check_id};

type Parsed = Result<String, String>;

macro_rules! of_collection {
    ($($(#[$doc:meta])* $function:ident, $type:ident, $field:literal;)+) => {
        $(
            $(#[$doc])*
            pub(crate) fn $function(text: &str) -> Parsed {
                let name = if text.contains('/') { $type::parse($field, text) } else { $type::of_id($field, text) };
                name.map(|name| name.to_string()).map_err(|problem| problem.message)
            }
        )+
    };
}

of_collection! {
    /// `j-1` or `jobs/j-1`, as `jobs/j-1`.
    job, JobName, "job";
    /// `base` or `backbones/base`, as `backbones/base`.
    backbone, BackboneName, "backbone";
    /// `w-1` or `workers/w-1`, as `workers/w-1`.
    worker, WorkerName, "worker";
    /// `greeter` or `prompts/greeter`, as `prompts/greeter`.
    prompt, PromptName, "prompt";
}

/// The last part of a new resource's name.
pub(crate) fn new_id(text: &str) -> Parsed {
    check_id("name", text).map(|()| text.to_owned()).map_err(|problem| problem.message)
}

/// `j-1`, `j-1/best`, `j-1/last`, `j-1/500` or the whole name, as `jobs/j-1/checkpoints/00000500`. A job alone is its best.
pub(crate) fn checkpoint(text: &str) -> Parsed {
    let short = text.strip_prefix("jobs/").unwrap_or(text);
    let (id, step) = match short.split_once("/checkpoints/").or_else(|| short.split_once('/')) {
        Some((id, step)) => (id, step),
        None => (short, "best"),
    };
    let step = match step {
        "best" | "last" => step.to_owned(),
        number => {
            let wrong = || format!("{number:?} is no step; give JOB/best, JOB/last or JOB/500");
            format!("{:08}", number.parse::<u64>().map_err(|_| wrong())?)
        }
    };
    Ok(format!("{}/checkpoints/{step}", job(id)?))
}

/// `greeter`, `greeter/3`, `greeter/latest` or the whole name, as `prompts/greeter/versions/3`. A prompt alone is its latest.
pub(crate) fn prompt_version(text: &str) -> Parsed {
    let short = text.strip_prefix("prompts/").unwrap_or(text);
    let (id, version) = match short.split_once("/versions/").or_else(|| short.split_once('/')) {
        Some((id, version)) => (id, version),
        None => (short, "latest"),
    };
    if version != "latest" && !version.parse::<u64>().is_ok_and(|number| number > 0) {
        return Err(format!("{version:?} is no version; give PROMPT/3 or PROMPT/latest"));
    }
    Ok(format!("{}/versions/{version}", prompt(id)?))
}

/// The same, but one version and no other.
pub(crate) fn numbered_version(text: &str) -> Parsed {
    let name = prompt_version(text)?;
    if name.ends_with("/latest") {
        return Err("give the version as well: PROMPT/3".to_owned());
    }
    Ok(name)
}

/// `key=value`.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no label; give KEY=VALUE")),
    }
}

/// `jobs/j-1` as `j-1`, `jobs/j-1/checkpoints/00000500` as `j-1/500`, `prompts/greeter/versions/3` as `greeter/3`.
pub(crate) fn short(name: &str) -> String {
    let parts: Vec<&str> = name.split('/').collect();
    match parts[..] {
        [_, id] => id.to_owned(),
        [_, id, "checkpoints", step] => {
            format!("{id}/{}", step.parse::<u64>().map_or_else(|_| step.to_owned(), |step| step.to_string()))
        }
        [_, id, _, last] => format!("{id}/{last}"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_be_short_or_whole() {
        assert_eq!(job("j-1").unwrap(), "jobs/j-1");
        assert_eq!(job("jobs/j-1").unwrap(), "jobs/j-1");
        assert_eq!(backbone("base").unwrap(), "backbones/base");
        assert_eq!(worker("workers/w").unwrap(), "workers/w");
        for wrong in ["", "J", "backbones/j", "jobs/", "j-", "j/1"] {
            assert!(job(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_checkpoint_is_a_jobs_best_unless_told_otherwise() {
        for (text, name) in [
            ("j", "jobs/j/checkpoints/best"),
            ("jobs/j", "jobs/j/checkpoints/best"),
            ("j/last", "jobs/j/checkpoints/last"),
            ("j/500", "jobs/j/checkpoints/00000500"),
            ("jobs/j/checkpoints/00000500", "jobs/j/checkpoints/00000500"),
            ("jobs/j/checkpoints/best", "jobs/j/checkpoints/best"),
        ] {
            assert_eq!(checkpoint(text).unwrap(), name, "{text}");
        }
        for wrong in ["", "j/", "j/first", "j/-1", "j/checkpoints", "J/best", "j/1/2"] {
            assert!(checkpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_prompt_is_its_latest_version_unless_told_otherwise() {
        assert_eq!(prompt_version("p").unwrap(), "prompts/p/versions/latest");
        assert_eq!(prompt_version("p/3").unwrap(), "prompts/p/versions/3");
        assert_eq!(prompt_version("prompts/p/versions/3").unwrap(), "prompts/p/versions/3");
        for wrong in ["p/0", "p/best", "p/", "P/1"] {
            assert!(prompt_version(wrong).is_err(), "{wrong}");
        }
        assert!(numbered_version("p").is_err());
        assert_eq!(numbered_version("p/3").unwrap(), "prompts/p/versions/3");
    }

    #[test]
    fn what_is_printed_can_be_given_back() {
        for name in ["jobs/j-1", "backbones/base"] {
            assert!(name.ends_with(&format!("/{}", short(name))));
        }
        for name in ["jobs/j/checkpoints/00000500", "jobs/j/checkpoints/best"] {
            assert_eq!(checkpoint(&short(name)).unwrap(), name);
        }
        assert_eq!(prompt_version(&short("prompts/p/versions/12")).unwrap(), "prompts/p/versions/12");
    }

    #[test]
    fn a_label_has_a_key() {
        assert_eq!(label("team=a=b").unwrap(), ("team".to_owned(), "a=b".to_owned()));
        assert!(label("=x").is_err() && label("x").is_err());
    }
}
