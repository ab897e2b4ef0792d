//! Operations in which all ranks of a group take part.
//!
//! [`Collective`] is a group as one of its ranks sees it, and [`Ranks`] all that a rank has: its place in the mesh and
//! its three groups. [`local::ranks`] makes them for the threads of one process. Whichever backend carries the
//! numbers, and wherever they lie, the results are the same bits.

#[cfg(test)]
extern crate self as incipit_collective;

mod alone;
mod bytes;
mod error;
#[cfg(feature = "gloo")]
pub mod gloo;
mod group;
mod host;
pub mod local;
#[cfg(any(feature = "gloo", feature = "nccl", test))]
mod meeting;
#[cfg(any(feature = "nccl", test))]
pub mod nccl;
mod numbers;
pub mod pairs;
mod ranks;
#[cfg(any(feature = "gloo", feature = "nccl", test))]
mod reason;
pub mod store;
mod transport;
mod unmet;
mod wire;

pub use bytes::{broadcast_bytes, gather_bytes};
pub use error::{Error, Mismatch, Place, Result};
pub use group::{Collective, Reduce, alone, unmet};
pub use incipit_mesh::{Axis, Coordinates, Mesh, Shard};
pub use ranks::{Options, Ranks};
