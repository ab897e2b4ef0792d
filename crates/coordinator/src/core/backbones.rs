//! Backbones: what is asked of them, where their ranks go, and what happens when one is lost.

use incipit_proto::{
    Problem,
    names::{BackboneName, WorkerName},
    v1::{BackboneReason, BackboneState, EngineLossCause, JobReason, JobState, WorkerState},
};
use tonic::Code;

use super::{
    Core,
    backbone::{Backbone, Collective, RankPlacement, Shortage},
    effects::{Reply, Resource},
    input::{EngineEvent, NewBackbone},
    jobs::cut,
    placement::Candidate,
    replicas::place_replicas,
    requests::{Outcome, check_etag},
    rows::Target,
    transitions::{BackboneCause, JobCause, backbone_transition},
};

/// How ranks are lost.
pub(super) struct Loss<'a> {
    /// The kind of it.
    pub(super) reason: BackboneReason,
    /// One readable line.
    pub(super) message: &'a str,
    /// What it means for the next time.
    pub(super) charge: Charge,
}

/// What a loss means for the next time that the backbone is placed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Charge {
    /// It is none of the engines' doing: at once.
    Nothing,
    /// It is, and counts towards a crash loop: after a pause that grows.
    CrashLoop,
    /// A model that was loaded before cannot be read now, as on a file system that is away: after [`RELOAD_PAUSE_MS`], as often as it takes.
    Reload,
}

/// Milliseconds before a model that was loaded before is read again.
const RELOAD_PAUSE_MS: u64 = 10_000;

impl Core {
    pub(super) fn create_backbone(
        &mut self,
        new: NewBackbone,
        validate_only: bool,
    ) -> Result<Outcome, Problem> {
        if self.rows.backbones.contains_key(&new.name) {
            let what = format!("there is a {} already; choose another name", new.name);
            return Err(Problem::new(Code::AlreadyExists, "BACKBONE_EXISTS", what).with("name", &new.name));
        }
        let mut backbone = Backbone {
            epoch: self.rows.counters.get(new.name.as_str()).map_or(0, |counter| counter.value),
            name: new.name,
            spec: new.spec,
            labels: new.labels,
            state: BackboneState::Unspecified,
            reason: BackboneReason::Unspecified,
            message: String::new(),
            place_at: Some(self.now),
            shortage: Shortage::default(),
            ranks: Vec::new(),
            fingerprint: String::new(),
            num_parameters: 0,
            d_model: 0,
            num_layers: 0,
            num_losses: 0,
            last_loss: String::new(),
            create_time: self.now,
            ready_time: None,
            created_revision: 0,
            revision: 0,
        };
        enter(&mut backbone, BackboneCause::Created);
        if validate_only {
            let view = self.view_of_backbone(&backbone);
            return Ok(Outcome::Shown(Reply::Backbone(Box::new(view))));
        }
        let name = backbone.name.clone();
        self.put_backbone(backbone);
        Ok(Outcome::Done(Target::Backbone(name)))
    }

    pub(super) fn delete_backbone(
        &mut self,
        name: &BackboneName,
        etag: Option<u64>,
        force: bool,
    ) -> Result<Target, Problem> {
        let backbone =
            self.rows.backbones.get(name).ok_or_else(|| Problem::not_found(name.as_str()))?.clone();
        check_etag(name.as_str(), etag, backbone.revision)?;
        let states = [JobState::Queued, JobState::Running, JobState::Paused];
        let jobs: Vec<_> = states.into_iter().flat_map(|state| self.names_of(name, state)).collect();
        if !force && let Some(first) = jobs.first() {
            let what = format!(
                "{name} has {} jobs that have not ended, {first} among them; cancel them, or delete with force",
                jobs.len()
            );
            return Err(Problem::state("BACKBONE_IN_USE", what).with("name", name).with("jobs", jobs.len()));
        }
        for job in jobs {
            let message = format!("{name} was deleted");
            if self.job(&job)?.state == JobState::Running {
                let (cause, reason) = (JobCause::BackboneDeleted, JobReason::BackboneGone);
                self.end_attempt(&job, cause, reason, &message, None);
            } else if let Ok(mut job) = self.job(&job).cloned() {
                self.step(&mut job, JobCause::BackboneDeleted, &message);
                self.put_job(job);
            }
        }
        if backbone.epoch > 0 {
            self.remember(name.as_str(), backbone.epoch);
        }
        self.rendezvous.forget(name);
        self.token_rates.remove(name);
        self.remove(Resource::Backbone(Box::new(backbone)));
        Ok(Target::Nothing)
    }

    /// Places what has to be placed and may be by now: first what jobs were thrown off, then the oldest.
    pub(super) fn place_waiting(&mut self) {
        let due = self
            .rows
            .backbones
            .values()
            .filter(|backbone| backbone.place_at.is_some_and(|time| time <= self.now));
        let mut due: Vec<_> = due
            .map(|backbone| {
                let thrown_off = backbone.state == BackboneState::Degraded;
                (!thrown_off, backbone.created_revision, backbone.name.clone())
            })
            .collect();
        due.sort();
        for (_, _, name) in due {
            self.place(&name);
        }
    }

    fn place(&mut self, name: &BackboneName) {
        let Some(old) = self.rows.backbones.get(name) else { return };
        let mut backbone = old.clone();
        let candidates = self.candidates(name);
        let sizes = self.sizes(old);
        match sizes.iter().find_map(|dp| place_replicas(old, *dp, &candidates).ok()) {
            None => {
                backbone.shortage.since.get_or_insert(self.now);
                let missing = place_replicas(old, old.spec.dp, &candidates).err().unwrap_or_default();
                let lost = [&*old.last_loss, &missing].into_iter().filter(|part| !part.is_empty());
                backbone.message = lost.collect::<Vec<_>>().join("; ");
            }
            Some(workers) => {
                backbone.ranks = placed(&old.ranks, workers);
                backbone.shortage.placed(old.dp(), backbone.dp());
                backbone.epoch += 1;
                backbone.place_at = None;
                backbone.message.clone_from(&backbone.last_loss);
                if backbone.state == BackboneState::Pending {
                    enter(&mut backbone, BackboneCause::Placed);
                }
                self.rendezvous.forget(name);
            }
        }
        // Said anew at each input, but written only when it is something new.
        if self.rows.backbones.get(name) != Some(&backbone) {
            self.put_backbone(backbone);
        }
    }

    /// Workers that may be given ranks of a backbone.
    pub(super) fn candidates(&self, name: &BackboneName) -> Vec<Candidate> {
        let workers = self.rows.workers.values().filter(|worker| worker.state == WorkerState::Online);
        let candidate = |worker: &super::Worker| {
            let (slots, gpus) = self.used(&worker.name, Some(name));
            let presence = self.presences.get(&worker.name);
            Candidate {
                worker: worker.name.clone(),
                slots: worker.slots.saturating_sub(slots),
                gpus: u32::try_from(worker.machine.gpus.len()).unwrap_or(u32::MAX).saturating_sub(gpus),
                collectives: worker.machine.collectives.clone(),
                connected: presence.is_some_and(|presence| presence.connection.is_some()),
            }
        };
        workers.map(candidate).collect()
    }

    /// Ranks of a backbone are lost, or have to move: its jobs wait, and it is placed again, at once or after a pause that grows with the
    /// number of losses in a row.
    pub(super) fn lose_ranks(
        &mut self,
        name: &BackboneName,
        lost: impl Fn(&RankPlacement) -> bool,
        loss: &Loss<'_>,
    ) {
        let Some(mut backbone) = self.rows.backbones.get(name).cloned() else { return };
        for rank in &mut backbone.ranks {
            rank.ready = false;
            if lost(rank) {
                (rank.lost, rank.pid) = (true, 0);
            }
        }
        // Ranks whose peer is gone notice that long before the worker's lease runs out, or in the moment in which it says that it cannot load:
        // it was not their group that failed.
        let explains = backbone.reason == BackboneReason::GroupFailed
            && matches!(loss.reason, BackboneReason::WorkerLost | BackboneReason::BadModel);
        if explains {
            backbone.num_losses = backbone.num_losses.saturating_sub(1);
            self.excuse(name);
        }
        if (backbone.place_at.is_some() && !explains) || backbone.state == BackboneState::Failed {
            // What else goes while it waits only says who is not there any more.
            if self.rows.backbones.get(name) != Some(&backbone) {
                self.put_backbone(backbone);
            }
            return;
        }
        backbone.last_loss = cut(loss.message);
        // Nobody trains on replicas that do not come to work: it goes on with those that did.
        let charge = if self.shrink_back(&mut backbone) { Charge::Nothing } else { loss.charge };
        if charge == Charge::CrashLoop {
            let settled = |ready| self.now.since(ready) >= self.config.settled_ms;
            let was_ready = backbone.state == BackboneState::Ready;
            let first = was_ready && backbone.ready_time.is_some_and(settled);
            backbone.num_losses = if first { 1 } else { backbone.num_losses + 1 };
            if backbone.num_losses >= self.config.max_losses {
                let message = format!(
                    "lost {} times in a row with no step between, last: {}",
                    backbone.num_losses, loss.message
                );
                self.fail_backbone(backbone, BackboneCause::CrashLoop, &message);
                return;
            }
        }
        let cause = if charge == Charge::CrashLoop { JobCause::EngineLost } else { JobCause::RankLost };
        self.throw_off(name, cause, loss.message);
        let delay = match charge {
            Charge::Nothing => 0,
            Charge::CrashLoop => backoff(backbone.num_losses),
            Charge::Reload => RELOAD_PAUSE_MS,
        };
        backbone.place_at = Some(self.now.after(delay));
        enter(&mut backbone, BackboneCause::Lost(loss.reason));
        backbone.message.clone_from(&backbone.last_loss);
        self.put_backbone(backbone);
    }

    /// Has a backbone that has failed loaded again. Its jobs have waited.
    pub(super) fn retry_backbone(
        &mut self,
        name: BackboneName,
        etag: Option<u64>,
    ) -> Result<Target, Problem> {
        let old = self.rows.backbones.get(&name).ok_or_else(|| Problem::not_found(name.as_str()))?;
        check_etag(name.as_str(), etag, old.revision)?;
        if old.state != BackboneState::Failed {
            let what = format!("{name} has not failed: there is nothing to try again");
            return Err(Problem::state("BACKBONE_STATE", what)
                .with("name", &name)
                .with("state", old.state.as_str_name()));
        }
        let mut backbone = old.clone();
        enter(&mut backbone, BackboneCause::RetryRequested);
        backbone.message.clear();
        backbone.last_loss.clear();
        (backbone.num_losses, backbone.place_at, backbone.shortage) =
            (0, Some(self.now), Shortage::default());
        if backbone.ready_time.is_none() {
            // That of the rank that was first; nobody has trained on it.
            backbone.fingerprint.clear();
        }
        self.put_backbone(backbone);
        self.trust(&name);
        Ok(Target::Backbone(name))
    }

    fn fail_backbone(&mut self, mut backbone: Backbone, cause: BackboneCause, message: &str) {
        self.throw_off(&backbone.name, JobCause::RankLost, message);
        enter(&mut backbone, cause);
        backbone.message = cut(message);
        backbone.ranks.clear();
        (backbone.place_at, backbone.shortage) = (None, Shortage::default());
        self.rendezvous.forget(&backbone.name);
        self.token_rates.remove(&backbone.name);
        self.put_backbone(backbone);
    }

    /// An agent says of a rank that it is ready, or lost. What is of another epoch, or of a rank that the worker does not have, has no effect.
    pub(super) fn engine_report(
        &mut self,
        worker: &WorkerName,
        name: &BackboneName,
        (epoch, rank): (u64, u32),
        event: EngineEvent,
    ) {
        let Some(backbone) = self.rows.backbones.get(name) else { return };
        let mine = |placement: &RankPlacement| {
            placement.worker == *worker
                && !placement.lost
                && (placement.rank == rank || backbone.spec.collective == Collective::Local)
        };
        if backbone.epoch != epoch || !backbone.ranks.iter().any(mine) {
            return;
        }
        let ranks: Vec<u32> = backbone.ranks.iter().filter(|rank| mine(rank)).map(|rank| rank.rank).collect();
        match event {
            EngineEvent::Ready { pid, fingerprint, num_parameters, d_model, num_layers } => {
                let mut backbone = backbone.clone();
                if backbone.place_at.is_some() {
                    return;
                }
                if !backbone.fingerprint.is_empty() && backbone.fingerprint != fingerprint {
                    let message = format!(
                        "rank {rank} on {worker} has loaded another model: its fingerprint is {fingerprint}, not {}; give every worker the same files",
                        backbone.fingerprint
                    );
                    if backbone.shortage.grown_from > 0 {
                        let (reason, charge) = (BackboneReason::BadModel, Charge::Nothing);
                        let lost = |placement: &RankPlacement| ranks.contains(&placement.rank);
                        self.lose_ranks(name, lost, &Loss { reason, message: &message, charge });
                        return;
                    }
                    self.fail_backbone(backbone, BackboneCause::BadModel, &message);
                    return;
                }
                backbone.fingerprint = fingerprint;
                (backbone.num_parameters, backbone.d_model, backbone.num_layers) =
                    (num_parameters, d_model, num_layers);
                self.ranks_ready(backbone, &ranks, pid);
            }
            EngineEvent::Lost { cause, message, alive } => {
                let message = format!("rank {rank} on {worker}: {message}");
                let lost = |placement: &RankPlacement| !alive && ranks.contains(&placement.rank);
                let reason = match cause {
                    EngineLossCause::BadModel if backbone.ready_time.is_some() => {
                        let pause = RELOAD_PAUSE_MS / 1000;
                        let message =
                            format!("{message} (it was loaded before, so this is tried every {pause} s)");
                        let (reason, charge) = (BackboneReason::BadModel, Charge::Reload);
                        self.lose_ranks(name, lost, &Loss { reason, message: &message, charge });
                        return;
                    }
                    EngineLossCause::BadModel => {
                        let backbone = backbone.clone();
                        self.fail_backbone(backbone, BackboneCause::BadModel, &message);
                        return;
                    }
                    EngineLossCause::Hung => BackboneReason::EngineHung,
                    EngineLossCause::GroupFailed => BackboneReason::GroupFailed,
                    EngineLossCause::Exited | EngineLossCause::Unspecified => BackboneReason::EngineExited,
                };
                self.lose_ranks(name, lost, &Loss { reason, message: &message, charge: Charge::CrashLoop });
            }
        }
    }

    fn ranks_ready(&mut self, mut backbone: Backbone, ranks: &[u32], pid: u32) {
        for placement in &mut backbone.ranks {
            if ranks.contains(&placement.rank) {
                (placement.ready, placement.pid) = (true, pid);
            }
        }
        if backbone.state != BackboneState::Ready && backbone.ranks.iter().all(|rank| rank.ready) {
            enter(&mut backbone, BackboneCause::Loaded);
            backbone.ready_time = Some(self.now);
            self.take_stock(&mut backbone);
        }
        if self.rows.backbones.get(&backbone.name) != Some(&backbone) {
            self.put_backbone(backbone);
        }
    }

    /// A job of the backbone got further than ever: whatever lost it before, it works.
    pub(super) fn forgive_losses(&mut self, name: &BackboneName) {
        if let Some(backbone) = self.rows.backbones.get(name)
            && backbone.num_losses > 0
        {
            let mut backbone = backbone.clone();
            (backbone.num_losses, backbone.last_loss) = (0, String::new());
            self.put_backbone(backbone);
        }
    }
}

/// Moves a backbone to its next state. A cause that does not fit is a fault of the program; the backbone then stays as it is.
fn enter(backbone: &mut Backbone, cause: BackboneCause) {
    let from = Some(backbone.state).filter(|state| *state != BackboneState::Unspecified);
    let to = backbone_transition(from, cause);
    debug_assert!(to.is_some(), "{backbone:?} has no way by {cause:?}");
    if let Some((state, reason)) = to {
        (backbone.state, backbone.reason) = (state, reason);
    }
}

/// The ranks at their workers. A process that was not lost is there still, and takes part under the new epoch.
fn placed(old: &[RankPlacement], workers: Vec<WorkerName>) -> Vec<RankPlacement> {
    let place = |(rank, worker)| {
        let stays = old
            .iter()
            .find(|placement| placement.rank == rank && placement.worker == worker && !placement.lost);
        RankPlacement {
            rank,
            worker,
            pid: stays.map_or(0, |placement| placement.pid),
            ready: false,
            lost: false,
        }
    };
    (0..).zip(workers).map(place).collect()
}

/// Milliseconds before a backbone is placed again after so many losses in a row: 0, 1 s, 2 s, 4 s, 8 s.
fn backoff(num_losses: u32) -> u64 {
    match num_losses {
        0 | 1 => 0,
        n => 1000 << (n - 2).min(3),
    }
}
