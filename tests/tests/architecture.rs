//! The house rules that a program can check: which crate uses which, where `unsafe` is, how long files are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::Context;

/// What each crate may use of ours (`ARCHITECTURE.md`). Development dependencies do not count.
const ALLOWED: [(&str, &[&str]); 11] = [
    ("mesh", &[]),
    ("collective", &["mesh"]),
    ("kernels", &[]),
    ("weights", &["kernels"]),
    ("model", &["mesh", "collective", "kernels", "weights"]),
    ("data", &[]),
    ("tune", &["mesh", "collective", "kernels", "weights", "model", "data"]),
    ("proto", &[]),
    ("coordinator", &["proto"]),
    ("worker", &["collective", "kernels", "data", "tune", "proto"]),
    ("cli", &["collective", "kernels", "weights", "model", "data", "tune", "proto", "coordinator", "worker"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources() -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![root().join("crates"), root().join("tests")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 50, "the sources were not found");
    Ok(files)
}

#[test]
fn crates_use_each_other_in_one_direction() -> anyhow::Result<()> {
    let allowed = BTreeMap::from(ALLOWED);
    for entry in fs::read_dir(root().join("crates"))? {
        let path = entry?.path();
        let name = path.file_name().context("a crate has a name")?.to_string_lossy().into_owned();
        let text = fs::read_to_string(path.join("Cargo.toml"))?;
        let dependencies =
            text.split("[dependencies]").nth(1).context("no dependencies")?.split("\n[").next();
        let used = dependencies
            .unwrap_or_default()
            .lines()
            .filter_map(|l| l.strip_prefix("incipit-")?.split('.').next());
        let allowed =
            allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} is not in ARCHITECTURE.md"));
        for other in used {
            assert!(allowed.contains(&other), "{name} uses {other}, which turns an arrow round");
        }
    }
    Ok(())
}

#[test]
fn unsafe_code_is_in_kernels_in_the_memory_map_and_in_the_bindings_to_gloo_and_nccl_alone()
-> anyhow::Result<()> {
    let permission = format!("allow({}_code", "unsafe");
    for path in sources()? {
        let text = fs::read_to_string(&path)?;
        let place = path.strip_prefix(root())?;
        let known = place.starts_with("crates/kernels")
            || place == Path::new("crates/weights/src/mapped.rs")
            || place.starts_with("crates/collective/src/gloo")
            || place.starts_with("crates/collective/src/nccl");
        if text.contains(&permission) {
            assert!(known, "{} allows unsafe code", place.display());
        }
    }
    Ok(())
}

#[test]
fn the_coordinator_which_knows_nothing_of_training_has_its_defaults() {
    use incipit_coordinator::core::job::{DEFAULT_KEEP, DEFAULT_STEPS};
    let defaults = incipit_tune::spec::PartialSpec::defaults();
    assert_eq!((defaults.steps, defaults.keep), (Some(DEFAULT_STEPS), Some(DEFAULT_KEEP as usize)));
}

#[test]
fn files_stay_readable() -> anyhow::Result<()> {
    for path in sources()? {
        let text = fs::read_to_string(&path)?;
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let (lines, place) = (code.lines().count(), path.strip_prefix(root())?.display());
        assert!(lines <= 500, "{place} has {lines} lines; cut it where its parts are");
    }
    Ok(())
}
