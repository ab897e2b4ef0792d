//! Ranks load: all can see how far. One is lost while another one still loads: that one goes on loading, and is of the next group.
#![cfg(feature = "gloo")]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::cluster::{Cluster, demo, engines_of, id, spec, trained};
use incipit_proto::v1::JobState;
use rustix::process::Signal;

const STEPS: u64 = 40;
/// Longer than an engine may take to leave its old group.
const STUCK: Duration = Duration::from_secs(12);
/// A model of the Hub.
const MODEL: &str = "test/demo";

/// A cache of the Hub's files.
struct Cache(PathBuf);

impl Cache {
    fn folder(&self, within: &str) -> PathBuf {
        self.0.join("hub").join(within).join("models--test--demo")
    }

    /// Has the model here, as if it had been downloaded.
    fn fill(&self) -> Result<()> {
        let (refs, snapshot) = (self.folder("").join("refs"), self.folder("").join("snapshots/abc"));
        fs::create_dir_all(&refs)?;
        fs::create_dir_all(&snapshot)?;
        for file in fs::read_dir(demo("model"))? {
            let file = file?;
            fs::copy(file.path(), snapshot.join(file.file_name()))?;
        }
        Ok(fs::write(refs.join("main"), "abc")?)
    }

    /// Keeps others waiting, as a process does that downloads the model.
    fn lock(&self) -> Result<File> {
        let dir = self.folder(".locks");
        fs::create_dir_all(&dir)?;
        let file = File::create(dir.join("incipit.lock"))?;
        file.lock()?;
        Ok(file)
    }
}

/// A worker for one rank, with a cache of its own.
fn start_worker(cluster: &mut Cluster, dir: &Path, name: &str) -> Result<(u32, Cache)> {
    let cache = Cache(dir.join(format!("{name}-cache")));
    let mut worker = cluster.worker(name, 1)?;
    worker.env("HF_HOME", &cache.0);
    cluster.spawn_worker(name, worker)?;
    Ok((cluster.workers[name].id(), cache))
}

/// The engine of an agent, once it has one that is not `but`.
fn engine_of(cluster: &Cluster, agent: u32, but: u32) -> Result<u32> {
    cluster.wait_for("an engine", |_| Ok(engines_of(agent).first().copied().filter(|engine| *engine != but)))
}

#[test]
fn how_far_the_ranks_of_a_backbone_have_loaded_goes_by_their_agents_to_whoever_asks() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    for name in ["w1", "w2"] {
        let worker = cluster.worker(name, 1)?;
        cluster.spawn_worker(name, worker)?;
    }
    cluster.create_backbone_of("b", &demo("model"), (2, 1), "gloo")?;
    cluster.wait_ready("b")?;
    // With the next sign of life.
    let ranks = cluster.wait_for("both ranks' bytes", |cluster| {
        let ranks = cluster.backbone("b")?.ranks;
        Ok(ranks.iter().all(|rank| rank.total_bytes > 0).then_some(ranks))
    })?;
    ensure!(ranks.len() == 2 && ranks.iter().all(|rank| rank.loaded_bytes == rank.total_bytes), "{ranks:?}");
    let files = fs::metadata(Path::new(&demo("model")).join("model.safetensors"))?.len();
    let all: u64 = ranks.iter().map(|rank| rank.total_bytes).sum();
    ensure!((files / 2..2 * files).contains(&all), "{all} of a file of {files} bytes");
    Ok(())
}

#[test]
#[ignore = "long: waits for longer than a rank may be stuck"]
fn a_rank_goes_on_loading_where_another_one_is_lost_meanwhile() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    let (fast, there) = start_worker(&mut cluster, dir.path(), "w1")?;
    let (slow, to_come) = start_worker(&mut cluster, dir.path(), "w2")?;
    there.fill()?;
    let download = to_come.lock()?;
    cluster.create_backbone_of("b", MODEL, (1, 2), "gloo")?;
    let (waits, loads) = (engine_of(&cluster, fast, 0)?, engine_of(&cluster, slow, 0)?);
    let before = cluster.backbone("b")?.epoch;
    cluster.wait_for("one to have loaded", |cluster| {
        let log = cluster.log("backbones/b")?;
        Ok(log.iter().any(|line| line.contains("has loaded part 1 of 1")).then_some(()))
    })?;
    Cluster::signal(waits, Signal::KILL)?;
    engine_of(&cluster, fast, waits)?;
    std::thread::sleep(STUCK);
    let after = cluster.backbone("b")?;
    ensure!(after.epoch == before + 1, "epoch {before}, then {}: {}", after.epoch, after.message);
    ensure!(engines_of(slow) == [loads], "it was started again\n{}", cluster.logs());
    to_come.fill()?;
    drop(download);
    let ready = cluster.wait_ready("b")?;
    let of_slow = ready.ranks.iter().find(|rank| rank.worker == "workers/w2").context("its rank")?;
    ensure!((ready.epoch, of_slow.pid) == (after.epoch, loads), "{ready:?}\n{}", cluster.logs());
    cluster.submit("j", "b", spec(0, STEPS), &id())?;
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 0, STEPS, (1, 1))?);
    Ok(())
}
