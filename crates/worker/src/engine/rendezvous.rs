//! Where ranks leave their addresses: the coordinator's memory, reached through the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use incipit_collective::{Error, Result, store::Store};
use incipit_proto::v1;

use crate::engine::voice::Voice;
use crate::frames::Notice;

/// How long a question that does not wait may take to be answered.
const GLANCE: Duration = Duration::from_millis(100);

/// What the coordinator has answered so far.
#[derive(Default)]
pub(crate) struct Answers {
    known: Mutex<Known>,
    arrived: Condvar,
}

#[derive(Default)]
struct Known {
    values: BTreeMap<(u64, String), Vec<u8>>,
    /// What the coordinator was asked to send each time that it is new.
    followed: BTreeSet<(u64, String)>,
    /// Epoch of the newest group that was ordered.
    epoch: u64,
}

impl Answers {
    /// Takes an answer.
    pub(crate) fn put(&self, value: v1::RendezvousValue) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values.insert((value.epoch, value.key), value.value.to_vec());
        self.arrived.notify_all();
    }

    /// There is to be a new group: whoever waits for ranks of an older one waits in vain.
    pub(crate) fn begin(&self, epoch: u64) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.epoch = epoch;
        known.values.retain(|(of, _), _| *of >= epoch);
        known.followed.retain(|(of, _)| *of >= epoch);
        self.arrived.notify_all();
    }

    /// The newest group that was ordered, where that is a later one.
    fn later_than(&self, epoch: u64) -> Option<u64> {
        let newest = self.known.lock().unwrap_or_else(PoisonError::into_inner).epoch;
        (newest > epoch).then_some(newest)
    }

    /// The last value that came, and whether it is the first time that somebody asks so.
    fn follow(&self, epoch: u64, key: &str) -> (Option<Vec<u8>>, bool) {
        let key = (epoch, key.to_owned());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        (known.values.get(&key).cloned(), known.followed.insert(key))
    }

    fn wait(&self, epoch: u64, key: &str, until: Instant) -> Option<Vec<u8>> {
        let key = (epoch, key.to_owned());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = known.values.get(&key) {
                return Some(value.clone());
            }
            let left = until.checked_duration_since(Instant::now()).filter(|_| known.epoch <= epoch)?;
            known = self.arrived.wait_timeout(known, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The store of one group of ranks.
pub(crate) struct CoordinatorStore {
    pub(crate) voice: Voice,
    pub(crate) answers: Arc<Answers>,
    pub(crate) backbone: String,
    pub(crate) epoch: u64,
    /// By which other machines reach this one, where that is known.
    pub(crate) address: Option<IpAddr>,
}

impl CoordinatorStore {
    fn ask(&self, key: &str, follow: bool) {
        let (backbone, epoch, key) = (self.backbone.clone(), self.epoch, key.to_owned());
        self.voice.say(Notice::Get(v1::RendezvousGet { backbone, epoch, key, follow }));
    }
}

impl Store for CoordinatorStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let (backbone, key, value) = (self.backbone.clone(), key.to_owned(), value.to_vec().into());
        self.voice.say(Notice::Put(v1::RendezvousPut { backbone, epoch: self.epoch, key, value }));
        Ok(())
    }

    fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>> {
        self.ask(key, false);
        let value = self.answers.wait(self.epoch, key, Instant::now() + deadline);
        value.ok_or_else(|| match self.answers.later_than(self.epoch) {
            Some(newer) => Error::Aborted { rank: None, reason: format!("epoch {newer} has begun") },
            None => Error::StoreDeadline {
                store: "the coordinator".to_owned(),
                key: key.to_owned(),
                seconds: deadline.as_secs_f64(),
            },
        })
    }

    fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.ask(key, false);
        Ok(self.answers.wait(self.epoch, key, Instant::now() + GLANCE))
    }

    /// What the coordinator has sent: a question goes to it once, and it answers for as long as there is the group.
    fn last_known(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let (value, is_first) = self.answers.follow(self.epoch, key);
        if is_first {
            self.ask(key, true);
        }
        Ok(value)
    }

    fn local_address(&self) -> Option<IpAddr> {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::voice::pipe::Pipe;

    /// The questions that were asked since the last call: each key, and whether it is followed.
    fn questions(pipe: &Pipe) -> Vec<(String, bool)> {
        let question = |notice| match notice {
            Notice::Get(get) => (get.key, get.follow),
            other => panic!("{other:?}"),
        };
        pipe.said().into_iter().map(question).collect()
    }

    fn store(pipe: &Pipe, epoch: u64) -> CoordinatorStore {
        let (voice, backbone) = (Voice::new(pipe.clone()), "backbones/b".to_owned());
        CoordinatorStore { voice, answers: Arc::default(), backbone, epoch, address: None }
    }

    fn value(epoch: u64, key: &str, value: &'static str) -> v1::RendezvousValue {
        let (backbone, key) = ("backbones/b".to_owned(), key.to_owned());
        v1::RendezvousValue { backbone, epoch, key, value: value.into() }
    }

    #[test]
    fn what_is_followed_is_asked_for_once_and_known_without_waiting() {
        let pipe = Pipe::default();
        let store = store(&pipe, 3);
        for _ in 0..100 {
            assert_eq!(store.last_known("note").unwrap(), None);
        }
        assert_eq!(questions(&pipe), [("note".to_owned(), true)]);
        for note in ["1", "2"] {
            store.answers.put(value(3, "note", note));
            assert_eq!(store.last_known("note").unwrap().unwrap(), note.as_bytes());
        }
        assert_eq!(questions(&pipe), []);
    }

    #[test]
    fn a_group_follows_nothing_of_the_one_before() {
        let pipe = Pipe::default();
        let old = store(&pipe, 3);
        assert_eq!(old.last_known("note").unwrap(), None);
        old.answers.put(value(3, "note", "old"));
        old.answers.begin(4);
        let new = CoordinatorStore { answers: old.answers, ..store(&pipe, 4) };
        assert_eq!(new.last_known("note").unwrap(), None);
        assert_eq!(questions(&pipe), [("note".to_owned(), true), ("note".to_owned(), true)]);
    }

    #[test]
    fn a_value_that_nobody_leaves_is_waited_for_until_the_deadline_or_the_next_group() {
        let store = store(&Pipe::default(), 3);
        let error = store.get("id", Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&error, Error::StoreDeadline { key, .. } if key == "id"), "{error}");
        store.answers.begin(4);
        let error = store.get("id", Duration::from_secs(600)).unwrap_err();
        assert!(error.to_string().contains("epoch 4 has begun"), "{error}");
    }
}
