use super::*;
use crate::atomic::faults::{Fault, with_fault};
use crate::optimizer::Optimizer;
use std::fs;

/// A checkpoint after `step` steps, whose every number depends on `step`.
fn checkpoint(step: u64) -> Checkpoint {
    let kind = OptimizerKind::adamw(1e-5);
    let mut optimizer = Optimizer::new(&kind, 2, 3);
    let mut prompt = vec![0.5; 6];
    optimizer.step(&mut prompt, &[step as f32 + 0.25; 6], 0.3);
    let best = Best { step: step / 2, score: 1.0 / (step as f64 + 3.0) };
    Checkpoint {
        trained: Trained::Prompt(Prompt::new(2, 3, prompt).unwrap()),
        optimizer: optimizer.state(),
        state: TrainState {
            step,
            epoch: 1,
            batch: 7,
            seed: u64::MAX,
            spec: "5c".to_owned(),
            backbone: "b1".to_owned(),
            optimizer: kind,
            optimizer_steps: step,
            best: Some(best),
            evaluations_since_best: 2,
            evaluated: 1000,
            train_data: "1234".to_owned(),
            eval_data: None,
            tokens: None,
            corpus: None,
        },
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("out")).unwrap();
    (dir, store)
}

#[test]
fn a_checkpoint_is_read_back_bit_for_bit() {
    let (_dir, store) = store();
    for step in 0..50 {
        let path = store.save(&checkpoint(step)).unwrap();
        assert_eq!(load(&path).unwrap(), checkpoint(step));
    }
    assert!(store.path(7).ends_with("checkpoints/step-00000007"));
}

#[test]
fn the_same_checkpoint_is_the_same_bytes() {
    let (_a, one) = store();
    let (_b, other) = store();
    let (one, other) = (one.save(&checkpoint(3)).unwrap(), other.save(&checkpoint(3)).unwrap());
    let mut names: Vec<_> = fs::read_dir(&one).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [MANIFEST, OPTIMIZER, PROMPT, STATE]);
    for name in names {
        assert_eq!(
            fs::read(one.join(&name)).unwrap(),
            fs::read(other.join(&name)).unwrap(),
            "{}",
            name.display()
        );
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_found_and_the_file_named() {
    let (_dir, store) = store();
    let path = store.save(&checkpoint(3)).unwrap();
    for name in [PROMPT, OPTIMIZER, STATE, MANIFEST] {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            for damaged in [&flipped, &whole[..at].to_vec()] {
                // The last line break is all that may be missing.
                if *damaged == whole[..whole.len() - 1] && name == MANIFEST {
                    continue;
                }
                fs::write(&file, damaged).unwrap();
                let error = load(&path).unwrap_err().to_string();
                assert!(error.contains(name) && error.contains("step-00000003"), "{name} at {at}: {error}");
            }
        }
        fs::write(&file, whole).unwrap();
    }
    load(&path).unwrap();
}

#[test]
fn missing_files_are_named() {
    for name in [PROMPT, OPTIMIZER, STATE, MANIFEST] {
        let (_dir, store) = store();
        let path = store.save(&checkpoint(3)).unwrap();
        fs::remove_file(path.join(name)).unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let error = load(Path::new("/nowhere/step-00000001")).unwrap_err().to_string();
    assert!(error.contains("step-00000001: it is not there"), "{error}");
}

#[test]
fn a_checkpoint_of_a_later_version_is_told_from_a_damaged_one() {
    let later = r#"{"format":2,"written_by":"incipit 9.0","state":{"tp":4}}"#;
    let error = decode_state(later.as_bytes()).unwrap_err();
    assert!(error.contains("format 2 of incipit 9.0"), "{error}");
}

#[test]
fn the_newest_that_is_whole_is_found_and_the_damaged_ones_are_told() {
    let (_dir, store) = store();
    (1..=4).for_each(|step| drop(store.save(&checkpoint(step)).unwrap()));
    fs::write(store.path(4).join(STATE), "{").unwrap();
    fs::remove_file(store.path(3).join(MANIFEST)).unwrap();
    let found = store.newest_valid().unwrap();
    let (path, newest) = found.checkpoint.unwrap();
    assert_eq!((path, newest), (store.path(2), checkpoint(2)));
    let told: Vec<String> = found.damaged.iter().map(ToString::to_string).collect();
    assert!(told[0].contains("step-00000004") && told[0].contains(STATE), "{told:?}");
    assert!(told[1].contains("step-00000003") && told[1].contains(MANIFEST), "{told:?}");
}

#[test]
fn a_renamed_checkpoint_is_not_taken_for_a_newer_one() {
    let (_dir, store) = store();
    store.save(&checkpoint(5)).unwrap();
    fs::rename(store.path(5), store.path(9)).unwrap();
    let found = store.newest_valid().unwrap();
    assert!(found.checkpoint.is_none());
    assert!(found.damaged[0].to_string().contains("after 5 steps"), "{:?}", found.damaged);
}

#[test]
fn an_empty_directory_has_no_checkpoint() {
    let (_dir, store) = store();
    let found = store.newest_valid().unwrap();
    assert!(found.checkpoint.is_none() && found.damaged.is_empty());
    assert_eq!((store.best(), store.last(), store.steps().unwrap()), (None, None, vec![]));
}

#[test]
fn pruning_keeps_the_best_the_last_and_the_newest() {
    let (_dir, store) = store();
    (1..=6).for_each(|step| drop(store.save(&checkpoint(step * 10)).unwrap()));
    store.mark_best(20).unwrap();
    assert_eq!(store.prune(2).unwrap(), [10, 30, 40]);
    assert_eq!(store.steps().unwrap(), [20, 50, 60]);
    assert_eq!(store.prune(0).unwrap(), [50]);
    assert_eq!(store.steps().unwrap(), [20, 60]);
    assert_eq!((store.best(), store.last()), (Some(20), Some(60)));
    assert_eq!(load(&store.out_link("best")).unwrap(), checkpoint(20));
    assert!(store.mark_best(50).unwrap_err().to_string().contains("step-00000050"));
}

#[test]
fn what_is_no_checkpoint_is_left_alone() {
    let (_dir, store) = store();
    let other = store.path(1).with_file_name("step-one");
    fs::create_dir(&other).unwrap();
    fs::create_dir(store.path(1).with_file_name("step-5")).unwrap(); // Not as we write it.
    store.save(&checkpoint(1)).unwrap();
    store.prune(0).unwrap();
    assert_eq!(store.steps().unwrap(), [1]);
    assert!(other.exists());
}

/// Saving step 2 after step 1 (or over an older step 2), then marking it and pruning, with the power going at
/// each operation.
#[test]
fn a_crash_at_any_moment_leaves_the_old_state_or_the_new_one() {
    for overwrites in [false, true] {
        let mut saw = [0; 3];
        for at in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let old = if overwrites { 2 } else { 1 };
            let mut before = checkpoint(old);
            before.state.batch = 99;
            store.save(&before).unwrap();
            store.mark_best(old).unwrap();
            let ((), trace) = with_fault(Fault::Crash, at, || {
                let _ =
                    store.save(&checkpoint(2)).and_then(|_| store.mark_best(2)).and_then(|()| store.prune(1));
            });
            drop(store);
            let store = Store::open(dir.path()).unwrap();
            let found = store.newest_valid().unwrap();
            assert!(found.damaged.is_empty(), "after {trace:?}: {:?}", found.damaged);
            let (_, newest) = found.checkpoint.unwrap();
            let is_new = newest == checkpoint(2);
            assert!(is_new || newest == before, "after {trace:?}");
            for link in ["best", "last"] {
                load(&store.out_link(link)).unwrap_or_else(|e| panic!("{link} after {trace:?}: {e}"));
            }
            assert_no_temporaries(dir.path());
            let finished = trace.len() <= at;
            saw[if finished { 2 } else { usize::from(is_new) }] += 1;
            if finished {
                break;
            }
        }
        assert!(saw[0] >= 10 && saw[1] >= 5 && saw[2] == 1, "{saw:?}");
    }
}

/// As with a disk that is full for a moment: saving fails, says so, and leaves nothing half-written.
#[test]
fn a_failed_save_is_told_and_the_next_one_succeeds() {
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.save(&checkpoint(1)).unwrap();
        let (result, trace) = with_fault(Fault::Error, at, || store.save(&checkpoint(2)));
        if trace.len() <= at {
            result.unwrap();
            assert!(at >= 12, "only {at} operations");
            return;
        }
        let error = result.expect_err("the fault must be told").to_string();
        assert!(error.contains("free some space"), "{error}");
        assert_no_temporaries(dir.path());
        load(&store.out_link("last")).unwrap();
        store.save(&checkpoint(2)).unwrap();
        assert_eq!(store.newest_valid().unwrap().checkpoint.unwrap().1, checkpoint(2));
    }
}

#[test]
fn two_processes_cannot_write_one_directory() {
    let (dir, _store) = store();
    let error = Store::open(&dir.path().join("out")).unwrap_err().to_string();
    assert!(error.contains("out") && error.contains("another process"), "{error}");
}

#[test]
fn leftovers_are_removed_when_a_directory_is_opened_again() {
    let (dir, store) = store();
    fs::create_dir(store.path(1).with_file_name(".tmp-step-00000001-77")).unwrap();
    fs::write(dir.path().join("out/.tmp-prompt.npy-77"), "half").unwrap();
    drop(store);
    let _store = Store::open(&dir.path().join("out")).unwrap();
    assert_no_temporaries(&dir.path().join("out"));
}

#[test]
fn an_output_directory_below_a_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let error = Store::open(&dir.path().join("file/out")).unwrap_err().to_string();
    assert!(error.contains("file/out") && error.contains("choose another directory"), "{error}");
}

fn assert_no_temporaries(out: &Path) {
    for dir in [out.to_owned(), out.join("checkpoints")] {
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with(".tmp-"), "{name} was left");
        }
    }
}

impl Store {
    fn out_link(&self, name: &str) -> std::path::PathBuf {
        self.path(0).ancestors().nth(2).unwrap().join(name)
    }
}
