//! What can be waited for: the newest revision, and that something was added to what hangs on a resource.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::core::effects::Change;

/// So many names that those for which nobody waits any more are worth being forgotten.
const MANY: usize = 1024;

/// Wakes whoever waits. Nothing is queued for anybody: a waiter learns that there is more, and reads it from the store.
#[derive(Debug)]
pub struct Topics {
    revision: watch::Sender<u64>,
    names: Mutex<HashMap<String, watch::Sender<()>>>,
}

impl Topics {
    pub(super) fn new(revision: u64) -> Self {
        Self { revision: watch::Sender::new(revision), names: Mutex::default() }
    }

    /// The newest revision.
    #[must_use]
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Whether anything was added to the metrics or logs of `name`, or itself has changed.
    #[must_use]
    pub fn of(&self, name: &str) -> watch::Receiver<()> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= MANY {
            names.retain(|_, topic| topic.receiver_count() > 0);
        }
        names.entry(name.to_owned()).or_default().subscribe()
    }

    pub(super) fn publish(&self, changes: &[Change]) {
        let mut touched: BTreeSet<String> = BTreeSet::new();
        let mut newest = None;
        for change in changes {
            match change {
                Change::Put(stamp, resource) | Change::Remove(stamp, resource) => {
                    newest = Some(stamp.revision);
                    touched.insert(resource.name());
                }
                Change::AppendMetrics(job, _) => drop(touched.insert(job.to_string())),
                Change::AppendLogs(name, _) => drop(touched.insert(name.clone())),
                _ => {}
            }
        }
        if let Some(newest) = newest {
            self.revision.send_replace(newest);
        }
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        for name in touched {
            if let Some(topic) = names.get(&name) {
                if topic.receiver_count() == 0 {
                    names.remove(&name);
                } else {
                    topic.send_replace(());
                }
            }
        }
    }
}
