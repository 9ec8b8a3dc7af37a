//! UserMergeToRef and UserRebaseToRef: what would become of a merge request, under a reference that is nobody's branch.
//!
//! No hook is asked, for nobody's work is changed.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use tabularium_proto::gitaly::{
    UserMergeToRefRequest, UserMergeToRefResponse, UserRebaseToRefRequest, UserRebaseToRefResponse,
};
use tonic::{Response, Status};

use super::{
    commit_object::{NewCommit, write_signed_commit},
    rebase::{RebaseError, rebase},
    signature::Signature,
    update::expected_old,
};
use crate::{
    error::internal_io,
    git::{
        merge,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash, is_zero},
        update_ref::{Expected, Transaction, UpdateRefError},
    },
    node::Node,
    storage::RepositoryPath,
    votes::Voter,
};

/// Where results may be put.
const TARGETS: &[u8] = b"refs/merge-requests";

/// Refuses with the text of the first thing that is wrong.
fn refuse_if(checks: &[(bool, &str)]) -> Result<(), Status> {
    match checks.iter().find(|(wrong, _)| *wrong) {
        Some((_, text)) => Err(Status::invalid_argument(*text)),
        None => Ok(()),
    }
}

pub(super) async fn merge_to_ref(
    node: &Arc<Node>,
    request: UserMergeToRefRequest,
    voter: &Voter,
) -> Result<Response<UserMergeToRefResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    refuse_if(&[
        (
            request.first_parent_ref.is_empty() && request.branch.is_empty(),
            "empty first parent ref and branch name",
        ),
        (request.user.is_none(), "empty user"),
        (request.source_sha.is_empty(), "empty source SHA"),
        (request.target_ref.is_empty(), "empty target ref"),
        (!request.target_ref.starts_with(TARGETS), "invalid target ref"),
    ])?;
    let first = if request.first_parent_ref.is_empty() { &request.branch } else { &request.first_parent_ref };
    let unknown = "Invalid merge source";
    let ours = commit_at(node, &repository, first, unknown).await?;
    let theirs = commit_at(node, &repository, request.source_sha.as_bytes(), unknown).await?;
    let user = request.user.clone().unwrap_or_default();
    let author = Signature::of_request(&user, request.timestamp.as_ref())?;
    let target = Target::read(node, repository, &request.target_ref, &request.expected_old_oid).await?;

    let quarantine = Quarantine::create(node, &target.repository)?;
    let Some(commit_id) = merge_commit(node, &quarantine, [&ours, &theirs], &author, &request).await? else {
        let name = String::from_utf8_lossy(&request.target_ref);
        let text =
            format!("Failed to create merge commit for source_sha {theirs} and target_sha {ours} at {name}");
        return Err(Status::failed_precondition(text));
    };
    target.put(node, quarantine, &commit_id, voter).await?.ok_or_else(|| {
        let name = String::from_utf8_lossy(&request.target_ref);
        Status::failed_precondition(format!("Could not update {name}. Please refresh and try again"))
    })?;
    Ok(Response::new(UserMergeToRefResponse { commit_id }))
}

/// `None` if there are conflicts.
async fn merge_commit(
    node: &Node,
    quarantine: &Quarantine,
    parents: [&str; 2],
    author: &Signature,
    request: &UserMergeToRefRequest,
) -> Result<Option<String>, Status> {
    let [ours, theirs] = parents;
    let merged = merge::merge(&node.git, quarantine.repository(), ours, theirs).await?;
    let Ok(tree) = merged.clean() else { return Ok(None) };
    let message = request.message.clone().into();
    let commit = NewCommit { tree: &tree, parents: &parents, author, committer: author, message };
    write_signed_commit(node, quarantine, commit, request.sign).await.map(Some)
}

pub(super) async fn rebase_to_ref(
    node: &Arc<Node>,
    request: UserRebaseToRefRequest,
    voter: &Voter,
) -> Result<Response<UserRebaseToRefResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    refuse_if(&[
        (request.first_parent_ref.is_empty(), "empty FirstParentRef"),
        (request.user.is_none(), "empty User"),
        (request.source_sha.is_empty(), "empty SourceSha"),
        (request.target_ref.is_empty(), "empty TargetRef"),
        (!request.target_ref.starts_with(TARGETS), "invalid TargetRef"),
    ])?;
    let upstream = commit_at(node, &repository, &request.first_parent_ref, "invalid FirstParentRef").await?;
    let source = request.source_sha.as_bytes();
    let branch = commit_at(node, &repository, source, "invalid SourceSha").await?;
    let user = request.user.clone().unwrap_or_default();
    let committer = Signature::of_request(&user, request.timestamp.as_ref())?;
    let target = Target::read(node, repository, &request.target_ref, &request.expected_old_oid).await?;

    let quarantine = Quarantine::create(node, &target.repository)?;
    let name = String::from_utf8_lossy(&request.target_ref);
    let rebased = rebase(node, &quarantine, &upstream, &branch, &committer).await;
    let commit_id = rebased.map_err(|error| match error {
        RebaseError::Conflict(_) => Status::failed_precondition(format!(
            "failed to rebase {branch} on {upstream} while preparing {name} due to conflict"
        )),
        RebaseError::Failed(status) => status,
    })?;
    target.put(node, quarantine, &commit_id, voter).await?.ok_or_else(|| {
        Status::failed_precondition(format!("could not update {name}. Please refresh and try again"))
    })?;
    Ok(Response::new(UserRebaseToRefResponse { commit_id }))
}

/// The commit that a revision leads to; if there is none, `text` says so.
async fn commit_at(
    node: &Node,
    repository: &RepositoryPath,
    name: &[u8],
    text: &str,
) -> Result<String, Status> {
    let found = match revision::check(name) {
        Ok(()) => references::resolve(&node.git, repository, &[name, b"^{commit}"].concat()).await?,
        Err(_) => None,
    };
    found.ok_or_else(|| Status::invalid_argument(text))
}

/// The reference that is to hold the result.
struct Target {
    repository: RepositoryPath,
    reference: Vec<u8>,
    /// What it holds now; zero if it does not exist.
    old: String,
}

impl Target {
    async fn read(
        node: &Node,
        repository: RepositoryPath,
        reference: &[u8],
        expected: &str,
    ) -> Result<Self, Status> {
        let hash = ObjectHash::of(&repository).await?;
        let old = if expected == hash.zero() {
            expected.to_owned()
        } else {
            match expected_old(node, &repository, hash, expected).await? {
                Some(expected) => expected,
                None => present(node, &repository, reference).await?.unwrap_or_else(|| hash.zero()),
            }
        };
        Ok(Self { repository, reference: reference.to_vec(), old })
    }

    /// Makes the quarantine's objects the repository's and the reference point to one of them; `None` if the reference cannot.
    async fn put(
        self,
        node: &Arc<Node>,
        quarantine: Quarantine,
        new: &str,
        voter: &Voter,
    ) -> Result<Option<()>, Status> {
        debug_assert!(!is_zero(new), "results are commits");
        if revision::check_reference(&self.reference).is_err() {
            return Ok(None);
        }
        quarantine.migrate().await.map_err(internal_io("migrating quarantined objects"))?;
        let moving = async {
            let mut transaction = Transaction::start(&node.git, &self.repository, true).await?;
            transaction.update(&self.reference, new, &Expected::Value(self.old)).await?;
            transaction.commit(node, voter).await
        };
        match moving.await {
            Ok(()) => Ok(Some(())),
            Err(UpdateRefError::Git(error)) => Err(error.into()),
            Err(UpdateRefError::Vote(error)) => Err(error.into()),
            Err(
                UpdateRefError::Locked { .. }
                | UpdateRefError::Mismatch { .. }
                | UpdateRefError::MissingObject { .. }
                | UpdateRefError::NotACommit { .. }
                | UpdateRefError::Conflict { .. }
                | UpdateRefError::Repeated { .. }
                | UpdateRefError::Invalid { .. },
            ) => Ok(None),
        }
    }
}

/// What the reference holds, unless it is one that stands for another.
async fn present(
    node: &Node,
    repository: &RepositoryPath,
    reference: &[u8],
) -> Result<Option<String>, Status> {
    if revision::check_reference(reference).is_err() {
        return Ok(None);
    }
    let command = node.git.command(repository, "for-each-ref").reads();
    let listed = command
        .args(["--format=%(objectname) %(if)%(symref)%(then)symbolic%(else)plain%(end) %(refname)", "--"])
        .arg(OsStr::from_bytes(reference))
        .checked()
        .await?;
    let lines: Vec<Vec<&[u8]>> = listed
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| line.splitn(3, |byte| *byte == b' ').collect())
        .collect();
    let name = String::from_utf8_lossy(reference);
    for line in &lines {
        match line[..] {
            [_, b"symbolic", found] if found == reference => {
                let text = format!("target reference is symbolic: {name:?}");
                return Err(Status::failed_precondition(text));
            }
            [id, _, found] if found == reference => {
                return Ok(Some(String::from_utf8_lossy(id).into_owned()));
            }
            _ => {}
        }
    }
    // What lies below a name of this kind is found under it too.
    match lines.len() {
        0 | 1 => Ok(None),
        _ => Err(Status::invalid_argument("target reference is ambiguous: reference is ambiguous")),
    }
}
