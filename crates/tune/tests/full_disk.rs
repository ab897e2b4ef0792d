//! A disk that is really full, and a directory that is really not to be written: small file systems of their
//! own, where mounting one is permitted.

use incipit_tune::{
    atomic,
    checkpoint::{Checkpoint, Store, TrainState},
    events::EventWriter,
    npy,
    optimizer::OptimizerKind,
    prompt::Prompt,
    trained::Trained,
};
use std::{fs, path::Path, process::Command, time::UNIX_EPOCH};

/// A tmpfs; unmounted when dropped.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        eprintln!("skipped: mounting a tmpfs is not permitted here");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn prompt(step: u64, length: usize) -> Prompt {
    Prompt::new(length, 64, vec![step as f32; length * 64]).expect("finite")
}

fn checkpoint(step: u64, length: usize) -> Checkpoint {
    let state = TrainState {
        step,
        epoch: 0,
        batch: step,
        seed: 0,
        spec: String::new(),
        backbone: String::new(),
        optimizer: OptimizerKind::sgd(0.0, 0.0),
        optimizer_steps: step,
        best: None,
        evaluations_since_best: 0,
        evaluated: 0,
        train_data: String::new(),
        eval_data: None,
        tokens: None,
        corpus: None,
    };
    Checkpoint { trained: Trained::Prompt(prompt(step, length)), optimizer: Vec::new(), state }
}

#[test]
fn a_full_disk_is_told_and_leaves_what_was_there() {
    let Some(disk) = Mount::new("size=64k") else { return };
    let out = disk.path().join("out");
    let store = Store::open(&out).unwrap();
    store.save(&checkpoint(1, 20)).unwrap();
    npy::write(&out.join("prompt.npy"), &prompt(1, 20)).unwrap();
    for error in [
        store.save(&checkpoint(2, 200)).unwrap_err(),
        npy::write(&out.join("prompt.npy"), &prompt(2, 200)).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("No space left") && error.contains("free some space"), "{error}");
        assert!(error.contains("step-00000002") || error.contains("prompt.npy"), "{error}");
    }
    let found = store.newest_valid().unwrap();
    assert_eq!(found.checkpoint.unwrap().1, checkpoint(1, 20));
    assert!(found.damaged.is_empty() && store.last() == Some(1));
    assert_eq!(Prompt::read(&out.join("prompt.npy")).unwrap(), prompt(1, 20));
    assert!(atomic::clean(&out).unwrap().is_empty(), "nothing half-written is left");
    store.save(&checkpoint(3, 20)).unwrap();
    assert_eq!(store.last(), Some(3));
}

#[test]
fn events_on_a_full_disk_are_told() {
    let Some(disk) = Mount::new("size=8k") else { return };
    let mut writer = EventWriter::create(disk.path(), 0, UNIX_EPOCH).unwrap();
    let error = (0..10_000).find_map(|step| writer.scalars(step, UNIX_EPOCH, &[("loss", 1.0)]).err());
    let error = error.expect("8 KiB do not hold it").to_string();
    assert!(error.contains("events.out.tfevents") && error.contains("free some space"), "{error}");
}

#[test]
fn a_directory_that_may_not_be_written_is_told() {
    let Some(disk) = Mount::new("size=64k") else { return };
    fs::create_dir(disk.path().join("there")).unwrap();
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(disk.path()).status();
    if !remounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: remounting is not permitted here");
        return;
    }
    let prompt = prompt(1, 2);
    for error in [
        Store::open(&disk.path().join("out")).unwrap_err(),
        Store::open(&disk.path().join("there")).unwrap_err(),
        npy::write(&disk.path().join("there/prompt.npy"), &prompt).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(
            error.contains("Read-only") && error.contains("a directory that you may write to"),
            "{error}"
        );
    }
}
