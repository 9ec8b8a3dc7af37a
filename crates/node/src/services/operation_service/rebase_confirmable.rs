//! UserRebaseConfirmable, in two stages: the rebased commits are made and shown, then the client says whether the branch is
//! to move there.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    AccessCheckError, MergeConflictError, UserRebaseConfirmableError, UserRebaseConfirmableRequest,
    UserRebaseConfirmableResponse,
    user_rebase_confirmable_error::Error,
    user_rebase_confirmable_request::{Header, UserRebaseConfirmableRequestPayload as Asked},
    user_rebase_confirmable_response::UserRebaseConfirmableResponsePayload as Answer,
};
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};

use super::{
    CONFIRMATION_WAIT,
    rebase::{RebaseError, rebase},
    signature::Signature,
    start::Start,
    update::{Change, Requester, UpdateError, update_with_options},
};
use crate::{
    error::with_detail,
    git::{
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    peer::Peers,
    services::listing::Messages,
    storage::RepositoryPath,
    votes::Voter,
};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    let detail = UserRebaseConfirmableError { error: Some(error) };
    with_detail(code, text, "UserRebaseConfirmableError", &detail)
}

fn answer(payload: Answer) -> UserRebaseConfirmableResponse {
    UserRebaseConfirmableResponse { user_rebase_confirmable_response_payload: Some(payload) }
}

/// The header, if the request is one.
pub(super) fn header(request: UserRebaseConfirmableRequest) -> Result<Header, Status> {
    match request.user_rebase_confirmable_request_payload {
        Some(Asked::Header(header)) => Ok(header),
        _ => Err(Status::invalid_argument("empty UserRebaseConfirmableRequest.Header")),
    }
}

/// Refuses a request that lacks something.
pub(super) fn check(header: &Header) -> Result<(), Status> {
    for (wrong, text) in [
        (header.user.is_none(), "empty User"),
        (header.branch.is_empty(), "empty Branch"),
        (header.branch_sha.is_empty(), "empty BranchSha"),
        (header.remote_repository.is_none(), "empty RemoteRepository"),
        (header.remote_branch.is_empty(), "empty RemoteBranch"),
        (revision::check(&header.remote_branch).is_err(), "invalid branch name"),
    ] {
        if wrong {
            return Err(Status::invalid_argument(text));
        }
    }
    Ok(())
}

/// Who asks, and how.
pub(super) struct Caller {
    pub(super) node: Arc<Node>,
    pub(super) peers: Peers,
    pub(super) voter: Voter,
}

pub(super) async fn rebase_confirmable(
    caller: Caller,
    repository: RepositoryPath,
    header: Header,
    mut requests: Streaming<UserRebaseConfirmableRequest>,
    messages: Messages<UserRebaseConfirmableResponse>,
) -> Result<(), Status> {
    let Caller { node, peers, voter } = caller;
    let hash = ObjectHash::of(&repository).await?;
    let old =
        hash.parse(header.branch_sha.as_bytes()).map_err(|error| Status::not_found(error.to_string()))?;
    let quarantine = Quarantine::create(&node, &repository)?;
    let new = make(&node, &quarantine, &header, &peers, &old).await?;
    messages.send(answer(Answer::RebaseSha(new.clone()))).await?;

    let second = timeout(CONFIRMATION_WAIT, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded("rebase was not confirmed in time"))??;
    let second = second.ok_or_else(|| Status::internal("recv: EOF"))?;
    if second.user_rebase_confirmable_request_payload != Some(Asked::Apply(true)) {
        return Err(Status::failed_precondition("rebase aborted by client"));
    }
    let change = Change { reference: revision::branch_reference(&header.branch), old, new };
    let (sent, user) = (header.repository.unwrap_or_default(), header.user.unwrap_or_default());
    let requester = Requester { repository: &sent, user: &user, voter: &voter };
    let options = &header.git_push_options;
    match update_with_options(&node, &repository, requester, Some(quarantine), &change, options).await {
        Ok(()) => messages.send(answer(Answer::RebaseApplied(true))).await,
        Err(UpdateError::Hook(refusal)) => {
            let text = format!("access check: {:?}", refusal.full_message());
            let told =
                || AccessCheckError { error_message: refusal.message(), ..AccessCheckError::default() };
            let detail = refusal.denied().unwrap_or_else(told);
            Err(detailed(Code::PermissionDenied, &text, Error::AccessCheck(detail)))
        }
        Err(UpdateError::Reference) => {
            let text = format!("updating ref with hooks: reference update: {}", change.refusal());
            Err(Status::internal(text))
        }
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

/// Makes the commits and answers the last one.
async fn make(
    node: &Arc<Node>,
    quarantine: &Quarantine,
    header: &Header,
    peers: &Peers,
    old: &str,
) -> Result<String, Status> {
    let start = Start {
        target: header.repository.as_ref(),
        repository: header.remote_repository.as_ref(),
        branch: &header.remote_branch,
    };
    let start = start.commit(node, quarantine, peers).await?;
    let start = start.ok_or_else(|| Status::invalid_argument("resolve start ref: reference not found"))?;
    let present = format!("{old}^{{commit}}");
    let present = references::resolve(&node.git, quarantine.repository(), present.as_bytes()).await?;
    present.ok_or_else(|| {
        Status::invalid_argument("rebasing commits: resolving branch commit: reference not found")
    })?;
    let committer =
        Signature::of_request(&header.user.clone().unwrap_or_default(), header.timestamp.as_ref())?;
    match rebase(node, quarantine, &start, old, &committer).await {
        Ok(new) => Ok(new),
        Err(RebaseError::Conflict(conflict)) => {
            let text = format!("rebasing commits: {conflict}");
            let conflicting_commit_ids = vec![start, old.to_owned()];
            let detail = MergeConflictError { conflicting_files: conflict.files, conflicting_commit_ids };
            Err(detailed(Code::FailedPrecondition, &text, Error::RebaseConflict(detail)))
        }
        Err(RebaseError::Failed(status)) => Err(status),
    }
}
