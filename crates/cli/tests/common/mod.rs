//! The program, run as people run it, on the bundled demo model.

// Not every test file uses all of it.
#![allow(dead_code)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What a run of the program left.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Fails the test, with what the program said, unless it ended well.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in:\n{}", self.stdout))
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

/// One line of error that holds all of `parts`, nothing on standard output.
#[track_caller]
pub(crate) fn refused(ran: &Ran, parts: &[&str]) {
    assert_eq!(ran.code, 2, "stdout:\n{}\nstderr:\n{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.is_empty(), "{}", ran.stdout);
    for part in parts {
        assert!(ran.stderr.contains(part), "no {part:?} in:\n{}", ran.stderr);
    }
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

/// The program, with nothing of the environment that could change what it does.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_incipit"));
    command
        .args(args)
        .env("COLUMNS", "100")
        .env("NO_COLOR", "1")
        .env_remove("INCIPIT_ISA")
        .env_remove("INCIPIT_LOG");
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let of_ranks =
            ["RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "INCIPIT_", "OTEL_"];
        if of_ranks.iter().any(|start| name.starts_with(start)) {
            command.env_remove(&*name);
        }
    }
    command.stdin(Stdio::null());
    command
}

pub(crate) fn incipit(args: &[&str]) -> Ran {
    command(args).output().expect("the program starts").into()
}

pub(crate) fn with_stdin(args: &[&str], input: &str) -> Ran {
    let mut child = command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("the program reads");
    child.wait_with_output().expect("the program ends").into()
}

pub(crate) fn demo(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(path).display().to_string()
}

/// A training run on the demo's data: small, and evaluated on a part of it.
pub(crate) fn train(dir: &Path, out: &str, more: &[&str]) -> Ran {
    let args = train_args(dir, out, more);
    incipit(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The arguments of such a run.
pub(crate) fn train_args(dir: &Path, out: &str, more: &[&str]) -> Vec<String> {
    let (model, train, eval) = (demo("model"), demo("data/train.jsonl"), few_examples(dir));
    let out = dir.join(out).display().to_string();
    let mut args =
        vec!["train", "--json", "--model", &model, "--train", &train, "--eval", &eval, "--out", &out];
    args.extend(["--prompt-length", "4", "--batch-size", "4", "--max-input-length", "32"]);
    args.extend(["--max-target-length", "6"]);
    args.extend(more);
    args.into_iter().map(str::to_owned).collect()
}

/// The first of the demo's evaluation examples.
pub(crate) fn few_examples(dir: &Path) -> String {
    let path = dir.join("few.jsonl");
    let all = std::fs::read_to_string(demo("data/eval.jsonl")).expect("the demo's data");
    let few: Vec<&str> = all.lines().take(12).collect();
    std::fs::write(&path, few.join("\n") + "\n").expect("a temporary file");
    path.display().to_string()
}

pub(crate) fn text(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Of a page: it fetches nothing.
#[track_caller]
pub(crate) fn assert_needs_nothing_else(page: &str) {
    let page = page.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }
}

/// A file of a directory, as an argument.
pub(crate) fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}
