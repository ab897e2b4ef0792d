//! `docs/errors.md` has every reason that the program gives, with its code, and none that it does not give.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result};

/// Reasons, and of those of refusals the codes that they come with.
type Reasons = BTreeMap<String, BTreeSet<String>>;

/// What makes a refusal, and the code that it then has; for the first, the code follows.
const CONSTRUCTORS: [(&str, &str); 4] = [
    ("::new(", ""),
    ("Problem::state(", "FAILED_PRECONDITION"),
    ("Problem::later(", "RESOURCE_EXHAUSTED"),
    ("refuse(", "FAILED_PRECONDITION"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files under `folder` that are no tests.
fn files(folder: &str, extension: &str) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match path.file_name().and_then(|name| name.to_str()) {
                Some("tests" | "tests.rs") => {}
                _ if path.is_dir() => folders.push(path),
                _ if path.extension().is_some_and(|e| e == extension) => found.push(path),
                _ => {}
            }
        }
    }
    Ok(found)
}

fn is_reason(text: &str) -> bool {
    let is_of_one = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    text.len() > 1 && text.starts_with(|c: char| c.is_ascii_uppercase()) && text.chars().all(is_of_one)
}

/// Of jobs and backbones.
fn of_states() -> Result<Reasons> {
    let mut found = Reasons::new();
    for path in files("proto/incipit/v1", "proto")? {
        for line in fs::read_to_string(path)?.lines() {
            let name = line.trim().split(" =").next().unwrap_or_default();
            let is_one = name.starts_with("JOB_REASON_") || name.starts_with("BACKBONE_REASON_");
            if is_one && !name.ends_with("_UNSPECIFIED") {
                found.entry(name.to_owned()).or_default();
            }
        }
    }
    Ok(found)
}

/// Of refusals: the first text that is given to what makes one.
fn of_refusals() -> Result<Reasons> {
    let mut found = Reasons::new();
    for part in ["coordinator", "proto", "worker"] {
        for path in files(&format!("crates/{part}/src"), "rs")? {
            let text = fs::read_to_string(&path)?;
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            let made = CONSTRUCTORS.iter().flat_map(|(call, code_of)| {
                code.split(call).skip(1).filter_map(move |given| arguments(given, code_of))
            });
            for (code, given) in made {
                match given.strip_prefix('"').and_then(|given| given.split('"').next()) {
                    Some(reason) => {
                        assert!(is_reason(reason), "{}: {reason:?} is no reason", path.display());
                        found.entry(reason.to_owned()).or_default().insert(code);
                    }
                    // A constructor that is given it.
                    None => assert!(given.starts_with("reason"), "{}: {given:.40?}", path.display()),
                }
            }
        }
    }
    Ok(found)
}

/// The code of a refusal, and what is given behind it; nothing if no refusal is made here.
fn arguments<'a>(given: &'a str, code: &str) -> Option<(String, &'a str)> {
    let given = given.trim_start();
    if !code.is_empty() {
        return Some((code.to_owned(), given));
    }
    let given = given.strip_prefix("tonic::").unwrap_or(given).strip_prefix("Code::")?;
    let (name, rest) = given.split_once(',')?;
    let mut code = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !code.is_empty() {
            code.push('_');
        }
        code.push(letter.to_ascii_uppercase());
    }
    Some((code, rest.trim_start()))
}

#[test]
fn the_page_of_reasons_has_every_one_with_its_code_and_no_other() -> Result<()> {
    let (states, refusals) = (of_states()?, of_refusals()?);
    println!("{} reasons of jobs and backbones, {} of refusals", states.len(), refusals.len());
    assert!(states.len() > 20 && refusals.len() > 40, "the sources were not found");
    let reasons: Reasons = states.into_iter().chain(refusals).collect();

    let page = fs::read_to_string(root().join("docs/errors.md")).context("docs/errors.md")?;
    let mut rows = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with('|')) {
        for name in line.split('`').skip(1).step_by(2).filter(|name| is_reason(name)) {
            assert!(reasons.contains_key(name), "docs/errors.md has `{name}`, which nothing gives: {line}");
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells[1].strip_prefix('`').and_then(|cell| cell.strip_suffix('`'));
        if let Some(name) = name {
            assert_eq!(rows.insert(name, cells[2]), None, "docs/errors.md has two rows of `{name}`");
        }
    }
    for (name, codes) in &reasons {
        let row = rows.get(&**name);
        let row =
            row.with_context(|| format!("docs/errors.md has no row of `{name}`: add one to its table"))?;
        let told: BTreeSet<String> = row.split(", ").map(str::to_owned).collect();
        assert!(
            codes.is_empty() || told == *codes,
            "docs/errors.md: `{name}` comes with {codes:?}, not {row}"
        );
    }
    Ok(())
}
