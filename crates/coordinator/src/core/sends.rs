//! What agents are told: how things should be, all of it, whenever it is something new. What is lost on the way is told again on the next
//! connection.

use std::collections::{BTreeMap, BTreeSet};

use incipit_proto::{
    Problem,
    names::{BackboneName, WorkerName},
    v1::{BackboneState, JobState, JobWish},
};

use super::{
    Core,
    effects::{EngineAssignment, JobAssignment, JobAssignments, Send, ToAgent},
    job::Job,
    presence::ToldJobs,
};

impl Core {
    /// Says something over a worker's connection, if it has one.
    pub(super) fn send(&mut self, worker: &WorkerName, message: ToAgent) {
        let connection = self.presences.get(worker).and_then(|presence| presence.connection);
        if let Some(connection) = connection {
            self.effects.sends.push(Send { worker: worker.clone(), connection, message });
        }
    }

    /// The same, if it still is this connection.
    pub(super) fn send_over(&mut self, worker: &WorkerName, connection: u64, message: ToAgent) {
        if self.presences.get(worker).is_some_and(|presence| presence.connection == Some(connection)) {
            self.send(worker, message);
        }
    }

    /// Ends a worker's connection, if it has one. Its lease runs on.
    pub(super) fn close(&mut self, worker: &WorkerName, problem: Problem) {
        self.send(worker, ToAgent::Close(problem));
        if let Some(presence) = self.presences.get_mut(worker) {
            presence.connection = None;
        }
    }

    /// Tells every connected worker what it is to have, as far as it was not told so already.
    pub(super) fn send_assignments(&mut self, touched: &BTreeSet<BackboneName>) {
        if std::mem::take(&mut self.engines_dirty) {
            self.send_engines();
        }
        for backbone in touched {
            self.send_jobs(backbone);
        }
    }

    fn send_engines(&mut self) {
        let mut assignments: BTreeMap<&WorkerName, Vec<EngineAssignment>> = BTreeMap::new();
        for backbone in self.rows.backbones.values() {
            let mut ranks: BTreeMap<&WorkerName, Vec<u32>> = BTreeMap::new();
            for rank in backbone.ranks.iter().filter(|rank| !rank.lost) {
                ranks.entry(&rank.worker).or_default().push(rank.rank);
            }
            for (worker, ranks) in ranks {
                let assignment = EngineAssignment {
                    backbone: backbone.name.clone(),
                    epoch: backbone.epoch,
                    ranks,
                    spec: backbone.spec.with_dp(backbone.dp()),
                };
                assignments.entry(worker).or_default().push(assignment);
            }
        }
        for (worker, presence) in &mut self.presences {
            let engines = assignments.remove(worker).unwrap_or_default();
            let Some(connection) = presence.connection else { continue };
            if presence.told_engines.as_ref() != Some(&engines) {
                presence.told_engines = Some(engines.clone());
                let message = ToAgent::Engines(engines);
                self.effects.sends.push(Send { worker: worker.clone(), connection, message });
            }
        }
    }

    fn send_jobs(&mut self, name: &BackboneName) {
        let Some(backbone) = self.rows.backbones.get(name) else {
            self.presences.values_mut().for_each(|presence| drop(presence.told_jobs.remove(name)));
            return;
        };
        // A backbone that is not ready has no jobs; its leader is told them anew with the next epoch.
        let (BackboneState::Ready, Some(leader)) = (backbone.state, backbone.ranks.first()) else { return };
        let (leader, epoch) = (leader.worker.clone(), backbone.epoch);
        let jobs = self.rows.jobs.values();
        let jobs: Vec<&Job> =
            jobs.filter(|job| job.state == JobState::Running && job.backbone == *name).collect();
        let moves = self.is_to_move(name);
        let wish =
            |job: &Job| if moves && job.wish == JobWish::Unspecified { JobWish::Yield } else { job.wish };
        let key = jobs.iter().map(|job| (job.name.clone(), job.last_attempt(), wish(job), job.priority));
        let key = key.collect();
        let told = ToldJobs { epoch, jobs: key };
        let Some(presence) = self.presences.get(&leader) else { return };
        let Some(connection) = presence.connection else { return };
        if presence.told_jobs.get(name) == Some(&told) {
            return;
        }
        let jobs = jobs.into_iter().filter_map(|job| self.assignment(job, wish(job))).collect();
        let message = ToAgent::Jobs(JobAssignments { backbone: name.clone(), epoch, jobs });
        if let Some(presence) = self.presences.get_mut(&leader) {
            presence.told_jobs.insert(name.clone(), told);
        }
        self.effects.sends.push(Send { worker: leader, connection, message });
    }

    fn assignment(&self, job: &Job, wish: JobWish) -> Option<JobAssignment> {
        let attempt = job.open_attempt()?.clone();
        let checkpoint = self.rows.checkpoints.get(&(job.name.clone(), attempt.start_step));
        Some(JobAssignment {
            job: job.name.clone(),
            spec: job.spec.clone(),
            priority: job.priority,
            checkpoint: checkpoint.cloned().map(Box::new),
            wish,
            attempt,
        })
    }
}
