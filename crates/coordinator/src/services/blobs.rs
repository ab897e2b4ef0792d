//! The blobs' service.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _};
use incipit_proto::{
    Problem,
    v1::{
        FindBlobsRequest, FindBlobsResponse, ReadBlobRequest, ReadBlobResponse, WriteBlobRequest,
        WriteBlobResponse, blob_service_server::BlobService,
    },
};
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Context, pages::Out};
use crate::{
    blobs::{Digest, Upload},
    doors::{Subject, about},
};

/// Digests of one question, at most.
const DIGESTS: usize = 1000;

/// Bytes of one message, at most.
const PART: usize = 1 << 20;

/// Uploads at once; others wait. Each holds up to three parts of 8 MiB.
const UPLOADS: usize = 32;

/// How long an upload may say nothing.
const SILENCE: Duration = Duration::from_secs(30);

/// Implements the service.
#[derive(Clone, Debug)]
pub(crate) struct Blobs {
    context: Context,
    uploads: Arc<Semaphore>,
}

impl Blobs {
    pub(crate) fn new(context: Context) -> Self {
        Self { context, uploads: Arc::new(Semaphore::new(UPLOADS)) }
    }
}

#[tonic::async_trait]
impl BlobService for Blobs {
    async fn find_blobs(
        &self,
        request: Request<FindBlobsRequest>,
    ) -> Result<Response<FindBlobsResponse>, Status> {
        let digests = request.into_inner().digests;
        if digests.len() > DIGESTS {
            let what = format!("has {} digests; ask for {DIGESTS} at once", digests.len());
            return Err(Problem::field("digests", what).into());
        }
        let digests = digests.iter().map(|digest| Digest::parse("digests", digest));
        let digests = digests.collect::<Result<Vec<_>, _>>()?;
        let missing = self.context.blobs.wanting(digests).await.map_err(Problem::from)?;
        let missing = missing.into_iter().map(|digest| digest.to_string()).collect();
        Ok(Response::new(FindBlobsResponse { missing }))
    }

    async fn write_blob(
        &self,
        request: Request<Streaming<WriteBlobRequest>>,
    ) -> Result<Response<WriteBlobResponse>, Status> {
        let subject = request.extensions().get::<Subject>().cloned().unwrap_or_default();
        let (blobs, messages) = (self.context.blobs.clone(), request.into_inner());
        let permit = Arc::clone(&self.uploads).acquire_owned().await;
        // In a task of its own: if the caller goes away, this is told, and what came is thrown away properly.
        let task = tokio::spawn(async move {
            let _permit = permit;
            receive(blobs, messages, subject).await
        });
        let size = task
            .await
            .map_err(|_| Problem::new(Code::Internal, "BROKE", "the upload broke off; try again"))??;
        Ok(Response::new(WriteBlobResponse { size }))
    }

    type ReadBlobStream = Out<ReadBlobResponse>;

    async fn read_blob(
        &self,
        request: Request<ReadBlobRequest>,
    ) -> Result<Response<Self::ReadBlobStream>, Status> {
        about(&request, &request.get_ref().digest);
        let ReadBlobRequest { digest, offset } = request.into_inner();
        let digest = Digest::parse("digest", &digest)?;
        let chunks = self.context.blobs.read(&digest, offset).await.map_err(Problem::from)?;
        let messages = chunks.map_ok(|chunk| {
            let parts = (0..chunk.len()).step_by(PART).map(move |start| {
                let end = chunk.len().min(start + PART);
                Ok(ReadBlobResponse { data: chunk.slice(start..end) })
            });
            futures::stream::iter(parts)
        });
        let messages = messages.map_err(|error| Status::from(Problem::from(error))).try_flatten();
        Ok(Response::new(messages.boxed()))
    }
}

async fn receive(
    blobs: crate::blobs::Blobs,
    mut messages: Streaming<WriteBlobRequest>,
    subject: Subject,
) -> Result<u64, Status> {
    let Some(first) = soon(SILENCE, messages.message()).await? else {
        return Err(Problem::field("digest", "is missing; the first message says which blob it is").into());
    };
    let digest = Digest::parse("digest", &first.digest)?;
    subject.set(digest.as_str());
    let mut upload = blobs.write(digest, first.size).await.map_err(Problem::from)?;
    let mut next = Some(first);
    while let Some(message) = next {
        if let Err(status) = take(&mut upload, message).await {
            upload.abort().await;
            return Err(status);
        }
        next = match soon(SILENCE, messages.message()).await {
            Ok(message) => message,
            Err(status) => {
                upload.abort().await;
                return Err(status);
            }
        };
    }
    upload.finish().await.map_err(|error| Problem::from(error).into())
}

/// What comes next of an upload, unless that takes too long: it holds a place that others wait for.
async fn soon<T>(
    silence: Duration,
    message: impl Future<Output = Result<T, Status>> + Send,
) -> Result<T, Status> {
    tokio::time::timeout(silence, message).await.unwrap_or_else(|_| {
        let what = format!("nothing of the upload came for {} s; send it again", silence.as_secs_f32());
        Err(Problem::new(Code::DeadlineExceeded, "UPLOAD_SILENT", what).into())
    })
}

async fn take(upload: &mut Upload, message: WriteBlobRequest) -> Result<(), Status> {
    if message.data.len() > PART {
        let what = format!("has {} bytes; send {PART} at once, at most", message.data.len());
        return Err(Problem::field("data", what).into());
    }
    upload.put(message.data).await.map_err(|error| Problem::from(error).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_upload_that_says_nothing_gives_its_place_up() {
        let silence = Duration::from_millis(5);
        let silent = std::future::pending::<Result<Option<WriteBlobRequest>, Status>>();
        let status = soon(silence, silent).await.unwrap_err();
        assert!(status.message().contains("send it again"), "{status}");
        assert_eq!(Problem::from(&status).reason, "UPLOAD_SILENT");
        assert_eq!(soon(silence, std::future::ready(Ok(7))).await.unwrap(), 7);
    }
}
