//! The cluster in one thread, in virtual time: the coordinator's core and the agents' cores as they are, between a network, disks,
//! clocks and engines that are made up, and go wrong as a seed wants it. The same seed tells the same story to the last event.
//!
//! `INCIPIT_SEED=17 cargo test --test simulation one` tells one story, and prints it if something did not hold.

mod simulation {
    pub(crate) mod agent;
    pub(crate) mod chance;
    pub(crate) mod client;
    pub(crate) mod coordinator;
    pub(crate) mod engine;
    pub(crate) mod faults;
    pub(crate) mod leader;
    pub(crate) mod link;
    pub(crate) mod oracle;
    pub(crate) mod verdict;
    pub(crate) mod world;
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use simulation::world::{Told, World};

/// Tells the story of a seed; with `print`, event by event.
fn tell(seed: u64, print: bool) -> Result<Told, String> {
    let told = catch_unwind(AssertUnwindSafe(|| World::new(seed, print).tell()));
    told.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Err(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned())
    })
}

/// Tells the stories of these seeds, and says which did not end well.
fn tell_all(seeds: std::ops::Range<u64>) {
    let start = Instant::now();
    let (mut failures, mut sum) = (Vec::new(), Told::default());
    let count = seeds.end - seeds.start;
    for seed in seeds.clone() {
        match tell(seed, false) {
            Ok(told) => sum.add(&told),
            Err(what) => {
                println!("seed {seed}: {what}");
                failures.push(seed);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("seeds {seeds:?}: {:.1} stories a second; in all {sum:?}", count as f64 / seconds);
    assert!(failures.is_empty(), "INCIPIT_SEED=N tells one of them: {failures:?}");
    let exercised = [sum.faults, sum.losses_noticed, sum.checkpoints, sum.steps];
    assert!(exercised.iter().all(|count| *count > 0), "nothing was put to the test: {sum:?}");
}

#[test]
fn one_story_of_a_cluster() {
    let Some(seed) = std::env::var("INCIPIT_SEED").ok().and_then(|seed| seed.parse().ok()) else { return };
    match tell(seed, true) {
        Ok(told) => println!("seed {seed}: {told:?}"),
        Err(what) => panic!("seed {seed}: {what}"),
    }
}

#[test]
fn clusters_keep_their_promises_whatever_goes_wrong() {
    tell_all(0..300);
}

#[test]
#[ignore = "long: thousands of stories"]
fn many_clusters_keep_their_promises_whatever_goes_wrong() {
    tell_all(300..10300);
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in (0..300).step_by(15) {
        let (one, other) = (tell(seed, false).unwrap(), tell(seed, false).unwrap());
        assert_eq!(one, other, "seed {seed}");
    }
    assert_ne!(tell(0, false).unwrap().trace, tell(1, false).unwrap().trace);
}
