//! A run that is killed at any moment, and goes on, ends in the same bytes as one that nothing disturbed.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use incipit_kernels::rng::Philox;

use common::{Ran, arg, command, demo, few, incipit, program, same, tree};

/// Of the moments.
const SEED: u64 = 1937;

/// Longer than any of these runs takes, even on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(300);

/// A run with a checkpoint every third step, so that a good part of its time goes into writing files.
struct Setting {
    dir: tempfile::TempDir,
    eval: String,
    steps: u64,
}

impl Setting {
    fn new(steps: u64) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let eval = few(dir.path(), "data/eval.jsonl", 30)?;
        Ok(Self { dir, eval, steps })
    }

    fn train(&self, out: &str) -> Vec<String> {
        let values = [
            ("--model", demo("model")),
            ("--train", demo("data/train.jsonl")),
            ("--eval", self.eval.clone()),
            ("--out", arg(self.dir.path().join(out))),
            ("--prompt-length", "8".to_owned()),
            ("--batch-size", "8".to_owned()),
            ("--max-input-length", "48".to_owned()),
            ("--steps", self.steps.to_string()),
            ("--eval-every", "10".to_owned()),
            ("--checkpoint-every", "3".to_owned()),
            ("--dropout", "0.1".to_owned()),
        ];
        let flags = values.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
        ["train".to_owned()].into_iter().chain(flags).collect()
    }

    fn go_on(&self, out: &str) -> Vec<String> {
        let mut args = self.train(out);
        args.push("--resume".to_owned());
        args
    }

    fn tree(&self, out: &str) -> Result<BTreeMap<String, Vec<u8>>> {
        tree(&self.dir.path().join(out))
    }

    /// Trains without any disturbance; what it leaves, and the time it took.
    fn undisturbed(&self) -> Result<(BTreeMap<String, Vec<u8>>, Duration)> {
        program()?; // built outside of the time
        let start = Instant::now();
        incipit(&self.train("undisturbed"))?.ok()?;
        let took = start.elapsed();
        let tree = self.tree("undisturbed")?;
        for name in ["prompt.npy", "adapter/adapter_model.safetensors", "best", "last", "metrics.jsonl"] {
            ensure!(tree.contains_key(name), "there is no {name} in {:?}", tree.keys());
        }
        Ok((tree, took))
    }

    fn num_lines(&self, out: &str) -> usize {
        let lines = std::fs::read_to_string(self.dir.path().join(out).join("metrics.jsonl"));
        lines.map_or(0, |text| text.lines().count())
    }
}

fn start(args: &[String]) -> Result<Child> {
    Ok(command(args)?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Kills a run (signal 9: it hears nothing of it) at random moments and lets it go on each time, until `kills` of them met it
/// alive. A run that ends before its moment is compared, and another one is begun.
fn killed_again_and_again(steps: u64, kills: usize) -> Result<()> {
    let setting = Setting::new(steps)?;
    let (undisturbed, took) = setting.undisturbed()?;
    println!("seed {SEED}; undisturbed: {took:?} for {steps} steps");
    let mut random = Philox::new(SEED, &[kills as u64]);
    let (mut killed, mut runs) = (0, 0);
    let begun = Instant::now();
    while killed < kills {
        ensure!(begun.elapsed() < PATIENCE, "only {killed} kills met the run alive");
        let out = format!("killed-{runs}");
        let mut child = start(&setting.go_on(&out))?;
        let moment = took.mul_f32(0.7 * random.uniform());
        std::thread::sleep(moment);
        let met = child.try_wait()?.is_none();
        child.kill()?;
        let ran = Ran::from(child.wait_with_output()?);
        if met && ran.code == -1 {
            killed += 1;
            println!("kill {killed} of run {runs} after {moment:?}, with {} lines", setting.num_lines(&out));
        } else {
            ran.ok()?;
            same(&setting.tree(&out)?, &undisturbed)?;
            runs += 1;
        }
    }
    let out = format!("killed-{runs}");
    incipit(&setting.go_on(&out))?.ok()?;
    same(&setting.tree(&out)?, &undisturbed)
}

#[test]
fn a_run_that_is_killed_three_times_ends_in_the_same_bytes() -> Result<()> {
    killed_again_and_again(40, 3)
}

#[test]
#[ignore = "long: ten kills of a longer run"]
fn a_run_that_is_killed_ten_times_ends_in_the_same_bytes() -> Result<()> {
    killed_again_and_again(200, 10)
}

#[cfg(unix)]
fn interrupt(child: &Child) -> Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    Ok(kill_process(Pid::from_child(child), Signal::INT)?)
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_a_checkpoint_and_the_run_ends_in_the_same_bytes() -> Result<()> {
    let setting = Setting::new(40)?;
    let (undisturbed, _) = setting.undisturbed()?;
    // The step at which it stops lies in the middle, and is the end of no interval.
    let child = start(&setting.train("stopped"))?;
    let begun = Instant::now();
    while setting.num_lines("stopped") < 5 {
        ensure!(begun.elapsed() < PATIENCE, "the run makes no steps");
        std::thread::sleep(Duration::from_millis(1));
    }
    interrupt(&child)?;
    let ran = Ran::from(child.wait_with_output()?);
    let said = ran.stderr;
    ensure!(ran.code == 130, "code {}\n{said}", ran.code);
    ensure!(said.contains("--resume"), "it does not say how to go on\n{said}");
    let out = setting.dir.path().join("stopped");
    let reached = last_step(&out)?;
    println!("stopped after step {reached}");
    ensure!((4..40).contains(&reached), "stopped after step {reached}");
    let lines = tree(&out)?.remove("metrics.jsonl").unwrap_or_default();
    let lines = String::from_utf8(lines)?;
    ensure!(lines.lines().filter(|line| line.contains(r#""event":"step""#)).count() as u64 == reached);
    let resumed = incipit(&setting.go_on("stopped"))?.ok()?;
    ensure!(resumed.stderr.contains(&format!("after step {reached}")), "{}", resumed.stderr);
    let (resumed, undisturbed) = (without_older(setting.tree("stopped")?), without_older(undisturbed));
    same(&resumed, &undisturbed)
}

/// The step of the checkpoint that `last` points to.
fn last_step(out: &Path) -> Result<u64> {
    let last = arg(std::fs::read_link(out.join("last"))?);
    Ok(last.trim_start_matches(|c: char| !c.is_ascii_digit()).parse()?)
}

/// Without the checkpoints that neither `best` nor `last` points to: the one of the interruption is kept in place of another.
fn without_older(mut tree: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let linked: Vec<String> = ["best", "last"]
        .iter()
        .filter_map(|link| Some(String::from_utf8_lossy(tree.get(*link)?).into_owned()))
        .collect();
    tree.retain(|name, _| {
        !name.starts_with("checkpoints/") || linked.iter().any(|link| name.starts_with(link.as_str()))
    });
    tree
}
