//! This process as one rank of several.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use incipit_collective::store::{Store, TcpServer};
use incipit_collective::{Mesh, Options, Ranks, store};
use incipit_tune::device::DeviceChoice;
use incipit_tune::spec::Backend;

use super::environment::{Meeting, Place, place, variables};
use super::mesh;
use crate::exit::{BadInput, bad_input};

/// The key that the store of rank 0 holds from its beginning.
const SERVED: &str = "served";

/// The store at which the ranks met, if this process serves it. It is there to the end: others look up in it why a rank has left.
static STORE: OnceLock<TcpServer> = OnceLock::new();

/// This process as one of the ranks, connected by `backend`; waits until all are there.
///
/// # Errors
/// If the environment does not say which rank this is, the degrees do not make as many ranks as there are, or the others do not come in
/// time.
pub(crate) fn join(
    backend: Backend,
    (tp, dp): (usize, usize),
    device: DeviceChoice,
    options: &Options,
) -> Result<Ranks> {
    let Place { rank, world, local_rank, meeting, epoch, job } = place(&variables)?;
    let mesh = mesh(tp, dp, world)?;
    let options = Options { epoch, job, local_rank: Some(local_rank), ..options.clone() };
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
    connect(backend, (mesh, rank), store, device, &options)
}

fn connect(
    backend: Backend,
    (mesh, rank): (Mesh, usize),
    store: Arc<dyn Store>,
    device: DeviceChoice,
    options: &Options,
) -> Result<Ranks> {
    match backend {
        #[cfg(feature = "gloo")]
        Backend::Gloo => Ok(incipit_collective::gloo::connect(mesh, rank, store, options)?),
        #[cfg(feature = "cuda")]
        Backend::Nccl if device.is_gpu() => {
            let device = device.open_for(options.local_rank.unwrap_or(rank))?;
            Ok(incipit_collective::nccl::connect(mesh, rank, store, &device, options)?)
        }
        Backend::Nccl if cfg!(feature = "cuda") => bad_input(
            "--collective nccl moves numbers between GPUs: pass --device cuda besides, or --collective gloo",
        ),
        other => {
            let _ = (mesh, rank, store, device, options);
            bad_input(format!("--collective {other} is not built into this program"))
        }
    }
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
