//! A cluster whose processes are killed and stopped, and whose machines are cut off, at random moments, for many rounds, with jobs
//! running all the time. Its workers are on machines of a network of their own; where no such network can be had, on this one.
//!
//! `INCIPIT_SEED` gives another seed, `INCIPIT_ROUNDS` another number of rounds.

mod common;
mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use common::cluster::{Cluster, engines_of, id, spec, trained};
use incipit_proto::v1::{self, BackboneState, JobState, event::Resource};
use rig::network::{Around, Network};
use rustix::process::Signal;

/// Steps of a job, and how many jobs run at once.
const STEPS: u64 = 150;
const JOBS: usize = 3;
/// Distinct jobs: their prompts are compared with undisturbed ones.
const SEEDS: u64 = 4;
/// A loss has to be noticed within this.
const NOTICED: Duration = Duration::from_secs(5);
/// What is to come of a link that was cut for a moment has come by then: a lease lasts for four seconds.
const SETTLED: Duration = Duration::from_secs(6);

/// Numbers that only look random (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    KillCoordinator,
    KillAgent,
    KillEngine,
    StopEngine,
    StopAgent,
    /// For longer than a lease.
    CutLink,
    /// For so short that nobody need notice.
    ShakeLink,
}

/// Those of links, which need a network, are the last [`OF_LINKS`].
const BLOWS: [Blow; 7] = [
    Blow::KillCoordinator,
    Blow::KillAgent,
    Blow::KillEngine,
    Blow::StopEngine,
    Blow::StopAgent,
    Blow::CutLink,
    Blow::ShakeLink,
];
const OF_LINKS: usize = 2;

struct Chaos {
    cluster: Cluster,
    network: Option<Network>,
    dice: Dice,
    submitted: Vec<(String, u64)>,
    agents: BTreeSet<u32>,
    /// How long it took to notice, by what was done.
    noticed: BTreeMap<Blow, Vec<Duration>>,
    /// Ranks that the last blow did not hit, where it was one that costs a rank.
    survivors: Vec<v1::RankPlacement>,
}

/// The name of the test.
const THIS: &str = "whatever_is_killed_or_stopped_every_job_ends_once_and_in_its_own_bytes";

#[test]
#[ignore = "long: 50 rounds of processes killed and stopped, and links cut"]
fn whatever_is_killed_or_stopped_every_job_ends_once_and_in_its_own_bytes() -> Result<()> {
    let (seed, rounds) = (variable("INCIPIT_SEED", 1), variable("INCIPIT_ROUNDS", 50));
    let network = match Network::around(THIS)? {
        Around::Within(network) => Some(network),
        Around::Done => return Ok(()),
        Around::Without => None,
    };
    println!("INCIPIT_SEED={seed} INCIPIT_ROUNDS={rounds}");
    let dir = tempfile::tempdir()?;
    let mut chaos = Chaos::begin(dir.path(), seed, network)?;
    for round in 0..rounds {
        chaos.top_up()?;
        chaos.round(round)?;
    }
    let (cluster, submitted) = (&chaos.cluster, &chaos.submitted);
    for (job, _) in submitted {
        let ended = cluster.wait_end(job)?;
        ensure!(ended.state() == JobState::Succeeded, "{job}: {}\n{}", ended.message, cluster.logs());
    }
    check_events(&cluster.events()?)?;
    check_results(&chaos, dir.path())?;
    for (blow, times) in &chaos.noticed {
        let worst = times.iter().max().copied().unwrap_or_default();
        println!("{blow:?}: {} times, noticed after {worst:?} at most", times.len());
        ensure!(worst < NOTICED, "{blow:?} was noticed after {worst:?}");
    }
    let agents = std::mem::take(&mut chaos.agents);
    drop(chaos);
    std::thread::sleep(Duration::from_millis(500));
    for agent in agents {
        ensure!(engines_of(agent).is_empty(), "the agent {agent} left an engine behind");
    }
    Ok(())
}

/// The name of the test.
const VANISHES: &str = "where_a_machine_vanishes_without_a_word_the_other_ranks_keep_their_weights";

#[test]
#[ignore = "long: waits for longer than a rank may be stuck"]
fn where_a_machine_vanishes_without_a_word_the_other_ranks_keep_their_weights() -> Result<()> {
    let network = match Network::around(VANISHES)? {
        Around::Within(network) => network,
        Around::Done => return Ok(()),
        Around::Without => {
            println!("skipped: there is no network of its own");
            return Ok(());
        }
    };
    let dir = tempfile::tempdir()?;
    let mut chaos = Chaos::begin(dir.path(), 1, Some(network))?;
    chaos.top_up()?;
    chaos.get_on()?;
    let before = chaos.cluster.wait_ready("b")?;
    let [stays, goes] = &before.ranks[..] else { bail!("{:?}", before.ranks) };
    chaos.survivors = vec![stays.clone()];
    chaos.set_link(goes.worker.trim_start_matches("workers/"), false)?;
    let after = chaos.cluster.wait_for("another worker to have its rank", |cluster| {
        let backbone = cluster.backbone("b")?;
        Ok((backbone.epoch > before.epoch && backbone.state() == BackboneState::Ready).then_some(backbone))
    })?;
    ensure!(after.ranks[0].worker == stays.worker, "rank 0 has moved: {:?}", after.ranks);
    chaos.check_survivors(&after)
}

impl Chaos {
    /// Whether the ranks that the last blow did not hit have their weights still, as far as they are where they were.
    fn check_survivors(&mut self, after: &v1::Backbone) -> Result<()> {
        for before in std::mem::take(&mut self.survivors) {
            let same = |now: &&v1::RankPlacement| now.rank == before.rank && now.worker == before.worker;
            if let Some(now) = after.ranks.iter().find(same) {
                ensure!(
                    now.pid == before.pid,
                    "rank {} was started again\n{}",
                    before.rank,
                    self.cluster.logs()
                );
            }
        }
        Ok(())
    }

    fn begin(dir: &Path, seed: u64, network: Option<Network>) -> Result<Self> {
        let cluster = match &network {
            Some(network) => Cluster::start_at(dir, network.address())?,
            None => Cluster::start(dir)?,
        };
        let mut chaos = Self {
            cluster,
            network,
            dice: Dice(seed),
            submitted: Vec::new(),
            agents: BTreeSet::new(),
            noticed: BTreeMap::new(),
            survivors: Vec::new(),
        };
        for worker in ["w1", "w2", "w3"] {
            chaos.start_worker(worker)?;
        }
        chaos.cluster.create_backbone("b", (1, 2), if cfg!(feature = "gloo") { "gloo" } else { "local" })?;
        chaos.cluster.wait_ready("b")?;
        Ok(chaos)
    }

    fn start_worker(&mut self, name: &str) -> Result<()> {
        let mut command = self.cluster.worker(name, 1)?;
        if let Some(network) = &mut self.network {
            command = network.command(name, &command)?;
        }
        self.cluster.spawn_worker(name, command)?;
        self.agents.extend(self.cluster.workers.get(name).map(std::process::Child::id));
        Ok(())
    }

    fn set_link(&self, worker: &str, up: bool) -> Result<()> {
        self.network.as_ref().context("a network")?.set_link(worker, up)
    }

    /// Has some jobs running or waiting.
    fn top_up(&mut self) -> Result<()> {
        let unfinished = |job: &&v1::Job| [JobState::Queued, JobState::Running].contains(&job.state());
        let running = self.cluster.jobs()?.iter().filter(unfinished).count();
        for _ in running..JOBS {
            let number = self.submitted.len() as u64;
            let (job, seed) = (format!("j{number}"), number % SEEDS);
            let spec = v1::TrainingSpec { checkpoint_every: Some(10), ..spec(seed, STEPS) };
            self.cluster.submit(&job, "b", spec, &id())?;
            self.submitted.push((job, seed));
        }
        Ok(())
    }

    /// Waits until a job makes a step that was never made before. A backbone that is lost again and again with none between has failed.
    fn get_on(&self) -> Result<()> {
        let running: Vec<&String> = self.submitted.iter().rev().take(JOBS).map(|(job, _)| job).collect();
        let steps = |cluster: &Cluster| -> Result<usize> {
            running.iter().map(|job| cluster.points(job).map(|points| points.len())).sum()
        };
        let before = steps(&self.cluster)?;
        self.cluster.wait_for("a new step", |cluster| Ok((steps(cluster)? > before).then_some(())))
    }

    fn round(&mut self, round: u64) -> Result<()> {
        // Every other blow may come before anything was done.
        if round % 2 == 1 {
            self.get_on()?;
        }
        let before = self.cluster.wait_ready("b")?;
        self.check_survivors(&before)?;
        std::thread::sleep(Duration::from_millis(self.dice.roll(1500)));
        let blows = if self.network.is_some() { &BLOWS[..] } else { &BLOWS[..BLOWS.len() - OF_LINKS] };
        let blow = blows[self.dice.roll(blows.len() as u64) as usize];
        println!("round {round}: {blow:?} at epoch {}", before.epoch);
        let began = SystemTime::now();
        let places = usize::try_from(self.dice.roll(before.ranks.len() as u64))?;
        let place = before.ranks[places].clone();
        let worker = place.worker.trim_start_matches("workers/").to_owned();
        match blow {
            Blow::KillCoordinator => {
                self.cluster.kill_coordinator()?;
                std::thread::sleep(Duration::from_millis(self.dice.roll(1500)));
                self.cluster.start_coordinator()?;
                // It gives workers a grace to come back, in which it blames nobody: they try again every two seconds.
                std::thread::sleep(Duration::from_secs(3));
                return Ok(());
            }
            Blow::KillAgent => drop(self.cluster.kill_worker(&worker)?),
            Blow::KillEngine => Cluster::signal(place.pid, Signal::KILL)?,
            Blow::StopEngine => Cluster::signal(place.pid, Signal::STOP)?,
            Blow::StopAgent => {
                let agent = self.cluster.workers.get(&worker).context("it runs")?.id();
                Cluster::signal(agent, Signal::STOP)?;
            }
            Blow::CutLink => self.set_link(&worker, false)?,
            Blow::ShakeLink => {
                let cut = Instant::now();
                self.set_link(&worker, false)?;
                std::thread::sleep(Duration::from_millis(self.dice.roll(3000)));
                self.set_link(&worker, true)?;
                // What was sent meanwhile is sent again later still, maybe too late for the lease: of that loss the next blow is innocent.
                std::thread::sleep(SETTLED.saturating_sub(cut.elapsed()));
                return Ok(());
            }
        }
        let lost = self.cluster.wait_for("the loss to be noticed", |cluster| {
            let events = cluster.events()?;
            let newer = |event: &&v1::Event| matches!(&event.resource, Some(Resource::Backbone(b)) if b.epoch > before.epoch
                || b.state() == BackboneState::Degraded && b.epoch == before.epoch && event.time.as_ref().is_some_and(|t| time(t) >= began));
            Ok(events.iter().find(newer).cloned())
        })?;
        let Some(Resource::Backbone(after)) = &lost.resource else { bail!("{lost:?}") };
        let culprits = [worker.clone(), format!("rank {}", place.rank)];
        ensure!(
            culprits.iter().any(|culprit| after.message.contains(culprit)),
            "{culprits:?}: {}\n{}",
            after.message,
            self.cluster.logs()
        );
        self.survivors = before.ranks.iter().filter(|other| other.rank != place.rank).cloned().collect();
        let at = time(lost.time.as_ref().context("a time")?);
        self.noticed.entry(blow).or_default().push(at.duration_since(began).unwrap_or_default());
        match blow {
            Blow::KillAgent => self.start_worker(&worker)?,
            Blow::StopAgent => {
                std::thread::sleep(Duration::from_millis(self.dice.roll(1000)));
                let agent = self.cluster.workers.get(&worker).context("it runs")?.id();
                Cluster::signal(agent, Signal::CONT)?;
            }
            Blow::CutLink => {
                std::thread::sleep(Duration::from_millis(self.dice.roll(6000)));
                self.set_link(&worker, true)?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn time(stamp: &pbjson_types::Timestamp) -> SystemTime {
    UNIX_EPOCH + Duration::new(stamp.seconds as u64, stamp.nanos as u32)
}

/// What must hold at every revision.
fn check_events(events: &[v1::Event]) -> Result<()> {
    let mut jobs: BTreeMap<String, v1::Job> = BTreeMap::new();
    let mut epoch = 0;
    for (place, event) in events.iter().enumerate() {
        ensure!(event.revision == place as u64 + 1, "revision {} at place {place}", event.revision);
        match &event.resource {
            Some(Resource::Backbone(backbone)) => {
                ensure!(backbone.epoch >= epoch, "the epoch went back at revision {}", event.revision);
                epoch = backbone.epoch;
            }
            Some(Resource::Job(job)) => {
                check_job(jobs.get(&job.name), job, epoch)
                    .with_context(|| format!("revision {}", event.revision))?;
                jobs.insert(job.name.clone(), job.clone());
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_job(before: Option<&v1::Job>, job: &v1::Job, epoch: u64) -> Result<()> {
    let is_final = |state| [JobState::Succeeded, JobState::Failed, JobState::Cancelled].contains(&state);
    ensure!(job.reason != 0, "{} is {:?} without a reason", job.name, job.state());
    let open: Vec<&v1::JobAttempt> =
        job.attempts.iter().filter(|attempt| attempt.end_time.is_none()).collect();
    ensure!(open.len() == usize::from(job.state() == JobState::Running), "{}: {open:?}", job.name);
    ensure!(open.iter().all(|attempt| attempt.epoch <= epoch), "{} runs in an epoch to come", job.name);
    ensure!(
        job.attempts.windows(2).all(|pair| pair[0].number < pair[1].number && pair[0].epoch <= pair[1].epoch)
    );
    if let Some(before) = before {
        ensure!(!is_final(before.state()) || before.state() == job.state(), "{} left its end", job.name);
        let committed = |job: &v1::Job| job.progress.as_ref().map_or(0, |progress| progress.committed_step);
        ensure!(committed(before) <= committed(job), "{} lost a checkpoint", job.name);
    }
    Ok(())
}

fn check_results(chaos: &Chaos, dir: &Path) -> Result<()> {
    let listed: BTreeSet<String> = chaos.cluster.jobs()?.iter().map(|job| job.name.clone()).collect();
    let submitted: BTreeSet<String> = chaos.submitted.iter().map(|(job, _)| format!("jobs/{job}")).collect();
    ensure!(listed == submitted, "listed {listed:?}, submitted {submitted:?}");
    let undisturbed: Vec<Vec<u8>> =
        (0..SEEDS).map(|seed| trained(dir, seed, STEPS, (1, 1))).collect::<Result<_>>()?;
    for (job, seed) in &chaos.submitted {
        ensure!(
            chaos.cluster.last_prompt(job)? == undisturbed[*seed as usize],
            "the prompt of {job} differs"
        );
        let steps: Vec<u64> = chaos.cluster.points(job)?.iter().map(|point| point.step).collect();
        ensure!(steps == (1..=STEPS).collect::<Vec<_>>(), "{job}: {steps:?}");
    }
    println!("{} jobs ended, each in its own bytes", chaos.submitted.len());
    Ok(())
}
