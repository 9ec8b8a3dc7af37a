//! UserRevert.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ChangesAlreadyAppliedError, MergeConflictError, NotAncestorError, UserRevertError, UserRevertRequest,
    UserRevertResponse, user_revert_error::Error,
};
use tonic::{Code, Response, Status};

use super::{
    picking::{Applied, PickError, Picking, Wanted},
    update::UpdateError,
};
use crate::{error::with_detail, node::Node, peer::Peers, votes::Voter};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserRevertError", &UserRevertError { error: Some(error) })
}

fn wanted(request: &UserRevertRequest) -> Wanted<'_> {
    Wanted {
        repository: request.repository.as_ref(),
        user: request.user.as_ref(),
        commit: request.commit.as_ref().map(|commit| commit.id.as_str()),
        branch: &request.branch_name,
        message: &request.message,
        start_branch: &request.start_branch_name,
        start_repository: request.start_repository.as_ref(),
        timestamp: request.timestamp.as_ref(),
        expected_old: &request.expected_old_oid,
        dry_run: request.dry_run,
        sign: request.sign,
    }
}

pub(super) async fn revert(
    node: &Arc<Node>,
    request: UserRevertRequest,
    peers: &Peers,
    voter: &Voter,
) -> Result<Response<UserRevertResponse>, Status> {
    let picking = Picking::begin(node, wanted(&request), peers).await?;
    let reverting = unmake(&picking).await?;
    let (code, text, error) = match picking.finish(reverting, voter).await {
        Ok(update) => {
            let response =
                UserRevertResponse { branch_update: Some(update), ..UserRevertResponse::default() };
            return Ok(Response::new(response));
        }
        Err(PickError::Failed(status) | PickError::Update(_, UpdateError::Failed(status))) => {
            return Err(status);
        }
        Err(PickError::Diverged { branch, new }) => {
            let detail = NotAncestorError { parent_revision: branch.into(), child_revision: new.into() };
            (Code::FailedPrecondition, "revert: branch diverged", Error::NotAncestor(detail))
        }
        Err(PickError::Update(_, UpdateError::Hook(refusal))) if refusal.denied().is_some() => {
            let text = format!("update reference with hooks: {}", refusal.full_message());
            return Err(Status::internal(text));
        }
        Err(PickError::Update(_, UpdateError::Hook(refusal))) => {
            (Code::PermissionDenied, "revert: custom hook error", Error::CustomHook(refusal.detail()))
        }
        Err(PickError::Update(change, UpdateError::Reference)) => {
            let text = format!("update reference with hooks: reference update: {}", change.refusal());
            return Err(Status::internal(text));
        }
    };
    Err(detailed(code, text, error))
}

/// Makes the commit. What a merge brought is seen from its first parent.
async fn unmake(picking: &Picking<'_>) -> Result<String, Status> {
    let absent = || Status::not_found("revert commit lookup: commit not found");
    let (id, commit) = picking.commit(absent).await?;
    let before = match commit.parent_ids.first() {
        Some(parent) => format!("{parent}^{{tree}}"),
        None => picking.hash.empty_tree().to_owned(),
    };
    let (text, error) = match picking.apply(&id, &before).await? {
        Applied::Tree(tree) => return picking.write(&tree, &picking.committer).await,
        Applied::Conflicting(conflicting_files) => {
            let detail = MergeConflictError { conflicting_files, ..MergeConflictError::default() };
            ("revert: there are conflicting files", Error::MergeConflict(detail))
        }
        Applied::Already => {
            let error = Error::ChangesAlreadyApplied(ChangesAlreadyAppliedError {});
            ("revert: could not apply because the result was empty", error)
        }
    };
    Err(detailed(Code::FailedPrecondition, text, error))
}
