//! The time of day, for people who read reports. Nothing is decided by it.

use std::time::{SystemTime, UNIX_EPOCH};

use pbjson_types::Timestamp;

/// Now.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32 }
}
