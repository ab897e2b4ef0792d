//! Blobs: bytes by their hash, in a directory or in an object store. A blob has its name only once all its bytes are there, are
//! flushed, and have the hash that they were announced with.

use std::{
    collections::BTreeSet,
    error::Error as _,
    fmt, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use incipit_proto::Problem;
use object_store::{
    GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt as _, PutPayload, path::Path,
};
use tokio::sync::RwLock;
use tonic::Code;

pub mod garbage;
mod place;
mod upload;

pub use place::Expected;
pub use upload::Upload;

/// BLAKE3 of a blob, 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(String);

impl Digest {
    /// The digest in `text`.
    ///
    /// # Errors
    /// If it is none; the problem names `field`.
    pub fn parse(field: &str, text: &str) -> Result<Self, Problem> {
        let hexadecimal = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if text.len() == 64 && text.bytes().all(hexadecimal) {
            return Ok(Self(text.to_owned()));
        }
        Err(Problem::field(field, format!("is {text:?}; give a BLAKE3 of 64 small hexadecimal digits")))
    }

    /// Its digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a blob cannot be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store's address is wrong.
    #[error(
        "{url:?} is no place for blobs ({why}); give a directory, or s3://, gs:// or az:// with a bucket"
    )]
    Place {
        /// The address.
        url: String,
        /// What is wrong.
        why: String,
    },
    /// There is no such blob.
    #[error("there is no blob {0}; upload it")]
    Missing(Digest),
    /// The store has other bytes than were stored.
    #[error(
        "blob {0} is damaged: the store has other bytes of it by now; it is whole once it is uploaded again"
    )]
    Damaged(Digest),
    /// Other bytes than announced.
    #[error(
        "blob {announced} was sent with bytes whose BLAKE3 is {found}; nothing of it was kept: send it again"
    )]
    Hash {
        /// What was announced.
        announced: Digest,
        /// What came.
        found: Digest,
    },
    /// More or fewer bytes than announced.
    #[error("blob {digest} was announced with {announced} bytes, and {found} came; nothing of it was kept")]
    Size {
        /// The blob.
        digest: Digest,
        /// What was announced.
        announced: u64,
        /// What came (of too many: as many as were read).
        found: u64,
    },
    /// Larger than allowed.
    #[error("blob {digest} has {size} bytes, and {limit} are allowed; raise limits.max_blob_bytes")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// The disk is full.
    #[error("there is no room left at {place}; make some (`incipit checkpoint gc`), or move the blobs")]
    Full {
        /// Where.
        place: String,
    },
    /// The disk would be too full.
    #[error(
        "there is no room at {place} for {size} bytes: {free} are free, of which limits.min_free_bytes keeps {kept} for the coordinator \
         itself; make room (`incipit checkpoint gc`), or move the blobs"
    )]
    Reserved {
        /// Where.
        place: String,
        /// What was to be stored.
        size: u64,
        /// What is free.
        free: u64,
        /// What uploads leave free.
        kept: u64,
    },
    /// The store failed.
    #[error("the blob store at {place} failed: {why}")]
    Store {
        /// Where.
        place: String,
        /// What it said.
        why: String,
    },
}

/// The outcome of something done with blobs.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Place { url, .. } => {
                Self::new(Code::InvalidArgument, "BLOB_PLACE", message).with("url", url)
            }
            Error::Missing(digest) => {
                Self::new(Code::NotFound, "BLOB_MISSING", message).with("digest", digest)
            }
            Error::Damaged(digest) => {
                Self::new(Code::DataLoss, "BLOB_DAMAGED", message).with("digest", digest)
            }
            Error::Hash { announced, found } => Self::new(Code::InvalidArgument, "BLOB_HASH", message)
                .with("digest", announced)
                .with("found", found),
            Error::Size { digest, announced, found } => {
                Self::new(Code::InvalidArgument, "BLOB_SIZE", message)
                    .with("digest", digest)
                    .with("announced", announced)
                    .with("found", found)
            }
            Error::TooLarge { digest, size, limit } => {
                Self::new(Code::InvalidArgument, "BLOB_TOO_LARGE", message)
                    .with("digest", digest)
                    .with("size", size)
                    .with("limit", limit)
            }
            Error::Full { place } | Error::Reserved { place, .. } => {
                Self::new(Code::ResourceExhausted, "NO_SPACE", message).with("path", place)
            }
            Error::Store { place, .. } => {
                Self::new(Code::Unavailable, "BLOB_STORE", message).with("place", place)
            }
        }
    }
}

/// A blob as it is listed.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its name.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// When it was stored.
    pub stored: SystemTime,
}

/// A directory of blobs.
#[derive(Clone, Debug)]
struct Dir {
    path: PathBuf,
    /// What its marker says.
    marker: String,
    /// Bytes of its disk that uploads leave free.
    min_free: u64,
}

/// The blobs of a cluster. Clones share them.
#[derive(Clone, Debug)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    place: String,
    limit: u64,
    /// Where blobs are files.
    dir: Option<Dir>,
    /// Read by whoever has the core name blobs, from looking for them until they are named; written by who deletes some.
    naming: Arc<RwLock<()>>,
    /// Blobs that were read and had another hash, or are suspected of it, and were not stored again since.
    damaged: Arc<Mutex<BTreeSet<Digest>>>,
}

impl Blobs {
    /// Opens the blobs at `place`, a directory (which is made) or a URL, each `limit` bytes at most. Of a directory's disk uploads leave
    /// `min_free` bytes free, which are the coordinator's own. What uploads that were interrupted left in a directory is removed.
    ///
    /// # Errors
    /// If `place` is no place for blobs, the directory cannot be made, or it is not the one that is `expected`.
    pub fn open(place: &str, limit: u64, min_free: u64, expected: &Expected) -> Result<Self> {
        let path = std::path::Path::new(place);
        let is_remote = place.contains("://");
        let ((store, prefix), marker) = match is_remote {
            true => (place::remote(place)?, None),
            false => (place::local(path)?, Some(place::claim(path, expected)?)),
        };
        let dir = marker.map(|marker| Dir { path: path.to_owned(), marker, min_free });
        Ok(Self {
            store,
            prefix,
            place: place.to_owned(),
            limit,
            dir,
            naming: Arc::default(),
            damaged: Arc::default(),
        })
    }

    /// What the marker of the directory says, where blobs are files.
    #[must_use]
    pub fn marker(&self) -> Option<&str> {
        self.dir.as_ref().map(|dir| &*dir.marker)
    }

    /// While this is held no blob is deleted: look for blobs, and have them named.
    pub async fn hold(&self) -> tokio::sync::OwnedRwLockReadGuard<()> {
        Arc::clone(&self.naming).read_owned().await
    }

    /// The size of a blob, if it is there.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn find(&self, digest: &Digest) -> Result<Option<u64>> {
        match self.store.head(&self.key(digest)).await {
            Ok(object) => Ok(Some(object.size)),
            Err(object_store::Error::NotFound { .. }) => self.check_is_there().await.map(|()| None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Checks that the directory of the blobs is the one that was opened: what a disk has that is away is not missing.
    async fn check_is_there(&self) -> Result<()> {
        let Some(Dir { path, marker, .. }) = &self.dir else { return Ok(()) };
        if tokio::fs::read_to_string(path.join(place::MARKER)).await.is_ok_and(|found| found == *marker) {
            return Ok(());
        }
        let why = format!(
            "its file {} is gone, or another; see whether its disk is mounted, and if all there was lost, restart the coordinator",
            place::MARKER
        );
        Err(Error::Store { place: self.place.clone(), why })
    }

    /// Which of `digests` are missing.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn missing(&self, digests: Vec<Digest>) -> Result<Vec<Digest>> {
        let found = futures::stream::iter(digests).map(|digest| async move {
            let found = self.find(&digest).await?;
            Ok::<_, Error>(found.is_none().then_some(digest))
        });
        found.buffered(16).try_filter_map(|missing| async move { Ok(missing) }).try_collect().await
    }

    /// Which of `digests` are missing, or are known to be damaged: those are to be uploaded.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn wanting(&self, digests: Vec<Digest>) -> Result<Vec<Digest>> {
        let (mut wanting, others): (Vec<_>, Vec<_>) = {
            let damaged = self.damaged();
            digests.into_iter().partition(|digest| damaged.contains(digest))
        };
        wanting.extend(self.missing(others).await?);
        Ok(wanting)
    }

    /// One of these blobs may be damaged, as is known from before: they are to be uploaded until they are read and are whole.
    pub fn suspect(&self, digests: impl Iterator<Item = Digest>) {
        self.damaged().extend(digests);
    }

    fn damaged(&self) -> MutexGuard<'_, BTreeSet<Digest>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to store a blob of `size` bytes.
    ///
    /// # Errors
    /// If it is too large, or there is no room.
    pub async fn write(&self, digest: Digest, size: u64) -> Result<Upload> {
        if size > self.limit {
            return Err(Error::TooLarge { digest, size, limit: self.limit });
        }
        self.check_is_there().await?;
        self.check_room(size).await?;
        Ok(Upload::new(self.clone(), digest, size))
    }

    /// Checks that there is room for `size` more bytes. Uploads that fill the disk would stop the coordinator, which could write down
    /// nothing any more.
    async fn check_room(&self, size: u64) -> Result<()> {
        let Some(Dir { path, min_free: kept, .. }) = self.dir.clone().filter(|dir| dir.min_free > 0) else {
            return Ok(());
        };
        let place = self.place.clone();
        // The disk may be another machine's, which does not answer.
        let asked = tokio::task::spawn_blocking(move || Ok(rustix::fs::statvfs(&path)?)).await;
        let free = match asked.unwrap_or_else(|broke| Err(io::Error::other(broke))) {
            Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
            Err(error) => return Err(Error::Store { place, why: error.to_string() }),
        };
        if free < size.saturating_add(kept) {
            return Err(Error::Reserved { place, size, free, kept });
        }
        Ok(())
    }

    /// The bytes of a blob from `offset` on, in chunks. Past the end there are none. Who reads all of a blob that is damaged is told so at
    /// the end.
    ///
    /// # Errors
    /// If there is no such blob, or the store fails.
    pub async fn read(
        &self,
        digest: &Digest,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes>> + Send + use<>> {
        let chunks = Box::pin(self.chunks(digest, offset).await?);
        let hasher = (offset == 0).then(blake3::Hasher::new);
        let state = (chunks, hasher, self.clone(), digest.clone());
        Ok(futures::stream::try_unfold(state, |(mut chunks, mut hasher, blobs, digest)| async move {
            let Some(chunk) = chunks.try_next().await? else {
                return hasher.map_or(Ok(None), |hasher| blobs.check(&digest, &hasher).map(|()| None));
            };
            if let Some(hasher) = &mut hasher {
                hasher.update(&chunk);
            }
            Ok(Some((chunk, (chunks, hasher, blobs, digest))))
        }))
    }

    /// What the store has of a blob from `offset` on, whatever it is.
    async fn chunks(
        &self,
        digest: &Digest,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes>> + Send + use<>> {
        let size = self.find(digest).await?.ok_or_else(|| Error::Missing(digest.clone()))?;
        let blobs = self.clone();
        let chunks = if offset < size {
            let options = GetOptions { range: Some(GetRange::Offset(offset)), ..GetOptions::default() };
            let got = self.store.get_opts(&self.key(digest), options).await;
            got.map_err(|error| self.failed(&error))?.into_stream().left_stream()
        } else {
            futures::stream::empty().right_stream()
        };
        Ok(chunks.map_err(move |error| blobs.failed(&error)))
    }

    /// Remembers whether a blob that was read is what it is called.
    fn check(&self, digest: &Digest, hasher: &blake3::Hasher) -> Result<()> {
        if hasher.finalize().to_hex().as_str() == digest.as_str() {
            self.damaged().remove(digest);
            return Ok(());
        }
        if self.damaged().insert(digest.clone()) {
            tracing::error!(
                "blob {digest} at {} is damaged: it has other bytes than were stored",
                self.place
            );
        }
        Err(Error::Damaged(digest.clone()))
    }

    /// All blobs, in no order. What else lies there is left out.
    pub fn list(&self) -> impl Stream<Item = Result<Listed>> + Send + use<> {
        let blobs = self.clone();
        self.store.list(Some(&self.prefix)).filter_map(move |object| {
            let listed = match object {
                Ok(object) => blobs.listed(&object).map(Ok),
                Err(error) => Some(Err(blobs.failed(&error))),
            };
            async move { listed }
        })
    }

    fn listed(&self, object: &object_store::ObjectMeta) -> Option<Listed> {
        let mut parts = object.location.prefix_match(&self.prefix)?;
        let (directory, rest) = (parts.next()?, parts.next()?);
        let digest = Digest::parse("", &format!("{}{}", directory.as_ref(), rest.as_ref())).ok()?;
        Some(Listed { digest, size: object.size, stored: object.last_modified.into() })
    }

    /// Deletes a blob. One that is not there is no error.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn delete(&self, digest: &Digest) -> Result<()> {
        match self.store.delete(&self.key(digest)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Reads a blob and compares its hash and its size; `None` if both are right, else what is wrong. Then the bytes read.
    ///
    /// # Errors
    /// If the store fails otherwise than by not having it.
    pub async fn verify(&self, digest: &Digest, size: u64) -> Result<(Option<String>, u64)> {
        let mut chunks = match self.chunks(digest, 0).await {
            Ok(chunks) => Box::pin(chunks),
            Err(Error::Missing(digest)) => return Ok((Some(format!("blob {digest} is missing")), 0)),
            Err(error) => return Err(error),
        };
        let (mut hasher, mut found) = (blake3::Hasher::new(), 0);
        while let Some(chunk) = chunks.try_next().await? {
            hasher.update(&chunk);
            found += chunk.len() as u64;
        }
        let wrong = if self.check(digest, &hasher).is_err() {
            Some(format!("blob {digest} has bytes whose BLAKE3 is {}", hasher.finalize().to_hex()))
        } else if found != size {
            Some(format!("blob {digest} has {found} bytes instead of {size}"))
        } else {
            None
        };
        Ok((wrong, found))
    }

    async fn put(&self, digest: &Digest, bytes: PutPayload) -> Result<()> {
        self.store.put(&self.key(digest), bytes).await.map_err(|error| self.failed(&error))?;
        Ok(())
    }

    async fn put_parts(&self, digest: &Digest) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart(&self.key(digest)).await.map_err(|error| self.failed(&error))
    }

    fn key(&self, digest: &Digest) -> Path {
        let (directory, rest) = digest.as_str().split_at(2);
        self.prefix.clone().join(directory).join(rest)
    }

    fn failed(&self, error: &object_store::Error) -> Error {
        let place = self.place.clone();
        if is_full(error) { Error::Full { place } } else { Error::Store { place, why: error.to_string() } }
    }
}

/// Whether an error comes from a full disk, or a quota.
fn is_full(error: &object_store::Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        source = cause.source();
    }
    false
}
