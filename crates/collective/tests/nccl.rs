//! Ranks that are processes, connected by NCCL: two or three that share one GPU. Where there is none, these tests say so and pass.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod suite;

use std::io::{BufRead as _, BufReader};
use std::panic::catch_unwind;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use incipit_collective::store::{TcpServer, open};
use incipit_collective::{Mesh, Options, Ranks, Reduce, nccl};
use suite::{CHECKS, MARK, RANK};

/// The GPU, unless there is none. Without a driver, some versions of the bindings panic.
fn gpu() -> Option<Device> {
    catch_unwind(|| Device::new_cuda(0)).ok()?.ok()
}

/// What each rank's process is told, so that some of them may share one GPU.
fn share_a_gpu(command: &mut Command, rank: usize) {
    let settings = [
        ("NCCL_IB_DISABLE", "1"),
        ("NCCL_SOCKET_IFNAME", "lo"),
        ("NCCL_MAX_CTAS", "4"),
        ("NCCL_NVLS_ENABLE", "0"),
        // Two ranks of one GPU run in turns: the fewer exchanges an operation takes, the better.
        ("NCCL_ALGO", "Ring"),
        ("NCCL_PROTO", "Simple"),
        // To standard output, which is shown where a test fails.
        ("NCCL_DEBUG", "WARN"),
    ];
    command.envs(settings);
    let can_share = nccl::Version { major: 2, minor: 30, patch: 0 };
    if nccl::version().unwrap() >= can_share {
        command.env("NCCL_MULTI_RANK_GPU_ENABLE", "1");
    } else {
        // To an older NCCL they look like ranks of different machines.
        command.env("NCCL_HOSTID", format!("rank-{rank}"));
    }
}

/// Runs this program's test `test` once for each rank of two, and returns what each printed.
fn two_processes(test: &str, words: &str) -> Vec<String> {
    processes(2, test, words)
}

/// As [`two_processes`], for as many ranks.
fn processes(count: usize, test: &str, words: &str) -> Vec<String> {
    suite::at_once((0..count).collect(), |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(RANK, format!("{rank} {words}"));
        share_a_gpu(&mut command, rank);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let (mut text, mut result) = (String::new(), None);
        for line in BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap) {
            result = line.strip_prefix(MARK).map(str::to_owned);
            if result.is_some() {
                break;
            }
            text += &format!("{line}\n");
        }
        end(&mut child);
        result.unwrap_or_else(|| panic!("rank {rank} of {words}: {text}"))
    })
}

/// Gives a rank that has told its result some time to end: NCCL may not let go of one whose peer was lost.
fn end(child: &mut Child) {
    for _ in 0..100 {
        if child.try_wait().unwrap().is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Whether the caller has to do its test: not without a GPU.
fn has_gpu() -> bool {
    let found = gpu().is_some();
    if !found {
        println!("skipped: there is no GPU");
    }
    found
}

fn join(rank: &str, (tp, dp): (&str, &str), store: &str, options: &Options) -> Ranks {
    let number = |word: &str| word.parse::<usize>().unwrap();
    let mesh = Mesh::new(number(tp), number(dp), 2).unwrap();
    nccl::connect(mesh, number(rank), open(store).unwrap(), &gpu().unwrap(), options).unwrap()
}

#[test]
fn every_check_holds_between_processes_that_share_a_gpu() {
    if let Ok(words) = std::env::var(RANK) {
        let [rank, check, tp, dp, store] = words.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{words}")
        };
        let check = &CHECKS[check.parse::<usize>().unwrap()];
        let ranks = join(rank, (tp, dp), store, &suite::options(check));
        println!("\n{MARK}{}", (check.body)(ranks));
        return;
    }
    if !has_gpu() {
        return;
    }
    for (c, check) in CHECKS.iter().enumerate() {
        for (tp, dp) in check.meshes.iter().filter(|(tp, dp)| tp * dp == 2) {
            println!("{} on {tp} x {dp}", check.name);
            let server = TcpServer::new("127.0.0.1:0").unwrap();
            let words = format!("{c} {tp} {dp} tcp://{}", server.address());
            let seen = two_processes("every_check_holds_between_processes_that_share_a_gpu", &words);
            assert_eq!(seen, suite::locally(check, Mesh::new(*tp, *dp, 2).unwrap()), "{}", check.name);
        }
    }
}

/// A tensor of a device that the group was not connected with.
fn refused(ranks: &Ranks) -> String {
    let (gpu, group) = (gpu().unwrap(), ranks.world());
    // The device that the group was connected with is another one of candle's for the same GPU.
    let elsewhere = Tensor::ones(3, DType::F32, &gpu).unwrap();
    let error = group.all_reduce(&elsewhere, Reduce::Sum).unwrap_err().to_string();
    assert!(error.contains("this group works on") || error.contains("stopped the others"), "{error}");
    String::new()
}

/// What a rank of two does with tensors on the GPU that its group was connected with.
fn reductions_on_the_gpu(ranks: &Ranks, gpu: &Device) {
    let (group, rank) = (ranks.world(), ranks.rank());
    for n in [1usize, 1000, 1_000_000] {
        let numbers = |rank: usize| (0..n).map(move |i| suite::random(rank as u64, i) as i64);
        let x = Tensor::from_iter(numbers(rank), gpu).unwrap();
        let sum = group.all_reduce(&x, Reduce::Sum).unwrap();
        assert!(sum.device().is_cuda());
        let expected: Vec<_> = numbers(0).zip(numbers(1)).map(|(a, b)| a.wrapping_add(b)).collect();
        assert_eq!(sum.to_vec1::<i64>().unwrap(), expected);
        // Two terms have one sum, whatever the order.
        let x = Tensor::full(0.25 + rank as f32, n, gpu).unwrap();
        let sum = (group.all_reduce(&(&x * 2.0).unwrap(), Reduce::Sum).unwrap() + 1.0).unwrap();
        assert_eq!(sum.to_vec1::<f32>().unwrap(), vec![4.0; n]);
        let gathered = group.all_gather(&x).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(gathered, [vec![0.25; n], vec![1.25; n]].concat());
        assert_eq!(group.broadcast(&x, 1).unwrap().to_vec1::<f32>().unwrap(), vec![1.25; n]);
    }
    for dtype in [DType::F32, DType::BF16] {
        let x = if rank == 0 { [f32::NAN, 2.0] } else { [1.0, -2.0] };
        let x = Tensor::new(&x, gpu).unwrap().to_dtype(dtype).unwrap();
        let max = group.all_reduce(&x, Reduce::Max).unwrap().to_dtype(DType::F32).unwrap();
        let max = max.to_vec1::<f32>().unwrap();
        assert!(max[0].is_nan() && max[1] == 2.0, "{max:?}");
    }
    for _ in 0..300 {
        group.all_reduce(&Tensor::ones(100, DType::F32, gpu).unwrap(), Reduce::Sum).unwrap();
    }
    group.barrier().unwrap();
}

#[test]
fn tensors_on_a_gpu_are_reduced_there_and_disagreements_are_found() {
    if let Ok(words) = std::env::var(RANK) {
        let [rank, store] = words.split(' ').collect::<Vec<_>>()[..] else { panic!("{words}") };
        let mesh = Mesh::new(1, 2, 2).unwrap();
        let gpu = gpu().unwrap();
        let number = rank.parse().unwrap();
        let ranks = nccl::connect(mesh, number, open(store).unwrap(), &gpu, &Options::default()).unwrap();
        reductions_on_the_gpu(&ranks, &gpu);
        let x = Tensor::ones(1000 + number, DType::F32, &gpu).unwrap();
        let first = ranks.world().all_reduce(&x, Reduce::Sum).map(drop);
        let error = first.and_then(|()| ranks.world().barrier()).unwrap_err().to_string();
        assert!(error.contains("[1000]") && error.contains("[1001]"), "{error}");
        println!("\n{MARK}{error}");
        return;
    }
    if !has_gpu() {
        return;
    }
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let words = format!("tcp://{}", server.address());
    let seen = two_processes("tensors_on_a_gpu_are_reduced_there_and_disagreements_are_found", &words);
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn sums_of_three_ranks_on_a_gpu_have_the_bits_of_main_memory() {
    if let Ok(words) = std::env::var(RANK) {
        let [rank, store] = words.split(' ').collect::<Vec<_>>()[..] else { panic!("{words}") };
        let (mesh, gpu, rank) = (Mesh::new(3, 1, 3).unwrap(), gpu().unwrap(), rank.parse().unwrap());
        let ranks = nccl::connect(mesh, rank, open(store).unwrap(), &gpu, &Options::default()).unwrap();
        for (n, dtype) in [(7, DType::F32), (300_000, DType::F32), (1000, DType::BF16)] {
            let number = |i| suite::random(rank as u64, i) as f32 / 3e18 + 1e3 * (i % 3) as f32;
            let x = Tensor::from_iter((0..n).map(number), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let sum = |x: &Tensor| ranks.tensor().all_reduce(x, Reduce::Sum).unwrap();
            let sums = [sum(&x), sum(&x.to_device(&gpu).unwrap())];
            let [host, device] = sums.map(|sum| sum.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap());
            assert!(host.iter().zip(&device).all(|(a, b)| a.to_bits() == b.to_bits()), "{n} of {dtype:?}");
        }
        ranks.tensor().barrier().unwrap();
        println!("\n{MARK}");
        return;
    }
    if !has_gpu() {
        return;
    }
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let words = format!("tcp://{}", server.address());
    processes(3, "sums_of_three_ranks_on_a_gpu_have_the_bits_of_main_memory", &words);
}

#[test]
fn a_tensor_of_another_device_is_refused() {
    if let Ok(words) = std::env::var(RANK) {
        let [rank, store] = words.split(' ').collect::<Vec<_>>()[..] else { panic!("{words}") };
        let ranks = join(rank, ("1", "2"), store, &Options::default());
        println!("\n{MARK}{}", refused(&ranks));
        return;
    }
    if !has_gpu() {
        return;
    }
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let words = format!("tcp://{}", server.address());
    two_processes("a_tensor_of_another_device_is_refused", &words);
}

#[test]
fn main_memory_is_no_gpu() {
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let store = open(&format!("tcp://{}", server.address())).unwrap();
    let mesh = Mesh::new(1, 2, 2).unwrap();
    let error = nccl::connect(mesh, 0, store, &Device::Cpu, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("this rank has none"), "{error}");
    assert!(nccl::version().unwrap() >= nccl::OLDEST);
}
