//! Files between the coordinator's blobs and this machine: data and checkpoints of jobs to here, saved checkpoints to there.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

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
/// How long nothing of a file may move before it is given up, to be tried again: it holds a place that others wait for.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes that a store has on its disk in a second, at least: that a file is there may be said so much later.
const SYNCED: u64 = 16 << 20;
/// Data that are kept for later jobs, in bytes: the least recently used go beyond.
const KEPT: u64 = 32 << 30;

/// This machine's files.
#[derive(Clone)]
pub(crate) struct Files {
    dir: PathBuf,
    travelling: Arc<Semaphore>,
    silence: Duration,
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
        let travelling = Arc::new(Semaphore::new(AT_ONCE));
        Ok(Self { dir: dir.to_owned(), travelling, silence: SILENCE })
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
            self.download(client, digest, &part.0).await.map_err(|stopped| stopped.mended_by(mend))?;
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
            let of_checkpoint = |stopped: Stopped| stopped.of_checkpoint(checkpoint.step);
            self.download(client, &file.digest, &path).await.map_err(of_checkpoint)?;
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
            self.upload(client, file, &Path::new(dir).join(&file.name)).await?;
        }
        Ok(())
    }

    async fn download(&self, client: &Client, digest: &str, path: &Path) -> Result<(), Stopped> {
        let told = |error: std::io::Error| local("write", path, &error);
        let request = v1::ReadBlobRequest { digest: digest.to_owned(), offset: 0 };
        let mut parts = moves(self.silence, digest, client.blobs().read_blob(request)).await?.into_inner();
        let mut file = tokio::fs::File::create(path).await.map_err(told)?;
        let mut hasher = blake3::Hasher::new();
        while let Some(part) = moves(self.silence, digest, parts.message()).await? {
            hasher.update(&part.data);
            file.write_all(&part.data).await.map_err(told)?;
        }
        file.sync_all().await.map_err(told)?;
        if hasher.finalize().to_hex().as_str() == digest {
            return Ok(());
        }
        // The coordinator says so itself where that is its store's doing. A stream that ended early looks like this as well.
        let what =
            format!("what came of the blob {digest} has another hash: it breaks on its way to this machine");
        Err(Stopped::Damaged(Problem::new(Code::DataLoss, "BLOB_DAMAGED", what), v1::JobReason::Internal))
    }

    async fn upload(&self, client: &Client, file: &v1::CheckpointFile, path: &Path) -> Result<(), Stopped> {
        let told = |error: std::io::Error| local("read", path, &error);
        let mut reader = tokio::fs::File::open(path).await.map_err(told)?;
        // One part waits at most: where it is taken, the file moves indeed.
        let (sender, parts) = mpsc::channel(1);
        let first = v1::WriteBlobRequest { digest: file.digest.clone(), size: file.size, data: Bytes::new() };
        let (silence, digest) = (self.silence, &*file.digest);
        let reading = async move {
            let mut part = first;
            loop {
                // A call that takes nothing any more says why.
                let taken = moves(silence, digest, async { Ok(sender.send(part).await.is_ok()) }).await?;
                let mut data = vec![0; PART];
                let length = if taken { reader.read(&mut data).await.map_err(told)? } else { 0 };
                if length == 0 {
                    return Ok::<_, Stopped>(());
                }
                data.truncate(length);
                part = v1::WriteBlobRequest { data: data.into(), ..v1::WriteBlobRequest::default() };
            }
        };
        let mut blobs = client.blobs();
        let written = blobs.write_blob(ReceiverStream::new(parts));
        tokio::pin!(written);
        tokio::select! {
            done = &mut written => done.map(drop).map_err(|status| Stopped::from(&status)),
            read = reading => {
                read?;
                let silence = silence + Duration::from_secs(file.size / SYNCED);
                moves(silence, digest, written).await.map(drop)
            }
        }
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

/// What comes next of a blob on its way.
///
/// # Errors
/// What the coordinator says; or that nothing comes for too long.
async fn moves<T>(
    silence: Duration,
    digest: &str,
    next: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, Stopped> {
    match tokio::time::timeout(silence, next).await {
        Ok(done) => done.map_err(|status| Stopped::from(&status)),
        Err(_) => {
            let what = format!(
                "nothing of the blob {digest} moved for {} s; look at the coordinator's store, and at the way to it",
                silence.as_secs_f32()
            );
            Err(Stopped::Broken(Problem::new(Code::DeadlineExceeded, "DEADLINE", what)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use incipit_proto::client::ClientConfig;
    use incipit_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
    use tokio_stream::StreamExt as _;
    use tonic::{Request, Response, Status, Streaming};

    use super::*;
    use crate::agent::persist::{Word, persist};

    /// What blobs hold.
    const TEXT: &[u8] = b"an example";

    type Parts = tokio_stream::Iter<std::vec::IntoIter<Result<v1::ReadBlobResponse, Status>>>;

    /// Blobs in a store some of which hangs: it answers for the digest of [`TEXT`] alone, and takes of others a few parts, or none.
    #[derive(Default)]
    struct Store {
        reads: Arc<AtomicUsize>,
    }

    fn digest() -> String {
        blake3::hash(TEXT).to_hex().to_string()
    }

    #[tonic::async_trait]
    impl BlobService for Store {
        type ReadBlobStream = Parts;

        async fn find_blobs(
            &self,
            request: Request<v1::FindBlobsRequest>,
        ) -> Result<Response<v1::FindBlobsResponse>, Status> {
            Ok(Response::new(v1::FindBlobsResponse { missing: request.into_inner().digests }))
        }

        async fn read_blob(&self, request: Request<v1::ReadBlobRequest>) -> Result<Response<Parts>, Status> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            if request.into_inner().digest != digest() {
                std::future::pending::<()>().await;
            }
            let part = v1::ReadBlobResponse { data: Bytes::from_static(TEXT) };
            Ok(Response::new(tokio_stream::iter(vec![Ok(part)])))
        }

        async fn write_blob(
            &self,
            request: Request<Streaming<v1::WriteBlobRequest>>,
        ) -> Result<Response<v1::WriteBlobResponse>, Status> {
            let mut parts = request.into_inner();
            let first = parts.next().await.transpose()?.unwrap_or_default();
            if first.digest == "takes nothing" {
                std::future::pending::<()>().await;
            }
            while let Some(part) = parts.next().await {
                part?;
            }
            if first.digest != digest() {
                std::future::pending::<()>().await;
            }
            Ok(Response::new(v1::WriteBlobResponse { size: first.size }))
        }
    }

    /// Files of this machine, and a client of a store.
    async fn world(dir: &Path, silence: Duration) -> (Files, Client, Arc<AtomicUsize>) {
        let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let store = Store::default();
        let reads = store.reads.clone();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(BlobServiceServer::new(store));
        tokio::spawn(server.serve_with_incoming(incoming));
        let client = Client::connect(&ClientConfig::new(format!("http://{address}"))).await.unwrap();
        (Files { silence, ..Files::open(dir).unwrap() }, client, reads)
    }

    fn job(digest: &str) -> v1::JobAssignment {
        let source = Some(Source::Digest(digest.to_owned()));
        let train = Some(v1::DataSource { source, ..v1::DataSource::default() });
        let spec = Some(v1::TrainingSpec { train, ..v1::TrainingSpec::default() });
        v1::JobAssignment { job: "jobs/j".to_owned(), spec, ..v1::JobAssignment::default() }
    }

    #[tokio::test]
    async fn downloads_that_hang_are_told_and_tried_again_and_hold_no_other_up() {
        let dir = tempfile::tempdir().unwrap();
        let (files, client, reads) = world(dir.path(), Duration::from_millis(50)).await;
        let told = Arc::<Mutex<Vec<Problem>>>::default();
        let mut hanging = Vec::new();
        for number in 0..AT_ONCE {
            let (files, client, told) = (files.clone(), client.clone(), told.clone());
            hanging.push(tokio::spawn(async move {
                let job = job(&format!("{number}"));
                let tell = |word| match word {
                    Word::Fails(_, problem) => told.lock().unwrap().push(problem),
                    Word::Works(_) => {}
                };
                persist(|| files.fetch(&client, &job), tell).await
            }));
        }
        while reads.load(Ordering::Relaxed) < AT_ONCE {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let good = job(&digest());
        let fetched = persist(|| files.fetch(&client, &good), |_| ()).await.unwrap();
        assert_eq!(std::fs::read(&fetched.tasks[0].train).unwrap(), TEXT);
        while reads.load(Ordering::Relaxed) < 3 * AT_ONCE {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for task in hanging {
            assert!(!task.is_finished(), "one gave up for good");
            task.abort();
        }
        let told = told.lock().unwrap();
        assert_eq!(told.len(), AT_ONCE, "{told:?}");
        assert!(
            told.iter().all(|problem| problem.reason == "DEADLINE" && problem.message.contains("moved")),
            "{told:?}"
        );
    }

    #[tokio::test]
    async fn an_upload_that_hangs_is_given_up_whether_it_is_taken_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let (files, client, _) = world(dir.path(), Duration::from_millis(50)).await;
        std::fs::write(dir.path().join("small"), TEXT).unwrap();
        std::fs::write(dir.path().join("large"), vec![7; 8 << 20]).unwrap();
        let file = |name: &str, digest: &str, size| v1::CheckpointFile {
            name: name.to_owned(),
            digest: digest.to_owned(),
            size,
        };
        let at = dir.path().to_string_lossy().into_owned();
        for digest in ["takes nothing", "does not answer"] {
            for (name, size) in [("small", TEXT.len()), ("large", 8 << 20)] {
                let list = [file(name, digest, size as u64)];
                match files.store(&client, &list, &at).await {
                    Err(Stopped::Broken(problem)) => assert_eq!(problem.reason, "DEADLINE", "{problem}"),
                    other => panic!("{name}, {digest}: {other:?}"),
                }
            }
        }
        assert_eq!(files.travelling.available_permits(), AT_ONCE);
        let list = [file("small", &digest(), TEXT.len() as u64)];
        persist(|| files.store(&client, &list, &at), |_| ()).await.unwrap();
    }
}
