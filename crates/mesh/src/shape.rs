//! The mesh: every rank has one place on the data axis and one on the tensor axis.

use crate::{Error, Result, Shard};

/// A direction of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Along it the ranks hold different parts of the same weights.
    Tensor,
    /// Along it the ranks hold the same weights and see different examples.
    Data,
}

/// A rank's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coordinates {
    /// Which replica, from 0.
    pub data: usize,
    /// Which part of that replica's weights, from 0.
    pub tensor: usize,
}

/// `tp` ranks share one copy of the weights, and there are `dp` such replicas. A replica's ranks are neighbours, because
/// they have the most to tell each other: `rank = data * tp + tensor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mesh {
    tp: usize,
    dp: usize,
}

impl Mesh {
    /// The mesh of `world` ranks with the tensor-parallel degree `tp` and the data-parallel degree `dp`.
    ///
    /// # Errors
    /// If a degree is 0, or `tp * dp` is not `world`.
    pub fn new(tp: usize, dp: usize, world: usize) -> Result<Self> {
        for (flag, degree) in [("tp", tp), ("dp", dp)] {
            if degree == 0 {
                return Err(Error::NoRanks { flag });
            }
        }
        if tp.checked_mul(dp) != Some(world) {
            return Err(Error::World { tp, dp, world });
        }
        Ok(Self { tp, dp })
    }

    /// The tensor-parallel degree.
    #[must_use]
    pub fn tp(self) -> usize {
        self.tp
    }

    /// The data-parallel degree.
    #[must_use]
    pub fn dp(self) -> usize {
        self.dp
    }

    /// How many ranks there are.
    #[must_use]
    pub fn world(self) -> usize {
        self.tp * self.dp
    }

    /// A rank's share of `threads`, if all ranks are on one machine: at least 1.
    #[must_use]
    pub fn share_of_threads(self, threads: usize) -> usize {
        (threads / self.world()).max(1)
    }

    /// The place of `rank`.
    ///
    /// # Panics
    /// If the mesh has no such rank.
    #[must_use]
    pub fn coordinates(self, rank: usize) -> Coordinates {
        assert!(rank < self.world(), "rank {rank} of a mesh of {}", self.world());
        Coordinates { data: rank / self.tp, tensor: rank % self.tp }
    }

    /// The rank at a place.
    ///
    /// # Panics
    /// If the mesh has no such place.
    #[must_use]
    pub fn rank(self, place: Coordinates) -> usize {
        assert!(place.data < self.dp && place.tensor < self.tp, "{place:?} of {self:?}");
        place.data * self.tp + place.tensor
    }

    /// The ranks that differ from `rank` along `axis` alone, `rank` among them, in ascending order.
    ///
    /// # Panics
    /// If the mesh has no such rank.
    #[must_use]
    pub fn group(self, rank: usize, axis: Axis) -> Vec<usize> {
        let place = self.coordinates(rank);
        (0..self.degree(axis))
            .map(|i| match axis {
                Axis::Tensor => self.rank(Coordinates { tensor: i, ..place }),
                Axis::Data => self.rank(Coordinates { data: i, ..place }),
            })
            .collect()
    }

    /// Which part of what is cut along `axis` belongs to `rank`. Its index is the rank's place in
    /// [`group`](Self::group).
    ///
    /// # Panics
    /// If the mesh has no such rank.
    #[must_use]
    pub fn shard(self, rank: usize, axis: Axis) -> Shard {
        let place = self.coordinates(rank);
        let index = match axis {
            Axis::Tensor => place.tensor,
            Axis::Data => place.data,
        };
        Shard::of(index, self.degree(axis))
    }

    fn degree(self, axis: Axis) -> usize {
        match axis {
            Axis::Tensor => self.tp,
            Axis::Data => self.dp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meshes() -> impl Strategy<Value = Mesh> {
        (1usize..9, 1usize..9).prop_map(|(tp, dp)| Mesh::new(tp, dp, tp * dp).unwrap())
    }

    proptest! {
        #[test]
        fn ranks_and_places_are_one_to_one(mesh in meshes()) {
            let mut seen = std::collections::HashSet::new();
            for rank in 0..mesh.world() {
                let place = mesh.coordinates(rank);
                prop_assert!(place.tensor < mesh.tp() && place.data < mesh.dp());
                prop_assert!(seen.insert(place), "{:?} twice", place);
                prop_assert_eq!(mesh.rank(place), rank);
            }
        }

        #[test]
        fn the_groups_of_an_axis_partition_the_world(mesh in meshes()) {
            for axis in [Axis::Tensor, Axis::Data] {
                let mut times = vec![0; mesh.world()];
                for rank in 0..mesh.world() {
                    let group = mesh.group(rank, axis);
                    let shard = mesh.shard(rank, axis);
                    prop_assert_eq!(group.len(), shard.count());
                    prop_assert_eq!(group[shard.index()], rank);
                    prop_assert!(group.is_sorted());
                    prop_assert!(group.iter().all(|other| mesh.group(*other, axis) == group));
                    if group[0] == rank {
                        group.iter().for_each(|member| times[*member] += 1);
                    }
                }
                prop_assert!(times.iter().all(|t| *t == 1), "{:?} along {:?}", times, axis);
            }
        }
    }

    #[test]
    fn a_replica_is_made_of_neighbours() {
        let mesh = Mesh::new(2, 3, 6).unwrap();
        assert_eq!(mesh.group(3, Axis::Tensor), [2, 3]);
        assert_eq!(mesh.group(3, Axis::Data), [1, 3, 5]);
        assert_eq!(mesh.coordinates(5), Coordinates { data: 2, tensor: 1 });
    }

    #[test]
    fn degrees_that_do_not_make_the_world_are_refused_with_the_mend() {
        let error = |tp, dp, world| Mesh::new(tp, dp, world).unwrap_err().to_string();
        assert_eq!(
            error(2, 3, 4),
            "--tp 2 times --dp 3 makes 6, and 4 ranks were started; start 6 of them, or change --tp or --dp"
        );
        assert!(error(2, 1, 1).contains("and 1 rank was started"));
        assert!(error(usize::MAX, 2, 4).contains("more ranks than can be counted"));
        assert_eq!(error(0, 1, 0), "--tp is 0; the least is 1");
        assert_eq!(error(1, 0, 0), "--dp is 0; the least is 1");
    }
}
