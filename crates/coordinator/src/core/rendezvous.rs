//! Where the ranks of a group find each other: values by backbone, epoch and key, in memory. They are needed while a group meets, and an
//! agent asks again after a break, so that nothing of it has to be stored.

use std::collections::{BTreeMap, btree_map::Entry};

use bytes::Bytes;
use incipit_proto::{Problem, names::BackboneName, names::WorkerName};
use tonic::Code;

use super::{Core, effects::ToAgent, input::RendezvousKey};

/// Keys of a group, at most.
const MAX_KEYS: usize = 4096;
/// Bytes of a value, at most.
const MAX_VALUE: usize = 64 * 1024;
/// Questions that a group may have open, at most.
const MAX_WAITING: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct Rendezvous {
    groups: BTreeMap<BackboneName, Group>,
}

#[derive(Debug, Default)]
struct Group {
    epoch: u64,
    values: BTreeMap<String, Bytes>,
    waiting: BTreeMap<String, Vec<(WorkerName, u64)>>,
}

impl Rendezvous {
    /// Forgets a group, because it is gone, or about to be of another epoch.
    pub(super) fn forget(&mut self, backbone: &BackboneName) {
        self.groups.remove(backbone);
    }

    fn group(&mut self, key: &RendezvousKey) -> &mut Group {
        let group = self.groups.entry(key.backbone.clone()).or_default();
        if group.epoch != key.epoch {
            *group = Group { epoch: key.epoch, ..Group::default() };
        }
        group
    }
}

impl Core {
    /// A rank leaves a value, and those who wait for it get it. One that comes again is the same.
    pub(super) fn rendezvous_put(&mut self, worker: &WorkerName, key: &RendezvousKey, value: &Bytes) {
        if !self.is_of_group(worker, key) {
            return;
        }
        let group = self.rendezvous.group(key);
        let full = group.values.len() >= MAX_KEYS && !group.values.contains_key(&key.key);
        if full || value.len() > MAX_VALUE {
            let what = format!(
                "{worker} leaves too much for the ranks of {}: a group has at most {MAX_KEYS} keys, each of {MAX_VALUE} bytes",
                key.backbone
            );
            self.close(worker, Problem::new(Code::ResourceExhausted, "RENDEZVOUS_FULL", what));
            return;
        }
        group.values.insert(key.key.clone(), value.clone());
        for (asker, connection) in group.waiting.remove(&key.key).unwrap_or_default() {
            let message = ToAgent::Rendezvous { key: key.clone(), value: value.clone() };
            self.send_over(&asker, connection, message);
        }
    }

    /// A rank asks for a value: it gets it, now or once it is there.
    pub(super) fn rendezvous_get(&mut self, worker: &WorkerName, connection: u64, key: RendezvousKey) {
        if !self.is_of_group(worker, &key) {
            return;
        }
        let group = self.rendezvous.group(&key);
        if let Some(value) = group.values.get(&key.key) {
            let value = value.clone();
            self.send_over(worker, connection, ToAgent::Rendezvous { key, value });
            return;
        }
        let num_waiting = group.waiting.values().map(Vec::len).sum::<usize>();
        if num_waiting >= MAX_WAITING {
            let what = format!("{worker} asks too much: {} has {MAX_WAITING} open questions", key.backbone);
            self.close(worker, Problem::new(Code::ResourceExhausted, "RENDEZVOUS_FULL", what));
            return;
        }
        match group.waiting.entry(key.key) {
            Entry::Vacant(entry) => drop(entry.insert(vec![(worker.clone(), connection)])),
            // Two ranks of one worker may ask for the same: one answer serves both.
            Entry::Occupied(mut entry) => {
                let asker = (worker.clone(), connection);
                if !entry.get().contains(&asker) {
                    entry.get_mut().push(asker);
                }
            }
        }
    }

    fn is_of_group(&self, worker: &WorkerName, key: &RendezvousKey) -> bool {
        self.rows.backbones.get(&key.backbone).is_some_and(|backbone| {
            backbone.epoch == key.epoch
                && backbone.place_at.is_none()
                && backbone.ranks.iter().any(|rank| rank.worker == *worker)
        })
    }
}
