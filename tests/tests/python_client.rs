//! `examples/python`: the client does what its README says, on a cluster of one machine, and goes on when the coordinator was away.

mod common;
mod rig;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use common::{arg, command, demo, incipit, root};
use rig::{Running, free_port, tools, until};

const STEPS: usize = 120;

fn up(data: &Path, port: u16) -> Result<Running> {
    let listen = format!("127.0.0.1:{port}");
    let model = arg(root().join("demo/model").canonicalize()?);
    let up = ["up", "--data", &arg(data), "--listen", &listen, "--model", &model, "--slots", "1", "--quiet"];
    let up = Running::start(&mut command(&up)?)?;
    let get = ["backbone", "get", "model", "--coordinator", &format!("http://{listen}")];
    until("the backbone is there", 30, || Ok(incipit(&get)?.code == 0))?;
    Ok(up)
}

/// Starts the example. Its standard output is read line by line.
fn client(python: &Path, url: &str, out: &Path, more: &[&str]) -> Command {
    let mut client = Command::new(python);
    client
        .arg(root().join("examples/python/client.py"))
        .args(["--coordinator", url, "--backbone", "model", "--out"])
        .arg(out);
    client.args(["--train", &demo("data/train.jsonl"), "--eval", &demo("data/eval.jsonl")]).args(more);
    client.env_remove("INCIPIT_TOKEN").stdin(Stdio::null());
    client
}

#[test]
#[ignore = "long: a job of two minutes, and Python's packages, which scripts/test.sh fetches"]
fn the_example_trains_a_prompt_and_goes_on_over_a_restart_of_the_coordinator() -> Result<()> {
    let Some(tools) = tools("python")? else { return Ok(()) };
    let (dir, port) = (tempfile::tempdir()?, free_port()?);
    let (url, out) = (format!("http://127.0.0.1:{port}"), dir.path().join("prompt.safetensors"));
    let mut cluster = up(&dir.path().join("data"), port)?;

    let steps = STEPS.to_string();
    let more = [
        "--name",
        "example",
        "--steps",
        &steps,
        "--eval-every",
        "30",
        "--prompt-length",
        "8",
        "--batch-size",
        "8",
    ];
    let mut client = Running::start(client(&tools.join("python"), &url, &out, &more).stdout(Stdio::piped()))?;
    let lines = BufReader::new(client.0.stdout.take().context("its output")?).lines();
    let (mut seen, mut said) = (Vec::new(), Vec::new());
    for line in lines {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["step", step, "loss", ..] = words[..] {
            seen.push(step.parse::<usize>()?);
            if seen.len() == 45 {
                // The engines are gone as well: the job goes on from the checkpoint of step 30.
                ensure!(cluster.terminate(Duration::from_secs(40))? == 0);
                cluster = up(&dir.path().join("data"), port)?;
            }
        }
        said.push(line);
    }
    ensure!(client.0.wait()?.success(), "{said:#?}");
    ensure!(seen == (1..=STEPS).collect::<Vec<_>>(), "not every step once: {seen:?}");
    ensure!(said.last() == Some(&arg(&out)), "{said:#?}");

    let best = incipit(&["checkpoint", "get", "example/best", "--coordinator", &url, "--json"])?.ok()?;
    let best: Value = serde_json::from_str(&best.stdout)?;
    let file =
        best["files"].as_array().context("files")?.iter().find(|file| file["name"] == "prompt.safetensors");
    let size = file.context("a prompt")?["size"].to_string();
    ensure!(size.trim_matches('"') == std::fs::metadata(&out)?.len().to_string(), "{best}");
    let score = best["score"].as_f64().context("a score")?;
    let eval = incipit(&[
        "eval",
        "--model",
        &demo("model"),
        "--prompt",
        &arg(&out),
        "--data",
        &demo("data/eval.jsonl"),
        "--json",
    ])?;
    let eval: Value = serde_json::from_str(&eval.ok()?.stdout)?;
    println!("score {score}; incipit eval: {}", eval["metrics"]);
    ensure!(eval["metrics"]["accuracy"].as_f64() == Some(score), "{eval}");
    drop(cluster);
    Ok(())
}

#[test]
#[ignore = "long: needs Python's packages, which scripts/test.sh fetches"]
fn the_example_tells_what_is_wrong_in_a_line() -> Result<()> {
    let Some(tools) = tools("python")? else { return Ok(()) };
    let (dir, port) = (tempfile::tempdir()?, free_port()?);
    let _cluster = up(&dir.path().join("data"), port)?;
    let out = dir.path().join("prompt.safetensors");
    for (more, part) in [(&["--backbone", "nobody"][..], "nobody"), (&["--steps", "0"], "steps")] {
        let said = client(&tools.join("python"), &format!("http://127.0.0.1:{port}"), &out, more).output()?;
        let said = (said.status.code(), String::from_utf8_lossy(&said.stderr).into_owned());
        let last = said.1.lines().last().unwrap_or_default();
        ensure!(said.0 == Some(1) && last.starts_with("error: ") && last.contains(part), "{said:?}");
        println!("{last}");
    }
    ensure!(!out.exists());
    Ok(())
}
