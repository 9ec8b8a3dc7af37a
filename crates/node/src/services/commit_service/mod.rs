//! CommitService: commits, their history, and the trees they hold.

mod blame;
mod history;
mod languages;
mod last_commits;
mod log;
mod objects;
mod stats;
mod trees;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    CheckObjectsExistRequest, CheckObjectsExistResponse, CommitIsAncestorRequest, CommitIsAncestorResponse,
    CommitLanguagesRequest, CommitLanguagesResponse, CommitStatsRequest, CommitStatsResponse,
    CommitsByMessageRequest, CommitsByMessageResponse, CountCommitsRequest, CountCommitsResponse,
    CountDivergingCommitsRequest, CountDivergingCommitsResponse, FilterShasWithSignaturesRequest,
    FilterShasWithSignaturesResponse, FindAllCommitsRequest, FindAllCommitsResponse, FindCommitRequest,
    FindCommitResponse, FindCommitsRequest, FindCommitsResponse, GetCommitMessagesRequest,
    GetCommitMessagesResponse, GetCommitSignaturesRequest, GetCommitSignaturesResponse,
    GetTreeEntriesRequest, GetTreeEntriesResponse, LastCommitForPathRequest, LastCommitForPathResponse,
    ListAllCommitsRequest, ListAllCommitsResponse, ListCommitsByOidRequest, ListCommitsByOidResponse,
    ListCommitsByRefNameRequest, ListCommitsByRefNameResponse, ListCommitsRequest, ListCommitsResponse,
    ListFilesRequest, ListFilesResponse, ListLastCommitsForTreeRequest, ListLastCommitsForTreeResponse,
    RawBlameRequest, RawBlameResponse, TreeEntryRequest, TreeEntryResponse,
    check_objects_exist_response::RevisionExistence, commit_service_server::CommitService,
};
use tonic::{Request, Response, Status, Streaming};

use super::{listing, streams::ResponseStream};
use crate::{
    git::{catfile::CatFile, revision, revision::RevisionError},
    node::Node,
};

pub(crate) use languages::RememberedLanguages;

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

    async fn find_commits(
        &self,
        request: Request<FindCommitsRequest>,
    ) -> Result<Response<ResponseStream<FindCommitsResponse>>, Status> {
        log::find_commits(&self.0, request.into_inner())
    }

    async fn find_all_commits(
        &self,
        request: Request<FindAllCommitsRequest>,
    ) -> Result<Response<ResponseStream<FindAllCommitsResponse>>, Status> {
        log::find_all_commits(&self.0, request.into_inner())
    }

    async fn commits_by_message(
        &self,
        request: Request<CommitsByMessageRequest>,
    ) -> Result<Response<ResponseStream<CommitsByMessageResponse>>, Status> {
        log::commits_by_message(&self.0, request.into_inner())
    }

    async fn last_commit_for_path(
        &self,
        request: Request<LastCommitForPathRequest>,
    ) -> Result<Response<LastCommitForPathResponse>, Status> {
        last_commits::last_commit_for_path(&self.0, request.into_inner()).await
    }

    async fn list_last_commits_for_tree(
        &self,
        request: Request<ListLastCommitsForTreeRequest>,
    ) -> Result<Response<ResponseStream<ListLastCommitsForTreeResponse>>, Status> {
        last_commits::list_last_commits_for_tree(&self.0, request.into_inner())
    }

    async fn count_diverging_commits(
        &self,
        request: Request<CountDivergingCommitsRequest>,
    ) -> Result<Response<CountDivergingCommitsResponse>, Status> {
        stats::count_diverging_commits(&self.0, request.into_inner()).await
    }

    async fn commit_stats(
        &self,
        request: Request<CommitStatsRequest>,
    ) -> Result<Response<CommitStatsResponse>, Status> {
        stats::commit_stats(&self.0, request.into_inner()).await
    }

    async fn commit_languages(
        &self,
        request: Request<CommitLanguagesRequest>,
    ) -> Result<Response<CommitLanguagesResponse>, Status> {
        languages::commit_languages(&self.0, request.into_inner()).await
    }

    async fn list_all_commits(
        &self,
        request: Request<ListAllCommitsRequest>,
    ) -> Result<Response<ResponseStream<ListAllCommitsResponse>>, Status> {
        objects::list_all_commits(&self.0, request.into_inner())
    }

    async fn list_commits_by_ref_name(
        &self,
        request: Request<ListCommitsByRefNameRequest>,
    ) -> Result<Response<ResponseStream<ListCommitsByRefNameResponse>>, Status> {
        objects::list_commits_by_ref_name(&self.0, request.into_inner())
    }

    async fn get_commit_messages(
        &self,
        request: Request<GetCommitMessagesRequest>,
    ) -> Result<Response<ResponseStream<GetCommitMessagesResponse>>, Status> {
        objects::get_commit_messages(&self.0, request.into_inner())
    }

    async fn get_commit_signatures(
        &self,
        request: Request<GetCommitSignaturesRequest>,
    ) -> Result<Response<ResponseStream<GetCommitSignaturesResponse>>, Status> {
        objects::get_commit_signatures(&self.0, request.into_inner()).await
    }

    async fn filter_shas_with_signatures(
        &self,
        request: Request<Streaming<FilterShasWithSignaturesRequest>>,
    ) -> Result<Response<ResponseStream<FilterShasWithSignaturesResponse>>, Status> {
        objects::filter_shas_with_signatures(&self.0, request.into_inner()).await
    }

    async fn raw_blame(
        &self,
        request: Request<RawBlameRequest>,
    ) -> Result<Response<ResponseStream<RawBlameResponse>>, Status> {
        blame::raw_blame(&self.0, request.into_inner()).await
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
