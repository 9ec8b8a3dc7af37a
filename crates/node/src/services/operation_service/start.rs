//! The commit that a change is made on, which may have to be brought from another repository first.

use tabularium_proto::gitaly::{
    FindCommitRequest, HasLocalBranchesRequest, Repository, commit_service_client::CommitServiceClient,
    repository_service_client::RepositoryServiceClient,
};
use tonic::Status;

use crate::{
    error::GitError,
    git::{quarantine::Quarantine, references, revision},
    node::Node,
    peer::{Peers, question},
    storage::RepositoryPath,
};

/// A branch, maybe of another repository.
pub(crate) struct Start<'a> {
    /// The repository of the request.
    pub(crate) target: Option<&'a Repository>,
    /// Where the branch is, if it is said.
    pub(crate) repository: Option<&'a Repository>,
    /// Its name, short or full.
    pub(crate) branch: &'a [u8],
}

impl<'a> Start<'a> {
    /// The repository to ask, if it is not the target.
    ///
    /// Routers rewrite the path of the target and not that of the other, so the same repository may look like two; the id that
    /// GitLab gives it is left alone.
    pub(crate) fn elsewhere(&self) -> Option<&'a Repository> {
        let (target, other) = (self.target?, self.repository?);
        let same_place =
            target.storage_name == other.storage_name && target.relative_path == other.relative_path;
        let same_id = !target.gl_repository.is_empty() && target.gl_repository == other.gl_repository;
        (!same_place && !same_id).then_some(other)
    }

    /// The branch's commit, which need not be here. `None` if there is no such branch.
    pub(crate) async fn find(
        &self,
        node: &Node,
        quarantine: &Quarantine,
        peers: &Peers,
    ) -> Result<Option<String>, Status> {
        match self.elsewhere() {
            Some(other) => ask(peers, other, self.branch).await,
            None => resolve(node, quarantine.repository(), self.branch).await.map_err(Status::from),
        }
    }

    /// Fetches a commit of the other repository into the quarantine, unless it is here.
    pub(crate) async fn bring(
        &self,
        node: &Node,
        quarantine: &Quarantine,
        peers: &Peers,
        commit: &str,
    ) -> Result<(), Status> {
        let Some(other) = self.elsewhere() else { return Ok(()) };
        let present = format!("{commit}^{{commit}}");
        if references::resolve(&node.git, quarantine.repository(), present.as_bytes()).await?.is_some() {
            return Ok(());
        }
        let peer = peers.find(&other.storage_name)?;
        let fetched = peer.fetch(node, &node.git, quarantine.repository(), other, &[commit], true).await;
        fetched.map_err(|error| Status::internal(format!("fetch start: {error}")))
    }

    /// The branch's commit; what it needs is in the quarantine if it was not here. `None` if there is no such branch.
    pub(crate) async fn commit(
        &self,
        node: &Node,
        quarantine: &Quarantine,
        peers: &Peers,
    ) -> Result<Option<String>, Status> {
        let Some(found) = self.find(node, quarantine, peers).await? else { return Ok(None) };
        self.bring(node, quarantine, peers, &found).await?;
        Ok(Some(found))
    }
}

/// A branch if there is one of this name, else whatever git takes the name for.
async fn resolve(
    node: &Node,
    repository: &RepositoryPath,
    branch: &[u8],
) -> Result<Option<String>, GitError> {
    if let Some(found) = references::read(&node.git, repository, &revision::branch_reference(branch)).await? {
        return Ok(Some(found));
    }
    if revision::check(branch).is_err() {
        return Ok(None);
    }
    references::resolve(&node.git, repository, &[branch, b"^{commit}"].concat()).await
}

/// The same of another repository.
async fn ask(peers: &Peers, repository: &Repository, branch: &[u8]) -> Result<Option<String>, Status> {
    let mut commits = CommitServiceClient::new(peers.find(&repository.storage_name)?.channel());
    for name in [revision::branch_reference(branch), branch.to_vec()] {
        let revision = [name.as_slice(), b"^{commit}"].concat();
        let request = FindCommitRequest {
            repository: Some(repository.clone()),
            revision,
            ..FindCommitRequest::default()
        };
        let found = commits.find_commit(question(request)).await?.into_inner().commit;
        if let Some(commit) = found {
            return Ok(Some(commit.id));
        }
    }
    Ok(None)
}

/// Whether another repository has any branch.
pub(crate) async fn has_branches(peers: &Peers, repository: &Repository) -> Result<bool, Status> {
    let mut repositories = RepositoryServiceClient::new(peers.find(&repository.storage_name)?.channel());
    let request = HasLocalBranchesRequest { repository: Some(repository.clone()) };
    Ok(repositories.has_local_branches(question(request)).await?.into_inner().value)
}
