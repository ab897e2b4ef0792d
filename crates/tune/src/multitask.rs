//! Prompts of several tasks that share rows: those of one task are rows for all tasks, and rows of its own (the released code of Lester et al.
//! 2021 calls this multitask prompts, by concatenation).
//!
//! A task's directory `out/NAME` is one of a training run, whose prompt serves alone: the shared rows stand before its own. Beside the tasks
//! lies `multitask.json`, which lists them.

use std::path::Path;

use crate::{
    Error, Result,
    checkpoint::MANIFEST,
    group::{self, Kind},
    spec::{PartialSpec, TrainSpec},
};

/// The file in the directory of several tasks that lists them.
pub const FILE: &str = "multitask.json";

/// Several tasks as a group of runs. They go on from the newest step of which all have a checkpoint, and what ends one ends all.
pub const MULTITASK: Kind = Kind { file: FILE, what: "run of several tasks", close: |_, _| Ok(()) };

/// The specifications of the tasks: what `flags`, the task's part of the file `tasks` and, with `resume`, the directory say. `flags.out` is
/// the directory of all. Each table of the file is a task, by the name of its directory, with settings by the names of the flags.
///
/// # Errors
/// As [`TrainSpec::resolve`]; also if there are fewer than two tasks, or they differ in what a step of all has in common.
pub fn resolve(flags: &PartialSpec, tasks: Option<&Path>, resume: bool) -> Result<Vec<TrainSpec>> {
    let Some(out) = flags.out.clone().filter(|out| !out.as_os_str().is_empty()) else {
        return Err(Error::spec("out", &"is missing; pass a directory for the tasks"));
    };
    let named: Vec<(String, PartialSpec)> = match tasks {
        Some(path) => PartialSpec::read_several(path)?,
        None if resume && out.join(FILE).exists() => {
            let members = group::list(&out, FILE, "")?;
            members.into_iter().map(|member| (member.dir, PartialSpec::default())).collect()
        }
        None => return Err(Error::spec("tasks", &"is missing; pass a file with a table for each task")),
    };
    if resume && out.join(FILE).exists() {
        let began: Vec<String> = group::list(&out, FILE, "")?.into_iter().map(|member| member.dir).collect();
        let now: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
        if began != now {
            return Err(Error::OtherSpec {
                flag: "tasks".into(),
                was: began.join(", "),
                now: now.join(", "),
            });
        }
    }
    let spec = |(name, of_task): (String, PartialSpec)| {
        check_name(&name)?;
        let flags = PartialSpec { out: Some(out.join(name)), ..flags.clone() };
        TrainSpec::resolve(flags.over(of_task), None, resume)
    };
    let specs = named.into_iter().map(spec).collect::<Result<Vec<_>>>()?;
    check(&specs.iter().collect::<Vec<_>>())?;
    Ok(specs)
}

/// Checks that a directory can have a task's name.
///
/// # Errors
/// If it cannot.
pub fn check_name(name: &str) -> Result<()> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let fits = (1..=64).contains(&name.len()) && name.chars().all(is_plain);
    if !fits || name.starts_with('.') || name == MANIFEST {
        let what = format!(
            "names a task {name:?}, which is to be a directory; use up to 64 letters, digits, -, _ and ., with no . in front"
        );
        return Err(Error::spec("tasks", &what));
    }
    Ok(())
}

/// What of a task's settings is for all tasks, which [`check`] holds to be the same, and what is its own.
#[must_use]
pub fn divide(spec: PartialSpec) -> (PartialSpec, PartialSpec) {
    let common = PartialSpec {
        shared_length: spec.shared_length,
        prompt_placement: spec.prompt_placement,
        method: spec.method,
        recipe: spec.recipe,
        optimizer: spec.optimizer,
        lr: spec.lr,
        schedule: spec.schedule,
        warmup_steps: spec.warmup_steps,
        weight_decay: spec.weight_decay,
        parameter_scaling: spec.parameter_scaling,
        steps: spec.steps,
        seed: spec.seed,
        eval_every: spec.eval_every,
        checkpoint_every: spec.checkpoint_every,
        keep: spec.keep,
        patience: spec.patience,
        ..PartialSpec::default()
    };
    let own = PartialSpec {
        shared_length: None,
        prompt_placement: None,
        method: None,
        recipe: None,
        optimizer: None,
        lr: None,
        schedule: None,
        warmup_steps: None,
        weight_decay: None,
        parameter_scaling: None,
        steps: None,
        seed: None,
        eval_every: None,
        checkpoint_every: None,
        keep: None,
        patience: None,
        ..spec
    };
    (common, own)
}

/// Checks that the tasks have in common what a step of all, and the rows that they share, need.
///
/// # Errors
/// If they have not, or are fewer than two.
pub fn check(specs: &[&TrainSpec]) -> Result<()> {
    let Some((first, others)) = specs.split_first().filter(|(_, others)| !others.is_empty()) else {
        return Err(Error::spec(
            "tasks",
            &"names fewer than two tasks; train one alone with `incipit train`",
        ));
    };
    if first.shared_length.is_none() {
        return Err(Error::spec("shared-length", &"is missing; pass how many rows the tasks share"));
    }
    let common = |spec: &TrainSpec| {
        [
            ("model", spec.model.clone()),
            ("dtype", spec.dtype.to_string()),
            ("device", spec.device.to_string()),
            ("tp", spec.tp.to_string()),
            ("dp", spec.dp.to_string()),
            ("prompt-placement", spec.prompt_placement.to_string()),
            ("recipe", spec.recipe.to_string()),
            ("lr", spec.lr.to_string()),
            ("schedule", spec.schedule.to_string()),
            ("warmup-steps", spec.warmup_steps.to_string()),
            ("shared-length", format!("{:?}", spec.shared_length)),
            ("seed", spec.seed.to_string()),
            ("steps", spec.steps.to_string()),
            ("eval-every", spec.eval_every.to_string()),
            ("checkpoint-every", spec.checkpoint_every.to_string()),
            ("keep", spec.keep.to_string()),
            ("optimizer", format!("{:?}", spec.optimizer_kind())),
        ]
    };
    for other in others {
        let differs = common(first).into_iter().zip(common(other)).find(|(one, other)| one != other);
        if let Some(((flag, _), _)) = differs {
            let what = "differs between tasks that share rows; say it once, on the command line";
            return Err(Error::spec(flag, &what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_setting_is_for_all_tasks_or_one_tasks_own() {
        let more = PartialSpec {
            recipe: Some(crate::recipe::Recipe::Paper),
            train: Some("train.jsonl".into()),
            shared_length: Some(3),
            patience: Some(2),
            ..PartialSpec::default()
        };
        let whole = more.over(PartialSpec::defaults());
        let keys = |spec: &PartialSpec| -> BTreeSet<String> {
            let value = serde_json::to_value(spec).unwrap();
            value.as_object().unwrap().keys().cloned().collect()
        };
        let (common, own) = divide(whole.clone());
        assert_eq!(keys(&common).intersection(&keys(&own)).count(), 0, "said twice");
        assert_eq!(own.over(common), whole, "nothing is lost");
    }

    #[test]
    fn a_tasks_name_can_be_a_directory() {
        for name in ["a", "boolq-2", "v1.1_x", &"x".repeat(64)] {
            check_name(name).unwrap();
        }
        for name in ["", ".a", "..", "a/b", "a b", "é", "MANIFEST", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
