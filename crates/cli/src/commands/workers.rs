//! `incipit workers`: the machines that hold backbones.

use anyhow::Result;
use clap::{Args, Subcommand};
use incipit_proto::v1::{DrainWorkerRequest, GetWorkerRequest, ListWorkersRequest, Worker};

use crate::args::Global;
use crate::cluster::names::{self, short};
use crate::cluster::{ConnectArgs, block_on, call, list, request_id, show};
use crate::exit::Exit;
use crate::output;
use crate::progress::note;
use crate::units;

/// Flags of `workers`.
#[derive(Args)]
pub(crate) struct WorkersArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: WorkersCommand,
}

/// What can be done with workers.
#[derive(Subcommand)]
enum WorkersCommand {
    /// List workers
    List,
    /// Show a worker
    Get(OneArgs),
    /// Give a worker nothing more, and move what it has: its jobs go on elsewhere, from a checkpoint. One that is started again is given
    /// something again
    Drain(OneArgs),
}

/// A worker.
#[derive(Args)]
struct OneArgs {
    /// The worker
    #[arg(value_name = "WORKER", value_parser = names::worker)]
    worker: String,
}

/// Does it.
///
/// # Errors
/// What the coordinator says, or if it cannot be reached.
pub(crate) fn run(args: WorkersArgs, global: &Global) -> Result<Exit> {
    block_on(async move {
        let client = args.connect.connect().await?;
        match args.command {
            WorkersCommand::List => {
                let all =
                    list!(client, workers.list_workers(ListWorkersRequest::default()), workers, usize::MAX);
                show::print(&all, || table(&all), global)?;
            }
            WorkersCommand::Get(args) => {
                let worker =
                    call!(client, workers.get_worker(GetWorkerRequest { name: args.worker.clone() }))?;
                show::print(&worker, || facts(&worker), global)?;
            }
            WorkersCommand::Drain(args) => {
                let (name, etag) = (args.worker, String::new());
                let request = DrainWorkerRequest { name, request_id: request_id(None)?, etag };
                let worker = call!(client, workers.drain_worker(request))?;
                show::print(&worker, || table(std::slice::from_ref(&worker)), global)?;
                note("see where its ranks went: incipit backbone list");
            }
        }
        Ok(Exit::Ok)
    })
}

fn state(worker: &Worker) -> String {
    show::word(worker.state().as_str_name(), "WORKER_STATE_")
}

fn table(workers: &[Worker]) -> String {
    let row = |worker: &Worker| {
        let machine = worker.machine.clone().unwrap_or_default();
        vec![
            short(&worker.name),
            state(worker),
            format!("{}/{}", worker.used_slots, worker.slots),
            machine.cpu_cores.to_string(),
            units::bytes(machine.memory_bytes),
            machine.gpus.len().to_string(),
            show::age(worker.heartbeat_time.as_ref()),
            show::or_none(machine.hostname),
        ]
    };
    let header = ["NAME", "STATE", "RANKS", "CORES", "MEMORY", "GPUS", "SEEN", "HOST"];
    let nothing = "no workers; start one on a machine with `incipit worker`";
    show::table(&header, workers.iter().map(row).collect(), &[7], nothing)
}

fn facts(worker: &Worker) -> String {
    let machine = worker.machine.clone().unwrap_or_default();
    output::facts([
        ("worker", short(&worker.name)),
        ("state", state(worker)),
        ("ranks", format!("{} of {}", worker.used_slots, worker.slots)),
        ("host", show::or_none(machine.hostname)),
        ("cores", machine.cpu_cores.to_string()),
        ("memory", units::bytes(machine.memory_bytes)),
        ("fast paths", show::or_none(machine.isa)),
        ("GPUs", show::or_none(machine.gpus.join(", "))),
        ("collectives", show::or_none(machine.collectives.join(", "))),
        ("version", show::or_none(worker.version.clone())),
        ("connected", show::time(worker.connect_time.as_ref())),
        ("seen", show::time(worker.heartbeat_time.as_ref())),
    ])
}

#[cfg(test)]
mod tests {
    use incipit_proto::v1::{Machine, WorkerState};

    use super::*;

    #[test]
    fn workers_fit_a_terminal() {
        let machine = Machine {
            hostname: "ip-10-0-13-37.eu-central-1.compute.internal".into(),
            cpu_cores: 128,
            memory_bytes: 512 << 30,
            gpus: vec!["H100".into(); 8],
            collectives: vec!["local".into(), "nccl".into()],
            ..Machine::default()
        };
        let (name, state) = ("workers/gpu-node-17".to_owned(), WorkerState::Online.into());
        let worker =
            Worker { name, state, machine: Some(machine), slots: 8, used_slots: 4, ..Worker::default() };
        let text = table(std::slice::from_ref(&worker));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for part in ["gpu-node-17", "online", "4/8", "512.0 GiB"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(facts(&worker).contains("local, nccl"));
        assert!(table(&[]).contains("incipit worker"));
    }
}
