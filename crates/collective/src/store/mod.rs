//! Where ranks leave the addresses at which they can be reached, before they can reach each other.

mod file;
mod tcp;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use file::FileStore;
pub use tcp::{TcpServer, TcpStore};

use crate::{Error, Result};

/// A small store of bytes by name that all ranks of a job can read and write. Keys are any text.
pub trait Store: Send + Sync {
    /// Writes a value; it replaces an older one.
    ///
    /// # Errors
    /// If the store cannot be reached or written.
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;

    /// The value of `key`, as soon as somebody has written it.
    ///
    /// # Errors
    /// [`Error::StoreDeadline`] if nobody did; or if the store cannot be reached or read.
    fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>>;

    /// The value of `key`, if it was written. Does not wait for it.
    ///
    /// # Errors
    /// If the store cannot be reached or read.
    fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>>;

    /// The value of `key` as it was last heard of here, perhaps a moment ago. Ranks ask for it between operations: where an answer takes
    /// long, a store must not wait for it, but have all that is written from the first call on brought here.
    ///
    /// # Errors
    /// If the store cannot be reached or read.
    fn last_known(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.try_get(key)
    }

    /// The address by which this machine reaches the store, where that is known: other ranks probably reach this
    /// machine by it.
    fn local_address(&self) -> Option<std::net::IpAddr> {
        None
    }
}

/// The store at `tcp://HOST:PORT`, where a [`TcpServer`] listens, or in the directory of `file:DIR`.
///
/// # Errors
/// If the address is none of these, or the directory cannot be made. A server is only looked for when it is needed.
pub fn open(url: &str) -> Result<Arc<dyn Store>> {
    if let Some(address) = url.strip_prefix("tcp://") {
        return Ok(Arc::new(TcpStore::new(address)?));
    }
    match url.strip_prefix("file:") {
        Some(path) if !path.is_empty() => {
            // file:/dir and file:///dir name the same place.
            let path = path.strip_prefix("//").unwrap_or(path);
            Ok(Arc::new(FileStore::new(PathBuf::from(path))?))
        }
        _ => Err(Error::store(url, "is no address of a store; give tcp://HOST:PORT or file:DIR")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Runs a check on a store in a directory and on one behind TCP; each call opens the same store anew.
    fn both(check: impl Fn(&dyn Fn() -> Arc<dyn Store>)) {
        let folder = tempfile::tempdir().unwrap();
        check(&|| open(&format!("file:{}/s", folder.path().display())).unwrap());
        let server = TcpServer::new("127.0.0.1:0").unwrap();
        check(&|| open(&format!("tcp://{}", server.address())).unwrap());
    }

    #[test]
    fn what_one_writes_another_reads() {
        both(|store| {
            let (a, b) = (store(), store());
            assert_eq!(b.try_get("x/y z").unwrap(), None);
            a.set("x/y z", b"1").unwrap();
            a.set("x%2fy z", &[0, 255]).unwrap();
            assert_eq!(b.try_get("x/y z").unwrap().unwrap(), b"1");
            assert_eq!(b.get("x%2fy z", SOON).unwrap(), [0, 255]);
            a.set("x/y z", b"").unwrap();
            assert_eq!(b.get("x/y z", SOON).unwrap(), b"");
        });
    }

    #[test]
    fn a_key_is_awaited_until_the_deadline() {
        both(|store| {
            let (a, b) = (store(), store());
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| b.get("late", SOON).unwrap());
                std::thread::sleep(Duration::from_millis(100));
                a.set("late", b"here").unwrap();
                assert_eq!(reader.join().unwrap(), b"here");
            });
            let error = a.get("never", Duration::from_millis(50)).unwrap_err();
            assert!(matches!(&error, Error::StoreDeadline { key, .. } if key == "never"), "{error}");
        });
    }

    #[test]
    fn a_client_may_come_before_the_server() {
        let address = TcpServer::new("127.0.0.1:0").unwrap().address();
        let client = TcpStore::new(&address.to_string()).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| client.get("key", SOON).unwrap());
            std::thread::sleep(Duration::from_millis(200));
            let server = TcpServer::new(&address.to_string()).unwrap();
            open(&format!("tcp://{}", server.address())).unwrap().set("key", b"value").unwrap();
            assert_eq!(reader.join().unwrap(), b"value");
        });
    }

    #[test]
    fn a_store_that_is_gone_is_an_error_at_once() {
        let server = TcpServer::new("127.0.0.1:0").unwrap();
        let client = TcpStore::new(&server.address().to_string()).unwrap();
        client.set("key", b"value").unwrap();
        drop(server);
        let start = std::time::Instant::now();
        for _ in 0..2 {
            assert!(client.try_get("key").is_err());
            assert!(client.set("key", b"again").is_err());
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }

    #[test]
    fn a_visitor_with_another_protocol_is_turned_away() {
        use std::io::{Read, Write};
        let server = TcpServer::new("127.0.0.1:0").unwrap();
        let mut stream = std::net::TcpStream::connect(server.address()).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)));
        open(&format!("tcp://{}", server.address())).unwrap().set("key", b"value").unwrap();
    }

    #[test]
    fn addresses_that_are_none_are_refused_with_the_mend() {
        for url in ["", "file:", "/tmp/x", "tcp://host", "tcp://:80", "http://host:80"] {
            let error = open(url).err().unwrap().to_string();
            assert!(error.contains("give"), "{url}: {error}");
        }
    }
}
