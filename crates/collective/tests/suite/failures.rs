//! What goes wrong: always the right error on every rank, in time.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use incipit_collective::{Error, Mismatch, Ranks, Reduce};

use super::{SOON, is_process, vanish};

fn ones(n: usize) -> Tensor {
    Tensor::ones(n, DType::F32, &Device::Cpu).unwrap()
}

/// All ranks see this disagreement, and see it again whatever they call next.
fn disagreement(ranks: &Ranks, result: Result<(), Error>, expected: Mismatch) -> String {
    let error = result.unwrap_err();
    assert!(matches!(&error, Error::Mismatch { kind, .. } if *kind == expected), "{error}");
    assert!(!error.is_echo());
    let again = ranks.world().barrier().unwrap_err();
    assert_eq!(error.to_string(), again.to_string());
    error.to_string()
}

pub(crate) fn wrong_order(ranks: Ranks) -> String {
    ranks.world().barrier().unwrap();
    let result = match ranks.rank() {
        1 => ranks.world().barrier(),
        _ => ranks.world().all_reduce(&ones(3000), Reduce::Sum).map(drop),
    };
    let error = disagreement(&ranks, result, Mismatch::Order);
    assert!(error.contains("all-reduce (sum)") && error.contains("rank 1 barrier"), "{error}");
    error
}

pub(crate) fn wrong_reduction(ranks: Ranks) -> String {
    let reduce = if ranks.rank() == 1 { Reduce::Max } else { Reduce::Sum };
    let result = ranks.world().all_reduce(&ones(10), reduce).map(drop);
    disagreement(&ranks, result, Mismatch::Order)
}

pub(crate) fn wrong_shape(ranks: Ranks) -> String {
    let n = if ranks.rank() == 1 { 2999 } else { 3000 };
    let result = ranks.world().all_reduce(&ones(n), Reduce::Sum).map(drop);
    let error = disagreement(&ranks, result, Mismatch::Shape);
    assert!(error.contains("[3000]") && error.contains("[2999]"), "{error}");
    error
}

pub(crate) fn wrong_dtype(ranks: Ranks) -> String {
    let dtype = if ranks.rank() == 1 { DType::BF16 } else { DType::F32 };
    let result = ranks.world().all_gather(&ones(5).to_dtype(dtype).unwrap()).map(drop);
    disagreement(&ranks, result, Mismatch::DType)
}

pub(crate) fn wrong_root(ranks: Ranks) -> String {
    let root = usize::from(ranks.rank() == 1);
    let result = ranks.world().broadcast(&ones(5), root).map(drop);
    disagreement(&ranks, result, Mismatch::Root)
}

/// What no group can take is refused where it is given, and the others hear of it.
pub(crate) fn refusal(ranks: Ranks) -> String {
    let dtype = if ranks.rank() == 1 { DType::F64 } else { DType::F32 };
    let error = ranks.world().all_reduce(&ones(5).to_dtype(dtype).unwrap(), Reduce::Sum).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("the tensor is of f64; convert it to one of f32, bf16, i64"), "{message}");
    assert_eq!(error.is_echo(), ranks.rank() != 1, "{message}");
    assert_eq!(matches!(error, Error::Refused { .. }), ranks.rank() == 1, "{message}");
    String::new()
}

pub(crate) fn dead_peer(ranks: Ranks) -> String {
    ranks.world().barrier().unwrap();
    if ranks.rank() == 1 {
        if is_process() {
            vanish();
        }
        drop(ranks);
        return String::new();
    }
    let start = Instant::now();
    let error = ranks.world().all_reduce(&ones(100_000), Reduce::Sum).unwrap_err();
    assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
    assert!(error.is_echo(), "{error}");
    assert!(error.to_string().contains("rank 1 is lost"), "{error}");
    assert_eq!(ranks.world().barrier().unwrap_err().to_string(), error.to_string());
    String::new()
}

/// A rank that goes while numbers are on their way.
pub(crate) fn death_in_between(ranks: Ranks) -> String {
    let x = ones(1_000_000);
    if ranks.rank() == 1 {
        if is_process() {
            std::thread::spawn(|| {
                std::thread::sleep(Duration::from_millis(30));
                vanish();
            });
        }
        for _ in 0..if is_process() { usize::MAX } else { 5 } {
            ranks.world().all_reduce(&x, Reduce::Sum).unwrap();
        }
        return String::new();
    }
    let start = Instant::now();
    let error = loop {
        if let Err(error) = ranks.world().all_reduce(&x, Reduce::Sum) {
            break error;
        }
    };
    assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
    assert!(error.is_echo(), "{error}");
    String::new()
}

/// A rank that leaves after its last call takes nothing away from the others.
pub(crate) fn last_call(ranks: Ranks) -> String {
    let sum = ranks.world().all_reduce(&ones(1_000_000), Reduce::Sum).unwrap();
    if ranks.rank() == 1 {
        drop(ranks);
    }
    sum.sum_all().unwrap().to_scalar::<f32>().unwrap().to_string()
}

pub(crate) fn abort(ranks: Ranks) -> String {
    let start = Instant::now();
    let error = if ranks.rank() == 1 {
        std::thread::sleep(Duration::from_millis(100));
        ranks.abort("the learning rate is a poem");
        ranks.world().barrier().unwrap_err()
    } else {
        ranks.world().all_reduce(&ones(100_000), Reduce::Sum).unwrap_err()
    };
    assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
    assert!(matches!(error, Error::Aborted { rank: Some(1), .. }), "{error}");
    assert_eq!(ranks.world().barrier().unwrap_err().to_string(), error.to_string());
    error.to_string()
}

/// The rank that aborts is another than the one that is waited for first, and that one comes late.
pub(crate) fn abort_elsewhere(ranks: Ranks) -> String {
    let start = Instant::now();
    match ranks.rank() {
        1 => std::thread::sleep(Duration::from_millis(4000)),
        2 => {
            std::thread::sleep(Duration::from_millis(100));
            ranks.abort("out of patience");
        }
        _ => {}
    }
    let error = ranks.world().barrier().unwrap_err();
    assert!(
        ranks.rank() == 1 || start.elapsed() < Duration::from_millis(3500),
        "after {:?}",
        start.elapsed()
    );
    assert!(matches!(error, Error::Aborted { rank: Some(2), .. }), "{error}");
    error.to_string()
}

/// Ranks that share no group with the one that aborts learn why, too.
pub(crate) fn abort_across_groups(ranks: Ranks) -> String {
    let start = Instant::now();
    let error = match ranks.rank() {
        0 => {
            std::thread::sleep(Duration::from_millis(100));
            ranks.abort("no such file");
            ranks.world().barrier().unwrap_err()
        }
        1 => ranks.world().barrier().unwrap_err(),
        2 => {
            let error = ranks.data().barrier().unwrap_err();
            ranks.abort(&error.to_string());
            error
        }
        _ => ranks.tensor().barrier().unwrap_err(),
    };
    assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
    assert!(error.is_echo() && error.to_string().contains("no such file"), "{error}");
    String::new()
}

/// A thread ends the wait of another thread of its own rank.
pub(crate) fn abort_from_aside(ranks: Ranks) -> String {
    let start = Instant::now();
    let error = std::thread::scope(|scope| {
        if ranks.rank() == 0 {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                ranks.abort("asked to stop");
            });
        } else {
            // Nobody but rank 0 comes before it has given up.
            std::thread::sleep(Duration::from_millis(300));
        }
        ranks.world().barrier().unwrap_err()
    });
    assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
    assert!(matches!(error, Error::Aborted { rank: Some(0), .. }), "{error}");
    error.to_string()
}

pub(crate) fn late_rank(ranks: Ranks) -> String {
    ranks.world().barrier().unwrap();
    if ranks.rank() == 1 {
        std::thread::sleep(Duration::from_millis(3500));
        let error = ranks.world().barrier().unwrap_err();
        assert!(error.is_echo(), "{error}");
        assert!(error.to_string().contains("rank 1 did not come within 2 s"), "{error}");
        return String::new();
    }
    let (start, before) = (Instant::now(), ranks.seconds());
    let error = ranks.world().barrier().unwrap_err();
    assert!(start.elapsed() < SOON, "{error} after {:?}", start.elapsed());
    assert!(ranks.seconds() - before > 0.1, "{} s of waiting were counted", ranks.seconds() - before);
    assert!(error.is_echo(), "{error}");
    assert!(error.to_string().contains("rank 1 did not come within 2 s"), "{error}");
    String::new()
}
