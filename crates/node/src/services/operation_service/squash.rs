//! UserSquash: one commit in place of many. It only makes the commit; no reference moves.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    MergeConflictError, ResolveRevisionError, UserSquashError, UserSquashRequest, UserSquashResponse,
    user_squash_error::Error,
};
use tonic::{Code, Response, Status};

use super::{
    commit_object::{NewCommit, write_signed_commit},
    signature::{Signature, moment},
};
use crate::{
    error::{internal_io, with_detail},
    git::{merge, quarantine::Quarantine, references, revision},
    node::Node,
    votes::{Voter, agreed, ballot},
};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserSquashError", &UserSquashError { error: Some(error) })
}

fn check(request: &UserSquashRequest) -> Result<(), Status> {
    let (user, author) = (request.user.as_ref(), request.author.as_ref());
    for (missing, text) in [
        (user.is_none(), "empty User"),
        (user.is_some_and(|user| user.name.is_empty()), "empty user name"),
        (user.is_some_and(|user| user.email.is_empty()), "empty user email"),
        (request.start_sha.is_empty(), "empty StartSha"),
        (request.end_sha.is_empty(), "empty EndSha"),
        (request.commit_message.is_empty(), "empty CommitMessage"),
        (author.is_none(), "empty Author"),
        (author.is_some_and(|author| author.name.is_empty()), "empty author name"),
        (author.is_some_and(|author| author.email.is_empty()), "empty author email"),
    ] {
        if missing {
            return Err(Status::invalid_argument(text));
        }
    }
    Ok(())
}

pub(super) async fn squash(
    node: &Arc<Node>,
    request: UserSquashRequest,
    voter: &Voter,
) -> Result<Response<UserSquashResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check(&request)?;
    let quarantine = Quarantine::create(node, &repository)?;
    let start = commit_at(node, &quarantine, &request.start_sha, "start").await?;
    let end = commit_at(node, &quarantine, &request.end_sha, "end").await?;
    let now = moment(request.timestamp.as_ref());
    let committer = Signature::of_request(&request.user.unwrap_or_default(), Some(&now))?;
    let author = Signature::of_request(&request.author.unwrap_or_default(), Some(&now))?;
    let merged = merge::merge(&node.git, quarantine.repository(), &start, &end).await?;
    let tree = merged.clean().map_err(|conflicting_files| {
        let conflicting_commit_ids = vec![start.clone(), end];
        let detail = MergeConflictError { conflicting_files, conflicting_commit_ids };
        let text = "squashing commits: merge: there are conflicting files";
        detailed(Code::FailedPrecondition, text, Error::RebaseConflict(detail))
    })?;
    let mut message = request.commit_message;
    if !message.ends_with(b"\n") {
        message.push(b'\n');
    }
    let commit = NewCommit {
        tree: &tree,
        parents: &[&start],
        author: &author,
        committer: &committer,
        message: message.into(),
    };
    let squash_sha = write_signed_commit(node, &quarantine, commit, request.sign).await?;

    let (owner, voter, id) = (Arc::clone(node), voter.clone(), squash_sha.clone());
    let keeping = node.tasks.spawn("squashed commit", async move {
        let keep =
            async { quarantine.migrate().await.map_err(internal_io("migrating quarantine directory")) };
        agreed(&owner.sections, &voter, &repository.path, ballot(id.as_bytes()).into(), keep).await
    });
    match keeping.await {
        Ok(kept) => kept?,
        Err(error) => return Err(Status::internal(format!("squashing: {error}"))),
    }
    Ok(Response::new(UserSquashResponse { squash_sha }))
}

async fn commit_at(node: &Node, quarantine: &Quarantine, name: &str, which: &str) -> Result<String, Status> {
    let found = match revision::check(name.as_bytes()) {
        Ok(()) => {
            let commit = format!("{name}^{{commit}}");
            references::resolve(&node.git, quarantine.repository(), commit.as_bytes()).await?
        }
        Err(_) => None,
    };
    found.ok_or_else(|| {
        let text = format!("resolving {which} revision: reference not found");
        let detail = ResolveRevisionError { revision: name.into() };
        detailed(Code::InvalidArgument, &text, Error::ResolveRevision(detail))
    })
}
