//! The file of tokens: who has which, by its BLAKE3, and what it is good for.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime},
};

use incipit_proto::Problem;
use serde::Deserialize;
use tonic::Code;

use super::{Actor, Scope};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Why a file of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read the tokens in {path} ({source}); make them with `incipit coordinator init`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It says what it must not.
    #[error("{path} has no tokens that can be used: {why}")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    tokens: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    blake3: String,
    scopes: Vec<Scope>,
    expires: Option<toml::value::Datetime>,
}

#[derive(Clone, Debug)]
struct Token {
    actor: Actor,
    expires: Option<SystemTime>,
}

type Known = HashMap<String, Token>;

/// The tokens of a file, which is read again when it changes.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    known: RwLock<Known>,
    looked: Mutex<Looked>,
}

#[derive(Debug)]
struct Looked {
    when: Instant,
    stamp: Option<Stamp>,
}

/// What a file that was written again has otherwise.
type Stamp = (SystemTime, u64, u64);

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read, or is none of tokens.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let stamp = stamp(path); // Before the reading: what changes between is read again.
        let known = RwLock::new(read(path)?);
        let looked = Mutex::new(Looked { when: Instant::now(), stamp });
        Ok(Self { path: path.to_owned(), known, looked })
    }

    /// Who has this token.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` if nobody has, or not any more.
    pub fn check(&self, token: &str) -> Result<Actor, Problem> {
        self.refresh();
        // A map of hashes: how long the look-up takes says nothing about the tokens.
        let hash = blake3::hash(token.as_bytes()).to_hex();
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let Some(token) = known.get(hash.as_str()) else {
            let what = "the token is unknown; give one that is in the coordinator's tokens.toml";
            return Err(Problem::new(Code::Unauthenticated, "BAD_TOKEN", what));
        };
        if token.expires.is_some_and(|expires| expires <= SystemTime::now()) {
            let what = format!("the token {} has expired; ask for another", token.actor.name);
            let problem = Problem::new(Code::Unauthenticated, "TOKEN_EXPIRED", what);
            return Err(problem.with("token", &token.actor.name));
        }
        Ok(token.actor.clone())
    }

    /// Reads the file again if it has changed. A file that cannot be used changes nothing: the tokens known before stay.
    fn refresh(&self) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if looked.when.elapsed() < LOOK {
            return;
        }
        looked.when = Instant::now();
        let stamp = stamp(&self.path);
        if stamp == looked.stamp {
            return;
        }
        looked.stamp = stamp;
        match read(&self.path) {
            Ok(known) => {
                tracing::info!("read {} tokens from {}", known.len(), self.path.display());
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = known;
            }
            Err(error) => tracing::error!("the tokens stay as they were: {error}"),
        }
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

fn read(path: &Path) -> Result<Known, Error> {
    let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let bad = |why: String| Error::Bad { path: path.to_owned(), why };
    let file: File = toml::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let mut known = Known::new();
    for entry in file.tokens {
        let hexadecimal = entry.blake3.len() == 64 && entry.blake3.bytes().all(|c| c.is_ascii_hexdigit());
        if !hexadecimal {
            return Err(bad(format!("blake3 of {:?} is not 64 hexadecimal digits", entry.name)));
        }
        if entry.scopes.is_empty() || entry.name.is_empty() {
            return Err(bad(format!("token {:?} needs a name and scopes", entry.name)));
        }
        let expires = entry.expires.map(|expires| moment(&expires.to_string())).transpose();
        let expires = expires.map_err(|why| bad(format!("expires of {:?} {why}", entry.name)))?;
        let actor = Actor { name: entry.name, scopes: entry.scopes };
        if let Some(other) = known.insert(entry.blake3.to_ascii_lowercase(), Token { actor, expires }) {
            return Err(bad(format!("the token of {:?} is there twice", other.actor.name)));
        }
    }
    Ok(known)
}

fn moment(text: &str) -> Result<SystemTime, String> {
    let format = &time::format_description::well_known::Rfc3339;
    match time::OffsetDateTime::parse(text, format) {
        Ok(moment) => Ok(moment.into()),
        Err(_) => Err(format!("is {text}; give a moment with its zone, as 2027-01-31T00:00:00Z")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, token: &str, rest: &str) -> String {
        let hash = blake3::hash(token.as_bytes()).to_hex();
        format!("[[tokens]]\nname = \"{name}\"\nblake3 = \"{hash}\"\n{rest}\n")
    }

    #[test]
    fn a_token_is_known_by_its_hash_until_it_expires() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.toml");
        let now = entry("ana", "a", "scopes = [\"submit\"]\nexpires = 2999-01-01T00:00:00Z");
        let then = entry("bob", "b", "scopes = [\"admin\"]\nexpires = 2000-01-01T00:00:00Z");
        fs::write(&path, now + &then).unwrap();
        let tokens = Tokens::open(&path).unwrap();
        let actor = tokens.check("a").unwrap();
        assert_eq!((&*actor.name, actor.may(Scope::Read), actor.may(Scope::Admin)), ("ana", true, false));
        assert_eq!(tokens.check("b").unwrap_err().reason, "TOKEN_EXPIRED");
        assert_eq!(tokens.check("c").unwrap_err().reason, "BAD_TOKEN");
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_broken_one_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.toml");
        fs::write(&path, entry("ana", "a", "scopes = [\"read\"]")).unwrap();
        let tokens = Tokens::open(&path).unwrap();
        fs::write(&path, entry("bob", "bb", "scopes = [\"read\", \"worker\"]")).unwrap();
        std::thread::sleep(LOOK);
        assert!(tokens.check("a").is_err() && tokens.check("bb").is_ok());
        fs::write(&path, "tokens = 3").unwrap();
        std::thread::sleep(LOOK);
        assert!(tokens.check("bb").is_ok());
    }

    #[test]
    fn a_file_of_something_else_is_refused_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.toml");
        for text in
            [entry("ana", "a", "scopes = []"), entry("ana", "a", "scopes = [\"root\"]"), "x".to_owned()]
        {
            fs::write(&path, text).unwrap();
            assert!(Tokens::open(&path).unwrap_err().to_string().contains("tokens.toml"));
        }
    }
}
