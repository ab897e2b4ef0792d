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
        let same = |older: &&mut v1::RendezvousPut| {
            (&older.backbone, older.epoch, &older.key) == (&put.backbone, put.epoch, &put.key)
        };
        match self.puts.iter_mut().find(same) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_put_of_each_key_and_what_is_followed_or_unanswered_is_said_again() {
        let backbone = || "backbones/b".to_owned();
        let put = |key: &str, value: &'static str| v1::RendezvousPut {
            backbone: backbone(),
            epoch: 1,
            key: key.to_owned(),
            value: value.into(),
        };
        let get = |key: &str, follow| v1::RendezvousGet {
            backbone: backbone(),
            epoch: 1,
            key: key.to_owned(),
            follow,
        };
        let mut rendezvous = Rendezvous::default();
        for (key, value) in [("note/0", "1"), ("rank/0", "card"), ("note/0", "2"), ("note/0", "3")] {
            rendezvous.put(put(key, value));
        }
        for (key, follow) in [("rank/1", false), ("note/1", true), ("rank/2", false), ("note/1", true)] {
            rendezvous.get(get(key, follow));
        }
        for key in ["rank/1", "note/1"] {
            let value = v1::RendezvousValue {
                backbone: backbone(),
                epoch: 1,
                key: key.to_owned(),
                value: "v".into(),
            };
            rendezvous.answered(&value);
        }
        let puts = [put("note/0", "3"), put("rank/0", "card")].map(Message::RendezvousPut);
        let gets = [get("note/1", true), get("rank/2", false)].map(Message::RendezvousGet);
        assert_eq!(rendezvous.again(), [puts, gets].concat());
    }
}
