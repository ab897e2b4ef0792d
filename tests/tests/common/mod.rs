//! The program, run as people run it, and the files that it is run on.

// Not every test file uses all of it.
#![allow(dead_code)]

pub(crate) mod cluster;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// What a run of the program left.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        // A process that a signal ended has no code.
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

impl Ran {
    /// Fails, with what the program said, unless it ended well.
    pub(crate) fn ok(self) -> Result<Self> {
        ensure!(self.code == 0, "code {}\n{}\n{}", self.code, self.stdout, self.stderr);
        Ok(self)
    }

    /// The one line of error, which holds all of `parts`; there is nothing on standard output and nobody panicked.
    pub(crate) fn refused(&self, code: i32, parts: &[&str]) -> Result<()> {
        let said = format!("code {}\n{}\n{}", self.code, self.stdout, self.stderr);
        ensure!(self.code == code, "expected code {code}\n{said}");
        ensure!(self.stdout.is_empty() && !self.stderr.contains("panicked"), "{said}");
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let [error] = errors[..] else { bail!("{} errors are told\n{said}", errors.len()) };
        ensure!(self.stderr.trim_end().ends_with(error), "the error goes on\n{said}");
        for part in parts {
            ensure!(error.contains(part), "no {part:?} in {error:?}");
        }
        println!("{error}");
        Ok(())
    }
}

/// The program with nothing of the environment that could change what it does.
pub(crate) fn command<S: AsRef<str>>(args: &[S]) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.args(args.iter().map(AsRef::as_ref)).env("COLUMNS", "100").env("NO_COLOR", "1");
    for variable in ["INCIPIT_ISA", "INCIPIT_LOG", "RAYON_NUM_THREADS", "RANK", "WORLD_SIZE", "INCIPIT_STORE"]
    {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    Ok(command)
}

pub(crate) fn incipit<S: AsRef<str>>(args: &[S]) -> Result<Ran> {
    Ok(command(args)?.output()?.into())
}

/// The `incipit` of this build. Cargo gives a package the path of its own programs alone, so it is asked to build it (which is
/// nothing to do after `cargo test --workspace`) and to say where it lies.
pub(crate) fn program() -> Result<&'static Path> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = PROGRAM.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    found.as_deref().map_err(|error| anyhow::anyhow!("the program could not be built: {error}"))
}

fn build() -> Result<PathBuf> {
    // <target>/<profile>/deps/<this test>
    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent).context("the folder of the profile")?;
    let beside = profile.join(format!("incipit{}", std::env::consts::EXE_SUFFIX));
    let Some(cargo) = std::env::var_os("CARGO") else {
        ensure!(beside.exists(), "cargo did not start this test, and there is no {}", beside.display());
        return Ok(beside);
    };
    let name = profile.file_name().and_then(|name| name.to_str()).context("the name of the profile")?;
    let target = profile.parent().context("the target folder")?;
    let mut build = Command::new(cargo);
    // What cargo told this test of its package. Build scripts look at it: if it were there, much would be built anew.
    for (name, _) in std::env::vars_os() {
        let of_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_", "CARGO_PRIMARY_"];
        if of_package.iter().any(|start| name.to_string_lossy().starts_with(start)) {
            build.env_remove(name);
        }
    }
    let built = build
        .args(["build", "--workspace", "--bin", "incipit", "--offline", "--quiet"])
        .args(["--profile", if name == "debug" { "dev" } else { name }])
        // As this test was built, or cargo would build the program anew.
        .args(["--features", &features().join(",")])
        .arg("--target-dir")
        .arg(target)
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(root())
        .output()?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let lines = String::from_utf8(built.stdout)?;
    let messages = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    // The one thing asked for: the only message with an executable.
    let executable = messages.filter_map(|m| Some(PathBuf::from(m["executable"].as_str()?))).next();
    executable.context("cargo did not say where it is")
}

/// The features with which this test was built, those of other packages as well.
fn features() -> Vec<&'static str> {
    let gloo = ["incipit-cli/gloo", "incipit-tests/gloo"];
    let emulator = ["incipit-kernels/emulator", "incipit-tests/emulator"];
    let mut features = Vec::new();
    features.extend(gloo.into_iter().filter(|_| cfg!(feature = "gloo")));
    features.extend(emulator.into_iter().filter(|_| cfg!(feature = "emulator")));
    features
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A path as an argument.
pub(crate) fn arg(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

/// A file of the bundled demo.
pub(crate) fn demo(path: &str) -> String {
    arg(root().join("demo").join(path))
}

/// The folder with a larger model and labelled data, or `None` with a message.
pub(crate) fn shared() -> Option<PathBuf> {
    let shared = std::env::var_os("INCIPIT_SHARED").map(PathBuf::from);
    match shared {
        Some(path) if path.join("models/t5-mini-lm").is_dir() => Some(path),
        Some(path) => {
            eprintln!("skipped: INCIPIT_SHARED={} has no models/t5-mini-lm", path.display());
            None
        }
        None => {
            eprintln!("skipped: INCIPIT_SHARED names no folder with models/ and data/");
            None
        }
    }
}

/// The first lines of a file of the demo.
pub(crate) fn few(dir: &Path, file: &str, lines: usize) -> Result<String> {
    let path = dir.join(format!("few-{lines}-{}", file.replace('/', "-")));
    let text = std::fs::read_to_string(demo(file))?;
    std::fs::write(&path, text.split_inclusive('\n').take(lines).collect::<String>())?;
    Ok(arg(path))
}

/// Makes a file or directory `to` with all that `from` has.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let name = path.file_name().context("a name")?;
        if path.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(&path)?, to.join(name))?;
        } else if path.is_dir() {
            copy(&path, &to.join(name))?;
        } else {
            std::fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// All that a run leaves and that no clock wrote in: the content of files and the destinations of links, by path.
pub(crate) fn tree(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            let name = arg(path.strip_prefix(dir)?);
            if path.is_symlink() {
                found.insert(name, arg(std::fs::read_link(&path)?).into_bytes());
            } else if path.is_dir() {
                folders.push(path);
            } else if name == "metrics.jsonl" {
                found.insert(name, without_clock(&std::fs::read_to_string(&path)?)?.into_bytes());
            } else if name == "run.toml" {
                let text = std::fs::read_to_string(&path)?;
                let kept = text.split_inclusive('\n').filter(|line| !line.starts_with("out = "));
                found.insert(name, kept.collect::<String>().into_bytes());
            } else if name != "report.html" && !name.starts_with("events.out.tfevents.") {
                found.insert(name, std::fs::read(&path)?);
            }
        }
    }
    Ok(found)
}

/// Fails, with the names of what differs, unless both are the same.
pub(crate) fn same(a: &BTreeMap<String, Vec<u8>>, b: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let differ: Vec<&String> = names.into_iter().filter(|name| a.get(*name) != b.get(*name)).collect();
    ensure!(differ.is_empty(), "these differ: {differ:?}");
    Ok(())
}

fn without_clock(metrics: &str) -> Result<String> {
    let mut kept = String::new();
    for line in metrics.lines() {
        let mut fields: Map<String, Value> = serde_json::from_str(line)?;
        fields.retain(|field, _| !incipit_tune::log::CLOCK_FIELDS.contains(&field.as_str()));
        kept += &serde_json::to_string(&fields)?;
        kept.push('\n');
    }
    Ok(kept)
}
