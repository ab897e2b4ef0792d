//! Writes checkpoints where the agent takes them from, on a thread of its own, and keeps the order of what is said of jobs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use incipit_proto::v1::{
    CheckpointFile, CheckpointSaved, JobLeft, JobReason, JobReport, JobState, job_report::Report,
};
use incipit_tune::atomic;
use incipit_tune::checkpoint::{self, Checkpoint};

use crate::engine::resident::{OfTasks, dir_of};
use crate::engine::voice::Voice;
use crate::frames::{Notice, Saved};

/// Bytes of checkpoints beside which another one is made: where more wait, the backbone waits first until all are written.
const WAITING: u64 = 64 << 20;

/// What is to be said.
enum Task {
    Say(Notice),
    Save(Box<Save>),
    /// That a job has left, and how.
    Leave(JobReport, JobLeft),
    /// Answer when all before is done.
    Flush(SyncSender<()>),
}

struct Save {
    checkpoint: OfTasks<Checkpoint>,
    /// Of its numbers.
    bytes: u64,
    /// Without what is told of the checkpoint.
    report: JobReport,
    /// Without the files.
    saved: CheckpointSaved,
}

/// The way to the thread that writes.
#[derive(Clone)]
pub(crate) struct Saver {
    tasks: Sender<Task>,
    /// Bytes that wait.
    waiting: Arc<AtomicU64>,
}

impl Saver {
    /// Saves under `outbox`.
    pub(crate) fn start(outbox: PathBuf, voice: Voice) -> Self {
        let (tasks, queue) = channel();
        let waiting = Arc::<AtomicU64>::default();
        let desk = Desk { outbox, voice, waiting: waiting.clone(), unsaved: BTreeMap::new() };
        std::thread::spawn(move || desk.serve(&queue));
        Self { tasks, waiting }
    }

    /// Says something of a job, behind everything that was said before.
    pub(crate) fn say(&self, notice: Notice) {
        let _ = self.tasks.send(Task::Say(notice));
    }

    /// Waits, where much waits to be written, until it is: before another checkpoint is made. Meanwhile it calls `still_waits` every second:
    /// a disk may be slow.
    pub(crate) fn make_room(&self, mut still_waits: impl FnMut()) {
        if self.waiting.load(Ordering::Relaxed) <= WAITING {
            return;
        }
        let (done, wait) = sync_channel(1);
        if self.tasks.send(Task::Flush(done)).is_ok() {
            while wait.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                still_waits();
            }
        }
    }

    /// Saves a checkpoint and reports it, with what `saved` says of it besides its files. If it cannot be written, the log says so, and
    /// the job goes on.
    pub(crate) fn save(&self, checkpoint: OfTasks<Checkpoint>, saved: CheckpointSaved, report: JobReport) {
        let bytes = checkpoint.iter().map(|(_, checkpoint)| checkpoint.num_bytes()).sum();
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
        let _ = self.tasks.send(Task::Save(Box::new(Save { checkpoint, bytes, report, saved })));
    }

    /// Says that a job has left. It has not succeeded if its last checkpoint could not be written.
    pub(crate) fn leave(&self, report: JobReport, left: JobLeft) {
        let _ = self.tasks.send(Task::Leave(report, left));
    }
}

/// What the thread has.
struct Desk {
    outbox: PathBuf,
    voice: Voice,
    waiting: Arc<AtomicU64>,
    /// Jobs whose last checkpoint could not be written, and why.
    unsaved: BTreeMap<String, String>,
}

impl Desk {
    fn serve(mut self, queue: &Receiver<Task>) {
        for task in queue {
            match task {
                Task::Say(notice) => self.voice.say(notice),
                Task::Save(save) => {
                    let bytes = save.bytes;
                    self.save(*save);
                    self.waiting.fetch_sub(bytes, Ordering::Relaxed);
                }
                Task::Leave(report, left) => self.leave(report, left),
                Task::Flush(done) => drop(done.send(())),
            }
        }
    }

    fn save(&mut self, save: Save) {
        let Save { checkpoint, mut report, mut saved, .. } = save;
        let (job, step) = (report.job.clone(), saved.step);
        let dir = self.outbox.join(format!("{}-{}-{step:08}", job.replace('/', "-"), report.attempt));
        match write(&dir, &checkpoint) {
            Ok(files) => {
                self.unsaved.remove(&job);
                let bytes: u64 = files.iter().map(|file| file.size).sum();
                saved.files = files;
                report.report = Some(Report::Saved(saved));
                let dir = dir.to_string_lossy().into_owned();
                self.voice.say(Notice::Saved(Saved { report: Some(report), dir }));
                self.voice.log(&job, "INFO", format!("saved a checkpoint of step {step}, {bytes} bytes"));
            }
            Err(error) => {
                // Of several tasks some may have been written.
                let _ = atomic::remove_dir(&dir);
                let text =
                    format!("the checkpoint of step {step} was not saved, and training goes on: {error}");
                self.voice.log(&job, "ERROR", text);
                self.unsaved.insert(job, error);
            }
        }
    }

    fn leave(&mut self, mut report: JobReport, mut left: JobLeft) {
        if let Some(error) = self.unsaved.remove(&report.job) {
            left.message = format!("its last checkpoint could not be saved: {error}");
            if left.state() == JobState::Succeeded {
                left.set_state(JobState::Failed);
                left.set_reason(JobReason::Internal);
            }
        }
        let text = format!("left the backbone after {} steps: {}", left.step, left.message);
        self.voice.log(&report.job, "INFO", text);
        report.report = Some(Report::Left(left));
        self.voice.say(Notice::Job(report));
    }
}

/// Writes a checkpoint to a directory; that of each of several tasks to one of its name within. What was written.
fn write(dir: &Path, checkpoint: &OfTasks<Checkpoint>) -> Result<Vec<CheckpointFile>, String> {
    let told = |error: incipit_tune::Error| error.to_string();
    let mut written = Vec::new();
    for (name, checkpoint) in checkpoint {
        let dir = dir_of(dir, name);
        checkpoint::save(&dir, checkpoint).map_err(told)?;
        let prefix = if name.is_empty() { String::new() } else { format!("{name}/") };
        written.extend(files(&dir, &prefix)?);
    }
    Ok(written)
}

/// The files in a directory; their names begin with `prefix`.
fn files(dir: &Path, prefix: &str) -> Result<Vec<CheckpointFile>, String> {
    let mut files = Vec::new();
    let told = |error: std::io::Error| format!("cannot read {}: {error}", dir.display());
    for entry in std::fs::read_dir(dir).map_err(told)? {
        let entry = entry.map_err(told)?;
        let bytes = std::fs::read(entry.path()).map_err(told)?;
        files.push(CheckpointFile {
            name: format!("{prefix}{}", entry.file_name().to_string_lossy()),
            digest: blake3::hash(&bytes).to_hex().to_string(),
            size: bytes.len() as u64,
        });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
