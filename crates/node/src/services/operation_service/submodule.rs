//! UserUpdateSubmodule.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    OperationBranchUpdate, PathError, UserUpdateSubmoduleError, UserUpdateSubmoduleRequest,
    UserUpdateSubmoduleResponse, path_error::ErrorType, user_update_submodule_error::Error,
};
use tonic::{Code, Response, Status};

use super::{
    commit_object::{NewCommit, write_commit},
    edited_tree::{EditError, edited_tree},
    signature::Signature,
    tree_edit::{Action, SUBMODULE, parse_path},
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::with_detail,
    git::{
        catfile::CatFile,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    votes::Voter,
};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    let detail = UserUpdateSubmoduleError { error: Some(error) };
    with_detail(code, text, "UserUpdateSubmoduleError", &detail)
}

fn check(request: &UserUpdateSubmoduleRequest, hash: ObjectHash) -> Result<(), Status> {
    for (wrong, text) in [
        (request.user.is_none(), "empty User"),
        (request.commit_sha.is_empty(), "empty CommitSha"),
        (hash.parse(request.commit_sha.as_bytes()).is_err(), "invalid CommitSha"),
        (request.branch.is_empty(), "empty Branch"),
        (request.submodule.is_empty(), "empty Submodule"),
        (request.commit_message.is_empty(), "empty CommitMessage"),
    ] {
        if wrong {
            return Err(Status::invalid_argument(text));
        }
    }
    Ok(())
}

fn misplaced(request: &UserUpdateSubmoduleRequest, text: &str, kind: ErrorType) -> Status {
    let detail = PathError { path: request.submodule.clone(), error_type: kind.into() };
    detailed(Code::InvalidArgument, text, Error::PathError(detail))
}

pub(super) async fn update_submodule(
    node: &Arc<Node>,
    request: UserUpdateSubmoduleRequest,
    voter: &Voter,
) -> Result<Response<UserUpdateSubmoduleResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let hash = ObjectHash::of(&repository).await?;
    check(&request, hash)?;
    if !references::has_branches(&node.git, &repository).await? {
        return Err(Status::failed_precondition("Repository is empty"));
    }
    let reference = revision::branch_reference(&request.branch);
    let absent = || Status::invalid_argument("Cannot find branch");
    let present = references::read(&node.git, &repository, &reference).await?;
    let old = match expected_old(node, &repository, hash, &request.expected_old_oid).await? {
        Some(expected) => expected,
        None => present.clone().ok_or_else(absent)?,
    };
    let parent = present.ok_or_else(absent)?;
    let quarantine = Quarantine::create(node, &repository)?;
    let new = commit(node, &quarantine, &request, &parent).await?;
    let change = Change { reference, old, new: new.clone() };
    let (sent, user) = (request.repository.unwrap_or_default(), request.user.unwrap_or_default());
    let requester = Requester { repository: &sent, user: &user, voter };
    match update(node, &repository, requester, Some(quarantine), &change).await {
        Ok(()) => {
            let update = OperationBranchUpdate { commit_id: new, ..OperationBranchUpdate::default() };
            Ok(Response::new(UserUpdateSubmoduleResponse {
                branch_update: Some(update),
                ..UserUpdateSubmoduleResponse::default()
            }))
        }
        Err(UpdateError::Hook(refusal)) if refusal.denied().is_some() => {
            Err(Status::internal(format!("updating ref with hooks: {}", refusal.full_message())))
        }
        Err(UpdateError::Hook(refusal)) => {
            Err(detailed(Code::PermissionDenied, &refusal.message(), Error::CustomHook(refusal.detail())))
        }
        Err(UpdateError::Reference) => {
            let text = format!("reference update: {}", change.refusal());
            Err(detailed(Code::FailedPrecondition, &text, Error::ReferenceUpdate(change.detail())))
        }
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

/// Makes the commit on top of `parent`.
async fn commit(
    node: &Node,
    quarantine: &Quarantine,
    request: &UserUpdateSubmoduleRequest,
    parent: &str,
) -> Result<String, Status> {
    let nowhere = || misplaced(request, "Invalid submodule path", ErrorType::InvalidPath);
    let path = parse_path(&request.submodule).map_err(|_| nowhere())?;
    let repository = quarantine.repository();
    let mut objects = CatFile::start(&node.git, repository).await?;
    let entry = objects.entry(parent.as_bytes(), &path.join(&b'/')).await?;
    objects.close().await?;
    let entry = entry.filter(|entry| entry.mode == SUBMODULE).ok_or_else(nowhere)?;
    if entry.id == request.commit_sha {
        let name = String::from_utf8_lossy(&request.submodule);
        let text = format!("The submodule {name} is already at {}", request.commit_sha);
        return Err(misplaced(request, &text, ErrorType::PathExists));
    }
    let action = Action::SetSubmodule { path, id: request.commit_sha.clone() };
    let tree = edited_tree(node, repository, Some(parent), &[action]).await.map_err(|error| match error {
        EditError::Misfit(_) => nowhere(),
        EditError::Failed(status) => status,
    })?;
    let user = request.user.clone().unwrap_or_default();
    let author = Signature::of_request(&user, request.timestamp.as_ref())?;
    let commit = NewCommit {
        tree: &tree,
        parents: &[parent],
        author: &author,
        committer: &author,
        message: request.commit_message.clone().into(),
    };
    write_commit(node, repository, commit).await
}
