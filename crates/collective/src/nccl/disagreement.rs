//! What a rank finds out about operations that do not match, left in the store for those who may only see that they failed.

use std::fmt;
use std::sync::Arc;

use crate::Mismatch;
use crate::store::Store;
use crate::transport::Broken;

/// The disagreement of one group of ranks, as its members write and read it.
pub(super) struct Disagreement {
    store: Arc<dyn Store>,
    key: String,
}

impl fmt::Debug for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disagreement({})", self.key)
    }
}

impl Disagreement {
    /// That of the group whose keys begin with `prefix`.
    pub(super) fn new(store: Arc<dyn Store>, prefix: &str) -> Self {
        Self { store, key: format!("{prefix}/disagreement") }
    }

    /// Leaves one about operation `sequence`. Without a store the others see what they see.
    pub(super) fn leave(&self, kind: Mismatch, sequence: u64, what: &str) {
        let place = Mismatch::ALL.iter().position(|other| *other == kind).unwrap_or_default();
        let _ = self.store.set(&self.key, format!("{place} {sequence} {what}").as_bytes());
    }

    /// The one that is known to be left.
    pub(super) fn last_known(&self) -> Option<Broken> {
        read(self.store.last_known(&self.key).ok()??)
    }

    /// The one that is left. May take as long as the store's answer.
    pub(super) fn find(&self) -> Option<Broken> {
        read(self.store.try_get(&self.key).ok()??)
    }
}

fn read(text: Vec<u8>) -> Option<Broken> {
    let text = String::from_utf8(text).ok()?;
    let mut words = text.splitn(3, ' ');
    let kind = *Mismatch::ALL.get(words.next()?.parse::<usize>().ok()?)?;
    let sequence = words.next()?.parse().ok()?;
    Some(Broken::Mismatch { kind, sequence, what: words.next()?.to_owned() })
}
