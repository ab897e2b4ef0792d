//! Many jobs on one backbone: how soon they start, and how they share it.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use common::cluster::{Cluster, id, spec};
use incipit_proto::v1::{self, JobState};

#[test]
#[ignore = "long: 100 jobs one after the other"]
fn a_job_makes_its_first_step_within_a_second() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.wait_ready("b")?;
    let mut times = Vec::new();
    for number in 0..100 {
        let start = Instant::now();
        let job = cluster.submit(&format!("j{number}"), "b", spec(number, 1), &id())?;
        let request = v1::StreamMetricsRequest { name: job.name, offset: 0, follow: true };
        cluster.call(async |client| {
            let mut pages = client.jobs().stream_metrics(request.clone()).await?.into_inner();
            while let Some(page) = pages.message().await? {
                if !page.points.is_empty() {
                    return Ok(());
                }
            }
            Err(tonic::Status::internal("the job ended without a step"))
        })?;
        times.push(start.elapsed());
    }
    times.sort();
    println!("submit to first step: median {:?}, p99 {:?}, worst {:?}", times[50], times[98], times[99]);
    ensure!(times[98] < Duration::from_secs(1), "{times:?}");
    Ok(())
}

#[test]
#[ignore = "long: 232 jobs on one backbone"]
fn thirty_two_jobs_share_by_their_weights_and_two_hundred_that_wait_all_get_their_turn() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.wait_ready("b")?;
    let endless = v1::TrainingSpec { checkpoint_every: Some(1_000_000), ..spec(0, 10_000_000) };
    for number in 0..32u32 {
        cluster.submit_with(&format!("e{number}"), "b", endless.clone(), 10 * (1 + number % 4))?;
    }
    for number in 0..200u64 {
        cluster.submit_with(&format!("s{number}"), "b", spec(number, 2), 10)?;
    }
    let jobs = cluster.jobs()?;
    let count = |state| jobs.iter().filter(|job| job.state() == state).count();
    ensure!(
        (count(JobState::Running), count(JobState::Queued)) == (32, 200),
        "{} run",
        count(JobState::Running)
    );
    let tokens = |cluster: &Cluster| -> Result<Vec<u64>> {
        (0..32).map(|number| cluster.tokens(&format!("e{number}"))).collect()
    };
    let all_run = |cluster: &Cluster| Ok(tokens(cluster)?.iter().all(|tokens| *tokens > 0).then_some(()));
    cluster.wait_for("all to run", all_run)?;
    let before = tokens(&cluster)?;
    std::thread::sleep(Duration::from_secs(75));
    let after = tokens(&cluster)?;
    let served: Vec<f64> = after.iter().zip(&before).map(|(after, before)| (after - before) as f64).collect();
    let all: f64 = served.iter().sum();
    let worst = served.iter().enumerate().map(|(number, served)| {
        let due = all * (1 + number % 4) as f64 / 80.0;
        (served / due - 1.0).abs()
    });
    let worst = worst.fold(0.0, f64::max);
    println!(
        "{all} tokens were shared; the share that is most off its weight is off by {:.2} %",
        worst * 100.0
    );
    ensure!(worst < 0.05, "{served:?}");
    for number in 0..32u32 {
        cluster.cancel(&format!("e{number}"))?;
    }
    for number in 0..200u64 {
        ensure!(cluster.wait_end(&format!("s{number}"))?.state() == JobState::Succeeded);
    }
    Ok(())
}
