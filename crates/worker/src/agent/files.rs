//! Files between the coordinator's blobs and this machine: data and checkpoints of jobs to here, saved checkpoints to there.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use incipit_proto::Problem;
use incipit_proto::client::Client;
use incipit_proto::v1::{self, data_source::Source};
use incipit_tune::atomic;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::agent::persist::Stopped;
use crate::frames::{LocalJob, LocalTask};
use crate::spec;

/// Bytes of a message that carries a part of a blob.
const PART: usize = 256 << 10;
/// Files that travel at once.
const AT_ONCE: usize = 4;
/// Data that are kept for later jobs, in bytes: the least recently used go beyond.
const KEPT: u64 = 32 << 30;

/// This machine's files.
#[derive(Clone)]
pub(crate) struct Files {
    dir: PathBuf,
    travelling: Arc<Semaphore>,
}

impl Files {
    /// Files under `dir`. What an earlier agent left half-done is removed.
    ///
    /// # Errors
    /// If the system refuses; the message names the directory.
    pub(crate) fn open(dir: &Path) -> incipit_tune::Result<Self> {
        for part in ["data", "checkpoints", "outbox"] {
            atomic::create_dir(&dir.join(part))?;
            atomic::clean(&dir.join(part))?;
        }
        // Reports of what lies here are gone with the process that made them.
        for part in ["checkpoints", "outbox"] {
            atomic::remove_dir(&dir.join(part))?;
            atomic::create_dir(&dir.join(part))?;
        }
        Ok(Self { dir: dir.to_owned(), travelling: Arc::new(Semaphore::new(AT_ONCE)) })
    }

    /// Where engines leave checkpoints.
    pub(crate) fn outbox(&self) -> PathBuf {
        self.dir.join("outbox")
    }

    /// Has a job's data and checkpoint here.
    pub(crate) async fn fetch(&self, client: &Client, job: &v1::JobAssignment) -> Result<LocalJob, Stopped> {
        let _turn = self.travelling.acquire().await;
        let spec = job.spec.clone().unwrap_or_default();
        let mut tasks = Vec::new();
        for (_, [own, common]) in spec::tasks(&spec) {
            let train = self.data(client, own.train.or(common.train).as_ref()).await?;
            let eval = self.data(client, own.eval.or(common.eval).as_ref()).await?;
            let initial = self.data(client, own.initial.or(common.initial).as_ref()).await?;
            tasks.push(LocalTask { train, eval, initial });
        }
        let checkpoint = match &job.checkpoint {
            None => String::new(),
            Some(checkpoint) => self.checkpoint(client, &job.job, checkpoint).await?,
        };
        let in_use = tasks.iter().flat_map(|task| [&task.train, &task.eval, &task.initial]);
        self.evict(in_use.map(PathBuf::from).collect()).await;
        Ok(LocalJob { assignment: Some(job.clone()), checkpoint, tasks })
    }

    async fn data(&self, client: &Client, source: Option<&v1::DataSource>) -> Result<String, Stopped> {
        let Some(source) = source else { return Ok(String::new()) };
        let digest = match &source.source {
            Some(Source::Path(path)) => return Ok(path.clone()),
            Some(Source::Digest(digest)) => digest,
            None => return Ok(String::new()),
        };
        let name = if source.file_name.is_empty() { "data.jsonl" } else { &source.file_name };
        // The name's ending tells the format, so that it is part of the place.
        let path = self.dir.join("data").join(digest).join(name);
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            touch(&path);
        } else {
            // A name of its own: jobs that begin together may want the same file.
            let part = format!(".{digest}-{name}-{}.part", uuid::Uuid::new_v4().simple());
            let part = Part(self.dir.join("data").join(part));
            let mend = "hand the job in again with the same file, which repairs it";
            download(client, digest, &part.0).await.map_err(|stopped| stopped.mended_by(mend))?;
            place(&part.0, &path).await.map_err(|error| local("write", &path, &error))?;
        }
        Ok(path.to_string_lossy().into_owned())
    }

    async fn checkpoint(
        &self,
        client: &Client,
        job: &str,
        checkpoint: &v1::Checkpoint,
    ) -> Result<String, Stopped> {
        let of_job = self.dir.join("checkpoints").join(job.replace('/', "-"));
        let dir = of_job.join(format!("step-{:08}", checkpoint.step));
        // What is here of the job is older, or of an attempt that left.
        let _ = tokio::fs::remove_dir_all(&of_job).await;
        for file in &checkpoint.files {
            let path = dir.join(&file.name);
            let of_task = path.parent().unwrap_or(&dir);
            tokio::fs::create_dir_all(of_task).await.map_err(|error| local("create", of_task, &error))?;
            let mend = format!(
                "its checkpoint of step {} is lost by that (`incipit checkpoint verify` says what of it): hand the job in again",
                checkpoint.step
            );
            download(client, &file.digest, &path).await.map_err(|stopped| stopped.mended_by(&mend))?;
        }
        Ok(dir.to_string_lossy().into_owned())
    }

    /// Stores the files of a checkpoint as blobs.
    pub(crate) async fn store(
        &self,
        client: &Client,
        files: &[v1::CheckpointFile],
        dir: &str,
    ) -> Result<(), Stopped> {
        let _turn = self.travelling.acquire().await;
        let digests = files.iter().map(|file| file.digest.clone()).collect();
        let found = client
            .blobs()
            .find_blobs(v1::FindBlobsRequest { digests })
            .await
            .map_err(|status| Stopped::from(&status))?;
        let missing = found.into_inner().missing;
        for file in files.iter().filter(|file| missing.contains(&file.digest)) {
            upload(client, file, &Path::new(dir).join(&file.name)).await?;
        }
        Ok(())
    }

    /// Removes a checkpoint that is stored.
    pub(crate) async fn remove(&self, dir: &str) {
        if let Err(error) = tokio::fs::remove_dir_all(dir).await
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {dir}: {error}");
        }
    }

    /// Removes the data that were not used for the longest time, beyond what may be kept.
    async fn evict(&self, in_use: Vec<PathBuf>) {
        let data = self.dir.join("data");
        let evicted = tokio::task::spawn_blocking(move || evict(&data, &in_use)).await;
        if let Ok(Err(error)) = evicted {
            tracing::warn!("cannot remove old data: {error}");
        }
    }
}

fn evict(data: &Path, in_use: &[PathBuf]) -> std::io::Result<()> {
    let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for dir in std::fs::read_dir(data)?.filter_map(Result::ok).filter(|entry| entry.path().is_dir()) {
        for file in std::fs::read_dir(dir.path())?.filter_map(Result::ok) {
            let metadata = file.metadata()?;
            files.push((metadata.modified()?, metadata.len(), file.path()));
        }
    }
    files.sort();
    let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in files {
        if total <= KEPT {
            break;
        }
        if !in_use.contains(&path) {
            std::fs::remove_file(&path)?;
            total -= size;
        }
    }
    Ok(())
}

/// Marks a file as used now.
fn touch(path: &Path) {
    // Where that fails, the file only looks older.
    let _ = std::fs::File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// A file that is not whole yet, and goes where it does not become so.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // In its place by now, mostly.
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn place(part: &Path, path: &Path) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        tokio::fs::create_dir_all(dir).await?;
    }
    tokio::fs::rename(part, path).await
}

fn local(action: &str, path: &Path, error: &std::io::Error) -> Stopped {
    Stopped::Local(format!("cannot {action} {}: {error}", path.display()))
}

async fn download(client: &Client, digest: &str, path: &Path) -> Result<(), Stopped> {
    let told = |error: std::io::Error| local("write", path, &error);
    let request = v1::ReadBlobRequest { digest: digest.to_owned(), offset: 0 };
    let response = client.blobs().read_blob(request).await.map_err(|status| Stopped::from(&status))?;
    let mut parts = response.into_inner();
    let mut file = tokio::fs::File::create(path).await.map_err(told)?;
    let mut hasher = blake3::Hasher::new();
    while let Some(part) = parts.message().await.map_err(|status| Stopped::from(&status))? {
        hasher.update(&part.data);
        file.write_all(&part.data).await.map_err(told)?;
    }
    file.sync_all().await.map_err(told)?;
    if hasher.finalize().to_hex().as_str() == digest {
        return Ok(());
    }
    // A stream that ended early looks like this as well.
    let what = format!("what came of the blob {digest} has another hash");
    Err(Stopped::Damaged(Problem::new(Code::DataLoss, "BLOB_DAMAGED", what)))
}

async fn upload(client: &Client, file: &v1::CheckpointFile, path: &Path) -> Result<(), Stopped> {
    let mut reader = tokio::fs::File::open(path).await.map_err(|error| local("read", path, &error))?;
    let (sender, parts) = mpsc::channel(4);
    let first = v1::WriteBlobRequest { digest: file.digest.clone(), size: file.size, data: Bytes::new() };
    let reading = async move {
        let mut part = first;
        loop {
            if sender.send(part).await.is_err() {
                return Ok(());
            }
            let mut data = vec![0; PART];
            let length = reader.read(&mut data).await?;
            if length == 0 {
                return Ok(());
            }
            data.truncate(length);
            part = v1::WriteBlobRequest { data: data.into(), ..v1::WriteBlobRequest::default() };
        }
    };
    let mut blobs = client.blobs();
    let (read, written) = tokio::join!(reading, blobs.write_blob(ReceiverStream::new(parts)));
    read.map_err(|error: std::io::Error| local("read", path, &error))?;
    written.map_err(|status| Stopped::from(&status))?;
    Ok(())
}
