//! This process as one rank of several.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use incipit_collective::store::TcpServer;
use incipit_collective::{Options, Ranks, gloo, store};

use super::environment::{Meeting, Place, place, variables};
use super::mesh;
use crate::exit::BadInput;

/// The key that the store of rank 0 holds from its beginning.
const SERVED: &str = "served";

/// The store at which the ranks met, if this process serves it. It is there to the end: others look up in it why a rank has left.
static STORE: OnceLock<TcpServer> = OnceLock::new();

/// This process as one of the ranks; waits until all are there.
///
/// # Errors
/// If the environment does not say which rank this is, the degrees do not make as many ranks as there are, or the others do not come in
/// time.
pub(crate) fn join(tp: usize, dp: usize, options: &Options) -> Result<Ranks> {
    let Place { rank, world, meeting, epoch, job } = place(&variables)?;
    let mesh = mesh(tp, dp, world)?;
    let options = Options { epoch, job, ..options.clone() };
    let open = |url: &str| store::open(url).map_err(|error| BadInput(error.to_string()));
    let store = match meeting {
        Meeting::At(url) => open(&url)?,
        Meeting::RankZero { host, port } => {
            let store = open(&format!("tcp://{}:{port}", bracketed(&host)))?;
            if rank == 0 {
                let server = serve(&host, port)?;
                // A process joins once.
                let _ = STORE.set(server);
                store.set(SERVED, b"")?;
            }
            // Rank 0 may come later than this one.
            store.get(SERVED, options.connect_deadline)?;
            store
        }
    };
    Ok(gloo::connect(mesh, rank, store, &options)?)
}

/// The store at which the ranks meet. Other machines may know this one by an address that it does not know itself, so that only a
/// host which is plainly this machine narrows where it listens.
fn serve(host: &str, port: u16) -> Result<TcpServer> {
    let any = if host.contains(':') { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let address = match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) if address.is_loopback() => address,
        Err(_) if host == "localhost" => Ipv4Addr::LOCALHOST.into(),
        _ => any,
    };
    let address = SocketAddr::new(address, port).to_string();
    TcpServer::new(&address).with_context(|| format!("rank 0 cannot listen at MASTER_PORT, {port}"))
}

/// A host as it stands before a port.
fn bracketed(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() }
}
