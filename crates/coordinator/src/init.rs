//! What a coordinator needs before it may listen to a network: an authority of its own, certificates, and the first token.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// Days that certificates are good for: the authority's, and those that it signs.
const DAYS: (i64, i64) = (3650, 825);

/// How a file of tokens begins.
const HEADER: &str = "\
# Who may call. Of a token only the BLAKE3 is kept (`b3sum`). Scopes: admin, submit, read, worker. A token may end:
# expires = 2027-01-31T00:00:00Z
# The file is read again when it changes.
";

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is something already.
    #[error("{path} is there already, and is not overwritten; remove it first if it is not wanted any more")]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What was written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A name or address of the coordinator is none.
    #[error("cannot make a certificate for {hosts:?}: {source}; give names or addresses, without ports")]
    Certificate {
        /// The names.
        hosts: Vec<String>,
        /// What is wrong.
        source: rcgen::Error,
    },
}

/// What was made.
#[derive(Clone, PartialEq, Eq)]
pub struct Made {
    /// The authority's certificate: clients and workers need it.
    pub ca: PathBuf,
    /// A worker's certificate and key.
    pub worker: (PathBuf, PathBuf),
    /// The file of tokens.
    pub tokens: PathBuf,
    /// The first token, for everything. It is written nowhere: show it once.
    pub token: String,
}

/// Makes, under `data`, an authority, a certificate for `hosts` (names or addresses by which the coordinator is reached; this machine's
/// loopback is always among them), a worker's certificate, and a token for everything. Files are for their owner alone.
///
/// # Errors
/// If some of it is there already, a host is no name, or the system refuses.
pub fn init(data: &Path, hosts: &[String]) -> Result<Made, Error> {
    let (dir, tokens) = (data.join("tls"), data.join("tokens.toml"));
    if let Some(path) = [&dir, &tokens].into_iter().find(|path| path.exists()) {
        return Err(Error::Exists { path: path.clone() });
    }
    let wrong = |source| Error::Certificate { hosts: hosts.to_vec(), source };
    let pems = Pems::make(hosts).map_err(wrong)?;
    let staged = data.join(".tls-new");
    create_dir(data, &staged)?;
    for (name, text) in &pems.0 {
        write(&staged.join(name), text)?;
    }
    write(&tokens, HEADER)?;
    let token = add_token(&tokens, "admin", &["admin".to_owned()])?;
    fs::rename(&staged, &dir).map_err(|source| Error::Write { path: dir.clone(), source })?;
    File::open(data)
        .and_then(|data| data.sync_all())
        .map_err(|source| Error::Write { path: dir.clone(), source })?;
    let worker = (dir.join("worker.pem"), dir.join("worker-key.pem"));
    Ok(Made { ca: dir.join("ca.pem"), worker, tokens, token })
}

/// Adds a new token, of 244 random bits, to the file of tokens. It is written nowhere: show it once.
///
/// # Errors
/// If the file is not there, or the system refuses.
pub fn add_token(file: &Path, name: &str, scopes: &[String]) -> Result<String, Error> {
    let half = || uuid::Uuid::new_v4().simple().to_string();
    let token = format!("inc_{}{}", half(), half());
    let hash = blake3::hash(token.as_bytes()).to_hex();
    let name = toml::Value::String(name.to_owned());
    let entry = format!("\n[[tokens]]\nname = {name}\nblake3 = \"{hash}\"\nscopes = {scopes:?}\n");
    let appended = OpenOptions::new().append(true).open(file);
    appended
        .and_then(|mut file| file.write_all(entry.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(|source| Error::Write { path: file.to_owned(), source })?;
    Ok(token)
}

struct Pems(Vec<(&'static str, String)>);

impl Pems {
    fn make(hosts: &[String]) -> Result<Self, rcgen::Error> {
        let mut authority = params("Incipit", DAYS.0, Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = authority.self_signed(&key)?;
        let key_pem = key.serialize_pem();
        let issuer = Issuer::new(authority, key);
        let mut names = hosts.to_vec();
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        names.sort();
        names.dedup();
        let server = signed("Incipit coordinator", names, ExtendedKeyUsagePurpose::ServerAuth, &issuer)?;
        let worker = signed("Incipit worker", Vec::new(), ExtendedKeyUsagePurpose::ClientAuth, &issuer)?;
        Ok(Self(vec![
            ("ca.pem", certificate.pem()),
            ("ca-key.pem", key_pem),
            ("server.pem", server.0),
            ("server-key.pem", server.1),
            ("worker.pem", worker.0),
            ("worker-key.pem", worker.1),
        ]))
    }
}

fn params(name: &str, days: i64, hosts: Vec<String>) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - Duration::days(1); // Clocks differ.
    params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
    Ok(params)
}

fn signed(
    name: &str,
    hosts: Vec<String>,
    purpose: ExtendedKeyUsagePurpose,
    issuer: &Issuer<'_, KeyPair>,
) -> Result<(String, String), rcgen::Error> {
    let mut params = params(name, DAYS.1, hosts)?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    let key = KeyPair::generate()?;
    Ok((params.signed_by(&key, issuer)?.pem(), key.serialize_pem()))
}

/// Makes `staged` under `data`, empty, for the owner alone.
fn create_dir(data: &Path, staged: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    let failed = |source| Error::Write { path: staged.to_owned(), source };
    fs::create_dir_all(data).map_err(failed)?;
    if staged.exists() {
        fs::remove_dir_all(staged).map_err(failed)?; // Of a process that died.
    }
    fs::DirBuilder::new().mode(0o700).create(staged).map_err(failed)
}

/// Writes a file that must not be there, for the owner alone.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|source| Error::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doors::tokens::Tokens;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn files_are_their_owners_and_the_token_opens_the_door() {
        let dir = tempfile::tempdir().unwrap();
        let made = init(dir.path(), &["cluster.example".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        assert!(Tokens::open(&made.tokens).unwrap().check(&made.token).is_ok());
        let files = fs::read_dir(dir.path().join("tls")).unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<_> = files.chain([made.tokens]).collect();
        assert_eq!(files.len(), 7);
        for path in files {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
            assert!(!fs::read_to_string(&path).unwrap().contains(&made.token), "the token lies in {path:?}");
        }
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &[]).unwrap();
        let before = fs::read(dir.path().join("tls/ca.pem")).unwrap();
        assert!(matches!(init(dir.path(), &[]), Err(Error::Exists { .. })));
        assert_eq!(fs::read(dir.path().join("tls/ca.pem")).unwrap(), before);
    }
}
