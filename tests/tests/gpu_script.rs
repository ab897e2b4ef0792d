//! `scripts/gpu/check.sh`, with programs and a GPU that only look like it: what it makes of what they say. Needs Python 3.9.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

const SMI: &str =
    r#"case "$*" in *query*) echo "Good GPU, 580.1, 81559" ;; *) echo "| CUDA Version: 13.0 |" ;; esac"#;
const INCIPIT: &str = r#"
case "$1" in
  --version) echo "incipit 0.1.0" ;;
  doctor) echo "ok  GPU 0 (Good GPU): --device cuda:0" ;;
  train) echo '{"metrics": {"accuracy": 0.9}}'
    while [ "$1" != --out ]; do shift; done
    mkdir -p "$2/last" && printf alone >"$2/last/prompt.safetensors" ;;
  up|worker) sleep 60 & echo $! >"$0.engine"; exec sleep 60 ;;
  coordinator) exec sleep 60 ;;
  workers) echo '[]' ;;
  backbone) [ -e "$0.engine" ] && echo "[{\"state\": \"BACKBONE_STATE_READY\", \"ranks\": [{\"pid\": $(cat "$0.engine")}]}]" ;;
  job) state=RUNNING
    case "$2" in pause) touch "$0.paused" ;; resume) rm "$0.paused" ;; esac
    [ ! -e "$0.paused" ] || state=PAUSED
    case "$2" in
      watch) for second in 0 1; do echo "{\"point\": {\"time\": \"2100-01-01T00:00:0$second.5+00:00\", \"training\": {}}}"; done ;;
      *) echo "{\"state\": \"JOB_STATE_$state\", \"progress\": {\"step\": \"1500\"}, \"createTime\": \"2099-12-31T23:59:58+00:00\",
        \"attempts\": [{\"epoch\": \"2\", \"endTime\": \"2100-01-01T00:00:00+00:00\"}]}" ;;
    esac ;;
  checkpoint) mkdir -p "$5" && printf alone >"$5/prompt.safetensors" ;;
  bench) case "$*" in *nccl*) [ "$WORLD_SIZE" = 2 ] && [ "$NCCL_HOSTID" = "rank-$RANK" ] && [ -n "$INCIPIT_STORE" ] || exit 9 ;; esac
    echo '{"median_s": 0.5, "examples": 32, "launches": 900, "useful_tflop": 120.0, "parameters": 3000000000, "dtype": "bf16",
    "loss": 2.5, "kernels": [{"name": "product 100 x 200 x 300 BF16", "launches": 10, "seconds": 0.00012}]}' ;;
esac"#;
const TESTS: &str = r#"
case "$*" in
  *--list*) echo "one_thing_holds: test"; echo "another_thing_holds: test" ;;
  *) echo "test it ... ok"; echo "test result: ok. 1 passed; 0 failed; 0 ignored" ;;
esac"#;

/// Tests of which one spoils the device for all behind it.
const FAULTY: &str = r#"
fail() { echo 'failures:'; printf '    %s\n' $2; echo "test result: FAILED. 0 passed; $1 failed;"; exit 101; }
case "$* $CUDA_LAUNCH_BLOCKING" in
  *--list*) echo 'gpu::tests::norms: test'; echo 'gpu::tests::sums: test'; echo 'of_the_host: test' ;;
  *norms*1) fail 1 gpu::tests::norms ;;
  *sums*1) echo 'test result: ok. 1 passed; 0 failed;' ;;
  *) echo CUDA_ERROR_ILLEGAL_ADDRESS; fail 2 'gpu::tests::norms gpu::tests::sums' ;;
esac"#;

/// A folder as build.sh makes it, and one of programs that the path leads to.
struct Carried {
    dir: tempfile::TempDir,
}

/// What check.sh printed and left.
struct Checked {
    code: Option<i32>,
    table: String,
    said: String,
    figures: Value,
    page: String,
}

fn program(path: &Path, body: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{body}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

impl Carried {
    /// Nothing if there is no Python to run the script, or a GPU that would be in the way.
    fn new() -> Result<Option<Self>> {
        let newer = "import sys; sys.exit(sys.version_info < (3, 9))";
        let python = Command::new("python3").args(["-S", "-c", newer]).status();
        if !python.is_ok_and(|status| status.success()) {
            println!("skipped: python3 is not here, or older than 3.9");
            return Ok(None);
        }
        if Path::new("/dev/nvidia0").exists() {
            println!("skipped: there is a GPU, and these tests are about a machine without");
            return Ok(None);
        }
        let carried = Self { dir: tempfile::tempdir()? };
        fs::create_dir_all(carried.at("gpu"))?;
        fs::create_dir_all(carried.at("path"))?;
        // Without its site, it knows of no PyTorch.
        program(&carried.at("path/python"), r#"exec python3 -S "$@""#)?;
        program(&carried.at("path/nvidia-smi"), SMI)?;
        program(&carried.at("gpu/incipit"), INCIPIT)?;
        for tests in ["kernels-tests", "model-tests", "nccl-tests"] {
            program(&carried.at("gpu").join(tests), TESTS)?;
        }
        Ok(Some(carried))
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn check(&self, carried: &str, variables: &[(&str, &str)]) -> Result<Checked> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = format!("{}:{}", self.at("path").display(), std::env::var("PATH")?);
        let mut command = Command::new(root.join("scripts/gpu/check.sh"));
        command.arg(self.at(carried)).env("PATH", path).env("OUT", self.at("out"));
        command.env("INCIPIT_PYTHON", self.at("path/python"));
        for variable in ["INCIPIT_SHARED", "INCIPIT_CHECK_PARTS", "INCIPIT_CHECK_SECONDS", "PYTHONPATH"] {
            command.env_remove(variable);
        }
        let output = command.envs(variables.iter().copied()).output()?;
        let read = |file: &str| fs::read_to_string(self.at("out").join(file)).unwrap_or_default();
        Ok(Checked {
            code: output.status.code(),
            table: String::from_utf8(output.stdout)?,
            said: String::from_utf8(output.stderr)?,
            figures: serde_json::from_str(&read("figures.json")).unwrap_or_default(),
            page: read("gpu.md"),
        })
    }
}

impl Checked {
    /// The part is in the table, with this result and these words.
    fn told(&self, part: &str, result: &str, words: &str) -> Result<()> {
        let rows: Vec<&str> =
            self.table.lines().filter(|line| line.starts_with(&format!("{part} "))).collect();
        let fits = |row: &&str| row[part.len()..].trim_start().starts_with(result) && row.contains(words);
        ensure!(rows.iter().any(fits), "{part}: {result} {words} is not in\n{}\n{}", self.table, self.said);
        Ok(())
    }
}

#[test]
fn every_part_runs_from_the_carried_file_and_they_end_in_one_table() -> Result<()> {
    let Some(carried) = Carried::new()? else { return Ok(()) };
    fs::write(carried.at("gpu/commit"), "abc1234\n")?;
    let pack = "import shutil, sys; shutil.make_archive(sys.argv[1], 'xztar', sys.argv[1])";
    let mut packed = Command::new("python3");
    packed.args(["-S", "-c", pack]).arg(carried.at("gpu"));
    ensure!(packed.status()?.success(), "it was not packed");
    let checked = carried.check("gpu.tar.xz", &[])?;
    ensure!(checked.code == Some(0), "{}\n{}", checked.table, checked.said);
    checked.told("machine", "ok", "1 x Good GPU, 80 GiB, driver 580.1, CUDA of the driver 13.0")?;
    let widths = ["losses at real widths, f32", "losses at real widths, bf16"];
    let ranks = ["ranks over NCCL, --tp 2", "ranks over NCCL, --dp 2"];
    let jobs = "the bytes of runs alone; first step after submitting 2.500 s";
    checked.told("jobs on a backbone", "ok", jobs)?;
    checked.told("jobs on a backbone, --tp 2", "ok", jobs)?;
    let others = ["doctor", "kernels against the CPU", "training", "G1 xxl", "G2 xxl"];
    for part in others.into_iter().chain(widths).chain(ranks) {
        checked.told(part, "ok", "")?;
    }
    for part in ["model", "NCCL"] {
        checked.told(&format!("{part}: one thing holds"), "ok", "1 tests")?;
        checked.told(&format!("{part}: another thing holds"), "ok", "1 tests")?;
    }
    checked.told("G1 xl, peer", "skipped", "torch")?;
    ensure!(checked.page.contains("commit abc1234"), "{}", checked.page);
    // 2 x 100 x 200 x 300 operations, ten times in 0.12 ms, are 1 TFLOP/s.
    ensure!(
        checked.page.contains("| product 100 x 200 x 300 BF16 | 10 | 0.120 | 100.0% | 1 |  |"),
        "{}",
        checked.page
    );
    ensure!(checked.figures["figures"]["G1 xl"]["ours"]["median_s"] == 0.5, "{}", checked.figures);
    Ok(())
}

#[test]
fn a_part_that_fails_is_told_with_its_cause_and_costs_no_other() -> Result<()> {
    let Some(carried) = Carried::new()? else { return Ok(()) };
    program(&carried.at("gpu/kernels-tests"), FAULTY)?;
    let sanitizer =
        "echo '========= COMPUTE-SANITIZER'; echo '========= Invalid read'; shift; shift; echo $*";
    program(&carried.at("path/compute-sanitizer"), sanitizer)?;
    let nothing = TESTS.replace("test it ... ok", "skipped on CUDA: loading the kernels");
    program(&carried.at("gpu/model-tests"), &nothing)?;
    let mut incipit = INCIPIT.replace("ok  GPU 0", "missing  GPU 0").replace(r#""launches": 900, "#, "");
    let fault = "case $CUDA_LAUNCH_BLOCKING in 1) echo the third kernel ;; *) echo CUDA_ERROR_ILLEGAL_ADDRESS ;; esac";
    write!(incipit, "\ncase \"$*\" in *small*cuda*) {fault}; exit 7 ;; esac")?;
    let other = incipit.replace("printf alone >\"$5", "printf other >\"$5");
    program(&carried.at("gpu/incipit"), &other.replace("--device cuda:0", "it is too old"))?;
    program(
        &carried.at("gpu/nccl-tests"),
        "case \"$*\" in *--list*) echo 'slow: test' ;; *) sleep 60 ;; esac",
    )?;
    let checked = carried.check("gpu", &[("INCIPIT_CHECK_SECONDS", "15")])?;
    ensure!(checked.code == Some(1), "{}", checked.table);
    checked.told("doctor", "FAILED", "missing  GPU 0 (Good GPU): it is too old")?;
    checked.told(
        "kernels against the CPU",
        "FAILED",
        "0 passed; 2 failed: gpu::tests::norms, gpu::tests::sums",
    )?;
    // Alone, what the first one's fault had spoilt is well, and launches that wait name the kernel.
    checked.told("kernels against the CPU: gpu::tests::norms", "FAILED", "0 passed; 1 failed")?;
    checked.told(
        "kernels against the CPU: gpu::tests::norms, compute-sanitizer",
        "FAILED",
        "Invalid read",
    )?;
    checked.told("kernels against the CPU: gpu::tests::sums", "ok", "1 tests")?;
    ensure!(!checked.table.contains("of_the_host"), "{}", checked.table);
    checked.told(
        "model: one thing holds",
        "FAILED",
        "there is a GPU, but: skipped on CUDA: loading the kernels",
    )?;
    checked.told("losses at real widths, f32", "FAILED", "cuda: code 7: CUDA_ERROR_ILLEGAL_ADDRESS")?;
    checked.told("losses at real widths, f32, launch by launch", "FAILED", "code 7: the third kernel")?;
    checked.told("G1 xl", "FAILED", "KeyError: 'launches'")?;
    checked.told("training", "ok", "")?;
    checked.told("jobs on a backbone", "FAILED", "NOT the bytes of runs alone")?;
    checked.told("NCCL: slow", "FAILED", "not done within")?;
    checked.told("G2 xxl", "FAILED", "no time was left")?;
    ensure!(checked.figures["rows"].as_array().context("rows")?.len() > 8, "{}", checked.figures);
    Ok(())
}

#[test]
fn parts_are_picked_by_how_their_names_begin() -> Result<()> {
    let Some(carried) = Carried::new()? else { return Ok(()) };
    let checked = carried.check("gpu", &[("INCIPIT_CHECK_PARTS", "g1 xx, NCCL")])?;
    ensure!(checked.code == Some(0), "{}\n{}", checked.table, checked.said);
    let parts: Vec<&str> = checked.table.lines().filter_map(|line| line.split("  ").next()).skip(2).collect();
    let expected =
        ["machine", "G1 xxl", "G1 xxl, peer", "NCCL: another thing holds", "NCCL: one thing holds"];
    ensure!(parts == expected, "{parts:?}");
    let refused = carried.check("gpu", &[("INCIPIT_CHECK_PARTS", "speed")])?;
    ensure!(
        refused.code == Some(1) && refused.said.contains("no part begins with 'speed'"),
        "{}",
        refused.said
    );
    Ok(())
}

#[test]
fn without_a_gpu_parts_are_skipped_and_with_one_and_no_programs_they_fail() -> Result<()> {
    let Some(carried) = Carried::new()? else { return Ok(()) };
    fs::remove_file(carried.at("gpu/model-tests"))?;
    let checked = carried.check("gpu", &[("INCIPIT_CHECK_PARTS", "model")])?;
    ensure!(checked.code == Some(1), "{}", checked.table);
    checked.told("model", "FAILED", "is not there: was the folder carried here")?;
    program(&carried.at("path/nvidia-smi"), "exit 9")?;
    let checked = carried.check("gpu", &[])?;
    ensure!(checked.code == Some(0), "{}\n{}", checked.table, checked.said);
    for part in ["machine", "doctor", "model", "training", "G1 xl"] {
        checked.told(part, "skipped", "no GPU here")?;
    }
    Ok(())
}
