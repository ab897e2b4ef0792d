//! Where ranks go.

use std::collections::BTreeMap;

use super::world::{spec, worker_name};
use crate::core::{
    backbone::{BackboneSpec, Collective, Device},
    placement::{Candidate, place},
};

fn candidate(id: &str, slots: u32, gpus: u32) -> Candidate {
    let collectives = ["local", "gloo", "nccl"].map(str::to_owned).to_vec();
    Candidate { worker: worker_name(id), slots, gpus, collectives, connected: true }
}

fn placed(
    spec: &BackboneSpec,
    homes: &[(u32, &str)],
    candidates: &[Candidate],
) -> Result<Vec<String>, String> {
    let homes: BTreeMap<_, _> = homes.iter().map(|(rank, id)| (*rank, worker_name(id))).collect();
    place(spec, &homes, candidates)
        .map(|workers| workers.iter().map(|worker| worker.id().to_owned()).collect())
}

#[test]
fn the_ranks_of_a_replica_go_to_one_worker_where_one_has_room() {
    let spec = spec(Collective::Gloo, 2, 2, 1);
    let candidates = [candidate("a", 1, 0), candidate("b", 3, 0), candidate("c", 2, 0)];
    assert_eq!(placed(&spec, &[], &candidates).unwrap(), ["b", "b", "c", "c"]);
    let candidates = [candidate("a", 1, 0), candidate("b", 1, 0), candidate("c", 2, 0)];
    assert_eq!(placed(&spec, &[], &candidates).unwrap(), ["c", "c", "a", "b"]);
}

#[test]
fn ranks_stay_at_home_and_a_lost_one_goes_where_its_replica_is() {
    let spec = spec(Collective::Gloo, 2, 1, 1);
    let candidates = [candidate("a", 2, 0), candidate("b", 9, 0)];
    assert_eq!(placed(&spec, &[(0, "a"), (1, "b")], &candidates).unwrap(), ["a", "b"]);
    assert_eq!(placed(&spec, &[(0, "a"), (1, "gone")], &candidates).unwrap(), ["a", "a"]);
}

#[test]
fn threads_of_one_process_take_one_slot_and_on_gpus_one_gpu_each() {
    let mut spec = spec(Collective::Local, 2, 2, 1);
    assert_eq!(placed(&spec, &[], &[candidate("a", 1, 0)]).unwrap(), ["a"; 4]);
    spec.device = Device::Cuda;
    let candidates = [candidate("a", 9, 3), candidate("b", 1, 4)];
    assert_eq!(placed(&spec, &[], &candidates).unwrap(), ["b"; 4]);
    let missing = placed(&spec, &[], &candidates[..1]).unwrap_err();
    assert!(missing.contains("4 GPUs on one worker"), "{missing}");
}

#[test]
fn a_rank_on_a_gpu_needs_a_slot_and_a_gpu() {
    let mut spec = spec(Collective::Nccl, 2, 1, 1);
    spec.device = Device::Cuda;
    assert!(placed(&spec, &[], &[candidate("a", 2, 1)]).is_err());
    assert_eq!(placed(&spec, &[], &[candidate("a", 2, 1), candidate("b", 1, 8)]).unwrap(), ["a", "b"]);
}

#[test]
fn a_worker_without_the_collective_gets_nothing_and_the_message_says_so() {
    let mut without = candidate("a", 9, 0);
    without.collectives = vec!["local".to_owned()];
    let missing = placed(&spec(Collective::Gloo, 1, 1, 1), &[], &[without]).unwrap_err();
    assert!(missing.contains("no worker that is online and not drained has that collective"), "{missing}");
}

#[test]
fn who_cannot_be_told_keeps_what_it_has_and_gets_nothing_new() {
    let mut away = candidate("a", 9, 0);
    away.connected = false;
    let (one, two) = (spec(Collective::Gloo, 1, 1, 1), spec(Collective::Gloo, 2, 1, 1));
    assert!(placed(&one, &[], std::slice::from_ref(&away)).is_err());
    assert_eq!(placed(&one, &[(0, "a")], std::slice::from_ref(&away)).unwrap(), ["a"]);
    let candidates = [away, candidate("b", 1, 0)];
    assert_eq!(placed(&two, &[(0, "a")], &candidates).unwrap(), ["a", "b"]);
}

#[test]
fn no_worker_gets_more_than_it_has_room_for() {
    for seed in 0..2000_u32 {
        let digit = |at: u32, n: u32| seed.wrapping_mul(2_654_435_761).rotate_left(at) % n;
        let spec = spec(Collective::Gloo, 1 + digit(3, 3), 1 + digit(7, 3), 1);
        let candidates =
            ["a", "b", "c"].map(|id| candidate(id, digit(11 + u32::from(id.as_bytes()[0]), 5), 0));
        let room: u32 = candidates.iter().map(|candidate| candidate.slots).sum();
        let result = placed(&spec, &[(0, "a"), (2, "b")], &candidates);
        assert_eq!(result.is_ok(), room >= spec.num_ranks(), "{spec:?} {candidates:?}");
        let Ok(workers) = result else { continue };
        for candidate in &candidates {
            let used = workers.iter().filter(|worker| *worker == candidate.worker.id()).count();
            assert!(used <= candidate.slots as usize);
        }
    }
}
