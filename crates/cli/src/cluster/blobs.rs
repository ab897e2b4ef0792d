//! Bytes by their hash: a file's digest, its way to the coordinator, and a checkpoint's files on their way back.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use incipit_proto::client::{Client, Repeatable, problem_of};
use incipit_proto::v1::{CheckpointFile, FindBlobsRequest, ReadBlobRequest, WriteBlobRequest};
use tokio::sync::mpsc::Sender;
use tokio_stream::wrappers::ReceiverStream;

use super::{call, refusal};
use crate::args::Global;
use crate::progress;

/// Bytes in one message.
const PART: usize = 1 << 20;

/// A file of this machine, by its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalFile {
    /// Where it lies, or, of bytes made of a file, where that does.
    pub(crate) path: PathBuf,
    made: Option<Arc<[u8]>>,
    pub(crate) digest: String,
    pub(crate) size: u64,
}

impl LocalFile {
    /// Reads a file for its hash.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let failed = || format!("cannot read {}", path.display());
        let mut hasher = blake3::Hasher::new();
        let size =
            std::io::copy(&mut File::open(path).with_context(failed)?, &mut hasher).with_context(failed)?;
        Ok(Self { path: path.to_owned(), made: None, digest: hasher.finalize().to_hex().to_string(), size })
    }

    /// Bytes that were made of the file at `path`.
    pub(crate) fn made(path: &Path, bytes: Vec<u8>) -> Self {
        let (digest, size) = (blake3::hash(&bytes).to_hex().to_string(), bytes.len() as u64);
        Self { path: path.to_owned(), made: Some(bytes.into()), digest, size }
    }

    fn open(&self) -> std::io::Result<Box<dyn Read>> {
        Ok(match &self.made {
            Some(bytes) => Box::new(Cursor::new(bytes.clone())),
            None => Box::new(File::open(&self.path)?),
        })
    }
}

/// Those of `files` that the coordinator does not have, each once.
///
/// # Errors
/// What the coordinator says.
pub(crate) async fn missing(client: &Client, files: &[LocalFile]) -> Result<Vec<LocalFile>> {
    let mut unique: Vec<&LocalFile> = files.iter().collect();
    unique.sort_by(|a, b| a.digest.cmp(&b.digest));
    unique.dedup_by(|a, b| a.digest == b.digest);
    if unique.is_empty() {
        return Ok(Vec::new());
    }
    let digests = unique.iter().map(|file| file.digest.clone()).collect();
    let found = call!(client, blobs.find_blobs(FindBlobsRequest { digests }))?;
    Ok(unique.into_iter().filter(|file| found.missing.contains(&file.digest)).cloned().collect())
}

/// Sends files, with a bar on a terminal.
///
/// # Errors
/// If one cannot be read or is another than it was when it was hashed, or what the coordinator says.
pub(crate) async fn upload(client: &Client, files: &[LocalFile], global: &Global) -> Result<()> {
    let total = files.iter().map(|file| file.size).sum();
    let bar = (total > 0).then(|| progress::bytes_bar("sending", total, global));
    for file in files {
        upload_one(client, file, bar.as_ref())
            .await
            .with_context(|| format!("cannot upload {}", file.path.display()))?;
    }
    Ok(())
}

/// Sends a file, and again where that broke off or was turned away for now.
async fn upload_one(client: &Client, file: &LocalFile, bar: Option<&progress::Bar>) -> Result<()> {
    let before = bar.map_or(0, progress::Bar::position);
    let unread = Mutex::new(None);
    let sent = client
        .unary(file.clone(), async |request| {
            if let Some(bar) = bar {
                bar.set_position(before);
            }
            let (parts, receiver) = tokio::sync::mpsc::channel(4);
            let mut blobs = client.blobs();
            let (fed, written) = tokio::join!(
                feed(request.get_ref(), parts, bar),
                blobs.write_blob(ReceiverStream::new(receiver))
            );
            *unread.lock().unwrap_or_else(PoisonError::into_inner) = fed.err();
            written
        })
        .await;
    match unread.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => sent.map(drop).map_err(refusal),
    }
}

/// A blob that comes twice is the same blob.
impl Repeatable for LocalFile {
    fn is_repeatable(&self) -> bool {
        true
    }
}

/// Reads a file into the messages of an upload.
async fn feed(file: &LocalFile, parts: Sender<WriteBlobRequest>, bar: Option<&progress::Bar>) -> Result<()> {
    let mut source = file.open()?;
    let mut next =
        WriteBlobRequest { digest: file.digest.clone(), size: file.size, data: next_part(&mut source)? };
    // An empty file is a first message without bytes.
    loop {
        let length = next.data.len() as u64;
        // Whoever does not take it any more says why.
        if parts.send(std::mem::take(&mut next)).await.is_err() {
            return Ok(());
        }
        if let Some(bar) = bar {
            bar.inc(length);
        }
        next.data = next_part(&mut source)?;
        if next.data.is_empty() {
            return Ok(());
        }
    }
}

fn next_part(source: &mut impl Read) -> Result<Bytes> {
    let mut part = Vec::with_capacity(PART);
    source.take(PART as u64).read_to_end(&mut part)?;
    Ok(part.into())
}

/// Fetches a checkpoint's file, and compares its size and its hash with what was announced.
///
/// # Errors
/// If it is another, or what the coordinator says.
pub(crate) async fn fetch(client: &Client, file: &CheckpointFile) -> Result<Vec<u8>> {
    check_name(&file.name)?;
    let request = ReadBlobRequest { digest: file.digest.clone(), offset: 0 };
    let refused =
        |status: &tonic::Status| refusal(problem_of(status)).context(format!("cannot fetch {}", file.name));
    let mut parts = client.blobs().read_blob(request).await.map_err(|status| refused(&status))?.into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = parts.message().await.map_err(|status| refused(&status))? {
        bytes.extend_from_slice(&part.data);
        if bytes.len() as u64 > file.size {
            break;
        }
    }
    let found = blake3::hash(&bytes).to_hex();
    if bytes.len() as u64 != file.size || found.as_str() != file.digest {
        return Err(anyhow!(
            "{} is damaged: {} bytes came with the BLAKE3 hash {found}, and there should be {} with {}; nothing was written; see \
             `incipit checkpoint verify`",
            file.name,
            bytes.len(),
            file.size,
            file.digest
        ));
    }
    Ok(bytes)
}

/// A file's name that leads out of the directory, or deeper than to a task's, is not used.
fn check_name(name: &str) -> Result<()> {
    let plain = |part: &str| {
        Path::new(part).file_name().is_some_and(|plain| plain == part)
            && !part.contains(['/', '\\', '\0', '\n'])
    };
    let (task, file) = name.split_once('/').map_or((None, name), |(task, file)| (Some(task), file));
    if task.is_none_or(plain) && plain(file) {
        return Ok(());
    }
    bail!("the checkpoint has a file named {name:?}, which is no plain name; nothing was written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, b"bytes").unwrap();
        let file = LocalFile::read(&path).unwrap();
        assert_eq!((file.size, file.digest), (5, blake3::hash(b"bytes").to_hex().to_string()));
        let error = LocalFile::read(&dir.path().join("b.jsonl")).unwrap_err();
        assert!(error.to_string().contains("b.jsonl"), "{error}");
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in ["", "..", "../x", "a/..", "/etc/x", "a/b/c", "a\\b", ".", "a\nb", "a/", "/b"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        check_name("prompt.safetensors").unwrap();
        check_name("boolq/prompt.safetensors").unwrap();
    }

    #[test]
    fn parts_are_a_message_long_at_most() {
        let mut source: &[u8] = &vec![7; PART + 3];
        let lengths: Vec<usize> = (0..3).map(|_| next_part(&mut source).unwrap().len()).collect();
        assert_eq!(lengths, [PART, 3, 0]);
    }
}
