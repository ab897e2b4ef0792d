//! Ranks that are threads of one process.

mod suite;

use incipit_collective::{Mesh, Options, Ranks, local};
use suite::CHECKS;

#[test]
fn every_check_holds_between_threads() {
    for check in CHECKS {
        for (tp, dp) in check.meshes {
            println!("{} on {tp} x {dp}", check.name);
            let seen = suite::locally(check, Mesh::new(*tp, *dp, tp * dp).unwrap());
            assert!(seen.iter().all(|s| *s == seen[0]), "{}: {seen:?}", check.name);
        }
    }
}

#[test]
fn a_thread_that_panics_is_lost_to_the_others() {
    let mesh = Mesh::new(1, 2, 2).unwrap();
    let mut ranks = local::ranks(mesh, &suite::options(&CHECKS[0]));
    let other = ranks.pop().unwrap();
    let thread = std::thread::spawn(move || {
        let _ranks: Ranks = other;
        std::panic::resume_unwind(Box::new("a mistake"));
    });
    let error = ranks[0].world().barrier().unwrap_err();
    assert!(error.is_echo() && error.to_string().contains("rank 1 is lost"), "{error}");
    assert!(thread.join().is_err());
}

#[test]
fn a_rank_alone_refuses_what_a_group_would() {
    let alone = Ranks::alone();
    let x = candle_core::Tensor::new(&[1u32], &candle_core::Device::Cpu).unwrap();
    let error = alone.world().all_gather(&x).unwrap_err().to_string();
    assert!(error.contains("the tensor is of u32"), "{error}");
    alone.abort("enough");
    assert!(alone.world().barrier().unwrap_err().is_echo());
}

#[test]
fn threads_of_a_process_are_numbered_on_their_machine_from_its_own_number_on() {
    let numbers = |local_rank| {
        let options = Options { local_rank, ..Options::default() };
        let ranks = local::ranks(Mesh::new(2, 1, 2).unwrap(), &options);
        ranks.iter().map(Ranks::local_rank).collect::<Vec<_>>()
    };
    assert_eq!((numbers(None), numbers(Some(3))), (vec![0, 1], vec![3, 4]));
}
