//! Ranks that each have a GPU: NCCL moves the numbers.
//!
//! Tensors in main memory go through the protocol that all backends share, so that their results are the same bits as
//! everywhere. Tensors on the group's GPU stay there, and the host goes on meanwhile. NCCL adds up what has one sum in any order
//! (integers, and two numbers in f32); of all else each rank adds up a piece, in the order of ranks. What the ranks say of such an operation
//! travels before it and is compared behind the fact.

#[cfg(feature = "nccl")]
mod device;
mod disagreement;
#[cfg(test)]
mod fake;
#[cfg(feature = "nccl")]
mod ffi;
mod gate;
mod group;
mod lane;
mod line;
mod notes;
mod patience;
#[cfg(test)]
mod tests;
mod watchdog;

use std::sync::Arc;

use incipit_mesh::Mesh;

use crate::host::{HostGroup, Identity};
use crate::meeting::Meeting;
use crate::ranks::{Member, groups};
use crate::reason::Reason;
use crate::store::Store;
use crate::transport::{Broken, Until};
use crate::{Error, Options, Ranks, Result};
use disagreement::Disagreement;
use group::Group;
use lane::{Fault, Opener};
use line::{Line, Outfit, Seat};
use notes::Notes;
use watchdog::Watchdog;

/// Joins the other ranks of `mesh` as rank `rank`, with `device`, a GPU, as the one that its tensors are on. They find each
/// other through `store`, which is for this epoch of this job alone and must stay reachable: ranks also learn from it
/// why a group ended and which of them is late.
///
/// A rank should be a process of its own with one GPU. What NCCL can be told by its environment is in
/// `cluster/nccl.md`.
///
/// # Errors
/// If there is no such rank, `device` is no GPU, NCCL is older than [`OLDEST`], the store fails, a rank does not appear
/// before the deadline or was started for something else, or NCCL cannot connect them.
#[cfg(feature = "nccl")]
pub fn connect(
    mesh: Mesh,
    rank: usize,
    store: Arc<dyn Store>,
    device: &candle_core::Device,
    options: &Options,
) -> Result<Ranks> {
    let until = Until::after(options.connect_deadline);
    let meeting = Meeting { mesh, rank, options, store, until };
    let text = |fault| meeting.error(words(fault));
    let version = version().map_err(|what| meeting.error(what))?;
    if version < OLDEST {
        let what =
            format!("NCCL is {version}, and {OLDEST} is the oldest that can be used; install a newer one");
        return Err(meeting.error(what));
    }
    if let Some(fault) = version.fault() {
        tracing::warn!("NCCL is {version}: {fault}");
    }
    let opener = device::Gpu::new(device).map_err(text)?;
    connect_over(&opener, &meeting)
}

/// The oldest NCCL that can be used.
pub const OLDEST: Version = Version { major: 2, minor: 18, patch: 0 };

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub patch: u32,
}

impl Version {
    /// What is known to go wrong with it, and what to do.
    #[must_use]
    pub fn fault(self) -> Option<&'static str> {
        let first = Self { major: 2, minor: 28, patch: 3 };
        let last = Self { patch: 8, ..first };
        // Release notes of NVIDIA's nvidia-resiliency-ext 0.5.0, which starts groups again within a process, too.
        (first..=last).contains(&self).then_some(
            "a process that connects anew after another rank was lost may crash; install 2.28.9 or a newer one",
        )
    }

    /// From NCCL's own number, `major * 10000 + minor * 100 + patch` since 2.9.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        let thousand = if code < 10_000 { 1000 } else { 10_000 };
        Self { major: code / thousand, minor: code % thousand / 100, patch: code % 100 }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The version of the NCCL that this program runs with. Needs no GPU.
///
/// # Errors
/// What NCCL says, if it cannot tell.
#[cfg(feature = "nccl")]
pub fn version() -> Result<Version, String> {
    ffi::version().map(Version::from_code).map_err(words)
}

fn words(fault: Fault) -> String {
    match fault {
        Fault::Peer(what) | Fault::Here(what) => what,
    }
}

fn connect_over<O: Opener>(opener: &O, meeting: &Meeting<'_>) -> Result<Ranks> {
    meeting.call_the_roll()?;
    let Meeting { mesh, rank, ref store, .. } = *meeting;
    if mesh.world() == 1 {
        return Ok(Ranks::new(mesh, rank, [None, None, None]).on_machine(meeting.options.local_rank));
    }
    let notes = Arc::new(Notes::new(store.clone(), &meeting.prefix(), rank, mesh.world()));
    let watchdog = Watchdog::start(notes.clone()).map_err(|e| {
        meeting.error(format!("no thread to watch over operations: {e}; raise the limit of threads"))
    })?;
    let place = Place { meeting, notes, watchdog: Arc::new(watchdog) };
    let mut joined: [Option<Arc<dyn Member>>; 3] = [None, None, None];
    for (index, (name, members)) in groups(mesh, rank).into_iter().enumerate() {
        if members.len() > 1 {
            let group = place.join(opener, index, name, &members)?;
            place.watchdog.add(group.watched());
            joined[index] = Some(group);
        }
    }
    Ok(Ranks::new(mesh, rank, joined).on_machine(meeting.options.local_rank))
}

/// Where a rank is when it joins its groups.
struct Place<'a> {
    meeting: &'a Meeting<'a>,
    notes: Arc<Notes>,
    watchdog: Arc<Watchdog>,
}

impl Place<'_> {
    fn join<O: Opener>(
        &self,
        opener: &O,
        index: usize,
        name: &'static str,
        members: &[usize],
    ) -> Result<Arc<Group<O::Lane>>> {
        let Meeting { rank, options, ref store, .. } = *self.meeting;
        let place = members.iter().position(|member| *member == rank).unwrap_or_default();
        let prefix = format!("{}/{name}/{}", self.meeting.prefix(), members[0]);
        let reason = || Reason::new(store.clone(), &self.meeting.prefix(), members.to_vec(), place);
        let identity = Identity::new(options, name, members.to_vec(), place);
        let outfit = Outfit {
            seat: Seat { group: index, members: members.to_vec(), rank: place },
            deadline: options.deadline,
            reason: reason(),
            notes: self.notes.clone(),
            disagreement: Disagreement::new(store.clone(), &prefix),
            watchdog: self.watchdog.clone(),
        };
        // The others need not wait for the deadline to learn of it.
        let line = self.line(opener, &prefix, outfit).inspect_err(|error| {
            if !error.is_echo() {
                reason().leave(&error.to_string());
            }
        })?;
        let group = HostGroup::new(identity, options.deadline, line);
        group.meet(self.meeting.until)?;
        Ok(Arc::new(Group::new(group)))
    }

    /// Connects a group: its first rank makes the name by which the others find it.
    fn line<O: Opener>(&self, opener: &O, prefix: &str, outfit: Outfit) -> Result<Line<O::Lane>> {
        let Meeting { until, ref store, .. } = *self.meeting;
        let (rank, size) = (outfit.seat.rank, outfit.seat.members.len());
        let key = format!("{prefix}/id");
        let id = if rank == 0 {
            let id = opener.id().map_err(|fault| self.meeting.error(words(fault)))?;
            store.set(&key, &id)?;
            id
        } else {
            match store.get(&key, until.left()) {
                Err(Error::StoreDeadline { .. }) => {
                    return Err(self.meeting.waited_for(vec![outfit.seat.members[0]]));
                }
                id => id?,
            }
        };
        let members = outfit.seat.members.clone();
        let lane = opener.open(&id, rank, size).map_err(|fault| self.meeting.error(words(fault)))?;
        let line = Line::new(lane, outfit);
        line.connect(until).map_err(|broken| match broken {
            Broken::Deadline { .. } => self.meeting.failure("NCCL did not connect the ranks in time"),
            Broken::Aborted { rank, reason } => {
                Error::Aborted { rank: rank.and_then(|rank| members.get(rank).copied()), reason }
            }
            Broken::Lost { what, .. } | Broken::Mismatch { what, .. } | Broken::Device { what } => {
                self.meeting.error(what)
            }
        })?;
        Ok(line)
    }
}
