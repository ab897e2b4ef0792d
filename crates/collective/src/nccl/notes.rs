//! What ranks tell each other of themselves in the store while they train: that they live, and how far they are.
//!
//! NCCL says neither which rank is late nor, between GPUs of one machine, that one has died. A note of each rank says
//! both. Notes are only read by a rank that has been waiting for a while. A rank's own note tells it how fresh those of others are: what
//! the store does not bring back of its own it does not bring of theirs.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::store::Store;

/// How often a rank writes that it lives.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// After how long without a sign of life a rank is taken for dead.
pub(super) const SILENCE: Duration = Duration::from_secs(10);
/// How many signs of life of its own a rank must have found in the store meanwhile, one after the other.
const ECHOES: u64 = SILENCE.as_secs() / BEAT.as_secs();

/// What a rank wrote of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Note {
    beat: u64,
    left: bool,
    /// In each of its three groups, one more than the number of the operation that it began last; 0 before the first.
    begun: [u64; 3],
}

impl Note {
    fn write(&self) -> String {
        let [tensor, data, world] = self.begun;
        format!("{} {} {tensor} {data} {world}", self.beat, u8::from(self.left))
    }

    fn read(text: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(text).ok()?.split(' ').map(|word| word.parse::<u64>().ok());
        let mut next = || words.next().flatten();
        Some(Self { beat: next()?, left: next()? == 1, begun: [next()?, next()?, next()?] })
    }
}

/// What is known of another rank.
#[derive(Clone, Copy, Debug)]
struct Seen {
    note: Note,
    /// How many of this rank's own signs had been found when the note was found changed.
    at: u64,
}

/// This rank's own signs of life, as it finds them in the store when it looks at those of others: the last one, and how many were new. They
/// are counted, and not the beats between: after a time in which the store brought nothing, others may be brought later than this rank's own.
#[derive(Debug, Default)]
struct Echoes {
    last: u64,
    count: u64,
}

/// What notes say of a rank that others wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absence {
    Left,
    Silent,
}

/// One rank's own note, and its view of the others'.
pub(super) struct Notes {
    store: Arc<dyn Store>,
    prefix: String,
    rank: usize,
    beat: AtomicU64,
    /// When the rank said last that it lives.
    last_beat: Mutex<Option<Instant>>,
    begun: [AtomicU64; 3],
    mine: Mutex<Note>,
    others: Mutex<Vec<Option<Seen>>>,
    echoes: Mutex<Echoes>,
}

impl fmt::Debug for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Notes(rank {})", self.rank)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Notes {
    /// Those of rank `rank` among `world`.
    pub(super) fn new(store: Arc<dyn Store>, prefix: &str, rank: usize, world: usize) -> Self {
        Self {
            store,
            prefix: prefix.to_owned(),
            rank,
            beat: AtomicU64::new(0),
            last_beat: Mutex::default(),
            begun: Default::default(),
            mine: Mutex::default(),
            others: Mutex::new(vec![None; world]),
            echoes: Mutex::default(),
        }
    }

    /// This rank begins operation `sequence` of its group number `group`. Costs nothing: others learn it when they ask.
    pub(super) fn begins(&self, group: usize, sequence: u64) {
        self.begun[group].store(sequence + 1, Ordering::Relaxed);
    }

    /// Writes how far this rank is, if that has changed.
    pub(super) fn publish(&self) {
        let mut mine = lock(&self.mine);
        let begun = [0, 1, 2].map(|group| self.begun[group].load(Ordering::Relaxed));
        let note = Note { beat: self.beat.load(Ordering::Relaxed), left: mine.left, begun };
        if note != *mine && self.store.set(&self.key(self.rank), note.write().as_bytes()).is_ok() {
            *mine = note;
        }
    }

    /// Writes that this rank lives, if it is time for that.
    pub(super) fn beat(&self) {
        let mut last = lock(&self.last_beat);
        if last.is_none_or(|last| last.elapsed() >= BEAT) {
            *last = Some(Instant::now());
            drop(last);
            self.sign();
        }
    }

    fn sign(&self) {
        self.beat.fetch_add(1, Ordering::Relaxed);
        self.publish();
    }

    /// Writes that this rank will begin nothing more.
    pub(super) fn leave(&self) {
        if !std::mem::replace(&mut lock(&self.mine).left, true) {
            self.sign();
        }
    }

    fn key(&self, rank: usize) -> String {
        format!("{}/note/{rank}", self.prefix)
    }

    /// What `rank` of the world has written last; nothing if the store cannot be asked.
    fn read(&self, rank: usize) -> Option<Note> {
        let text = self.store.last_known(&self.key(rank)).ok()?;
        Some(text.and_then(|text| Note::read(&text)).unwrap_or_default())
    }

    /// How many of this rank's own signs were found by now, each at a look of its own; nothing if the store cannot be asked.
    fn echoes(&self) -> Option<u64> {
        let own = self.read(self.rank)?.beat;
        let mut echoes = lock(&self.echoes);
        if own != echoes.last {
            *echoes = Echoes { last: own, count: echoes.count + 1 };
        }
        Some(echoes.count)
    }

    /// What `rank` of the world has written last, and since which of this rank's own signs it has written nothing new; `now` is the last.
    fn look_up(&self, rank: usize, now: u64) -> Option<Seen> {
        let note = self.read(rank)?;
        if now == 0 {
            // What was brought before this rank's own note may be nothing yet.
            return Some(Seen { note, at: now });
        }
        let mut others = lock(&self.others);
        let seen = others[rank].get_or_insert(Seen { note, at: now });
        if seen.note != note {
            *seen = Seen { note, at: now };
        }
        Some(*seen)
    }

    /// The first of `members`, by its place among them, that will not come to operation `sequence` of the group number
    /// `group`, or has died in it. Nothing where the store cannot be asked.
    pub(super) fn absent(&self, group: usize, sequence: u64, members: &[usize]) -> Option<(usize, Absence)> {
        let now = self.echoes()?;
        for (place, rank) in members.iter().enumerate().filter(|(_, rank)| **rank != self.rank) {
            let Seen { note, at } = self.look_up(*rank, now)?;
            match note.left {
                true if note.begun[group] <= sequence => return Some((place, Absence::Left)),
                false if now >= at + ECHOES => return Some((place, Absence::Silent)),
                _ => {}
            }
        }
        None
    }

    /// Those of `members`, by place, that have not begun operation `sequence`.
    pub(super) fn late(&self, group: usize, sequence: u64, members: &[usize]) -> Vec<usize> {
        let others = members.iter().enumerate().filter(|(_, rank)| **rank != self.rank);
        let is_late = |rank: usize| self.read(rank).is_some_and(|note| note.begun[group] <= sequence);
        others.filter(|(_, rank)| is_late(**rank)).map(|(place, _)| place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileStore;

    #[test]
    fn notes_come_back_as_they_were() {
        let note = Note { beat: 7, left: true, begun: [0, u64::MAX, 3] };
        assert_eq!(Note::read(note.write().as_bytes()), Some(note));
        for bad in ["", "1 0 2 3", "1 0 2 3 x", "-1 0 0 0 0"] {
            assert_eq!(Note::read(bad.as_bytes()), None, "{bad}");
        }
    }

    /// What a rank comes to that waits for rank 1 while it gives so many signs of life itself.
    fn wait(notes: &Notes, signs: u64) -> Option<(usize, Absence)> {
        (0..signs).find_map(|_| {
            notes.sign();
            notes.absent(0, 1, &[0, 1])
        })
    }

    #[test]
    fn a_rank_without_a_sign_of_life_is_given_up_unless_it_left() {
        let folder = tempfile::tempdir().unwrap();
        let notes = Notes::new(Arc::new(FileStore::new(folder.path()).unwrap()), "epoch/0", 0, 2);
        assert_eq!(wait(&notes, ECHOES), None);
        assert_eq!(wait(&notes, 1), Some((1, Absence::Silent)));
        let note = Note { left: true, begun: [9, 0, 0], ..Note::default() };
        notes.store.set(&notes.key(1), note.write().as_bytes()).unwrap();
        assert_eq!(wait(&notes, 2 * ECHOES), None);
    }

    #[test]
    fn a_rank_is_not_given_up_for_what_was_not_looked_at_or_was_not_brought() {
        let folder = tempfile::tempdir().unwrap();
        let [frozen, notes] = [0, 1].map(|_| Arc::new(Frozen::of(folder.path())));
        let mine = Notes::new(frozen.clone(), "epoch/0", 0, 2);
        let other = Notes::new(notes, "epoch/0", 1, 2);
        assert_eq!(wait(&mine, 1), None);
        // Both live, and for a long time nobody looks.
        (0..2 * ECHOES).for_each(|_| [&mine, &other].into_iter().for_each(Notes::sign));
        assert_eq!(wait(&mine, 1), None);
        // What the store says of anybody stays what it was, this rank's own note among it.
        frozen.freeze(&[&mine.key(0), &mine.key(1)]);
        assert_eq!(wait(&mine, 2 * ECHOES), None);
        // It brings this rank's note again before the other's, which gets as long as ever.
        frozen.freeze(&[&mine.key(1)]);
        assert_eq!(wait(&mine, ECHOES - 1), None);
        assert_eq!(wait(&mine, 1), Some((1, Absence::Silent)));
        other.sign();
        frozen.freeze(&[]);
        assert_eq!(wait(&mine, ECHOES), None);
    }

    /// A store that can be made to say what it said before.
    struct Frozen {
        store: FileStore,
        said: Mutex<std::collections::BTreeMap<String, Option<Vec<u8>>>>,
    }

    impl Frozen {
        fn of(folder: &std::path::Path) -> Self {
            Self { store: FileStore::new(folder).unwrap(), said: Mutex::default() }
        }

        fn freeze(&self, keys: &[&String]) {
            let said = keys.iter().map(|key| ((*key).clone(), self.store.try_get(key).unwrap()));
            *self.said.lock().unwrap() = said.collect();
        }
    }

    impl Store for Frozen {
        fn set(&self, key: &str, value: &[u8]) -> crate::Result<()> {
            self.store.set(key, value)
        }

        fn get(&self, key: &str, deadline: Duration) -> crate::Result<Vec<u8>> {
            self.store.get(key, deadline)
        }

        fn try_get(&self, key: &str) -> crate::Result<Option<Vec<u8>>> {
            let said = self.said.lock().unwrap().get(key).cloned();
            said.map_or_else(|| self.store.try_get(key), Ok)
        }
    }

    #[test]
    fn a_rank_that_left_is_missed_only_by_what_it_did_not_begin() {
        let folder = tempfile::tempdir().unwrap();
        let notes = [0, 1]
            .map(|rank| Notes::new(Arc::new(FileStore::new(folder.path()).unwrap()), "epoch/0", rank, 2));
        notes[1].begins(2, 4);
        notes[1].publish();
        assert_eq!(notes[0].absent(2, 5, &[0, 1]), None);
        assert_eq!(notes[0].late(2, 5, &[0, 1]), [1]);
        assert_eq!(notes[0].late(2, 4, &[0, 1]), Vec::<usize>::new());
        notes[1].leave();
        assert_eq!(notes[0].absent(2, 4, &[0, 1]), None);
        assert_eq!(notes[0].absent(2, 5, &[0, 1]), Some((1, Absence::Left)));
    }
}
