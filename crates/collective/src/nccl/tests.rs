//! The protocol over a fake of NCCL: all that can be tested without a GPU.

mod distant;
#[path = "../../tests/suite/mod.rs"]
mod suite;
mod sums;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use super::fake::{FakeLane, Fakes, Net};
use super::line::SLOTS;
use super::*;
use crate::store::{TcpServer, TcpStore};
use crate::{Collective, Mismatch, Reduce};
use suite::{CHECKS, at_once};

/// What counts as at once on a busy machine.
const SOON: Duration = Duration::from_secs(20);

fn client(server: &TcpServer) -> Arc<dyn Store> {
    Arc::new(TcpStore::new(&server.address().to_string()).unwrap())
}

fn meeting<'a>(mesh: Mesh, rank: usize, server: &TcpServer, options: &'a Options) -> Meeting<'a> {
    let until = Until::after(options.connect_deadline);
    Meeting { mesh, rank, options, store: client(server), until }
}

#[test]
fn every_check_holds_over_the_fake() {
    for check in CHECKS {
        for (tp, dp) in check.meshes {
            println!("{} on {tp} x {dp}", check.name);
            let mesh = Mesh::new(*tp, *dp, tp * dp).unwrap();
            let (server, net) = (TcpServer::new("127.0.0.1:0").unwrap(), Arc::new(Net::default()));
            let options = suite::options(check);
            let seen = at_once((0..mesh.world()).collect(), |rank| {
                let fakes = Fakes { net: net.clone(), rank };
                (check.body)(connect_over(&fakes, &meeting(mesh, rank, &server, &options)).unwrap())
            });
            assert_eq!(seen, suite::locally(check, mesh), "{}", check.name);
        }
    }
}

/// One rank of a data group over the fake, with tensors that stand for those of a GPU.
type One = Arc<Group<FakeLane>>;

/// Where ranks wait for each other, once. Unlike at a barrier, nobody waits for ever for one that has failed.
struct Gathering {
    size: usize,
    here: AtomicUsize,
}

impl Gathering {
    fn of(size: usize) -> Self {
        Self { size, here: AtomicUsize::new(0) }
    }

    fn wait(&self) {
        let start = Instant::now();
        self.here.fetch_add(1, Ordering::SeqCst);
        while self.here.load(Ordering::SeqCst) < self.size {
            assert!(start.elapsed() < LONG, "another rank has not come");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Runs `body` for every rank of a group at once, when all have joined it.
fn each<R: Send>(size: usize, deadline: Duration, net: &Arc<Net>, body: impl Fn(One) -> R + Sync) -> Vec<R> {
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let mesh = Mesh::new(1, size, size).unwrap();
    let options = Options { deadline, ..Options::default() };
    let joined = Gathering::of(size);
    at_once((0..size).collect(), |rank| {
        let meeting = meeting(mesh, rank, &server, &options);
        meeting.call_the_roll().unwrap();
        let notes = Arc::new(Notes::new(meeting.store.clone(), "epoch/0", rank, size));
        let watchdog = Arc::new(Watchdog::start(notes.clone()).unwrap());
        let place = Place { meeting: &meeting, notes, watchdog };
        let fakes = Fakes { net: net.clone(), rank };
        let group = place.join(&fakes, 1, "data", &(0..size).collect::<Vec<_>>()).unwrap();
        place.watchdog.add(group.watched());
        group.line().lane().stands.store(true, Ordering::SeqCst);
        drop(place);
        joined.wait();
        let result = body(group.clone());
        group.leave();
        result
    })
}

const LONG: Duration = Duration::from_secs(60);

/// As a thread that reads a tensor of a GPU waits for all that comes before: also what was aborted is over then.
fn synchronize(group: &One) {
    let start = Instant::now();
    while group.line().pending() > 0 && !group.line().is_closed() {
        assert!(start.elapsed() < LONG);
        thread::sleep(Duration::from_millis(1));
    }
}

fn full(value: f32, n: usize) -> Tensor {
    Tensor::full(value, n, &Device::Cpu).unwrap()
}

#[test]
fn tensors_of_the_device_are_summed_gathered_and_sent() {
    each(3, LONG, &Arc::default(), |group| {
        let rank = group.rank();
        for n in [1usize, 7, 100_000] {
            let floats = full(0.25 + rank as f32, n);
            let float_sum = group.all_reduce(&floats, Reduce::Sum).unwrap();
            let halves = group.all_reduce(&floats.to_dtype(DType::BF16).unwrap(), Reduce::Sum).unwrap();
            let columns = Tensor::full(rank as u8, (2, n), &Device::Cpu).unwrap().t().unwrap();
            let gathered = group.all_gather(&columns).unwrap();
            let sent = group.broadcast(&floats, 2).unwrap();
            synchronize(&group);
            assert_eq!(float_sum.to_vec1::<f32>().unwrap(), vec![3.75; n]);
            assert_eq!((halves.dtype(), halves.dims()), (DType::BF16, &[n][..]));
            assert_eq!(gathered.dims(), [3 * n, 2]);
            let by_rank: Vec<u8> = (0..3).flat_map(|rank| vec![rank; 2 * n]).collect();
            assert_eq!(gathered.flatten_all().unwrap().to_vec1::<u8>().unwrap(), by_rank);
            assert_eq!(sent.to_vec1::<f32>().unwrap(), vec![2.25; n]);
        }
        group.barrier().unwrap();
    });
}

#[test]
fn sums_of_integers_on_the_device_are_exact_and_wrap_around() {
    each(3, LONG, &Arc::default(), |group| {
        let numbers = |rank: usize| (0..5000).map(move |i| suite::random(rank as u64, i) as i64);
        let x = Tensor::from_iter(numbers(group.rank()), &Device::Cpu).unwrap();
        let sum = group.all_reduce(&x, Reduce::Sum).unwrap();
        synchronize(&group);
        let expected: Vec<_> = numbers(0)
            .zip(numbers(1))
            .zip(numbers(2))
            .map(|((a, b), c)| a.wrapping_add(b).wrapping_add(c))
            .collect();
        assert_eq!(sum.to_vec1::<i64>().unwrap(), expected);
    });
}

#[test]
fn a_maximum_on_the_device_is_nan_where_one_is() {
    each(3, LONG, &Arc::default(), |group| {
        for dtype in [DType::F32, DType::BF16] {
            let mut numbers = vec![group.rank() as f32, f32::NEG_INFINITY, -3.0, f32::NAN];
            numbers[2] = if group.rank() == 1 { f32::NAN } else { f32::INFINITY };
            let x = Tensor::from_vec(numbers, (2, 2), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let max = group.all_reduce(&x, Reduce::Max).unwrap();
            assert_eq!((max.dims(), max.dtype()), (&[2, 2][..], dtype));
            let max = max.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(max[..2], [2.0, f32::NEG_INFINITY]);
            assert!(max[2].is_nan() && max[3].is_nan(), "{max:?}");
        }
        let x = Tensor::new(&[-(group.rank() as i64), i64::MIN], &Device::Cpu).unwrap();
        let max = group.all_reduce(&x, Reduce::Max).unwrap();
        assert_eq!(max.to_vec1::<i64>().unwrap(), [0, i64::MIN]);
    });
}

#[test]
fn empty_tensors_of_the_device_are_agreed_upon_and_come_back() {
    each(2, LONG, &Arc::default(), |group| {
        let x = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(group.all_reduce(&x, Reduce::Max).unwrap().dims(), [0, 3]);
        assert_eq!(group.all_gather(&x).unwrap().dims(), [0, 3]);
        group.barrier().unwrap();
    });
}

/// All ranks see the same disagreement, after the fact, whatever they do next.
fn disagreement(expected: Mismatch, words: &str, act: impl Fn(&One) -> Result<()> + Sync) {
    for next in [0, 1, 2] {
        let seen = each(3, LONG, &Arc::default(), |group| {
            group.barrier().unwrap();
            let first = act(&group);
            let error = match next {
                // The next operation in main memory, on the device, or none: then the watchdog finds it.
                0 => first.and_then(|()| group.barrier()).unwrap_err(),
                1 => first.map_or_else(
                    |e| e,
                    |()| {
                        let mut last = Ok(());
                        while last.is_ok() {
                            last = group.all_reduce(&full(1.0, 3), Reduce::Sum).map(drop);
                        }
                        last.unwrap_err()
                    },
                ),
                _ => {
                    synchronize(&group);
                    group.barrier().unwrap_err()
                }
            };
            assert!(matches!(&error, Error::Mismatch { kind, .. } if *kind == expected), "{error}");
            assert!(error.to_string().contains("operation 2 of the data group"), "{error}");
            assert_eq!(group.barrier().unwrap_err().to_string(), error.to_string());
            error.to_string()
        });
        assert!(seen.iter().all(|error| *error == seen[0] && error.contains(words)), "{seen:?}");
    }
}

#[test]
fn shapes_that_differ_on_the_device_are_found_on_every_rank() {
    let words = "rank 0 calls all-reduce (sum) of f32 [3000] and rank 2 all-reduce (sum) of f32 [2000]";
    disagreement(Mismatch::Shape, words, |group| {
        let n = if group.rank() == 2 { 2000 } else { 3000 };
        group.all_reduce(&full(1.0, n), Reduce::Sum).map(drop)
    });
}

#[test]
fn operations_that_differ_on_the_device_are_found_on_every_rank() {
    disagreement(Mismatch::Order, "rank 1 broadcast as its operation 2", |group| match group.rank() {
        1 => group.broadcast(&full(1.0, 10), 0).map(drop),
        _ => group.all_gather(&full(1.0, 10)).map(drop),
    });
}

#[test]
fn a_tensor_in_main_memory_beside_tensors_on_devices_is_found_on_every_rank() {
    let words = "rank 0 gives a tensor on its GPU and rank 1 one in main memory";
    disagreement(Mismatch::Device, words, |group| {
        group.line().lane().stands.store(group.rank() != 1, Ordering::SeqCst);
        group.all_reduce(&full(1.0, 2000), Reduce::Sum).map(drop)
    });
}

#[test]
fn a_refusal_on_the_device_reaches_the_others() {
    each(2, LONG, &Arc::default(), |group| {
        let dtype = if group.rank() == 1 { DType::F64 } else { DType::F32 };
        let first = group.all_reduce(&full(1.0, 5).to_dtype(dtype).unwrap(), Reduce::Sum).map(drop);
        let error = first.and_then(|()| group.barrier()).unwrap_err();
        assert!(error.to_string().contains("the tensor is of f64"), "{error}");
        assert_eq!(error.is_echo(), group.rank() != 1, "{error}");
    });
}

#[test]
fn a_rank_that_does_not_come_to_an_operation_on_the_device_is_named_at_the_deadline() {
    let deadline = Duration::from_millis(1500);
    let done = Gathering::of(3);
    each(3, deadline, &Arc::default(), |group| {
        if group.rank() == 1 {
            done.wait();
            return;
        }
        let start = Instant::now();
        // Integers: after an exchange of floats the fake waits, in place of its queue.
        group.all_reduce(&Tensor::ones(5, DType::I64, &Device::Cpu).unwrap(), Reduce::Sum).unwrap();
        assert!(start.elapsed() < deadline, "the host does not wait");
        synchronize(&group);
        assert!(start.elapsed() < deadline + SOON, "{:?}", start.elapsed());
        let error = group.barrier().unwrap_err();
        assert!(error.is_echo() && error.to_string().contains("rank 1 did not come within 1.5 s"), "{error}");
        done.wait();
    });
}

#[test]
fn a_rank_waits_for_others_only_once_its_own_device_has_come_to_the_operation() {
    let (late, seen) = (Gathering::of(2), Gathering::of(2));
    let until = |group: &One, waits: bool| {
        let start = Instant::now();
        while group.waits() != waits {
            assert!(start.elapsed() < SOON, "it is not seen that it waits: {waits}");
            thread::sleep(Duration::from_millis(1));
        }
    };
    each(2, LONG, &Arc::default(), |group| {
        assert!(!group.waits());
        if group.rank() == 1 {
            late.wait();
            group.all_reduce(&full(1.0, 3), Reduce::Sum).unwrap();
            group.all_reduce(&full(1.0, 3), Reduce::Sum).unwrap();
            seen.wait();
        } else {
            group.all_reduce(&full(1.0, 3), Reduce::Sum).unwrap();
            until(&group, true);
            late.wait();
            synchronize(&group);
            group.line().lane().behind.store(true, Ordering::SeqCst);
            group.all_reduce(&full(1.0, 3), Reduce::Sum).unwrap();
            until(&group, false);
            seen.wait();
            // All know what it does, and its device does not do it. What the watchdog saw before may be told for a while.
            let (start, mut waited) = (Instant::now(), Instant::now());
            while waited.elapsed() < Duration::from_millis(200) {
                assert!(start.elapsed() < SOON);
                if group.waits() {
                    waited = Instant::now();
                }
                thread::sleep(Duration::from_millis(1));
            }
            group.line().lane().behind.store(false, Ordering::SeqCst);
        }
        group.barrier().unwrap();
        until(&group, false);
    });
}

#[test]
fn an_abort_from_aside_ends_operations_on_the_device_on_every_rank() {
    let done = Gathering::of(2);
    each(2, LONG, &Arc::default(), |group| {
        let start = Instant::now();
        group.all_reduce(&full(1.0, 5), Reduce::Sum).unwrap();
        if group.rank() == 1 {
            // Rank 0 waits for an operation that rank 1 never makes.
            thread::sleep(Duration::from_millis(100));
            thread::scope(|scope| {
                scope.spawn(|| group.abort("asked to stop"));
            });
        } else {
            group.all_reduce(&full(1.0, 5), Reduce::Sum).unwrap();
            synchronize(&group);
        }
        let error = group.barrier().unwrap_err();
        assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
        assert!(
            matches!(&error, Error::Aborted { rank: Some(1), reason } if reason == "asked to stop"),
            "{error}"
        );
        assert!(group.line().has_ended(SOON));
        done.wait();
    });
}

#[test]
fn an_abort_that_hangs_does_not_hang_its_caller_nor_what_comes_after() {
    let net = Arc::new(Net::default());
    net.abort_hangs.store(true, Ordering::SeqCst);
    let done = Gathering::of(2);
    each(2, LONG, &net, |group| {
        if group.rank() == 0 {
            group.all_reduce(&full(1.0, 5), Reduce::Sum).unwrap();
            let start = Instant::now();
            group.abort("enough");
            let error = group.all_reduce(&full(1.0, 5), Reduce::Sum).unwrap_err();
            assert!(matches!(error, Error::Aborted { rank: Some(0), .. }), "{error}");
            assert!(group.barrier().is_err());
            group.leave();
            assert!(!group.line().has_ended(Duration::ZERO), "it hangs");
            drop(group);
            assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        }
        done.wait();
    });
    net.abort_hangs.store(false, Ordering::SeqCst);
}

#[test]
fn more_operations_than_can_be_unfinished_wait_for_the_first() {
    let (full_ring, more) = (Gathering::of(2), 10);
    each(2, LONG, &Arc::default(), |group| {
        let x = |i: usize| full((i + group.rank()) as f32, 3);
        let mut sums: Vec<_> = Vec::new();
        if group.rank() == 1 {
            full_ring.wait();
        }
        for i in 0..SLOTS + more {
            if group.rank() == 0 && i == SLOTS {
                assert_eq!(group.line().pending(), SLOTS);
                full_ring.wait();
            }
            sums.push(group.all_reduce(&x(i), Reduce::Sum).unwrap());
            assert!(group.line().pending() <= SLOTS);
        }
        group.barrier().unwrap();
        synchronize(&group);
        for (i, sum) in sums.iter().enumerate() {
            assert_eq!(sum.to_vec1::<f32>().unwrap(), vec![(2 * i + 1) as f32; 3]);
        }
    });
}

#[test]
fn a_full_ring_ends_at_the_deadline() {
    let done = Gathering::of(2);
    each(2, Duration::from_millis(1500), &Arc::default(), |group| {
        if group.rank() == 0 {
            let start = Instant::now();
            let error = loop {
                if let Err(error) = group.all_reduce(&full(1.0, 3), Reduce::Sum) {
                    break error;
                }
            };
            assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
            assert!(error.to_string().contains("rank 1 did not come"), "{error}");
        }
        done.wait();
    });
}

#[test]
fn a_rank_that_leaves_after_its_last_operation_on_the_device_takes_nothing_away() {
    each(2, LONG, &Arc::default(), |group| {
        if group.rank() == 0 {
            thread::sleep(Duration::from_millis(600));
        }
        let sum = group.all_reduce(&full(1.5, 3), Reduce::Sum).unwrap();
        if group.rank() == 0 {
            synchronize(&group);
            assert_eq!(sum.to_vec1::<f32>().unwrap(), [3.0; 3]);
            let error = group.barrier().unwrap_err();
            assert!(error.to_string().contains("rank 1 is lost: it has left the group"), "{error}");
        }
    });
}

#[test]
fn a_process_that_dies_is_an_error_of_the_others() {
    let done = Gathering::of(2);
    each(2, LONG, &Arc::default(), |group| {
        if group.rank() == 1 {
            group.line().lane().die();
        } else {
            let start = Instant::now();
            let first = group.all_reduce(&full(1.0, 3), Reduce::Sum).map(drop);
            let error = first.and_then(|()| group.barrier()).unwrap_err();
            assert!(start.elapsed() < notes::SILENCE + SOON, "{:?}", start.elapsed());
            assert!(
                matches!(&error, Error::Lost { what, .. } if what.contains("connection reset")),
                "{error}"
            );
        }
        done.wait();
    });
}

#[test]
fn ranks_that_do_not_connect_are_given_up_at_the_deadline() {
    let (server, net) = (TcpServer::new("127.0.0.1:0").unwrap(), Arc::new(Net::default()));
    net.lost.lock().unwrap().push(1);
    let mesh = Mesh::new(2, 1, 2).unwrap();
    let options = Options { connect_deadline: Duration::from_millis(800), ..Options::default() };
    let start = Instant::now();
    for error in at_once(vec![0, 1], |rank| {
        let fakes = Fakes { net: net.clone(), rank };
        connect_over(&fakes, &meeting(mesh, rank, &server, &options)).unwrap_err()
    }) {
        assert!(matches!(error, Error::Absent { .. }), "{error}");
    }
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

#[test]
fn versions_are_read_from_their_codes() {
    for (code, text) in [(2708, "2.7.8"), (21_805, "2.18.5"), (23_007, "2.30.7")] {
        assert_eq!(Version::from_code(code).to_string(), text);
    }
    assert!(Version::from_code(21_703) < OLDEST && Version::from_code(21_800) >= OLDEST);
    for (code, has_fault) in
        [(22_802, false), (22_803, true), (22_808, true), (22_809, false), (23_005, false)]
    {
        assert_eq!(Version::from_code(code).fault().is_some(), has_fault, "{code}");
    }
}
