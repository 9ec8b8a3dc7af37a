//! CommitService: commits, their history, and the trees they hold.

mod history;
mod trees;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    CheckObjectsExistRequest, CheckObjectsExistResponse, CommitIsAncestorRequest, CommitIsAncestorResponse,
    CountCommitsRequest, CountCommitsResponse, FindCommitRequest, FindCommitResponse, GetTreeEntriesRequest,
    GetTreeEntriesResponse, ListCommitsByOidRequest, ListCommitsByOidResponse, ListCommitsRequest,
    ListCommitsResponse, ListFilesRequest, ListFilesResponse, TreeEntryRequest, TreeEntryResponse,
    check_objects_exist_response::RevisionExistence, commit_service_server::CommitService,
};
use tonic::{Request, Response, Status, Streaming};

use super::{listing, streams::ResponseStream};
use crate::{
    git::{catfile::CatFile, revision, revision::RevisionError},
    node::Node,
};

/// The service.
pub(crate) struct CommitServer(Arc<Node>);

impl CommitServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

fn invalid(error: RevisionError) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl CommitService for CommitServer {
    async fn find_commit(
        &self,
        request: Request<FindCommitRequest>,
    ) -> Result<Response<FindCommitResponse>, Status> {
        history::find_commit(&self.0, request.into_inner()).await
    }

    async fn list_commits(
        &self,
        request: Request<ListCommitsRequest>,
    ) -> Result<Response<ResponseStream<ListCommitsResponse>>, Status> {
        history::list_commits(&self.0, &request.into_inner())
    }

    async fn list_commits_by_oid(
        &self,
        request: Request<ListCommitsByOidRequest>,
    ) -> Result<Response<ResponseStream<ListCommitsByOidResponse>>, Status> {
        history::list_commits_by_oid(&self.0, request.into_inner())
    }

    async fn count_commits(
        &self,
        request: Request<CountCommitsRequest>,
    ) -> Result<Response<CountCommitsResponse>, Status> {
        history::count_commits(&self.0, request.into_inner()).await
    }

    async fn commit_is_ancestor(
        &self,
        request: Request<CommitIsAncestorRequest>,
    ) -> Result<Response<CommitIsAncestorResponse>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if request.ancestor_id.is_empty() {
            return Err(Status::invalid_argument("empty ancestor sha"));
        }
        if request.child_id.is_empty() {
            return Err(Status::invalid_argument("empty child sha"));
        }
        revision::check(request.ancestor_id.as_bytes()).map_err(invalid)?;
        revision::check(request.child_id.as_bytes()).map_err(invalid)?;
        let command = self.0.git.command(&repository, "merge-base").reads();
        let command = command.args(["--is-ancestor", &request.ancestor_id, &request.child_id]);
        let value = command.output().await?.exit.success();
        Ok(Response::new(CommitIsAncestorResponse { value }))
    }

    async fn tree_entry(
        &self,
        request: Request<TreeEntryRequest>,
    ) -> Result<Response<ResponseStream<TreeEntryResponse>>, Status> {
        trees::tree_entry(&self.0, request.into_inner())
    }

    async fn get_tree_entries(
        &self,
        request: Request<GetTreeEntriesRequest>,
    ) -> Result<Response<ResponseStream<GetTreeEntriesResponse>>, Status> {
        trees::get_tree_entries(&self.0, request.into_inner())
    }

    async fn list_files(
        &self,
        request: Request<ListFilesRequest>,
    ) -> Result<Response<ResponseStream<ListFilesResponse>>, Status> {
        trees::list_files(&self.0, request.into_inner())
    }

    async fn check_objects_exist(
        &self,
        request: Request<Streaming<CheckObjectsExistRequest>>,
    ) -> Result<Response<ResponseStream<CheckObjectsExistResponse>>, Status> {
        let mut requests = request.into_inner();
        let Some(mut request) = requests.message().await? else {
            return Err(Status::internal("EOF"));
        };
        let repository = self.0.storages.open(request.repository.as_ref())?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "CheckObjectsExist", |messages| async move {
            let mut objects = CatFile::start(&node.git, &repository).await?;
            loop {
                for name in &request.revisions {
                    revision::check_path_scoped(name)
                        .map_err(|error| Status::invalid_argument(format!("invalid revision: {error}")))?;
                }
                let mut revisions = Vec::with_capacity(request.revisions.len());
                for name in request.revisions {
                    let exists = objects.info(&name).await?.is_some();
                    revisions.push(RevisionExistence { name, exists });
                }
                if !revisions.is_empty() {
                    messages.send(CheckObjectsExistResponse { revisions }).await?;
                }
                match requests.message().await? {
                    Some(next) => request = next,
                    None => break,
                }
            }
            objects.close().await?;
            Ok(())
        }))
    }
}
