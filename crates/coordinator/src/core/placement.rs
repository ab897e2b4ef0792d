//! Which worker gets which rank: a pure function.

use std::collections::BTreeMap;

use incipit_proto::names::WorkerName;

use super::backbone::{BackboneSpec, Collective, Device};

/// A worker that is online, as the placement of one backbone sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub worker: WorkerName,
    /// Slots that no other backbone has.
    pub slots: u32,
    /// GPUs that no other backbone has.
    pub gpus: u32,
    /// Collectives that it has.
    pub collectives: Vec<String>,
    /// Whether it can be told now. One that cannot keeps what it has, within its lease, but gets nothing new.
    pub connected: bool,
}

/// Workers for all ranks of a backbone, by rank. A rank stays at its home if that has room; the rest of a replica goes to one
/// worker where possible: the one that has most of it, and else the one with most room.
///
/// # Errors
/// What is missing, in one line, if there is no room for all.
pub fn place(
    spec: &BackboneSpec,
    homes: &BTreeMap<u32, WorkerName>,
    candidates: &[Candidate],
) -> Result<Vec<WorkerName>, String> {
    let able: Vec<&Candidate> = candidates
        .iter()
        .filter(|candidate| candidate.collectives.iter().any(|word| word == spec.collective.as_str()))
        .collect();
    if spec.collective == Collective::Local {
        return place_together(spec, homes.get(&0), &able);
    }
    let mut room: BTreeMap<&WorkerName, u32> =
        able.iter().map(|candidate| (&candidate.worker, room_of(spec, candidate))).collect();
    let mut placed: BTreeMap<u32, WorkerName> = BTreeMap::new();
    for rank in 0..spec.num_ranks() {
        if let Some(home) = homes.get(&rank)
            && let Some(room) = room.get_mut(home).filter(|room| **room > 0)
        {
            *room -= 1;
            placed.insert(rank, home.clone());
        }
    }
    room.retain(|worker, _| able.iter().any(|candidate| candidate.worker == **worker && candidate.connected));
    for replica in 0..spec.dp {
        place_replica(spec, replica, &mut room, &mut placed);
    }
    if placed.len() < spec.num_ranks() as usize {
        return Err(missing(spec, placed.len(), able.len()));
    }
    Ok(placed.into_values().collect())
}

/// All ranks in one process, which takes one slot, and on GPUs one for each rank.
fn place_together(
    spec: &BackboneSpec,
    home: Option<&WorkerName>,
    able: &[&Candidate],
) -> Result<Vec<WorkerName>, String> {
    let gpus = if spec.device == Device::Cuda { spec.num_ranks() } else { 0 };
    let fits = |candidate: &&&Candidate| candidate.slots > 0 && candidate.gpus >= gpus;
    let at_home = able.iter().filter(fits).find(|candidate| Some(&candidate.worker) == home);
    let choice = at_home.or_else(|| {
        let there = able.iter().filter(fits).filter(|candidate| candidate.connected);
        there.min_by_key(|candidate| (u32::MAX - candidate.slots, &candidate.worker))
    });
    match choice {
        Some(choice) => Ok(vec![choice.worker.clone(); spec.num_ranks() as usize]),
        None => Err(missing(spec, 0, able.len())),
    }
}

fn place_replica(
    spec: &BackboneSpec,
    replica: u32,
    room: &mut BTreeMap<&WorkerName, u32>,
    placed: &mut BTreeMap<u32, WorkerName>,
) {
    let ranks = replica * spec.tp..(replica + 1) * spec.tp;
    let open: Vec<u32> = ranks.clone().filter(|rank| !placed.contains_key(rank)).collect();
    let share = |worker: &WorkerName| ranks.clone().filter(|rank| placed.get(rank) == Some(worker)).count();
    let whole = room
        .iter()
        .filter(|(_, room)| **room as usize >= open.len())
        .min_by_key(|(worker, room)| (usize::MAX - share(worker), u32::MAX - **room, **worker))
        .map(|(worker, _)| *worker);
    for rank in open {
        let most = || room.iter().min_by_key(|(worker, room)| (u32::MAX - **room, **worker)).map(|(w, _)| *w);
        let Some(worker) = whole.or_else(most) else { return };
        match room.get_mut(worker) {
            Some(room) if *room > 0 => *room -= 1,
            _ => return,
        }
        placed.insert(rank, worker.clone());
    }
}

fn room_of(spec: &BackboneSpec, candidate: &Candidate) -> u32 {
    match spec.device {
        Device::Cpu => candidate.slots,
        Device::Cuda => candidate.slots.min(candidate.gpus),
    }
}

fn missing(spec: &BackboneSpec, placed: usize, num_able: usize) -> String {
    let unit = match (spec.device, spec.collective) {
        (Device::Cpu, Collective::Local) => "one slot".to_owned(),
        (Device::Cuda, Collective::Local) => format!("one slot and {} GPUs on one worker", spec.num_ranks()),
        (Device::Cpu, _) => format!("{} slots", spec.num_ranks()),
        (Device::Cuda, _) => format!("{} slots with a GPU each", spec.num_ranks()),
    };
    let have = match num_able {
        0 => "no worker that is online and not drained has that collective".to_owned(),
        1 => format!("the one worker online that has it has room for {placed} of the ranks"),
        n => format!("the {n} workers online that have it have room for {placed} of the ranks"),
    };
    format!("needs {unit} with the collective {}: {have}; start a worker, or free room", spec.collective)
}
