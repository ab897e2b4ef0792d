//! Where ranks leave their addresses: the coordinator's memory, reached through the agent.

use std::collections::BTreeMap;
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
        self.arrived.notify_all();
    }

    /// The newest group that was ordered, where that is a later one.
    fn later_than(&self, epoch: u64) -> Option<u64> {
        let newest = self.known.lock().unwrap_or_else(PoisonError::into_inner).epoch;
        (newest > epoch).then_some(newest)
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
    fn ask(&self, key: &str) {
        let (backbone, epoch, key) = (self.backbone.clone(), self.epoch, key.to_owned());
        self.voice.say(Notice::Get(v1::RendezvousGet { backbone, epoch, key }));
    }
}

impl Store for CoordinatorStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let (backbone, key, value) = (self.backbone.clone(), key.to_owned(), value.to_vec().into());
        self.voice.say(Notice::Put(v1::RendezvousPut { backbone, epoch: self.epoch, key, value }));
        Ok(())
    }

    fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>> {
        self.ask(key);
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
        self.ask(key);
        Ok(self.answers.wait(self.epoch, key, Instant::now() + GLANCE))
    }

    fn local_address(&self) -> Option<IpAddr> {
        self.address
    }
}
