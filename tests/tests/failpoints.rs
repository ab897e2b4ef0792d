//! Every step by which a checkpoint gets to where it lasts, with the process that makes it killed right after it, or told that the disk is
//! full. The programs are those that people run: a library that is loaded into them counts their calls of the system.
//!
//! `INCIPIT_SEED` chooses the steps where not all are tried.
#![cfg(target_os = "linux")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::cluster::{Cluster, id, spec, trained};
use incipit_proto::v1::{self, JobState};
use tempfile::TempDir;

/// Steps of a job; it is saved twice.
const STEPS: u64 = 4;
/// Longest that a job may take, with whatever happens to it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happens, where, and to whom.
#[derive(Clone, Copy, Debug)]
struct Point {
    process: &'static str,
    how: &'static str,
    /// A path, under the cluster's folder, with which those begin that count.
    under: &'static str,
}

/// What one failure did.
struct Told {
    /// Whether the job made so many steps at all.
    fired: bool,
    job: v1::Job,
}

struct Rig {
    cluster: Cluster,
    dir: TempDir,
    /// How many there were: the number of the last is its seed, so that no two have the same files.
    jobs: u64,
    restarts: u64,
}

impl Rig {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let shim = dir.path().join("shim.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/failpoints/shim.c");
        let mut cc = Command::new("cc");
        let made = cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(source).arg("-ldl").output()?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let variables = vec![("LD_PRELOAD", shim), ("FAILPOINT", dir.path().join("plan"))];
        let mut cluster = Cluster::start_with(dir.path(), variables)?;
        cluster.start_worker("w")?;
        cluster.create_backbone("b", (1, 1), "local")?;
        cluster.wait_ready("b")?;
        // Whoever is dead is started again by this thread, which must not wait in a call.
        cluster.persistence = Duration::ZERO;
        Ok(Self { cluster, dir, jobs: 0, restarts: 0 })
    }

    fn plan(&self) -> PathBuf {
        self.dir.path().join("plan")
    }

    /// Starts again what has died; an engine is its agent's business.
    fn revive(&mut self) -> Result<()> {
        let dead = |child: &mut Child| Ok::<_, std::io::Error>(child.try_wait()?.is_some());
        if self.cluster.coordinator.as_mut().map(dead).transpose()?.unwrap_or(true) {
            self.cluster.start_coordinator()?;
            self.restarts += 1;
        }
        if self.cluster.workers.get_mut("w").map(dead).transpose()?.unwrap_or(true) {
            self.cluster.start_worker("w")?;
            self.restarts += 1;
        }
        Ok(())
    }

    /// Does something as often as it takes, with whatever dies meanwhile.
    fn persist<T>(&mut self, what: &str, act: impl Fn(&Cluster) -> Result<Option<T>>) -> Result<T> {
        let start = Instant::now();
        loop {
            self.revive()?;
            let done = act(&self.cluster);
            if let Ok(Some(done)) = done {
                return Ok(done);
            }
            if start.elapsed() > PATIENCE {
                let said = done.err().map(|error| format!("{error:#}")).unwrap_or_default();
                bail!("waited in vain for {what}: {said}\n{}", self.cluster.logs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Trains a job while the `n`-th step at the point fails.
    fn fail(&mut self, point: Point, n: u64) -> Result<Told> {
        self.jobs += 1;
        let (job, request) = (format!("j{}", self.jobs), id());
        let under = self.dir.path().join(point.under);
        let plan = format!("{} {} {} {n} {}", self.jobs, point.process, point.how, under.display());
        let written = self.dir.path().join("plan.new");
        std::fs::write(&written, plan)?;
        std::fs::rename(&written, self.plan())?;
        let asked = v1::TrainingSpec { checkpoint_every: Some(STEPS / 2), ..spec(self.jobs, STEPS) };
        self.persist("the job to be taken", |cluster| {
            cluster.submit(&job, "b", asked.clone(), &request).map(Some)
        })?;
        let (mut committed, plan) = (0, self.plan());
        let ended = self.persist("the job to end", |cluster| {
            let job = cluster.job(&job)?;
            let done = [JobState::Succeeded, JobState::Failed].contains(&job.state());
            Ok(done.then_some(job))
        })?;
        // Old files are removed when all is acknowledged.
        let start = Instant::now();
        while plan.exists() && start.elapsed() < Duration::from_millis(300) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let fired = !plan.exists();
        if !fired {
            std::fs::remove_file(&plan)?;
        }
        for step in self.persist("the checkpoints", |cluster| cluster.checkpoint_steps(&job).map(Some))? {
            let name = format!("jobs/{job}/checkpoints/{step}");
            let problems = self.persist("a checkpoint to be verified", |c| c.verify(&name).map(Some))?;
            ensure!(problems.is_empty(), "{point:?} {n}: step {step}: {problems:?}");
            committed = committed.max(step);
        }
        ensure!(ended.progress.as_ref().is_some_and(|progress| progress.committed_step == committed));
        Ok(Told { fired, job: ended })
    }

    /// Kills at these steps, one after the other, until there are no more. Returns how many there were.
    fn kill_at(&mut self, point: Point, steps: impl Iterator<Item = u64>) -> Result<u64> {
        let mut fired = 0;
        for n in steps {
            let told = self.fail(point, n).with_context(|| format!("{point:?} {n}"))?;
            if !told.fired {
                break;
            }
            fired += 1;
            let state = told.job.state();
            ensure!(state == JobState::Succeeded, "{point:?} {n}: {state:?}: {}", told.job.message);
            let name = format!("j{}", self.jobs);
            let prompt = self.persist("the prompt", |cluster| cluster.last_prompt(&name).map(Some))?;
            let undisturbed = trained(self.dir.path(), self.jobs, STEPS, (1, 1))?;
            ensure!(prompt == undisturbed, "{point:?} {n}: another prompt");
        }
        println!("{point:?}: killed after {fired} steps, {} restarts by now", self.restarts);
        Ok(fired)
    }
}

const fn kill(process: &'static str, under: &'static str) -> Point {
    Point { process, how: "kill", under }
}

#[test]
#[ignore = "long: a kill after every step of a checkpoint's way"]
fn wherever_the_way_of_a_checkpoint_is_broken_off_the_newest_committed_one_loads() -> Result<()> {
    let mut rig = Rig::start()?;
    // From the engine's file to the agent's hands.
    let engine = rig.kill_at(kill("engine", "w/outbox"), 1..)?;
    ensure!(engine >= 20, "{engine} steps: an engine writes more than that");
    // What the agent does with it: it removes what is stored.
    let agent = rig.kill_at(kill("worker", "w/outbox"), 1..)?;
    ensure!(agent >= 5, "{agent} steps");
    // The coordinator takes the files.
    let blobs = rig.kill_at(kill("coordinator", "coordinator/blobs"), 1..)?;
    ensure!(blobs >= 10, "{blobs} steps");
    Ok(())
}

#[test]
#[ignore = "long: kills within the coordinator's database"]
fn wherever_the_database_is_broken_off_no_job_is_lost_and_none_comes_twice() -> Result<()> {
    let seed = std::env::var("INCIPIT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("INCIPIT_SEED={seed}");
    let mut rig = Rig::start()?;
    let mut n = seed % 3;
    let steps = std::iter::repeat_with(|| {
        n += 3;
        n
    });
    let made = rig.kill_at(kill("coordinator", "coordinator/state.sqlite"), steps.take(20))?;
    ensure!(made == 20, "a job took {made} transactions");
    let jobs = rig.persist("the list", |cluster| cluster.jobs().map(Some))?;
    ensure!(jobs.len() as u64 == rig.jobs, "{} jobs were handed in, and {} are there", rig.jobs, jobs.len());
    Ok(())
}

#[test]
#[ignore = "long: a full disk at every step of a checkpoint's way"]
fn a_full_disk_fails_the_save_says_so_and_training_goes_on() -> Result<()> {
    let mut rig = Rig::start()?;
    let engine = Point { process: "engine", how: "full", under: "w/outbox" };
    let (mut saved, mut lost) = (0, 0);
    for n in 1.. {
        let told = rig.fail(engine, n)?;
        if !told.fired {
            break;
        }
        let name = format!("j{}", rig.jobs);
        let log = rig.persist("the log", |cluster| cluster.log(&format!("jobs/{name}")).map(Some))?;
        let said = log.iter().any(|line| line.contains("was not saved") && line.contains("No space left"));
        match told.job.state() {
            JobState::Succeeded => saved += 1,
            // Only the last checkpoint was hit: a job whose prompt is lost has not succeeded.
            JobState::Failed if told.job.message.contains("could not be saved") => lost += 1,
            state => bail!("{engine:?} {n}: {state:?}: {}", told.job.message),
        }
        ensure!(said, "{engine:?} {n}: nobody was told: {log:?}");
    }
    println!("{engine:?}: {saved} jobs went on, {lost} could not save their end");
    ensure!(saved >= 5 && lost >= 5);
    Ok(())
}
