//! Certificates, and the rule that nobody listens to a network without them.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

/// The coordinator's certificate, and who signs those of workers. PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The coordinator's certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The certificate of the authority that signs workers' certificates.
    pub client_ca: PathBuf,
    /// Whether everybody needs a certificate, and not workers alone (which may also have a token instead).
    #[serde(default)]
    pub require_client_certificates: bool,
}

impl TlsFiles {
    /// Those that [`init`](crate::init::init) has made in a data directory.
    #[must_use]
    pub fn of(data: &Path) -> Self {
        let dir = data.join("tls");
        Self {
            certificate: dir.join("server.pem"),
            key: dir.join("server-key.pem"),
            client_ca: dir.join("ca.pem"),
            require_client_certificates: false,
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn load(&self) -> Result<ServerTlsConfig, Error> {
        let identity = Identity::from_pem(read(&self.certificate)?, read(&self.key)?);
        Ok(ServerTlsConfig::new()
            .identity(identity)
            .client_ca_root(Certificate::from_pem(read(&self.client_ca)?))
            .client_auth_optional(!self.require_client_certificates)
            .timeout(Duration::from_secs(10)))
    }
}

/// Why a coordinator must not, or cannot, listen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate or key cannot be read.
    #[error("cannot read {path} ({source}); make certificates with `incipit coordinator init`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It would be open to a network.
    #[error(
        "{address} can be reached over a network, and there {missing}; make certificates and tokens with `incipit coordinator init`, or listen on 127.0.0.1"
    )]
    Open {
        /// Where it would listen.
        address: SocketAddr,
        /// What is missing.
        missing: &'static str,
    },
    /// It would be open to everybody on this machine, and nobody said so.
    #[error(
        "there are no tokens in {path}; make them with `incipit coordinator init`, or let everybody on this machine in with --insecure"
    )]
    NoTokens {
        /// Where they would be.
        path: PathBuf,
    },
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// Refuses to listen where everybody could come in.
///
/// # Errors
/// Off loopback without certificates or tokens, whatever `insecure` says; on loopback without tokens, unless it is `insecure`.
pub fn check(
    address: SocketAddr,
    has_tls: bool,
    tokens: Option<&Path>,
    insecure: bool,
    place: &Path,
) -> Result<(), Error> {
    let loopback = address.ip().to_canonical().is_loopback();
    let missing = match (has_tls, tokens.is_some()) {
        _ if insecure && !loopback => Some("--insecure is for this machine alone"),
        _ if loopback => None,
        (false, _) => Some("are no certificates"),
        (_, false) => Some("are no tokens"),
        (true, true) => None,
    };
    if let Some(missing) = missing {
        return Err(Error::Open { address, missing });
    }
    if tokens.is_none() && !insecure {
        return Err(Error::NoTokens { path: place.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_may_be_insecure() {
        let place = Path::new("tokens.toml");
        let local: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:127.0.0.1]:1".parse().unwrap();
        for address in [local, mapped, "[::1]:1".parse().unwrap()] {
            assert!(check(address, false, None, true, place).is_ok());
            assert!(check(address, false, Some(place), false, place).is_ok());
            assert!(matches!(check(address, false, None, false, place), Err(Error::NoTokens { .. })));
        }
        for address in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::ffff:10.0.0.1]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            assert!(check(address, true, Some(place), false, place).is_ok());
            for (tls, tokens, insecure) in [
                (false, None, true),
                (true, Some(place), true),
                (false, Some(place), false),
                (true, None, false),
            ] {
                assert!(matches!(check(address, tls, tokens, insecure, place), Err(Error::Open { .. })));
            }
        }
    }
}
