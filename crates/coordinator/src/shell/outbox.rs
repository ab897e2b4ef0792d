//! What is still to be sent over one connection of an agent. It says how things should be, so that a newer message takes the place of an
//! older one that was not sent: however slow the agent is, little is kept.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use incipit_proto::{Problem, names::BackboneName};
use tokio::sync::Notify;
use tonic::Code;

use crate::core::effects::ToAgent;

/// Answers to ranks that wait to be sent, at most.
const ANSWERS: usize = 4096;

/// The outgoing side of a connection.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    welcome: Option<ToAgent>,
    engines: Option<ToAgent>,
    jobs: BTreeMap<BackboneName, ToAgent>,
    answers: VecDeque<ToAgent>,
    acknowledged: Option<u64>,
    close: Option<Problem>,
    closed: bool,
}

impl Outbox {
    /// Adds a message, in the place of those that it makes void.
    pub fn push(&self, message: ToAgent) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match message {
            ToAgent::Welcome { .. } => waiting.welcome = Some(message),
            ToAgent::Acknowledged(sequence) => {
                waiting.acknowledged =
                    Some(waiting.acknowledged.map_or(sequence, |before| before.max(sequence)));
            }
            ToAgent::Engines(_) => waiting.engines = Some(message),
            ToAgent::Jobs(ref jobs) => {
                waiting.jobs.insert(jobs.backbone.clone(), message);
            }
            ToAgent::Rendezvous { ref key, .. } => {
                let is_older =
                    |other: &ToAgent| matches!(other, ToAgent::Rendezvous { key: of, .. } if of == key);
                if let Some(place) = waiting.answers.iter().position(is_older) {
                    waiting.answers[place] = message;
                } else if waiting.answers.len() < ANSWERS {
                    waiting.answers.push_back(message);
                } else {
                    let what = "the agent does not take what it asked for; it is cut off, and may come back";
                    waiting.close = Some(Problem::new(Code::ResourceExhausted, "AGENT_TOO_SLOW", what));
                }
            }
            ToAgent::Close(problem) => waiting.close = Some(problem),
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Ends the stream, after what waits.
    pub fn close(&self, problem: Problem) {
        self.push(ToAgent::Close(problem));
    }

    /// The next message, once there is one; after a problem there is nothing more. For one task alone.
    pub async fn next(&self) -> Option<Result<ToAgent, Problem>> {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.more.notified().await;
        }
    }

    /// `None` if nothing waits.
    fn take(&self) -> Option<Option<Result<ToAgent, Problem>>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.closed {
            return Some(None);
        }
        let first = waiting.welcome.take().or_else(|| waiting.engines.take());
        let next = first
            .or_else(|| waiting.jobs.pop_first().map(|(_, jobs)| jobs))
            .or_else(|| waiting.answers.pop_front())
            .or_else(|| waiting.acknowledged.take().map(ToAgent::Acknowledged));
        if next.is_none() && waiting.close.is_some() {
            waiting.closed = true;
            return waiting.close.take().map(|problem| Some(Err(problem)));
        }
        next.map(|next| Some(Ok(next)))
    }
}

#[cfg(test)]
mod tests {
    use incipit_proto::names::BackboneName;

    use super::*;
    use crate::core::input::RendezvousKey;

    #[tokio::test]
    async fn what_was_not_sent_is_replaced_by_what_is_newer() {
        let outbox = Outbox::default();
        for sequence in [3, 7, 5] {
            outbox.push(ToAgent::Acknowledged(sequence));
        }
        for _ in 0..100 {
            outbox.push(ToAgent::Engines(Vec::new()));
        }
        let welcome =
            ToAgent::Welcome { protocol: 1, heartbeat_interval_ms: 1, lease_ms: 1, acknowledged: 0 };
        outbox.push(welcome.clone());
        outbox.close(Problem::state("X", "x"));
        assert_eq!(outbox.next().await, Some(Ok(welcome)));
        assert_eq!(outbox.next().await, Some(Ok(ToAgent::Engines(Vec::new()))));
        assert_eq!(outbox.next().await, Some(Ok(ToAgent::Acknowledged(7))));
        assert!(matches!(outbox.next().await, Some(Err(_))));
        assert_eq!(outbox.next().await, None);
    }

    #[tokio::test]
    async fn an_answer_that_was_not_sent_is_replaced_by_a_newer_one_to_the_same_question() {
        let outbox = Outbox::default();
        let answer = |key: &str, value: &'static str| {
            let backbone = BackboneName::parse("backbone", "backbones/b").unwrap();
            let key = RendezvousKey { backbone, epoch: 1, key: key.to_owned() };
            ToAgent::Rendezvous { key, value: value.into() }
        };
        for (key, value) in [("a", "1"), ("b", "2"), ("a", "3")] {
            outbox.push(answer(key, value));
        }
        assert_eq!(outbox.next().await, Some(Ok(answer("a", "3"))));
        assert_eq!(outbox.next().await, Some(Ok(answer("b", "2"))));
    }
}
