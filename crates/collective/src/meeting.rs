//! Before ranks connect, each sees in the store that all are there, and for the same thing.

use std::sync::Arc;
use std::time::Duration;

use incipit_mesh::Mesh;

use crate::error::Place;
use crate::store::Store;
use crate::transport::Until;
use crate::{Error, Mismatch, Options, Result};

/// How often a rank that belongs to an older epoch is looked at again.
const POLL: Duration = Duration::from_millis(50);

/// How this rank meets the others.
pub(crate) struct Meeting<'a> {
    pub(crate) mesh: Mesh,
    pub(crate) rank: usize,
    pub(crate) options: &'a Options,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) until: Until,
}

/// What a rank writes of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Card {
    epoch: u64,
    tp: usize,
    dp: usize,
    job: String,
}

impl Card {
    fn write(&self) -> String {
        format!("{} {} {} {}", self.epoch, self.tp, self.dp, self.job)
    }

    fn read(text: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(text).ok()?.splitn(4, ' ');
        let epoch = words.next()?.parse().ok()?;
        let (tp, dp) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { epoch, tp, dp, job: words.next()?.to_owned() })
    }
}

impl Meeting<'_> {
    /// What the keys of this epoch begin with.
    pub(crate) fn prefix(&self) -> String {
        format!("epoch/{}", self.options.epoch)
    }

    fn card(&self) -> Card {
        let Options { epoch, job, .. } = self.options;
        Card { epoch: *epoch, tp: self.mesh.tp(), dp: self.mesh.dp(), job: job.clone() }
    }

    /// Writes this rank's card, and waits for everybody's.
    pub(crate) fn call_the_roll(&self) -> Result<()> {
        let Self { mesh, rank, .. } = *self;
        if rank >= mesh.world() {
            return Err(self.error(format!("there are {} ranks, and they count from 0", mesh.world())));
        }
        let mine = self.card();
        if let Some(old) = self.look_up(&key(rank))? {
            let old = self.read(rank, &old)?;
            if old.epoch == mine.epoch && old.job == mine.job {
                let what = "it is there already; give every process a rank of its own, and every start a store of its \
                            own or a higher epoch";
                return Err(self.error(what.to_owned()));
            }
            self.compare(rank, &old)?;
        }
        self.store.set(&key(rank), mine.write().as_bytes())?;
        (0..mesh.world()).filter(|other| *other != rank).try_for_each(|other| self.await_rank(other))
    }

    /// What the store holds, once it can be reached.
    fn look_up(&self, key: &str) -> Result<Option<Vec<u8>>> {
        loop {
            match self.store.try_get(key) {
                Err(_) if !self.until.left().is_zero() => std::thread::sleep(Duration::from_millis(50)),
                found => return found,
            }
        }
    }

    fn await_rank(&self, other: usize) -> Result<()> {
        loop {
            let card = match self.store.get(&key(other), self.until.left()) {
                Err(Error::StoreDeadline { .. }) => return Err(self.absent()),
                card => self.read(other, &card?)?,
            };
            self.compare(other, &card)?;
            if card.epoch == self.options.epoch {
                return Ok(());
            }
            if self.until.is_over() {
                return Err(self.mismatch(Mismatch::Epoch, &self.epochs(other, &card)));
            }
            // It may be what that rank wrote in an earlier epoch, and it may not be here yet.
            std::thread::sleep(POLL.min(self.until.left()));
        }
    }

    /// Refuses what can't become right by waiting.
    fn compare(&self, other: usize, card: &Card) -> Result<()> {
        let mine = self.card();
        if card.job != mine.job {
            let what = format!(
                "rank {other} in the store is of job {:?}; give each job a store of its own",
                card.job
            );
            return Err(self.mismatch(Mismatch::Job, &what));
        }
        if card.epoch > mine.epoch {
            return Err(self.mismatch(Mismatch::Epoch, &self.epochs(other, card)));
        }
        if card.epoch == mine.epoch && (card.tp, card.dp) != (mine.tp, mine.dp) {
            let what = format!(
                "rank {other} was started with --tp {} --dp {} and rank {} with --tp {} --dp {}; start all alike",
                card.tp, card.dp, self.rank, mine.tp, mine.dp
            );
            return Err(self.mismatch(Mismatch::Mesh, &what));
        }
        Ok(())
    }

    fn epochs(&self, other: usize, card: &Card) -> String {
        format!(
            "rank {other} is of epoch {} and rank {} of epoch {}; the older one has been replaced and must end",
            card.epoch, self.rank, self.options.epoch
        )
    }

    fn read(&self, rank: usize, card: &[u8]) -> Result<Card> {
        Card::read(card).ok_or_else(|| {
            let what = format!(
                "what the store holds of rank {rank} cannot be read; give each job a store of its own, and start all \
                 ranks with the same build of this program"
            );
            self.mismatch(Mismatch::Protocol, &what)
        })
    }

    fn mismatch(&self, kind: Mismatch, what: &str) -> Error {
        let place =
            Place { job: self.options.job.clone(), epoch: self.options.epoch, group: "world", sequence: 0 };
        Error::Mismatch { place, kind, what: what.to_owned() }
    }

    /// The ranks that have not appeared.
    fn absent(&self) -> Error {
        let missing = (0..self.mesh.world()).filter(|r| matches!(self.store.try_get(&key(*r)), Ok(None)));
        self.waited_for(missing.collect())
    }

    pub(crate) fn waited_for(&self, missing: Vec<usize>) -> Error {
        let Options { epoch, job, connect_deadline, .. } = self.options;
        let seconds = connect_deadline.as_secs_f64();
        Error::Absent { rank: self.rank, missing, job: job.clone(), epoch: *epoch, seconds }
    }

    /// A failure to connect: a rank that is late, or something else.
    pub(crate) fn failure(&self, what: &str) -> Error {
        if self.until.is_over() { self.waited_for(Vec::new()) } else { self.error(what.to_owned()) }
    }

    pub(crate) fn error(&self, what: String) -> Error {
        let Options { epoch, job, .. } = self.options;
        Error::Connect { rank: self.rank, job: job.clone(), epoch: *epoch, what }
    }
}

fn key(rank: usize) -> String {
    format!("rank/{rank}")
}
