//! Whether the ranks of this process get on, in loading, in passes and between them. The thread that tells the agent that the process is alive looks at them each time before; it asks
//! no device, for that may take as long as a rank that is waited for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use incipit_collective::Ranks;
use incipit_proto::v1::EngineLossCause;
use incipit_tune::backbone::Loading;
use incipit_tune::pace::{Pace, Pass};

use crate::engine::Loss;
use crate::engine::voice::Voice;
use crate::frames::{self, Failed, Notice};

/// How often the agent is told that the process is alive.
const ALIVE: Duration = Duration::from_millis(500);
/// As long is taken to have passed between two looks at most: where it was longer, the whole process stood still, and no rank by itself.
const LONGEST: Duration = Duration::from_secs(1);
/// How many times as long as any of late a pass may take. A GPU that others use too, or a disk that is read again, is slower than that
/// for no long time.
const TIMES: u32 = 8;
/// How long a pass may take that is the first of its kind: what it needs may have to be read and compiled. As long a rank that loads may read
/// nothing, and one that makes no pass take for a turn.
const FIRST: Duration = Duration::from_secs(600);

/// Says why this process leaves a group, once.
pub(crate) struct Farewell {
    pub(crate) voice: Voice,
    pub(crate) epoch: u64,
    said: AtomicBool,
}

impl Farewell {
    pub(crate) fn new(voice: Voice, epoch: u64) -> Self {
        Self { voice, epoch, said: AtomicBool::new(false) }
    }

    /// Tells the agent why, unless it knows.
    pub(crate) fn say(&self, (cause, message): &Loss) {
        if !self.said.swap(true, Ordering::Relaxed) {
            let epoch = self.epoch;
            self.voice.log("", "ERROR", format!("epoch {epoch} ends: {message}"));
            let (cause, message) = ((*cause).into(), message.clone());
            self.voice.say(Notice::Failed(Failed { epoch, cause, message }));
        }
    }
}

/// The ranks of this process.
#[derive(Clone)]
pub(crate) struct Watches {
    state: Arc<Mutex<State>>,
    voice: Voice,
}

#[derive(Default)]
struct State {
    watched: Vec<Arc<Watch>>,
    reading: Vec<Arc<Reading>>,
    /// How far each rank has loaded its part; also of those that have.
    loadings: BTreeMap<usize, Arc<Loading>>,
    /// Whether the process loads, and so is in no group.
    loads: bool,
    /// Those that have met others, by the epoch of their group.
    met: Vec<(u64, Weak<Ranks>)>,
    /// The newest epoch that is known of.
    newest: u64,
    /// The last epoch for which it was said that this process does not get on with loading.
    told: u64,
}

impl Watches {
    /// Looks at the ranks twice a second from now on, and has `voice` say that the process is alive.
    pub(crate) fn start(voice: Voice) -> Self {
        let watches = Self { state: Arc::default(), voice };
        let watched = watches.clone();
        std::thread::spawn(move || {
            let (mut last, mut told) = (Instant::now(), frames::Loading::default());
            loop {
                let passed = last.elapsed().min(LONGEST);
                last = Instant::now();
                let (ranks, reading) = watched.all();
                ranks.iter().for_each(|watch| watch.look(passed));
                reading
                    .iter()
                    .filter_map(|reading| reading.look(passed))
                    .for_each(|loss| watched.lose(&loss));
                watched.tell(&mut told);
                watched.voice.alive();
                std::thread::sleep(ALIVE);
            }
        });
        watches
    }

    /// Tells how far the ranks of this process have loaded, where it is another than was `told`.
    fn tell(&self, told: &mut frames::Loading) {
        let loadings: Vec<Arc<Loading>> = self.lock().loadings.values().cloned().collect();
        let bytes = loadings.iter().filter_map(|loading| loading.bytes());
        let (loaded, total) = bytes.fold((0, 0), |all, part| (all.0 + part.0, all.1 + part.1));
        let now = frames::Loading { loaded, total };
        if total > 0 && now != *told {
            *told = now;
            self.voice.say(Notice::Loading(now));
        }
    }

    fn all(&self) -> (Vec<Arc<Watch>>, Vec<Arc<Reading>>) {
        let state = self.lock();
        (state.watched.clone(), state.reading.clone())
    }

    /// Watches a rank for as long as what is returned is there.
    pub(crate) fn add(&self, watch: Watch) -> Watched {
        let watch = Arc::new(watch);
        self.lock().watched.push(watch.clone());
        Watched { watches: self.clone(), watch }
    }

    /// The process loads for the group of `epoch`, for as long as what is returned is there: it is in no group, and so has left those before
    /// any other.
    pub(crate) fn load(&self, epoch: u64) -> Loads {
        let newest = {
            let mut state = self.lock();
            state.loads = true;
            state.newest
        };
        if newest > epoch {
            self.voice.say(Notice::Joining(newest));
        }
        Loads { watches: self.clone() }
    }

    /// Watches whether a rank gets on with reading `model`, for as long as what is returned is there.
    pub(crate) fn read(&self, rank: usize, model: &str) -> BeingRead {
        let (model, loading, seen) = (model.to_owned(), Mutex::default(), Mutex::default());
        let reading = Arc::new(Reading { rank, model, loading, seen });
        self.lock().reading.push(reading.clone());
        BeingRead { watches: self.clone(), reading }
    }

    /// What is lost outside of any group counts for the one that is to be joined, and is said once for each: the agent may not hear it for one
    /// that is no more.
    fn lose(&self, loss: &Loss) {
        let mut state = self.lock();
        if state.told < state.newest {
            state.told = state.newest;
            let farewell = Farewell::new(self.voice.clone(), state.newest);
            drop(state);
            farewell.say(loss);
        }
    }

    /// A rank of this process has met the others of its group.
    pub(crate) fn met(&self, epoch: u64, ranks: &Arc<Ranks>) {
        let mut state = self.lock();
        state.met.retain(|(_, ranks)| ranks.strong_count() > 0);
        state.met.push((epoch, Arc::downgrade(ranks)));
        if state.newest > epoch {
            abort(ranks.clone(), begun(state.newest));
        }
    }

    /// There is a new group: no rank of this process is to wait for one of an older group, which may be gone without a word.
    pub(crate) fn begin(&self, epoch: u64) {
        let mut state = self.lock();
        state.newest = epoch;
        let older = state.met.iter().filter(|(of, _)| *of < epoch);
        older.filter_map(|(_, ranks)| ranks.upgrade()).for_each(|ranks| abort(ranks, begun(epoch)));
        if state.loads {
            // What it loads is for the new group as well.
            drop(state);
            self.voice.say(Notice::Joining(epoch));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The process loads.
pub(crate) struct Loads {
    watches: Watches,
}

impl Drop for Loads {
    fn drop(&mut self) {
        self.watches.lock().loads = false;
    }
}

/// A rank reads its part of a model.
struct Reading {
    rank: usize,
    model: String,
    /// How far it has got.
    loading: Mutex<Arc<Loading>>,
    /// What it was at the last look, and for how long it had been that.
    seen: Mutex<(u64, Duration)>,
}

impl Reading {
    /// Looks at it `passed` after the last time.
    fn look(&self, passed: Duration) -> Option<Loss> {
        let count = self.loading().reads();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (was, before) = *seen;
        let still = if count == was { before + passed } else { Duration::ZERO };
        *seen = (count, still);
        (still > FIRST).then(|| (EngineLossCause::Hung, self.hangs()))
    }

    fn loading(&self) -> MutexGuard<'_, Arc<Loading>> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hangs(&self) -> String {
        format!(
            "rank {} hangs: it has read nothing of {} for {} s; see whether that can be read on its machine, and what the kernel's log there \
             (dmesg) has of its disk, its network and its GPU",
            self.rank,
            self.model,
            FIRST.as_secs()
        )
    }
}

/// Ends the watch over a rank that reads when it is dropped.
pub(crate) struct BeingRead {
    watches: Watches,
    reading: Arc<Reading>,
}

impl BeingRead {
    /// The rank gets on, before it has opened the model.
    pub(crate) fn gets_on(&self) {
        self.reading.loading().get_on();
    }

    /// `loading` tells of how far the rank has got from now on.
    pub(crate) fn tells_of(&self, loading: Arc<Loading>) {
        self.watches.lock().loadings.insert(self.reading.rank, loading.clone());
        *self.reading.loading() = loading;
    }
}

impl Drop for BeingRead {
    fn drop(&mut self) {
        self.watches.lock().reading.retain(|reading| !Arc::ptr_eq(reading, &self.reading));
    }
}

/// Ends a watch when it is dropped.
pub(crate) struct Watched {
    watches: Watches,
    watch: Arc<Watch>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watches.lock().watched.retain(|watch| !Arc::ptr_eq(watch, &self.watch));
    }
}

/// A rank that is watched.
pub(crate) struct Watch {
    rank: usize,
    pace: Arc<Pace>,
    /// Grows with each turn that the rank takes, within a second or so where there is nothing to do; with each job that comes; and while it
    /// waits for checkpoints to be written.
    turns: Arc<AtomicU64>,
    /// As long as they are there, the rank has not left.
    ranks: Weak<Ranks>,
    /// How long a pass may take in any case.
    least: Duration,
    farewell: Arc<Farewell>,
    seen: Mutex<(Seen, Between)>,
}

impl Watch {
    pub(crate) fn new(
        ranks: &Arc<Ranks>,
        (pace, turns): (&Arc<Pace>, &Arc<AtomicU64>),
        least: Duration,
        farewell: &Arc<Farewell>,
    ) -> Self {
        let (rank, pace, turns, farewell) = (ranks.rank(), pace.clone(), turns.clone(), farewell.clone());
        Self { rank, pace, turns, ranks: Arc::downgrade(ranks), least, farewell, seen: Mutex::default() }
    }

    /// Looks at the rank `passed` after the last time.
    fn look(&self, passed: Duration) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, between) = &mut *seen;
        let Some(pass) = self.pace.current() else {
            *seen = Seen::default();
            return self.look_between(between, passed);
        };
        // Within a pass the engine has them as well, so that they are not let go of here.
        let Some(ranks) = self.ranks.upgrade() else { return };
        match seen.judge(&pass, ranks.waits(), passed, self.least) {
            Verdict::GetsOn => {}
            Verdict::Hangs => self.farewell.say(&(EngineLossCause::Hung, self.hangs(&pass, seen.own))),
            Verdict::IsLeftAlone => {
                let waited = seen.waited.as_secs();
                let what = format!(
                    "others have kept a pass through the backbone ({}) waiting for {waited} s, and are neither gone nor known to hang: the way to them may be cut off",
                    pass.work
                );
                abort(ranks, what);
            }
        }
    }

    /// Looks at a rank that makes no pass.
    fn look_between(&self, between: &mut Between, passed: Duration) {
        // They may be let go of here, which tells others that the rank has left: it has.
        let Some(ranks) = self.ranks.upgrade() else { return };
        let progress = (self.turns.load(Ordering::Relaxed), self.pace.num_passes());
        if between.hangs(progress, ranks.waits(), passed) {
            let message = format!(
                "rank {} hangs: it has neither begun a pass through the backbone nor ended its turn for {} s; the kernel's log of its \
                 machine (dmesg) may say what its GPU has, or the disk or the server of its data and checkpoints",
                self.rank,
                between.own.as_secs()
            );
            self.farewell.say(&(EngineLossCause::Hung, message));
        }
    }

    fn hangs(&self, pass: &Pass, own: Duration) -> String {
        let Pass { work, num_tokens, usual, .. } = pass;
        let usual = usual.map_or_else(
            || "and it is the first of its kind".to_owned(),
            |usual| format!("where such passes take {usual:.1?} at most"),
        );
        format!(
            "rank {} hangs: nothing came of a pass through the backbone ({work}, {num_tokens} tokens) for {} s, {usual}; \
             the kernel's log of its machine (dmesg) may say what its GPU or disk has",
            self.rank,
            own.as_secs()
        )
    }
}

fn begun(epoch: u64) -> String {
    format!("epoch {epoch} has begun")
}

/// Has a rank leave its group, on a thread of its own: it may have to wait for those who keep the reason.
fn abort(ranks: Arc<Ranks>, reason: String) {
    // A system that gives no thread keeps the one that calls waiting.
    let of_caller = (ranks.clone(), reason.clone());
    if std::thread::Builder::new().spawn(move || ranks.abort(&reason)).is_err() {
        of_caller.0.abort(&of_caller.1);
    }
}

/// What was seen of the pass that a rank makes.
#[derive(Debug, Default)]
struct Seen {
    number: Option<u64>,
    /// How long the rank itself has taken.
    own: Duration,
    /// How long it has waited for others.
    waited: Duration,
    /// Whether it was to wait no longer: what it takes since is its own doing.
    freed: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    GetsOn,
    /// It takes longer than any pass could.
    Hangs,
    /// It waits for others longer than they could take without hanging themselves.
    IsLeftAlone,
}

impl Seen {
    fn judge(&mut self, pass: &Pass, waits: bool, passed: Duration, least: Duration) -> Verdict {
        if self.number != Some(pass.number) {
            *self = Self { number: Some(pass.number), ..Self::default() };
        }
        let limit = pass.usual.map_or(FIRST, |usual| usual.saturating_mul(TIMES)).max(least);
        if waits && !self.freed {
            self.waited += passed;
        } else {
            self.own += passed;
        }
        if self.own > limit {
            return Verdict::Hangs;
        }
        // The ranks of one replica make a pass together; of replicas one may have more to do before they come together.
        if self.waited > limit.saturating_mul(2) && !self.freed && !pass.work.is_of_all_replicas() {
            (self.freed, self.own) = (true, Duration::ZERO);
            return Verdict::IsLeftAlone;
        }
        Verdict::GetsOn
    }
}

/// What was seen of a rank that makes no pass.
#[derive(Debug, Default)]
struct Between {
    /// How many turns and passes there had been.
    progress: (u64, u64),
    /// How long there have been no more, what it waited for others left out.
    own: Duration,
}

impl Between {
    fn hangs(&mut self, progress: (u64, u64), waits: bool, passed: Duration) -> bool {
        if self.progress != progress {
            *self = Self { progress, own: Duration::ZERO };
        }
        if !waits {
            self.own += passed;
        }
        self.own > FIRST
    }
}

#[cfg(test)]
mod tests;
