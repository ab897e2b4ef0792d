//! A store in a directory, which may be on a shared file system.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Store;
use crate::transport::Until;
use crate::{Error, Result};

/// How often the directory is looked at while a key is awaited.
const POLL: Duration = Duration::from_millis(5);

/// One file for each key, written aside and renamed, so that a reader sees a value whole or not at all.
#[derive(Debug)]
pub struct FileStore {
    folder: PathBuf,
    writes: AtomicU64,
}

impl FileStore {
    /// The store in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|e| Error::store(&folder.display(), e))?;
        Ok(Self { folder, writes: AtomicU64::new(0) })
    }

    /// A key may hold what a file name may not, so its bytes are written as letters and digits where they are none.
    fn path(&self, key: &str) -> PathBuf {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let name: String = key
            .bytes()
            .map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") })
            .collect();
        self.folder.join(name)
    }

    fn error(&self, error: &io::Error) -> Error {
        Error::store(&self.folder.display(), error)
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let count = self.writes.fetch_add(1, Ordering::Relaxed);
        let aside = self.folder.join(format!(".{}.{count}.{:p}", std::process::id(), self));
        let write = || {
            fs::File::create(&aside)?.write_all(value)?;
            fs::rename(&aside, self.path(key))
        };
        write().map_err(|e| self.error(&e))
    }

    fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>> {
        let until = Until::after(deadline);
        loop {
            if let Some(value) = self.try_get(key)? {
                return Ok(value);
            }
            if until.is_over() {
                let (store, seconds) = (self.folder.display().to_string(), deadline.as_secs_f64());
                return Err(Error::StoreDeadline { store, key: key.to_owned(), seconds });
            }
            std::thread::sleep(POLL.min(until.left()));
        }
    }

    fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        match fs::read(self.path(key)) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error(&error)),
        }
    }
}
