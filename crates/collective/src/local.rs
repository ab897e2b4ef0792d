//! Ranks that are threads of one process: they meet at a board and hand each other their bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use incipit_mesh::Mesh;

use crate::host::{HostGroup, Identity};
use crate::ranks::{Member, groups};
use crate::transport::{Broken, Parts, Transport, Until};
use crate::{Options, Ranks};

/// The ranks of `mesh`, one for each thread that takes part. A rank that is dropped has left: the others learn it at
/// once, unless they need nothing more from it.
#[must_use]
pub fn ranks(mesh: Mesh, options: &Options) -> Vec<Ranks> {
    let mut boards = HashMap::new();
    let mut member = |group: &'static str, members: Vec<usize>, rank: usize| -> Option<Arc<dyn Member>> {
        if members.len() == 1 {
            return None;
        }
        let board = boards.entry((group, members[0])).or_insert_with(|| Arc::new(Board::new(members.len())));
        let place = members.iter().position(|member| *member == rank)?;
        let transport = Local { board: board.clone(), rank: place };
        let identity = Identity::new(options, group, members, place);
        Some(Arc::new(HostGroup::new(identity, options.deadline, transport)))
    };
    (0..mesh.world())
        .map(|rank| {
            let joined = groups(mesh, rank).map(|(name, members)| member(name, members, rank));
            Ranks::new(mesh, rank, joined).on_machine(options.local_rank.map(|first| first + rank))
        })
        .collect()
}

/// Bytes that a rank gave.
type Given = Arc<Vec<u8>>;

/// Where the ranks of a group meet.
#[derive(Debug)]
pub(crate) struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// How many meetings there have been.
    meetings: u64,
    /// What has been given for the next one.
    given: Vec<Option<Given>>,
    /// What was given for the last one, until all have taken it.
    last: Option<Arc<Vec<Given>>>,
    /// How many have not taken it.
    to_take: usize,
    left: Vec<bool>,
    aborted: Option<(usize, String)>,
}

impl Board {
    pub(crate) fn new(size: usize) -> Self {
        let state = State {
            meetings: 0,
            given: vec![None; size],
            last: None,
            to_take: 0,
            left: vec![false; size],
            aborted: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What was given for the meeting before `meetings`, if that has taken place.
    fn take(&mut self, meetings: u64) -> Option<Arc<Vec<Given>>> {
        if self.meetings == meetings {
            return None;
        }
        self.to_take -= 1;
        if self.to_take == 0 { self.last.take() } else { self.last.clone() }
    }

    /// Why the next meeting will not take place, if that is known.
    fn broken(&self) -> Option<Broken> {
        if let Some((rank, reason)) = &self.aborted {
            return Some(Broken::Aborted { rank: Some(*rank), reason: reason.clone() });
        }
        let missing = |(given, left): (&Option<Given>, &bool)| *left && given.is_none();
        let rank = self.given.iter().zip(&self.left).position(missing)?;
        Some(Broken::Lost { rank: Some(rank), what: "it has left the group".to_owned() })
    }
}

/// A rank at its board.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) board: Arc<Board>,
    pub(crate) rank: usize,
}

impl Local {
    /// Gives `mine`, waits for all, and returns what everybody gave.
    fn meet(&self, mine: Vec<u8>, until: Until) -> Result<Arc<Vec<Given>>, Broken> {
        let mut state = self.board.lock();
        let meetings = state.meetings;
        state.given[self.rank] = Some(Arc::new(mine));
        if state.given.iter().all(Option::is_some) && state.aborted.is_none() {
            // Everybody has taken what was given last: each of them has given anew.
            state.last = Some(Arc::new(state.given.iter_mut().filter_map(Option::take).collect()));
            state.to_take = state.given.len();
            state.meetings += 1;
            self.board.changed.notify_all();
        }
        loop {
            if let Some(all) = state.take(meetings) {
                return Ok(all);
            }
            if let Some(broken) = state.broken() {
                return Err(broken);
            }
            if until.is_over() {
                let absent = |(rank, given): (usize, &Option<Given>)| given.is_none().then_some(rank);
                let ranks = state.given.iter().enumerate().filter_map(absent).collect();
                return Err(Broken::Deadline { ranks });
            }
            let waited = self.board.changed.wait_timeout(state, until.left());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn parts(all: &[Given], range: impl Fn(&Given) -> Range<usize>) -> Parts {
    Parts::new(all.iter().map(|given| (given.clone(), range(given))))
}

impl Transport for Local {
    fn all_gather(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken> {
        Ok(parts(&self.meet(mine, until)?, |given| 0..given.len()))
    }

    fn all_to_all(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken> {
        let all = self.meet(mine, until)?;
        Ok(parts(&all, |given| {
            let len = given.len() / all.len();
            self.rank * len..(self.rank + 1) * len
        }))
    }

    fn broadcast(&self, mine: Vec<u8>, root: usize, until: Until) -> Result<Arc<Vec<u8>>, Broken> {
        // The others need not give anything: the bytes are not sent, but looked at.
        let mine = if self.rank == root { mine } else { Vec::new() };
        Ok(self.meet(mine, until)?[root].clone())
    }

    fn abort(&self, reason: &str) {
        self.board.lock().aborted.get_or_insert_with(|| (self.rank, reason.to_owned()));
        self.board.changed.notify_all();
    }

    fn leave(&self) {
        self.board.lock().left[self.rank] = true;
        self.board.changed.notify_all();
    }
}
