//! UserCreateBranch, UserUpdateBranch, UserDeleteBranch.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    Branch, UserCreateBranchError, UserCreateBranchRequest, UserCreateBranchResponse, UserDeleteBranchError,
    UserDeleteBranchRequest, UserDeleteBranchResponse, UserUpdateBranchRequest, UserUpdateBranchResponse,
    user_create_branch_error, user_delete_branch_error,
};
use tonic::{Code, Response, Status};

use super::update::{Change, Requester, UpdateError, expected_old, update};
use crate::{
    error::with_detail,
    git::{
        catfile::CatFile,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    votes::Voter,
};

pub(super) async fn create(
    node: &Arc<Node>,
    request: UserCreateBranchRequest,
    voter: &Voter,
) -> Result<Response<UserCreateBranchResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    if request.branch_name.is_empty() {
        return refuse("empty branch name");
    }
    let Some(user) = &request.user else { return refuse("empty user") };
    if request.start_point.is_empty() {
        return refuse("empty start point");
    }
    let absent = || {
        let start = String::from_utf8_lossy(&request.start_point).into_owned();
        Status::failed_precondition(format!("revspec '{start}' not found"))
    };
    revision::check(&request.start_point).map_err(|_| absent())?;
    let mut objects = CatFile::start(&node.git, &repository).await?;
    let commit = objects.commit(&request.start_point).await?.ok_or_else(absent)?;
    let hash = objects.hash();
    objects.close().await?;
    let change = Change {
        reference: revision::branch_reference(&request.branch_name),
        old: hash.zero(),
        new: commit.id.clone(),
    };
    let sent = request.repository.clone().unwrap_or_default();
    let requester = Requester { repository: &sent, user, voter };
    match update(node, &repository, requester, None, &change).await {
        Ok(()) => {
            let branch = Branch { name: request.branch_name, target_commit: Some(commit) };
            Ok(Response::new(UserCreateBranchResponse { branch: Some(branch) }))
        }
        // Without a detail, and with a code that says nothing: this is how GitLab's clients know it.
        Err(UpdateError::Hook(refusal)) if refusal.denied().is_some() => {
            Err(Status::internal(refusal.full_message()))
        }
        Err(UpdateError::Hook(refusal)) => {
            let error = user_create_branch_error::Error::CustomHook(refusal.detail());
            let detail = UserCreateBranchError { error: Some(error) };
            let text = "creation denied by custom hooks";
            Err(with_detail(Code::PermissionDenied, text, "UserCreateBranchError", &detail))
        }
        Err(UpdateError::Reference) => Err(Status::failed_precondition(change.refusal())),
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

pub(super) async fn update_branch(
    node: &Arc<Node>,
    request: UserUpdateBranchRequest,
    voter: &Voter,
) -> Result<Response<UserUpdateBranchResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    let Some(user) = &request.user else { return refuse("empty user") };
    if request.branch_name.is_empty() {
        return refuse("empty branch name");
    }
    if request.oldrev.is_empty() {
        return refuse("empty oldrev");
    }
    if request.newrev.is_empty() {
        return refuse("empty newrev");
    }
    let hash = ObjectHash::of(&repository).await?;
    let parse = |name: &str, value: &[u8]| {
        hash.parse(value).map_err(|error| Status::internal(format!("could not parse {name}: {error}")))
    };
    let change = Change {
        reference: revision::branch_reference(&request.branch_name),
        new: parse("newrev", &request.newrev)?,
        old: parse("oldrev", &request.oldrev)?,
    };
    let sent = request.repository.clone().unwrap_or_default();
    let requester = Requester { repository: &sent, user, voter };
    let could_not = || {
        let name = String::from_utf8_lossy(&request.branch_name);
        Status::failed_precondition(format!("Could not update {name}. Please refresh and try again."))
    };
    match update(node, &repository, requester, None, &change).await {
        Ok(()) => Ok(Response::new(UserUpdateBranchResponse { pre_receive_error: String::new() })),
        // GitLab's clients are not told that it was GitLab.
        Err(UpdateError::Hook(refusal)) if refusal.denied().is_some() => Err(could_not()),
        Err(UpdateError::Hook(refusal)) => {
            Ok(Response::new(UserUpdateBranchResponse { pre_receive_error: refusal.message() }))
        }
        Err(UpdateError::Reference) => Err(could_not()),
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

pub(super) async fn delete(
    node: &Arc<Node>,
    request: UserDeleteBranchRequest,
    voter: &Voter,
) -> Result<Response<UserDeleteBranchResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.branch_name.is_empty() {
        return Err(Status::invalid_argument("bad request: empty branch name"));
    }
    let Some(user) = &request.user else {
        return Err(Status::invalid_argument("bad request: empty user"));
    };
    let hash = ObjectHash::of(&repository).await?;
    let reference = revision::branch_reference(&request.branch_name);
    let old = match expected_old(node, &repository, hash, &request.expected_old_oid).await? {
        Some(expected) => expected,
        None => references::read(&node.git, &repository, &reference).await?.ok_or_else(|| {
            let name = String::from_utf8_lossy(&request.branch_name);
            Status::failed_precondition(format!("branch not found: {name:?}"))
        })?,
    };
    let change = Change { reference, old, new: hash.zero() };
    let sent = request.repository.clone().unwrap_or_default();
    let requester = Requester { repository: &sent, user, voter };
    let (code, text, error) = match update(node, &repository, requester, None, &change).await {
        Ok(()) => return Ok(Response::new(UserDeleteBranchResponse {})),
        Err(UpdateError::Hook(refusal)) => {
            let (by, error) = match refusal.denied() {
                Some(denied) => ("access checks", user_delete_branch_error::Error::AccessCheck(denied)),
                None => ("custom hooks", user_delete_branch_error::Error::CustomHook(refusal.detail())),
            };
            (Code::PermissionDenied, format!("deletion denied by {by}: {}", refusal.full_message()), error)
        }
        Err(UpdateError::Reference) => (
            Code::FailedPrecondition,
            format!("reference update failed: {}", change.refusal()),
            user_delete_branch_error::Error::ReferenceUpdate(change.detail()),
        ),
        Err(UpdateError::Failed(status)) => return Err(status),
    };
    let detail = UserDeleteBranchError { error: Some(error) };
    Err(with_detail(code, &text, "UserDeleteBranchError", &detail))
}
