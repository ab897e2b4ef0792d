//! What must hold whatever happens.

use incipit_proto::v1::JobWish;

use super::*;
use crate::core::{Backbone, Checkpoint, Job};

impl Machine {
    /// What must hold of what was just written.
    pub(super) fn hold_changes(&mut self, effects: &Effects) {
        let mut rows = self.before.clone();
        for change in &effects.changes {
            if let Change::Put(stamp, _) | Change::Remove(stamp, _) = change {
                assert_eq!(stamp.revision, rows.revision + 1, "I9: revisions have no gaps");
            }
            match change {
                Change::Put(stamp, Resource::Job(job)) => {
                    let old = rows.jobs.get(&job.name);
                    if job.state == JobState::Running && old.is_none_or(|old| old.state != JobState::Running)
                    {
                        let all = rows.jobs.values().filter(|other| other.backbone == job.backbone);
                        let running = all.filter(|other| other.state == JobState::Running).count();
                        let places = rows.backbones[&job.backbone].spec.max_running_jobs as usize;
                        assert!(running < places, "I5: too many jobs");
                    }
                    if let Some(old) = old {
                        assert_ne!(stamp.kind, EventKind::Created);
                        assert!(!old.is_final() || old.state == job.state, "I2: a final state changed");
                        let is_damaged = |step| rows.checkpoints[&(job.name.clone(), step)].damaged;
                        let went_back = old.committed_step > job.committed_step;
                        assert!(
                            !went_back || is_damaged(old.committed_step),
                            "I6: a committed step went back"
                        );
                    }
                    self.hold_attempts(&job.name, job.attempts.last().map(|attempt| attempt.number), &rows);
                }
                Change::Put(stamp, Resource::Checkpoint(new)) if stamp.kind == EventKind::Created => {
                    let job = &rows.jobs[&new.job];
                    match job.open_attempt() {
                        None => {
                            let begins = job.attempts.is_empty() && !job.continued_from.is_empty();
                            assert!(begins, "I6: a checkpoint of a job that does not run");
                            assert!(new.step <= job.committed_step, "I6: a checkpoint from after its start");
                        }
                        Some(open) => {
                            let made = (new.attempt, new.epoch);
                            assert_eq!((open.number, open.epoch), made, "I6: a stale checkpoint");
                            let epoch = rows.backbones[&job.backbone].epoch;
                            assert_eq!(epoch, new.epoch, "I6: a checkpoint of an old epoch");
                            assert!(new.step > job.committed_step, "I6: a checkpoint from before");
                        }
                    }
                }
                Change::Put(_, Resource::Backbone(backbone)) => {
                    self.hold_epoch(backbone.name.as_str(), backbone.epoch);
                }
                Change::Remove(_, Resource::Job(job)) => {
                    let is_promoted = rows.prompts.values().any(|version| version.job == job.name);
                    assert!(job.is_final() && !is_promoted, "I17: a job was forgotten that is wanted");
                    self.marks.remove(&job.name);
                }
                Change::AppendMetrics(job, points) => self.hold_metrics(job, points),
                _ => {}
            }
            rows.apply(change);
        }
        self.before = rows;
        assert_eq!(self.world.core.rows(), &self.before, "I7: the core is not what is stored");
        self.hold_state();
    }

    pub(super) fn hold_attempts(&mut self, name: &JobName, number: Option<u32>, rows: &Rows) {
        let now = self.world.now;
        let Some(number) = number else { return };
        let known = rows.jobs.get(name).is_some_and(|job| job.last_attempt() == number);
        if let Some((time, last)) = self.attempts.get(name)
            && !known
            && now.since(*time) < REQUEST_TTL
        {
            assert!(number > *last, "I3: an attempt came twice");
        }
        self.attempts.insert(name.clone(), (now, number));
    }

    pub(super) fn hold_epoch(&mut self, name: &str, epoch: u64) {
        let now = self.world.now;
        if let Some((time, last)) = self.epochs.get(name)
            && now.since(*time) < REQUEST_TTL
        {
            assert!(epoch >= *last, "I3: an epoch went back");
        }
        self.epochs.insert(name.to_owned(), (now, epoch));
    }

    pub(super) fn hold_metrics(&mut self, job: &JobName, points: &[MetricPoint]) {
        let (next, last) = self.marks.entry(job.clone()).or_default();
        for point in points {
            assert_eq!(point.offset, *next, "I10: offsets have no gaps");
            *next += 1;
            let kind = usize::from(matches!(point.point, Some(Point::Evaluation(_))));
            assert!(last[kind].is_none_or(|last| point.step > last), "I10: a step came twice");
            last[kind] = Some(point.step);
        }
    }

    /// What must hold of the whole, always.
    pub(super) fn hold_state(&self) {
        let (core, rows) = (&self.world.core, self.world.core.rows());
        let open = rows.jobs.values().filter(|job| !job.is_final()).count();
        assert!(open <= self.world.config.max_jobs, "I18: {open} jobs have not ended");
        for job in rows.jobs.values() {
            let allowed = JOB_TRANSITIONS.iter().any(|row| (row.2, row.3) == (job.state, job.reason));
            assert!(allowed, "I8: {:?} for {:?}", job.state, job.reason);
            assert_eq!(job.open_attempt().is_some(), job.state == JobState::Running, "I3: {job:?}");
            let pairs = job.attempts.windows(2);
            for pair in pairs {
                assert!(
                    pair[0].end.is_some()
                        && pair[0].number + 1 == pair[1].number
                        && pair[0].epoch <= pair[1].epoch,
                    "I3"
                );
            }
            assert!(job.attempts.len() <= KEPT_ATTEMPTS, "I11");
            self.hold_best(&job.name);
            if job.state == JobState::Running {
                self.hold_running(&job.backbone);
            }
            if !job.is_final() && job.committed_step > 0 {
                let last = core.checkpoint(&job.name, job.committed_step);
                assert!(last.is_ok_and(|last| !last.damaged), "the job cannot go on");
            }
            if let Some(open) = job.open_attempt().filter(|open| open.start_step > 0) {
                assert!(
                    core.checkpoint(&job.name, open.start_step).is_ok(),
                    "the attempt's checkpoint is gone"
                );
            }
        }
        for backbone in rows.backbones.values() {
            let allowed =
                BACKBONE_TRANSITIONS.iter().any(|row| (row.2, row.3) == (backbone.state, backbone.reason));
            assert!(allowed, "I8: {:?} for {:?}", backbone.state, backbone.reason);
            let (state, places) = (backbone.state, backbone.spec.max_running_jobs as usize);
            let running = core.names_of(&backbone.name, JobState::Running).len();
            let moves = core.is_to_move(&backbone.name);
            assert!(!moves || running > 0, "I13: nothing keeps it where it is not to be");
            if state == BackboneState::Ready && !moves {
                self.hold_queue(backbone, places.saturating_sub(running));
            }
            if backbone.place_at.is_none() && state != BackboneState::Failed {
                let enough = backbone.spec.enough().any(|dp| dp == backbone.dp());
                assert!(enough || backbone.spec.min_dp != 1, "I16: {backbone:?}");
                assert_eq!(backbone.ranks.len() as u32, backbone.dp() * backbone.spec.tp, "{backbone:?}");
                assert!(backbone.ranks.iter().all(|rank| !rank.lost));
            }
        }
        for worker in rows.workers.values() {
            assert!(core.used(&worker.name, None).0 <= worker.slots, "I12: a slot is used twice");
        }
        assert!(rows.requests.len() <= 48, "I11");
    }

    /// Jobs wait for a place, and suspects also for each other, or for others to get on.
    fn hold_queue(&self, backbone: &Backbone, free: usize) {
        let core = &self.world.core;
        let queue = core.queue(&backbone.name);
        assert!(queue.iter().all(|job| !job.suspicion.is_proven()), "I15: a job was not judged");
        let running = core.names_of(&backbone.name, JobState::Running);
        let suspects = running.iter().filter(|name| core.rows().jobs[*name].is_suspect()).count();
        assert!(suspects <= 1, "I15: two suspects at once");
        if queue.is_empty() || free == 0 {
            return;
        }
        assert!(queue.iter().all(|job| job.is_suspect()), "I5: a job waits for nothing");
        let others = running.len() > suspects;
        assert!(suspects == 1 || (others && backbone.num_losses > 0), "I5: a suspect waits for nothing");
    }

    /// A job, and each of its tasks, has one best checkpoint at most.
    fn hold_best(&self, job: &JobName) {
        let best = |is_best: &dyn Fn(&Checkpoint) -> bool| {
            self.world.core.checkpoints_of(job).filter(|checkpoint| is_best(checkpoint)).count()
        };
        assert!(best(&|checkpoint| checkpoint.best) <= 1, "I14: {job} has two");
        for task in ["a", "b"] {
            assert!(best(&|checkpoint| checkpoint.is_best_of(task)) <= 1, "I14: {task} of {job} has two");
        }
    }

    pub(super) fn hold_running(&self, name: &incipit_proto::names::BackboneName) {
        let (core, rows) = (&self.world.core, self.world.core.rows());
        let backbone = &rows.backbones[name];
        assert_eq!(backbone.state, BackboneState::Ready, "I1: a job runs on {backbone:?}");
        for rank in &backbone.ranks {
            assert!(rank.ready && !rank.lost, "I1: {rank:?}");
            assert_ne!(rows.workers[&rank.worker].state, WorkerState::Lost, "I1: {rank:?}");
            let presence = core.presences.get(&rank.worker).expect("I1: nobody there");
            assert!(presence.lease > core.last_tick, "I1: the lease has run out");
        }
    }

    /// What must hold of the agents: each knows what it is to have, if it is connected.
    pub(super) fn hold_other(&self) {
        let rows = self.world.core.rows();
        let connected = |id: &WorkerName| {
            let agent = self.world.agents.get(id);
            agent.filter(|agent| agent.connection.is_some())
        };
        for backbone in rows.backbones.values() {
            let Some(leader) = backbone.ranks.first() else { continue };
            if let Some(agent) = connected(&leader.worker)
                && backbone.state == BackboneState::Ready
            {
                let told = agent.jobs.get(&backbone.name).expect("a leader that was not told its jobs");
                assert_eq!(told.epoch, backbone.epoch);
                let told: Vec<_> = told
                    .jobs
                    .iter()
                    .map(|job| (&job.job, job.attempt.number, job.wish, job.priority))
                    .collect();
                let running = rows.jobs.values();
                let running =
                    running.filter(|job| job.state == JobState::Running && job.backbone == backbone.name);
                let moves = self.world.core.is_to_move(&backbone.name);
                let wish = |job: &Job| match job.wish {
                    JobWish::Unspecified if moves => JobWish::Yield,
                    wish => wish,
                };
                let running: Vec<_> =
                    running.map(|job| (&job.name, job.last_attempt(), wish(job), job.priority)).collect();
                assert_eq!(told, running, "a leader has other jobs than it should");
            }
        }
        for (id, agent) in self.world.agents.iter().filter(|(_, agent)| agent.connection.is_some()) {
            let ranks = |backbone: &crate::core::Backbone| {
                let ranks = backbone.ranks.iter().filter(|rank| rank.worker == *id && !rank.lost);
                let ranks: Vec<u32> = ranks.map(|rank| rank.rank).collect();
                (!ranks.is_empty()).then(|| (backbone.name.clone(), backbone.epoch, ranks))
            };
            let wanted: Vec<_> = rows.backbones.values().filter_map(ranks).collect();
            let told = agent.engines.iter();
            let told: Vec<_> =
                told.map(|engine| (engine.backbone.clone(), engine.epoch, engine.ranks.clone())).collect();
            assert_eq!(told, wanted, "{id} has other engines than it should");
        }
    }
}
