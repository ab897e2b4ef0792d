//! A rank that hangs in a pass through the backbone, while its process lives on: it is named and started again, and its jobs end in the bytes
//! that they have alone. A library that is loaded into the engines stops the rank's threads, as a device does that answers no more.
#![cfg(target_os = "linux")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::cluster::{Cluster, id, spec, trained};
use incipit_proto::v1::{self, BackboneReason, BackboneState, JobState, event::Resource};
use tempfile::TempDir;

/// Steps of the job: it is not done before it has been disturbed.
const STEPS: u64 = 400;
/// Seconds that a pass may take.
const HANG_AFTER: &str = "2";
/// By then a rank that hangs in a pass has been noticed, also one that had others waiting for it first.
const NOTICED: Duration = Duration::from_secs(10);
/// How often a rank is stopped at most until it is within a pass, where it spends most of its time.
const TRIES: usize = 20;

struct Rig {
    cluster: Cluster,
    dir: TempDir,
}

impl Rig {
    fn start((tp, dp): (u32, u32), collective: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let shim = dir.path().join("hang.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/failpoints/hang.c");
        let mut cc = Command::new("cc");
        let made =
            cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(source).arg("-lpthread").output()?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let variables = vec![("LD_PRELOAD", shim), ("HANG", dir.path().join("plan"))];
        let mut cluster = Cluster::start_with(dir.path(), variables)?;
        let mut worker = cluster.worker("w", 4)?;
        worker.args(["--hang-after", HANG_AFTER]);
        cluster.spawn_worker("w", worker)?;
        cluster.create_backbone("b", (tp, dp), collective)?;
        cluster.wait_ready("b")?;
        Ok(Self { cluster, dir })
    }

    fn plan(&self) -> PathBuf {
        self.dir.path().join("plan")
    }

    /// Stops a rank, over and over, until it was within a pass. The backbone as it was when that was noticed.
    fn hang(&self, rank: u32) -> Result<v1::Backbone> {
        let (written, done) = (self.dir.path().join("plan.new"), self.dir.path().join("plan.done"));
        let before = self.cluster.backbone("b")?;
        for _ in 0..TRIES {
            std::fs::write(&written, format!("rank {rank}"))?;
            std::fs::rename(&written, self.plan())?;
            self.cluster.wait_for("the rank to hang", |_| Ok(done.exists().then_some(())))?;
            let start = Instant::now();
            while start.elapsed() < NOTICED {
                if let Some(lost) = self.loss(before.epoch)? {
                    std::fs::remove_file(&done)?;
                    return Ok(lost);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            // It goes on where it was: between two passes.
            std::fs::remove_file(&done)?;
        }
        anyhow::bail!("rank {rank} hung {TRIES} times, and nobody noticed\n{}", self.cluster.logs())
    }

    /// The backbone as it was when a rank was lost that was there in this epoch.
    fn loss(&self, epoch: u64) -> Result<Option<v1::Backbone>> {
        let lost = self.cluster.events()?.into_iter().find_map(|event| match event.resource {
            Some(Resource::Backbone(backbone)) => {
                Some(backbone).filter(|b| b.epoch >= epoch && b.state() == BackboneState::Degraded)
            }
            _ => None,
        });
        Ok(lost)
    }
}

/// Whether a loss of which this was told is that of a rank that hangs. One of several processes may have been stopped while it waited for the
/// others: it seems to wait still, and all that they know is that it does not come.
fn is_of(rank: u32, lost: &v1::Backbone, collective: &str) -> bool {
    match lost.reason() {
        BackboneReason::EngineHung => {
            lost.message.contains(&format!("rank {rank} hangs: nothing came of a pass"))
        }
        BackboneReason::GroupFailed => {
            collective == "gloo" && lost.message.contains("neither gone nor known to hang")
        }
        _ => false,
    }
}

/// Hangs a rank of such a backbone, the `rank`-th; whether the process of rank 0 outlives that.
fn a_rank_that_hangs((tp, dp): (u32, u32), collective: &str, rank: u32) -> Result<bool> {
    let rig = Rig::start((tp, dp), collective)?;
    let cluster = &rig.cluster;
    cluster.submit("j", "b", spec(0, STEPS), &id())?;
    cluster.wait_for("the first steps", |cluster| Ok((cluster.points("j")?.len() > 2).then_some(())))?;
    let pid = |backbone: &v1::Backbone| Ok::<_, anyhow::Error>(backbone.ranks.first().context("rank 0")?.pid);
    let before = pid(&cluster.backbone("b")?)?;
    let lost = rig.hang(rank)?;
    ensure!(is_of(rank, &lost, collective), "{:?}: {}", lost.reason(), lost.message);
    println!("{}", lost.message);
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(cluster.last_prompt("j")? == trained(rig.dir.path(), 0, STEPS, (tp, dp))?);
    Ok(pid(&cluster.backbone("b")?)? == before)
}

#[test]
fn a_rank_that_hangs_alone_is_named_and_started_again() -> Result<()> {
    ensure!(!a_rank_that_hangs((1, 1), "local", 0)?, "the process that hung goes on");
    Ok(())
}

#[test]
#[ignore = "long: waits for what is noticed late"]
fn a_rank_that_hangs_among_threads_is_named_and_all_are_started_again() -> Result<()> {
    ensure!(!a_rank_that_hangs((2, 1), "local", 1)?, "the process that hung goes on");
    Ok(())
}

#[cfg(feature = "gloo")]
#[test]
#[ignore = "long: waits for what is noticed late"]
fn a_rank_that_hangs_among_processes_is_named_and_the_others_keep_their_weights() -> Result<()> {
    ensure!(a_rank_that_hangs((2, 1), "gloo", 1)?, "rank 0 was started again");
    Ok(())
}
