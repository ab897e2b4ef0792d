//! The checkpoints' service.

use std::{collections::BTreeSet, time::Duration};

use incipit_proto::{
    Problem,
    names::JobName,
    v1::{
        Checkpoint, CollectGarbageRequest, CollectGarbageResponse, DeleteCheckpointRequest,
        GetCheckpointRequest, ListCheckpointsRequest, ListCheckpointsResponse, PinCheckpointRequest,
        VerifyCheckpointRequest, VerifyCheckpointResponse, checkpoint_service_server::CheckpointService,
    },
};
use pbjson_types::Empty;
use tonic::{Request, Response, Status};

use super::{
    Context,
    ask::{ask, unexpected},
};
use crate::{
    blobs::{Digest, garbage},
    core::{self, Core, effects::Reply},
    wire,
};

/// How often what nothing names is deleted.
const SWEEP: Duration = Duration::from_secs(1800);

/// Implements the service.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints(pub(crate) Context);

impl Checkpoints {
    async fn get(&self, name: &str, task: &str) -> Result<core::Checkpoint, Problem> {
        let wanted = wire::checkpoint_ref("name", name, task)?;
        self.0.handle.read(move |core, _| core.find_checkpoint(&wanted).cloned()).await?
    }
}

#[tonic::async_trait]
impl CheckpointService for Checkpoints {
    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<Checkpoint>, Status> {
        let GetCheckpointRequest { name, task } = request.get_ref();
        let checkpoint = self.get(name, task).await?;
        Ok(Response::new(wire::checkpoint(&checkpoint)))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let ListCheckpointsRequest { parent, page_size, page_token } = request.into_inner();
        let job = JobName::parse("parent", &parent)?;
        let list = move |core: &Core, _| core.list_checkpoints(&job, page_size, &page_token);
        let page = self.0.handle.read(list).await??;
        let checkpoints = page.items.iter().map(wire::checkpoint).collect();
        Ok(Response::new(ListCheckpointsResponse { checkpoints, next_page_token: page.next_page_token }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<Empty>, Status> {
        let asked = wire::delete_checkpoint(request.get_ref())?;
        ask(&self.0, &request, &request.get_ref().name, asked).await?;
        Ok(Response::new(Empty {}))
    }

    async fn pin_checkpoint(
        &self,
        request: Request<PinCheckpointRequest>,
    ) -> Result<Response<Checkpoint>, Status> {
        let asked = wire::pin_checkpoint(request.get_ref())?;
        match ask(&self.0, &request, &request.get_ref().name, asked).await? {
            Reply::Checkpoint(checkpoint) => Ok(Response::new(wire::checkpoint(&checkpoint))),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn verify_checkpoint(
        &self,
        request: Request<VerifyCheckpointRequest>,
    ) -> Result<Response<VerifyCheckpointResponse>, Status> {
        let VerifyCheckpointRequest { name, task } = request.get_ref();
        let checkpoint = self.get(name, task).await?;
        let (mut problems, mut bytes) = (Vec::new(), 0);
        for file in &checkpoint.files {
            let digest = Digest::parse("digest", &file.digest)?;
            let (wrong, read) = self.0.blobs.verify(&digest, file.size).await.map_err(Problem::from)?;
            problems.extend(wrong.map(|wrong| format!("{}: {wrong}", file.name)));
            bytes += read;
        }
        let (name, valid) = (checkpoint.name(), problems.is_empty());
        if valid && checkpoint.damaged {
            let core::Checkpoint { job, step, .. } = checkpoint;
            self.0.handle.tell(core::Input::Verified { job, step }).await?;
        }
        Ok(Response::new(VerifyCheckpointResponse { name, valid, problems, bytes }))
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Result<Response<CollectGarbageResponse>, Status> {
        let garbage = collect(&self.0, request.get_ref().validate_only).await?;
        let digests = garbage.digests.iter().map(ToString::to_string).collect();
        Ok(Response::new(CollectGarbageResponse { digests, bytes: garbage.bytes }))
    }
}

async fn collect(context: &Context, dry_run: bool) -> Result<garbage::Garbage, Problem> {
    let named = || {
        let handle = context.handle.clone();
        let digests = |core: &Core, _| core.digests().map(str::to_owned).collect::<BTreeSet<_>>();
        async move { handle.read(digests).await }
    };
    let grace = Duration::from_secs(context.limits.garbage_seconds);
    garbage::collect(&context.blobs, grace, dry_run, named).await
}

/// Deletes what nothing names, again and again, until the coordinator ends.
pub(crate) async fn sweep(context: Context) {
    loop {
        tokio::select! {
            () = context.stopped() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        match collect(&context, false).await {
            Ok(garbage) if garbage.digests.is_empty() => {}
            Ok(garbage) => {
                tracing::info!("deleted {} blobs of {} bytes", garbage.digests.len(), garbage.bytes);
            }
            Err(problem) => tracing::warn!("blobs that nothing names could not be deleted: {problem}"),
        }
    }
}
