//! UserFFBranch.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    OperationBranchUpdate, UserFfBranchError, UserFfBranchRequest, UserFfBranchResponse,
    user_ff_branch_error::Error,
};
use tonic::{Code, Response, Status};

use super::update::{Change, Requester, UpdateError, expected_old, update};
use crate::{
    error::with_detail,
    git::{
        merge,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    votes::Voter,
};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserFFBranchError", &UserFfBranchError { error: Some(error) })
}

fn check(request: &UserFfBranchRequest) -> Result<(), Status> {
    for (missing, text) in [
        (request.branch.is_empty(), "empty branch name"),
        (request.user.is_none(), "empty user"),
        (request.commit_id.is_empty(), "empty commit id"),
    ] {
        if missing {
            return Err(Status::invalid_argument(text));
        }
    }
    Ok(())
}

pub(super) async fn fast_forward(
    node: &Arc<Node>,
    request: UserFfBranchRequest,
    voter: &Voter,
) -> Result<Response<UserFfBranchResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check(&request)?;
    let hash = ObjectHash::of(&repository).await?;
    let reference = revision::branch_reference(&request.branch);
    let old = match expected_old(node, &repository, hash, &request.expected_old_oid).await? {
        Some(expected) => expected,
        None => references::read(&node.git, &repository, &reference)
            .await?
            .ok_or_else(|| Status::invalid_argument("reference not found"))?,
    };
    let new = hash
        .parse(request.commit_id.as_bytes())
        .map_err(|error| Status::invalid_argument(format!("cannot parse commit ID: {error}")))?;
    let ancestor = merge::is_ancestor(&node.git, &repository, &old, &new).await;
    if !ancestor.map_err(|error| Status::internal(format!("checking for ancestry: {error}")))? {
        return Err(Status::failed_precondition("not fast forward"));
    }
    // Nothing new comes into it. Whoever is asked before the branch moves sees from it that nothing did.
    let quarantine = Quarantine::create(node, &repository)?;
    let change = Change { reference, old, new };
    let (sent, user) = (request.repository.unwrap_or_default(), request.user.unwrap_or_default());
    let requester = Requester { repository: &sent, user: &user, voter };
    match update(node, &repository, requester, Some(quarantine), &change).await {
        Ok(()) => {
            let update = OperationBranchUpdate { commit_id: change.new, ..OperationBranchUpdate::default() };
            let branch_update = Some(update);
            Ok(Response::new(UserFfBranchResponse { branch_update, ..UserFfBranchResponse::default() }))
        }
        Err(UpdateError::Hook(refusal)) if refusal.denied().is_some() => {
            Err(Status::internal(format!("updating ref with hooks: {}", refusal.full_message())))
        }
        Err(UpdateError::Hook(refusal)) => {
            Err(detailed(Code::PermissionDenied, &refusal.message(), Error::CustomHook(refusal.detail())))
        }
        Err(UpdateError::Reference) => {
            let text = format!("update reference with hooks: reference update: {}", change.refusal());
            Err(detailed(Code::FailedPrecondition, &text, Error::ReferenceUpdate(change.detail())))
        }
        Err(UpdateError::Failed(status)) => Err(status),
    }
}
