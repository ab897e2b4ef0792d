//! A store in the memory of one process, which the others reach by TCP.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Store;
use crate::transport::Until;
use crate::{Error, Result};

/// What a client begins with, so that a stray visitor is turned away.
const HELLO: &[u8; 8] = b"incstor1";
/// The longest key, and the longest value: what ranks tell each other here is small.
const LIMIT: usize = 1 << 20;
/// How long the answer to a question that does not wait may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a client waits before it tries again to reach a server that is not there yet.
const RETRY: Duration = Duration::from_millis(50);

const SET: u8 = 1;
const GET: u8 = 2;
const FOUND: u8 = 1;
const ABSENT: u8 = 0;

fn send(stream: &mut TcpStream, code: u8, word: u64, texts: [&[u8]; 2]) -> io::Result<()> {
    let mut message = vec![code];
    message.extend(word.to_le_bytes());
    for text in texts {
        message.extend((text.len() as u32).to_le_bytes());
        message.extend(text);
    }
    stream.write_all(&message)
}

fn receive(stream: &mut TcpStream) -> io::Result<(u8, u64, [Vec<u8>; 2])> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [code, word @ ..] = head;
    let mut texts = [Vec::new(), Vec::new()];
    for text in &mut texts {
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a text of {len} bytes")));
        }
        text.resize(len, 0);
        stream.read_exact(text)?;
    }
    Ok((code, u64::from_le_bytes(word), texts))
}

/// What the server holds.
#[derive(Debug, Default)]
struct Shared {
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    written: Condvar,
    closing: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Vec<u8>>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of `key`, as soon as it is there, or nothing after `wait`.
    fn get(&self, key: &[u8], wait: Duration) -> Option<Vec<u8>> {
        let until = Until::after(wait);
        let mut values = self.lock();
        loop {
            if let Some(value) = values.get(key) {
                return Some(value.clone());
            }
            if until.is_over() || self.closing.load(Ordering::Relaxed) {
                return None;
            }
            values =
                self.written.wait_timeout(values, until.left()).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Answers one client until it goes.
    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut hello = [0; 8];
        stream.read_exact(&mut hello)?;
        if &hello != HELLO {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "another protocol"));
        }
        stream.set_read_timeout(None)?;
        loop {
            let (code, word, [key, value]) = receive(&mut stream)?;
            if self.closing.load(Ordering::Relaxed) {
                return Ok(());
            }
            if code == SET {
                self.lock().insert(key, value);
                self.written.notify_all();
                send(&mut stream, FOUND, 0, [&[], &[]])?;
                continue;
            }
            match self.get(&key, Duration::from_millis(word)) {
                Some(value) => send(&mut stream, FOUND, 0, [&value, &[]])?,
                None => send(&mut stream, ABSENT, 0, [&[], &[]])?,
            }
        }
    }
}

/// The process that holds the store. Dropping it closes the store.
#[derive(Debug)]
pub struct TcpServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl TcpServer {
    /// A store that listens at `address`; port 0 takes any that is free.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn new(address: &str) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|e| Error::store(address, e))?;
        let local = listener.local_addr().map_err(|e| Error::store(address, e))?;
        let shared = Arc::new(Shared::default());
        let state = shared.clone();
        let thread = thread::Builder::new().name("store".to_owned()).spawn(move || accept(&listener, &state));
        let thread = thread.map_err(|e| Error::store(address, e))?;
        Ok(Self { address: local, shared, listener: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.closing.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of descriptors, say: some may be free again soon.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let shared = shared.clone();
        // A client that goes, or talks nonsense, ends its own thread alone.
        let _ = thread::Builder::new().name("store client".to_owned()).spawn(move || shared.serve(stream));
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        {
            // Whoever looks at it before waiting holds the lock.
            let _values = self.shared.lock();
            self.shared.closing.store(true, Ordering::Relaxed);
        }
        self.shared.written.notify_all();
        // The listener is woken by a visit.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            let loopback: IpAddr =
                if address.is_ipv4() { [127, 0, 0, 1].into() } else { [0u16, 0, 0, 0, 0, 0, 0, 1].into() };
            address.set_ip(loopback);
        }
        if TcpStream::connect_timeout(&address, ANSWER).is_ok()
            && let Some(listener) = self.listener.take()
        {
            let _ = listener.join();
        }
    }
}

/// A client of a [`TcpServer`].
#[derive(Debug)]
pub struct TcpStore {
    address: String,
    /// Connections that nobody uses at the moment; a call that finds none makes one.
    idle: Mutex<Vec<TcpStream>>,
    /// Whether the server was there: one that was, and is gone, is not waited for.
    reached: AtomicBool,
}

impl TcpStore {
    /// The store that listens at `address`, `HOST:PORT`. It is reached when it is first used.
    ///
    /// # Errors
    /// If the address has no port.
    pub fn new(address: &str) -> Result<Self> {
        let port = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        match port {
            Some((host, _)) if !host.is_empty() => Ok(Self {
                address: address.to_owned(),
                idle: Mutex::new(Vec::new()),
                reached: AtomicBool::new(false),
            }),
            _ => Err(Error::store(address, "is no address; give HOST:PORT")),
        }
    }

    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::store(&self.address, what)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_connect(&self, until: Until) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, until.left().max(RETRY)) {
                Ok(mut stream) => {
                    stream.set_nodelay(true)?;
                    stream.write_all(HELLO)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// A connection; the server may not be there yet.
    fn connect(&self, until: Until) -> Result<TcpStream> {
        if let Some(stream) = self.idle().pop() {
            return Ok(stream);
        }
        loop {
            match self.try_connect(until) {
                Ok(stream) => {
                    self.reached.store(true, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(error) if until.is_over() || self.reached.load(Ordering::Relaxed) => {
                    return Err(self.error(format!("{error}; is the process that holds it running?")));
                }
                Err(_) => thread::sleep(RETRY.min(until.left())),
            }
        }
    }

    fn ask(&self, code: u8, wait: Duration, texts: [&[u8]; 2], until: Until) -> Result<Option<Vec<u8>>> {
        let mut stream = self.connect(until)?;
        let mut exchange = || {
            stream.set_read_timeout(Some(wait + ANSWER))?;
            send(&mut stream, code, wait.as_millis().try_into().unwrap_or(u64::MAX), texts)?;
            receive(&mut stream)
        };
        let (found, _, [value, _]) = exchange().map_err(|e| self.error(e))?;
        self.idle().push(stream);
        Ok((found == FOUND).then_some(value))
    }
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        if key.len().max(value.len()) > LIMIT {
            return Err(self.error(format!("{key:?} or its value is longer than {LIMIT} bytes")));
        }
        self.ask(SET, Duration::ZERO, [key.as_bytes(), value], Until::after(ANSWER)).map(drop)
    }

    fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>> {
        let until = Until::after(deadline);
        // The server waits for the key; what is left after reaching it is how long.
        let stream = self.connect(until)?;
        self.idle().push(stream);
        self.ask(GET, until.left(), [key.as_bytes(), &[]], until)?.ok_or_else(|| Error::StoreDeadline {
            store: self.address.clone(),
            key: key.to_owned(),
            seconds: deadline.as_secs_f64(),
        })
    }

    fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.ask(GET, Duration::ZERO, [key.as_bytes(), &[]], Until::after(Duration::ZERO))
    }

    fn local_address(&self) -> Option<IpAddr> {
        let stream = self.connect(Until::after(ANSWER)).ok()?;
        let address = stream.local_addr().ok()?;
        self.idle().push(stream);
        Some(address.ip())
    }
}
