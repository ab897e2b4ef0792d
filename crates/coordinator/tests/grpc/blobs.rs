//! Blobs, over gRPC.

use super::common::*;
use incipit_coordinator::{Config, Limits};
use incipit_proto::{
    Problem,
    client::Client,
    v1::{
        self, CollectGarbageRequest, FindBlobsRequest, ReadBlobRequest, WriteBlobRequest, attach_response,
        data_source::Source, job_report::Report,
    },
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::{Code, Status};

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("incipit-blobs") {
            continue;
        }
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

fn bytes(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(b"blob").finalize_xof().fill(&mut bytes);
    bytes
}

async fn read(client: &Client, digest: &str, offset: u64) -> Result<Vec<u8>, Status> {
    let request = ReadBlobRequest { digest: digest.to_owned(), offset };
    let mut stream = client.blobs().read_blob(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = stream.message().await? {
        assert!(part.data.len() <= 1 << 20);
        bytes.extend_from_slice(&part.data);
    }
    Ok(bytes)
}

fn reason(status: &Status) -> (Code, String) {
    (status.code(), Problem::from(status).reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_small_and_large_and_empty_come_back_from_any_offset() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    for length in [0, 1, 1 << 20, (20 << 20) + 3] {
        let bytes = bytes(length);
        let digest = upload(&client, &bytes).await.unwrap();
        assert_eq!(read(&client, &digest, 0).await.unwrap(), bytes);
        let offset = length - length / 3;
        assert_eq!(read(&client, &digest, offset as u64).await.unwrap(), bytes[offset..]);
        assert!(read(&client, &digest, length as u64 + 1).await.unwrap().is_empty());
        let path = dir.path().join("blobs").join(&digest[..2]).join(&digest[2..]);
        assert_eq!(fs::read(path).unwrap(), bytes);
        let request = FindBlobsRequest { digests: vec![digest, "0".repeat(64)] };
        let missing = client.blobs().find_blobs(request).await.unwrap().into_inner().missing;
        assert_eq!(missing, ["0".repeat(64)]);
    }
    assert_eq!(reason(&read(&client, &"0".repeat(64), 0).await.unwrap_err()).0, Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_another_hash_or_size_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { max_blob_bytes: 30 << 20, ..Limits::default() };
    let running = start(Config { limits, ..config(dir.path()) }).await;
    let client = connect(&running).await;
    for length in [5usize, (9 << 20) + 5] {
        let bytes = bytes(length);
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let (wrong, size) = ("0".repeat(64), length as u64);
        let refused = upload_as(&client, &wrong, size, &bytes).await.unwrap_err();
        assert_eq!(reason(&refused), (Code::InvalidArgument, "BLOB_HASH".to_owned()));
        for announced in [size - 1, size + 1] {
            let refused = upload_as(&client, &digest, announced, &bytes).await.unwrap_err();
            assert_eq!(reason(&refused), (Code::InvalidArgument, "BLOB_SIZE".to_owned()));
        }
        let refused = upload_as(&client, &digest, 31 << 20, &bytes).await.unwrap_err();
        assert_eq!(reason(&refused), (Code::InvalidArgument, "BLOB_TOO_LARGE".to_owned()));
    }
    let part = WriteBlobRequest { digest: "0".repeat(64), size: 2 << 20, data: bytes(2 << 20).into() };
    let refused = client.blobs().write_blob(tokio_stream::once(part)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let traversal = upload_as(&client, "../../etc/passwd", 1, b"x").await.unwrap_err();
    assert_eq!(traversal.code(), Code::InvalidArgument);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(files(&dir.path().join("blobs")), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_broken_off_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let bytes = bytes(12 << 20);
    let digest = blake3::hash(&bytes).to_hex().to_string();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let uploading = tokio::spawn({
        let client = client.clone();
        async move { client.blobs().write_blob(tokio_stream::wrappers::ReceiverStream::new(receiver)).await }
    });
    let size = bytes.len() as u64;
    sender.send(WriteBlobRequest { digest: digest.clone(), size, ..Default::default() }).await.unwrap();
    for part in bytes[..10 << 20].chunks(1 << 20) {
        sender.send(WriteBlobRequest { data: part.to_vec().into(), ..Default::default() }).await.unwrap();
    }
    uploading.abort();
    drop(sender);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if files(&dir.path().join("blobs")).is_empty() {
            return;
        }
    }
    panic!("left over: {:?}", files(&dir.path().join("blobs")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_is_healed_by_another_upload() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let digest = upload(&client, b"right").await.unwrap();
    let path = dir.path().join("blobs").join(&digest[..2]).join(&digest[2..]);
    fs::write(&path, b"wrong").unwrap();
    let find = async || {
        let request = FindBlobsRequest { digests: vec![digest.clone()] };
        client.blobs().find_blobs(request).await.unwrap().into_inner().missing
    };
    assert_eq!(find().await, [""; 0], "nobody has read it");
    let refused = read(&client, &digest, 0).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::DataLoss, "BLOB_DAMAGED".to_owned()));
    assert!(refused.message().contains(&digest) && refused.message().contains("upload"), "{refused}");
    // Whoever has the file uploads what is not there.
    assert_eq!(find().await, [&*digest]);
    upload(&client, b"right").await.unwrap();
    assert_eq!(find().await, [""; 0]);
    assert_eq!(read(&client, &digest, 0).await.unwrap(), b"right");
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_whose_disk_is_away_are_not_missing() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let digest = upload(&client, b"data").await.unwrap();
    let mut request = job_request("j");
    let train = request.job.as_mut().unwrap().spec.as_mut().unwrap().train.as_mut().unwrap();
    train.source = Some(Source::Digest(digest.clone()));
    client.jobs().create_job(request).await.unwrap();
    // What is left where a disk was mounted.
    let (blobs, away) = (dir.path().join("blobs"), dir.path().join("away"));
    fs::rename(&blobs, &away).unwrap();
    fs::create_dir(&blobs).unwrap();
    // What a coordinator left there that was started before the disk was mounted, and a directory of the file system's.
    fs::write(blobs.join("incipit-blobs"), "another").unwrap();
    fs::create_dir(blobs.join("lost+found")).unwrap();
    for refused in [read(&client, &digest, 0).await.map(drop), upload(&client, b"more").await.map(drop)] {
        let refused = refused.unwrap_err();
        assert_eq!(reason(&refused), (Code::Unavailable, "BLOB_STORE".to_owned()), "{refused}");
        assert!(refused.message().contains("mounted"), "{refused}");
    }
    assert_eq!(files(&blobs), [""; 0].map(PathBuf::from), "nothing is stored in its place");
    drop(running);
    let refused = serve_once(dir.path()).await.unwrap_err().to_string();
    assert!(refused.contains("not the directory") && refused.contains("mounted"), "{refused}");
    fs::remove_file(blobs.join("incipit-blobs")).unwrap();
    assert!(serve_once(dir.path()).await.is_err(), "nor is it where it has no marker");
    fs::remove_dir_all(&blobs).unwrap();
    fs::rename(&away, &blobs).unwrap();
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    assert_eq!(read(&client, &digest, 0).await.unwrap(), b"data");
    drop(running);
    // Who says that all is lost goes on without it.
    fs::remove_dir_all(&blobs).unwrap();
    fs::create_dir(&blobs).unwrap();
    fs::write(blobs.join("incipit-blobs"), "").unwrap();
    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let missing = read(&client, &digest, 0).await.unwrap_err();
    assert_eq!(reason(&missing), (Code::NotFound, "BLOB_MISSING".to_owned()));
    upload(&client, b"data").await.unwrap();
}

/// Whether a coordinator can be started again, as far as it comes.
async fn serve_once(dir: &Path) -> Result<(), incipit_coordinator::Error> {
    let mut outcome = Ok(());
    for _ in 0..100 {
        // The one before may have its directory still.
        outcome = incipit_coordinator::serve(config(dir), std::future::pending()).await.map(drop);
        match &outcome {
            Err(error) if error.to_string().contains("another coordinator") => {}
            _ => break,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_damaged_checkpoint_are_asked_for_until_they_are_verified_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let (mut agent, first) = training(&client).await;
    let digest = upload(&client, b"weights").await.unwrap();
    let file = v1::CheckpointFile { name: "prompt.safetensors".to_owned(), digest: digest.clone(), size: 7 };
    let saved = v1::CheckpointSaved { step: 5, files: vec![file], ..v1::CheckpointSaved::default() };
    agent.of_job(&first, Report::Saved(saved)).await;
    let left = |state: v1::JobState, reason: v1::JobReason| {
        Report::Left(v1::JobLeft { state: state.into(), reason: reason.into(), ..v1::JobLeft::default() })
    };
    agent.of_job(&first, left(v1::JobState::Queued, v1::JobReason::Requested)).await;
    let second = agent
        .until(|message| match message {
            attach_response::Message::Jobs(jobs) => {
                jobs.jobs.first().filter(|job| job.attempt == 2).cloned().map(|job| (jobs.clone(), job))
            }
            _ => None,
        })
        .await
        .unwrap();
    let damaged = left(v1::JobState::Failed, v1::JobReason::CheckpointDamaged);
    let last = agent.of_job(&second, damaged).await;
    agent.acknowledged(last).await.unwrap();
    let job = v1::GetJobRequest { name: "jobs/j".to_owned() };
    let job = client.jobs().get_job(job).await.unwrap().into_inner();
    assert_eq!((job.state(), job.reason()), (v1::JobState::Failed, v1::JobReason::CheckpointDamaged));
    drop((agent, running));

    let running = start(config(dir.path())).await;
    let client = connect(&running).await;
    let name = "jobs/j/checkpoints/00000005".to_owned();
    let state = async || {
        let request = v1::GetCheckpointRequest { name: name.clone(), task: String::new() };
        let checkpoint = client.checkpoints().get_checkpoint(request).await.unwrap().into_inner();
        let request = FindBlobsRequest { digests: vec![digest.clone()] };
        (checkpoint.damaged, client.blobs().find_blobs(request).await.unwrap().into_inner().missing)
    };
    assert_eq!(state().await, (true, vec![digest.clone()]));
    let path = dir.path().join("blobs").join(&digest[..2]).join(&digest[2..]);
    let verify = async || {
        let request = v1::VerifyCheckpointRequest { name: name.clone(), task: String::new() };
        client.checkpoints().verify_checkpoint(request).await.unwrap().into_inner().valid
    };
    fs::write(&path, b"wrongly").unwrap();
    assert!(!verify().await);
    assert_eq!(state().await, (true, vec![digest.clone()]));
    upload(&client, b"weights").await.unwrap();
    assert!(verify().await);
    assert_eq!(state().await, (false, Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_names_is_deleted_once_it_is_old() {
    use incipit_proto::v1::data_source::Source;
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let client = with_backbone(&running).await;
    let (data, old, new) = (
        upload(&client, b"data").await.unwrap(),
        upload(&client, b"old").await.unwrap(),
        upload(&client, b"new").await.unwrap(),
    );
    let mut request = job_request("j");
    let train = request.job.as_mut().unwrap().spec.as_mut().unwrap().train.as_mut().unwrap();
    train.source = Some(Source::Digest(data.clone()));
    client.jobs().create_job(request).await.unwrap();
    for digest in [&data, &old] {
        let file = fs::File::open(dir.path().join("blobs").join(&digest[..2]).join(&digest[2..])).unwrap();
        let then = std::time::SystemTime::now() - Duration::from_secs(2 * 3600);
        file.set_times(fs::FileTimes::new().set_modified(then)).unwrap();
    }
    for validate_only in [true, false] {
        let request = CollectGarbageRequest { validate_only };
        let garbage = client.checkpoints().collect_garbage(request).await.unwrap().into_inner();
        assert_eq!((garbage.digests, garbage.bytes), (vec![old.clone()], 3));
    }
    let request = FindBlobsRequest { digests: vec![data, old.clone(), new] };
    assert_eq!(client.blobs().find_blobs(request).await.unwrap().into_inner().missing, [old]);
}

/// A file system of 4 MiB at `dir/small`, until it is dropped; none where none can be mounted.
struct Small(PathBuf);

impl Small {
    fn mount(dir: &Path) -> Option<Self> {
        let place = dir.join("small");
        fs::create_dir(&place).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs"];
        let mounted = std::process::Command::new("mount").args(options).arg(&place).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(place));
        }
        eprintln!("SKIPPED: no tmpfs can be mounted here, so that no disk is full");
        None
    }

    fn config(&self, dir: &Path, min_free_bytes: u64) -> Config {
        let limits = Limits { min_free_bytes, ..Limits::default() };
        Config { blobs: Some(self.0.display().to_string()), limits, ..config(dir) }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_with_its_path_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(dir.path()) else { return };
    let running = start(small.config(dir.path(), 0)).await;
    let client = connect(&running).await;
    let outcomes = [upload(&client, &bytes(6 << 20)).await, upload(&client, &bytes(12 << 20)).await];
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(files(&small.0), Vec::<PathBuf>::new());
    upload(&client, b"there is room for this").await.unwrap();
    for outcome in outcomes {
        let status = outcome.unwrap_err();
        assert_eq!(reason(&status), (Code::ResourceExhausted, "NO_SPACE".to_owned()), "{status}");
        assert!(status.message().contains(&*small.0.display().to_string()), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_leave_the_coordinator_its_part_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(dir.path()) else { return };
    let running = start(small.config(dir.path(), 2 << 20)).await;
    let client = connect(&running).await;
    upload(&client, &bytes(1 << 20)).await.unwrap();
    let status = upload(&client, &bytes((1 << 20) + 1)).await.unwrap_err();
    assert_eq!(reason(&status), (Code::ResourceExhausted, "NO_SPACE".to_owned()), "{status}");
    for told in ["1048577 bytes", "limits.min_free_bytes keeps 2097152", "small"] {
        assert!(status.message().contains(told), "{status}");
    }
    upload(&client, b"there is room for this").await.unwrap();
    assert_eq!(files(&small.0).len(), 2);
}
