//! Deleting blobs that nothing names any more.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use futures::TryStreamExt as _;

use super::{Blobs, Digest, Listed, Result};

/// Blobs that are deleted while reports have to wait.
const CHUNK: usize = 100;

/// What was deleted, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Garbage {
    /// The blobs.
    pub digests: Vec<Digest>,
    /// Their bytes.
    pub bytes: u64,
}

/// Deletes the blobs that are older than `grace` and that `named`, asked again before each hundred, does not have; with `dry_run` it
/// only says which.
///
/// # Errors
/// What `named` says, or if the store fails.
pub async fn collect<E: From<super::Error>, F: Future<Output = Result<BTreeSet<String>, E>>>(
    blobs: &Blobs,
    grace: Duration,
    dry_run: bool,
    named: impl Fn() -> F,
) -> Result<Garbage, E> {
    let now = SystemTime::now();
    let old = |listed: &Listed| now.duration_since(listed.stored).is_ok_and(|age| age >= grace);
    let seen: BTreeSet<String> = named().await?;
    let mut candidates: Vec<Listed> = blobs
        .list()
        .try_filter(|listed| {
            let candidate = old(listed) && !seen.contains(listed.digest.as_str());
            async move { candidate }
        })
        .try_collect()
        .await?;
    candidates.sort_by(|a, b| a.digest.cmp(&b.digest));
    let mut garbage = Garbage::default();
    for chunk in candidates.chunks(CHUNK) {
        // Nobody looks for blobs and has them named meanwhile; whoever comes later finds them gone, and uploads again.
        let alone = blobs.naming.write().await;
        let named = named().await?;
        for listed in chunk.iter().filter(|listed| !named.contains(listed.digest.as_str())) {
            if !dry_run {
                blobs.delete(&listed.digest).await?;
            }
            garbage.bytes += listed.size;
            garbage.digests.push(listed.digest.clone());
        }
        drop(alone);
    }
    Ok(garbage)
}
