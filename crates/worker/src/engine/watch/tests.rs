//! Which ranks are taken for hanging, and what is said of them.

use incipit_collective::Shard;
use incipit_tune::backbone::Opened;
use incipit_tune::device::DeviceChoice;
use incipit_tune::pace::Work;
use incipit_tune::spec::Precision;

use super::*;
use crate::engine::voice::pipe::Pipe;

const SECOND: Duration = Duration::from_secs(1);
const LEAST: Duration = Duration::from_secs(10);

fn pass(number: u64, work: Work, usual: Option<u32>) -> Pass {
    Pass { number, work, num_tokens: 100, usual: usual.map(|usual| usual * SECOND) }
}

/// After how many seconds there is another verdict, and which.
fn until(seen: &mut Seen, pass: &Pass, waits: bool) -> (u32, Verdict) {
    for second in 1..10_000 {
        match seen.judge(pass, waits, SECOND, LEAST) {
            Verdict::GetsOn => {}
            verdict => return (second, verdict),
        }
    }
    panic!("there is no end");
}

#[test]
fn a_rank_hangs_when_a_pass_takes_longer_than_eight_of_its_kind() {
    for (usual, limit) in [(Some(0), 10), (Some(1), 10), (Some(2), 16), (Some(60), 480), (None, 600)] {
        let pass = pass(0, Work::Gradients, usual);
        assert_eq!(until(&mut Seen::default(), &pass, false), (limit + 1, Verdict::Hangs), "{usual:?}");
    }
}

#[test]
fn a_rank_that_makes_no_pass_hangs_when_its_turn_has_not_ended_for_ten_minutes() {
    let pipe = Pipe::default();
    let farewell = Arc::new(Farewell::new(Voice::new(pipe.clone()), 7));
    let (ranks, pace, turns) = (Arc::new(Ranks::alone()), Arc::default(), Arc::<AtomicU64>::default());
    let watch = Watch::new(&ranks, (&pace, &turns), LEAST, &farewell);
    let look = |seconds| (0..seconds).for_each(|_| watch.look(SECOND));
    for _ in 0..3 {
        look(600);
        turns.fetch_add(1, Ordering::Relaxed);
    }
    assert_eq!(told(&pipe), (vec![], vec![]));
    look(601);
    assert_eq!(told(&pipe), (vec![], vec![7]));
}

#[test]
fn a_rank_that_waits_for_the_leaders_plan_does_not_hang() {
    let mut between = Between::default();
    assert!((0..10_000).all(|_| !between.hangs((1, 1), true, SECOND)));
    assert!((0..600).all(|_| !between.hangs((1, 1), false, SECOND)));
    assert!((0..600).all(|_| !between.hangs((1, 2), false, SECOND)), "it has made a pass meanwhile");
    assert!(between.hangs((1, 2), false, SECOND));
}

#[test]
fn a_rank_that_loads_hangs_when_it_has_read_nothing_for_ten_minutes() {
    let loading = Arc::<Loading>::default();
    let (model, seen) = ("/models/t5".to_owned(), Mutex::default());
    let reading = Reading { rank: 3, model, loading: Mutex::new(loading.clone()), seen };
    let first = |seconds: u32| (0..seconds).find_map(|_| reading.look(SECOND));
    for _ in 0..10 {
        assert!(first(600).is_none());
        loading.get_on();
    }
    let (cause, message) = first(602).expect("it hangs");
    assert_eq!(cause, EngineLossCause::Hung);
    assert!(message.starts_with("rank 3 hangs: it has read nothing of /models/t5 for 600 s"), "{message}");
}

#[test]
fn what_is_loaded_of_all_parts_is_told_when_it_is_another() {
    let pipe = Pipe::default();
    let watches = Watches { state: Arc::default(), voice: Voice::new(pipe.clone()) };
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model");
    let open = || {
        let device = DeviceChoice::Cpu.open_for(0).unwrap();
        Opened::at(&model, "demo", Precision::Bf16, device).unwrap()
    };
    let (first, second) = (watches.read(0, "demo"), watches.read(1, "demo"));
    let mut told = frames::Loading::default();
    let mut tell = || {
        watches.tell(&mut told);
        pipe.said()
    };
    assert!(tell().is_empty(), "nothing is known");
    let opened = [open(), open()];
    first.tells_of(opened[0].loading());
    second.tells_of(opened[1].loading());
    assert!(tell().is_empty(), "nothing is known still");
    let [one, other] = opened;
    let part = one.part(Shard::WHOLE).unwrap();
    let [Notice::Loading(half)] = tell()[..] else { panic!("once") };
    assert!(half.loaded == half.total && half.total > 0, "{half:?}");
    assert!(tell().is_empty(), "it is no other");
    let parts = (part, other.part(Shard::WHOLE).unwrap());
    drop((first, second));
    let [Notice::Loading(all)] = tell()[..] else { panic!("once") };
    assert_eq!((all.loaded, all.total), (2 * half.total, 2 * half.total), "also of those that have loaded");
    drop(parts);
}

/// Epochs that the process was said to join, and those for which it was said to hang.
fn told(pipe: &Pipe) -> (Vec<u64>, Vec<u64>) {
    let (mut joins, mut hangs) = (Vec::new(), Vec::new());
    for notice in pipe.said() {
        match notice {
            Notice::Joining(epoch) => joins.push(epoch),
            Notice::Failed(failed) => hangs.push(failed.epoch),
            _ => {}
        }
    }
    (joins, hangs)
}

#[test]
fn a_process_that_loads_answers_for_each_new_group_and_says_for_each_that_it_hangs() {
    let pipe = Pipe::default();
    let watches = Watches { state: Arc::default(), voice: Voice::new(pipe.clone()) };
    let hangs = (EngineLossCause::Hung, "it hangs".to_owned());
    watches.begin(1);
    watches.begin(2);
    assert_eq!(told(&pipe), (vec![], vec![]), "it may be in a group");
    // What came before it knew that it was to load is for it as well.
    let loads = watches.load(1);
    watches.begin(3);
    assert_eq!(told(&pipe), (vec![2, 3], vec![]));
    watches.lose(&hangs);
    watches.lose(&hangs);
    watches.begin(4);
    watches.lose(&hangs);
    assert_eq!(told(&pipe), (vec![4], vec![3, 4]));
    drop(loads);
    watches.begin(5);
    assert_eq!(told(&pipe), (vec![], vec![]), "it has loaded");
    drop(watches.load(5));
    assert_eq!(told(&pipe), (vec![], vec![]), "that is said by whoever begins with it");
}

#[test]
fn each_pass_has_its_time() {
    let mut seen = Seen::default();
    for number in 0..100 {
        for _ in 0..10 {
            let pass = pass(number, Work::Losses, Some(0));
            assert_eq!(seen.judge(&pass, false, SECOND, LEAST), Verdict::GetsOn);
        }
    }
}

#[test]
fn time_for_which_others_are_waited_for_is_not_the_ranks_own() {
    let (mut seen, pass) = (Seen::default(), pass(0, Work::Gradients, Some(0)));
    for _ in 0..9 {
        assert_eq!(seen.judge(&pass, true, SECOND, LEAST), Verdict::GetsOn);
        assert_eq!(seen.judge(&pass, false, SECOND, LEAST), Verdict::GetsOn);
    }
    assert_eq!(until(&mut seen, &pass, false), (2, Verdict::Hangs));
}

#[test]
fn a_rank_whose_others_neither_come_nor_hang_is_freed_and_then_has_to_end_its_pass() {
    let (mut seen, of_a_replica) = (Seen::default(), pass(0, Work::Gradients, Some(0)));
    assert_eq!(until(&mut seen, &of_a_replica, true), (21, Verdict::IsLeftAlone));
    assert_eq!(until(&mut seen, &of_a_replica, true), (11, Verdict::Hangs));
    let of_all = pass(0, Work::Sums, Some(0));
    let mut seen = Seen::default();
    assert!((0..1000).all(|_| seen.judge(&of_all, true, SECOND, LEAST) == Verdict::GetsOn));
}
