//! The house rules that a program can check: which crate uses which, where `unsafe` is, how long files are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use anyhow::Context;
use serde_json::Value;

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

/// What cargo prints of the workspace.
fn cargo(arguments: &[&str]) -> anyhow::Result<String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let told =
        Command::new(program).args(arguments).args(["--locked", "--offline"]).current_dir(root()).output()?;
    anyhow::ensure!(told.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&told.stderr));
    Ok(String::from_utf8(told.stdout)?)
}

#[test]
fn crates_use_each_other_in_one_direction() -> anyhow::Result<()> {
    let allowed = BTreeMap::from(ALLOWED);
    let told: Value = serde_json::from_str(&cargo(&["metadata", "--no-deps", "--format-version", "1"])?)?;
    let packages = told["packages"].as_array().context("packages")?;
    let ours = |package: &Value| package["name"].as_str()?.strip_prefix("incipit-").map(str::to_owned);
    let mut seen = 0;
    for package in packages {
        let Some(name) = ours(package).filter(|name| name != "tests") else { continue };
        let allowed =
            allowed.get(name.as_str()).with_context(|| format!("{name} is not in ARCHITECTURE.md"))?;
        let dependencies = package["dependencies"].as_array().context("dependencies")?;
        for other in dependencies.iter().filter(|used| used["kind"].is_null()).filter_map(ours) {
            assert!(allowed.contains(&&*other), "{name} uses {other}, which turns an arrow round");
        }
        seen += 1;
    }
    assert_eq!(seen, ALLOWED.len());
    Ok(())
}

/// It runs where no model is, and is not to be built again for every kind of GPU.
#[test]
fn the_coordinator_links_no_tensors_no_tokenizer_and_no_gpu() -> anyhow::Result<()> {
    let tree = cargo(&["tree", "-p", "incipit-coordinator", "-e", "normal", "--prefix", "none"])?;
    assert!(tree.lines().any(|line| line.starts_with("tonic ")), "{tree}");
    for name in ["candle", "cudarc", "tokenizers", "safetensors", "gemm", "half", "cxx"] {
        let linked = tree.lines().find(|line| line.starts_with(name));
        assert_eq!(linked, None, "the coordinator links {name}");
    }
    Ok(())
}

#[test]
fn unsafe_code_is_in_kernels_the_memory_map_the_bindings_to_gloo_and_nccl_and_the_allocators_setting_alone()
-> anyhow::Result<()> {
    let permission = format!("allow({}_code", "unsafe");
    for path in sources()? {
        let text = fs::read_to_string(&path)?;
        let place = path.strip_prefix(root())?;
        let known = place.starts_with("crates/kernels")
            || place == Path::new("crates/weights/src/mapped.rs")
            || place == Path::new("crates/cli/src/allocator.rs")
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
