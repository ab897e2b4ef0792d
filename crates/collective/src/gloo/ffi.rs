//! The border to C++.
#![allow(unsafe_code, unreachable_pub, missing_docs, clippy::missing_safety_doc)]

use super::Bridge;

#[cxx::bridge(namespace = "incipit")]
mod border {
    /// How an exchange ended.
    #[derive(Debug)]
    enum Kind {
        Done,
        /// A connection broke: `ranks` says whose.
        Lost,
        /// `ranks` did not come in time.
        Late,
        /// The connections were closed on this side.
        Closed,
    }

    /// The end of an exchange.
    #[derive(Debug)]
    struct Outcome {
        kind: Kind,
        ranks: Vec<u32>,
        what: String,
    }

    extern "Rust" {
        type Bridge;
        fn set(self: &Bridge, key: &str, value: &[u8]) -> Result<()>;
        fn get(self: &Bridge, key: &str) -> Result<Vec<u8>>;
    }

    unsafe extern "C++" {
        include!("incipit-collective/src/gloo/shim.h");

        type Port;
        fn open_port(interface: &str, host: &str) -> Result<UniquePtr<Port>>;

        type Group;
        fn connect(
            port: &Port,
            rank: u32,
            size: u32,
            milliseconds: u64,
            store: &Bridge,
        ) -> Result<UniquePtr<Group>>;
        fn exchange(
            self: &Group,
            mine: &[u8],
            stride: usize,
            theirs: &mut [u8],
            root: i32,
            milliseconds: u64,
        ) -> Outcome;
        fn close(self: &Group);
    }
}

pub(super) use border::{Group, Kind, Outcome, Port, connect, open_port};

// SAFETY: the connections are owned by nobody's thread; Gloo serves them on a thread of its own and locks them.
unsafe impl Send for Group {}
// SAFETY: `close` and `exchange` share nothing but what the group's mutex guards and Gloo's own locks; two exchanges at
// once are kept apart by `Connections`.
unsafe impl Sync for Group {}
