//! Connections of agents: in order, late, silent for a while, and broken.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use incipit_coordinator::core::Input;
use incipit_coordinator::shell::Outbox;
use incipit_coordinator::wire;
use incipit_proto::Problem;
use incipit_proto::v1::{AttachRequest, AttachResponse, attach_request::Message};
use incipit_worker::agent::core as agent;

use crate::simulation::coordinator::{CLUSTER, Waiting};
use crate::simulation::world::{Event, Machine, Time, World};

/// Counts connections.
pub(crate) type LinkId = u64;

/// After so long without a sign from the other side, a connection is given up.
const KEEPALIVE: Time = 20_000;
/// The first pause before an agent connects again, and the longest.
const PAUSES: (Time, Time) = (100, 2_000);

/// A connection.
pub(crate) struct Link {
    pub(crate) machine: Machine,
    pub(crate) incarnation: u64,
    /// Of the coordinator.
    pub(crate) life: u64,
    /// What the coordinator calls it, once it has heard a hello.
    connection: Option<u64>,
    worker: Option<incipit_proto::names::WorkerName>,
    outbox: Outbox,
    up: VecDeque<AttachRequest>,
    down: VecDeque<Option<AttachResponse>>,
    open: bool,
    /// Whether the coordinator says nothing more.
    ended: bool,
}

impl World {
    /// An agent tries to connect.
    pub(crate) fn agent_dials(&mut self, machine: Machine, incarnation: u64) {
        let agent = &self.agents[machine];
        if agent.incarnation != incarnation || agent.core.is_none() || agent.link.is_some() {
            return;
        }
        let frozen = agent.frozen_until.saturating_sub(self.now);
        if frozen > 0 {
            return self.later(frozen, Event::AgentDials(machine, incarnation));
        }
        if self.coordinator.core.is_none() || agent.cut_until > self.now {
            self.tell_agent(machine, agent::Input::Disconnected);
            return self.dial_again(machine);
        }
        let id = self.id();
        let link = Link {
            machine,
            incarnation,
            life: self.coordinator.life,
            connection: None,
            worker: None,
            outbox: Outbox::default(),
            up: VecDeque::new(),
            down: VecDeque::new(),
            open: true,
            ended: false,
        };
        self.links.insert(id, link);
        self.agents[machine].link = Some(id);
        self.tell_agent(machine, agent::Input::Connected);
    }

    fn dial_again(&mut self, machine: Machine) {
        let agent = &mut self.agents[machine];
        agent.pause = (agent.pause * 2).clamp(PAUSES.0, PAUSES.1);
        let (pause, incarnation) = (agent.pause, agent.incarnation);
        self.later(pause, Event::AgentDials(machine, incarnation));
    }

    /// An agent says something.
    pub(crate) fn send_up(&mut self, machine: Machine, request: AttachRequest) {
        let Some(id) = self.agents[machine].link else { return };
        let Some(link) = self.links.get_mut(&id).filter(|link| link.open) else { return };
        link.up.push_back(request);
        let delay = self.network_delay();
        self.later(delay, Event::ReachesCoordinator(id));
    }

    fn network_delay(&mut self) -> Time {
        if self.chance.one_in(8) { self.chance.below(200) } else { self.chance.below(5) }
    }

    /// Whether a message waits until its way is whole again; then it is tried again.
    fn is_cut(&mut self, id: LinkId, event: Event) -> bool {
        let cut = self.links.get(&id).map_or(0, |link| self.agents[link.machine].cut_until);
        if cut > self.now {
            self.later(cut - self.now, event);
        }
        cut > self.now
    }

    pub(crate) fn reaches_coordinator(&mut self, id: LinkId) {
        if self.is_cut(id, Event::ReachesCoordinator(id)) {
            return;
        }
        let life = self.coordinator.life;
        let Some(link) = self.links.get_mut(&id).filter(|link| link.open && !link.ended) else { return };
        let Some(request) = link.up.pop_front().filter(|_| link.life == life) else { return };
        self.say(|| format!("<- {request:?}"));
        let input = match self.heard(id, request) {
            Ok(input) => input,
            Err(problem) => return self.broken("a sound protocol", || problem.to_string()),
        };
        self.offer(Waiting { input, caller: None });
    }

    /// What the coordinator's service makes of a message.
    fn heard(&mut self, id: LinkId, request: AttachRequest) -> Result<Input, Problem> {
        let unknown = || Problem::state("NO_HELLO", "no hello first");
        let link = self.links.get_mut(&id).ok_or_else(unknown)?;
        if let (Some(connection), Some(worker)) = (link.connection, &link.worker) {
            let worker = worker.clone();
            let message = wire::agent_message(request)?;
            return Ok(Input::Agent { worker, connection, message });
        }
        let Some(Message::Hello(hello)) = request.message else { return Err(unknown()) };
        let hello = wire::hello(hello, CLUSTER)?;
        let connection = self.coordinator.next_connection;
        self.coordinator.next_connection += 1;
        self.coordinator.connections.insert(connection, id);
        (link.connection, link.worker) = (Some(connection), Some(hello.worker.clone()));
        Ok(Input::Connected { connection, hello })
    }

    /// Something is to be said to an agent.
    pub(crate) fn push_down(&mut self, id: LinkId, message: incipit_coordinator::core::ToAgent) {
        let Some(link) = self.links.get(&id).filter(|link| link.open) else { return };
        link.outbox.push(message);
        self.soon(0, 4, Event::Pumps(id));
    }

    /// The service takes what is in the outbox, as far as it is not too late.
    pub(crate) fn pumps(&mut self, id: LinkId) {
        loop {
            let Some(link) = self.links.get_mut(&id).filter(|link| link.open && !link.ended) else { return };
            let next = std::pin::pin!(link.outbox.next()).poll(&mut Context::from_waker(Waker::noop()));
            let Poll::Ready(Some(message)) = next else { return };
            let message = message.and_then(|message| wire::to_agent(message, CLUSTER, &[]));
            link.ended = message.is_err();
            link.down.push_back(message.ok());
            let (ended, lost) = (link.ended, link.gone());
            let delay = self.network_delay();
            self.later(delay, Event::ReachesAgent(id));
            if let Some(input) = lost.filter(|_| ended) {
                self.offer(Waiting { input, caller: None });
            }
        }
    }

    pub(crate) fn reaches_agent(&mut self, id: LinkId) {
        if self.is_cut(id, Event::ReachesAgent(id)) {
            return;
        }
        let Some(link) = self.links.get_mut(&id).filter(|link| link.open) else { return };
        let Some(response) = link.down.pop_front() else { return };
        let (machine, incarnation) = (link.machine, link.incarnation);
        if self.agents[machine].incarnation != incarnation {
            return;
        }
        let Some(response) = response else {
            link.open = false;
            return self.agent_loses(id);
        };
        self.say(|| format!("-> w{machine}: {response:?}"));
        self.agents[machine].pause = PAUSES.0 / 2;
        self.tell_agent(machine, agent::Input::Received(response));
    }

    /// A connection breaks: what is on its way is lost. Each side learns of it on its own.
    pub(crate) fn cut_link(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.open) else { return };
        link.open = false;
        link.up.clear();
        link.down.clear();
        let silent = self.agents[link.machine].cut_until > self.now;
        for event in [Event::AgentLoses(id), Event::CoordinatorLoses(id)] {
            let delay = if silent { self.chance.between(0, KEEPALIVE) } else { self.chance.below(200) };
            self.later(delay, event);
        }
    }

    /// A machine cannot be reached for a while. Connections outlive that, unless it is longer than they are kept alive.
    pub(crate) fn cut_machine(&mut self, machine: Machine, length: Time) {
        let agent = &mut self.agents[machine];
        agent.cut_until = agent.cut_until.max(self.now + length);
        let Some(id) = self.agents[machine].link.filter(|_| length > KEEPALIVE) else { return };
        self.later(KEEPALIVE, Event::AgentLoses(id));
        self.later(KEEPALIVE + 50, Event::CoordinatorLoses(id));
    }

    pub(crate) fn agent_loses(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.open = false;
        let (machine, incarnation) = (link.machine, link.incarnation);
        let agent = &mut self.agents[machine];
        if agent.incarnation == incarnation && agent.link == Some(id) && agent.core.is_some() {
            agent.link = None;
            agent.trouble = agent.trouble.max(self.now);
            self.tell_agent(machine, agent::Input::Disconnected);
            self.dial_again(machine);
        }
        // The other side sees the end of the stream.
        self.soon(0, 200, Event::CoordinatorLoses(id));
    }

    pub(crate) fn coordinator_loses(&mut self, id: LinkId) {
        let life = self.coordinator.life;
        let Some(link) = self.links.remove(&id) else { return };
        if let Some(input) = link.gone().filter(|_| link.life == life && !link.ended) {
            self.offer(Waiting { input, caller: None });
        }
        let agent = &self.agents[link.machine];
        if agent.incarnation == link.incarnation && agent.link == Some(id) {
            // Its side has not noticed yet, and must: nobody answers there any more.
            self.links.insert(id, Link { open: false, ended: true, ..link });
        }
    }
}

impl Link {
    pub(crate) fn is_open(&self) -> bool {
        self.open && !self.ended
    }

    fn gone(&self) -> Option<Input> {
        let (worker, connection) = (self.worker.clone()?, self.connection?);
        Some(Input::Disconnected { worker, connection })
    }
}
