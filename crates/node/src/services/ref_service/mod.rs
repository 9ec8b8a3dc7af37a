//! RefService: listing, finding, moving and deleting references.

mod list;
mod names;
mod tags;
mod write;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    Branch, DeleteRefsRequest, DeleteRefsResponse, FindAllBranchesRequest, FindAllBranchesResponse,
    FindAllRemoteBranchesRequest, FindAllRemoteBranchesResponse, FindAllTagsRequest, FindAllTagsResponse,
    FindBranchRequest, FindBranchResponse, FindDefaultBranchNameRequest, FindDefaultBranchNameResponse,
    FindLocalBranchesRequest, FindLocalBranchesResponse, FindRefsByOidRequest, FindRefsByOidResponse,
    FindTagError, FindTagRequest, FindTagResponse, GetTagMessagesRequest, GetTagMessagesResponse,
    GetTagSignaturesRequest, GetTagSignaturesResponse, ListBranchNamesContainingCommitRequest,
    ListBranchNamesContainingCommitResponse, ListRefsRequest, ListRefsResponse,
    ListTagNamesContainingCommitRequest, ListTagNamesContainingCommitResponse, RefExistsRequest,
    RefExistsResponse, ReferenceNotFoundError, UpdateReferencesRequest, UpdateReferencesResponse,
    find_tag_error, ref_service_server::RefService,
};
use tonic::{Code, Request, Response, Status, Streaming};

use super::streams::ResponseStream;
use crate::{
    error::with_detail,
    git::{catfile::CatFile, references, revision},
    node::Node,
    votes::Voter,
};

/// The service.
pub(crate) struct RefServer(Arc<Node>);

impl RefServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl RefService for RefServer {
    async fn find_default_branch_name(
        &self,
        request: Request<FindDefaultBranchNameRequest>,
    ) -> Result<Response<FindDefaultBranchNameResponse>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        let name = if request.head_only {
            references::head_target(&self.0.git, &repository).await?
        } else {
            references::default_branch(&self.0.git, &repository).await?
        };
        Ok(Response::new(FindDefaultBranchNameResponse { name: name.unwrap_or_default() }))
    }

    async fn list_refs(
        &self,
        request: Request<ListRefsRequest>,
    ) -> Result<Response<ResponseStream<ListRefsResponse>>, Status> {
        list::list_refs(&self.0, &request.into_inner())
    }

    async fn find_local_branches(
        &self,
        request: Request<FindLocalBranchesRequest>,
    ) -> Result<Response<ResponseStream<FindLocalBranchesResponse>>, Status> {
        list::find_local_branches(&self.0, &request.into_inner())
    }

    async fn find_all_branches(
        &self,
        request: Request<FindAllBranchesRequest>,
    ) -> Result<Response<ResponseStream<FindAllBranchesResponse>>, Status> {
        list::find_all_branches(&self.0, request.into_inner())
    }

    async fn find_all_remote_branches(
        &self,
        request: Request<FindAllRemoteBranchesRequest>,
    ) -> Result<Response<ResponseStream<FindAllRemoteBranchesResponse>>, Status> {
        list::find_all_remote_branches(&self.0, &request.into_inner())
    }

    async fn find_refs_by_oid(
        &self,
        request: Request<FindRefsByOidRequest>,
    ) -> Result<Response<FindRefsByOidResponse>, Status> {
        names::find_refs_by_oid(&self.0, request.into_inner()).await
    }

    async fn list_branch_names_containing_commit(
        &self,
        request: Request<ListBranchNamesContainingCommitRequest>,
    ) -> Result<Response<ResponseStream<ListBranchNamesContainingCommitResponse>>, Status> {
        names::branches_containing(&self.0, request.into_inner()).await
    }

    async fn list_tag_names_containing_commit(
        &self,
        request: Request<ListTagNamesContainingCommitRequest>,
    ) -> Result<Response<ResponseStream<ListTagNamesContainingCommitResponse>>, Status> {
        names::tags_containing(&self.0, request.into_inner()).await
    }

    async fn get_tag_messages(
        &self,
        request: Request<GetTagMessagesRequest>,
    ) -> Result<Response<ResponseStream<GetTagMessagesResponse>>, Status> {
        tags::get_tag_messages(&self.0, request.into_inner())
    }

    async fn get_tag_signatures(
        &self,
        request: Request<GetTagSignaturesRequest>,
    ) -> Result<Response<ResponseStream<GetTagSignaturesResponse>>, Status> {
        tags::get_tag_signatures(&self.0, request.into_inner())
    }

    async fn find_all_tags(
        &self,
        request: Request<FindAllTagsRequest>,
    ) -> Result<Response<ResponseStream<FindAllTagsResponse>>, Status> {
        list::find_all_tags(&self.0, &request.into_inner())
    }

    async fn find_branch(
        &self,
        request: Request<FindBranchRequest>,
    ) -> Result<Response<FindBranchResponse>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if request.name.is_empty() {
            return Err(Status::invalid_argument("Branch name cannot be empty"));
        }
        let reference = [b"refs/heads/", request.name.as_slice()].concat();
        let Some(id) = references::read(&self.0.git, &repository, &reference).await? else {
            return Ok(Response::new(FindBranchResponse { branch: None }));
        };
        let mut objects = CatFile::start(&self.0.git, &repository).await?;
        let target_commit = list::branch_commit(&mut objects, &id).await?;
        objects.close().await?;
        let name = reference.strip_prefix(b"refs/heads/").unwrap_or(&reference).to_vec();
        Ok(Response::new(FindBranchResponse { branch: Some(Branch { name, target_commit }) }))
    }

    async fn find_tag(&self, request: Request<FindTagRequest>) -> Result<Response<FindTagResponse>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if request.tag_name.is_empty() {
            return Err(Status::invalid_argument("tag name is empty"));
        }
        revision::check(&request.tag_name).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let reference = revision::tag_reference(&request.tag_name);
        let Some(id) = references::read(&self.0.git, &repository, &reference).await? else {
            let detail = FindTagError {
                error: Some(find_tag_error::Error::TagNotFound(ReferenceNotFoundError {
                    reference_name: reference,
                })),
            };
            return Err(with_detail(Code::NotFound, "tag does not exist", "FindTagError", &detail));
        };
        let mut objects = CatFile::start(&self.0.git, &repository).await?;
        let tag = objects.tag(&id, &request.tag_name).await?;
        let tag = Some(tag.ok_or_else(|| Status::internal(format!("object {id} is missing")))?);
        objects.close().await?;
        Ok(Response::new(FindTagResponse { tag }))
    }

    async fn ref_exists(
        &self,
        request: Request<RefExistsRequest>,
    ) -> Result<Response<RefExistsResponse>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if !request.r#ref.starts_with(b"refs/") {
            return Err(Status::invalid_argument("invalid refname"));
        }
        let value = references::read(&self.0.git, &repository, &request.r#ref).await?.is_some();
        Ok(Response::new(RefExistsResponse { value }))
    }

    async fn delete_refs(
        &self,
        request: Request<DeleteRefsRequest>,
    ) -> Result<Response<DeleteRefsResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        write::delete_refs(&self.0, request.into_inner(), &voter).await
    }

    async fn update_references(
        &self,
        request: Request<Streaming<UpdateReferencesRequest>>,
    ) -> Result<Response<UpdateReferencesResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        write::update_references(&self.0, request.into_inner(), &voter).await
    }
}
