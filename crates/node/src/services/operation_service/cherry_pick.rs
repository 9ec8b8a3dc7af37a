//! UserCherryPick.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    AccessCheckError, ChangesAlreadyAppliedError, MergeConflictError, NotAncestorError, UserCherryPickError,
    UserCherryPickRequest, UserCherryPickResponse, user_cherry_pick_error::Error,
};
use tonic::{Code, Response, Status};

use super::{
    picking::{Applied, PickError, Picking, Wanted},
    signature::Signature,
    update::UpdateError,
};
use crate::{error::with_detail, node::Node, peer::Peers, votes::Voter};

fn detailed(text: &str, error: Error) -> Status {
    let detail = UserCherryPickError { error: Some(error) };
    with_detail(Code::FailedPrecondition, text, "UserCherryPickError", &detail)
}

fn wanted(request: &UserCherryPickRequest) -> Wanted<'_> {
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

pub(super) async fn cherry_pick(
    node: &Arc<Node>,
    request: UserCherryPickRequest,
    peers: &Peers,
    voter: &Voter,
) -> Result<Response<UserCherryPickResponse>, Status> {
    let picking = Picking::begin(node, wanted(&request), peers).await?;
    let picked = pick(&picking, &request).await?;
    let refusal = match picking.finish(picked, voter).await {
        Ok(update) => return Ok(Response::new(UserCherryPickResponse { branch_update: Some(update) })),
        Err(PickError::Failed(status) | PickError::Update(_, UpdateError::Failed(status))) => {
            return Err(status);
        }
        Err(PickError::Diverged { branch, new }) => {
            let detail = NotAncestorError { parent_revision: branch.into(), child_revision: new.into() };
            return Err(detailed("cherry-pick: branch diverged", Error::TargetBranchDiverged(detail)));
        }
        Err(PickError::Update(_, UpdateError::Hook(refusal))) => refusal,
        Err(PickError::Update(change, UpdateError::Reference)) => {
            let text = format!("update reference with hooks: reference update: {}", change.refusal());
            return Err(Status::internal(text));
        }
    };
    let detail = refusal.denied().unwrap_or_else(|| {
        let text = refusal.message();
        let error_message = text.strip_suffix('\n').unwrap_or(&text).to_owned();
        AccessCheckError { error_message, ..AccessCheckError::default() }
    });
    Err(detailed("access check failed", Error::AccessCheck(detail)))
}

/// Makes the commit.
async fn pick(picking: &Picking<'_>, request: &UserCherryPickRequest) -> Result<String, Status> {
    let name = picking.wanted.commit.unwrap_or_default();
    let absent = || Status::not_found(format!("cherry-pick: commit lookup: commit not found: {name:?}"));
    let (id, commit) = picking.commit(absent).await?;
    let [base, ..] = commit.parent_ids.as_slice() else {
        return Err(Status::internal("cherry-pick command: merge-tree: the commit has no parent"));
    };
    let tree = match picking.apply(base, &format!("{id}^{{tree}}")).await? {
        Applied::Tree(tree) => tree,
        Applied::Conflicting(conflicting_files) => {
            let detail = MergeConflictError { conflicting_files, ..MergeConflictError::default() };
            let text = "cherry pick: merge: there are conflicting files";
            return Err(detailed(text, Error::CherryPickConflict(detail)));
        }
        Applied::Already => {
            let text = "cherry-pick: could not apply because the result was empty";
            return Err(detailed(text, Error::ChangesAlreadyApplied(ChangesAlreadyAppliedError {})));
        }
    };
    let author = if request.commit_author_name.is_empty() || request.commit_author_email.is_empty() {
        Signature::of_author(&commit.author.unwrap_or_default())
    } else {
        let (name, email) = (&request.commit_author_name, &request.commit_author_email);
        picking.committer.with_person(name.trim_ascii(), email.trim_ascii())
    };
    picking.write(&tree, &author).await
}
