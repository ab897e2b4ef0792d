//! Where the ranks of a group find each other, and over NCCL each second leave a sign of life: values by backbone, epoch and key, in memory. An
//! agent says and asks all of it again after a break, so that nothing has to be stored.

use std::collections::BTreeMap;

use bytes::Bytes;
use incipit_proto::{Problem, names::BackboneName, names::WorkerName};
use tonic::Code;

use super::{Core, effects::ToAgent, input::RendezvousKey};

/// Keys of a group, at most.
const MAX_KEYS: usize = 4096;
/// Bytes of a value, at most.
const MAX_VALUE: usize = 64 * 1024;
/// Questions that a worker may have open in a group, at most.
const MAX_OPEN: usize = 2 * MAX_KEYS;

#[derive(Debug, Default)]
pub(super) struct Rendezvous {
    groups: BTreeMap<BackboneName, Group>,
}

#[derive(Debug, Default)]
struct Group {
    epoch: u64,
    values: BTreeMap<String, Bytes>,
    /// By key, and by the connection over which they came: two ranks of one worker may ask for the same, and one answer serves both.
    open: BTreeMap<String, BTreeMap<(WorkerName, u64), Open>>,
}

/// A question that is not answered, or not for the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Open {
    /// For the first value.
    Once,
    /// For each value.
    Follows,
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
    /// A rank leaves a value in the place of an older one, and those who wait for it or follow it get it.
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
        let Some(open) = group.open.get_mut(&key.key) else { return };
        let askers: Vec<_> = open.keys().cloned().collect();
        open.retain(|_, question| *question == Open::Follows);
        for (asker, connection) in askers {
            let message = ToAgent::Rendezvous { key: key.clone(), value: value.clone() };
            self.send_over(&asker, connection, message);
        }
    }

    /// A rank asks for a value: it gets it, now or once it is there, and if it `follows` the value, each newer one.
    pub(super) fn rendezvous_get(
        &mut self,
        worker: &WorkerName,
        connection: u64,
        (key, follows): (RendezvousKey, bool),
    ) {
        if !self.is_of_group(worker, &key) {
            return;
        }
        let group = self.rendezvous.group(&key);
        let value = group.values.get(&key.key).cloned();
        if value.is_none() || follows {
            let asker = (worker.clone(), connection);
            if group.open.values().filter(|open| open.contains_key(&asker)).count() >= MAX_OPEN {
                let what =
                    format!("{worker} asks too much: it has {MAX_OPEN} open questions of {}", key.backbone);
                return self.close(worker, Problem::new(Code::ResourceExhausted, "RENDEZVOUS_FULL", what));
            }
            let open = group.open.entry(key.key.clone()).or_default();
            // Over its connections before this one nothing more is heard.
            open.retain(|(other, over), _| other != worker || *over == connection);
            let question = open.entry(asker).or_insert(Open::Once);
            *question = (*question).max(if follows { Open::Follows } else { Open::Once });
        }
        if let Some(value) = value {
            self.send_over(worker, connection, ToAgent::Rendezvous { key, value });
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
