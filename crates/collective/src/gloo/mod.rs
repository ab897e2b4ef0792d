//! Ranks that are processes: Gloo (Facebook, the engine of PyTorch's and Horovod's CPU collectives) moves the bytes.
//!
//! Gloo's own all-reduce is not used: it adds in a ring, where the order of a sum depends on a number's place. What is
//! used is its transport: rendezvous through a store, connections between all ranks of a group, messages with
//! deadlines.

mod ffi;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, TcpListener, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cxx::UniquePtr;
use incipit_mesh::Mesh;

use crate::host::{HostGroup, Identity};
use crate::meeting::Meeting;
use crate::ranks::{Member, groups};
use crate::reason::Reason;
use crate::store::Store;
use crate::transport::{Broken, Parts, Transport, Until};
use crate::{Error, Options, Ranks, Result};
use ffi::{Group, Kind, Outcome, Port};

/// How long a rank that lost a connection looks for the reason why it was closed.
const REASON: Duration = Duration::from_millis(500);

/// Joins the other ranks of `mesh` as rank `rank`. They find each other through `store`, which is for this epoch of
/// this job alone.
///
/// Programs that this process starts later inherit the connections, for Gloo does not close them: the others learn of
/// its death only when those programs have ended too.
///
/// The environment variable `GLOO_SOCKET_IFNAME` names the network interface to use, as with PyTorch; without it, it is
/// the one through which this machine reaches the store.
///
/// # Errors
/// If there is no such rank, the store fails, a rank does not appear before the deadline or was started for something
/// else, or no connection can be made.
pub fn connect(mesh: Mesh, rank: usize, store: Arc<dyn Store>, options: &Options) -> Result<Ranks> {
    let until = Until::after(options.connect_deadline);
    let meeting = Meeting { mesh, rank, options, store, until };
    meeting.call_the_roll()?;
    if mesh.world() == 1 {
        return Ok(Ranks::new(mesh, rank, [None, None, None]).on_machine(options.local_rank));
    }
    let (interface, host) = address(&*meeting.store);
    let port = ffi::open_port(&interface, &host)
        .map_err(|e| meeting.error(format!("no address to listen at: {e}")))?;
    let mut joined: [Option<Arc<dyn Member>>; 3] = [None, None, None];
    for (group, (name, members)) in joined.iter_mut().zip(groups(mesh, rank)) {
        if members.len() > 1 {
            *group = Some(join(&meeting, &port, name, members)?);
        }
    }
    Ok(Ranks::new(mesh, rank, joined).on_machine(options.local_rank))
}

fn join(
    meeting: &Meeting<'_>,
    port: &Port,
    name: &'static str,
    members: Vec<usize>,
) -> Result<Arc<dyn Member>> {
    let Meeting { rank, options, until, ref store, .. } = *meeting;
    let place = members.iter().position(|member| *member == rank).unwrap_or_default();
    let prefix = format!("{}/{name}/{}", meeting.prefix(), members[0]);
    let bridge = Bridge { store: store.clone(), prefix, until, error: Mutex::new(None) };
    let connected =
        ffi::connect(port, place as u32, members.len() as u32, milliseconds(until.left()), &bridge);
    let group =
        connected.map_err(|e| bridge.take_error().unwrap_or_else(|| meeting.failure(&e.to_string())))?;
    let connections = Connections {
        group,
        reason: Reason::new(store.clone(), &meeting.prefix(), members.clone(), place),
        size: members.len(),
    };
    let identity = Identity::new(options, name, members, place);
    let group = HostGroup::new(identity, options.deadline, connections);
    group.meet(until)?;
    Ok(Arc::new(group))
}

/// The interface and the address at which the other ranks reach this one; one of the two is empty.
fn address(store: &dyn Store) -> (String, String) {
    if let Ok(interfaces) = std::env::var("GLOO_SOCKET_IFNAME")
        && let Some(interface) = interfaces.split(',').next().filter(|i| !i.is_empty())
    {
        return (interface.to_owned(), String::new());
    }
    let ip = store.local_address().or_else(named_address).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    (String::new(), ip.to_string())
}

/// The address that this machine's name stands for, if it is one of its own.
fn named_address() -> Option<IpAddr> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    let mut addresses = (name.trim(), 0).to_socket_addrs().ok()?;
    addresses.find(|address| TcpListener::bind(address).is_ok()).map(|address| address.ip())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The store as Gloo sees it while it connects a group.
pub(crate) struct Bridge {
    store: Arc<dyn Store>,
    prefix: String,
    until: Until,
    /// What went wrong: of an error that passes through C++ only its text is left.
    error: Mutex<Option<Error>>,
}

impl Bridge {
    fn keep<R>(&self, result: Result<R>) -> Result<R> {
        result.inspect_err(|error| {
            *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        })
    }

    fn take_error(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.keep(self.store.set(&format!("{}/{key}", self.prefix), value))
    }

    fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.keep(self.store.get(&format!("{}/{key}", self.prefix), self.until.left()))
    }
}

/// The connections of one group.
struct Connections {
    group: UniquePtr<Group>,
    reason: Reason,
    size: usize,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connections({:?})", self.reason)
    }
}

impl Connections {
    /// Every rank's `length` bytes, or those of `root`.
    fn exchange(
        &self,
        mine: &[u8],
        (stride, length): (usize, usize),
        root: Option<usize>,
        until: Until,
    ) -> Result<Vec<u8>, Broken> {
        let mut theirs = vec![0; length * if root.is_none() { self.size } else { 1 }];
        let sender = root.map_or(-1, |root| root as i32);
        let left = milliseconds(until.left());
        let Outcome { kind, ranks, what } = self.group.exchange(mine, stride, &mut theirs, sender, left);
        let ranks: Vec<_> = ranks.into_iter().map(|rank| rank as usize).collect();
        match kind {
            Kind::Done => Ok(theirs),
            Kind::Late => Err(Broken::Deadline { ranks }),
            _ => Err(self.reason.find(REASON).unwrap_or_else(|| {
                // Gloo's messages begin with a place in its own source.
                let what = what.split_once("] ").map_or(&*what, |(_, what)| what).to_owned();
                Broken::Lost { rank: ranks.first().copied(), what }
            })),
        }
    }
}

impl Transport for Connections {
    fn all_gather(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken> {
        let all = self.exchange(&mine, (0, mine.len()), None, until)?;
        Ok(Parts::of_one(all, self.size))
    }

    fn all_to_all(&self, mine: Vec<u8>, until: Until) -> Result<Parts, Broken> {
        let length = mine.len() / self.size;
        let all = self.exchange(&mine, (length, length), None, until)?;
        Ok(Parts::of_one(all, self.size))
    }

    fn broadcast(&self, mine: Vec<u8>, root: usize, until: Until) -> Result<Arc<Vec<u8>>, Broken> {
        Ok(Arc::new(self.exchange(&mine, (0, mine.len()), Some(root), until)?))
    }

    fn abort(&self, reason: &str) {
        self.reason.leave(reason);
        self.group.close();
    }

    fn leave(&self) {
        self.group.close();
    }
}
