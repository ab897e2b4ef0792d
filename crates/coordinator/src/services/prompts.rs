//! The prompts' service.

use incipit_proto::{
    names::PromptName,
    v1::{
        DeletePromptVersionRequest, GetPromptVersionRequest, ListPromptVersionsRequest,
        ListPromptVersionsResponse, PromotePromptRequest, PromptVersion,
        prompt_service_server::PromptService,
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
pub(crate) struct Prompts(pub(crate) Context);

#[tonic::async_trait]
impl PromptService for Prompts {
    async fn promote_prompt(
        &self,
        request: Request<PromotePromptRequest>,
    ) -> Result<Response<PromptVersion>, Status> {
        let asked = wire::promote_prompt(request.get_ref())?;
        match ask(&self.0, &request, &request.get_ref().prompt, asked).await? {
            Reply::Prompt(version) => Ok(Response::new(wire::prompt_version(&version))),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn get_prompt_version(
        &self,
        request: Request<GetPromptVersionRequest>,
    ) -> Result<Response<PromptVersion>, Status> {
        let (prompt, version) = wire::version_ref("name", &request.get_ref().name)?;
        let get = move |core: &Core, _| core.prompt_version(&prompt, version).cloned();
        let version = self.0.handle.read(get).await??;
        Ok(Response::new(wire::prompt_version(&version)))
    }

    async fn list_prompt_versions(
        &self,
        request: Request<ListPromptVersionsRequest>,
    ) -> Result<Response<ListPromptVersionsResponse>, Status> {
        let ListPromptVersionsRequest { parent, page_size, page_token } = request.into_inner();
        let prompt = if parent == "prompts/-" { None } else { Some(PromptName::parse("parent", &parent)?) };
        let list = move |core: &Core, _| core.list_versions(prompt.as_ref(), page_size, &page_token);
        let page = self.0.handle.read(list).await??;
        let versions = page.items.iter().map(wire::prompt_version).collect();
        Ok(Response::new(ListPromptVersionsResponse { versions, next_page_token: page.next_page_token }))
    }

    async fn delete_prompt_version(
        &self,
        request: Request<DeletePromptVersionRequest>,
    ) -> Result<Response<Empty>, Status> {
        let asked = wire::delete_prompt_version(request.get_ref())?;
        ask(&self.0, &request, &request.get_ref().name, asked).await?;
        Ok(Response::new(Empty {}))
    }
}
