//! OperationService: what users do through a web interface. Each call makes objects in a quarantine, asks the
//! repository's custom hooks, and moves one reference.
//!
//! There are no access checks here: whoever may call the node may do everything.

mod branches;
mod commit_files;
mod commit_object;
mod content;
mod hooks;
mod merge;
mod signature;
mod tags;
mod tree_edit;
mod update;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    UserCommitFilesRequest, UserCommitFilesResponse, UserCreateBranchRequest, UserCreateBranchResponse,
    UserCreateTagRequest, UserCreateTagResponse, UserDeleteBranchRequest, UserDeleteBranchResponse,
    UserDeleteTagRequest, UserDeleteTagResponse, UserMergeBranchRequest, UserMergeBranchResponse,
    UserUpdateBranchRequest, UserUpdateBranchResponse, operation_service_server::OperationService,
};
use tonic::{Request, Response, Status, Streaming};

use super::{listing, streams::ResponseStream};
use crate::{node::Node, votes::Voter};

/// The service.
pub(crate) struct OperationServer(Arc<Node>);

impl OperationServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl OperationService for OperationServer {
    async fn user_create_branch(
        &self,
        request: Request<UserCreateBranchRequest>,
    ) -> Result<Response<UserCreateBranchResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        branches::create(&self.0, request.into_inner(), &voter).await
    }

    async fn user_update_branch(
        &self,
        request: Request<UserUpdateBranchRequest>,
    ) -> Result<Response<UserUpdateBranchResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        branches::update_branch(&self.0, request.into_inner(), &voter).await
    }

    async fn user_delete_branch(
        &self,
        request: Request<UserDeleteBranchRequest>,
    ) -> Result<Response<UserDeleteBranchResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        branches::delete(&self.0, request.into_inner(), &voter).await
    }

    async fn user_create_tag(
        &self,
        request: Request<UserCreateTagRequest>,
    ) -> Result<Response<UserCreateTagResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        tags::create(&self.0, request.into_inner(), &voter).await
    }

    async fn user_delete_tag(
        &self,
        request: Request<UserDeleteTagRequest>,
    ) -> Result<Response<UserDeleteTagResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        tags::delete(&self.0, request.into_inner(), &voter).await
    }

    async fn user_commit_files(
        &self,
        request: Request<Streaming<UserCommitFilesRequest>>,
    ) -> Result<Response<UserCommitFilesResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        commit_files::commit_files(&self.0, request.into_inner(), &voter).await
    }

    async fn user_merge_branch(
        &self,
        request: Request<Streaming<UserMergeBranchRequest>>,
    ) -> Result<Response<ResponseStream<UserMergeBranchResponse>>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| Status::internal("EOF"))?;
        let repository = self.0.storages.open(first.repository.as_ref())?;
        merge::check(&first)?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "UserMergeBranch", |messages| {
            merge::merge(node, repository, voter, first, requests, messages)
        }))
    }
}
