//! What ranks leave for each other, and ask for: the coordinator keeps it in memory alone, so that it is said again after a break.

use incipit_proto::v1::{self, attach_request::Message};

/// The last put of each key, and gets that are not answered for the last time.
#[derive(Debug, Default)]
pub(crate) struct Rendezvous {
    puts: Vec<v1::RendezvousPut>,
    gets: Vec<v1::RendezvousGet>,
}

impl Rendezvous {
    /// Something was left.
    pub(crate) fn put(&mut self, put: v1::RendezvousPut) {
        let key = |put: &v1::RendezvousPut| (put.backbone.clone(), put.epoch, put.key.clone());
        match self.puts.iter_mut().find(|other| key(other) == key(&put)) {
            Some(older) => *older = put,
            None => self.puts.push(put),
        }
    }

    /// Something was asked for.
    pub(crate) fn get(&mut self, get: v1::RendezvousGet) {
        if !self.gets.contains(&get) {
            self.gets.push(get);
        }
    }

    /// There is an answer.
    pub(crate) fn answered(&mut self, value: &v1::RendezvousValue) {
        self.gets.retain(|get| {
            get.follow || (&get.backbone, get.epoch, &get.key) != (&value.backbone, value.epoch, &value.key)
        });
    }

    /// What a coordinator is to be told that may know nothing of it.
    pub(crate) fn again(&self) -> Vec<Message> {
        let puts = self.puts.iter().cloned().map(Message::RendezvousPut);
        puts.chain(self.gets.iter().cloned().map(Message::RendezvousGet)).collect()
    }

    /// Forgets what belongs to groups that are no more.
    pub(crate) fn forget_old(&mut self, assignments: &v1::EngineAssignments) {
        let known = |backbone: &str, epoch: u64| {
            assignments.engines.iter().any(|engine| engine.backbone == backbone && engine.epoch <= epoch)
        };
        self.puts.retain(|put| known(&put.backbone, put.epoch));
        self.gets.retain(|get| known(&get.backbone, get.epoch));
    }
}
