//! A cluster of real processes whose files do not travel, or whose coordinator will not have a worker any more: what is not concerned goes on,
//! what is says so, and what people ask for is done.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::cluster::{Cluster, demo, engines_of, id, spec, trained};
use incipit_proto::v1::{Checkpoint, Job, JobReason, JobState, TrainingSpec, data_source::Source};
use rustix::process::Signal;

fn blobs(dir: &Path) -> PathBuf {
    dir.join("coordinator/blobs")
}

/// Where the coordinator keeps a blob.
fn blob(dir: &Path, digest: &str) -> PathBuf {
    blobs(dir).join(&digest[..2]).join(&digest[2..])
}

/// Changes a byte of a file.
fn damage(path: &Path) -> Result<()> {
    let mut bytes = std::fs::read(path)?;
    bytes[100] ^= 1;
    Ok(std::fs::write(path, bytes)?)
}

/// Takes the coordinator's blobs away, or brings them back.
fn set_blobs(dir: &Path, there: bool) -> Result<()> {
    let (blobs, away) = (blobs(dir), dir.join("away"));
    if there {
        std::fs::remove_file(&blobs)?;
        std::fs::rename(away, blobs)?;
    } else {
        std::fs::rename(&blobs, away)?;
        std::fs::write(blobs, "no directory")?;
    }
    Ok(())
}

/// Waits until a job's log has a line with this text.
fn wait_for_line(cluster: &Cluster, job: &str, text: &str) -> Result<()> {
    cluster.wait_for(text, |cluster| {
        let lines = cluster.log(&format!("jobs/{job}"))?;
        Ok(lines.iter().any(|line| line.contains(text)).then_some(()))
    })
}

#[test]
fn a_dead_engine_is_noticed_and_a_job_cancelled_while_checkpoints_cannot_be_stored() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    let backbone = cluster.wait_ready("b")?;
    let often = |seed| TrainingSpec { checkpoint_every: Some(5), ..spec(seed, 1_000_000) };
    cluster.submit("j", "b", often(1), &id())?;
    cluster.submit("k", "b", often(2), &id())?;
    cluster.wait_for("a checkpoint", |cluster| {
        Ok(cluster.job("j")?.progress.filter(|progress| progress.committed_step >= 5).map(drop))
    })?;
    set_blobs(dir.path(), false)?;
    wait_for_line(&cluster, "j", "its checkpoint cannot be stored")?;
    wait_for_line(&cluster, "k", "its checkpoint cannot be stored")?;
    let told = std::fs::read_to_string(dir.path().join("w1.log"))?;
    ensure!(told.contains("jobs/j: its checkpoint cannot be stored"), "{told}");

    // They train on, and few of the checkpoints that they save stay on the worker's disk.
    wait_for_line(&cluster, "j", "was dropped before it was stored")?;
    wait_for_line(&cluster, "k", "was dropped before it was stored")?;
    for job in ["jobs-j-", "jobs-k-"] {
        let names = std::fs::read_dir(dir.path().join("w1/outbox"))?.filter_map(Result::ok);
        let wait = names.filter(|entry| entry.file_name().to_string_lossy().starts_with(job)).count();
        println!("{job} {wait} checkpoints wait");
        ensure!((1..=8).contains(&wait));
    }

    // While the engine lives, its jobs can be cancelled.
    cluster.cancel("k")?;
    let job = cluster.wait_end("k")?;
    ensure!(job.state() == JobState::Cancelled, "{:?}: {}", job.state(), job.message);

    let start = Instant::now();
    Cluster::signal(backbone.ranks[0].pid, Signal::KILL)?;
    let is_lost = |cluster: &Cluster| Ok((cluster.backbone("b")?.epoch > backbone.epoch).then_some(()));
    cluster.wait_for("the loss", is_lost)?;
    println!("noticed after {:?}", start.elapsed());
    ensure!(start.elapsed() < Duration::from_secs(5));

    // Its checkpoint cannot come to the new engine; that it is cancelled, no engine need hear.
    wait_for_line(&cluster, "j", "its files cannot be had")?;
    cluster.cancel("j")?;
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Cancelled && job.attempts.len() == 2, "{job:?}");

    set_blobs(dir.path(), true)?;
    cluster.submit("after", "b", spec(3, 20), &id())?;
    let job = cluster.wait_end("after")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    Ok(())
}

#[test]
fn a_job_whose_data_are_damaged_fails_by_its_data_and_the_same_file_again_mends_them() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.create_backbone("b", (1, 1), "local")?;
    let train = demo("data/train.jsonl");
    let endpoint = cluster.endpoint();
    let submit = |name: &str| {
        let flags = "--steps 4 --prompt-length 4 --batch-size 2 --max-input-length 64".split(' ');
        let job = ["job", "submit", "--coordinator", &endpoint, "--backbone", "b", "--name", name];
        let args = [&job[..], &["--train", &train], &flags.collect::<Vec<_>>()].concat();
        common::incipit(&args)?.ok().map(drop)
    };
    submit("first")?;
    let train_of = |job: Job| job.spec?.train?.source;
    let Some(Source::Digest(digest)) = train_of(cluster.job("first")?) else { anyhow::bail!("no blob") };
    let blob = blob(dir.path(), &digest);
    let whole = std::fs::read(&blob)?;
    damage(&blob)?;
    cluster.start_worker("w1")?;
    let job = cluster.wait_end("first")?;
    ensure!((job.state(), job.reason()) == (JobState::Failed, JobReason::BadData), "{}", job.message);
    let says = |text: &str| job.message.contains(text);
    ensure!(says(&digest) && says("damaged") && says("again with the same file"), "{}", job.message);

    submit("second")?;
    ensure!(std::fs::read(&blob)? == whole, "it is damaged still");
    let job = cluster.wait_end("second")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    Ok(())
}

/// The file of a checkpoint with the optimizer's numbers.
fn optimizer(dir: &Path, checkpoint: &Checkpoint) -> Result<PathBuf> {
    let file = checkpoint.files.iter().find(|file| file.name == "optimizer.safetensors");
    Ok(blob(dir, &file.context("no optimizer")?.digest))
}

#[test]
fn a_job_whose_last_checkpoints_are_damaged_or_gone_goes_on_from_the_one_before_to_the_same_bytes()
-> Result<()> {
    const STEPS: u64 = 300;
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.submit("j", "b", spec(0, STEPS), &id())?;
    cluster.wait_for("three checkpoints", |cluster| {
        Ok((cluster.checkpoint_steps("j")?.len() == 3).then_some(()))
    })?;
    cluster.pause("j")?;
    cluster
        .wait_for("the pause", |cluster| Ok((cluster.job("j")?.state() == JobState::Paused).then_some(())))?;
    let checkpoints = cluster.checkpoints("j")?;
    let [last, before, whole] = &checkpoints[..] else { anyhow::bail!("{checkpoints:?}") };
    damage(&optimizer(dir.path(), last)?)?;
    std::fs::remove_file(optimizer(dir.path(), before)?)?;
    cluster.resume("j")?;

    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{:?}: {}", job.reason(), job.message);
    let attempts: Vec<_> =
        job.attempts.iter().map(|attempt| (attempt.start_step, attempt.reason())).collect();
    let damaged = JobReason::CheckpointDamaged;
    let expected = [(last.step, damaged), (before.step, damaged), (whole.step, JobReason::StepsDone)];
    ensure!(attempts[1..] == expected, "{attempts:?}");
    let message = &job.attempts[1].message;
    let says = |text: &str| message.contains(text);
    ensure!(says(&format!("it goes on from step {}", before.step)) && says("is damaged"), "{message}");
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 0, STEPS, (1, 1))?);
    for checkpoint in cluster.checkpoints("j")? {
        let problems = cluster.verify(&checkpoint.name)?;
        ensure!(!checkpoint.damaged && problems.is_empty(), "{checkpoint:?}: {problems:?}");
    }
    Ok(())
}

#[test]
fn a_worker_whose_name_another_one_has_taken_ends_with_its_engines_and_says_why() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.wait_ready("b")?;
    let mut first = cluster.workers.remove("w1").context("it runs")?;
    ensure!(engines_of(first.id()).len() == 1);
    let command = cluster.worker("w1", 4)?;
    let (mine, other) = (dir.path().join("w1"), dir.path().join("w1-again"));
    let arguments =
        command.get_args().map(|argument| if argument == mine { other.as_os_str() } else { argument });
    let mut twin = Command::new(command.get_program());
    twin.args(arguments);
    let envs = command.get_envs().filter_map(|(key, value)| Some((key, value?)));
    twin.envs(envs);
    cluster.workers.insert("w1".to_owned(), twin.spawn()?);

    let start = Instant::now();
    let status = loop {
        if let Some(status) = first.try_wait()? {
            break status;
        }
        if start.elapsed() > Duration::from_secs(60) {
            first.kill()?;
            first.wait()?;
            anyhow::bail!("it goes on");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    println!("ended after {:?}: {status}", start.elapsed());
    ensure!(!status.success() && engines_of(first.id()).is_empty());
    let told = std::fs::read_to_string(dir.path().join("w1.log"))?;
    let says = |text: &str| told.contains(text);
    ensure!(says("another process has taken the name workers/w1") && says("--name"), "{told}");
    cluster.wait_ready("b").map(drop)
}
