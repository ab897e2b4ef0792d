//! How ranks are laid out over a mesh, and which part of a tensor is whose. Pure arithmetic, and the only place that
//! knows either.

mod error;
mod shape;
mod shard;

pub use error::{Error, Result};
pub use shape::{Axis, Coordinates, Mesh};
pub use shard::Shard;
