//! The backbones' service.

use incipit_proto::{
    names::BackboneName,
    v1::{
        Backbone, CreateBackboneRequest, DeleteBackboneRequest, GetBackboneRequest, ListBackbonesRequest,
        ListBackbonesResponse, RetryBackboneRequest, UpdateBackboneRequest,
        backbone_service_server::BackboneService,
    },
};
use pbjson_types::Empty;
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
pub(crate) struct Backbones(pub(crate) Context);

fn backbone_of(reply: Reply) -> Result<Response<Backbone>, Status> {
    match reply {
        Reply::Backbone(view) => Ok(Response::new(wire::backbone(&view))),
        other => Err(unexpected(&other).into()),
    }
}

#[tonic::async_trait]
impl BackboneService for Backbones {
    async fn create_backbone(
        &self,
        request: Request<CreateBackboneRequest>,
    ) -> Result<Response<Backbone>, Status> {
        let asked = wire::create_backbone(request.get_ref(), &self.0.roots)?;
        let name = format!("backbones/{}", request.get_ref().backbone_id);
        backbone_of(ask(&self.0, &request, &name, asked).await?)
    }

    async fn get_backbone(&self, request: Request<GetBackboneRequest>) -> Result<Response<Backbone>, Status> {
        let name = BackboneName::parse("name", &request.get_ref().name)?;
        let view = self.0.handle.read(move |core, _| core.backbone_view(&name)).await??;
        Ok(Response::new(wire::backbone(&view)))
    }

    async fn list_backbones(
        &self,
        request: Request<ListBackbonesRequest>,
    ) -> Result<Response<ListBackbonesResponse>, Status> {
        let ListBackbonesRequest { page_size, page_token } = request.into_inner();
        let list = move |core: &Core, _| core.list_backbones(page_size, &page_token);
        let page = self.0.handle.read(list).await??;
        let backbones = page.items.iter().map(wire::backbone).collect();
        Ok(Response::new(ListBackbonesResponse { backbones, next_page_token: page.next_page_token }))
    }

    async fn update_backbone(
        &self,
        request: Request<UpdateBackboneRequest>,
    ) -> Result<Response<Backbone>, Status> {
        let asked = wire::update_backbone(request.get_ref())?;
        let name = request.get_ref().backbone.as_ref().map_or("", |backbone| &backbone.name);
        backbone_of(ask(&self.0, &request, name, asked).await?)
    }

    async fn retry_backbone(
        &self,
        request: Request<RetryBackboneRequest>,
    ) -> Result<Response<Backbone>, Status> {
        let asked = wire::retry_backbone(request.get_ref())?;
        backbone_of(ask(&self.0, &request, &request.get_ref().name, asked).await?)
    }

    async fn delete_backbone(
        &self,
        request: Request<DeleteBackboneRequest>,
    ) -> Result<Response<Empty>, Status> {
        let asked = wire::delete_backbone(request.get_ref())?;
        ask(&self.0, &request, &request.get_ref().name, asked).await?;
        Ok(Response::new(Empty {}))
    }
}
