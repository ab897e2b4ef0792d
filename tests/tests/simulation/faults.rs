//! What goes wrong, until it does no more.

use incipit_coordinator::core::{Input, Request};
use incipit_proto::names::WorkerName;
use incipit_proto::v1::EngineLossCause;
use incipit_worker::agent::core::Input as AgentInput;

use crate::simulation::coordinator::{Doom, Waiting};
use crate::simulation::engine::Pid;
use crate::simulation::oracle::Watch;
use crate::simulation::world::{Event, Machine, Time, World};

/// How long a loss may go unnoticed.
const NOTICED: Time = 5_000;

impl World {
    /// Something goes wrong.
    pub(crate) fn fault(&mut self) {
        if self.now >= self.faults_end {
            return;
        }
        self.told.faults += 1;
        // Some stories are storms at times, in which one fault meets another.
        let pause = if self.chance.one_in(3) {
            self.chance.between(10, 400)
        } else {
            self.chance.between(400, 6_000)
        };
        self.later(pause, Event::Fault);
        let machine = self.chance.below(self.agents.len() as u64) as Machine;
        let kind = self.chance.below(24);
        self.say(|| format!("fault {kind} at w{machine}"));
        match kind {
            0 | 1 => self.coordinator_ends(),
            2 => self.coordinator.doom = Some(Doom::BeforeCommit),
            3 => self.coordinator.doom = Some(Doom::AfterCommit),
            4 => self.coordinator.stall = self.chance.between(100, 5_000),
            5..8 => {
                if let Some(link) = self.agents[machine].link {
                    self.cut_link(link);
                }
            }
            8..11 => {
                let length =
                    if self.chance.one_in(4) { self.chance.below(30_000) } else { self.chance.below(6_000) };
                if length > NOTICED {
                    self.watch_machine(machine);
                }
                self.cut_machine(machine, length);
            }
            11..13 => {
                self.watch_machine(machine);
                self.agent_ends(machine);
            }
            13..15 => {
                let length = self.chance.below(10_000);
                self.freeze(machine, length);
            }
            15 => self.tell_agent(machine, AgentInput::Terminate),
            16 if self.now + 8_000 < self.faults_end => self.drain_worker(machine),
            16 | 17 => self.fail_group(),
            18..21 => self.hang(),
            _ => self.crash(),
        }
    }

    fn any_engine(&mut self) -> Option<Pid> {
        let pids: Vec<Pid> = self.engines.keys().copied().filter(|pid| self.alive(*pid).is_some()).collect();
        self.chance.pick(&pids)
    }

    fn crash(&mut self) {
        let Some(pid) = self.any_engine() else { return };
        self.watch_engine(pid);
        if self.chance.one_in(3) {
            return self.device_fails(pid);
        }
        self.engine_dies(pid);
    }

    /// An engine says why it ends. That takes a while, in which it hears nothing any more; mostly its agent is faster.
    fn device_fails(&mut self, pid: Pid) {
        self.engine_fails(pid, EngineLossCause::Exited, "its device has failed");
        if let Some(engine) = self.engines.get_mut(&pid) {
            engine.hung = true;
        }
        self.soon(0, 3_000, Event::EngineDies(pid));
    }

    fn hang(&mut self) {
        let Some(pid) = self.any_engine() else { return };
        self.watch_engine(pid);
        if let Some(engine) = self.engines.get_mut(&pid) {
            engine.hung = true;
        }
    }

    fn fail_group(&mut self) {
        let Some(pid) = self.any_engine() else { return };
        let group = self.engines[&pid].group;
        self.group_fails(pid, group);
    }

    fn drain_worker(&mut self, machine: Machine) {
        let Ok(name) = WorkerName::of_id("id", &format!("w{machine}")) else { return };
        let input = Input::Request {
            actor: "operator".to_owned(),
            key: None,
            request: Request::DrainWorker { name, etag: None },
        };
        self.offer(Waiting { input, caller: None });
    }

    /// An engine is about to be lost: that is to be noticed.
    fn watch_engine(&mut self, pid: Pid) {
        let engine = &self.engines[&pid];
        let core = self.agents[engine.machine].core.as_ref().filter(|_| !engine.hung);
        let known =
            core.and_then(|core| core.engines().get(&engine.key)).filter(|known| !known.lost && !known.dying);
        let Some(epoch) = known.map(|known| known.assignment.epoch) else { return };
        self.watch(Watch {
            pid: Some(pid),
            machine: Some(engine.machine),
            backbone: engine.key.backbone.clone(),
            epoch,
            since: self.now,
        });
    }

    /// All engines of a machine are about to be lost.
    fn watch_machine(&mut self, machine: Machine) {
        let agent = &self.agents[machine];
        // Whoever is away already is noticed by that.
        let away = agent.cut_until > self.now || agent.frozen_until > self.now || agent.link.is_none();
        let engines = agent.core.as_ref().filter(|_| !away).map(|core| core.engines().clone());
        for (key, engine) in engines.unwrap_or_default() {
            let (backbone, epoch) = (key.backbone, engine.assignment.epoch);
            self.watch(Watch { pid: None, machine: None, backbone, epoch, since: self.now });
        }
    }

    fn watch(&mut self, watch: Watch) {
        let id = self.id();
        self.watches.insert(id, watch);
        self.later(NOTICED, Event::Deadline(id));
    }

    /// From now on nothing goes wrong.
    pub(crate) fn faults_end(&mut self) {
        self.faulty = false;
        self.coordinator.doom = None;
        self.coordinator.stall = 0;
        let drained = self.coordinator.rows.workers.values().filter(|worker| worker.draining);
        let drained: Vec<String> = drained.map(|worker| worker.name.to_string()).collect();
        for machine in 0..self.agents.len() {
            // Whoever has drained a machine starts it again.
            if drained.contains(&format!("workers/w{machine}")) {
                self.agent_ends(machine);
            }
        }
    }
}
