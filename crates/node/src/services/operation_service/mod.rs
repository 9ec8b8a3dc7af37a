//! OperationService: what users do through a web interface. Each call makes objects in a quarantine, asks whoever has a
//! say, GitLab and custom hooks, and moves one reference.

mod apply_patch;
mod branches;
mod cherry_pick;
mod commit_files;
mod commit_object;
mod conflicts;
mod content;
mod edited_tree;
mod fast_forward;
mod hooks;
mod mail;
mod merge_branch;
mod picking;
mod rebase;
mod rebase_confirmable;
mod revert;
mod signature;
mod squash;
pub(super) mod start;
mod submodule;
mod tags;
mod to_ref;
mod tree_edit;
mod update;

use std::{sync::Arc, time::Duration};

use tabularium_proto::gitaly::{
    UserApplyPatchRequest, UserApplyPatchResponse, UserCherryPickRequest, UserCherryPickResponse,
    UserCommitFilesRequest, UserCommitFilesResponse, UserCreateBranchRequest, UserCreateBranchResponse,
    UserCreateTagRequest, UserCreateTagResponse, UserDeleteBranchRequest, UserDeleteBranchResponse,
    UserDeleteTagRequest, UserDeleteTagResponse, UserFfBranchRequest, UserFfBranchResponse,
    UserMergeBranchRequest, UserMergeBranchResponse, UserMergeToRefRequest, UserMergeToRefResponse,
    UserRebaseConfirmableRequest, UserRebaseConfirmableResponse, UserRebaseToRefRequest,
    UserRebaseToRefResponse, UserRevertRequest, UserRevertResponse, UserSquashRequest, UserSquashResponse,
    UserUpdateBranchRequest, UserUpdateBranchResponse, UserUpdateSubmoduleRequest,
    UserUpdateSubmoduleResponse, operation_service_server::OperationService,
};
use tonic::{Request, Response, Status, Streaming};

pub(crate) use conflicts::ConflictsServer;

use super::{listing, streams::ResponseStream};
use crate::{node::Node, peer::Peers, votes::Voter};

/// How long a client may think about what it was shown before it confirms it. Its quarantine is kept that long.
const CONFIRMATION_WAIT: Duration = Duration::from_secs(600);

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
        let (metadata, extensions, requests) = request.into_parts();
        commit_files::commit_files(&self.0, requests, &Peers::of(metadata, extensions), &voter).await
    }

    async fn user_merge_branch(
        &self,
        request: Request<Streaming<UserMergeBranchRequest>>,
    ) -> Result<Response<ResponseStream<UserMergeBranchResponse>>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| Status::internal("EOF"))?;
        let repository = self.0.storages.open(first.repository.as_ref())?;
        merge_branch::check(&first)?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "UserMergeBranch", |messages| {
            merge_branch::merge_branch(node, repository, voter, first, requests, messages)
        }))
    }

    async fn user_ff_branch(
        &self,
        request: Request<UserFfBranchRequest>,
    ) -> Result<Response<UserFfBranchResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        fast_forward::fast_forward(&self.0, request.into_inner(), &voter).await
    }

    async fn user_merge_to_ref(
        &self,
        request: Request<UserMergeToRefRequest>,
    ) -> Result<Response<UserMergeToRefResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        to_ref::merge_to_ref(&self.0, request.into_inner(), &voter).await
    }

    async fn user_rebase_to_ref(
        &self,
        request: Request<UserRebaseToRefRequest>,
    ) -> Result<Response<UserRebaseToRefResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        to_ref::rebase_to_ref(&self.0, request.into_inner(), &voter).await
    }

    async fn user_cherry_pick(
        &self,
        request: Request<UserCherryPickRequest>,
    ) -> Result<Response<UserCherryPickResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, extensions, message) = request.into_parts();
        cherry_pick::cherry_pick(&self.0, message, &Peers::of(metadata, extensions), &voter).await
    }

    async fn user_revert(
        &self,
        request: Request<UserRevertRequest>,
    ) -> Result<Response<UserRevertResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, extensions, message) = request.into_parts();
        revert::revert(&self.0, message, &Peers::of(metadata, extensions), &voter).await
    }

    async fn user_squash(
        &self,
        request: Request<UserSquashRequest>,
    ) -> Result<Response<UserSquashResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        squash::squash(&self.0, request.into_inner(), &voter).await
    }

    async fn user_rebase_confirmable(
        &self,
        request: Request<Streaming<UserRebaseConfirmableRequest>>,
    ) -> Result<Response<ResponseStream<UserRebaseConfirmableResponse>>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, extensions, mut requests) = request.into_parts();
        let first = requests.message().await?.ok_or_else(|| Status::internal("EOF"))?;
        let header = rebase_confirmable::header(first)?;
        let repository = self.0.storages.open(header.repository.as_ref())?;
        rebase_confirmable::check(&header)?;
        let peers = Peers::of(metadata, extensions);
        let caller = rebase_confirmable::Caller { node: Arc::clone(&self.0), peers, voter };
        Ok(listing::stream(&self.0.tasks, "UserRebaseConfirmable", |messages| {
            rebase_confirmable::rebase_confirmable(caller, repository, header, requests, messages)
        }))
    }

    async fn user_apply_patch(
        &self,
        request: Request<Streaming<UserApplyPatchRequest>>,
    ) -> Result<Response<UserApplyPatchResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        apply_patch::apply_patch(&self.0, request.into_inner(), &voter).await
    }

    async fn user_update_submodule(
        &self,
        request: Request<UserUpdateSubmoduleRequest>,
    ) -> Result<Response<UserUpdateSubmoduleResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        submodule::update_submodule(&self.0, request.into_inner(), &voter).await
    }
}
