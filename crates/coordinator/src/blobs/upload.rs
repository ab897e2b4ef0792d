//! Storing a blob whose bytes come in parts.

use bytes::Bytes;
use object_store::{PutPayload, WriteMultipart};

use super::{Blobs, Digest, Error, Result};

/// Up to here a blob is collected in memory and stored in one go; it is also the size of the parts of a larger one.
const PART: usize = 8 << 20;

/// Parts that are on their way at once.
const PARALLEL: usize = 2;

/// A blob that comes in. Nothing of it is seen before [`Upload::finish`]; one that is dropped leaves nothing.
#[derive(Debug)]
pub struct Upload {
    blobs: Blobs,
    digest: Digest,
    size: u64,
    found: u64,
    hasher: blake3::Hasher,
    sink: Sink,
}

#[derive(Debug)]
enum Sink {
    Small(Vec<Bytes>),
    Large(WriteMultipart),
}

impl Upload {
    pub(super) fn new(blobs: Blobs, digest: Digest, size: u64) -> Self {
        let sink = Sink::Small(Vec::new());
        Self { blobs, digest, size, found: 0, hasher: blake3::Hasher::new(), sink }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// If there are more than were announced, there is no room, or the store fails. Then call [`Upload::abort`].
    pub async fn put(&mut self, bytes: Bytes) -> Result<()> {
        self.found += bytes.len() as u64;
        if self.found > self.size {
            return Err(self.wrong_size());
        }
        self.hasher.update(&bytes);
        if let Sink::Small(parts) = &mut self.sink {
            parts.push(bytes);
            if self.found > PART as u64 {
                let parts = std::mem::take(parts);
                let upload = self.blobs.put_parts(&self.digest).await?;
                let mut writer = WriteMultipart::new_with_chunk_size(upload, PART);
                parts.into_iter().for_each(|part| writer.put(part));
                self.sink = Sink::Large(writer);
            }
        } else if let Sink::Large(writer) = &mut self.sink {
            // Others come in at the same time.
            self.blobs.check_room(self.size - self.found).await?;
            let room = writer.wait_for_capacity(PARALLEL).await;
            room.map_err(|error| self.blobs.failed(&error))?;
            writer.put(bytes);
        }
        Ok(())
    }

    /// Checks size and hash, and only then gives the bytes their name. Afterwards they survive a crash.
    ///
    /// # Errors
    /// If size or hash are others than announced, or the store fails; then nothing of them stays.
    pub async fn finish(self) -> Result<u64> {
        if self.found != self.size {
            let error = self.wrong_size();
            self.abort().await;
            return Err(error);
        }
        let found = Digest(self.hasher.finalize().to_hex().to_string());
        if found != self.digest {
            let announced = self.digest.clone();
            self.abort().await;
            return Err(Error::Hash { announced, found });
        }
        if let Err(away) = self.blobs.check_is_there().await {
            self.abort().await;
            return Err(away);
        }
        match self.sink {
            Sink::Small(parts) => self.blobs.put(&self.digest, PutPayload::from_iter(parts)).await?,
            Sink::Large(writer) => {
                writer.finish().await.map_err(|error| self.blobs.failed(&error))?;
            }
        }
        self.blobs.damaged().remove(&self.digest);
        Ok(self.size)
    }

    /// Forgets what came.
    pub async fn abort(self) {
        if let Sink::Large(writer) = self.sink
            && let Err(error) = writer.abort().await
        {
            tracing::warn!("what was uploaded of blob {} may be left over: {error}", self.digest);
        }
    }

    fn wrong_size(&self) -> Error {
        Error::Size { digest: self.digest.clone(), announced: self.size, found: self.found }
    }
}
