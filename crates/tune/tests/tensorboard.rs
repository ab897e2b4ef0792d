//! TensorBoard reads what we write.

mod common;

use incipit_tune::events::EventWriter;
use std::time::{Duration, UNIX_EPOCH};

const SCRIPT: &str = "
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
for tag in sorted(events.Tags()['scalars']):
    print(tag, *(f'{e.step}:{e.value}' for e in events.Scalars(tag)))
";

#[test]
fn tensorboard_reads_the_scalars_and_forgets_what_a_resumed_run_repeats() {
    let Some(mut python) = common::python("tensorboard") else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |second| UNIX_EPOCH + Duration::from_secs(1_700_000_000 + second);
    let mut first = EventWriter::create(dir.path(), 1, at(0)).unwrap();
    for step in 1..=5 {
        first.scalars(step, at(step), &[("train/loss", step as f32 / 4.0), ("train/lr", 0.0)]).unwrap();
    }
    first.scalars(4, at(5), &[("eval/accuracy", 0.5)]).unwrap();
    // Killed in step 5, and resumed from the checkpoint after step 3.
    let mut second = EventWriter::create(dir.path(), 4, at(20)).unwrap();
    for step in 4..=6 {
        second.scalars(step, at(20 + step), &[("train/loss", step as f32), ("train/lr", 0.0)]).unwrap();
    }
    let read = common::output(python.args(["-c", SCRIPT]).arg(dir.path()));
    assert_eq!(
        read.lines().collect::<Vec<_>>(),
        [
            "eval/accuracy",
            "train/loss 1:0.25 2:0.5 3:0.75 4:4.0 5:5.0 6:6.0",
            "train/lr 1:0.0 2:0.0 3:0.0 4:0.0 5:0.0 6:0.0",
        ]
    );
}

#[test]
fn tensorboard_reads_a_file_whose_last_record_is_cut() {
    let Some(mut python) = common::python("tensorboard") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path(), 1, UNIX_EPOCH).unwrap();
    for step in 1..=3 {
        writer.scalars(step, UNIX_EPOCH, &[("loss", step as f32)]).unwrap();
    }
    let bytes = std::fs::read(writer.path()).unwrap();
    std::fs::write(writer.path(), &bytes[..bytes.len() - 5]).unwrap();
    assert_eq!(common::output(python.args(["-c", SCRIPT]).arg(dir.path())), "loss 1:1.0 2:2.0\n");
}
