//! UserMergeBranch, in two stages: the merge commit is made and shown, then the client says whether the branch is to
//! move there.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    MergeConflictError, OperationBranchUpdate, UserMergeBranchError, UserMergeBranchRequest,
    UserMergeBranchResponse, user_merge_branch_error::Error,
};
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};

use super::{
    CONFIRMATION_WAIT,
    commit_object::{NewCommit, write_signed_commit},
    signature::Signature,
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::with_detail,
    git::{
        merge,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    services::listing::Messages,
    storage::RepositoryPath,
    votes::Voter,
};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserMergeBranchError", &UserMergeBranchError { error: Some(error) })
}

/// Refuses a request that lacks something.
pub(super) fn check(request: &UserMergeBranchRequest) -> Result<(), Status> {
    let user = request.user.as_ref().ok_or_else(|| Status::invalid_argument("empty user"))?;
    for (missing, text) in [
        (user.email.is_empty(), "empty user email"),
        (user.name.is_empty(), "empty user name"),
        (request.branch.is_empty(), "empty branch name"),
        (request.commit_id.is_empty(), "empty commit ID"),
        (request.message.is_empty(), "empty message"),
    ] {
        if missing {
            return Err(Status::invalid_argument(text));
        }
    }
    revision::check(request.commit_id.as_bytes())
        .map_err(|error| Status::invalid_argument(format!("invalid commit ID: {error}")))
}

pub(super) async fn merge_branch(
    node: Arc<Node>,
    repository: RepositoryPath,
    voter: Voter,
    first: UserMergeBranchRequest,
    mut requests: Streaming<UserMergeBranchRequest>,
    messages: Messages<UserMergeBranchResponse>,
) -> Result<(), Status> {
    let user = first.user.clone().unwrap_or_default();
    let signature = Signature::of_request(&user, first.timestamp.as_ref())?;
    let hash = ObjectHash::of(&repository).await?;
    let reference = revision::branch_reference(&first.branch);
    let ours = match expected_old(&node, &repository, hash, &first.expected_old_oid).await? {
        Some(expected) => expected,
        None => references::read(&node.git, &repository, &reference)
            .await?
            .ok_or_else(|| Status::not_found("reference not found"))?,
    };
    let quarantine = Quarantine::create(&node, &repository)?;
    let tree = merge_tree(&node, quarantine.repository(), &ours, &first.commit_id).await?;
    let parents = [ours.as_str(), first.commit_id.as_str()];
    let commit = NewCommit {
        tree: &tree,
        parents: if first.squash { &parents[..1] } else { &parents },
        author: &signature,
        committer: &signature,
        message: first.message.clone().into(),
    };
    let commit_id = write_signed_commit(&node, &quarantine, commit, first.sign).await?;
    messages.send(UserMergeBranchResponse { commit_id: commit_id.clone(), branch_update: None }).await?;

    let second = timeout(CONFIRMATION_WAIT, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded("merge was not confirmed in time"))??;
    match second {
        None => return Err(Status::internal("EOF")),
        Some(second) if !second.apply => return Err(Status::failed_precondition("merge aborted by client")),
        Some(_) => {}
    }
    let change = Change { reference, old: ours, new: commit_id.clone() };
    let sent = first.repository.clone().unwrap_or_default();
    let requester = Requester { repository: &sent, user: &user, voter: &voter };
    match update(&node, &repository, requester, Some(quarantine), &change).await {
        Ok(()) => {
            let update = OperationBranchUpdate { commit_id, repo_created: false, branch_created: false };
            messages
                .send(UserMergeBranchResponse { commit_id: String::new(), branch_update: Some(update) })
                .await
        }
        Err(UpdateError::Hook(refusal)) => {
            let denied = refusal.denied().map(Error::AccessCheck);
            let error = denied.unwrap_or_else(|| Error::CustomHook(refusal.detail()));
            Err(detailed(Code::PermissionDenied, &refusal.message(), error))
        }
        Err(UpdateError::Reference) => Err(detailed(
            Code::FailedPrecondition,
            &change.refusal(),
            Error::ReferenceUpdate(change.detail()),
        )),
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

/// The tree of a merge, or the conflict as clients know it.
async fn merge_tree(
    node: &Node,
    repository: &RepositoryPath,
    ours: &str,
    theirs: &str,
) -> Result<String, Status> {
    let merged = merge::merge(&node.git, repository, ours, theirs).await?;
    merged.clean().map_err(|conflicting_files| {
        let conflicting_commit_ids = vec![ours.to_owned(), theirs.to_owned()];
        let detail = MergeConflictError { conflicting_files, conflicting_commit_ids };
        let text = "merging commits: merge: there are conflicting files";
        detailed(Code::FailedPrecondition, text, Error::MergeConflict(detail))
    })
}
