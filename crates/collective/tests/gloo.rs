//! Ranks that are connected by Gloo: here threads, each with connections of its own.
#![cfg(feature = "gloo")]
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod suite;

use std::sync::Arc;
use std::time::{Duration, Instant};

use incipit_collective::store::{FileStore, Store, TcpServer, TcpStore};
use incipit_collective::{Error, Mesh, Mismatch, Options, gloo};
use suite::CHECKS;

/// Runs `body` for every rank at once.
fn each<R: Send>(world: usize, body: impl Fn(usize) -> R + Sync) -> Vec<R> {
    suite::at_once((0..world).collect(), body)
}

fn client(server: &TcpServer) -> Arc<dyn Store> {
    Arc::new(TcpStore::new(&server.address().to_string()).unwrap())
}

#[test]
fn every_check_holds_between_threads_with_connections() {
    for check in CHECKS {
        for (tp, dp) in check.meshes {
            println!("{} on {tp} x {dp}", check.name);
            let mesh = Mesh::new(*tp, *dp, tp * dp).unwrap();
            let server = TcpServer::new("127.0.0.1:0").unwrap();
            let seen = each(mesh.world(), |rank| {
                (check.body)(gloo::connect(mesh, rank, client(&server), &suite::options(check)).unwrap())
            });
            assert_eq!(seen, suite::locally(check, mesh), "{}", check.name);
        }
    }
}

fn brief() -> Options {
    Options { connect_deadline: Duration::from_millis(800), ..Options::default() }
}

#[test]
fn a_rank_that_does_not_appear_is_named() {
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let mesh = Mesh::new(1, 3, 3).unwrap();
    let start = Instant::now();
    let errors = each(2, |rank| gloo::connect(mesh, rank, client(&server), &brief()).unwrap_err());
    assert!(start.elapsed() < Duration::from_secs(20));
    for error in errors {
        assert!(matches!(&error, Error::Absent { missing, .. } if *missing == [2]), "{error}");
        assert!(error.is_echo());
    }
}

fn kinds(world: usize, connect: impl Fn(usize) -> Error + Sync) -> Vec<Mismatch> {
    each(world, |rank| match connect(rank) {
        Error::Mismatch { kind, what, .. } => {
            println!("{what}");
            kind
        }
        other => panic!("{other}"),
    })
}

#[test]
fn ranks_of_different_epochs_refuse_each_other() {
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let mesh = Mesh::new(1, 2, 2).unwrap();
    let seen = kinds(2, |rank| {
        let options = Options { epoch: 4 + rank as u64, ..brief() };
        gloo::connect(mesh, rank, client(&server), &options).unwrap_err()
    });
    assert_eq!(seen, [Mismatch::Epoch; 2]);
}

#[test]
fn ranks_of_different_jobs_or_meshes_refuse_each_other() {
    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let mesh = Mesh::new(1, 2, 2).unwrap();
    let seen = kinds(2, |rank| {
        let options = Options { job: format!("job {rank}"), ..brief() };
        gloo::connect(mesh, rank, client(&server), &options).unwrap_err()
    });
    assert_eq!(seen, [Mismatch::Job; 2]);

    let server = TcpServer::new("127.0.0.1:0").unwrap();
    let seen = kinds(2, |rank| {
        let mesh = if rank == 0 { mesh } else { Mesh::new(2, 1, 2).unwrap() };
        gloo::connect(mesh, rank, client(&server), &brief()).unwrap_err()
    });
    assert_eq!(seen, [Mismatch::Mesh; 2]);
}

#[test]
fn a_store_is_used_once_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let store = || Arc::new(FileStore::new(folder.path()).unwrap());
    let mesh = Mesh::new(2, 1, 2).unwrap();
    let sums = |epoch| {
        each(2, |rank| {
            let options = Options { epoch, ..Options::default() };
            gloo::connect(mesh, rank, store(), &options).map(|ranks| ranks.world().barrier().unwrap())
        })
    };
    assert!(sums(7).iter().all(Result::is_ok));
    for again in sums(7) {
        let error = again.unwrap_err().to_string();
        assert!(error.contains("it is there already"), "{error}");
    }
    assert!(sums(8).iter().all(Result::is_ok), "a later epoch takes over");
}

#[test]
fn joining_and_leaving_many_times_loses_nothing() {
    let x = candle_core::Tensor::ones(50_000, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    for round in 0..30 {
        let server = TcpServer::new("127.0.0.1:0").unwrap();
        let mesh = Mesh::new(2, 2, 4).unwrap();
        each(4, |rank| {
            let ranks = gloo::connect(mesh, rank, client(&server), &Options::default()).unwrap();
            for group in [ranks.tensor(), ranks.data(), ranks.world()] {
                let sum = group.all_reduce(&x, incipit_collective::Reduce::Sum).unwrap();
                let total = sum.sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert_eq!(total, group.size() as f32 * 50_000.0, "in round {round}");
            }
        });
    }
}
