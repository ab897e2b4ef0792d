//! The gRPC interface of the cluster: generated code, names of resources, and errors.

pub mod client;
pub mod names;
mod problem;
pub mod trace;

pub use problem::{DOMAIN, Problem};

/// The messages, clients and servers of `proto/incipit/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("incipit.v1");
    include!(concat!(env!("OUT_DIR"), "/incipit.v1.serde.rs"));

    /// The descriptors of all files, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
