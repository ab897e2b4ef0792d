//! What one rank has.

use std::sync::Arc;
use std::time::Duration;

use incipit_mesh::{Axis, Coordinates, Mesh, Shard};

use crate::{Collective, alone};

/// How groups behave.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long an operation waits for the other ranks.
    pub deadline: Duration,
    /// How long a rank waits for the others to appear at the beginning.
    pub connect_deadline: Duration,
    /// Which incarnation of the job's group of ranks this is. Ranks of different epochs refuse each other.
    pub epoch: u64,
    /// Name of the job, for messages; ranks of different jobs refuse each other.
    pub job: String,
    /// This process's number among the ranks of its machine, if its launcher told; otherwise its rank is taken for it. Of ranks that are
    /// threads of one process it is the first one's.
    pub local_rank: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        let minute = Duration::from_secs(60);
        Self {
            deadline: 5 * minute,
            connect_deadline: minute,
            epoch: 0,
            job: "incipit".to_owned(),
            local_rank: None,
        }
    }
}

/// A group that its rank can leave.
pub(crate) trait Member: Collective {
    /// The others learn, if they go on, that this rank is gone.
    fn leave(&self);

    /// The time that operations of this rank have taken so far.
    fn seconds(&self) -> f64;

    /// Whether it is for other ranks that this one gets on with nothing now. Waits for nobody.
    fn waits(&self) -> bool;
}

/// What one rank has: the mesh, its place in it, and its three groups. When this is dropped, the rank has left: others
/// that still wait for it get an error, whoever else holds one of its groups.
#[derive(Debug)]
pub struct Ranks {
    mesh: Mesh,
    rank: usize,
    local_rank: usize,
    tensor: Arc<dyn Collective>,
    data: Arc<dyn Collective>,
    world: Arc<dyn Collective>,
    members: Vec<Arc<dyn Member>>,
}

impl Ranks {
    /// The only rank of a mesh of one.
    #[must_use]
    pub fn alone() -> Self {
        let mesh = Mesh::new(1, 1, 1).unwrap_or_else(|_| unreachable!("1 times 1 is 1"));
        Self::new(mesh, 0, [None, None, None])
    }

    /// Rank `rank`; `groups` are its tensor, data and world groups, none where it is alone in one.
    pub(crate) fn new(mesh: Mesh, rank: usize, groups: [Option<Arc<dyn Member>>; 3]) -> Self {
        let members = groups.iter().flatten().cloned().collect();
        let [tensor, data, world] =
            groups.map(|group| group.map_or_else(alone, |group| group as Arc<dyn Collective>));
        Self { mesh, rank, local_rank: rank, tensor, data, world, members }
    }

    /// The mesh.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// This rank's number in the world.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The same rank, known as the `local_rank`-th of its machine.
    pub(crate) fn on_machine(self, local_rank: Option<usize>) -> Self {
        // What has a destructor cannot be taken apart.
        let mut ranks = self;
        ranks.local_rank = local_rank.unwrap_or(ranks.rank);
        ranks
    }

    /// This rank's number among those of its machine: which of its GPUs it has.
    #[must_use]
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// This rank's place.
    #[must_use]
    pub fn coordinates(&self) -> Coordinates {
        self.mesh.coordinates(self.rank)
    }

    /// Which part of what is cut along `axis` is this rank's.
    #[must_use]
    pub fn shard(&self, axis: Axis) -> Shard {
        self.mesh.shard(self.rank, axis)
    }

    /// The ranks that together hold one copy of the weights.
    #[must_use]
    pub fn tensor(&self) -> &Arc<dyn Collective> {
        &self.tensor
    }

    /// The ranks that hold the same part of the weights.
    #[must_use]
    pub fn data(&self) -> &Arc<dyn Collective> {
        &self.data
    }

    /// All ranks.
    #[must_use]
    pub fn world(&self) -> &Arc<dyn Collective> {
        &self.world
    }

    /// Whether this is rank 0, which writes files and talks to people.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    /// The seconds that this rank has spent in operations of its groups so far, waiting for others included.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.members.iter().map(|group| group.seconds()).sum()
    }

    /// Whether this rank waits for others now, as far as it can tell: of one that stands still, whether that is its own doing.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.members.iter().any(|group| group.waits())
    }

    /// Makes every rank's present and later calls fail with `reason`, in all groups.
    pub fn abort(&self, reason: &str) {
        for group in [&self.world, &self.tensor, &self.data] {
            group.abort(reason);
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.members.iter().for_each(|group| group.leave());
    }
}

/// The groups of `rank`, in the order in which [`Ranks::new`] takes them: name and members.
pub(crate) fn groups(mesh: Mesh, rank: usize) -> [(&'static str, Vec<usize>); 3] {
    [
        ("tensor", mesh.group(rank, Axis::Tensor)),
        ("data", mesh.group(rank, Axis::Data)),
        ("world", (0..mesh.world()).collect()),
    ]
}
