//! A backbone of two replicas loses one and goes on with the other, and grows again when there is room: its job ends in the bytes that it has
//! alone.
#![cfg(feature = "gloo")]

mod common;

use std::time::Duration;

use anyhow::{Result, ensure};
use common::cluster::{Cluster, id, spec, trained};
use incipit_proto::v1::{self, BackboneReason, BackboneState, JobState, event::Resource};

/// Steps of the job.
const STEPS: u64 = 3000;
/// From the pause of the job to its end: then the backbone may soon grow, which it does a minute after it has shrunk, and the job has some steps to make still.
const PAUSE: Duration = Duration::from_secs(55);

/// The backbone, once it works with so many replicas.
fn ready_with(cluster: &Cluster, dp: usize) -> Result<v1::Backbone> {
    cluster.wait_for("the replicas", |cluster| {
        let backbone = cluster.backbone("b")?;
        Ok((backbone.state() == BackboneState::Ready && backbone.ranks.len() == dp).then_some(backbone))
    })
}

#[test]
#[ignore = "long: waits until the backbone may grow"]
fn a_job_goes_on_with_fewer_replicas_and_with_more_again_to_the_same_bytes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker_with("w1", 1)?;
    cluster.start_worker_with("w2", 1)?;
    cluster.create_backbone("b", (1, 2), "gloo")?;
    let backbone = v1::Backbone { name: "backbones/b".to_owned(), min_dp: 1, ..v1::Backbone::default() };
    let update_mask = Some(pbjson_types::FieldMask { paths: vec!["min_dp".to_owned()] });
    let request = v1::UpdateBackboneRequest {
        backbone: Some(backbone),
        update_mask,
        request_id: id(),
        validate_only: false,
    };
    cluster.call(async |client| client.backbones().update_backbone(request.clone()).await)?;
    let whole = ready_with(&cluster, 2)?;
    cluster.submit("j", "b", spec(0, STEPS), &id())?;
    cluster.wait_for("the first steps", |cluster| Ok((cluster.points("j")?.len() > 20).then_some(())))?;
    // Rank 1, so that rank 0 has its weights still.
    let [leads, goes] = &whole.ranks[..] else { anyhow::bail!("{:?}", whole.ranks) };
    cluster.kill_worker(goes.worker.trim_start_matches("workers/"))?;
    let short = ready_with(&cluster, 1)?;
    ensure!(short.message.starts_with("1 of 2 replicas"), "{}", short.message);
    ensure!(short.ranks[0].pid == leads.pid, "rank 0 was started again\n{}", cluster.logs());
    let before = cluster.points("j")?.len();
    cluster.wait_for("steps of one replica", |cluster| {
        Ok((cluster.points("j")?.len() > before).then_some(()))
    })?;
    cluster.pause("j")?;
    cluster.start_worker_with("w3", 1)?;
    std::thread::sleep(PAUSE);
    cluster.resume("j")?;
    let grown = ready_with(&cluster, 2)?;
    ensure!(grown.ranks[0].pid == leads.pid, "rank 0 was started again\n{}", cluster.logs());
    ensure!(cluster.job("j")?.state() != JobState::Succeeded, "the job was too short");
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 0, STEPS, (1, 1))?);
    let reasons = cluster.events()?.into_iter().filter_map(|event| match event.resource {
        Some(Resource::Backbone(b)) if b.state() == BackboneState::Degraded => Some(b.reason()),
        _ => None,
    });
    let mut reasons: Vec<BackboneReason> = reasons.collect();
    reasons.dedup();
    ensure!(reasons.last() == Some(&BackboneReason::MoreRoom), "{reasons:?}");
    Ok(())
}
