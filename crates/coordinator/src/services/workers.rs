//! The workers' service.

use incipit_proto::{
    names::WorkerName,
    v1::{
        DrainWorkerRequest, GetWorkerRequest, ListWorkersRequest, ListWorkersResponse, Worker,
        worker_service_server::WorkerService,
    },
};
use tonic::{Request, Response, Status};

use super::{
    Context,
    ask::{ask, unexpected},
};
use crate::{
    core::{Core, effects::Reply},
    wire,
};

/// Implements the service.
#[derive(Clone, Debug)]
pub(crate) struct Workers(pub(crate) Context);

#[tonic::async_trait]
impl WorkerService for Workers {
    async fn get_worker(&self, request: Request<GetWorkerRequest>) -> Result<Response<Worker>, Status> {
        let name = WorkerName::parse("name", &request.get_ref().name)?;
        let view = self.0.handle.read(move |core, _| core.worker_view(&name)).await??;
        Ok(Response::new(wire::worker(&view)))
    }

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        let ListWorkersRequest { page_size, page_token } = request.into_inner();
        let list = move |core: &Core, _| core.list_workers(page_size, &page_token);
        let page = self.0.handle.read(list).await??;
        let workers = page.items.iter().map(wire::worker).collect();
        Ok(Response::new(ListWorkersResponse { workers, next_page_token: page.next_page_token }))
    }

    async fn drain_worker(&self, request: Request<DrainWorkerRequest>) -> Result<Response<Worker>, Status> {
        let asked = wire::drain_worker(request.get_ref())?;
        match ask(&self.0, &request, &request.get_ref().name, asked).await? {
            Reply::Worker(view) => Ok(Response::new(wire::worker(&view))),
            other => Err(unexpected(&other).into()),
        }
    }
}
